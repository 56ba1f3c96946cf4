//! Drives a whole agent through real gRPC, against a scheduler whose every word is scripted.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sealci_core::outcome::{Cause, Outcome};
use sealci_proto::agent::{
    self, HeldState, agent_message, claim_answer, desired_entry, event, scheduler_message,
};
use support::*;

/// An agent and its scheduler, greeted, with credit.
async fn connected(folder: &std::path::Path) -> (ScriptedScheduler, TestAgent, Line) {
    let mut scheduler = ScriptedScheduler::start().await;
    let agent = TestAgent::start(config(folder, &scheduler.url));
    let (line, hello, held) = scheduler.greet().await;
    assert!(hello.offer.unwrap().accepting);
    assert!(held.attempts.is_empty());
    line.credit(1 << 20).await;
    (scheduler, agent, line)
}

/// What `lines N` of the fake executor writes.
fn lines(count: u64) -> String {
    (1..=count).map(|line| format!("line {line}\n")).collect()
}

#[tokio::test]
async fn an_action_runs_and_is_told_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let (mut scheduler, agent, mut line) = connected(folder.path()).await;
    let enrolment = scheduler.enrolments.recv().await.unwrap();
    assert_eq!((enrolment.agent_id.as_str(), enrolment.name.as_str()), (line.agent_id.as_str(), "test"));
    assert_eq!((enrolment.credential.len(), enrolment.public_key.len()), (32, 32));
    let hex: String = enrolment.credential.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(line.authorization, format!("Bearer {hex}"));

    let mut record = Record::default();
    line.desire([(attempt(1), run(&spec(&["print hello", "lines 3", "exit 7", "print never"])))]).await;
    let held = line.answered().await;
    assert_eq!(held.attempts[0].state(), HeldState::Assigned);
    assert_eq!(held.attempts[0].reserved.unwrap().cpu_millis, 500);
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;

    let recorded = record.of(attempt(1));
    assert_eq!(held.attempts[0].claim_id, recorded.claim_id);
    assert_eq!(recorded.text(), format!("hello\n{}", lines(3)));
    assert_eq!(
        recorded.kinds(),
        [
            "running",
            "command started",
            "command finished",
            "command started",
            "command finished",
            "command started",
            "command finished",
            "finished"
        ]
    );
    let offsets: Vec<u64> = (recorded.events.iter())
        .filter_map(|event| match event.body.as_ref().unwrap() {
            event::Body::CommandStarted(started) => Some(started.log_offset),
            event::Body::CommandFinished(finished) => Some(finished.log_offset),
            event::Body::Finished(finished) => Some(finished.log_length),
            event::Body::Running(_) => None,
        })
        .collect();
    assert_eq!(offsets, [0, 6, 6, 27, 27, 27, 27]);
    assert_eq!(recorded.outcome(), Some(&Outcome::Failed { exit_code: 7, limit: None }));
    assert_eq!(recorded.repeated, 0);

    // Once closed it is held no more, and nothing is left of it on disk.
    line.serve(&mut record, |record| record.held.attempts.is_empty()).await;
    agent.stop().await;
    assert!(!folder.path().join("spool").join(attempt(1).to_string()).exists());
    assert_eq!(std::fs::read_dir(folder.path().join("work")).unwrap().count(), 0);
}

#[tokio::test]
async fn a_stream_that_breaks_in_mid_log_loses_and_doubles_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (mut scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    let length = 30 << 20;
    line.desire([(attempt(1), run(&spec(&[&format!("bytes {length}"), "print end"])))]).await;
    for broken_at in [1 << 20, 7 << 20, 8 << 20, 20 << 20] {
        line.serve(&mut record, |record| record.log_end(attempt(1)) >= broken_at).await;
        // What is recorded from here on is not acknowledged on this stream any more.
        record.mute = true;
        let more = record.log_end(attempt(1)) + (200 << 10);
        line.serve(&mut record, |record| record.log_end(attempt(1)) >= more).await;
        record.mute = false;
        drop(line);
        let (again, _, held) = scheduler.greet().await;
        assert_eq!(held.attempts.len(), 1);
        line = again;
        line.credit(3 << 20).await;
    }
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    let recorded = record.of(attempt(1));
    let expected = (0..length).map(|at| (at % (64 << 10) % 256) as u8).chain(*b"end\n");
    assert!(recorded.log.iter().copied().eq(expected.map(Some)), "the log differs");
    assert_eq!(recorded.outcome(), Some(&Outcome::Succeeded));
    assert_eq!(recorded.kinds().len(), 6);
    agent.stop().await;
}

