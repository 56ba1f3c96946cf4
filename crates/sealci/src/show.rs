//! Draws one pipeline as a tree: its actions, their attempts, the commands of each. Pure.

use sealci_api::controller::types::{Action, Attempt, AttemptState, Command, Pipeline};

use crate::format;
use crate::kept;
use crate::terminal::{Terminal, one_line};
use crate::view::shortened;

/// The pipeline with everything the verbose form knows.
pub fn pipeline(pipeline: &Pipeline, terminal: Terminal) -> String {
    let mut out = format!(
        "{}  {}\n",
        terminal.bold(&format!("{} #{}", one_line(&pipeline.name), pipeline.number)),
        format::coloured(terminal, &format::pipeline_state(pipeline)),
    );
    let place =
        pipeline.ref_.as_deref().map(|name| format!(" {}", format::short_ref(name))).unwrap_or_default();
    let round = if pipeline.round > 1 { format!(", round {}", pipeline.round) } else { String::new() };
    out.push_str(&format!(
        "{} {}{place} at {}{round}\n{}\n",
        pipeline.event,
        one_line(&pipeline.repository),
        format::short_revision(&pipeline.revision),
        terminal.dim(&pipeline.id.to_string()),
    ));
    for (index, action) in pipeline.actions.iter().enumerate() {
        draw_action(&mut out, action, index + 1 == pipeline.actions.len(), terminal);
    }
    out
}

fn draw_action(out: &mut String, action: &Action, is_last: bool, terminal: Terminal) {
    let took = format::seconds_between(action.started_at.as_deref(), action.finished_at.as_deref());
    let needs = match action.needs.as_slice() {
        [] => String::new(),
        needs => terminal.dim(&format!("  needs {}", one_line(&needs.join(", ")))),
    };
    out.push_str(&format!(
        "{} {}  {}{}{needs}\n",
        if is_last { "└─" } else { "├─" },
        terminal.bold(&one_line(&action.name)),
        format::coloured(terminal, &format::action_state(action)),
        in_time(took),
    ));
    let indent = if is_last { "   " } else { "│  " };
    let several = action.attempts.len() > 1;
    for (index, attempt) in action.attempts.iter().enumerate() {
        let last_attempt = index + 1 == action.attempts.len();
        let commands_indent = if several {
            out.push_str(&format!(
                "{indent}{} {}\n",
                if last_attempt { "└─" } else { "├─" },
                attempt_line(attempt, terminal)
            ));
            format!("{indent}{}", if last_attempt { "   " } else { "│  " })
        } else {
            out.push_str(&format!("{indent}{}\n", terminal.dim(&place(attempt))));
            indent.to_owned()
        };
        for command in &attempt.commands {
            out.push_str(&format!("{commands_indent}{}\n", command_line(command, attempt, terminal)));
        }
        if let Some(why) = &attempt.retried_because {
            out.push_str(&format!("{commands_indent}retried because {}\n", one_line(why)));
        }
        kept::draw(out, &commands_indent, attempt, terminal);
    }
}

fn attempt_line(attempt: &Attempt, terminal: Terminal) -> String {
    let state = match &attempt.outcome {
        Some(outcome) => format::outcome(outcome),
        None => attempt.state.to_string(),
    };
    let fenced = if attempt.fenced { ", fenced: another attempt took over" } else { "" };
    let took = format::seconds_between(attempt.started_at.as_deref(), attempt.finished_at.as_deref());
    format!(
        "attempt {}  {}{fenced}{}  {}",
        attempt.number,
        format::coloured(terminal, &state),
        in_time(took),
        terminal.dim(&place(attempt)),
    )
}

/// Where it ran.
fn place(attempt: &Attempt) -> String {
    let agent = attempt.agent_name.as_deref().map_or_else(|| attempt.agent_id.to_string(), one_line);
    match &attempt.executor {
        Some(executor) => format!("on {agent} ({})", one_line(executor)),
        None => format!("on {agent}"),
    }
}

fn command_line(command: &Command, attempt: &Attempt, terminal: Terminal) -> String {
    let mark = match command.exit_code {
        Some(0) => terminal.green("ok "),
        Some(_) => terminal.red("no "),
        None if attempt.state == AttemptState::Running => terminal.yellow("..."),
        None => terminal.dim("-  "),
    };
    let code = match command.exit_code {
        Some(code) if code != 0 => format!("  exit code {code}"),
        _ => String::new(),
    };
    let took =
        command.duration_us.map(|us| format!("  {}", format::duration(us as f64 / 1e6))).unwrap_or_default();
    let used = Some(resource_use(command)).filter(|used| !used.is_empty());
    let used = used.map(|used| terminal.dim(&used)).unwrap_or_default();
    format!("{mark} {}{code}{took}{used}", shortened(&command.text))
}

