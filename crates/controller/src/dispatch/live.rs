//! Holds one pipeline in the driver's memory: its state machine beside the rows it is written to.

use std::collections::HashMap;
use std::time::Instant;

use sealci_core::attempt::{Attempt, AttemptState, Claimant};
use sealci_core::ids::{AgentId, AttemptId, FencingToken, PipelineId};
use sealci_core::pipeline::{ActionState, ClaimRefusal, Granted, Pipeline, PipelineState};
use sealci_core::plan::PlannedAction;
use uuid::Uuid;

use crate::store::entity::{actions, attempts, commands, pipelines};
use crate::store::{
    Batch, Malformed, PipelineRows, aggregate, attempt_of_row, outcome_to_json, row_of_attempt,
};

/// A pipeline in memory.
#[derive(Debug)]
pub struct Live {
    pub pipeline: pipelines::Model,
    pub actions: Vec<actions::Model>,
    pub plans: Vec<PlannedAction>,
    pub state: Pipeline,
    /// The rows of current attempts, and of older ones that still report.
    pub attempts: HashMap<AttemptId, attempts::Model>,
    /// Attempts that lost their action and still report.
    pub stale: HashMap<AttemptId, Attempt>,
    /// Commands that started and have not finished.
    pub commands: HashMap<(AttemptId, u32), commands::Model>,
    /// Where the scheduler placed what is not claimed yet; for showing only.
    pub placed: HashMap<AttemptId, AgentId>,
    /// When it last changed.
    pub touched: Instant,
}

/// Which rows of a pipeline a batch changes.
#[derive(Debug, Default)]
pub struct Dirty {
    pub pipeline: bool,
    pub actions: std::collections::BTreeSet<usize>,
    pub attempts: std::collections::BTreeSet<AttemptId>,
}

impl Live {
    /// Takes a pipeline over from its rows.
    pub fn of_rows(rows: PipelineRows, now: Instant) -> Result<Self, Malformed> {
        let (state, plans) = aggregate(&rows)?;
        let attempts = rows.attempts.into_iter().map(|row| (id_of_row(&row), row)).collect();
        let commands = rows.commands.into_iter().map(|row| (key_of_command(&row), row)).collect();
        Ok(Self {
            pipeline: rows.pipeline,
            actions: rows.actions,
            plans,
            state,
            attempts,
            stale: HashMap::new(),
            commands,
            placed: HashMap::new(),
            touched: now,
        })
    }

    /// The pipeline's id.
    pub fn id(&self) -> PipelineId {
        self.state.id
    }

    /// Whether the database has it; a pipeline has its number from the commit that makes it.
    pub fn is_recorded(&self) -> bool {
        self.pipeline.number != 0
    }

    /// At which epoch it is this replica's, as far as is known.
    pub fn epoch(&self) -> u64 {
        self.pipeline.epoch.unsigned_abs()
    }

    /// The attempt, current or stale, as far as it is in memory.
    pub fn attempt(&self, id: AttemptId) -> Option<&Attempt> {
        self.current(id).or_else(|| self.stale.get(&id))
    }

    /// The attempt, if it is its action's current one.
    pub fn current(&self, id: AttemptId) -> Option<&Attempt> {
        let action = &self.state.actions[self.state.position(id.action)?];
        action.current.as_ref().filter(|current| current.number == id.number)
    }

    /// Grants a claim, or says why not. The attempt that was the action's until now stays in memory: it may have been reported
    /// of in this very round, and may still be.
    pub fn claim(
        &mut self,
        id: AttemptId,
        claimant: Claimant,
        token: FencingToken,
        now_ms: i64,
    ) -> Result<Granted, ClaimRefusal> {
        let index = self.state.position(id.action);
        let former = index.and_then(|index| self.state.actions[index].current.clone());
        let granted = self.state.claim(id.action, id.number, claimant, token)?;
        if matches!(granted, Granted::Now { .. }) {
            if let Some(former) = former {
                self.stale.insert(AttemptId { action: id.action, number: former.number }, former);
            }
            if let Some(attempt) = self.current(id) {
                let row = row_of_new_attempt(id.action.as_uuid(), attempt, now_ms);
                self.attempts.insert(id, row);
            }
            self.placed.remove(&id);
        }
        Ok(granted)
    }

    /// Takes an older attempt into memory.
    pub fn remember_stale(&mut self, row: attempts::Model) -> Result<(), Malformed> {
        let id = id_of_row(&row);
        self.stale.insert(id, attempt_of_row(&row)?);
        self.attempts.insert(id, row);
        Ok(())
    }

    /// The current attempts that are claimed and unfinished.
    pub fn active_attempts(&self) -> impl Iterator<Item = (AttemptId, &Attempt)> {
        self.state.actions.iter().filter(|action| action.state == ActionState::Active).filter_map(|action| {
            let current = action.current.as_ref()?;
            Some((AttemptId { action: action.id, number: current.number }, current))
        })
    }

