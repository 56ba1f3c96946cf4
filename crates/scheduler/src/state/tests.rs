//! Goes through the reconciliation step by step: who is told what, and who is not.

use std::time::Duration;

use sealci_core::ids::AgentId;
use sealci_proto::agent::{self, HeldState, agent_message};
use sealci_proto::scheduler::{self, EnrolRefusal, controller_message as up, scheduler_message, to_agent};

use super::kit::*;
use super::*;
use HeldState::{Assigned, Claimed, Finished, Running};

const SECOND: Duration = Duration::from_secs(1);

/// Controller 1, and agents 1 and 2 on sessions 1 and 2, both current and empty.
fn two_agents() -> Bench {
    let mut bench = Bench::new();
    bench.ready_controller(1, &[(1, Some(1)), (2, Some(2))], &[]);
    for n in [1, 2] {
        bench.agent(n, n, n);
        bench.held(n, None, &[]);
        bench.told(n);
    }
    bench.heard(1);
    bench
}

/// As [`two_agents`], with attempt 1 placed; gives the session where it is, and the other.
fn one_placed() -> (Bench, u64, u64) {
    let mut bench = two_agents();
    bench.wants(1, vec![queued(1, 1)]);
    let first = bench.told(1);
    assert_eq!((first, bench.told(2)), (vec![Told::Run(1)], vec![]));
    (bench, 1, 2)
}

#[test]
fn agents_wait_until_a_controller_knows_them() {
    let mut bench = Bench::new();
    bench.agent(1, 1, 1);
    assert_eq!((bench.told(1), bench.ended(1)), (vec![], None));
    bench.controller(1);
    bench.directory(1, false, vec![entry(1, None)]);
    assert_eq!(bench.told(1), [], "this may not be all");
    bench.directory(1, true, vec![entry(1, None)]);
    assert_eq!(bench.told(1), [Told::Welcome]);
}

#[test]
fn agents_do_not_wait_for_ever() {
    let mut bench = Bench::new();
    bench.agent(1, 1, 1);
    bench.pass(30 * SECOND);
    assert!(matches!(bench.ended(1), Some(Ended::NoDirectory { .. })));
}

#[test]
fn strangers_are_refused() {
    let mut bench = Bench::new();
    bench.ready_controller(1, &[(1, None), (2, None)], &[]);
    bench.agent(1, 3, 3);
    assert!(matches!(bench.ended(1), Some(Ended::Unauthenticated { .. })));
    let (session, agent) = (SessionId(2), agent_id(1));
    bench.input(Input::AgentArrived { session, agent, credential_sha256: [2; 32], hello: hello(1) });
    assert!(matches!(bench.ended(2), Some(Ended::Unauthenticated { .. })));
    bench.agent_says_hello(3, 1, agent::Hello { protocol_min: 2, protocol_max: 3, ..hello(1) });
    assert_eq!(
        bench.ended(3),
        Some(Ended::Protocol { theirs: Versions { min: 2, max: 3 }, ours: PROTOCOLS })
    );
    bench.agent_says_hello(4, 1, agent::Hello { instance_id: "x".into(), ..hello(1) });
    assert!(matches!(bench.ended(4), Some(Ended::Malformed(_))));
}

#[test]
fn a_removed_agent_is_cut_off_and_its_work_goes_elsewhere() {
    let (mut bench, here, there) = one_placed();
    let removed = scheduler::DirectoryEntry { removed: true, ..entry(here, None) };
    bench.directory(1, false, vec![removed]);
    assert!(matches!(bench.ended(here), Some(Ended::Removed { .. })));
    assert_eq!(bench.told(there), [Told::Run(1)]);
    bench.agent(3, here, here);
    assert!(matches!(bench.ended(3), Some(Ended::Unauthenticated { .. })));
}