#[tokio::test]
async fn a_lost_grant_is_asked_for_again_under_the_same_claim_id() {
    let folder = tempfile::tempdir().unwrap();
    let (mut scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record { keep_claims: true, ..Record::default() };
    line.desire([(attempt(1), run(&spec(&["print hello"])))]).await;
    // On one stream after a while, and when the scheduler says `run` again.
    line.serve(&mut record, |record| record.claims.len() == 2).await;
    line.desire([(attempt(1), run(&spec(&["print hello"])))]).await;
    line.serve(&mut record, |record| record.claims.len() == 3).await;
    // On the next stream, and on the next agent's.
    drop(line);
    let (mut line, ..) = scheduler.greet().await;
    line.serve(&mut record, |record| record.claims.len() == 4).await;
    agent.crash().await;
    let agent = TestAgent::start(config(folder.path(), &scheduler.url));
    let (mut line, _, held) = scheduler.greet().await;
    assert_eq!(held.attempts[0].state(), HeldState::Assigned);
    line.credit(1 << 20).await;
    record.keep_claims = false;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    assert!(record.claims.iter().all(|claim| claim == &record.claims[0]), "{:?}", record.claims);
    assert_eq!(record.of(attempt(1)).text(), "hello\n");
    agent.stop().await;
}

#[tokio::test]
async fn an_exclusive_action_begins_with_its_lease_and_asks_for_more() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    let exclusive =
        agent::ActionSpec { exclusive_lease_ms: 2000, ..spec(&["print hello", "sleep 1000", "print bye"]) };
    line.desire([(attempt(1), run(&exclusive))]).await;
    // It is granted, and asks; nothing begins, however often it has to ask.
    let mut asked = Vec::new();
    while asked.len() < 3 {
        match line.hear().await {
            agent_message::Body::Renew(renew) => asked.push(renew),
            agent_message::Body::Event(event) => panic!("{event:?} without a lease"),
            other => {
                for answer in record.take(other) {
                    line.say(answer).await;
                }
            }
        }
    }
    let numbers: Vec<u64> = asked.iter().map(|renew| renew.number).collect();
    assert_eq!((numbers, asked[0].token), (vec![1, 2, 3], TOKEN));
    for answer in record.take(agent_message::Body::Renew(asked.remove(2))) {
        line.say(answer).await;
    }
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    assert_eq!(record.of(attempt(1)).text(), "hello\nbye\n");
    agent.stop().await;
}

#[tokio::test]
async fn a_refused_claim_is_dropped_and_runs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    line.desire([(attempt(1), run(&spec(&["print hello"])))]).await;
    let claim = line
        .hear_until(|body| match body {
            agent_message::Body::Claim(claim) => Some(claim),
            _ => None,
        })
        .await;
    let refused = claim_answer::Answer::Refused(agent::ClaimRefused { reason: "taken".into() });
    line.say(claim_answer(attempt(1), claim.claim_id, refused)).await;
    let mut record = Record { keep_claims: true, ..Record::default() };
    record.held.attempts = vec![agent::HeldAttempt::default()];
    line.serve(&mut record, |record| record.held.attempts.is_empty()).await;
    assert!(record.claims.len() <= 1 && record.attempts.is_empty());
    agent.stop().await;
}

/// It may be granted by now: an agent that forgot it would have its action counted as lost.
#[tokio::test]
async fn a_drop_waits_for_the_answer_to_a_claim_under_way() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record { keep_claims: true, ..Record::default() };
    line.desire([1, 2].map(|number| (attempt(number), run(&spec(&["print hello"]))))).await;
    line.serve(&mut record, |record| record.claims.len() == 2).await;
    line.desire([1, 2].map(|number| (attempt(number), desired_entry::Wish::Drop(agent::Drop {})))).await;
    record.held = line.answered().await;
    assert_eq!(record.held.attempts.len(), 2, "{:?}", record.held);
    let claim_of = |id| record.claims.iter().find(|claim| claim.0 == id).unwrap().1.clone();
    let (one, other) = (claim_of(attempt(1)), claim_of(attempt(2)));
    let refused = claim_answer::Answer::Refused(agent::ClaimRefused { reason: "nobody wants it".into() });
    line.say(claim_answer(attempt(1), one, refused)).await;
    line.say(record.grant(attempt(2), other)).await;
    line.serve(&mut record, |record| record.is_closed(attempt(2)) && record.held.attempts.is_empty()).await;
    assert_eq!(record.of(attempt(2)).outcome(), Some(&Outcome::Succeeded));
    assert!(!record.attempts.contains_key(&attempt(1)));
    agent.stop().await;
}