    /// Whether nothing more is expected: the round is finished and every known attempt is closed.
    pub fn is_settled(&self) -> bool {
        matches!(self.state.state(), PipelineState::Finished(_))
            && self.state.actions.iter().filter_map(|action| action.current.as_ref()).all(Attempt::is_closed)
            && self.stale.values().all(Attempt::is_closed)
    }

    /// Writes what is dirty into the rows and the batch. Returns the actions whose state changed by it.
    pub fn write(&mut self, dirty: &Dirty, now_ms: i64, batch: &mut Batch) -> Vec<usize> {
        let mut moved = Vec::new();
        for &index in &dirty.actions {
            if self.write_action(index, now_ms) {
                moved.push(index);
            }
            batch.actions.insert(self.actions[index].id, self.actions[index].clone());
        }
        for &id in &dirty.attempts {
            let attempt = self.attempt(id).cloned();
            if let (Some(attempt), Some(row)) = (attempt, self.attempts.get_mut(&id)) {
                row_of_attempt(&attempt, row);
                if matches!(attempt.state, AttemptState::Finished(_)) && row.finished_at.is_none() {
                    row.finished_at = Some(now_ms);
                }
                batch.attempts.insert((row.action_id, row.number), row.clone());
            }
        }
        // The row carries the manifest: most moves of an action leave it as it is, and then it is not written again.
        if self.write_pipeline(now_ms) || dirty.pipeline {
            batch.pipelines.insert(self.pipeline.id, self.pipeline.clone());
        }
        moved
    }

    fn write_action(&mut self, index: usize, now_ms: i64) -> bool {
        let (action, row) = (&self.state.actions[index], &mut self.actions[index]);
        let state = action.state.as_str();
        let attempts = i32::try_from(action.attempts).unwrap_or(i32::MAX);
        let moved = row.state != state || row.attempts != attempts;
        if moved {
            match action.state {
                ActionState::Pending => (row.queued_at, row.started_at, row.finished_at) = (None, None, None),
                ActionState::Queued => {
                    (row.queued_at, row.started_at, row.finished_at) = (Some(now_ms), None, None)
                }
                ActionState::Active => {}
                ActionState::Finished(_) => row.finished_at = Some(now_ms),
            }
        }
        row.state = state.to_owned();
        row.outcome = action.outcome().map(outcome_to_json);
        row.attempts = attempts;
        row.attempts_in_round = i32::try_from(action.tries.attempts).unwrap_or(i32::MAX);
        row.retries_in_round = i32::try_from(action.tries.by_retry).unwrap_or(i32::MAX);
        moved
    }

    /// Says whether that changed the row.
    fn write_pipeline(&mut self, now_ms: i64) -> bool {
        let row = &mut self.pipeline;
        let before = (row.round, row.cancel_wished, row.finished_at, row.state.clone(), row.outcome.clone());
        row.round = i32::try_from(self.state.round).unwrap_or(i32::MAX);
        row.cancel_wished = self.state.cancel_wished;
        let (state, outcome) = match self.state.state() {
            PipelineState::Queued => ("queued", None),
            PipelineState::Running => ("running", None),
            PipelineState::Finished(outcome) => ("finished", Some(outcome)),
        };
        row.finished_at = outcome.map(|_| row.finished_at.unwrap_or(now_ms));
        row.state = state.to_owned();
        row.outcome = outcome.map(|outcome| outcome.as_str().to_owned());
        before != (row.round, row.cancel_wished, row.finished_at, row.state.clone(), row.outcome.clone())
    }
}

/// The attempt that a row is about.
pub fn id_of_row(row: &attempts::Model) -> AttemptId {
    let action = sealci_core::ids::ActionId::from_uuid(row.action_id);
    AttemptId { action, number: row.number.unsigned_abs() }
}

fn key_of_command(row: &commands::Model) -> (AttemptId, u32) {
    let action = sealci_core::ids::ActionId::from_uuid(row.action_id);
    (AttemptId { action, number: row.number.unsigned_abs() }, row.index.unsigned_abs())
}

/// The row of an attempt that was just claimed.
pub fn row_of_new_attempt(action: Uuid, attempt: &Attempt, now_ms: i64) -> attempts::Model {
    let mut row = attempts::Model {
        action_id: action,
        number: 0,
        round: 0,
        token: 0,
        agent_id: Uuid::nil(),
        instance_id: Uuid::nil(),
        claim_id: Uuid::nil(),
        state: String::new(),
        outcome: None,
        fenced: false,
        next_sequence: 0,
        log_end: 0,
        log_length: None,
        executor: None,
        claimed_at: now_ms,
        started_at: None,
        finished_at: None,
    };
    row_of_attempt(attempt, &mut row);
    row
}
