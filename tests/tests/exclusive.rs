//! Takes agents of exclusive actions away in every way, and has an oracle say that no two attempts overlapped.
//!
//! The oracle is a file to which each attempt writes, all the time that it lives, its number and the boot-time clock. All
//! periods are a tenth of the usual: an agent is lost after 6 s, a lease is 4 s.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use sealci_tests::host::is_root;
use sealci_tests::{Cut, Installation, Line, OtherAgent, Part, action, attempts, eventually, skip};

const LOST_AFTER_S: f64 = 6.0;
const LEASE_S: f64 = 4.0;

/// A lease's kill may come so much late on a busy machine.
const SLACK_S: f64 = 1.5;

struct Deployment {
    installation: Installation,
    line: Line,
    oracle: PathBuf,
    number: String,
    /// The agent that gets the second attempt.
    other: Option<OtherAgent>,
}

impl Deployment {
    /// An exclusive action that runs on the installation's own agent, whose line can be cut; another agent is there, too.
    fn running(retry: &str) -> Self {
        let mut installation = Installation::none();
        let lost_after = (LOST_AFTER_S * 1000.0).to_string();
        installation.arguments.insert(Part::Controller, vec!["--lost-after-ms".into(), lost_after]);
        installation.start_part(Part::Scheduler);
        let line = Line::to(installation.url(Part::Scheduler));
        installation.arguments.insert(Part::Agent, vec!["--scheduler".into(), line.url()]);
        installation.start_all();
        let oracle = installation.scratch("oracle");
        let manifest = format!(
            "name: deployment\nactions:\n  deploy:\n    exclusive: true\n{retry}    env: {{ORACLE: {}}}\n    \
             configuration: {{executor: process}}\n    commands:\n      - |\n        trap '' TERM\n        \
             n=${{SEALCI_ATTEMPT##*.}}\n        while ! test -e $ORACLE.go$n; do\n          \
             echo $n $(cut -d' ' -f1 /proc/uptime) >>$ORACLE\n          sleep 0.05\n        done\n",
            oracle.display()
        );
        let number = installation.submit_manifest("repository", &manifest);
        let mut deployment = Self { installation, line, oracle, number, other: None };
        eventually("the first attempt to run", || deployment.times(1).first().copied());
        let url = deployment.installation.url(Part::Scheduler).to_owned();
        deployment.other = Some(deployment.installation.start_other_agent("two", &["--scheduler", &url]));
        deployment
    }

    /// When an attempt was alive, by the boot-time clock.
    fn times(&self, attempt: u32) -> Vec<f64> {
        let text = fs::read_to_string(&self.oracle).unwrap_or_default();
        let lines = text.lines().filter_map(|line| line.split_once(' '));
        lines
            .filter(|(number, _)| *number == attempt.to_string())
            .filter_map(|(_, at)| at.parse().ok())
            .collect()
    }

    fn let_go(&self, attempt: u32) {
        fs::write(format!("{}.go{attempt}", self.oracle.display()), "").unwrap();
    }

    /// Waits for the second attempt, and says when the first was last seen alive and the second first.
    fn second(&self) -> (f64, f64) {
        let began = eventually("the second attempt to run", || self.times(2).first().copied());
        (self.times(1).last().copied().unwrap(), began)
    }
}

/// Seconds of the boot-time clock.
fn boot_time() -> f64 {
    let text = fs::read_to_string("/proc/uptime").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

const RETRY: &str = "    retry: {times: 1, on: [errored]}\n";

/// The first attempt's agent is gone since `gone_at`: the second begins after the loss, long after the first is dead.
fn assert_apart(deployment: &Deployment, gone_at: f64) {
    let (first_ended, second_began) = deployment.second();
    println!(
        "gone at 0 s: the first attempt lived until {:.1} s, the second began at {:.1} s",
        first_ended - gone_at,
        second_began - gone_at
    );
    assert!(first_ended - gone_at <= LEASE_S + SLACK_S, "the lease's end is kept");
    assert!(second_began > first_ended, "no overlap");
    deployment.let_go(2);
}

#[test]
fn a_line_cut_for_longer_than_the_lease_makes_no_overlap() {
    let test = "a_line_cut_for_longer_than_the_lease_makes_no_overlap";
    if !is_root() || !Line::can_be_cut() {
        return skip("root", test, "only root can have the kernel drop packets, with iptables");
    }
    let mut deployment = Deployment::running(RETRY);
    let cut_at = boot_time();
    deployment.line.cut(Cut::Both);
    assert_apart(&deployment, cut_at);
    // The cut agent comes back, and delivers what it has to say.
    deployment.line.mend();
    let pipeline = deployment.installation.finished(&deployment.number);
    let deploy = action(&pipeline, "deploy");
    assert_eq!(attempts(deploy), ["errored", "succeeded"]);
    assert_eq!(
        deploy["attempts"][0]["retried_because"].as_str().unwrap().split(':').next_back(),
        Some(" retry 1 of 1")
    );
    let alive = deployment.times(1).len();
    assert_eq!(deployment.times(1).len(), alive, "the first does not come back to life");
}

#[test]
fn an_agent_that_is_stopped_cannot_put_the_deadline_off() {
    let deployment = Deployment::running(RETRY);
    let stopped_at = boot_time();
    deployment.installation.signal(Part::Agent, "STOP");
    assert_apart(&deployment, stopped_at);
    let before = deployment.times(1).len();
    deployment.installation.signal(Part::Agent, "CONT");
    let pipeline = deployment.installation.finished(&deployment.number);
    assert_eq!(attempts(action(&pipeline, "deploy")), ["errored", "succeeded"]);
    assert_eq!(deployment.times(1).len(), before, "the first does not come back to life");
}

#[test]
fn a_killed_agents_exclusive_action_is_not_tried_again_by_itself() {
    let mut deployment = Deployment::running("");
    deployment.installation.kill(Part::Agent);
    let pipeline = deployment.installation.finished(&deployment.number);
    let deploy = action(&pipeline, "deploy");
    assert_eq!(attempts(deploy), ["errored"]);
    assert_eq!(deploy["outcome"]["cause"], "agent_lost");
    assert!(deploy["attempts"][0]["retried_because"].is_null());
}

#[test]
fn an_exclusive_action_outlives_several_leases_with_its_owner_there() {
    let deployment = Deployment::running("");
    let until = boot_time() + 3.0 * LEASE_S;
    eventually("three leases to pass", || (boot_time() > until).then_some(()));
    assert!(deployment.times(1).last().is_some_and(|last| *last > until - SLACK_S), "it is alive");
    deployment.let_go(1);
    let pipeline = deployment.installation.finished(&deployment.number);
    assert_eq!(attempts(action(&pipeline, "deploy")), ["succeeded"]);
}
