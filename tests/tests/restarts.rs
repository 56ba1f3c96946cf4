//! Kills each service in mid action, starts it again, and looks at what became of the action: the invariants I1 to I5.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use sealci_tests::host::{Footprint, is_root, processes_with};
use sealci_tests::{Installation, Part, Repository, action, attempts, eventually, let_go};
use serde_json::Value;

/// What the action writes: 2 MB that anyone can write again.
const LINES: u32 = 300_000;

/// An action that writes half of its lines, waits to be let go, and writes the others; and one after it.
///
/// In the agent's default executor, the sandbox where there is one. `mark` tells its processes from all others.
fn manifest(mark: &str) -> String {
    let half = LINES / 2;
    format!(
        "name: killed\nactions:\n  long:\n    env: {{E2E_MARK: {mark}}}\n    commands:\n      \
         - echo attempt ${{SEALCI_ATTEMPT##*.}}\n      \
         - seq 1 {half}; touch begun; while ! test -e go; do sleep 0.05; done; seq {} {LINES}\n  \
         after:\n    commands: [echo after]\n",
        half + 1
    )
}

/// What the log of an attempt must be, byte for byte.
fn emitted(attempt: u32) -> Vec<u8> {
    let mut text = format!("attempt {attempt}\n");
    for line in 1..=LINES {
        text.push_str(&line.to_string());
        text.push('\n');
    }
    text.into_bytes()
}

/// A push whose action runs.
struct Pushed {
    installation: Installation,
    revision: String,
    number: String,
    workspace: PathBuf,
    /// The entry that the action's processes have in their environment.
    mark: String,
}

impl Pushed {
    fn running() -> Self {
        let installation = Installation::start();
        let name = installation.data().parent().unwrap().file_name().unwrap().display().to_string();
        let repository = Repository::with_manifest(installation.scratch("repository"), &manifest(&name));
        installation.watch(&repository.url());
        let revision = repository.commit("Push");
        let workspace = installation.workspace_with("begun");
        let number = installation.pipelines_of(&revision)[0]["number"].to_string();
        let mark = format!("E2E_MARK={name}");
        assert!(!processes_with(&mark).is_empty(), "the action's processes are told by their environment");
        Self { installation, revision, number, workspace, mark }
    }

    /// Holds the end of it all against the invariants; gives the outcomes of the action's attempts.
    fn judge(&self, part: Part, result_of: u32) -> Vec<String> {
        let pipeline = self.installation.finished(&self.number);
        // I1: nothing hangs.
        for one in pipeline["actions"].as_array().unwrap() {
            assert_eq!(one["state"], "finished", "{part:?}: {one}");
        }
        // I2: exactly one attempt's result is the action's.
        let long = action(&pipeline, "long");
        let finals: Vec<&Value> = long["attempts"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|one| one["fenced"] != true && one["outcome"]["kind"] == "succeeded")
            .collect();
        assert_eq!(finals.len(), 1, "{part:?}: {long}");
        assert_eq!(finals[0]["number"], result_of, "{part:?}: {long}");
        assert_eq!(long["outcome"]["kind"], "succeeded", "{part:?}: {long}");
        assert_eq!(attempts(action(&pipeline, "after")), ["succeeded"], "{part:?}: {pipeline}");
        // I3: its log is what was written.
        let (log, expected) = (self.installation.log(&self.number, "long"), emitted(result_of));
        assert_eq!(log.len(), expected.len(), "{part:?}");
        assert!(log == expected, "{part:?}: the bytes differ");
        // I4: one push, one pipeline, also after more looks.
        self.installation.wait_for_looks(2);
        assert_eq!(self.installation.pipelines_of(&self.revision).len(), 1, "{part:?}");
        // I5: no process is left.
        eventually("the action's processes to be gone", || {
            processes_with(&self.mark).is_empty().then_some(())
        });
        attempts(long).into_iter().map(str::to_owned).collect()
    }
}

/// The scheduler, the controller or the monitor dies and comes back: the same attempt goes on.
fn nothing_is_queued_again(part: Part) {
    let mut pushed = Pushed::running();
    let before = processes_with(&pushed.mark);
    pushed.installation.restart(part);
    let now = processes_with(&pushed.mark);
    // The loop's `sleep` comes and goes; the shell around it stays.
    assert!(now.iter().any(|pid| before.contains(pid)), "{part:?}: it runs on");
    let_go(&pushed.workspace, "go");
    assert_eq!(pushed.judge(part, 1), ["succeeded"], "{part:?}");
}

#[test]
fn a_killed_scheduler_queues_nothing_again() {
    nothing_is_queued_again(Part::Scheduler);
}

#[test]
fn a_killed_controller_queues_nothing_again() {
    nothing_is_queued_again(Part::Controller);
}

#[test]
fn a_killed_monitor_queues_nothing_again() {
    nothing_is_queued_again(Part::Monitor);
}

/// The scheduler or the controller is away while the action ends.
fn the_end_is_waited_with(part: Part) {
    let mut pushed = Pushed::running();
    pushed.installation.kill(part);
    let_go(&pushed.workspace, "go");
    // Its processes end, and what they wrote waits in the agent's spool.
    eventually("the action to end", || processes_with(&pushed.mark).is_empty().then_some(()));
    pushed.installation.start_part(part);
    assert_eq!(pushed.judge(part, 1), ["succeeded"], "{part:?}");
}

#[test]
fn the_scheduler_may_be_away_when_the_action_ends() {
    the_end_is_waited_with(Part::Scheduler);
}

#[test]
fn the_controller_may_be_away_when_the_action_ends() {
    the_end_is_waited_with(Part::Controller);
}

#[test]
fn a_killed_agent_leaves_no_process_and_makes_a_second_attempt() {
    let mut pushed = Pushed::running();
    let first = processes_with(&pushed.mark).into_iter().find_map(Footprint::of);
    pushed.installation.kill(Part::Agent);
    // Nobody is there any more to end them: they go by themselves.
    eventually("the dead agent's processes to be gone", || {
        processes_with(&pushed.mark).is_empty().then_some(())
    });
    assert!(pushed.workspace.exists(), "what is on the disk is the next one's to clear");
    let former = pushed.workspace.clone();
    pushed.installation.start_part(Part::Agent);
    pushed.workspace = eventually("the second attempt to run", || {
        (!former.exists()).then(|| pushed.installation.workspace_with("begun"))
    });
    assert_ne!(pushed.workspace, former);
    if let Some(first) = first.filter(|_| is_root()) {
        eventually("the first attempt's groups and mounts to be gone", || {
            first.left().is_empty().then_some(())
        });
    }
    let_go(&pushed.workspace, "go");
    assert_eq!(pushed.judge(Part::Agent, 2), ["errored", "succeeded"]);
    let numbered = ["logs", &pushed.number, "long", "--attempt", "1"];
    let log = pushed.installation.sealci(&numbered).stdout;
    let (expected, begun) = (emitted(1), b"attempt 1\n1\n2\n");
    assert!(log.starts_with(begun) && expected.starts_with(&log), "what the first one wrote is kept");
    let pipeline = pushed.installation.json(&["show", &pushed.number]);
    assert_eq!(action(&pipeline, "long")["attempts"][0]["outcome"]["cause"], "agent_restarted");
}
