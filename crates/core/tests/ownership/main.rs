//! Checks who owns what: two controller replicas, two schedulers and two agents meet in every possible order, and so many
//! times anything of them dies, stalls or is lost.
//!
//! - I2, always: each round has at most one result, and it is its current attempt's; no attempt is run by two agents; no
//!   result is acknowledged that is not recorded.
//! - I1, as far as a model without a clock can say it: from every state that is reachable with faults, the action's end, and
//!   that nobody owes anything, is reachable without any further fault and without a person.
//!
//! The test command explores every fault at every moment, and a cancel and a re-run without one; `SEALCI_MODEL_FAULTS=2`
//! explores all pairs of faults, and a fault with a cancel or a re-run. That each part of the protocol is needed is shown by
//! leaving it out.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod explore;
mod protocol;
mod world;

use std::time::Instant;

use explore::{Explored, explore};
use protocol::{LeftOut, Protocol, Step};
use world::Budget;

fn check(name: &str, budget: Budget, left_out: LeftOut) -> Explored<Step> {
    let start = Instant::now();
    let explored = explore(&Protocol { budget, left_out });
    println!(
        "{name}: {} states, {} transitions, depth {}, {} ends, {:.1} s",
        explored.states,
        explored.transitions,
        explored.depth,
        explored.ends,
        start.elapsed().as_secs_f32()
    );
    explored
}

fn must_hold(name: &str, budget: Budget) {
    let explored = check(name, budget, LeftOut::Nothing);
    assert_eq!(explored.flaw, None, "the last step leads to it");
    assert_eq!(explored.stuck, None, "after these steps the end cannot be reached");
    assert!(explored.ends > 0);
}

/// So many faults are explored in any combination.
fn faults() -> u8 {
    std::env::var("SEALCI_MODEL_FAULTS").map_or(1, |text| text.parse().unwrap())
}

#[test]
fn with_faults_every_action_ends_with_one_result() {
    must_hold("faults", Budget { faults: faults(), cancels: 0, reruns: 0 });
}

#[test]
fn with_a_cancel_every_action_ends_with_one_result() {
    must_hold("a cancel", Budget { faults: faults() - 1, cancels: 1, reruns: 0 });
}

#[test]
fn with_a_rerun_every_round_ends_with_one_result() {
    must_hold("a re-run", Budget { faults: faults() - 1, cancels: 0, reruns: 1 });
}

/// What is wrong with a protocol that leaves this out.
fn flaw_without(left_out: LeftOut, faults: u8) -> String {
    let budget = Budget { faults, cancels: 0, reruns: 0 };
    let (flaw, way) = check(&format!("without {left_out:?}"), budget, left_out).flaw.unwrap();
    println!("{flaw}: {way:?}");
    flaw
}

#[test]
fn commits_that_do_not_look_at_the_epoch_are_found() {
    assert!(flaw_without(LeftOut::EpochCheck, 1).contains("two agents ran one attempt"));
}

#[test]
fn answers_before_the_commit_are_found() {
    assert!(flaw_without(LeftOut::CommitBeforeAnswer, 1).contains("acknowledged and is not recorded"));
}

#[test]
fn a_start_before_the_grant_is_found() {
    assert!(flaw_without(LeftOut::WaitForGrant, 0).contains("two agents ran one attempt"));
}

#[test]
fn an_outdated_owner_that_takes_its_memory_for_all_there_is_is_found() {
    assert!(flaw_without(LeftOut::LookUp, 1).contains("acknowledged and is not recorded"));
}

#[test]
fn an_absence_that_nobody_tells_is_found() {
    let budget = Budget { faults: 1, cancels: 0, reruns: 0 };
    let explored = check("without Absence", budget, LeftOut::Absence);
    assert_eq!(explored.flaw, None);
    println!("{:?}", explored.stuck);
    assert!(explored.stuck.is_some(), "the end is reachable from everywhere");
}
