use serde_json::{Value, json};

use super::*;

const BUILD: &str = "00000000-0000-7000-8000-000000000001";
const TEST: &str = "00000000-0000-7000-8000-000000000002";
const TERMINAL: Terminal = Terminal { interactive: true, colours: true };

fn attempt_of(action: &str, number: u32) -> AttemptId {
    AttemptId { action: action.parse().unwrap(), number }
}

fn attempt(number: i32, state: &str, extra: Value) -> Value {
    let mut value = json!({
        "number": number, "round": 1, "state": state, "fenced": false, "agent_name": "a1", "executor": "fake",
        "agent_id": BUILD, "claimed_at": "2026-11-01T10:00:00Z", "log_end": 0, "commands": [],
    });
    merge(&mut value, extra);
    value
}

fn action(id: &str, name: &str, state: &str, extra: Value) -> Value {
    let mut value = json!({
        "id": id, "pipeline_id": BUILD, "name": name, "needs": [], "commands": ["true"], "state": state,
        "allowed_to_fail": false,
    });
    merge(&mut value, extra);
    value
}

fn merge(value: &mut Value, extra: Value) {
    let (Value::Object(members), Value::Object(more)) = (value, extra) else { panic!("objects only") };
    members.extend(more);
}

fn pipeline(state: &str, outcome: Option<&str>, actions: Vec<Value>) -> Update {
    let mut value = json!({
        "id": BUILD, "number": 3, "name": "demo", "repository": "example.org/demo",
        "repository_url": "https://example.org/demo", "event": "push", "ref": "refs/heads/main",
        "revision": "0123456789abcdef0123456789abcdef01234567", "state": state, "round": 1, "cancel_wished": false,
        "created_at": "2026-11-01T10:00:00Z", "finished_at": "2026-11-01T10:00:02.5Z", "actions": actions,
    });
    if let Some(outcome) = outcome {
        merge(&mut value, json!({"outcome": outcome}));
    }
    Update::Pipeline(Box::new(serde_json::from_value(value).unwrap()))
}

fn text(view: &mut View) -> String {
    String::from_utf8(view.take()).unwrap()
}

#[test]
fn lines_of_several_actions_keep_their_prefix_and_stay_whole() {
    let mut view = View::new(Terminal::PLAIN);
    let running = json!({"attempts": [attempt(1, "running", json!({}))]});
    view.update(pipeline(
        "running",
        None,
        vec![action(BUILD, "build", "active", running.clone()), action(TEST, "it", "active", running)],
    ));
    assert_eq!(
        text(&mut view),
        "demo #3 push of example.org/demo main at 0123456789\nbuild > running on a1 (fake)\nit    > running on a1 (fake)\n"
    );
    view.update(Update::Log(attempt_of(BUILD, 1), b"one\ntw".to_vec()));
    view.update(Update::Log(attempt_of(TEST, 1), b"other\n\xff\x1b[2J".to_vec()));
    view.update(Update::Log(attempt_of(BUILD, 1), b"o\n\nlast".to_vec()));
    assert_eq!(text(&mut view), "build | one\nit    | other\nbuild | two\nbuild | \n");
    view.update(Update::LogEnd(attempt_of(BUILD, 1)));
    assert_eq!(text(&mut view), "build | last\n");
    view.update(Update::LogEnd(attempt_of(TEST, 1)));
    assert_eq!(view.take(), b"it    | \xff\x1b[2J\n", "not a terminal: the bytes stay as they are");
}

