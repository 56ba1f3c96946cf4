//! Makes foreign bytes harmless before a terminal reads them, and says what our own output may look like.
//!
//! What an action prints is not ours: a log may set the window's title, write the clipboard, move the cursor over what
//! was said before, or turn the text around. [`Harmless`] lets text, line breaks, tabs and SGR colours through and
//! drops everything else. It keeps its state between calls, so a sequence split over two chunks is recognised all the
//! same, and it holds a bounded amount of it.
//!
//! ```text
//! Text ──ESC──▶ Escape ──[──▶ Csi ──final byte──▶ Text      (only `m` is passed on)
//!                  │  └─ ] P X ^ _ ─▶ Str ──BEL, ST──▶ Text  (never passed on)
//!                  └─ space../ ─▶ EscapeMore ──final──▶ Text
//! ```
//! A line break ends every sequence: one that is never closed can hide no more than the rest of its own line.

use std::io::{self, IsTerminal};

/// What our output is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terminal {
    /// A person watches, and the screen can be redrawn.
    pub interactive: bool,
    pub colours: bool,
}

impl Terminal {
    /// No terminal: what is written stays as it is.
    pub const PLAIN: Self = Self { interactive: false, colours: false };

    /// What standard output is.
    pub fn of_stdout() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        Self::decide(
            io::stdout().is_terminal(),
            set("NO_COLOR").is_some(),
            set("TERM").is_some_and(|t| t == "dumb"),
        )
    }

    fn decide(is_terminal: bool, no_color: bool, dumb: bool) -> Self {
        let interactive = is_terminal && !dumb;
        Self { interactive, colours: interactive && !no_color }
    }

    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    /// `text` in an SGR style (a colour's number), or as it is.
    pub fn paint(self, sgr: &str, text: &str) -> String {
        if self.colours && !text.is_empty() { format!("\x1b[{sgr}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The most bytes of one CSI sequence that are kept; a longer one is dropped.
const CSI_MAX_BYTES: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Text,
    Escape,
    EscapeMore,
    Csi,
    Str,
    StrEscape,
}

/// A filter from raw log bytes to text that is safe on a terminal.
#[derive(Debug)]
pub struct Harmless {
    state: State,
    colours: bool,
    /// The parameters of the CSI sequence that is being read.
    csi: String,
    csi_is_too_long: bool,
    /// A carriage return that a line feed may still follow.
    after_return: bool,
    /// The beginning of a UTF-8 character that the next chunk may complete.
    partial: Vec<u8>,
}

impl Harmless {
    pub fn new(colours: bool) -> Self {
        Self {
            state: State::Text,
            colours,
            csi: String::new(),
            csi_is_too_long: false,
            after_return: false,
            partial: Vec::new(),
        }
    }

    /// Reads the next bytes and appends what may be shown of them.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        let joined;
        let mut rest = bytes;
        if !self.partial.is_empty() {
            joined = [self.partial.as_slice(), bytes].concat();
            self.partial.clear();
            rest = &joined;
        }
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    self.text(text, out);
                    return;
                }
                Err(error) => {
                    let (good, bad) = rest.split_at(error.valid_up_to());
                    // The split is where `from_utf8` itself said that the text is good.
                    self.text(&String::from_utf8_lossy(good), out);
                    let Some(length) = error.error_len() else {
                        self.partial = bad.to_vec();
                        return;
                    };
                    self.character(char::REPLACEMENT_CHARACTER, out);
                    rest = &bad[length..];
                }
            }
        }
    }

    /// Ends the stream: what was held back for a continuation comes out.
    pub fn finish(&mut self, out: &mut String) {
        if !self.partial.is_empty() {
            self.partial.clear();
            self.character(char::REPLACEMENT_CHARACTER, out);
        }
        if std::mem::take(&mut self.after_return) {
            out.push('\n');
        }
        self.state = State::Text;
    }

    fn text(&mut self, text: &str, out: &mut String) {
        for c in text.chars() {
            self.character(c, out);
        }
    }

    fn character(&mut self, c: char, out: &mut String) {
        match c {
            '\n' => {
                self.state = State::Text;
                self.after_return = false;
                out.push('\n');
                return;
            }
            // A bare return would write over what the line said before: it becomes a line break.
            '\r' => {
                self.state = State::Text;
                self.after_return = true;
                return;
            }
            _ if std::mem::take(&mut self.after_return) => out.push('\n'),
            _ => {}
        }
        match self.state {
            State::Text => self.plain(c, out),
            State::Escape => self.escape(c, out),
            State::EscapeMore => match c {
                ' '..='/' => {}
                '0'..='~' => self.state = State::Text,
                _ => self.interrupted(c, out),
            },
            State::Csi => self.csi(c, out),
            State::Str => match c {
                '\x07' | '\x18' | '\x1a' | '\u{9c}' => self.state = State::Text,
                '\x1b' => self.state = State::StrEscape,
                _ => {}
            },
            State::StrEscape if c == '\\' => self.state = State::Text,
            State::StrEscape => self.escape(c, out),
        }
    }

    fn plain(&mut self, c: char, out: &mut String) {
        match c {
            '\x1b' => self.state = State::Escape,
            '\u{9b}' => self.begin_csi(),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => self.state = State::Str,
            '\t' => out.push('\t'),
            _ if c.is_control() => {}
            _ if reorders_text(c) => out.push(char::REPLACEMENT_CHARACTER),
            _ => out.push(c),
        }
    }

    fn escape(&mut self, c: char, out: &mut String) {
        match c {
            '[' => self.begin_csi(),
            ']' | 'P' | 'X' | '^' | '_' => self.state = State::Str,
            ' '..='/' => self.state = State::EscapeMore,
            '0'..='~' => self.state = State::Text,
            _ => self.interrupted(c, out),
        }
    }

    fn begin_csi(&mut self) {
        self.state = State::Csi;
        self.csi.clear();
        self.csi_is_too_long = false;
    }

    fn csi(&mut self, c: char, out: &mut String) {
        match c {
            ' '..='?' if self.csi.len() < CSI_MAX_BYTES => self.csi.push(c),
            ' '..='?' => self.csi_is_too_long = true,
            '@'..='~' => {
                self.state = State::Text;
                if c == 'm' && self.colours && !self.csi_is_too_long && is_visible_style(&self.csi) {
                    out.push_str("\x1b[");
                    out.push_str(&self.csi);
                    out.push('m');
                }
            }
            _ => self.interrupted(c, out),
        }
    }

    /// A character that belongs to no sequence: a new one begins, or plain text goes on.
    fn interrupted(&mut self, c: char, out: &mut String) {
        match c {
            '\x1b' => self.state = State::Escape,
            '\x18' | '\x1a' => self.state = State::Text,
            _ if c.is_ascii_control() => {}
            _ => {
                self.state = State::Text;
                self.plain(c, out);
            }
        }
    }
}

