//! Says what is wrong with a manifest: every error with its place, the source around it, and how to mend it; as plain
//! text, as values for an API, and as a [`miette::Report`] for a terminal.

use std::fmt;

use miette::{
    Diagnostic, LabeledSpan, MietteError, MietteSpanContents, SourceCode, SourceSpan, SpanContents,
};
use serde::{Deserialize, Serialize};

use super::MAX_ERRORS;
use super::source::{Excerpt, Lines, Span, harmless};

/// What sort of mistake it is: stable, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ManifestErrorKind {
    /// The bytes are no text that YAML allows.
    Encoding,
    /// The text is no YAML.
    Syntax,
    /// YAML that manifests do not use: anchors, aliases, tags, several documents, keys that are no text.
    Yaml,
    /// More of something than is allowed.
    Limit,
    /// A key or a name is there twice.
    Duplicate,
    /// A key that the language does not have at this place.
    UnknownKey,
    /// The language has it, this version does not.
    NotOffered,
    /// Something required is not there.
    Missing,
    /// A list where a mapping is wanted, and the like.
    Shape,
    /// A text that does not say what its key needs.
    Value,
    /// A variable that SealCI sets itself.
    Reserved,
    /// `needs` names no action.
    UnknownAction,
    /// Actions need one another in a circle.
    Cycle,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ManifestError {
    pub kind: ManifestErrorKind,
    /// What is underlined, within one line.
    pub span: Span,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub mend: String,
    /// Where the same thing stood first.
    first: Option<Span>,
}

/// All that is wrong with a manifest: at least one error, in the order of the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestErrors {
    source: ShownSource,
    errors: Vec<ManifestError>,
    omitted: usize,
}

/// An error as an API gives it out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorView {
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub kind: ManifestErrorKind,
    pub message: String,
    pub help: String,
    /// The line, in part if it is long. Deceptive characters are replaced.
    pub source_line: String,
}

impl ManifestErrors {
    /// The errors; further ones than 200 are left out, see [`ManifestErrors::omitted`].
    pub fn errors(&self) -> &[ManifestError] {
        &self.errors
    }

    /// How many errors were found beyond those listed.
    pub fn omitted(&self) -> usize {
        self.omitted
    }

    /// What the manifest is called.
    pub fn source_name(&self) -> &str {
        &self.source.name
    }

    /// What the spans are of: the manifest's text, deceptive characters replaced by visible ones of the same length.
    /// Empty where the manifest was no text or too large.
    pub fn text(&self) -> &str {
        &self.source.text
    }

    /// The errors for `application/problem+json` and `--json`.
    pub fn views(&self) -> Vec<ErrorView> {
        let lines = Lines::of(&self.source.text);
        let view = |error: &ManifestError| ErrorView {
            file: self.source.name.clone(),
            line: error.line,
            column: error.column,
            kind: error.kind,
            message: error.message.clone(),
            help: error.mend.clone(),
            source_line: self.excerpt(&lines, error).line,
        };
        self.errors.iter().map(view).collect()
    }

    /// The errors for a terminal: `{:?}` of the report draws them around the source, by the handler that is installed.
    pub fn to_report(&self) -> miette::Report {
        miette::Report::new(ErrorsReport(self.clone()))
    }

    fn excerpt(&self, lines: &Lines<'_>, error: &ManifestError) -> Excerpt {
        let underlined = self.source.text.get(error.span.start..error.span.end).unwrap_or_default();
        let (line, start) = lines.line(error.span.start);
        Excerpt::of(lines.text_of(line), error.span.start - start, error.column, underlined.chars().count())
    }
}

impl fmt::Display for ManifestErrors {
    /// Without colour, and the same for the same manifest everywhere:
    ///
    /// ```text
    /// .sealci/pipeline.yaml:3:3: `comands` is no key of a pipeline
    ///   3 |   comands:
    ///     |   ^^^^^^^
    ///   help: did you mean `commands`?
    /// ```
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = Lines::of(&self.source.text);
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            write!(f, "{}:{}:{}: {}", self.source.name, error.line, error.column, error.message)?;
            let excerpt = self.excerpt(&lines, error);
            if !excerpt.line.trim().is_empty() {
                let number = error.line.to_string();
                let carets = "^".repeat(excerpt.caret_length);
                write!(f, "\n  {number} | {}", excerpt.line)?;
                write!(f, "\n  {:1$} | {2:3$}{carets}", "", number.len(), "", excerpt.caret_at)?;
            }
            write!(f, "\n  help: {}", error.mend)?;
        }
        if self.omitted > 0 {
            write!(f, "\n\nand {} more, not shown", self.omitted)?;
        }
        Ok(())
    }
}

impl std::error::Error for ManifestErrors {}

/// What a terminal shows: how many errors there are, then each with the source around it, as a related diagnostic.
#[derive(Debug, thiserror::Error)]
#[error("{} in {}", counted(self.0.errors.len() + self.0.omitted), self.0.source.name)]
struct ErrorsReport(ManifestErrors);

fn counted(errors: usize) -> String {
    if errors == 1 { "1 error".to_owned() } else { format!("{errors} errors") }
}