#[test]
fn an_end_is_said_after_its_log_and_counts_only_then() {
    let mut view = View::new(Terminal::PLAIN);
    let done = json!({
        "outcome": {"kind": "failed", "exit_code": 7}, "started_at": "2026-11-01T10:00:01Z",
        "finished_at": "2026-11-01T10:00:02Z",
        "attempts": [attempt(1, "finished", json!({"commands": [
            {"index": 0, "text": "true", "log_offset": 0, "exit_code": 0},
            {"index": 1, "text": "make check\nmore", "log_offset": 4, "exit_code": 7}]}))],
    });
    let skipped = json!({"outcome": {"kind": "skipped", "because": "build failed"}});
    view.update(pipeline(
        "finished",
        Some("failed"),
        vec![action(BUILD, "build", "finished", done), action(TEST, "test", "finished", skipped)],
    ));
    let said = text(&mut view);
    assert!(said.contains("test  > skipped (build failed)\n"), "{said}");
    assert!(!said.contains("exit code"), "its log has not ended: {said}");
    assert_eq!(view.outcome(), None);

    view.update(Update::Log(attempt_of(BUILD, 1), b"no\n".to_vec()));
    view.update(Update::LogEnd(attempt_of(BUILD, 1)));
    assert_eq!(text(&mut view), "build | no\nbuild > failed (exit code 7) in 1.0 s\n");
    assert_eq!(view.outcome(), Some(PipelineOutcome::Failed));

    view.summary();
    assert_eq!(
        text(&mut view),
        "\n  build  failed (exit code 7) in 1.0 s at `make check…`\n  test   skipped (build failed)\ndemo #3 failed in 2.5 s\n"
    );
}

#[test]
fn a_lost_attempt_and_the_next_are_told_apart() {
    let mut view = View::new(Terminal::PLAIN);
    let lost = attempt(
        1,
        "finished",
        json!({
            "fenced": true,
            "outcome": {"kind": "errored", "cause": "agent_lost", "message": "silent for 60 s"},
            "retried_because": "it errored (agent_lost: silent for 60 s): tried again by itself, 2 of 3",
        }),
    );
    view.update(pipeline(
        "running",
        None,
        vec![action(BUILD, "b", "queued", json!({"attempts": [lost.clone()]}))],
    ));
    assert!(
        text(&mut view)
            .ends_with("b > attempt 1 is retried because it errored (agent_lost: silent for 60 s): tried again by itself, 2 of 3\n")
    );
    view.update(pipeline(
        "running",
        None,
        vec![action(
            BUILD,
            "b",
            "active",
            json!({"attempts": [lost.clone(), attempt(2, "running", json!({}))]}),
        )],
    ));
    view.update(Update::Log(attempt_of(BUILD, 2), b"again\n".to_vec()));
    assert_eq!(text(&mut view), "b > running on a1 (fake)\nb#2 | again\n");
    view.update(Update::LogEnd(attempt_of(BUILD, 2)));
    view.update(pipeline(
        "finished",
        Some("succeeded"),
        vec![action(
            BUILD,
            "b",
            "finished",
            json!({"outcome": {"kind": "succeeded"}, "attempts": [lost, attempt(2, "finished", json!({}))]}),
        )],
    ));
    assert_eq!(
        view.outcome(),
        Some(PipelineOutcome::Succeeded),
        "the fenced attempt's log is not waited for"
    );
}

#[test]
fn only_the_current_round_is_followed() {
    let mut view = View::new(Terminal::PLAIN);
    let old = attempt(1, "finished", json!({"round": 0}));
    let new = attempt(2, "running", json!({}));
    view.update(pipeline(
        "running",
        None,
        vec![action(BUILD, "b", "active", json!({"attempts": [old, new]}))],
    ));
    let ids: Vec<_> = view.attempts().into_iter().map(|(id, _)| id.number).collect();
    assert_eq!(ids, [2]);

    let succeeded =
        json!({"outcome": {"kind": "succeeded"}, "attempts": [attempt(1, "finished", json!({"round": 0}))]});
    view.take();
    view.update(pipeline("running", None, vec![action(TEST, "it", "finished", succeeded)]));
    assert_eq!(text(&mut view), "", "what was not run again ends no second time");
}