/// What is known of it, and is not nothing.
fn resource_use(command: &Command) -> String {
    let cpu_us = command.cpu_user_us.unwrap_or(0) + command.cpu_system_us.unwrap_or(0);
    let cpu = (cpu_us > 0).then(|| format!("  cpu {}", format::duration(cpu_us as f64 / 1e6)));
    let bytes = |name: &str, count: Option<i64>| {
        count.filter(|count| *count > 0).map(|count| format!("  {name} {}", format::bytes(count)))
    };
    let used = [
        cpu,
        bytes("mem", command.memory_peak_bytes),
        bytes("read", command.read_bytes),
        bytes("wrote", command.write_bytes),
    ];
    used.into_iter().flatten().collect()
}

fn in_time(seconds: Option<f64>) -> String {
    seconds.map(|seconds| format!(" in {}", format::duration(seconds))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_tree_tells_it_all() {
        let id = "00000000-0000-7000-8000-000000000001";
        let attempt = |number: i32, outcome: serde_json::Value, fenced: bool| {
            json!({
                "number": number, "round": 1, "state": "finished", "outcome": outcome, "fenced": fenced, "agent_id": id,
                "agent_name": "a1", "executor": "sandbox", "claimed_at": "2026-11-01T10:00:00Z", "log_end": 3,
                "started_at": "2026-11-01T10:00:00Z", "finished_at": "2026-11-01T10:00:01Z",
                "commands": [{"index": 0, "text": "make", "log_offset": 0, "exit_code": 0, "duration_us": 12_000},
                    {"index": 1, "text": "make check", "log_offset": 2, "exit_code": 2, "duration_us": 1_500_000,
                     "cpu_user_us": 900_000, "cpu_system_us": 300_000, "memory_peak_bytes": 1 << 20,
                     "read_bytes": 0, "write_bytes": 3 << 20}],
            })
        };
        let action = |name: &str, extra: serde_json::Value| {
            let mut value = json!({"id": id, "pipeline_id": id, "name": name, "needs": [], "commands": ["x"],
                "state": "finished", "allowed_to_fail": false});
            value.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            value
        };
        let lost = json!({"kind": "errored", "cause": "agent_lost", "message": "silent for 60 s"});
        let failed = json!({"kind": "failed", "exit_code": 2});
        let mut retried = attempt(1, lost, true);
        retried["retried_because"] =
            json!("it errored (agent_lost: silent for 60 s): tried again by itself, 2 of 3");
        let shown: Pipeline = serde_json::from_value(json!({
            "id": id, "number": 3, "name": "demo", "repository": "example.org/demo",
            "repository_url": "https://example.org/demo", "event": "tag", "ref": "refs/tags/v1",
            "revision": "0123456789abcdef0123456789abcdef01234567", "state": "finished", "outcome": "failed",
            "round": 2, "cancel_wished": false, "created_at": "2026-11-01T10:00:00Z",
            "actions": [
                action("build", json!({"outcome": failed, "started_at": "2026-11-01T10:00:00Z",
                    "finished_at": "2026-11-01T10:00:03Z",
                    "attempts": [retried, attempt(2, failed.clone(), false)]})),
                action("test", json!({"outcome": {"kind": "skipped", "because": "build failed"}, "needs": ["build"]})),
            ],
        }))
        .unwrap();
        let expected = "\
demo #3  failed
tag example.org/demo v1 at 0123456789, round 2
00000000-0000-7000-8000-000000000001
├─ build  failed (exit code 2) in 3.0 s
│  ├─ attempt 1  errored (agent_lost: silent for 60 s), fenced: another attempt took over in 1.0 s  on a1 (sandbox)
│  │  ok  make  12 ms
│  │  no  make check  exit code 2  1.5 s  cpu 1.2 s  mem 1 MiB  wrote 3 MiB
│  │  retried because it errored (agent_lost: silent for 60 s): tried again by itself, 2 of 3
│  └─ attempt 2  failed (exit code 2) in 1.0 s  on a1 (sandbox)
│     ok  make  12 ms
│     no  make check  exit code 2  1.5 s  cpu 1.2 s  mem 1 MiB  wrote 3 MiB
└─ test  skipped (build failed)  needs build
";
        assert_eq!(pipeline(&shown, Terminal::PLAIN), expected);
    }
}