/// The cancel comes before the attempt has written its grant down.
#[tokio::test]
async fn what_is_cancelled_right_after_its_grant_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record { keep_claims: true, ..Record::default() };
    line.desire([(attempt(1), run(&spec(&["hang"])))]).await;
    line.serve(&mut record, |record| record.claims.len() == 1).await;
    let claim = record.claims[0].1.clone();
    line.say(record.grant(attempt(1), claim)).await;
    line.desire([(attempt(1), desired_entry::Wish::Cancel(agent::Cancel { grace_ms: 50 }))]).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1)) && record.held.attempts.is_empty()).await;
    assert_eq!(record.of(attempt(1)).outcome(), Some(&Outcome::Cancelled));
    agent.stop().await;
}

#[tokio::test]
async fn a_fenced_attempt_is_killed_without_grace_and_still_told() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    let spec = agent::ActionSpec { grace_ms: 3_600_000, ..spec(&["print before", "stubborn"]) };
    line.desire([(attempt(1), run(&spec))]).await;
    line.serve(&mut record, |record| {
        record.log_end(attempt(1)) == 7 && record.of(attempt(1)).events.len() == 4
    })
    .await;
    record.attempts.get_mut(&attempt(1)).unwrap().attempt.fenced = true;
    line.say(record.ack(attempt(1)).remove(0)).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    assert_eq!(record.of(attempt(1)).text(), "before\n");
    assert_eq!(record.of(attempt(1)).kinds().last(), Some(&"finished"));
    agent.stop().await;
}

#[tokio::test]
async fn a_cancel_ends_what_runs_and_what_is_granted_only_then() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    let cancel = || desired_entry::Wish::Cancel(agent::Cancel { grace_ms: 50 });
    line.desire([(attempt(1), run(&spec(&["hang"])))]).await;
    line.serve(&mut record, |record| record.is_running(attempt(1))).await;
    record.keep_claims = true;
    line.desire([2, 3].map(|number| (attempt(number), run(&spec(&["hang"]))))).await;
    line.serve(&mut record, |record| record.claims.len() == 3).await;
    line.desire([1, 2, 3, 4].map(|number| (attempt(number), cancel()))).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1)) && record.held.attempts.len() == 2).await;
    assert_eq!(record.of(attempt(1)).outcome(), Some(&Outcome::Cancelled));
    // The answers to the claims come by another way than the cancel.
    let claim_of = |id| record.claims.iter().find(|claim| claim.0 == id).unwrap().1.clone();
    let (one, other) = (claim_of(attempt(2)), claim_of(attempt(3)));
    let refused = claim_answer::Answer::Refused(agent::ClaimRefused { reason: "it is over".into() });
    line.say(claim_answer(attempt(2), one, refused)).await;
    line.say(record.grant(attempt(3), other)).await;
    line.serve(&mut record, |record| record.is_closed(attempt(3)) && record.held.attempts.is_empty()).await;
    assert_eq!(record.of(attempt(3)).outcome(), Some(&Outcome::Cancelled));
    assert!(!record.attempts.contains_key(&attempt(2)));
    agent.stop().await;
}

#[tokio::test]
async fn a_dropped_attempt_ends_unreported() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    line.desire([(attempt(1), run(&spec(&["stubborn"])))]).await;
    line.serve(&mut record, |record| record.is_running(attempt(1))).await;
    let told = record.of(attempt(1)).events.len();
    line.desire([(attempt(1), desired_entry::Wish::Drop(agent::Drop {}))]).await;
    line.serve(&mut record, |record| record.held.attempts.is_empty()).await;
    assert!(record.of(attempt(1)).events.len() <= told.max(2));
    assert!(!record.of(attempt(1)).kinds().contains(&"finished"));
    agent.stop().await;
}

