//! Writes to standard output: plainly, or on a terminal above a status line that is redrawn in place.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal::{Terminal, one_line};

/// Standard output while something is followed.
pub struct Screen {
    status: Option<ProgressBar>,
}

impl Screen {
    pub fn new(terminal: Terminal) -> Self {
        let status = terminal.interactive.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
            // A template that does not parse would only cost the spinner.
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { status }
    }

    /// Writes above the status line. What is written ends with a line break.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let write = || {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        };
        match &self.status {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    pub fn status(&mut self, text: &str) {
        if let Some(bar) = &self.status {
            bar.set_message(one_line(text));
        }
    }

    pub fn clear_status(&mut self) {
        if let Some(bar) = self.status.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.clear_status();
    }
}