#[test]
fn nothing_is_placed_before_an_agent_said_what_it_holds() {
    let mut bench = Bench::new();
    bench.ready_controller(1, &[(1, Some(1))], &[]);
    bench.agent(1, 1, 1);
    bench.wants(1, vec![queued(1, 1)]);
    assert_eq!(bench.told(1), [Told::Welcome]);
    bench.pass(5 * SECOND);
    assert_eq!(bench.told(1), []);
    bench.held(1, None, &[]);
    assert_eq!(bench.told(1), [Told::Run(1)]);
}

#[test]
fn nothing_is_placed_before_a_snapshot_nor_below_its_epoch() {
    let mut bench = Bench::new();
    bench.controller(1);
    bench.directory(1, true, vec![entry(1, Some(1))]);
    bench.agent(1, 1, 1);
    bench.held(1, None, &[]);
    bench.told(1);
    bench.wants_of(1, 1, 3, true, vec![queued(1, 1)]);
    bench.wants_of(1, 2, 3, true, vec![queued(2, 1)]);
    assert_eq!(bench.told(1), []);
    assert!(bench.why(1, 1).is_some_and(|reasons| reasons[0].contains("which pipelines are unfinished")));
    let epoch =
        |pipeline, epoch| scheduler::PipelineEpoch { pipeline_id: pipeline_id(pipeline).to_string(), epoch };
    bench.states(1, up::Body::Snapshot(scheduler::Snapshot { pipelines: vec![epoch(1, 4), epoch(2, 3)] }));
    assert_eq!(bench.told(1), [Told::Run(2)]);
    assert!(bench.why(1, 1).is_some_and(|reasons| reasons[0].contains("from one controller to another")));
    bench.wants_of(1, 1, 3, true, vec![queued(1, 1)]);
    assert_eq!(bench.told(1), [], "the past");
    bench.wants_of(1, 1, 4, true, vec![queued(1, 1)]);
    assert_eq!(bench.told(1), [Told::Run(1)]);
}

#[test]
fn a_claim_is_kept_on_each_new_stream_and_cancelled_on_wish() {
    let (mut bench, here, _) = one_placed();
    bench.change(1, vec![claimed(1, here, here, None)]);
    assert_eq!(bench.told(here), [], "it runs it already");
    bench.agent(10, here, here);
    assert_eq!(bench.ended(here), Some(Ended::Replaced));
    assert_eq!(bench.told(10), [Told::Welcome, Told::Keep(1)]);
    bench.change(1, vec![claimed(1, here, here, Some(500))]);
    assert_eq!(bench.told(10), [Told::Cancel(1)]);
    bench.agent_goes(10);
    bench.agent(11, here, here);
    assert_eq!(bench.told(11), [Told::Welcome, Told::Cancel(1)]);
}

#[test]
fn whoever_did_not_get_the_claim_drops_it() {
    let (mut bench, here, there) = one_placed();
    bench.held(there, None, &[(1, Assigned)]);
    assert_eq!(bench.told(there), [], "it may still win the claim");
    bench.change(1, vec![claimed(1, there, there, None)]);
    assert_eq!(bench.told(here), [Told::Drop(1)]);
    assert_eq!(bench.told(there), [Told::Keep(1)]);
}

#[test]
fn what_is_gone_is_dropped_where_it_was_not_claimed() {
    let (mut bench, here, there) = one_placed();
    bench.change(1, vec![queued(2, 1)]);
    let second = if bench.told(here) == [Told::Run(2)] { here } else { there };
    bench.change(1, vec![claimed(2, second, second, None)]);
    bench.wants(1, vec![]);
    let mut told = bench.told(here);
    told.extend(bench.told(there));
    assert_eq!(told, [Told::Drop(1)], "claims are settled by acknowledgements");
}

#[test]
fn what_was_claimed_and_over_between_two_statements_is_not_dropped() {
    for state in [Claimed, Running, Finished] {
        let (mut bench, here, _) = one_placed();
        bench.held(here, None, &[(1, state)]);
        bench.change(1, vec![gone(1)]);
        assert_eq!(bench.told(here), [], "{state:?}: the rest of its log is still on its way");
        bench.held(here, None, &[]);
        assert_eq!(bench.told(here), [], "{state:?}");
    }
    let (mut bench, here, _) = one_placed();
    bench.held(here, None, &[(1, Assigned)]);
    bench.change(1, vec![gone(1)]);
    assert_eq!(bench.told(here), [Told::Drop(1)]);
}