#[tokio::test]
async fn without_credit_the_log_waits_and_events_pass() {
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = ScriptedScheduler::start().await;
    let agent = TestAgent::start(config(folder.path(), &scheduler.url));
    let (mut line, ..) = scheduler.greet().await;
    let mut record = Record { stingy: true, ..Record::default() };
    line.desire([(attempt(1), run(&spec(&["bytes 100000"])))]).await;
    let is_told = |record: &Record| record.attempts.get(&attempt(1)).is_some_and(|r| r.outcome().is_some());
    line.serve(&mut record, is_told).await;
    assert_eq!(record.log_end(attempt(1)), 0);
    assert_eq!(record.of(attempt(1)).attempt.log_length, Some(100_000));
    // As much as is allowed comes, and no byte more.
    line.credit(10).await;
    line.serve(&mut record, |record| record.log_end(attempt(1)) > 0).await;
    assert_eq!(record.log_end(attempt(1)), 10);
    line.credit(99_990).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    assert_eq!(record.of(attempt(1)).log.len(), 100_000);
    agent.stop().await;
}

#[tokio::test]
async fn after_a_crash_results_stand_and_the_unfinished_is_errored() {
    let folder = tempfile::tempdir().unwrap();
    let (mut scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record { mute: true, ..Record::default() };
    line.desire([
        (attempt(1), run(&spec(&["bytes 500000"]))),
        (attempt(2), run(&spec(&["print half way", "hang"]))),
    ])
    .await;
    let ready = |record: &Record| {
        record.attempts.get(&attempt(1)).is_some_and(|recorded| recorded.outcome().is_some())
            && record.log_end(attempt(2)) == 9
    };
    line.serve(&mut record, ready).await;
    agent.crash().await;
    drop(line);
    // The controller knows less than the spool: what was not durable before the crash is wanted again.
    record = Record { attempts: record.attempts, ..Record::default() };
    let log_end = record.log_end(attempt(2));
    assert_eq!(log_end, 9);

    let agent = TestAgent::start(config(folder.path(), &scheduler.url));
    let (mut line, _, held) = scheduler.greet().await;
    let told: Vec<_> = held.attempts.iter().map(|held| (held.state(), held.token)).collect();
    assert_eq!(told, [(HeldState::Finished, TOKEN), (HeldState::Finished, TOKEN)]);
    line.credit(1 << 20).await;
    let keep = || desired_entry::Wish::Keep(agent::Keep {});
    line.desire([(attempt(1), keep()), (attempt(2), keep())]).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1)) && record.is_closed(attempt(2))).await;
    assert_eq!(record.of(attempt(1)).outcome(), Some(&Outcome::Succeeded));
    assert_eq!(record.of(attempt(1)).log.len(), 500_000);
    assert_eq!(record.of(attempt(2)).text(), "half way\n");
    let outcome = record.of(attempt(2)).outcome().cloned();
    assert!(matches!(outcome, Some(Outcome::Errored { cause: Cause::AgentRestarted, .. })), "{outcome:?}");
    line.serve(&mut record, |record| record.held.attempts.is_empty()).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_superseded_agent_finishes_what_it_claimed_and_takes_nothing_new() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    line.desire([(attempt(1), run(&spec(&["sleep 300", "print done"])))]).await;
    line.serve(&mut record, |record| record.is_running(attempt(1))).await;
    let superseded = agent::Superseded { reason: "the instance on host b was seen later".into() };
    line.say(scheduler_message::Body::Superseded(superseded)).await;
    line.desire([(attempt(2), run(&spec(&["print no"])))]).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    assert!(!record.attempts.contains_key(&attempt(2)));
    let offer = record.offer.take().expect("the offer is withdrawn");
    assert!(!offer.accepting && offer.not_accepting_because.contains("host b"), "{offer:?}");
    assert_eq!(record.of(attempt(1)).text(), "done\n");
    agent.stop().await;
}

#[tokio::test]
async fn a_drained_agent_finishes_delivers_and_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    line.desire([(attempt(1), run(&spec(&["sleep 200", "print done"])))]).await;
    line.serve(&mut record, |record| record.is_running(attempt(1))).await;
    agent.shutdown.drain.cancel();
    line.serve(&mut record, |record| record.offer.is_some()).await;
    assert_eq!(record.offer.as_ref().unwrap().not_accepting_because, "draining");
    line.desire([(attempt(2), run(&spec(&["print no"])))]).await;
    let held = line.answered().await;
    assert_eq!(held.attempts.len(), 1);
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    assert_eq!(record.of(attempt(1)).text(), "done\n");
    while line.hear_or_end().await.is_some() {}
    agent.ended().await.unwrap();
}

