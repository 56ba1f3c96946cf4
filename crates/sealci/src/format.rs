//! Puts times, sizes, outcomes and tables into words. Pure.

use jiff::Timestamp;
use sealci_api::controller::types::{Action, ActionState, Outcome, OutcomeKind, Pipeline, PipelineState};

use crate::terminal::{Terminal, one_line};

/// A duration as people say it: `850 ms`, `1.2 s`, `3 min 05 s`, `2 h 07 min`.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    match seconds {
        s if s > 0.0 && s < 0.00995 => format!("{:.1} ms", s * 1000.0),
        s if s < 0.9995 => format!("{:.0} ms", s * 1000.0),
        s if s < 59.95 => format!("{s:.1} s"),
        s if s < 3600.0 => {
            let whole = s.round() as u64;
            format!("{} min {:02} s", whole / 60, whole % 60)
        }
        s => {
            let minutes = (s / 60.0).round() as u64;
            format!("{} h {:02} min", minutes / 60, minutes % 60)
        }
    }
}

/// The seconds from one time of the server to another; none if either is missing or unreadable.
pub fn seconds_between(from: Option<&str>, to: Option<&str>) -> Option<f64> {
    let from: Timestamp = from?.parse().ok()?;
    let to: Timestamp = to?.parse().ok()?;
    Some(to.duration_since(from).as_secs_f64())
}

/// How long ago a time of the server was, by our clock; roughly, as two machines' clocks differ.
pub fn ago(time: &str, now: Timestamp) -> String {
    match time.parse::<Timestamp>() {
        Ok(then) => match now.duration_since(then).as_secs() {
            ..=59 => "just now".to_owned(),
            s @ 60..3_600 => format!("{} min ago", s / 60),
            s @ 3_600..172_800 => format!("{} h ago", s / 3_600),
            s => format!("{} days ago", s / 86_400),
        },
        Err(_) => one_line(time),
    }
}