/// Whether SGR parameters only colour: nothing private, and not `8`, which hides the text.
fn is_visible_style(parameters: &str) -> bool {
    if !parameters.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b';' | b':')) {
        return false;
    }
    let mut numbers = parameters.split(';');
    while let Some(number) = numbers.next() {
        match number {
            "38" | "48" | "58" => {
                let operands = match numbers.next() {
                    Some("5") => 1,
                    Some("2") => 3,
                    _ => return false,
                };
                numbers.by_ref().take(operands).for_each(drop);
            }
            _ if number.trim_start_matches('0') == "8" => return false,
            _ => {}
        }
    }
    true
}

/// The bidirectional controls, with which a line can be made to read as another.
fn reorders_text(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}')
}

/// A foreign text in one harmless line: for names and messages between our own words.
pub fn one_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut filter = Harmless::new(false);
    filter.push(text.as_bytes(), &mut out);
    filter.finish(&mut out);
    out.trim_end().replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(bytes: &[u8]) -> String {
        let mut out = String::new();
        let mut filter = Harmless::new(true);
        filter.push(bytes, &mut out);
        filter.finish(&mut out);
        out
    }

    #[test]
    fn text_and_colours_pass() {
        for text in [
            "plain\n",
            "tab\there\n",
            "é 漢 🦀\n",
            "\x1b[31mred\x1b[0m\n",
            "\x1b[1;38;5;208mx\x1b[m",
            "\x1b[38;2;1;2;8my",
            "\x1b[4:3m~",
            "\x1b[48;5;8mgrey",
        ] {
            assert_eq!(filtered(text.as_bytes()), text);
        }
    }

    #[test]
    fn everything_else_is_dropped() {
        for (bytes, shown) in [
            (&b"a\x1b]0;title\x07b"[..], "ab"),
            (b"a\x1b]52;c;aGVsbG8=\x1b\\b", "ab"),
            (b"a\x1b]8;;javascript:alert(1)\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
            (b"a\x1bPq#0\x1b\\b", "ab"),
            (b"a\x1b_x\x1b\\\x1b^y\x1b\\\x1bXz\x1b\\b", "ab"),
            (b"a\x1b[2J\x1b[H\x1b[1Ab", "ab"),
            (b"a\x1b[?1049hb\x1b[?25l", "ab"),
            (b"a\x1bcb\x1b7\x1b8", "ab"),
            (b"a\x1b(0b", "ab"),
            (b"a\x07\x08\x00\x0b\x0c\x0e\x7fb", "ab"),
            (b"a\x1b[8mhidden\x1b[0m", "ahidden\x1b[0m"),
            (b"a\x1b[08mhidden", "ahidden"),
            (b"a\x1b[?31mb", "ab"),
            (b"a\xc2\x9b2Jb", "ab"),
            (b"a\xc2\x9d0;t\x07b", "ab"),
            (b"a\x9b2Jb", "a\u{fffd}2Jb"),
            (b"\xff\xfe", "\u{fffd}\u{fffd}"),
            ("a\u{202e}b\u{2066}c".as_bytes(), "a\u{fffd}b\u{fffd}c"),
            (b"a\x1b[31", "a"),
            (b"a\x1b", "a"),
            (b"a\xe2\x82", "a\u{fffd}"),
            (b"a\x1b\x1b[31mb", "a\x1b[31mb"),
            ("a\x1b[3é".as_bytes(), "aé"),
        ] {
            assert_eq!(filtered(bytes), shown, "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_return_never_hides_what_was_said() {
        assert_eq!(filtered(b"a\r\nb\r\r\nc\rd\r"), "a\nb\nc\nd\n");
    }

    #[test]
    fn a_line_break_ends_an_unfinished_sequence() {
        assert_eq!(filtered(b"a\x1b]0;never closed\nb\x1b[1;\nc"), "a\nb\nc");
    }

    #[test]
    fn a_long_sequence_is_dropped_and_not_kept() {
        let mut bytes = b"a\x1b[".to_vec();
        bytes.extend(std::iter::repeat_n(b'1', 100_000));
        bytes.extend(b"mb");
        let mut filter = Harmless::new(true);
        let mut out = String::new();
        filter.push(&bytes, &mut out);
        assert_eq!(out, "ab");
        assert!(filter.csi.len() <= CSI_MAX_BYTES);
    }

    #[test]
    fn chunk_boundaries_do_not_matter() {
        let bytes = "é\x1b]0;t\x07\x1b[38;5;8mx\r\n漢\x1b[2J\u{9b}1m🦀\r\x1b[8my\u{202e}z\n".as_bytes();
        let whole = filtered(bytes);
        for size in 1..bytes.len() {
            let mut filter = Harmless::new(true);
            let mut out = String::new();
            for chunk in bytes.chunks(size) {
                filter.push(chunk, &mut out);
            }
            filter.finish(&mut out);
            assert_eq!(out, whole, "in chunks of {size}");
        }
    }

    #[test]
    fn nothing_dangerous_survives_any_bytes() {
        // A small generator with a fixed seed, rich in what sequences are made of.
        let alphabet = b"\x1b[]m;8?0\x07\\Pa\n\r\xc2\x9b\xe2\x80\xae\x00";
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..2_000 {
            let bytes: Vec<u8> = (0..40)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    alphabet[(state % alphabet.len() as u64) as usize]
                })
                .collect();
            let shown = filtered(&bytes);
            for (at, c) in shown.char_indices() {
                match c {
                    '\x1b' => {
                        let end = shown[at..].find('m').expect("only SGR is passed");
                        assert!(
                            shown[at + 2..at + end]
                                .bytes()
                                .all(|b| b.is_ascii_digit() || b == b';' || b == b':')
                        );
                    }
                    '\n' | '\t' => {}
                    _ => assert!(!c.is_control() && !reorders_text(c), "{bytes:?}"),
                }
            }
        }
    }

    #[test]
    fn without_colours_nothing_but_text_is_left() {
        let mut out = String::new();
        Harmless::new(false).push(b"\x1b[31mred\x1b[0m", &mut out);
        assert_eq!(out, "red");
        assert_eq!(Terminal::PLAIN.red("x"), "x");
        assert_eq!(Terminal::decide(true, false, false), Terminal { interactive: true, colours: true });
        assert_eq!(Terminal::decide(true, true, false), Terminal { interactive: true, colours: false });
        assert_eq!(Terminal::decide(true, false, true), Terminal::PLAIN);
        assert_eq!(Terminal::decide(false, false, false), Terminal::PLAIN);
    }

    #[test]
    fn one_line_stays_one() {
        assert_eq!(one_line("a\nb\x1b]0;x\x07\tc\r\n"), "a b c");
    }
}