#[test]
fn what_nobody_speaks_of_is_left_alone() {
    let mut bench = two_agents();
    bench.held(1, None, &[(7, Running), (8, Assigned), (9, Finished)]);
    bench.wants(1, vec![queued(1, 1)]);
    bench.change(1, vec![gone(1)]);
    bench.pass(20 * SECOND);
    assert!(bench.told(1).iter().all(|told| matches!(told, Told::Run(1) | Told::Drop(1))));
}

#[test]
fn an_unclaimed_attempt_that_its_agent_does_not_hold_is_placed_again() {
    let (mut bench, here, _) = one_placed();
    bench.held(here, None, &[]);
    bench.held_of(here, Some((INCARNATION + 1, here, 1)), &[]);
    bench.held_of(here, Some((INCARNATION, here + 1, 1)), &[]);
    assert_eq!((bench.told(1), bench.told(2)), (vec![], vec![]), "none of these is an answer");
    bench.held(here, Some(1), &[]);
    let mut told = bench.told(1);
    told.extend(bench.told(2));
    assert_eq!(told, [Told::Run(1)]);
}

#[test]
fn an_attempt_that_agents_keep_letting_go_of_is_tried_ever_more_rarely() {
    let mut bench = two_agents();
    bench.wants(1, vec![queued(1, 1)]);
    let mut placements = 0;
    let mut counters = [0, 0];
    for _ in 0..120 {
        for (session, counter) in (1..).zip(&mut counters) {
            if bench.told(session) == [Told::Run(1)] {
                placements += 1;
                *counter += 1;
                bench.held(session, Some(*counter), &[]);
            } else {
                bench.held(session, Some(*counter), &[]);
            }
        }
        assert!(bench.why(1, 1).is_none_or(|reasons| !reasons.is_empty()));
        bench.pass(SECOND);
    }
    assert!((5..12).contains(&placements), "{placements}");
}

#[test]
fn the_absence_of_a_claimed_attempt_is_reported_once_and_to_each_who_states_it() {
    let (mut bench, here, _) = one_placed();
    bench.held(here, Some(1), &[(1, Assigned)]);
    bench.change(1, vec![claimed(1, here, here, None)]);
    bench.agent_goes(here);
    assert_eq!(bench.absences(1), [], "it is away, that is all");
    bench.agent(10, here, here);
    bench.held(10, None, &[]);
    assert_eq!(bench.absences(1), [], "it was not asked yet");
    bench.held(10, Some(1), &[]);
    assert_eq!(bench.absences(1), [attempt_id(1)]);
    bench.held(10, Some(1), &[]);
    assert_eq!(bench.absences(1), []);
    assert_eq!(bench.told(2), [], "the controller decides what becomes of it");
    bench.controller_goes(1);
    bench.ready_controller(3, &[(1, Some(1)), (2, Some(2))], &[(1, 2)]);
    bench.wants_of(3, 1, 2, true, vec![claimed(1, here, here, None)]);
    assert_eq!(bench.absences(3), [attempt_id(1)]);
}

#[test]
fn the_absence_of_a_cancelled_attempt_is_reported_too() {
    let mut bench = Bench::new();
    bench.ready_controller(1, &[(1, Some(1))], &[]);
    bench.wants(1, vec![claimed(1, 1, 1, Some(100))]);
    bench.agent(1, 1, 1);
    assert_eq!(bench.told(1), [Told::Welcome, Told::Cancel(1)]);
    bench.held(1, Some(1), &[]);
    assert_eq!(bench.absences(1), [attempt_id(1)]);
}

