//! Prints what a command found: as words for people, or with `--json` for programs.

use std::io::{self, Write};

use serde::Serialize;

use crate::exit::Failure;

#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl Args {
    /// Prints `value` as JSON if asked to, else the words.
    pub fn print<T: Serialize>(self, value: &T, words: impl FnOnce() -> String) -> Result<(), Failure> {
        let text = if self.json {
            let mut text = serde_json::to_string_pretty(value)
                .map_err(|error| Failure::infrastructure(format!("cannot write this as JSON: {error}")))?;
            text.push('\n');
            text
        } else {
            words()
        };
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        stdout.flush()?;
        Ok(())
    }
}