#[test]
fn the_same_state_twice_says_nothing_new() {
    let mut view = View::new(Terminal::PLAIN);
    let state = || {
        let running = json!({"attempts": [attempt(1, "running", json!({}))]});
        pipeline("running", None, vec![action(BUILD, "b", "active", running)])
    };
    view.update(state());
    view.take();
    view.update(state());
    assert_eq!(text(&mut view), "");
    assert_eq!(view.status_line(), "demo #3 · running: b · 0 of 1 done");
}

#[test]
fn on_a_terminal_nothing_foreign_gets_through() {
    let mut lines = Lines::new("b\x1b]0;x\x07", 1, TERMINAL);
    let mut out = Vec::new();
    lines.push(b"\x1b]0;ti", &mut out);
    lines.push(b"tle\x07\x1b[31mred\n\x1b[2Jx\n", &mut out);
    let shown = String::from_utf8(out).unwrap();
    assert_eq!(shown.matches("\x1b[31mred\x1b[0m\n").count(), 1, "{shown:?}");
    assert!(!shown.contains("title") && !shown.contains("\x1b[2J"), "{shown:?}");
}

#[test]
fn a_gap_says_how_much_is_missing_and_why() {
    let mut view = View::new(Terminal::PLAIN);
    view.update(Update::Log(attempt_of(BUILD, 1), b"half".to_vec()));
    view.update(Update::Gap(attempt_of(BUILD, 1), 512, "over the quota".into()));
    assert_eq!(
        text(&mut view),
        format!("{BUILD} | half\n{BUILD} > 512 bytes of the log are missing: over the quota\n")
    );
}

#[test]
fn what_keeps_a_standing_pipeline_waiting_is_said() {
    let build = BUILD.parse().unwrap();
    let queued = |view: &mut View, test: &str| {
        view.update(pipeline(
            "running",
            None,
            vec![action(BUILD, "build", "queued", json!({})), action(TEST, "test", test, json!({}))],
        ));
        text(view)
    };
    let mut view = View::new(Terminal::PLAIN);
    queued(&mut view, "queued");
    assert_eq!(view.standstill(), Some(build), "the first that waits");
    let reasons = || vec!["1 of 1 agents is drained".to_owned(), "1 attempt is ahead of it".to_owned()];
    view.update(Update::Waits(build, reasons()));
    assert_eq!(text(&mut view), "build > waiting: 1 of 1 agents is drained; 1 attempt is ahead of it\n");
    queued(&mut view, "active");
    assert_eq!(view.standstill(), None, "something moves");
    view.update(pipeline("running", None, vec![action(BUILD, "build", "active", json!({}))]));
    view.update(Update::Waits(build, reasons()));
    assert_eq!(text(&mut view), "", "it does not wait any more");
}

fn ended(extra: Value) -> Value {
    let mut value = json!({
        "outcome": {"kind": "succeeded"}, "started_at": "2026-11-01T10:00:01Z",
        "finished_at": "2026-11-01T10:00:02Z", "attempts": [attempt(1, "finished", json!({}))],
    });
    merge(&mut value, extra);
    value
}

#[test]
fn an_action_runs_before_its_log_is_followed() {
    let mut view = View::new(Terminal::PLAIN);
    let state = |of_attempt, extra| {
        let attempts = json!({"attempts": [attempt(1, of_attempt, extra)]});
        pipeline("running", None, vec![action(BUILD, "build", "active", attempts)])
    };
    view.update(state("claimed", json!({"executor": null})));
    assert_eq!(view.to_follow().count(), 0, "nobody said yet that it runs");
    view.take();
    view.update(state("running", json!({})));
    assert_eq!(text(&mut view), "build > running on a1 (fake)\n");
    assert_eq!(view.to_follow().collect::<Vec<_>>(), [attempt_of(BUILD, 1)]);
}

