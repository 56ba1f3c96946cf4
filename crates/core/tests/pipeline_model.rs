//! Plays random histories against the pipeline's state machine and checks what must hold after every step.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use sealci_core::attempt::{Claimant, JournalEntry};
use sealci_core::ids::{ActionId, AgentId, ClaimId, FencingToken, InstanceId, PipelineId};
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::pipeline::{Action, ActionState, Granted, Pipeline, PipelineState, RerunScope};
use sealci_core::plan::{AllowFailure, Retry, RetryOn};
use sealci_core::retry::{ATTEMPTS_PER_ROUND, Rules};

const ACTIONS: usize = 5;

/// One input. Which action and attempt it is about is drawn too, so most are illegal: they must be refused unharmed.
#[derive(Debug, Clone)]
enum Step {
    Claim { action: usize, ahead: u32, claim: u8 },
    Running { action: usize, stale: bool },
    Finish { action: usize, outcome: Outcome, stale: bool },
    Lose { action: usize },
    Cancel,
    Rerun { all: bool },
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        3 => Just(Outcome::Succeeded),
        1 => Just(Outcome::Failed { exit_code: 7, limit: None }),
        1 => Just(Outcome::Errored { cause: Cause::Executor, message: "broke".into() }),
        1 => Just(Outcome::Errored { cause: Cause::Unsupported, message: "never".into() }),
        1 => Just(Outcome::TimedOut),
        1 => Just(Outcome::Cancelled),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let action = 0..ACTIONS;
    prop_oneof![
        8 => (action.clone(), prop_oneof![4 => Just(1u32), 1 => 0u32..3], 0u8..2)
            .prop_map(|(action, ahead, claim)| Step::Claim { action, ahead, claim }),
        4 => (action.clone(), prop::bool::weighted(0.2)).prop_map(|(action, stale)| Step::Running { action, stale }),
        6 => (action.clone(), outcome(), prop::bool::weighted(0.2))
            .prop_map(|(action, outcome, stale)| Step::Finish { action, outcome, stale }),
        2 => action.prop_map(|action| Step::Lose { action }),
        1 => Just(Step::Cancel),
        1 => any::<bool>().prop_map(|all| Step::Rerun { all }),
    ]
}

/// What the manifest says of further attempts: nothing for most.
fn rules() -> impl Strategy<Value = Rules> {
    let some = (1..4u32, prop::sample::subsequence(RetryOn::ALL.to_vec(), 1..=3), any::<bool>())
        .prop_map(|(times, on, exclusive)| Rules { retry: Retry { times, on }, exclusive });
    prop_oneof![2 => Just(Rules::default()), 1 => some]
}

/// A pipeline whose needs are drawn: bit `j` of `needs[i]` says whether action `i` needs the earlier action `j`.
fn pipeline(needs: &[u8], rules: &[Rules]) -> Pipeline {
    let actions = (0..ACTIONS)
        .map(|index| {
            let needs = (0..index).filter(|need| needs[index] & (1 << need) != 0).collect();
            let id = ActionId::from_parts(1, &[index as u8; 10]);
            let allow = if index == 1 { AllowFailure::ExitCodes(vec![7]) } else { AllowFailure::Never };
            Action::pending(id, format!("a{index}"), needs, allow, rules[index].clone())
        })
        .collect();
    Pipeline { id: PipelineId::from_parts(1, &[9; 10]), round: 1, cancel_wished: false, actions }
}

fn claimant(claim: u8) -> Claimant {
    Claimant {
        claim: ClaimId::from_parts(1, &[claim; 10]),
        agent: AgentId::from_parts(1, &[claim; 10]),
        instance: InstanceId::from_parts(1, &[claim; 10]),
    }
}

