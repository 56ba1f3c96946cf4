//! Turns YAML text into a tree in which everything knows its place, and refuses what of YAML manifests do not use.
//!
//! Absent here: any meaning of keys and values. A node that was complained about is [`Content::Refused`]; readers pass
//! over it in silence.

use std::borrow::Cow;

use granit_parser::{ErrorKind, Event, Parser, ScalarStyle, ScanError, StrInput};

use super::error::{Complaints, ManifestErrorKind};
use super::source::{self, Span, quoted};
use super::{MAX_NESTING, MAX_NODES, MAX_VALUE_BYTES};

/// A value and where it stands.
#[derive(Debug)]
pub(super) struct Node<'t> {
    pub(super) span: Span,
    pub(super) content: Content<'t>,
}

/// What a value is.
#[derive(Debug)]
pub(super) enum Content<'t> {
    /// Nothing was written.
    Nothing,
    Text(Cow<'t, str>),
    Sequence(Vec<Node<'t>>),
    /// In the order of the text, without doubles.
    Mapping(Vec<Entry<'t>>),
    /// It was complained about.
    Refused,
}

impl Content<'_> {
    /// For messages: "…, this is a list".
    pub(super) fn describe(&self) -> &'static str {
        match self {
            Self::Nothing => "nothing is written",
            Self::Text(_) => "this is a text",
            Self::Sequence(_) => "this is a list",
            Self::Mapping(_) => "this is a mapping",
            Self::Refused => "this cannot be read",
        }
    }
}

/// A key of a mapping and its value.
#[derive(Debug)]
pub(super) struct Entry<'t> {
    pub(super) key: Cow<'t, str>,
    pub(super) key_span: Span,
    pub(super) value: Node<'t>,
}

/// Reads the one document of `text`. None where there is none, or where it is no YAML: that was complained about, and
/// so was all that had been found until then.
pub(super) fn build<'t>(text: &'t str, complaints: &mut Complaints) -> Option<Node<'t>> {
    let options = granit_parser::options! {
        emit_anchor_events: true,
        emit_unresolved_aliases: true,
        flow_nesting_limit: MAX_NESTING,
        block_nesting_limit: MAX_NESTING,
    };
    let mut builder = Builder { complaints, open: Vec::new(), root: None, nodes: 0 };
    let mut documents = 0;
    for event in Parser::<StrInput<'_>>::new_from_str_with_options(text, options) {
        let (event, place) = match event {
            Ok(event) => event,
            Err(error) => {
                refuse_syntax(&error, text, builder.complaints);
                return None;
            }
        };
        let span = span_of(&place);
        if let Event::DocumentStart(..) = event {
            documents += 1;
            if documents > 1 {
                let message = "a second document begins here, and a manifest is one";
                let mend = "move it to a file of its own: each file in `.sealci/` is a pipeline";
                builder.complaints.add(ManifestErrorKind::Yaml, span, message, mend);
                break;
            }
        }
        if let Some(tag) = place.tag_span() {
            let message = "tags (`!…`) have no place in a manifest";
            let mend = "remove it: a value is always the text as written; quote a text that begins with `!`";
            builder.complaints.add(ManifestErrorKind::Yaml, span_of(&tag), message, mend);
        }
        builder.take(event, span);
        if builder.nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} keys and values");
            builder.complaints.add(
                ManifestErrorKind::Limit,
                span,
                message,
                "split it into several manifests",
            );
            return None;
        }
    }
    let root = builder.root.filter(|root| !matches!(root.content, Content::Nothing));
    if root.is_none() {
        let mend = "a manifest begins with `name: …` and `actions:`";
        complaints.add(ManifestErrorKind::Missing, Span::new(0, 0), "the manifest is empty", mend);
    }
    root
}

fn span_of(place: &granit_parser::Span) -> Span {
    // A parser over a `str` knows every byte offset.
    Span::new(place.start.byte_offset().unwrap_or_default(), place.end.byte_offset().unwrap_or_default())
}

/// Puts nodes into the collections that are open.
struct Builder<'t, 'c> {
    complaints: &'c mut Complaints,
    open: Vec<Open<'t>>,
    root: Option<Node<'t>>,
    nodes: usize,
}