impl Diagnostic for ErrorsReport {
    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(&self.0.source)
    }

    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.0.errors.iter().map(|error| error as &dyn Diagnostic)))
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        let omitted = (self.0.omitted > 0).then(|| format!("{} more are not shown", self.0.omitted))?;
        Some(Box::new(omitted))
    }
}

impl Diagnostic for ManifestError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(&self.mend))
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let source_span = |span: Span| (span.start, span.end - span.start);
        let again = self.first.map(|_| "again here".to_owned());
        let here = LabeledSpan::new_primary_with_span(again, source_span(self.span));
        let first = self
            .first
            .map(|span| LabeledSpan::new_with_span(Some("first here".to_owned()), source_span(span)));
        Some(Box::new(std::iter::once(here).chain(first)))
    }
}

/// The manifest's name and text, both harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ShownSource {
    name: String,
    text: String,
}

/// More context than this is cut to what surrounds the span: one line may be the whole manifest.
const SHOWN_CONTEXT_BYTES: usize = 2 << 10;

impl SourceCode for ShownSource {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let contents = self.text.read_span(span, lines_before, lines_after)?;
        let (data, at, line, column, count) =
            (contents.data(), *contents.span(), contents.line(), contents.column(), contents.line_count());
        let named = |data, at, line, column, count| {
            let contents = MietteSpanContents::new_named(self.name.clone(), data, at, line, column, count);
            Ok(Box::new(contents) as Box<dyn SpanContents<'a>>)
        };
        if data.len() <= SHOWN_CONTEXT_BYTES {
            return named(data, at, line, column, count);
        }
        let (line, line_start) = Lines::of(&self.text).line(span.offset());
        let start = self.text.floor_char_boundary(span.offset().saturating_sub(80)).max(line_start);
        let end = self.text.ceil_char_boundary((span.offset() + span.len()).min(self.text.len()));
        let column = self.text[line_start..start].chars().count();
        named(&self.text.as_bytes()[start..end], (start, end - start).into(), line - 1, column, 1)
    }
}

/// Collects what the stages find, in any order.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    kept: Vec<Complaint>,
    omitted: usize,
}

#[derive(Debug)]
struct Complaint {
    kind: ManifestErrorKind,
    span: Span,
    first: Option<Span>,
    message: String,
    mend: String,
}

impl Complaints {
    pub(super) fn add(
        &mut self,
        kind: ManifestErrorKind,
        span: Span,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) {
        self.add_with_first(kind, span, None, message, mend);
    }

    /// As [`Complaints::add`]; the message gets the line on which the same thing stood `first`.
    pub(super) fn add_with_first(
        &mut self,
        kind: ManifestErrorKind,
        span: Span,
        first: Option<Span>,
        message: impl Into<String>,
        mend: impl Into<String>,
    ) {
        if self.kept.len() < MAX_ERRORS {
            self.kept.push(Complaint { kind, span, first, message: message.into(), mend: mend.into() });
        } else {
            self.omitted += 1;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Whether another complaint would only be counted.
    pub(super) fn is_full(&self) -> bool {
        self.kept.len() >= MAX_ERRORS
    }

    /// Counts a complaint that [`Complaints::is_full`] spares making.
    pub(super) fn omit(&mut self) {
        self.omitted += 1;
    }

    pub(super) fn len(&self) -> usize {
        self.kept.len() + self.omitted
    }

    /// Places and orders them. There must be one: a caller has a reason to refuse.
    pub(super) fn into_errors(mut self, name: &str, text: &str) -> ManifestErrors {
        if self.kept.is_empty() {
            debug_assert!(false, "a manifest is refused only for a reason");
            let message = "the manifest cannot be read";
            self.add(
                ManifestErrorKind::Syntax,
                Span::new(0, 0),
                message,
                "report this as a mistake of SealCI",
            );
        }
        for complaint in &mut self.kept {
            complaint.span = complaint.span.on_one_line(text);
            complaint.first = complaint.first.map(|span| span.on_one_line(text));
        }
        self.kept.sort_by(|a, b| (a.span, &a.message).cmp(&(b.span, &b.message)));
        let lines = Lines::of(text);
        let mut counted = (1, 0, 0); // line, offset and column (from 0) of the error before: columns are counted once
        let place = |complaint: Complaint| {
            let (line, line_start) = lines.line(complaint.span.start);
            let (from, column) = if counted.0 == line { (counted.1, counted.2) } else { (line_start, 0) };
            let column = column + text[from..complaint.span.start].chars().count();
            counted = (line, complaint.span.start, column);
            let message = match complaint.first {
                Some(first) => format!("{} (first on line {})", complaint.message, lines.line(first.start).0),
                None => complaint.message,
            };
            ManifestError {
                kind: complaint.kind,
                span: complaint.span,
                line,
                column: column + 1,
                message,
                mend: complaint.mend,
                first: complaint.first,
            }
        };
        let errors = self.kept.into_iter().map(place).collect();
        let name = harmless(name).replace(['\n', '\t', '\r'], "?");
        ManifestErrors { source: ShownSource { name, text: harmless(text) }, errors, omitted: self.omitted }
    }
}
