//! Knows a manifest's text: whether it is text at all, where in it something stands, and how it can be shown safely.

use std::borrow::Cow;

use super::error::{Complaints, ManifestErrorKind};
use super::{MAX_ERRORS, MAX_MANIFEST_BYTES};

/// A manifest as it was found.
#[derive(Debug, Clone, Copy)]
pub struct ManifestSource<'t> {
    /// What errors call it: its path in the repository, `.sealci/pipeline.yaml`.
    pub name: &'t str,
    /// YAML in UTF-8, with or without a byte-order mark.
    pub text: &'t [u8],
}

/// A range of bytes of the text, which begins after the byte-order mark if there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Span {
    pub start: usize,
    /// Exclusive.
    pub end: usize,
}

impl Span {
    pub(super) fn new(start: usize, end: usize) -> Self {
        Self { start, end: end.max(start) }
    }

    /// The part of it on its first line, within `text`, on character boundaries: what can be underlined.
    pub(super) fn on_one_line(self, text: &str) -> Self {
        let start = text.floor_char_boundary(self.start.min(text.len()));
        let end = text.floor_char_boundary(self.end.min(text.len())).max(start);
        let covered = &text[start..end];
        let line = covered.split(['\n', '\r']).next().unwrap_or(covered);
        Self { start, end: start + line.trim_end().len() }
    }
}

/// What [`decode`] makes of bytes.
pub(super) enum Decoded<'t> {
    Text(&'t str),
    /// It was complained about; `kept` is as much as can be shown.
    Unreadable {
        kept: &'t str,
    },
}

/// Takes bytes as UTF-8 that YAML allows (YAML 1.2.2, section 5.1), and no more of them than a manifest may have.
pub(super) fn decode<'t>(bytes: &'t [u8], complaints: &mut Complaints) -> Decoded<'t> {
    let nothing_shown = Decoded::Unreadable { kept: "" };
    let start = Span::new(0, 0);
    if bytes.len() > MAX_MANIFEST_BYTES {
        complaints.add(
            ManifestErrorKind::Limit,
            start,
            format!("the manifest has {} bytes, at most {MAX_MANIFEST_BYTES} (1 MiB) are read", bytes.len()),
            "move long scripts into files of the repository and call them",
        );
        return nothing_shown;
    }
    if is_wider_unicode(bytes) {
        complaints.add(
            ManifestErrorKind::Encoding,
            start,
            "the manifest is in UTF-16 or UTF-32, not in UTF-8",
            "save it as UTF-8: `iconv -f UTF-16 -t UTF-8`",
        );
        return nothing_shown;
    }
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let at = error.valid_up_to();
            complaints.add(
                ManifestErrorKind::Encoding,
                Span::new(at, at),
                format!("the byte 0x{:02X} here is not UTF-8", bytes.get(at).copied().unwrap_or_default()),
                "save the file as UTF-8",
            );
            let kept = bytes.get(..at).and_then(|valid| std::str::from_utf8(valid).ok()).unwrap_or_default();
            return Decoded::Unreadable { kept };
        }
    };
    refuse_unprintable(text, complaints);
    if complaints.is_empty() { Decoded::Text(text) } else { Decoded::Unreadable { kept: text } }
}

/// Tells UTF-16 and UTF-32 by their byte-order marks, or by the zero byte that each ASCII character has in them.
fn is_wider_unicode(bytes: &[u8]) -> bool {
    match bytes {
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => true,
        [0, second, ..] => *second != 0 || bytes.get(..4).is_some_and(|quad| quad[..3] == [0, 0, 0]),
        [first, 0, third, ..] => *first != 0 && (*third != 0 || bytes.get(3) == Some(&0)),
        _ => false,
    }
}

/// Complains once about each run of characters that no YAML text has.
fn refuse_unprintable(text: &str, complaints: &mut Complaints) {
    let is_refused = |c: char| match c {
        '\t' | '\n' | '\r' | '\u{85}' => false,
        '\u{FFFE}' | '\u{FFFF}' => true,
        c => c.is_control(),
    };
    let mut from = 0;
    while let Some((start, first)) = text[from..].char_indices().find(|(_, c)| is_refused(*c)) {
        let start = from + start;
        let end = text[start..].find(|c| !is_refused(c)).map_or(text.len(), |length| start + length);
        complaints.add(
            ManifestErrorKind::Encoding,
            Span::new(start, end),
            format!("the character U+{:04X} cannot stand in YAML", u32::from(first)),
            "remove it, or write it as an escape in a double-quoted text: \"\\e[1m\"",
        );
        from = end;
        if complaints.len() >= MAX_ERRORS {
            return; // a file of nothing else is no manifest
        }
    }
}

/// Finds lines and columns, both counted from 1, columns in characters.
pub(super) struct Lines<'t> {
    text: &'t str,
    /// Where each line begins. A lone carriage return ends a line, as in YAML.
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    pub(super) fn of(text: &'t str) -> Self {
        let bytes = text.as_bytes();
        let ends_line = |at: usize| match bytes[at] {
            b'\n' => true,
            b'\r' => bytes.get(at + 1) != Some(&b'\n'),
            _ => false,
        };
        let starts =
            std::iter::once(0).chain((0..bytes.len()).filter(|at| ends_line(*at)).map(|at| at + 1)).collect();
        Self { text, starts }
    }

    /// The line, and where it begins.
    pub(super) fn line(&self, offset: usize) -> (usize, usize) {
        let line = self.starts.partition_point(|start| *start <= offset).max(1);
        (line, self.starts.get(line - 1).copied().unwrap_or_default())
    }

    /// The line's text, without its end.
    pub(super) fn text_of(&self, line: usize) -> &'t str {
        let start = self.starts.get(line - 1).copied().unwrap_or(self.text.len());
        let end = self.starts.get(line).copied().unwrap_or(self.text.len());
        self.text[start..end].trim_end_matches(['\n', '\r'])
    }
}

