//! Draws what an attempt leaves beside its log: its tests, and what is kept of it. Pure.

use sealci_api::controller::types::{Attempt, FailingTest, TestReport};

use crate::format;
use crate::terminal::{Terminal, one_line};

/// So many failing tests are named; `--json` has them all.
const NAMED: usize = 20;

/// Adds the lines about it, each behind `indent`.
pub fn draw(out: &mut String, indent: &str, attempt: &Attempt, terminal: Terminal) {
    if let Some(tests) = &attempt.tests {
        out.push_str(&format!("{indent}tests: {}\n", totals(tests, terminal)));
        for case in tests.failing.iter().take(NAMED) {
            out.push_str(&format!("{indent}  {} {}\n", terminal.red("no "), failing(case)));
        }
        let (failed, named) = (tests.failures + tests.errors, tests.failing.len().min(NAMED));
        let unnamed = usize::try_from(failed).unwrap_or(0).saturating_sub(named);
        if unnamed > 0 {
            out.push_str(&format!("{indent}  and {unnamed} more\n"));
        }
        if let Some(note) = &tests.note {
            out.push_str(&format!("{indent}  {}\n", terminal.dim(&one_line(note))));
        }
    }
    if let Some(kept) = &attempt.artifacts {
        let files = if kept.files == 1 { "file" } else { "files" };
        let size = format::bytes(kept.size_bytes);
        out.push_str(&format!(
            "{indent}{}\n",
            terminal.dim(&format!("kept: {} {files}, {size}", kept.files))
        ));
    }
}

fn totals(tests: &TestReport, terminal: Terminal) -> String {
    let failed = tests.failures + tests.errors;
    let passed = tests.tests - failed - tests.skipped;
    let mut parts = vec![format!("{} passed", passed.max(0))];
    if failed > 0 {
        parts.push(terminal.red(&format!("{failed} failed")));
    }
    if tests.skipped > 0 {
        parts.push(format!("{} skipped", tests.skipped));
    }
    format!("{} in {}", parts.join(", "), format::duration(tests.duration_ms as f64 / 1e3))
}

fn failing(case: &FailingTest) -> String {
    let place = case.class.as_ref().or(case.suite.as_ref()).map(|place| format!("{} ", one_line(place)));
    let message = case.message.as_deref().and_then(|text| text.lines().find(|line| !line.trim().is_empty()));
    let message = message.map(|text| format!(": {}", one_line(text))).unwrap_or_default();
    format!("{}{}{message}", place.unwrap_or_default(), one_line(&case.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tests_and_artifacts_are_told() {
        let attempt: Attempt = serde_json::from_value(json!({
            "number": 1, "round": 1, "state": "finished", "fenced": false, "claimed_at": "2026-11-01T10:00:00Z",
            "agent_id": "00000000-0000-7000-8000-000000000001", "log_end": 0, "commands": [],
            "artifacts": {"count": 2, "size_bytes": 3 << 20, "files": 12},
            "tests": {"tests": 9, "failures": 2, "errors": 1, "skipped": 1, "duration_ms": 1500,
                "failing": [{"name": "adds", "class": "sums", "kind": "failure", "message": "\n1 != 2\nmore"},
                    {"name": "\u{1b}[2Jodd", "kind": "error"}],
                "note": "a.xml is too large"},
        }))
        .unwrap();
        let mut out = String::new();
        draw(&mut out, "  ", &attempt, Terminal::PLAIN);
        let expected = "  tests: 5 passed, 3 failed, 1 skipped in 1.5 s
    no  sums adds: 1 != 2
    no  odd
    and 1 more
    a.xml is too large
  kept: 12 files, 3 MiB
";
        assert_eq!(out, expected);
    }
}