#[test]
fn what_finished_and_was_closed_is_not_absent() {
    let (mut bench, here, _) = one_placed();
    bench.change(1, vec![claimed(1, here, here, None)]);
    bench.held(here, Some(1), &[(1, Running)]);
    bench.held(here, Some(1), &[(1, Finished)]);
    bench.held(here, Some(1), &[]);
    assert_eq!(bench.absences(1), []);
}

#[test]
fn a_placed_attempt_goes_elsewhere_at_once_when_its_agent_is_gone() {
    let (mut bench, here, there) = one_placed();
    bench.held(here, Some(1), &[(1, Assigned)]);
    bench.agent_goes(here);
    assert_eq!(bench.told(there), [Told::Run(1)]);
    bench.agent(10, here, here);
    bench.held(10, None, &[(1, Assigned)]);
    assert_eq!(bench.told(10), [Told::Welcome], "it may ask for the claim, and is not asked to");
}

#[test]
fn after_a_restart_what_is_held_is_not_placed_again() {
    let mut bench = Bench::new();
    for n in [1, 2] {
        bench.agent(n, n, n);
    }
    bench.ready_controller(1, &[(1, Some(1)), (2, Some(2))], &[(1, 1)]);
    bench.wants(1, vec![queued(1, 1), queued(2, 1), claimed(3, 1, 1, None), claimed(4, 9, 9, None)]);
    bench.held(2, None, &[(2, Assigned)]);
    assert_eq!(bench.told(2), [Told::Welcome, Told::Run(2)], "the other may hold the rest");
    bench.held(1, None, &[(1, Claimed), (3, Running)]);
    assert_eq!(bench.told(1), [Told::Welcome, Told::Keep(3), Told::Keep(1)]);
    bench.pass(10 * SECOND);
    assert_eq!((bench.told(1), bench.told(2)), (vec![], vec![]));
}

#[test]
fn after_a_restart_placement_does_not_wait_for_the_silent() {
    let mut bench = Bench::new();
    for n in [1, 2] {
        bench.agent(n, n, n);
    }
    bench.ready_controller(1, &[(1, Some(1)), (2, Some(2))], &[(1, 1)]);
    bench.wants(1, vec![queued(1, 1)]);
    bench.held(2, None, &[]);
    bench.told(2);
    bench.pass(SECOND);
    assert_eq!(bench.told(2), []);
    bench.pass(SECOND);
    assert_eq!(bench.told(2), [Told::Run(1)]);
}

#[test]
fn a_late_word_of_a_replica_keeps_no_instance_from_work() {
    let (mut bench, here, _) = one_placed();
    bench.directory(1, false, vec![entry(1, None)]);
    assert_eq!((bench.told(here), bench.ended(here)), (vec![], None), "no other one was ever seen");
    bench.directory(1, false, vec![entry(1, Some(9))]);
    assert!(bench.told(here).contains(&Told::Superseded));
    bench.directory(1, false, vec![entry(1, Some(1))]);
    assert_eq!(bench.ended(here), Some(Ended::CurrentAgain), "on this stream it takes nothing new any more");
}

#[test]
fn the_instance_seen_last_gets_the_work_and_the_older_keeps_what_it_claimed() {
    let (mut bench, _, _) = one_placed();
    bench.change(1, vec![claimed(1, 1, 1, None)]);
    bench.held(1, Some(1), &[(1, Running)]);
    bench.agent(10, 1, 11);
    bench.held(10, None, &[]);
    assert_eq!(bench.told(10), [Told::Welcome]);
    bench.directory(1, false, vec![entry(1, Some(11))]);
    assert_eq!(bench.told(1), [Told::Superseded]);
    bench.pass(10 * SECOND);
    assert_eq!(bench.told(10), [], "it became the current one in time");
    bench.change(1, vec![queued(2, 4), queued(3, 4), queued(4, 4)]);
    let mut new = bench.told(10);
    new.extend(bench.told(2));
    assert_eq!(new.len(), 2);
    assert_eq!(bench.told(1), []);
    assert_eq!(bench.absences(1), [], "the empty hands of the second say nothing of the first");
    bench.agent_goes(1);
    bench.agent(12, 1, 1);
    assert_eq!(bench.told(12), [Told::Welcome, Told::Keep(1)]);
    bench.pass(5 * SECOND);
    assert_eq!(bench.told(12), [Told::Superseded]);
}

