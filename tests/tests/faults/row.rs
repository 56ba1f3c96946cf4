//! Writes down how a fault was survived, for the table that `cargo xtask faults` makes.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::{Duration, Instant};

use sealci_tests::{Installation, Periods, host, skip};
use serde_json::json;

/// A row of the table. One that is dropped without its figure has failed.
pub struct Row {
    fault: &'static str,
    how: &'static str,
    passes_when: &'static str,
    periods: Periods,
    is_written: bool,
}

impl Row {
    pub fn begin(
        fault: &'static str,
        periods: Periods,
        how: &'static str,
        passes_when: &'static str,
    ) -> Self {
        Self { fault, how, passes_when, periods, is_written: false }
    }

    /// An installation that nothing was started of, at this row's periods.
    pub fn installation(&self) -> Installation {
        let mut installation = Installation::none();
        installation.periods = self.periods;
        installation
    }

    /// A period as it is shipped, or its tenth.
    pub fn period(&self, seconds: u64) -> Duration {
        match self.periods {
            Periods::AsShipped => Duration::from_secs(seconds),
            Periods::Usual | Periods::Tenth => Duration::from_millis(seconds * 100),
        }
    }

    /// What was measured; the fault was survived.
    pub fn passed(mut self, figure: &str) {
        self.write("passed", figure);
    }

    /// Says loudly that the row was not tried.
    pub fn skip(mut self, capability: &str, why: &str) {
        self.is_written = true;
        skip(capability, self.fault, why);
        self.write("SKIPPED", why);
    }

    /// Whether this process is root's; the row is skipped otherwise.
    pub fn needs_root(self) -> Option<Self> {
        if host::is_root() {
            return Some(self);
        }
        self.skip("root", "only root can cause it");
        None
    }

    fn write(&mut self, result: &str, figure: &str) {
        self.is_written = true;
        let periods = match self.periods {
            Periods::AsShipped => "as shipped",
            Periods::Tenth => "a tenth",
            Periods::Usual => "no matter",
        };
        let line = json!({
            "fault": self.fault, "how": self.how, "passes_when": self.passes_when, "periods": periods,
            "figure": figure, "result": result,
        });
        eprintln!("{result}: {}: {figure}", self.fault);
        if let Some(path) = std::env::var_os("SEALCI_FAULTS") {
            let file = OpenOptions::new().append(true).create(true).open(path);
            file.and_then(|mut file| writeln!(file, "{line}")).expect("the rows can be written");
        }
    }
}

impl Drop for Row {
    fn drop(&mut self) {
        if !self.is_written {
            self.write("FAILED", "");
        }
    }
}

/// Seconds, for a row.
pub fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// Asks until there is an answer, for so long: the answer, and how long it took.
pub fn within<T>(what: &str, patience: Duration, mut answer: impl FnMut() -> Option<T>) -> (T, Duration) {
    let begun = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return (answer, begun.elapsed());
        }
        assert!(begun.elapsed() < patience, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
