//! Keeps account of the steps: what ran, what it took, what failed, and what was skipped and why.

use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Passed,
    Failed(String),
    Skipped(String),
}

#[derive(Debug)]
struct Step {
    name: String,
    ending: Ending,
    took: Duration,
}

/// Tests, counted over all of cargo's test programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Counts {
    pub fn add(&mut self, others: &Self) {
        self.passed += others.passed;
        self.failed += others.failed;
        self.skipped += others.skipped;
    }

    /// Adds what one of cargo's closing lines says: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    pub fn add_line(&mut self, line: &str) {
        let Some(rest) = line.trim().strip_prefix("test result: ") else { return };
        let Some((_, counts)) = rest.split_once(". ") else { return };
        for part in counts.split(';') {
            let mut words = part.split_whitespace();
            let (Some(Ok(count)), Some(what)) = (words.next().map(str::parse::<u64>), words.next()) else {
                continue;
            };
            match what {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                "ignored" => self.skipped += count,
                _ => {}
            }
        }
    }
}

/// The account of one run.
#[derive(Debug, Default)]
pub struct Report {
    steps: Vec<Step>,
    pub counts: Counts,
}

impl Report {
    /// Runs one step, and says so before and after. An error is the step's failure, not the run's end.
    pub fn step<T>(&mut self, name: &str, run: impl FnOnce() -> Result<T>) -> Option<T> {
        println!("\n=== {name}");
        let begun = Instant::now();
        let ended = run();
        let took = begun.elapsed();
        let (ending, value) = match ended {
            Ok(value) => (Ending::Passed, Some(value)),
            Err(error) => {
                println!("error: {error:#}");
                (Ending::Failed(error.to_string()), None)
            }
        };
        println!("=== {name}: {} in {}", word(&ending), seconds(took));
        self.steps.push(Step { name: name.to_owned(), ending, took });
        value
    }

    /// Notes that something was not done; a failure if it was required.
    pub fn missing(&mut self, what: &str, why: &str, required: bool) {
        let ending = if required {
            Ending::Failed(format!("required by SEALCI_REQUIRE, but {why}"))
        } else {
            Ending::Skipped(why.to_owned())
        };
        println!("\n!!! {what}: {} ({why})", word(&ending).to_uppercase());
        self.steps.push(Step { name: what.to_owned(), ending, took: Duration::ZERO });
    }

    /// Whether nothing failed.
    pub fn passed(&self) -> bool {
        !self.steps.iter().any(|step| matches!(step.ending, Ending::Failed(_)))
    }

    /// The whole account, ending with the tests' counts.
    pub fn summary(&self) -> String {
        let mut text = String::from("\n=== summary\n");
        for step in &self.steps {
            let why = match &step.ending {
                Ending::Passed => String::new(),
                Ending::Failed(why) | Ending::Skipped(why) => {
                    format!("  {}", why.lines().next().unwrap_or_default())
                }
            };
            let _ = writeln!(text, "{:8} {:>9}  {}{why}", word(&step.ending), seconds(step.took), step.name);
        }
        let Counts { passed, failed, skipped } = self.counts;
        let _ =
            writeln!(text, "{} in {}", if self.passed() { "passed" } else { "FAILED" }, seconds(self.took()));
        let _ = writeln!(text, "tests: {passed} passed, {failed} failed, {skipped} skipped");
        text
    }

    fn took(&self) -> Duration {
        self.steps.iter().map(|step| step.took).sum()
    }
}

fn word(ending: &Ending) -> &'static str {
    match ending {
        Ending::Passed => "passed",
        Ending::Failed(_) => "FAILED",
        Ending::Skipped(_) => "skipped",
    }
}

fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn cargos_closing_lines_are_counted() {
        let mut counts = Counts::default();
        counts.add_line(
            "test result: ok. 53 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.70s",
        );
        counts.add_line(
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s",
        );
        counts.add_line("test x ... ok");
        counts.add_line("test result: ok");
        assert_eq!(counts, Counts { passed: 55, failed: 3, skipped: 1 });
    }

    #[test]
    fn only_a_failure_fails() {
        let mut report = Report::default();
        report.step("one", || Ok(()));
        report.missing("kvm", "there is no /dev/kvm", false);
        assert!(report.passed());
        assert!(
            report.summary().contains("skipped      0.0 s  kvm  there is no /dev/kvm"),
            "{}",
            report.summary()
        );
        report.missing("postgres", "it is not installed", true);
        assert!(!report.passed());
        let mut report = Report::default();
        assert_eq!(report.step::<()>("two", || bail!("no\nmore")), None);
        assert!(!report.passed());
        assert!(report.summary().ends_with("tests: 0 passed, 0 failed, 0 skipped\n"));
    }
}