#[test]
fn a_drained_agent_gets_nothing_new() {
    let mut bench = two_agents();
    let drained = |agent| scheduler::DirectoryEntry { drained: true, ..entry(agent, Some(agent)) };
    bench.directory(1, false, vec![drained(1), drained(2)]);
    bench.wants(1, vec![queued(1, 1)]);
    assert_eq!((bench.told(1), bench.told(2)), (vec![], vec![]));
    assert_eq!(bench.why(1, 1), Some(vec!["2 of 2 agents are drained".into()]));
    bench.directory(1, false, vec![entry(2, Some(2))]);
    assert_eq!(bench.told(2), [Told::Run(1)]);
    assert_eq!(bench.why(1, 1), None);
}

#[test]
fn without_a_controller_all_stays_and_nothing_is_placed() {
    let (mut bench, here, there) = one_placed();
    bench.change(1, vec![queued(2, 4)]);
    bench.told(there);
    bench.change(1, vec![queued(3, 4)]);
    bench.controller_goes(1);
    bench.agent_goes(there);
    bench.agent(20, there, there);
    bench.held(20, None, &[]);
    assert_eq!(bench.told(20), [Told::Welcome], "the directory still stands");
    assert_eq!(bench.told(here), [], "nothing is dropped either");
    bench.ready_controller(2, &[(1, Some(1)), (2, Some(2))], &[(1, 2)]);
    assert_eq!(bench.told(20), [], "what the gone controller said is of an earlier epoch");
    bench.wants_of(2, 1, 2, true, vec![claimed(1, 1, 1, None), queued(3, 4)]);
    assert_eq!(bench.told(20), [Told::Run(3)]);
}

#[test]
fn a_scheduler_that_no_controller_comes_back_to_lets_its_agents_go() {
    let (mut bench, here, there) = one_placed();
    let stay = |bench: &mut Bench| {
        bench.pass(9 * SECOND);
        bench.held(here, Some(1), &[(1, Assigned)]);
        bench.held(there, None, &[]);
    };
    bench.controller_goes(1);
    stay(&mut bench);
    bench.ready_controller(2, &[(1, Some(1)), (2, Some(2))], &[(1, 1)]);
    bench.pass(5 * SECOND);
    assert_eq!((bench.ended(here), bench.ended(there)), (None, None), "it came back in time");
    bench.controller_goes(2);
    stay(&mut bench);
    assert_eq!((bench.ended(here), bench.ended(there)), (None, None));
    bench.pass(SECOND);
    for session in [here, there] {
        assert!(matches!(bench.ended(session), Some(Ended::Deserted { .. })));
    }
    bench.agent(10, 1, 1);
    assert_eq!(
        (bench.told(10), bench.ended(10)),
        (vec![], None),
        "it waits for a controller, as after a start"
    );
    bench.ready_controller(3, &[(1, Some(1)), (2, Some(2))], &[]);
    assert_eq!(bench.told(10), [Told::Welcome]);
}

#[test]
fn what_a_gone_controller_left_is_over_when_the_next_does_not_name_it() {
    let (mut bench, here, _) = one_placed();
    bench.controller_goes(1);
    bench.ready_controller(2, &[(1, Some(1)), (2, Some(2))], &[]);
    assert_eq!(bench.told(here), [Told::Drop(1)]);
}

#[test]
fn another_replicas_silence_means_nothing_and_its_past_neither() {
    let (mut bench, here, _) = one_placed();
    bench.ready_controller(2, &[(1, Some(1)), (2, Some(2))], &[]);
    assert_eq!(bench.told(here), []);
    bench.wants_of(2, 1, 2, true, vec![queued(1, 1)]);
    bench.wants_of(1, 1, 1, true, vec![]);
    assert_eq!(bench.told(here), []);
}