/// A collection whose end has not come.
enum Open<'t> {
    Sequence(Span, Vec<Node<'t>>),
    Mapping(Span, Vec<Entry<'t>>, Option<Key<'t>>),
}

/// A key that waits for its value; without a text it was refused, and its value is passed over.
struct Key<'t> {
    text: Option<Cow<'t, str>>,
    span: Span,
}

impl<'t> Builder<'t, '_> {
    fn take(&mut self, event: Event<'t>, span: Span) {
        match event {
            Event::SequenceStart(..) => self.open.push(Open::Sequence(span, Vec::new())),
            Event::MappingStart(..) => self.open.push(Open::Mapping(span, Vec::new(), None)),
            Event::SequenceEnd | Event::MappingEnd => self.close(span),
            Event::Scalar(text, style, ..) => {
                let content = self.scalar(text, style, span);
                self.put(Node { span, content });
            }
            Event::Alias(_) | Event::UnresolvedAlias(_) => {
                let message = "aliases (`*…`) have no place in a manifest";
                let mend = "write the value out; quote a text that begins with `*`";
                self.complaints.add(ManifestErrorKind::Yaml, span, message, mend);
                self.put(Node { span, content: Content::Refused });
            }
            Event::Anchor(..) => {
                let message = "anchors (`&…`) have no place in a manifest";
                let mend =
                    "remove it, and write the value out where it is used; quote a text that begins with `&`";
                self.complaints.add(ManifestErrorKind::Yaml, span, message, mend);
            }
            _ => {}
        }
    }

    fn scalar(&mut self, text: Cow<'t, str>, style: ScalarStyle, span: Span) -> Content<'t> {
        if style == ScalarStyle::Plain && span.start == span.end {
            return Content::Nothing; // the parser says `~`; where `~` was written, the span has a byte
        }
        if text.len() > MAX_VALUE_BYTES {
            let message =
                format!("a text of {} bytes, at most {MAX_VALUE_BYTES} (64 KiB) are taken", text.len());
            let mend = "keep it in a file of the repository";
            self.complaints.add(ManifestErrorKind::Limit, span, message, mend);
            return Content::Refused;
        }
        Content::Text(text)
    }

    fn close(&mut self, end: Span) {
        let node = match self.open.pop() {
            Some(Open::Sequence(start, items)) => {
                Node { span: Span::new(start.start, end.end), content: Content::Sequence(items) }
            }
            Some(Open::Mapping(start, entries, _)) => {
                let content = Content::Mapping(without_doubles(entries, self.complaints));
                Node { span: Span::new(start.start, end.end), content }
            }
            None => return,
        };
        self.put(node);
    }

    fn put(&mut self, node: Node<'t>) {
        self.nodes += 1;
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::Sequence(_, items)) => items.push(node),
            Some(Open::Mapping(_, entries, waiting)) => match waiting.take() {
                Some(Key { text: Some(key), span }) => {
                    entries.push(Entry { key, key_span: span, value: node })
                }
                Some(Key { text: None, .. }) => {}
                None => *waiting = Some(key_of(node, self.complaints)),
            },
        }
    }
}

fn key_of<'t>(node: Node<'t>, complaints: &mut Complaints) -> Key<'t> {
    let text = match node.content {
        Content::Text(text) => Some(text),
        Content::Refused => None,
        Content::Nothing => {
            complaints.add(
                ManifestErrorKind::Yaml,
                node.span,
                "the key is missing",
                "write a key before the `:`",
            );
            None
        }
        Content::Sequence(_) | Content::Mapping(_) => {
            let message = "a key must be a text";
            complaints.add(ManifestErrorKind::Yaml, node.span, message, "quote it if it is meant as text");
            None
        }
    };
    Key { text, span: node.span }
}

