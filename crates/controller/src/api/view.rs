//! Shows rows as the API's values.

use std::collections::HashMap;

use sealci_api::controller::types;
use sealci_archive::{Entry, EntryKind};
use sealci_core::outcome::Outcome;
use sealci_core::pipeline::Action as CoreAction;
use sealci_core::plan::PlannedAction;
use uuid::Uuid;

use crate::dispatch::AgentView;
use crate::storage::Swept;
use crate::store::entity::storage::{artifacts, caches, test_reports};
use crate::store::entity::{actions, attempts, commands, pipelines};
use crate::store::{PipelineStory, StoreError, counts, outcome_of_json};

/// A pipeline as a list shows it: without its actions.
pub fn pipeline(row: &pipelines::Model) -> types::Pipeline {
    types::Pipeline {
        id: row.id,
        number: row.number,
        name: row.name.clone(),
        repository: row.repository.clone(),
        repository_url: sealci_core::repository::redacted(&row.repository_url),
        event: row.event.parse().unwrap_or(types::PipelineEvent::Manual),
        ref_: row.r#ref.clone(),
        revision: row.revision.clone(),
        manifest_path: row.manifest_path.clone(),
        state: row.state.parse().unwrap_or(types::PipelineState::Queued),
        outcome: row.outcome.as_deref().and_then(|outcome| outcome.parse().ok()),
        round: row.round,
        cancel_wished: row.cancel_wished,
        created_at: time(row.created_at),
        finished_at: row.finished_at.map(time),
        actions: Vec::new(),
    }
}

/// A pipeline with its actions; `verbose` adds every attempt.
pub fn story(
    story: &PipelineStory,
    names: &HashMap<Uuid, String>,
    verbose: bool,
) -> Result<types::Pipeline, StoreError> {
    Ok(types::Pipeline { actions: story_actions(story, names, verbose)?, ..pipeline(&story.pipeline) })
}

/// The actions of a pipeline; `verbose` adds every attempt.
pub fn story_actions(
    story: &PipelineStory,
    names: &HashMap<Uuid, String>,
    verbose: bool,
) -> Result<Vec<types::Action>, StoreError> {
    let mut shown = Vec::with_capacity(story.actions.len());
    for row in &story.actions {
        let planned: PlannedAction = serde_json::from_str(&row.planned)
            .map_err(|error| crate::store::Malformed::new("actions", row.id, format!("planned: {error}")))?;
        let mut action = action(row, &planned, &story.actions)?;
        if verbose {
            let of_action = story.attempts.iter().filter(|attempt| attempt.action_id == row.id);
            for attempt in of_action {
                action.attempts.push(self::attempt(attempt, &planned, &story.commands, names)?);
            }
            tell_why_again(&mut action, row, &planned, &story.attempts)?;
        }
        shown.push(action);
    }
    Ok(shown)
}

fn action(
    row: &actions::Model,
    planned: &PlannedAction,
    all: &[actions::Model],
) -> Result<types::Action, StoreError> {
    let outcome = row.outcome.as_deref().map(outcome_of_json).transpose()?;
    let allowed_to_fail = outcome.as_ref().is_some_and(|outcome| {
        *outcome != Outcome::Succeeded && CoreAction::passes(outcome, &planned.allow_failure)
    });
    Ok(types::Action {
        id: row.id,
        pipeline_id: row.pipeline_id,
        name: row.name.clone(),
        needs: planned.needs.iter().filter_map(|need| all.get(*need)).map(|need| need.name.clone()).collect(),
        commands: planned.commands.clone(),
        state: row.state.parse().unwrap_or(types::ActionState::Pending),
        outcome: outcome.as_ref().map(self::outcome),
        allowed_to_fail,
        queued_at: row.queued_at.map(time),
        started_at: row.started_at.map(time),
        finished_at: row.finished_at.map(time),
        attempts: Vec::new(),
    })
}