#[test]
fn messages_go_to_the_owner_else_to_the_first_and_answers_come_back() {
    let (mut bench, here, _) = one_placed();
    bench.ready_controller(2, &[(1, Some(1)), (2, Some(2))], &[]);
    bench.wants_of(2, 2, 1, true, vec![claimed(5, here, here, None)]);
    bench.heard(1);
    bench.heard(2);
    let claim = |n| {
        agent_message::Body::Claim(agent::Claim { attempt: Some(attempt_id(n).into()), claim_id: "c".into() })
    };
    for n in [1, 5, 99] {
        bench.says(here, claim(n));
    }
    let sessions = |messages: Vec<scheduler_message::Body>| {
        let forwarded =
            |message| matches!(message, scheduler_message::Body::FromAgent(from) if from.session == here);
        messages.into_iter().filter(|message| forwarded(message.clone())).count()
    };
    assert_eq!((sessions(bench.heard(1)), sessions(bench.heard(2))), (2, 1));
    let ack = to_agent::Body::Ack(agent::Ack::default());
    bench.states(2, up::Body::ToAgent(scheduler::ToAgent { session: 99, body: Some(ack.clone()) }));
    bench.states(2, up::Body::ToAgent(scheduler::ToAgent { session: here, body: Some(ack) }));
    let acks = bench.scheduler.sessions.len();
    assert_eq!(acks, 2);
}

#[test]
fn log_bytes_cost_credit_which_comes_back_when_released_or_dropped() {
    let (mut bench, here, _) = one_placed();
    let granted = bench.credit(here);
    assert_eq!(granted, 4 << 20);
    bench.chunk(here, 1, 1000);
    let released = to_agent::Body::ReleasedBytes(400);
    bench.states(1, up::Body::ToAgent(scheduler::ToAgent { session: here, body: Some(released) }));
    assert_eq!(bench.credit(here), 400);
    bench.controller_goes(1);
    bench.chunk(here, 1, 50);
    assert_eq!(bench.credit(here), 0, "there is nobody to send to");
    bench.ready_controller(2, &[(1, Some(1)), (2, Some(2))], &[(1, 1)]);
    assert_eq!(bench.credit(here), 650);
    for _ in 0..4 {
        bench.chunk(here, 1, 1 << 20);
    }
    assert_eq!(bench.ended(here), None);
    bench.chunk(here, 1, 1);
    assert_eq!(bench.ended(here), Some(Ended::Overspent { sent_bytes: 1, credit_bytes: 0 }));
}

#[test]
fn a_chunk_that_is_too_large_ends_the_stream() {
    let (mut bench, here, _) = one_placed();
    bench.chunk(here, 1, (1 << 20) + 1);
    assert!(matches!(bench.ended(here), Some(Ended::Malformed(_))));
}

#[test]
fn enrolment_is_asked_of_a_controller() {
    let mut bench = Bench::new();
    bench.enrol(1);
    assert_eq!(bench.enrolled(1), Some(Err(EnrolRefused::NoController)));
    bench.controller(1);
    let answer = |request, because: &str, refusal: EnrolRefusal| {
        up::Body::EnrolAnswer(scheduler::EnrolAnswer {
            request,
            refused_because: because.into(),
            refusal: refusal.into(),
        })
    };
    for request in 2..7 {
        bench.enrol(request);
    }
    bench.states(1, answer(2, "", EnrolRefusal::Unspecified));
    bench.states(1, answer(3, "no", EnrolRefusal::Unauthenticated));
    bench.states(1, answer(4, "no", EnrolRefusal::AlreadyExists));
    bench.states(1, answer(5, "no", EnrolRefusal::Invalid));
    assert_eq!(bench.enrolled(2), Some(Ok(())));
    assert_eq!(bench.enrolled(3), Some(Err(EnrolRefused::Unauthenticated("no".into()))));
    assert_eq!(bench.enrolled(4), Some(Err(EnrolRefused::AlreadyExists("no".into()))));
    assert_eq!(bench.enrolled(5), Some(Err(EnrolRefused::Invalid("no".into()))));
    bench.pass(10 * SECOND);
    assert!(matches!(bench.enrolled(6), Some(Err(EnrolRefused::TimedOut { .. }))));
    bench.enrol(7);
    bench.controller_goes(1);
    assert_eq!(bench.enrolled(7), Some(Err(EnrolRefused::NoController)));
}

