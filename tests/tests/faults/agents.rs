//! What becomes of actions when their agent dies, hangs, comes back, is copied, drained or killed by them.

use std::fs;
use std::time::{Duration, Instant};

use sealci_tests::{Installation, Part, Periods, action, attempts, eventually, host::processes_with};
use serde_json::Value;

use crate::oracle::{Oracle, WAIT};
use crate::row::{Row, seconds, within};

/// One action that prints, waits at the gate and prints again.
fn one_that_waits(installation: &Installation) -> Oracle {
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", &format!("seq 1 20000; {WAIT}; seq 20001 40000"));
    oracle
}

fn first_attempt(installation: &Installation, number: &str) -> Value {
    let pipeline = installation.json(&["show", number]);
    pipeline["actions"][0]["attempts"][0].clone()
}

fn is_over(attempt: &Value) -> Option<()> {
    (attempt["state"] == "finished").then_some(())
}

fn an_agent_dies(periods: Periods) {
    let row = Row::begin(
        "agent dies in mid action",
        periods,
        "kill -9",
        "tried again at most 90 s later, by another agent (I1); one result counts (I2); no process left 60 s later (I5)",
    );
    let mut installation = row.installation();
    installation.start_all();
    let oracle = one_that_waits(&installation);
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    installation.kill(Part::Agent);
    let died = Instant::now();
    let gone = oracle.gone_after();
    assert!(gone < row.period(60), "I5: {gone:?}");
    installation.start_beside("second", &[]);
    within("the second attempt", row.period(90), || {
        oracle.ran("long").contains(&"begin 2".to_owned()).then_some(())
    });
    let again = died.elapsed();
    assert!(again < row.period(90), "I1: {again:?}");
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    oracle.judge(&installation, &number, &pipeline);
    assert_eq!(attempts(action(&pipeline, "long")), ["errored", "succeeded"]);
    row.passed(&format!("processes gone after {}, again after {}", seconds(gone), seconds(again)));
}