#[tokio::test]
async fn an_idle_agent_drains_at_once_even_without_a_scheduler() {
    let folder = tempfile::tempdir().unwrap();
    let (scheduler, agent, line) = connected(folder.path()).await;
    drop((line, scheduler));
    agent.shutdown.drain.cancel();
    agent.ended().await.unwrap();
}

#[tokio::test]
async fn a_stopped_agent_leaves_at_once_and_says_later_what_became_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let (mut scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    line.desire([(attempt(1), run(&spec(&["stubborn"])))]).await;
    line.serve(&mut record, |record| record.is_running(attempt(1))).await;
    agent.stop().await;
    let agent = TestAgent::start(config(folder.path(), &scheduler.url));
    let (mut line, ..) = scheduler.greet().await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    let outcome = record.of(attempt(1)).outcome();
    assert!(matches!(outcome, Some(Outcome::Errored { cause: Cause::AgentRestarted, .. })), "{outcome:?}");
    agent.stop().await;
}

#[tokio::test]
async fn a_full_spool_cuts_the_log_and_the_action_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = ScriptedScheduler::start().await;
    let mut config = config(folder.path(), &scheduler.url);
    config.spool.disk_bytes = 1 << 20;
    let agent = TestAgent::start(config);
    let (mut line, ..) = scheduler.greet().await;
    let mut record = Record::default();
    line.desire([(attempt(1), run(&spec(&["bytes 5000000", "print end"])))]).await;
    let is_told = |record: &Record| record.attempts.get(&attempt(1)).is_some_and(|r| r.outcome().is_some());
    line.serve(&mut record, is_told).await;
    line.serve(&mut record, |record| record.offer.is_some()).await;
    assert_eq!(record.offer.as_ref().unwrap().not_accepting_because, "spool full");
    line.credit(1 << 20).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    let recorded = record.of(attempt(1));
    assert_eq!(recorded.outcome(), Some(&Outcome::Succeeded));
    assert_eq!(recorded.log.len(), 5_000_004);
    let [(from, to, reason)] = recorded.gaps.as_slice() else { panic!("{:?}", recorded.gaps) };
    assert_eq!((reason.as_str(), *to), ("spool full", 5_000_004));
    assert!((500_000..1 << 20).contains(from), "{from}");
    // With the log delivered there is room again.
    line.serve(&mut record, |record| record.offer.as_ref().is_some_and(|offer| offer.accepting)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_log_is_cut_at_its_quota() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    let spec = agent::ActionSpec { log_quota_bytes: 100_000, ..spec(&["bytes 300000"]) };
    line.desire([(attempt(1), run(&spec))]).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    let gaps = &record.of(attempt(1)).gaps;
    assert_eq!(gaps, &[(100_000, 300_000, "log quota reached".to_owned())]);
    agent.stop().await;
}

#[tokio::test]
async fn with_its_disk_low_the_agent_takes_nothing_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = ScriptedScheduler::start().await;
    let free = Arc::new(AtomicU64::new(0));
    let mut config = config(folder.path(), &scheduler.url);
    config.min_free_disk_bytes = 1 << 30;
    let probe = free.clone();
    config.disk_probe = Box::new(move |_| Ok(probe.load(Ordering::Relaxed)));
    let agent = TestAgent::start(config);
    let (mut line, hello, _) = scheduler.greet().await;
    let offer = hello.offer.unwrap();
    assert_eq!((offer.accepting, offer.not_accepting_because.as_str()), (false, "disk below 1 GiB"));
    line.desire([(attempt(1), run(&spec(&["print no"])))]).await;
    assert!(line.answered().await.attempts.is_empty());
    free.store(2 << 30, Ordering::Relaxed);
    let mut record = Record::default();
    line.serve(&mut record, |record| record.offer.as_ref().is_some_and(|offer| offer.accepting)).await;
    line.credit(1 << 20).await;
    line.desire([(attempt(2), run(&spec(&["print yes"])))]).await;
    line.serve(&mut record, |record| record.is_closed(attempt(2))).await;
    agent.stop().await;
}

