//! Shows one log line by line, each behind its action's name, or as one JSON object a line.

use super::json;
use crate::terminal::{Harmless, Terminal, one_line};

/// A longer line is shown in pieces of this size, so that no line is ever held whole.
const LINE_MAX_BYTES: usize = 64 << 10;

/// What stands before a line that SealCI says about an action.
pub(super) fn remark_prefix(name: &str, width: usize, terminal: Terminal) -> String {
    terminal.dim(&format!("{:width$} > ", one_line(name)))
}

/// Cuts one log into lines, each with its prefix; holds back a line that is not whole yet.
pub struct Lines {
    form: Form,
    line: Vec<u8>,
}

/// What becomes of a line.
enum Form {
    Words {
        prefix: String,
        /// The prefix of what SealCI says about this log.
        remark: String,
        /// On a terminal, what makes the bytes harmless; elsewhere they stay as they are.
        harmless: Option<Harmless>,
    },
    Json {
        action: String,
        attempt: u32,
    },
}

impl Lines {
    /// Prefixes of one log are as wide as the widest action's name, and coloured by the name.
    pub fn new(name: &str, width: usize, terminal: Terminal) -> Self {
        let name = one_line(name);
        let palette = ["36", "35", "34", "33", "32", "96", "95", "94"];
        let colour = palette
            [name.bytes().fold(7_usize, |sum, byte| sum * 31 % 1009 + usize::from(byte)) % palette.len()];
        let form = Form::Words {
            prefix: terminal.paint(colour, &format!("{name:width$} | ")),
            remark: remark_prefix(&name, width, terminal),
            harmless: terminal.interactive.then(|| Harmless::new(terminal.colours)),
        };
        Self { form, line: Vec::new() }
    }

    pub(super) fn json(action: String, attempt: u32) -> Self {
        Self { form: Form::Json { action, attempt }, line: Vec::new() }
    }

    /// Takes in the next bytes, and writes the lines that are whole.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut text = String::new();
        let bytes = match &mut self.form {
            Form::Words { harmless: Some(filter), .. } => {
                filter.push(bytes, &mut text);
                text.as_bytes()
            }
            _ => bytes,
        };
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            for piece in part.chunks(LINE_MAX_BYTES) {
                self.line.extend_from_slice(piece);
                if self.line.ends_with(b"\n") || self.line.len() >= LINE_MAX_BYTES {
                    self.end_of_line(out);
                }
            }
        }
    }

    /// Writes what is left, as a line.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        if let Form::Words { harmless: Some(filter), .. } = &mut self.form {
            let mut text = String::new();
            filter.finish(&mut text);
            self.line.extend(text.bytes());
        }
        if !self.line.is_empty() {
            self.end_of_line(out);
        }
    }

    /// Writes what is missing, as a line.
    pub(super) fn gap(&self, missing_bytes: u64, reason: &str, out: &mut Vec<u8>) {
        match &self.form {
            Form::Words { remark, .. } => {
                out.extend(format!("{remark}{}\n", missing(missing_bytes, reason)).bytes());
            }
            Form::Json { action, attempt } => {
                json::line(&json::gap(action, *attempt, missing_bytes, reason), out);
            }
        }
    }

    fn end_of_line(&mut self, out: &mut Vec<u8>) {
        let line = self.line.strip_suffix(b"\n").unwrap_or(&self.line);
        match &self.form {
            Form::Words { prefix, harmless, .. } => {
                out.extend_from_slice(prefix.as_bytes());
                out.extend_from_slice(line);
                // A colour that was left on would run into the next prefix.
                if harmless.is_some() && line.contains(&0x1b) {
                    out.extend_from_slice(b"\x1b[0m");
                }
                out.push(b'\n');
            }
            Form::Json { action, attempt } => json::line(&json::log(action, *attempt, line), out),
        }
        self.line.clear();
    }
}

/// Says what of a log is missing. No bytes stand for a rest whose length nobody knows.
pub fn missing(missing_bytes: u64, reason: &str) -> String {
    let reason = one_line(reason);
    match missing_bytes {
        0 => format!("the rest of the log is missing: {reason}"),
        bytes => format!("{bytes} bytes of the log are missing: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_end_is_not_held() {
        let mut lines = Lines::new("b", 1, Terminal::PLAIN);
        let mut out = Vec::new();
        for _ in 0..100 {
            lines.push(&[0; 10_000], &mut out);
            assert!(lines.line.capacity() <= 2 * LINE_MAX_BYTES);
        }
        assert!(out.len() > 900_000);
    }
}