/// Says of each attempt that was followed by another in its round, or is about to be, why.
fn tell_why_again(
    action: &mut types::Action,
    row: &actions::Model,
    planned: &PlannedAction,
    attempts: &[attempts::Model],
) -> Result<(), StoreError> {
    let own: Vec<_> = attempts.iter().filter(|attempt| attempt.action_id == row.id).collect();
    let rounds: Vec<_> = own.chunk_by(|one, next| one.round == next.round).collect();
    let mut shown = action.attempts.iter_mut();
    for (index, round) in rounds.iter().enumerate() {
        let ends = round.iter().map(|attempt| attempt.outcome.as_deref().map(outcome_of_json).transpose());
        let ends: Vec<Option<Outcome>> = ends.collect::<Result<_, _>>()?;
        let is_last_round = index + 1 == rounds.len();
        let is_queued_again = is_last_round && row.state == "queued" && row.attempts_in_round > 0;
        let mut why = planned.rules().story(ends.iter().map(Option::as_ref));
        if !is_queued_again && let Some(last) = why.last_mut() {
            *last = None;
        }
        for (attempt, why) in shown.by_ref().zip(why) {
            attempt.retried_because = why;
        }
    }
    Ok(())
}

fn attempt(
    row: &attempts::Model,
    planned: &PlannedAction,
    commands: &[commands::Model],
    names: &HashMap<Uuid, String>,
) -> Result<types::Attempt, StoreError> {
    let of_attempt =
        commands.iter().filter(|row_| row_.action_id == row.action_id && row_.number == row.number);
    Ok(types::Attempt {
        number: row.number,
        round: row.round,
        state: row.state.parse().unwrap_or(types::AttemptState::Claimed),
        outcome: row.outcome.as_deref().map(outcome_of_json).transpose()?.as_ref().map(outcome),
        fenced: row.fenced,
        agent_id: row.agent_id,
        agent_name: names.get(&row.agent_id).cloned(),
        executor: row.executor.clone(),
        claimed_at: time(row.claimed_at),
        started_at: row.started_at.map(time),
        finished_at: row.finished_at.map(time),
        log_end: row.log_end,
        log_length: row.log_length,
        commands: of_attempt.map(|row| command(row, planned)).collect(),
        artifacts: None,
        tests: None,
        retried_because: None,
    })
}

fn command(row: &commands::Model, planned: &PlannedAction) -> types::Command {
    let text = usize::try_from(row.index).ok().and_then(|index| planned.commands.get(index));
    types::Command {
        index: row.index,
        text: text.cloned().unwrap_or_default(),
        log_offset: row.log_offset,
        log_end: row.log_end,
        exit_code: row.exit_code,
        duration_us: row.duration_us,
        cpu_user_us: row.cpu_user_us,
        cpu_system_us: row.cpu_system_us,
        memory_peak_bytes: row.memory_peak_bytes,
        read_bytes: row.read_bytes,
        write_bytes: row.write_bytes,
    }
}

fn outcome(outcome: &Outcome) -> types::Outcome {
    let mut shown = types::Outcome {
        kind: outcome.kind().parse().unwrap_or(types::OutcomeKind::Errored),
        exit_code: None,
        limit: None,
        cause: None,
        message: None,
        because: None,
    };
    match outcome {
        Outcome::Failed { exit_code, limit } => {
            shown.exit_code = Some(*exit_code);
            shown.limit = limit.map(|limit| limit.as_str().to_owned());
        }
        Outcome::Errored { cause, message } => {
            shown.cause = Some(cause.as_str().to_owned());
            shown.message = Some(message.clone());
        }
        Outcome::Skipped { because } => shown.because = Some(because.clone()),
        Outcome::Succeeded | Outcome::Cancelled | Outcome::TimedOut => {}
    }
    shown
}

/// Adds what is kept of the attempts that count, and what the tests of all attempts did.
pub fn add_kept(
    pipeline: &mut types::Pipeline,
    story: &PipelineStory,
    artifacts: &[artifacts::Model],
    reports: &[test_reports::Model],
) {
    for (action, row) in pipeline.actions.iter_mut().zip(&story.actions) {
        let counting =
            story.attempts.iter().find(|attempt| counts(row, attempt)).map(|attempt| attempt.number);
        for attempt in &mut action.attempts {
            let is_own = |id: Uuid, number: i32| id == row.id && number == attempt.number;
            let own = artifacts.iter().filter(|kept| is_own(kept.action_id, kept.number));
            let own: Vec<_> = own.filter(|_| counting == Some(attempt.number)).collect();
            attempt.artifacts = (!own.is_empty()).then(|| types::ArtifactTotals {
                count: i32::try_from(own.len()).unwrap_or(i32::MAX),
                size_bytes: own.iter().map(|kept| kept.size_bytes).fold(0, i64::saturating_add),
                files: own.iter().map(|kept| kept.files).fold(0, i64::saturating_add),
            });
            let report = reports.iter().find(|report| is_own(report.action_id, report.number));
            attempt.tests = report.and_then(|report| serde_json::from_str(&report.report).ok());
        }
    }
}