/// Complains about keys that were there before, and leaves them out.
fn without_doubles<'t>(mut entries: Vec<Entry<'t>>, complaints: &mut Complaints) -> Vec<Entry<'t>> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by(|a, b| (&entries[*a].key, a).cmp(&(&entries[*b].key, b)));
    let mut is_double = vec![false; entries.len()];
    let mut first = 0;
    for pair in order.windows(2) {
        let (before, this) = (pair[0], pair[1]);
        if entries[before].key != entries[this].key {
            continue;
        }
        if !is_double[before] {
            first = before;
        }
        is_double[this] = true;
        complaints.add_with_first(
            ManifestErrorKind::Duplicate,
            entries[this].key_span,
            Some(entries[first].key_span),
            format!("{} is there twice", quoted(&entries[this].key)),
            "keep one of them, or rename one",
        );
    }
    let mut doubles = is_double.into_iter();
    entries.retain(|_| !doubles.next().unwrap_or(false));
    entries
}

fn refuse_syntax(error: &ScanError, text: &str, complaints: &mut Complaints) {
    let at = error.marker().byte_offset().unwrap_or_default();
    let at = if is_about_tabs(error.kind()) { indenting_tab(text, at).unwrap_or(at) } else { at };
    let span = Span::new(at, at + 1);
    if *error.kind() == ErrorKind::RecursionLimitExceeded {
        let message = format!("more than {MAX_NESTING} levels within one another");
        let mend = "the language needs no more than seven; look for a bracket that is not closed";
        complaints.add(ManifestErrorKind::Limit, span, message, mend);
        return;
    }
    let message = match error.kind() {
        ErrorKind::UnexpectedCharacter { character } if source::is_deceptive(*character) => {
            format!("not YAML: unexpected U+{:04X}", u32::from(*character))
        }
        kind => format!("not YAML: {kind}"),
    };
    complaints.add(ManifestErrorKind::Syntax, span, message, mend_of(error.kind()));
}

fn is_about_tabs(kind: &ErrorKind) -> bool {
    use ErrorKind as E;
    matches!(
        kind,
        E::TabNotAllowed
            | E::TabInBlockIndentation
            | E::TabInIndentation
            | E::TabAtBlockScalarStart
            | E::TabInPlainScalar
    )
}

/// The first tab that indents a line, from the line of `from` on: the parser may point at the text that the line goes
/// on with.
fn indenting_tab(text: &str, from: usize) -> Option<usize> {
    let mut start = text.get(..from)?.rfind(['\n', '\r']).map_or(0, |end| end + 1);
    loop {
        let indent = text[start..].len() - text[start..].trim_start_matches([' ', '\t']).len();
        if let Some(tab) = text[start..start + indent].find('\t') {
            return Some(start + tab);
        }
        start += text[start..].find(['\n', '\r'])? + 1;
    }
}

fn mend_of(kind: &ErrorKind) -> &'static str {
    use ErrorKind as E;
    match kind {
        kind if is_about_tabs(kind) => "indent with spaces: YAML allows no tabs there",
        E::UnclosedQuotedScalar | E::DocumentIndicatorInQuotedScalar => {
            "close the quote that opens here or above"
        }
        E::UnclosedFlowCollection { .. }
        | E::MismatchedFlowCollectionEnd { .. }
        | E::MisplacedFlowCollectionEnd
        | E::ExpectedFlowMappingSeparator
        | E::ExpectedFlowSequenceSeparator
        | E::UnexpectedEofFlowMapping
        | E::UnexpectedEofFlowSequence => {
            "see that brackets and braces are paired and entries parted by commas"
        }
        E::MappingValueNotAllowed | E::MappingKeyNotAllowed | E::InvalidColonPlacement => {
            "quote a text that contains `: `, close an open `[` or `{`, or check the indentation"
        }
        E::UnexpectedCharacter { .. } => {
            "quote a text that begins with `@`, `` ` ``, `%` or another special character"
        }
        E::UnknownQuotedScalarEscape | E::InvalidQuotedScalarHexEscape => {
            "in double quotes a backslash begins an escape: double it, or use single quotes"
        }
        E::BomInsideDocument => {
            "remove the byte-order mark (U+FEFF): it may stand at the very beginning only"
        }
        E::UndeclaredTagHandle | E::MissingTagUri | E::ExpectedTagBang => "quote a text that begins with `!`",
        E::MissingAnchorOrAliasName => "quote a text that begins with `*` or `&`",
        _ => "check quotes and indentation here and on the lines above",
    }
}