#[test]
fn a_silent_agent_is_cut_off() {
    let (mut bench, here, there) = one_placed();
    for _ in 0..4 {
        bench.pass(10 * SECOND);
        bench.held(there, None, &[]);
    }
    assert!(matches!(bench.ended(here), Some(Ended::Silent { .. })));
    assert_eq!((bench.ended(there), bench.told(there)), (None, vec![Told::Run(1)]));
}

#[test]
fn controllers_hear_of_every_agent_and_of_its_end() {
    let mut bench = two_agents();
    bench.controller(2);
    let states = |messages: Vec<scheduler_message::Body>| -> Vec<(AgentId, bool)> {
        let state = |message| match message {
            scheduler_message::Body::AgentState(state) => {
                Some((state.agent_id.parse().unwrap(), state.connected))
            }
            _ => None,
        };
        messages.into_iter().filter_map(state).collect()
    };
    let heard = states(bench.heard(2));
    assert_eq!(heard, [(agent_id(1), true), (agent_id(2), true)]);
    bench.heard(1);
    bench.held(1, None, &[]);
    bench.agent_goes(2);
    for controller in [1, 2] {
        let heard = states(bench.heard(controller));
        assert_eq!(heard, [(agent_id(1), true), (agent_id(2), false)]);
    }
}

#[test]
fn a_replica_that_comes_back_takes_the_place_of_its_old_stream() {
    let mut bench = Bench::new();
    bench.controller(1);
    let hello = scheduler::Hello {
        protocol_min: 1,
        protocol_max: 1,
        replica_id: sealci_core::ids::ReplicaId::from_parts(1, &[5; 10]).to_string(),
    };
    bench.input(Input::ControllerArrived { controller: ControllerId(9), hello });
    assert_eq!(bench.scheduler.controllers.len(), 1);
    let hello = scheduler::Hello { protocol_min: 2, protocol_max: 2, replica_id: String::new() };
    bench.input(Input::ControllerArrived { controller: ControllerId(10), hello });
    assert_eq!(bench.scheduler.controllers.len(), 1);
}

/// The second attempt of the action whose first one is attempt `n`, exclusive.
fn next_of(n: u64) -> scheduler::Want {
    let mut want = queued(n, 1);
    want.attempt = Some(AttemptId { number: 2, ..attempt_id(n) }.into());
    if let Some(scheduler::want::State::Queued(queued)) = &mut want.state {
        queued.exclusive = true;
    }
    want
}

#[test]
fn an_exclusive_action_waits_until_its_former_attempt_is_gone() {
    for ends_with_stream in [false, true] {
        let mut bench = two_agents();
        bench.wants(1, vec![claimed(1, 1, 1, None)]);
        bench.held(1, None, &[(1, Running)]);
        bench.told(1);
        // It was fenced, say; its agent has yet to clean up. The other agent has room.
        bench.change(1, vec![gone(1), next_of(1)]);
        bench.held(1, None, &[(1, Finished)]);
        assert_eq!((bench.told(1), bench.told(2)), (vec![], vec![]));
        let number_2 = AttemptId { number: 2, ..attempt_id(1) };
        assert_eq!(
            bench.scheduler.why(number_2),
            Some(vec![
                "it is exclusive, and attempt 1 is not gone yet from agent-1, where it is cleaned up".into()
            ])
        );
        if ends_with_stream {
            bench.agent_goes(1);
            assert_eq!(bench.told(2), [Told::Run(1)], "nobody who is there holds it");
        } else {
            bench.held(1, None, &[]);
            assert_eq!(bench.told(1), [Told::Run(1)]);
        }
        assert!(bench.scheduler.held_back.is_empty());
    }
}

