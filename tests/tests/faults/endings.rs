//! What hostile or careless actions do to their agent and how they end.

use std::time::{Duration, Instant};

use sealci_tests::{Installation, Part, Periods, action, eventually, host::processes_with};

use crate::row::{Row, seconds, within};

#[test]
fn an_action_takes_everything() {
    let row = Row::begin(
        "an action takes all CPUs or forks without end",
        Periods::Tenth,
        "busy loops on every CPU, a fork bomb and a memory hog, each in a sandbox",
        "the agent stays connected and runs others; the outcome names the limit",
    );
    let Some(row) = row.needs_root() else { return };
    let mut installation = row.installation();
    installation.start_all();
    if installation.json(&["agent", "list"])[0]["executors"][0] != "sandbox" {
        return row.skip("namespaces", "the agent offers no sandbox here");
    }
    let manifest = "name: takers\nactions:\n  \
        loops:\n    needs: []\n    timeout: 4s\n    configuration: {resources: {cpu: 0.5, memory: 64MiB}}\n    \
        commands: ['for i in 1 2 3 4; do (while :; do :; done) & done; wait']\n  \
        forks:\n    needs: []\n    timeout: 60s\n    configuration: {resources: {cpu: 0.5, memory: 256MiB}}\n    \
        commands: ['bomb() { bomb | bomb & }; bomb; wait; sleep 600']\n  \
        hog:\n    needs: []\n    timeout: 60s\n    configuration: {resources: {cpu: 0.5, memory: 64MiB}}\n    \
        commands: ['tail /dev/zero']\n";
    let number = installation.submit_manifest("takers", manifest);
    let fine = "name: fine\nactions:\n  fine:\n    configuration: {executor: fake, resources: {cpu: 0.1, memory: 1MiB}}\n    \
                commands: ['print fine']\n";
    let mut slowest = Duration::ZERO;
    let mut count = 0;
    let begun = Instant::now();
    // As long as they go on others have to get their turn.
    while installation.json(&["show", &number])["state"] != "finished" {
        assert!(begun.elapsed() < Duration::from_secs(120));
        let asked = Instant::now();
        let other = installation.submit_manifest(&format!("fine-{count}"), fine);
        assert_eq!(installation.finished(&other)["outcome"], "succeeded");
        assert_eq!(installation.json(&["agent", "list"])[0]["connected"], true);
        slowest = slowest.max(asked.elapsed());
        count += 1;
    }
    let pipeline = installation.finished(&number);
    assert_eq!(action(&pipeline, "loops")["outcome"]["kind"], "timed_out", "{pipeline}");
    let hog = &action(&pipeline, "hog")["outcome"];
    assert_eq!(hog["limit"], "memory", "{hog}");
    let forks = &action(&pipeline, "forks")["outcome"];
    // Whichever it meets first; `executor` has one that meets that of processes.
    assert!(matches!(forks["limit"].as_str(), Some("pids" | "memory")), "{forks}");
    let named = |name: &str| {
        let outcome = &action(&pipeline, name)["outcome"];
        outcome["limit"].as_str().or(outcome["kind"].as_str()).unwrap_or_default().to_owned()
    };
    row.passed(&format!(
        "{}, {}, {}; meanwhile {count} others, the slowest in {}",
        named("loops"),
        named("forks"),
        named("hog"),
        seconds(slowest)
    ));
}

/// An action in the default executor whose processes bear this mark.
fn marked(installation: &Installation, commands: &str) -> (String, String) {
    let mark = format!("ends-{}", installation.pid(Part::Controller));
    let manifest =
        format!("name: ends\nactions:\n  one:\n    env: {{E2E_MARK: {mark}}}\n    commands: [{commands}]\n");
    (installation.submit_manifest("ends", &manifest), format!("E2E_MARK={mark}"))
}

#[test]
fn an_action_ignores_term() {
    let row = Row::begin(
        "an action ignores TERM",
        Periods::Tenth,
        "`trap '' TERM`, cancelled; the grace is 1 s",
        "dead after the grace and 5 s",
    );
    let mut installation = row.installation();
    installation.start_all();
    let (number, mark) = marked(
        &installation,
        "\"trap '' TERM; (trap '' TERM; sleep 600) & touch up; while :; do sleep 600; done\"",
    );
    installation.workspace_with("up");
    assert!(installation.sealci(&["cancel", &number]).status.success());
    let (_, dead) =
        within("its end", Duration::from_secs(6), || processes_with(&mark).is_empty().then_some(()));
    assert!(dead >= Duration::from_millis(900), "the grace is given: {dead:?}");
    assert_eq!(installation.finished(&number)["outcome"], "cancelled");
    row.passed(&format!("dead {} after the wish", seconds(dead)));
}

#[test]
fn an_action_leaves_daemons_behind() {
    let row = Row::begin(
        "an action leaves daemons behind",
        Periods::Tenth,
        "setsid, nohup and double forks that ignore TERM and HUP",
        "no process of it is left 60 s later (I5)",
    );
    let mut installation = row.installation();
    installation.start_all();
    let daemons = "\"(setsid sh -c 'trap \\\"\\\" TERM HUP; while :; do sleep 1000; done' >/dev/null 2>&1 &)\", \
                   \"nohup sleep 1001 >/dev/null 2>&1 &\", \"touch up; while ! test -e go; do sleep 0.02; done\"";
    let (number, mark) = marked(&installation, daemons);
    let workspace = installation.workspace_with("up");
    eventually("the daemons to run", || (processes_with(&mark).len() >= 4).then_some(()));
    sealci_tests::let_go(&workspace, "go");
    let let_go = Instant::now();
    let pipeline = installation.finished(&number);
    within("the daemons' end", Duration::from_secs(6), || processes_with(&mark).is_empty().then_some(()));
    let gone = let_go.elapsed();
    assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
    row.passed(&format!("gone {} after the action's last command", seconds(gone)));
}