/// Applies a step; what is refused, or answered again, must change nothing.
fn apply(pipeline: &mut Pipeline, step: &Step, next_token: &mut u64) {
    let before = pipeline.clone();
    let unchanged = |pipeline: &Pipeline| assert_eq!(*pipeline, before, "a refusal changes nothing");
    match step {
        Step::Claim { action, ahead, claim } => {
            let (id, number) = (pipeline.actions[*action].id, pipeline.actions[*action].attempts + ahead);
            match pipeline.claim(id, number, claimant(*claim), FencingToken(*next_token)) {
                Ok(Granted::Now { .. }) => *next_token += 1,
                Ok(Granted::Before { .. }) | Err(_) => unchanged(pipeline),
            }
        }
        Step::Running { action, stale } => report(pipeline, *action, &JournalEntry::Running, *stale),
        Step::Finish { action, outcome, stale } => {
            let end = JournalEntry::Finished { outcome: outcome.clone(), log_length: 0 };
            report(pipeline, *action, &end, *stale);
        }
        Step::Lose { action } => {
            let (id, number) = (pipeline.actions[*action].id, pipeline.actions[*action].attempts);
            pipeline.lose(id, number, Cause::AgentLost, "silent");
        }
        Step::Cancel => {
            pipeline.cancel();
        }
        Step::Rerun { all } => {
            let scope = if *all { RerunScope::All } else { RerunScope::Failed };
            if pipeline.rerun(scope).is_err() {
                unchanged(pipeline);
            }
        }
    }
}

fn report(pipeline: &mut Pipeline, index: usize, entry: &JournalEntry, stale: bool) {
    let before = pipeline.clone();
    let action = &before.actions[index];
    let Some(current) = &action.current else { return };
    let token = FencingToken(current.token.0 + if stale { 1000 } else { 0 });
    let result = pipeline.record_event(action.id, current.number, token, current.next_sequence, entry);
    assert!(!stale || result.is_err(), "a stale token records nothing");
    if result.is_err() {
        assert_eq!(*pipeline, before, "a refusal changes nothing");
    }
}

fn check(before: &Pipeline, after: &Pipeline) {
    for (earlier, action) in before.actions.iter().zip(&after.actions) {
        let mut needs = action.needs.iter().map(|need| &after.actions[*need]);
        if let (Some(was), true) = (earlier.outcome(), before.round == after.round) {
            assert_eq!(action.outcome(), Some(was), "a finished action stays as it is within a round");
        }
        match &action.state {
            ActionState::Pending => {
                assert!(
                    needs.any(|need| need.outcome().is_none()),
                    "a pending action waits for an unfinished one"
                );
            }
            ActionState::Queued => assert!(needs.all(Action::passed), "queued only when its needs passed"),
            ActionState::Active => {
                let current = action.current.as_ref().unwrap();
                assert_eq!((current.outcome(), current.number), (None, action.attempts));
            }
            ActionState::Finished(Outcome::Skipped { because }) => {
                assert!(!because.is_empty());
                assert!(needs.any(|need| need.outcome().is_some() && !need.passed()), "skipped for a reason");
            }
            ActionState::Finished(Outcome::Succeeded) => {
                let current = action.current.as_ref().unwrap();
                assert!(!current.fenced, "a fenced attempt's result never counts");
                assert_eq!(current.outcome(), Some(&Outcome::Succeeded));
            }
            ActionState::Finished(_) => {}
        }
        let times = action.rules.retry.times;
        let by_itself = if action.rules.exclusive { 1 } else { ATTEMPTS_PER_ROUND };
        assert!(action.tries.attempts <= by_itself + times, "{:?}", action.tries);
        assert!(action.tries.by_retry <= times, "{:?}", action.tries);
        assert!(action.attempts >= earlier.attempts, "attempts only number on");
        check_again(earlier, action, before.round == after.round);
    }
    if before.round == after.round && matches!(before.state(), PipelineState::Finished(_)) {
        assert_eq!(before.state(), after.state(), "a finished pipeline changes only by a re-run");
    }
}