/// Bytes in binary units: `3.5 GiB`.
pub fn bytes(count: i64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count.max(0) as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// CPUs of thousandths: `2`, `0.5`.
pub fn cpus(millis: i64) -> String {
    let text = format!("{:.3}", millis as f64 / 1000.0);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// An outcome in words: `failed (exit code 7)`.
pub fn outcome(outcome: &Outcome) -> String {
    let text = |field: &Option<String>| field.as_deref().map(one_line).unwrap_or_default();
    match outcome.kind {
        OutcomeKind::Succeeded => "succeeded".into(),
        OutcomeKind::Failed => {
            let code = outcome.exit_code.map(|code| format!("exit code {code}"));
            let limit = outcome.limit.as_deref().map(|limit| format!("over its {} limit", one_line(limit)));
            let details: Vec<_> = code.into_iter().chain(limit).collect();
            if details.is_empty() { "failed".into() } else { format!("failed ({})", details.join(", ")) }
        }
        OutcomeKind::Errored => format!("errored ({}: {})", text(&outcome.cause), text(&outcome.message)),
        OutcomeKind::Cancelled => "cancelled".into(),
        OutcomeKind::TimedOut => "timed out".into(),
        OutcomeKind::Skipped => format!("skipped ({})", text(&outcome.because)),
    }
}

/// An action's state, or its outcome once it has one.
pub fn action_state(action: &Action) -> String {
    let Some(ended) = action.outcome.as_ref().filter(|_| action.state == ActionState::Finished) else {
        return action.state.to_string();
    };
    let allowed = if action.allowed_to_fail { ", which is allowed" } else { "" };
    format!("{}{allowed}", outcome(ended))
}

/// A pipeline's state, or its outcome once it has one.
pub fn pipeline_state(pipeline: &Pipeline) -> String {
    match pipeline.outcome {
        Some(outcome) if pipeline.state == PipelineState::Finished => outcome.to_string().replace('_', " "),
        _ if pipeline.cancel_wished => format!("{}, being cancelled", pipeline.state),
        _ => pipeline.state.to_string(),
    }
}

/// Colours a word by what it says.
pub fn coloured(terminal: Terminal, text: &str) -> String {
    match text.split([' ', ',']).next().unwrap_or_default() {
        "succeeded" => terminal.green(text),
        "failed" | "errored" | "timed" => terminal.red(text),
        "cancelled" | "running" | "active" => terminal.yellow(text),
        "skipped" | "pending" | "queued" => terminal.dim(text),
        _ => text.to_owned(),
    }
}

/// `refs/heads/main` → `main`.
pub fn short_ref(name: &str) -> String {
    let short = name.strip_prefix("refs/heads/").or_else(|| name.strip_prefix("refs/tags/")).unwrap_or(name);
    one_line(short)
}

/// The first ten characters of a revision.
pub fn short_revision(revision: &str) -> String {
    one_line(revision).chars().take(10).collect()
}

/// Columns under their heads, two spaces apart, the last one ragged.
pub fn table(heads: &[&str], rows: &[Vec<String>], terminal: Terminal) -> String {
    let width = |text: &str| one_line(text).chars().count();
    let mut widths: Vec<usize> = heads.iter().map(|head| head.chars().count()).collect();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            widths[column] = widths[column].max(width(cell));
        }
    }
    let line = |cells: Vec<(String, usize)>| {
        let mut text = String::new();
        for (column, (shown, length)) in cells.into_iter().enumerate() {
            text.push_str(&shown);
            text.push_str(&" ".repeat(widths[column] - length + 2));
        }
        format!("{}\n", text.trim_end())
    };
    let mut out = line(heads.iter().map(|head| (terminal.bold(head), head.chars().count())).collect());
    for row in rows {
        out.push_str(&line(
            row.iter().map(|cell| (coloured(terminal, &one_line(cell)), width(cell))).collect(),
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_like_speech() {
        for (seconds, text) in [
            (0.0, "0 ms"),
            (0.0003, "0.3 ms"),
            (0.0123, "12 ms"),
            (0.9999, "1.0 s"),
            (59.94, "59.9 s"),
            (59.99, "1 min 00 s"),
            (185.0, "3 min 05 s"),
            (7620.0, "2 h 07 min"),
            (-3.0, "0 ms"),
        ] {
            assert_eq!(duration(seconds), text);
        }
        assert_eq!(seconds_between(Some("2026-11-01T10:00:00Z"), Some("2026-11-01T10:00:01.5Z")), Some(1.5));
        assert_eq!(seconds_between(Some("yesterday"), Some("2026-11-01T10:00:01.5Z")), None);
    }

    #[test]
    fn sizes_read_like_speech() {
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(8 << 30), "8 GiB");
        assert_eq!(bytes(3 << 29), "1.5 GiB");
        assert_eq!(cpus(2000), "2");
        assert_eq!(cpus(250), "0.25");
        assert_eq!(cpus(0), "0");
    }

    #[test]
    fn outcomes_say_what_they_know() {
        let of = |text: &str| outcome(&serde_json::from_str(text).unwrap());
        assert_eq!(of(r#"{"kind":"failed","exit_code":7}"#), "failed (exit code 7)");
        assert_eq!(
            of(r#"{"kind":"failed","exit_code":137,"limit":"memory"}"#),
            "failed (exit code 137, over its memory limit)"
        );
        assert_eq!(of(r#"{"kind":"skipped","because":"test failed"}"#), "skipped (test failed)");
        assert_eq!(
            of(r#"{"kind":"errored","cause":"agent_lost","message":"silent\u001b[2J for 60 s"}"#),
            "errored (agent_lost: silent for 60 s)"
        );
    }

    #[test]
    fn a_table_lines_up_and_stays_harmless() {
        let rows = vec![
            vec!["1".into(), "succeeded".into(), "x".into()],
            vec!["12".into(), "\x1b[2Jq\n".into(), "".into()],
        ];
        let text = table(&["ID", "STATE", "NAME"], &rows, Terminal::PLAIN);
        assert_eq!(text, "ID  STATE      NAME\n1   succeeded  x\n12  q\n");
    }
}