#[test]
fn an_agent_dies_in_mid_action() {
    an_agent_dies(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn an_agent_dies_in_mid_action_as_shipped() {
    an_agent_dies(Periods::AsShipped);
}

fn an_agent_hangs(periods: Periods) {
    let row = Row::begin(
        "agent machine hangs, then wakes",
        periods,
        "SIGSTOP for 90 s, SIGCONT",
        "fenced; what it ran is dead 5 s after waking",
    );
    let mut installation = row.installation();
    installation.start_all();
    let oracle = one_that_waits(&installation);
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    installation.signal(Part::Agent, "STOP");
    let stopped = Instant::now();
    installation.start_beside("second", &[]);
    within("the second attempt", row.period(90), || {
        oracle.ran("long").contains(&"begin 2".to_owned()).then_some(())
    });
    // The machine hangs on for as long as the row says.
    within("the hang to be over", row.period(95), || (stopped.elapsed() >= row.period(90)).then_some(()));
    let id = installation.json(&["show", &number])["actions"][0]["id"].as_str().unwrap().to_owned();
    let first = format!("SEALCI_ATTEMPT={id}.1");
    assert!(!processes_with(&first).is_empty(), "what it ran knows nothing of the hang");
    installation.signal(Part::Agent, "CONT");
    let (_, dead) = within("the fenced attempt's end", Duration::from_secs(5), || {
        processes_with(&first).is_empty().then_some(())
    });
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    oracle.judge(&installation, &number, &pipeline);
    let long = action(&pipeline, "long");
    assert_eq!(long["attempts"][0]["fenced"], true, "{long}");
    assert!(!oracle.ran("long").contains(&"end 1".to_owned()), "it was killed");
    row.passed(&format!("dead {} after waking", seconds(dead)));
}

#[test]
fn an_agent_hangs_and_wakes() {
    an_agent_hangs(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn an_agent_hangs_and_wakes_as_shipped() {
    an_agent_hangs(Periods::AsShipped);
}

#[test]
fn an_agent_restarts_at_once() {
    let row = Row::begin(
        "agent restarts at once",
        Periods::Usual,
        "scheduler away while one action ends; kill -9 the agent, start both",
        "the spooled result stands, the rest is tried again at once; no orphan left",
    );
    let mut installation = row.installation();
    installation.start_all();
    let mut oracle = one_that_waits(&installation);
    oracle.add("over", "seq 1 1000; while ! test -e $O/end; do sleep 0.05; done; seq 1 1000");
    let number = oracle.submit(&installation);
    oracle.wait_all_begun();
    installation.kill(Part::Scheduler);
    fs::write(oracle.folder().join("end"), "").unwrap();
    // Its workspace goes once its result is in the spool.
    let work = installation.data().join("agent/work");
    eventually("one of two workspaces to go", || (fs::read_dir(&work).unwrap().count() == 1).then_some(()));
    installation.kill(Part::Agent);
    let (_, gone) = within("the orphans' end", Duration::from_secs(6), || {
        processes_with(&oracle.mark()).is_empty().then_some(())
    });
    installation.start_part(Part::Scheduler);
    installation.start_part(Part::Agent);
    let (_, again) = within("the second attempt", Duration::from_secs(15), || {
        oracle.ran("long").contains(&"begin 2".to_owned()).then_some(())
    });
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    oracle.judge(&installation, &number, &pipeline);
    assert_eq!(attempts(action(&pipeline, "over")), ["succeeded"]);
    assert_eq!(attempts(action(&pipeline, "long")), ["errored", "succeeded"]);
    row.passed(&format!(
        "orphans gone after {}, tried again {} after the start",
        seconds(gone),
        seconds(again)
    ));
}

#[test]
fn an_action_kills_its_agent_each_time() {
    let row = Row::begin(
        "an action that kills its agent each time",
        Periods::Usual,
        "`kill -9` of the agent's process id, by the action",
        "given up after 3 attempts, with the reason; other actions succeed",
    );
    let mut installation = row.installation();
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("poison", "until test -s $O/pid; do sleep 0.05; done; kill -9 $(cat $O/pid); cat $O/gate");
    let pid = oracle.folder().join("pid");
    let number = oracle.submit(&installation);
    let begun = Instant::now();
    for attempt in 1..=3 {
        oracle.wait_begun("poison", attempt);
        fs::write(&pid, installation.pid(Part::Agent).to_string()).unwrap();
        eventually("the agent to die", || installation.has_ended(Part::Agent));
        fs::remove_file(&pid).unwrap();
        installation.start_part(Part::Agent);
    }
    let pipeline = oracle.finished(&installation, &number);
    let took = begun.elapsed();
    let poison = action(&pipeline, "poison");
    assert_eq!(attempts(poison), ["errored"; 3], "{poison}");
    assert_eq!(poison["outcome"]["kind"], "errored", "{poison}");
    let reason = poison["outcome"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(!reason.is_empty(), "I8: {poison}");
    let other =
        installation.submit_manifest("other", "name: other\nactions:\n  fine: {commands: [echo fine]}\n");
    assert_eq!(installation.finished(&other)["outcome"], "succeeded");
    row.passed(&format!("3 attempts in {}: “{reason}”", seconds(took)));
}

#[test]
fn two_agents_have_one_identity() {
    let row = Row::begin(
        "two agents with one identity",
        Periods::Tenth,
        "copy the credentials, start a second agent with them",
        "the newest gets new work, the other is told why and finishes what it claimed; nothing is lost",
    );
    let mut installation = row.installation();
    installation.start_all();
    let mut oracle = one_that_waits(&installation);
    let first = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    let copy = installation.data_of("copy").join("agent");
    fs::create_dir_all(&copy).unwrap();
    fs::copy(installation.data().join("agent/identity.json"), copy.join("identity.json")).unwrap();
    installation.start_beside("copy", &[]);
    let begun = Instant::now();
    within("the first one to be told", Duration::from_secs(15), || {
        installation.service_log(Part::Agent).contains("gets the new work").then_some(())
    });
    let told = begun.elapsed();
    oracle.add("new", "seq 1 100; ls -d /proc/$PPID >/dev/null");
    let second = oracle.submit(&installation);
    within("new work to begin", Duration::from_secs(15), || (oracle.ran("new").len() == 2).then_some(()));
    assert!(installation.data_of("copy").join("agent/mirrors").exists(), "it ran at the newest one");
    oracle.open();
    for number in [&first, &second] {
        let pipeline = oracle.finished(&installation, number);
        assert_eq!(attempts(action(&pipeline, "long")), ["succeeded"], "{pipeline}");
        assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
    }
    row.passed(&format!("told after {}; nothing tried again", seconds(told)));
}

#[test]
fn a_draining_agent_finishes_what_runs() {
    let row = Row::begin(
        "drain",
        Periods::Tenth,
        "SIGTERM with 8 running",
        "all finish, none is tried again, what is new waits for another agent, the agent ends by itself",
    );
    let mut installation = row.installation();
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    for number in 0..8 {
        oracle.add(&format!("a{number}"), &format!("seq 1 2000; {WAIT}; seq 1 2000"));
    }
    let number = oracle.submit(&installation);
    oracle.wait_all_begun();
    installation.signal(Part::Agent, "TERM");
    eventually("the agent to say that it leaves", || {
        (installation.json(&["agent", "list"])[0]["accepting"] == false).then_some(())
    });
    let new = installation.submit_manifest("new", "name: new\nactions:\n  late: {commands: [echo late]}\n");
    oracle.open();
    let opened = Instant::now();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(oracle.judge(&installation, &number, &pipeline), 8, "none was tried twice");
    let status = eventually("the agent to end", || installation.has_ended(Part::Agent));
    let left = opened.elapsed();
    assert!(status.success(), "{status}");
    assert_eq!(installation.json(&["show", &new])["actions"][0]["state"], "queued");
    installation.start_part(Part::Agent);
    assert_eq!(installation.finished(&new)["outcome"], "succeeded");
    row.passed(&format!(
        "8 of 8 finished at their first attempt; left {} after they could end",
        seconds(left)
    ));
}

/// Used by whoever waits for a loss.
pub fn first_is_over(installation: &Installation, number: &str) -> Option<()> {
    is_over(&first_attempt(installation, number))
}