/// An artifact of an action.
pub fn artifact(action: &actions::Model, row: &artifacts::Model) -> types::Artifact {
    types::Artifact {
        id: row.id,
        pipeline_id: row.pipeline_id,
        action_id: row.action_id,
        action_name: action.name.clone(),
        attempt: row.number,
        kind: row.kind.parse().unwrap_or(types::ArtifactKind::Files),
        name: Some(row.name.clone()).filter(|name| !name.is_empty()),
        digest: row.digest.clone(),
        size_bytes: row.size_bytes,
        unpacked_bytes: row.unpacked_bytes,
        files: row.files,
        created_at: time(row.created_at),
        expires_at: time(row.expires_at),
    }
}

/// A file of an artifact.
pub fn artifact_file(entry: &Entry) -> types::ArtifactFile {
    types::ArtifactFile {
        path: entry.path.clone(),
        kind: match entry.kind {
            EntryKind::File => types::ArtifactFileKind::File,
            EntryKind::Folder => types::ArtifactFileKind::Folder,
            EntryKind::Symlink => types::ArtifactFileKind::Symlink,
            EntryKind::Hardlink => types::ArtifactFileKind::Hardlink,
        },
        size_bytes: big(entry.size_bytes),
        mode: i32::try_from(entry.mode).unwrap_or_default(),
        target: entry.target.clone(),
    }
}

/// An entry of a cache.
pub fn cache(row: &caches::Model) -> types::Cache {
    types::Cache {
        id: row.id,
        repository: row.repository.clone(),
        scope: row.scope.clone(),
        key: row.key.clone(),
        digest: row.digest.clone(),
        size_bytes: row.size_bytes,
        unpacked_bytes: row.unpacked_bytes,
        files: row.files,
        created_at: time(row.created_at),
        last_used_at: time(row.last_used_at),
    }
}

/// What a sweep deleted, or would delete.
pub fn garbage(swept: &Swept, dry_run: bool) -> types::Garbage {
    types::Garbage {
        dry_run,
        artifacts: big(swept.artifacts),
        cache_entries: big(swept.cache_entries),
        logs: big(swept.logs),
        blobs: big(swept.blobs),
        objects: big(swept.objects),
        freed_bytes: big(swept.freed_bytes),
    }
}

/// An agent as it is known now.
pub fn agent(view: &AgentView) -> types::Agent {
    let state = view.state.as_ref();
    let offer = state.and_then(|state| state.offer.as_ref());
    let resources = |resources: Option<&sealci_proto::agent::Resources>| types::Resources {
        cpu_millis: resources.map_or(0, |resources| big(resources.cpu_millis)),
        memory_bytes: resources.map_or(0, |resources| big(resources.memory_bytes)),
    };
    let connected = state.is_some_and(|state| state.connected);
    // What it last said of itself is no news of one that is away.
    let reason = match offer.filter(|_| connected) {
        Some(offer) => Some(offer.not_accepting_because.clone()).filter(|reason| !reason.is_empty()),
        None => Some("it is not connected".to_owned()),
    };
    types::Agent {
        id: view.row.id,
        name: view.row.name.clone(),
        version: state.map(|state| state.version.clone()),
        connected,
        drained: view.row.drained,
        accepting: connected && offer.is_some_and(|offer| offer.accepting),
        not_accepting_because: reason,
        labels: offer.map(|offer| offer.labels.clone()).unwrap_or_default(),
        executors: offer.map(|offer| offer.executors.clone()).unwrap_or_default(),
        capacity: resources(offer.and_then(|offer| offer.capacity.as_ref())),
        available: resources(state.and_then(|state| state.available.as_ref())),
        holds: state.map_or(0, |state| i32::try_from(state.held.len()).unwrap_or(i32::MAX)),
    }
}

fn big(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn time(unix_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(unix_ms).map(|time| time.to_string()).unwrap_or_default()
}
