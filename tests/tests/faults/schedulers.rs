//! Takes one of two schedulers away, or the line to it.

use std::time::Duration;

use sealci_tests::{Cut, Installation, Line, OtherScheduler, Part, Periods};

use crate::oracle::{Oracle, WAIT};
use crate::row::{Row, seconds, within};

/// How many actions run by the first scheduler's agent.
const ACTIONS: usize = 4;

/// Two schedulers, and an agent by each; the first one's runs actions and may go over to the second. `dialled` is what the
/// controller reaches the first one by.
fn two_schedulers(
    row: &Row,
    dialled: impl FnOnce(&str) -> String,
) -> (Installation, OtherScheduler, Oracle, String) {
    let mut installation = row.installation();
    installation.start_part(Part::Scheduler);
    let other = installation.start_other_scheduler();
    let first = installation.url(Part::Scheduler).to_owned();
    installation.controller_dials = Some(format!("{},{}", dialled(&first), other.url));
    let list = format!("{first},{}", other.url);
    installation.arguments.insert(Part::Agent, vec!["--scheduler".into(), list]);
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    (0..ACTIONS).for_each(|n| oracle.add(&format!("long{n}"), &format!("seq 1 2000; {WAIT}; echo done")));
    let number = oracle.submit(&installation);
    oracle.wait_all_begun();
    installation.start_beside("second", &["--scheduler", &other.url]);
    installation.wait_for_agents(2);
    (installation, other, oracle, number)
}

/// How long until the first agent is there by the other scheduler.
fn goes_over(installation: &Installation, patience: Duration) -> Duration {
    let words = "the scheduler knows this agent";
    within("the agent to be there by the other", patience, || {
        (installation.service_log(Part::Agent).matches(words).count() >= 2).then_some(())
    })
    .1
}

fn one_of_two_schedulers_dies(periods: Periods) {
    let row = Row::begin(
        "one of two schedulers dies",
        periods,
        "kill -9 of it, with 4 actions of its agent running; its agent knows the other one",
        "nothing is tried again; its agent takes work by the other within 15 s",
    );
    let (mut installation, _other, oracle, number) = two_schedulers(&row, str::to_owned);
    installation.kill(Part::Scheduler);
    let there = goes_over(&installation, Duration::from_secs(15));
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(oracle.judge(&installation, &number, &pipeline), ACTIONS, "one attempt each: {pipeline}");
    let next = installation.submit_manifest("next", "name: n\nactions: {a: {commands: [echo there]}}");
    assert_eq!(installation.text(&next, "a"), "there\n");
    row.passed(&format!(
        "there by the other after {}; {ACTIONS} of {ACTIONS} at their first attempt",
        seconds(there)
    ));
}

#[test]
fn a_scheduler_of_two_dies() {
    one_of_two_schedulers_dies(Periods::Tenth);
}

fn a_line_to_one_of_two_schedulers_is_cut(periods: Periods) {
    let row = Row::begin(
        "controller cut off from one of two schedulers",
        periods,
        "iptables DROP of the controller's line to it, with 4 actions of its agent running; its agent knows the other one",
        "nothing is tried again; its agent goes over to the other by itself",
    );
    let Some(row) = row.needs_root() else { return };
    if !Line::can_be_cut() {
        return row.skip("netfilter", "iptables cannot drop packets here");
    }
    let mut line = None;
    let (installation, _other, oracle, number) =
        two_schedulers(&row, |first| line.insert(Line::to(first)).url());
    line.as_mut().unwrap().cut(Cut::Both);
    let there = goes_over(&installation, Duration::from_secs(60));
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(oracle.judge(&installation, &number, &pipeline), ACTIONS, "one attempt each: {pipeline}");
    row.passed(&format!(
        "there by the other after {}; {ACTIONS} of {ACTIONS} at their first attempt",
        seconds(there)
    ));
}

#[test]
fn a_line_to_a_scheduler_of_two_is_cut() {
    a_line_to_one_of_two_schedulers_is_cut(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_line_to_a_scheduler_of_two_is_cut_as_shipped() {
    a_line_to_one_of_two_schedulers_is_cut(Periods::AsShipped);
}