#[test]
fn what_was_over_at_once_is_still_shown_from_its_start() {
    let mut view = View::new(Terminal::PLAIN);
    view.update(pipeline(
        "finished",
        Some("succeeded"),
        vec![action(BUILD, "build", "finished", ended(json!({})))],
    ));
    view.update(Update::Log(attempt_of(BUILD, 1), b"hello\n".to_vec()));
    view.update(Update::LogEnd(attempt_of(BUILD, 1)));
    let said = text(&mut view);
    let (_, said) = said.split_once('\n').unwrap();
    assert_eq!(said, "build > running on a1 (fake)\nbuild | hello\nbuild > succeeded in 1.0 s\n");
}

#[test]
fn a_need_ends_before_what_needed_it_runs() {
    let mut view = View::new(Terminal::PLAIN);
    // The action that waits is declared first: the order of the manifest is not that of time.
    let dependent = || json!({"needs": ["greet"], "attempts": [attempt(1, "running", json!({}))]});
    view.update(pipeline(
        "running",
        None,
        vec![
            action(TEST, "count", "active", dependent()),
            action(BUILD, "greet", "finished", ended(json!({}))),
        ],
    ));
    assert_eq!(view.to_follow().collect::<Vec<_>>(), [attempt_of(BUILD, 1)], "its turn is not yet");
    view.update(Update::Log(attempt_of(BUILD, 1), b"hello".to_vec()));
    view.update(Update::LogEnd(attempt_of(BUILD, 1)));
    let said = text(&mut view);
    let (_, said) = said.split_once('\n').unwrap();
    assert_eq!(
        said,
        "greet > running on a1 (fake)\ngreet | hello\ngreet > succeeded in 1.0 s\ncount > running on a1 (fake)\n"
    );
    assert_eq!(view.to_follow().count(), 2);
}

#[test]
fn what_was_skipped_is_told_after_its_cause() {
    let mut view = View::new(Terminal::PLAIN);
    let failed = ended(json!({"outcome": {"kind": "failed", "exit_code": 7}}));
    let skipped = json!({"needs": ["build"], "outcome": {"kind": "skipped", "because": "build failed"}});
    view.update(pipeline(
        "finished",
        Some("failed"),
        vec![action(BUILD, "build", "finished", failed), action(TEST, "test", "finished", skipped)],
    ));
    assert!(!text(&mut view).contains("skipped"));
    view.update(Update::LogEnd(attempt_of(BUILD, 1)));
    assert_eq!(text(&mut view), "build > failed (exit code 7) in 1.0 s\ntest  > skipped (build failed)\n");
    assert_eq!(view.outcome(), Some(PipelineOutcome::Failed));
}

#[test]
fn a_program_is_told_the_same_in_the_same_order() {
    let mut view = View::new(Style::Json);
    view.update(pipeline(
        "finished",
        Some("succeeded"),
        vec![action(BUILD, "build", "finished", ended(json!({})))],
    ));
    view.update(Update::Log(attempt_of(BUILD, 1), b"hel\"lo\n\xff".to_vec()));
    view.update(Update::Gap(attempt_of(BUILD, 1), 512, "over the quota".into()));
    view.update(Update::LogEnd(attempt_of(BUILD, 1)));
    view.summary();
    let lines: Vec<Value> = text(&mut view).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let told: Vec<_> = lines.iter().map(|l| (l["event"].as_str().unwrap(), l["state"].as_str())).collect();
    let expected = [
        ("pipeline", Some("running")),
        ("action", Some("running")),
        ("log", None),
        ("log", None),
        ("gap", None),
        ("action", Some("finished")),
        ("pipeline", Some("finished")),
    ];
    assert_eq!(told, expected);
    assert_eq!(lines[2]["text"], "hel\"lo");
    assert_eq!(lines[3]["base64"], "/w==");
    assert_eq!(lines[5]["outcome"]["kind"], "succeeded");
    assert_eq!(lines[6]["outcome"], "succeeded");
}