#[test]
fn what_is_not_exclusive_does_not_wait_for_its_former_attempt() {
    let mut bench = two_agents();
    bench.wants(1, vec![claimed(1, 1, 1, None)]);
    bench.held(1, None, &[(1, Running)]);
    bench.told(1);
    let mut next = next_of(1);
    if let Some(scheduler::want::State::Queued(queued)) = &mut next.state {
        queued.exclusive = false;
    }
    bench.change(1, vec![gone(1), next]);
    assert_eq!([bench.told(1), bench.told(2)].concat(), [Told::Run(1)]);
}

#[test]
fn questions_about_leases_and_their_answers_pass_unread() {
    let (mut bench, here, _) = one_placed();
    bench.heard(1);
    let renew = agent::Renew { attempt: Some(attempt_id(1).into()), token: 7, number: 3 };
    bench.says(here, agent_message::Body::Renew(renew.clone()));
    let passed = bench.heard(1).into_iter().any(|message| match message {
        scheduler_message::Body::FromAgent(from) => {
            from.body == Some(scheduler::from_agent::Body::Renew(renew.clone()))
        }
        _ => false,
    });
    assert!(passed);
    let renewed = agent::Renewed { attempt: Some(attempt_id(1).into()), token: 7, number: 3 };
    let body = Some(to_agent::Body::Renewed(renewed.clone()));
    bench.states(1, up::Body::ToAgent(scheduler::ToAgent { session: here, body }));
    assert_eq!(bench.renewed(here), [renewed]);
}

#[test]
fn the_highest_common_version_is_spoken() {
    let settings = Settings { protocols: Versions { min: 2, max: 3 }, ..Settings::default() };
    for ((min, max), chosen) in [((1, 2), Some(2)), ((2, 3), Some(3)), ((3, 4), Some(3)), ((4, 5), None)] {
        let mut scheduler = Scheduler::new(settings.clone(), 1);
        let replica_id = sealci_core::ids::ReplicaId::from_parts(1, &[5; 10]).to_string();
        let hello = scheduler::Hello { protocol_min: min, protocol_max: max, replica_id };
        scheduler.handle(Duration::ZERO, Input::ControllerArrived { controller: ControllerId(1), hello });
        let answer = scheduler.take_outputs().remove(0);
        match (answer, chosen) {
            (
                Output::ToController { message: scheduler_message::Body::Welcome(welcome), .. },
                Some(chosen),
            ) => {
                assert_eq!(welcome.protocol, chosen);
            }
            (Output::EndController { ended: Ended::Protocol { .. }, .. }, None) => {}
            (other, chosen) => panic!("{other:?} instead of {chosen:?}"),
        }
    }
}

#[test]
fn nothing_is_remembered_of_what_is_over() {
    let (mut bench, here, there) = one_placed();
    bench.held(here, Some(1), &[(1, Claimed)]);
    bench.change(1, vec![claimed(1, here, here, None), queued(2, 9)]);
    bench.held(here, Some(1), &[(1, Finished)]);
    bench.change(1, vec![gone(1), gone(2)]);
    bench.held(here, Some(1), &[]);
    bench.agent_goes(here);
    bench.agent_goes(there);
    bench.controller_goes(1);
    let scheduler = &bench.scheduler;
    assert!(scheduler.sessions.is_empty() && scheduler.streams.is_empty() && scheduler.pooled.is_empty());
    assert!(
        scheduler.held_back.is_empty()
            && scheduler.holders.is_empty()
            && scheduler.wants.is_empty()
            && scheduler.touched.is_empty()
    );
    assert!(scheduler.placement.queue().is_empty() && scheduler.placement.pool().agents().is_empty());
    assert_eq!(scheduler.placement.queue().usage_cpu_millis("r"), 0);
}