/// An action is queued after an attempt only if the attempt was lost, or if its manifest wishes so.
fn check_again(earlier: &Action, action: &Action, same_round: bool) {
    if !same_round || earlier.state != ActionState::Active || action.state != ActionState::Queued {
        return;
    }
    let result = action.current.as_ref().and_then(|current| current.outcome()).unwrap();
    let by_retry = action.tries.by_retry > earlier.tries.by_retry;
    let is_errored = matches!(result, Outcome::Errored { .. } | Outcome::Cancelled);
    let named = action.rules.retry.covers(result)
        || (is_errored && action.rules.retry.on.contains(&RetryOn::Errored));
    assert!(
        if by_retry { named } else { is_errored && !action.rules.exclusive },
        "{result}: {:?}",
        action.rules
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_invariants(
        needs in prop::collection::vec(any::<u8>(), ACTIONS),
        rules in prop::collection::vec(rules(), ACTIONS),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut pipeline = pipeline(&needs, &rules);
        pipeline.start();
        let mut next_token = 1;
        for step in &steps {
            let before = pipeline.clone();
            apply(&mut pipeline, step, &mut next_token);
            check(&before, &pipeline);
        }
    }

    /// Nothing gets stuck: whoever keeps claiming and finishing what is queued reaches the end.
    #[test]
    fn every_pipeline_can_be_finished(
        needs in prop::collection::vec(any::<u8>(), ACTIONS),
        rules in prop::collection::vec(rules(), ACTIONS),
        outcomes in prop::collection::vec(outcome(), ACTIONS * (ATTEMPTS_PER_ROUND as usize + 3)),
    ) {
        let mut pipeline = pipeline(&needs, &rules);
        pipeline.start();
        for outcome in outcomes {
            let queued = |action: &Action| action.state == ActionState::Queued;
            let Some(index) = pipeline.actions.iter().position(queued) else { break };
            run(&mut pipeline, index, outcome);
        }
        prop_assert!(matches!(pipeline.state(), PipelineState::Finished(_)), "{:?}", pipeline.state());
    }
}

/// Five actions, each needing the one before it.
fn chain() -> Pipeline {
    chain_with(Rules::default())
}

/// The same; the first with these rules.
fn chain_with(rules: Rules) -> Pipeline {
    let mut all = vec![Rules::default(); ACTIONS];
    all[0] = rules;
    let mut pipeline = pipeline(&[0, 1, 2, 4, 8], &all);
    pipeline.start();
    pipeline
}

/// Claims the action's next attempt and finishes it.
fn run(pipeline: &mut Pipeline, index: usize, outcome: Outcome) {
    let (id, number) = (pipeline.actions[index].id, pipeline.actions[index].attempts + 1);
    let token = FencingToken(100 + u64::from(number));
    pipeline.claim(id, number, claimant(1), token).unwrap();
    let end = JournalEntry::Finished { outcome, log_length: 0 };
    pipeline.record_event(id, number, token, 0, &end).unwrap();
}

const FAILED: Outcome = Outcome::Failed { exit_code: 1, limit: None };

#[test]
fn a_failed_action_stops_what_needs_it_and_says_so() {
    let mut pipeline = chain();
    run(&mut pipeline, 0, FAILED);
    let outcomes: Vec<String> =
        pipeline.actions[1..].iter().map(|action| action.outcome().unwrap().to_string()).collect();
    assert_eq!(
        outcomes,
        [
            "skipped (`a0` failed)",
            "skipped (`a1` was skipped)",
            "skipped (`a2` was skipped)",
            "skipped (`a3` was skipped)"
        ]
    );
}

#[test]
fn an_allowed_failure_lets_the_next_action_run() {
    let mut pipeline = chain();
    run(&mut pipeline, 0, Outcome::Succeeded);
    run(&mut pipeline, 1, Outcome::Failed { exit_code: 7, limit: None });
    assert_eq!(pipeline.actions[2].state, ActionState::Queued);
}

#[test]
fn an_errored_action_is_given_up_after_three_attempts() {
    let mut pipeline = chain();
    for _ in 0..ATTEMPTS_PER_ROUND {
        assert_eq!(pipeline.actions[0].state, ActionState::Queued);
        run(&mut pipeline, 0, Outcome::Errored { cause: Cause::AgentLost, message: "poison".into() });
    }
    assert!(matches!(pipeline.actions[0].outcome(), Some(Outcome::Errored { cause: Cause::AgentLost, .. })));
}

#[test]
fn a_rerun_of_the_failed_takes_up_the_skipped_too_and_numbers_on() {
    let mut pipeline = chain();
    run(&mut pipeline, 0, Outcome::Succeeded);
    run(&mut pipeline, 1, FAILED);
    pipeline.rerun(RerunScope::Failed).unwrap();
    assert_eq!(pipeline.round, 2);
    assert_eq!(pipeline.actions[0].outcome(), Some(&Outcome::Succeeded));
    assert_eq!(pipeline.actions[1].state, ActionState::Queued);
    assert_eq!(pipeline.actions[2].state, ActionState::Pending);
    run(&mut pipeline, 1, Outcome::Succeeded);
    assert_eq!(pipeline.actions[1].current.as_ref().unwrap().number, 2);
}

#[test]
fn a_lost_attempt_with_cancel_wished_ends_cancelled_and_a_result_wins() {
    let mut pipeline = chain();
    let id = pipeline.actions[0].id;
    pipeline.claim(id, 1, claimant(1), FencingToken(1)).unwrap();
    pipeline.cancel();
    let mut lost = pipeline.clone();
    lost.lose(id, 1, Cause::AgentLost, "silent");
    assert_eq!(lost.actions[0].outcome(), Some(&Outcome::Cancelled));
    let end = JournalEntry::Finished { outcome: Outcome::Succeeded, log_length: 0 };
    pipeline.record_event(id, 1, FencingToken(1), 0, &end).unwrap();
    assert_eq!(pipeline.actions[0].outcome(), Some(&Outcome::Succeeded));
}

#[test]
fn a_retried_action_keeps_its_round_and_its_needs_wait() {
    let mut pipeline =
        chain_with(Rules { retry: Retry { times: 2, on: vec![RetryOn::Failed] }, exclusive: false });
    run(&mut pipeline, 0, FAILED);
    assert_eq!(pipeline.actions[0].state, ActionState::Queued);
    assert_eq!(pipeline.actions[1].state, ActionState::Pending);
    assert_eq!(pipeline.state(), PipelineState::Running);
    run(&mut pipeline, 0, FAILED);
    run(&mut pipeline, 0, Outcome::Succeeded);
    assert_eq!((pipeline.round, pipeline.actions[0].attempts), (1, 3));
    assert_eq!(pipeline.actions[1].state, ActionState::Queued);
    // Another round has all of its retries again.
    pipeline.cancel();
    pipeline.rerun(RerunScope::All).unwrap();
    run(&mut pipeline, 0, FAILED);
    assert_eq!(pipeline.actions[0].state, ActionState::Queued);
}

#[test]
fn what_is_cancelled_is_not_retried() {
    let ends = RetryOn::ALL.to_vec();
    for (outcome, kind) in
        [(FAILED, "failed"), (Outcome::TimedOut, "timed_out"), (Outcome::Cancelled, "cancelled")]
    {
        let mut pipeline =
            chain_with(Rules { retry: Retry { times: 2, on: ends.clone() }, exclusive: false });
        let id = pipeline.actions[0].id;
        pipeline.claim(id, 1, claimant(1), FencingToken(1)).unwrap();
        pipeline.cancel();
        let end = JournalEntry::Finished { outcome, log_length: 0 };
        pipeline.record_event(id, 1, FencingToken(1), 0, &end).unwrap();
        assert_eq!(pipeline.actions[0].outcome().unwrap().kind(), kind);
    }
}
