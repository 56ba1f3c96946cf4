//! Converts between rows and the core's values. A row that no state machine could have written is [`Malformed`].

use sealci_core::attempt::{Attempt, AttemptState, Claimant};
use sealci_core::ids::{ActionId, AgentId, ClaimId, FencingToken, InstanceId, PipelineId};
use sealci_core::outcome::Outcome;
use sealci_core::pipeline::{Action, ActionState, Pipeline};
use sealci_core::plan::PlannedAction;
use sealci_core::retry::Tries;

use super::PipelineRows;
use super::entity::attempts;

/// A row that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("table {table}, row {row}: {what}")]
pub struct Malformed {
    table: &'static str,
    row: String,
    what: String,
}

impl Malformed {
    /// Names the row and what is wrong with it.
    pub fn new(table: &'static str, row: impl ToString, what: impl ToString) -> Self {
        Self { table, row: row.to_string(), what: what.to_string() }
    }
}

/// Attempt numbers are far below 2³¹: a dozen a round, and rounds are opened by people.
pub(super) fn number(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// An outcome as the column holds it.
pub fn outcome_to_json(outcome: &Outcome) -> String {
    serde_json::to_string(outcome).unwrap_or_default()
}

/// Reads [`outcome_to_json`].
pub fn outcome_of_json(json: &str) -> Result<Outcome, Malformed> {
    serde_json::from_str(json).map_err(|error| Malformed::new("outcome", json, error))
}

/// Makes the aggregate of a pipeline's rows, with each action's plan.
pub fn aggregate(rows: &PipelineRows) -> Result<(Pipeline, Vec<PlannedAction>), Malformed> {
    let mut actions = Vec::with_capacity(rows.actions.len());
    let mut plans = Vec::with_capacity(rows.actions.len());
    for row in &rows.actions {
        let malformed = |what: String| Malformed::new("actions", row.id, what);
        let planned: PlannedAction =
            serde_json::from_str(&row.planned).map_err(|error| malformed(format!("planned: {error}")))?;
        if planned.needs.iter().any(|need| *need >= rows.actions.len()) {
            return Err(malformed("it needs an action that is not there".into()));
        }
        let state = match (row.state.as_str(), &row.outcome) {
            ("pending", None) => ActionState::Pending,
            ("queued", None) => ActionState::Queued,
            ("active", None) => ActionState::Active,
            ("finished", Some(json)) => ActionState::Finished(outcome_of_json(json)?),
            (state, outcome) => return Err(malformed(format!("state {state} with outcome {outcome:?}"))),
        };
        let current = rows.attempts.iter().find(|attempt| attempt.action_id == row.id);
        let current = current.map(attempt_of_row).transpose()?;
        if (row.attempts > 0) != current.is_some() {
            return Err(malformed(format!("its attempt {} is not there", row.attempts)));
        }
        actions.push(Action {
            id: ActionId::from_uuid(row.id),
            name: row.name.clone(),
            needs: planned.needs.clone(),
            allow_failure: planned.allow_failure.clone(),
            rules: planned.rules(),
            state,
            attempts: unsigned(row.attempts),
            tries: Tries {
                attempts: unsigned(row.attempts_in_round),
                by_retry: unsigned(row.retries_in_round),
            },
            current,
        });
        plans.push(planned);
    }
    let pipeline = Pipeline {
        id: PipelineId::from_uuid(rows.pipeline.id),
        round: unsigned(rows.pipeline.round),
        cancel_wished: rows.pipeline.cancel_wished,
        actions,
    };
    Ok((pipeline, plans))
}

/// The core's attempt of a row.
pub fn attempt_of_row(row: &attempts::Model) -> Result<Attempt, Malformed> {
    let malformed =
        |what: String| Malformed::new("attempts", format!("{}.{}", row.action_id, row.number), what);
    let state = match (row.state.as_str(), &row.outcome) {
        ("claimed", None) => AttemptState::Claimed,
        ("running", None) => AttemptState::Running,
        ("finished", Some(json)) => AttemptState::Finished(outcome_of_json(json)?),
        (state, outcome) => return Err(malformed(format!("state {state} with outcome {outcome:?}"))),
    };
    Ok(Attempt {
        number: unsigned(row.number),
        round: unsigned(row.round),
        claimant: Claimant {
            claim: ClaimId::from_uuid(row.claim_id),
            agent: AgentId::from_uuid(row.agent_id),
            instance: InstanceId::from_uuid(row.instance_id),
        },
        token: FencingToken(row.token.unsigned_abs()),
        state,
        fenced: row.fenced,
        next_sequence: row.next_sequence.unsigned_abs(),
        log_end: row.log_end.unsigned_abs(),
        log_length: row.log_length.map(i64::unsigned_abs),
    })
}

/// Writes an attempt into its row; the row's own times and executor stay.
pub fn row_of_attempt(attempt: &Attempt, row: &mut attempts::Model) {
    row.number = number(attempt.number);
    row.round = number(attempt.round);
    row.token = signed(attempt.token.0);
    row.agent_id = attempt.claimant.agent.as_uuid();
    row.instance_id = attempt.claimant.instance.as_uuid();
    row.claim_id = attempt.claimant.claim.as_uuid();
    row.state = attempt.state.as_str().to_owned();
    row.outcome = attempt.outcome().map(outcome_to_json);
    row.fenced = attempt.fenced;
    row.next_sequence = signed(attempt.next_sequence);
    row.log_end = signed(attempt.log_end);
    row.log_length = attempt.log_length.map(signed);
}

fn unsigned(value: i32) -> u32 {
    value.unsigned_abs()
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
