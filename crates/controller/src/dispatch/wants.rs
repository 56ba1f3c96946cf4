//! States what is wanted of the scheduler, from a pipeline as it stands.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message;
use sealci_core::attempt::AttemptState;
use sealci_core::ids::AttemptId;
use sealci_core::pipeline::ActionState;
use sealci_git::Credentials;
use sealci_proto::agent::{ActionSpec, Cancel, Source, Used};
use sealci_proto::network_to_wire;
use sealci_proto::scheduler::{Requirements, Want, WantClaimed, WantGone, WantQueued, Wants, want};

use super::driver::Config;
use super::live::Live;

/// A manifest has at most 512 actions; arrival is the pipeline's number, then the action's place in it.
const ACTIONS_PER_PIPELINE: u64 = 512;

/// How the controller wants actions ended and their logs bounded.
#[derive(Debug, Clone, Copy)]
pub struct ActionLimits {
    /// TERM → so long → KILL.
    pub grace: Duration,
    /// A log is cut visibly past this length.
    pub log_quota_bytes: u64,
}

/// How long an exclusive action may run on after a message that the controller answered was *sent*: 40 s where 60 s of silence
/// make an attempt lost. The silence is counted from when the same message, or a later one, *came*. So the kill is at least
/// a third of the silence ahead of the loss: 20 s for the kill to take hold and for clocks that do not run alike.
fn exclusive_lease(lost_after: Duration) -> Duration {
    lost_after * 2 / 3
}

/// All that is wanted for a pipeline.
pub fn complete(live: &Live, config: &Config) -> Wants {
    let all = 0..live.state.actions.len();
    let attempts =
        all.flat_map(|index| of_action(live, index, config)).filter(|want| !is_gone(want)).collect();
    Wants { complete: true, attempts, ..header(live) }
}

/// What changed with some actions.
pub fn changed(live: &Live, actions: impl IntoIterator<Item = usize>, config: &Config) -> Wants {
    let attempts = actions.into_iter().flat_map(|index| of_action(live, index, config)).collect();
    Wants { complete: false, attempts, ..header(live) }
}

fn header(live: &Live) -> Wants {
    Wants { pipeline_id: live.id().to_string(), epoch: live.epoch(), complete: false, attempts: Vec::new() }
}

fn is_gone(want: &Want) -> bool {
    matches!(want.state, Some(want::State::Gone(_)))
}

fn of_action(live: &Live, index: usize, config: &Config) -> Vec<Want> {
    let action = &live.state.actions[index];
    let entry = |number: u32, state: want::State| Want {
        attempt: Some(AttemptId { action: action.id, number }.into()),
        state: Some(state),
    };
    let gone = |number: u32| (number > 0).then(|| entry(number, want::State::Gone(WantGone {})));
    let next = action.attempts + 1;
    match (&action.state, &action.current) {
        (ActionState::Active, Some(current)) => {
            let cancel =
                Cancel { grace_ms: u64::try_from(config.limits.grace.as_millis()).unwrap_or(u64::MAX) };
            let claimed = WantClaimed {
                agent_id: current.claimant.agent.to_string(),
                instance_id: current.claimant.instance.to_string(),
                cancel: live.state.cancel_wished.then_some(cancel),
            };
            let state = if matches!(current.state, AttemptState::Finished(_)) {
                want::State::Gone(WantGone {})
            } else {
                want::State::Claimed(claimed)
            };
            vec![entry(current.number, state)]
        }
        (ActionState::Queued, _) => {
            let queued = want::State::Queued(queued(live, index, config));
            gone(action.attempts).into_iter().chain([entry(next, queued)]).collect()
        }
        // Its next attempt may have been placed before it was cancelled.
        _ => gone(action.attempts).into_iter().chain(gone(next)).collect(),
    }
}

fn queued(live: &Live, index: usize, config: &Config) -> WantQueued {
    let environment = &live.plans[index].environment;
    WantQueued {
        requirements: Some(Requirements {
            resources: Some(environment.resources.into()),
            labels: environment.labels.clone().into_iter().collect(),
            executor: environment
                .required_executor()
                .map(|kind| kind.as_str().to_owned())
                .unwrap_or_default(),
        }),
        priority: 0,
        order: live.pipeline.number.unsigned_abs() * ACTIONS_PER_PIPELINE + index as u64,
        repository: live.pipeline.repository.clone(),
        spec: spec(live, index, config).encode_to_vec(),
        exclusive: live.plans[index].exclusive,
    }
}

/// Everything the agent needs to execute the action.
fn spec(live: &Live, index: usize, config: &Config) -> ActionSpec {
    let (pipeline, plan) = (&live.pipeline, &live.plans[index]);
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let (network, network_allow) = network_to_wire(&plan.environment.network);
    ActionSpec {
        pipeline_id: live.id().to_string(),
        pipeline_name: pipeline.name.clone(),
        action_name: plan.name.clone(),
        source: Some(Source {
            repository_url: pipeline.repository_url.clone(),
            r#ref: pipeline.r#ref.clone().unwrap_or_default(),
            revision: pipeline.revision.clone(),
            event_kind: pipeline.event.clone(),
            needs_credentials: config.credentials.of(&pipeline.repository_url) != Credentials::None,
        }),
        executor: plan
            .environment
            .required_executor()
            .map(|kind| kind.as_str().to_owned())
            .unwrap_or_default(),
        container: plan.environment.container.as_ref().map(Into::into),
        commands: plan.commands.clone(),
        shell: plan.shell.as_str().to_owned(),
        env: plan.env.clone().into_iter().collect::<BTreeMap<_, _>>().into_iter().collect(),
        resources: Some(plan.environment.resources.into()),
        timeout_ms: milliseconds(plan.timeout),
        grace_ms: milliseconds(config.limits.grace),
        network: network.into(),
        network_allow,
        log_quota_bytes: config.limits.log_quota_bytes,
        services: plan.services.iter().map(Into::into).collect(),
        caches: plan.caches.iter().map(Into::into).collect(),
        uses: plan.uses.iter().map(|used| used_action(live, *used)).collect(),
        artifacts: plan.artifacts.as_ref().map(Into::into),
        junit: plan.reports.junit.clone(),
        exclusive_lease_ms: if plan.exclusive { milliseconds(exclusive_lease(config.lost_after)) } else { 0 },
    }
}

/// Names an action of the pipeline whose artifacts another one uses.
fn used_action(live: &Live, index: usize) -> Used {
    Used { action_name: live.plans[index].name.clone(), action_id: live.actions[index].id.to_string() }
}
