//! Reads what the guest says: the test programs' lines, and its script's between them.
//!
//! ```text
//! guest: begin PART
//!   …                        what a test program prints
//! guest: skipped TEST: WHY
//! guest: end PART STATUS
//! guest: over
//! ```

use anyhow::{Result, bail};

/// What a line of a figure begins with (`crates/microvm/benches/machines.rs`).
const MEASURED: &str = "measure: end ";

/// What a line is.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    ForPeople(String),
    ForUs,
}

/// What has been said so far.
#[derive(Debug)]
pub struct Transcript {
    parts: Vec<Part>,
    running: Option<usize>,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
    over: bool,
}

#[derive(Debug)]
struct Part {
    name: &'static str,
    status: Option<i32>,
    passed: u64,
}

impl Transcript {
    /// Of these parts, in this order.
    pub fn new(names: impl Iterator<Item = &'static str>) -> Self {
        let parts = names.map(|name| Part { name, status: None, passed: 0 }).collect();
        Self { parts, running: None, failed: Vec::new(), skipped: Vec::new(), over: false }
    }

    /// Takes the next line. Tests are named after their part: both run tests of the same name.
    pub fn take(&mut self, line: &str) -> Said {
        if let Some(words) = line.strip_prefix("guest: ") {
            return self.take_word(words);
        }
        let Some(part) = self.running.map(|index| &mut self.parts[index]) else {
            return Said::ForPeople(line.to_owned());
        };
        // A part that measures has no tests, and must have measured something.
        part.passed += u64::from(line.starts_with(MEASURED));
        let verdict = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... "));
        let Some((test, verdict)) = verdict else { return Said::ForPeople(line.to_owned()) };
        let name = format!("qemu::{}::{test}", part.name);
        if verdict == "ok" {
            part.passed += 1;
        } else if verdict.starts_with("FAILED") {
            self.failed.push(name.clone());
        }
        Said::ForPeople(format!("test {name} ... {verdict}"))
    }

    fn take_word(&mut self, words: &str) -> Said {
        let (word, rest) = words.split_once(' ').unwrap_or((words, ""));
        let index_of = |name: &str| self.parts.iter().position(|part| part.name == name);
        match word {
            "begin" => {
                self.running = index_of(rest);
                return Said::ForPeople(format!("\nin the guest, the part `{rest}`:"));
            }
            "skipped" => {
                let part = self.running.map_or("", |index| self.parts[index].name);
                let (test, why) = rest.split_once(": ").unwrap_or((rest, "no reason was given"));
                self.skipped.push((format!("qemu::{part}::{test}"), why.to_owned()));
            }
            "end" => {
                if let Some((name, status)) = rest.rsplit_once(' ')
                    && let Some(index) = index_of(name)
                {
                    self.parts[index].status = status.parse().ok();
                }
                self.running = None;
            }
            "over" => self.over = true,
            _ => return Said::ForPeople(words.to_owned()),
        }
        Said::ForUs
    }

    /// What was skipped, and why.
    pub fn skipped(&self) -> impl Iterator<Item = (&str, &str)> {
        self.skipped.iter().map(|(name, why)| (name.as_str(), why.as_str()))
    }

    /// Whether all parts ran to their end and passed.
    pub fn verdict(&self) -> Result<()> {
        if !self.failed.is_empty() {
            bail!("{} tests failed in the guest: {}", self.failed.len(), self.failed.join(", "));
        }
        for part in &self.parts {
            match part.status {
                Some(0) if part.passed == 0 => bail!("no test ran in the part `{}`", part.name),
                Some(0) => {}
                Some(status) => bail!("the test program of the part `{}` ended with {status}", part.name),
                None => bail!("the guest ended before the part `{}` did", part.name),
            }
        }
        if self.over { Ok(()) } else { bail!("the guest ended before its script did") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(lines: &[&str]) -> (Transcript, Vec<String>) {
        let mut transcript = Transcript::new(["root", "user"].into_iter());
        let shown = lines.iter().filter_map(|line| match transcript.take(line) {
            Said::ForPeople(text) => Some(text),
            Said::ForUs => None,
        });
        let shown = shown.collect();
        (transcript, shown)
    }

    const WHOLE: [&str; 9] = [
        "guest: begin root",
        "test a::b ... ok",
        "test c - should panic ... ok",
        "guest: skipped a::b: it is missing",
        "guest: end root 0",
        "guest: begin user",
        "test a::b ... ok",
        "guest: end user 0",
        "guest: over",
    ];

    #[test]
    fn tests_are_named_after_their_part() {
        let (transcript, shown) = transcript(&WHOLE);
        assert!(shown.contains(&"test qemu::root::a::b ... ok".to_owned()), "{shown:?}");
        assert!(shown.contains(&"test qemu::user::a::b ... ok".to_owned()), "{shown:?}");
        assert_eq!(transcript.skipped().collect::<Vec<_>>(), [("qemu::root::a::b", "it is missing")]);
        transcript.verdict().unwrap();
    }

    #[test]
    fn what_is_not_whole_does_not_pass() {
        for cut in 0..WHOLE.len() {
            let (transcript, _) = transcript(&WHOLE[..cut]);
            assert!(transcript.verdict().is_err(), "{cut}");
        }
        let with = |index: usize, line: &'static str| {
            let mut lines = WHOLE;
            lines[index] = line;
            transcript(&lines).0.verdict().unwrap_err().to_string()
        };
        assert!(with(6, "test a::b ... FAILED").contains("qemu::user::a::b"));
        assert!(with(6, "nothing").contains("no test ran in the part `user`"));
        assert!(with(7, "guest: end user 101").contains("ended with 101"));
        assert!(with(7, "guest: end user x").contains("before the part `user`"));
    }
}