/// The part of a line that is shown, around what is underlined.
pub(super) struct Excerpt {
    pub(super) line: String,
    /// In characters.
    pub(super) caret_at: usize,
    /// In characters, at least 1.
    pub(super) caret_length: usize,
}

/// Longer lines are shown in part.
const EXCERPT_CHARACTERS: usize = 140;

impl Excerpt {
    /// The caret comes `at` a byte of the line, under the `column` from 1; `length` of it are underlined.
    pub(super) fn of(line: &str, at: usize, column: usize, length: usize) -> Self {
        const BEFORE: usize = 40;
        let before = column - 1;
        let (start, caret_at) = if before + length.min(BEFORE) > EXCERPT_CHARACTERS {
            // Counted backwards from the caret: the line may be the whole manifest.
            let start = line[..at].char_indices().rev().nth(BEFORE - 1).map_or(0, |(start, _)| start);
            (start, BEFORE + 1)
        } else {
            (0, before)
        };
        let mut shown = if start > 0 { "…".to_owned() } else { String::new() };
        let mut characters = line[start..].chars();
        shown.extend(characters.by_ref().take(EXCERPT_CHARACTERS).map(|c| if c == '\t' { ' ' } else { c }));
        let visible = shown.chars().count();
        if characters.next().is_some() {
            shown.push('…');
        }
        let caret_length = length.clamp(1, visible.saturating_sub(caret_at).max(1));
        Self { line: shown, caret_at, caret_length }
    }
}

/// Whether a terminal or a page may do with the character something else than show it: control characters, marks that
/// change the direction of text, invisible separators.
pub(super) fn is_deceptive(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61C}' | '\u{200B}' | '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{206F}'
            | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E007F}')
}

/// The text with every deceptive character replaced by a visible one of the same length in bytes, so that spans and
/// columns stay what they are. Line ends and tabs remain; a lone carriage return becomes the line feed that it means.
pub(super) fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '\n' | '\t' => shown.push(c),
            '\r' => shown.push(if characters.peek() == Some(&'\n') { '\r' } else { '\n' }),
            c if is_deceptive(c) => shown.push(['?', '¤', '\u{FFFD}', '\u{10102}'][c.len_utf8() - 1]),
            c => shown.push(c),
        }
    }
    shown
}

/// Text of the manifest within a message: in backticks, short, on one line, harmless.
pub(super) fn quoted(text: &str) -> Cow<'static, str> {
    const SHOWN: usize = 60;
    if text.is_empty() {
        return Cow::Borrowed("``");
    }
    let mut quoted = String::from("`");
    for c in text.chars().take(SHOWN) {
        if is_deceptive(c) {
            quoted.extend(c.escape_default());
        } else {
            quoted.push(c);
        }
    }
    if text.chars().nth(SHOWN).is_some() {
        quoted.push('…');
    }
    quoted.push('`');
    Cow::Owned(quoted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_line_feeds_carriage_returns_and_both() {
        let text = "a\nbc\r\nd\re";
        let lines = Lines::of(text);
        assert_eq!((1..=4).map(|line| lines.text_of(line)).collect::<Vec<_>>(), ["a", "bc", "d", "e"]);
        assert_eq!(lines.line(0), (1, 0));
        assert_eq!(lines.line(3), (2, 2));
        assert_eq!(lines.line(text.len()), (4, 8));
        assert_eq!(Lines::of("").line(0), (1, 0));
    }

    #[test]
    fn harmless_text_keeps_every_byte_in_its_place() {
        let text = "a\u{1b}[1m\u{9b}\u{202e}é\u{E0041}\rb\r\nc\n";
        let shown = harmless(text);
        assert_eq!(shown, "a?[1m¤\u{FFFD}é\u{10102}\nb\r\nc\n");
        assert_eq!(shown.chars().count(), text.chars().count());
        assert_eq!(shown.len(), text.len());
    }

    #[test]
    fn a_long_line_is_shown_around_the_caret() {
        let line = format!("{}X{}", "a".repeat(1000), "b".repeat(1000));
        let excerpt = Excerpt::of(&line, 1000, 1001, 1);
        assert_eq!(excerpt.line.chars().nth(excerpt.caret_at), Some('X'));
        assert!(excerpt.line.chars().count() <= EXCERPT_CHARACTERS + 2);
        let excerpt = Excerpt::of("name: x", 6, 7, 400);
        assert_eq!((excerpt.line.as_str(), excerpt.caret_at, excerpt.caret_length), ("name: x", 6, 1));
    }

    #[test]
    fn a_span_is_cut_at_its_first_line() {
        let text = "a: é\nb";
        assert_eq!(Span::new(3, 7).on_one_line(text), Span::new(3, 5));
        assert_eq!(Span::new(4, 99).on_one_line(text), Span::new(3, 5));
        assert_eq!(Span::new(99, 120).on_one_line(text), Span::new(7, 7));
    }
}