#[tokio::test]
async fn what_cannot_be_prepared_or_run_is_errored_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record::default();
    let mut broken = spec(&["print no"]);
    broken.source.as_mut().unwrap().repository_url = "https://u:hunter2@forge.example.org/broken".into();
    let elsewhere = agent::ActionSpec { executor: "microvm".into(), ..spec(&["print no"]) };
    let unreadable = desired_entry::Wish::Run(agent::Run { spec: vec![0xff; 9], reserved: None });
    line.desire([(attempt(1), run(&broken)), (attempt(2), run(&elsewhere)), (attempt(3), unreadable)]).await;
    line.serve(&mut record, |record| (1..=3).all(|number| record.is_closed(attempt(number)))).await;
    for (number, expected, says) in [
        (1, Cause::Workspace, "forge.example.org/broken"),
        (2, Cause::Unsupported, "`microvm` (it offers fake)"),
        (3, Cause::Unsupported, "cannot be read"),
    ] {
        let Some(Outcome::Errored { cause, message }) = record.of(attempt(number)).outcome() else {
            panic!()
        };
        assert_eq!(*cause, expected);
        assert!(message.contains(says) && !message.contains("hunter2"), "{message}");
        assert_eq!(record.of(attempt(number)).kinds(), ["finished"]);
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_lost_acknowledgement_has_things_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let (_scheduler, agent, mut line) = connected(folder.path()).await;
    let mut record = Record { mute: true, ..Record::default() };
    line.desire([(attempt(1), run(&spec(&["print hello"])))]).await;
    line.serve(&mut record, |record| record.is_closed(attempt(1))).await;
    record.mute = false;
    // It comes by itself, is recorded before, and is acknowledged now.
    line.serve(&mut record, |record| record.of(attempt(1)).repeated > 0).await;
    line.serve(&mut record, |record| record.held.attempts.is_empty()).await;
    assert_eq!(record.of(attempt(1)).text(), "hello\n");
    agent.stop().await;
}

#[tokio::test]
async fn an_agent_that_is_refused_enrols_again_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = ScriptedScheduler::start().await;
    scheduler.refuse(2);
    let agent = TestAgent::start(config(folder.path(), &scheduler.url));
    let (line, ..) = scheduler.greet().await;
    let first = scheduler.enrolments.recv().await.unwrap();
    assert_eq!(first, scheduler.enrolments.recv().await.unwrap());
    agent.stop().await;
    drop(line);
    // The next start needs no token; a wrong one at the first start is told.
    let mut known = config(folder.path(), &scheduler.url);
    known.enrolment_token = None;
    let agent = TestAgent::start(known);
    let (line, ..) = scheduler.greet().await;
    assert_eq!(line.agent_id, first.agent_id);
    agent.stop().await;
    let stranger = tempfile::tempdir().unwrap();
    let mut wrong = config(stranger.path(), &scheduler.url);
    wrong.enrolment_token = Some("guess".to_owned().into());
    let error = TestAgent::start(wrong).ended().await.unwrap_err();
    assert!(matches!(error, sealci_agent::AgentError::Enrol(_)), "{error}");
}

#[tokio::test]
async fn held_is_said_again_and_again_and_another_scheduler_is_tried() {
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = ScriptedScheduler::start().await;
    let mut config = config(folder.path(), &scheduler.url);
    // Nobody listens on the first.
    config.schedulers.insert(0, "http://127.0.0.1:1".into());
    let agent = TestAgent::start(config);
    let (mut line, ..) = scheduler.greet().await;
    let started = tokio::time::Instant::now();
    for _ in 0..2 {
        line.hear_until(|body| matches!(body, agent_message::Body::Held(_)).then_some(())).await;
    }
    // Twice within the two intervals of a second that Welcome names, with some room for a busy machine.
    assert!(started.elapsed() < Duration::from_secs(4));
    agent.stop().await;
}

#[tokio::test]
async fn two_agents_cannot_share_a_spool() {
    let folder = tempfile::tempdir().unwrap();
    let (scheduler, agent, _line) = connected(folder.path()).await;
    let error = TestAgent::start(config(folder.path(), &scheduler.url)).ended().await.unwrap_err();
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    agent.stop().await;
}
