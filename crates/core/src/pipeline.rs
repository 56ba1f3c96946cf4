//! Decides what may happen to a pipeline and its actions. This is the one place where an action gets a state.
//!
//! ```text
//!   action:  pending ──needs passed──▶ queued ──claim──▶ active ──result──▶ finished(outcome)
//!               │                        ▲  │               │                   │
//!               │                        └──┼──lost, errored, or by `retry`     │
//!               │ needs did not pass        │ cancel                            │
//!               └──────────▶ finished(skipped) ◀─────────── re-run ─────────────┘
//!                                                     (back to pending, next round)
//! ```
//!
//! The functions are total: each input either changes the pipeline and says which actions it touched, or is refused with
//! a typed reason and changes nothing. Within a round exactly one attempt's result becomes its action's (I2): only the
//! current attempt, under its token, and only while it is not fenced.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::attempt::{Attempt, AttemptState, Claimant, JournalEntry, Recorded, WriteRefusal};
use crate::ids::{ActionId, FencingToken, PipelineId};
use crate::outcome::{Cause, Outcome};
use crate::plan::AllowFailure;
use crate::retry::{self, Again, Tries};

/// Where an action stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ActionState {
    /// Waits for the actions it needs.
    Pending,
    /// Waits for an agent.
    Queued,
    /// Its current attempt is claimed.
    Active,
    Finished(Outcome),
}

impl ActionState {
    /// The name on every wire and in the database.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Queued => "queued",
            Self::Active => "active",
            Self::Finished(_) => "finished",
        }
    }
}

/// An action of a pipeline, with what decides its course.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Action {
    pub id: ActionId,
    pub name: String,
    /// Indices into [`Pipeline::actions`].
    pub needs: Vec<usize>,
    pub allow_failure: AllowFailure,
    pub rules: retry::Rules,
    pub state: ActionState,
    /// Attempts so far, over all rounds; the next one has this number plus 1.
    pub attempts: u32,
    /// What was tried so far in this round.
    pub tries: Tries,
    /// The attempt that was claimed last.
    pub current: Option<Attempt>,
}

impl Action {
    /// Begins an action, before [`Pipeline::start`].
    pub fn pending(
        id: ActionId,
        name: String,
        needs: Vec<usize>,
        allow_failure: AllowFailure,
        rules: retry::Rules,
    ) -> Self {
        Self {
            id,
            name,
            needs,
            allow_failure,
            rules,
            state: ActionState::Pending,
            attempts: 0,
            tries: Tries::default(),
            current: None,
        }
    }

    /// The outcome, once there is one.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            ActionState::Finished(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Whether what needs this action may run.
    pub fn passed(&self) -> bool {
        self.outcome().is_some_and(|outcome| Self::passes(outcome, &self.allow_failure))
    }

    /// Whether an outcome counts as passed, by what the manifest allows.
    pub fn passes(outcome: &Outcome, allowed: &AllowFailure) -> bool {
        match outcome {
            Outcome::Succeeded => true,
            Outcome::Failed { exit_code, .. } => allowed.allows(*exit_code),
            Outcome::TimedOut => *allowed == AllowFailure::Always,
            _ => false,
        }
    }
}

/// One run of a manifest for one event.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pipeline {
    pub id: PipelineId,
    /// From 1; each re-run opens the next.
    pub round: u32,
    /// Someone wished this round ended.
    pub cancel_wished: bool,
    pub actions: Vec<Action>,
}

/// Where a pipeline stands: derived from its actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipelineState {
    /// No action of this round has started.
    Queued,
    Running,
    Finished(PipelineOutcome),
}

/// How a pipeline's round ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipelineOutcome {
    Succeeded,
    Failed,
    Errored,
    Cancelled,
    TimedOut,
}

impl PipelineOutcome {
    const ALL: [Self; 5] = [Self::Succeeded, Self::Failed, Self::Errored, Self::Cancelled, Self::TimedOut];

    /// The name on every wire and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Errored => "errored",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
        }
    }

    /// Reads [`PipelineOutcome::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.as_str() == name)
    }
}

/// Which actions a re-run takes up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RerunScope {
    All,
    /// Those that did not pass, and those skipped because of them.
    Failed,
}

/// The indices of the actions that an input changed.
pub type Touched = BTreeSet<usize>;

/// What became of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Granted {
    /// The attempt is the claimant's, from now on.
    Now { token: FencingToken, touched: Touched },
    /// It was the claimant's already: the answer got lost, here it is again.
    Before { token: FencingToken },
}

/// Why a claim is refused. Nothing has changed, and the claimant drops the attempt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClaimRefusal {
    #[error("the pipeline has no such action")]
    UnknownAction,
    #[error("attempt {given} is not the next one ({next})")]
    NotNext { given: u32, next: u32 },
    #[error("the attempt was claimed by another")]
    ClaimedByAnother,
    #[error("the attempt is finished")]
    Finished,
    #[error("the action is {state}")]
    NotQueued { state: &'static str },
}

/// Why a write of an attempt is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReportRefusal {
    #[error("the pipeline has no such action")]
    UnknownAction,
    #[error("attempt {given} is not the action's current one")]
    NotCurrent { given: u32 },
    #[error(transparent)]
    Write(#[from] WriteRefusal),
}

/// Why a re-run is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RerunRefusal {
    #[error("action `{action}` is not finished yet: wait for it, or cancel the pipeline first")]
    Unfinished { action: String },
    #[error("every action passed: there is nothing to run again")]
    NothingFailed,
}

impl Pipeline {
    /// Queues what can start at once.
    pub fn start(&mut self) -> Touched {
        let mut touched = Touched::new();
        self.settle(&mut touched);
        touched
    }

    /// Where the action with this id stands in [`Pipeline::actions`].
    pub fn position(&self, id: ActionId) -> Option<usize> {
        self.actions.iter().position(|action| action.id == id)
    }

    /// Derives the pipeline's state from its actions'.
    pub fn state(&self) -> PipelineState {
        let unfinished = self.actions.iter().any(|action| action.outcome().is_none());
        if unfinished {
            let untouched = self.actions.iter().all(|action| {
                action.tries.attempts == 0
                    && matches!(action.state, ActionState::Pending | ActionState::Queued)
            });
            return if untouched { PipelineState::Queued } else { PipelineState::Running };
        }
        let any = |kind: &str| {
            self.actions.iter().any(|action| {
                !action.passed() && action.outcome().is_some_and(|outcome| outcome.kind() == kind)
            })
        };
        PipelineState::Finished(if any("failed") {
            PipelineOutcome::Failed
        } else if any("timed_out") {
            PipelineOutcome::TimedOut
        } else if any("errored") {
            PipelineOutcome::Errored
        } else if any("cancelled") {
            PipelineOutcome::Cancelled
        } else {
            PipelineOutcome::Succeeded
        })
    }

    /// Gives the next attempt of an action to a claimant, or gives the same answer again. `token` is used up only when
    /// the answer is [`Granted::Now`].
    pub fn claim(
        &mut self,
        action: ActionId,
        number: u32,
        claimant: Claimant,
        token: FencingToken,
    ) -> Result<Granted, ClaimRefusal> {
        let index = self.position(action).ok_or(ClaimRefusal::UnknownAction)?;
        let round = self.round;
        let action = &mut self.actions[index];
        if let Some(current) = action.current.as_ref().filter(|current| current.number == number) {
            return if current.outcome().is_some() {
                Err(ClaimRefusal::Finished)
            } else if current.claimant == claimant {
                Ok(Granted::Before { token: current.token })
            } else {
                Err(ClaimRefusal::ClaimedByAnother)
            };
        }
        if action.state != ActionState::Queued {
            return Err(ClaimRefusal::NotQueued { state: action.state.as_str() });
        }
        if number != action.attempts + 1 {
            return Err(ClaimRefusal::NotNext { given: number, next: action.attempts + 1 });
        }
        action.attempts = number;
        action.tries.attempts += 1;
        action.state = ActionState::Active;
        action.current = Some(Attempt::claimed(number, round, claimant, token));
        Ok(Granted::Now { token, touched: Touched::from([index]) })
    }

    /// Records one journal entry of an action's current attempt, with all that follows from it.
    pub fn record_event(
        &mut self,
        action: ActionId,
        number: u32,
        token: FencingToken,
        sequence: u64,
        entry: &JournalEntry,
    ) -> Result<(Recorded, Touched), ReportRefusal> {
        let (index, current) = self.current(action, number)?;
        let recorded = current.record_event(token, sequence, entry)?;
        let mut touched = Touched::new();
        if recorded == Recorded::Now {
            touched.insert(index);
            self.take_result(index, &mut touched);
        }
        Ok((recorded, touched))
    }

    /// Records log bytes (or a gap) `from..to` of an action's current attempt.
    pub fn record_log(
        &mut self,
        action: ActionId,
        number: u32,
        token: FencingToken,
        from: u64,
        to: u64,
    ) -> Result<Recorded, ReportRefusal> {
        let (_, current) = self.current(action, number)?;
        Ok(current.record_log(token, from, to)?)
    }

    /// Ends the log of an action's current attempt, as [`Attempt::close_log`] says.
    pub fn close_log(&mut self, action: ActionId, number: u32) -> Option<Range<u64>> {
        self.current(action, number).ok()?.1.close_log()
    }

    /// Gives up the current attempt of an action, if it is this one and unfinished: it is fenced, and its action is
    /// queued again, cancelled, or given up.
    pub fn lose(&mut self, action: ActionId, number: u32, cause: Cause, message: &str) -> Touched {
        let mut touched = Touched::new();
        if let Ok((index, current)) = self.current(action, number)
            && current.outcome().is_none()
        {
            current.lose(cause, message);
            touched.insert(index);
            self.take_result(index, &mut touched);
        }
        touched
    }

    /// Wishes the round ended: what is not claimed ends at once, what is active when its agent has ended it. Repeatable.
    pub fn cancel(&mut self) -> Touched {
        let mut touched = Touched::new();
        if matches!(self.state(), PipelineState::Finished(_)) {
            return touched;
        }
        self.cancel_wished = true;
        for (index, action) in self.actions.iter_mut().enumerate() {
            if matches!(action.state, ActionState::Pending | ActionState::Queued) {
                action.state = ActionState::Finished(Outcome::Cancelled);
                touched.insert(index);
            }
        }
        touched
    }

    /// Opens the next round: the chosen actions, and those skipped because of them, are pending again, and what can
    /// start is queued. Attempts number on.
    pub fn rerun(&mut self, scope: RerunScope) -> Result<Touched, RerunRefusal> {
        if let Some(action) = self.actions.iter().find(|action| action.outcome().is_none()) {
            return Err(RerunRefusal::Unfinished { action: action.name.clone() });
        }
        let chosen: Vec<usize> = (0..self.actions.len())
            .filter(|index| scope == RerunScope::All || !self.actions[*index].passed())
            .collect();
        if chosen.is_empty() {
            return Err(RerunRefusal::NothingFailed);
        }
        self.round += 1;
        self.cancel_wished = false;
        for action in &mut self.actions {
            action.tries = Tries::default();
        }
        let mut touched = Touched::new();
        for index in chosen {
            self.actions[index].state = ActionState::Pending;
            touched.insert(index);
        }
        self.settle(&mut touched);
        Ok(touched)
    }

    fn current(&mut self, action: ActionId, number: u32) -> Result<(usize, &mut Attempt), ReportRefusal> {
        let index = self.position(action).ok_or(ReportRefusal::UnknownAction)?;
        let current = self.actions[index].current.as_mut().filter(|current| current.number == number);
        current.map(|current| (index, current)).ok_or(ReportRefusal::NotCurrent { given: number })
    }

    /// Makes the current attempt's result the action's, where it has one and the action waits for it.
    fn take_result(&mut self, index: usize, touched: &mut Touched) {
        let cancel_wished = self.cancel_wished;
        let action = &mut self.actions[index];
        if action.state != ActionState::Active {
            return;
        }
        let Some(AttemptState::Finished(result)) = action.current.as_ref().map(|current| &current.state)
        else {
            return;
        };
        let result = result.clone();
        action.state = if cancel_wished {
            let is_errored = matches!(result, Outcome::Errored { .. });
            ActionState::Finished(if is_errored { Outcome::Cancelled } else { result })
        } else {
            let result = retry::unasked(result);
            let again = action.rules.again(action.tries, &result);
            action.tries.by_retry += u32::from(matches!(again, Some(Again::ByRetry { .. })));
            if again.is_some() { ActionState::Queued } else { ActionState::Finished(result) }
        };
        touched.insert(index);
        self.settle(touched);
    }

    /// Moves every pending action on that can move: queued when all its needs passed, skipped when one did not.
    fn settle(&mut self, touched: &mut Touched) {
        loop {
            let mut moved = false;
            for index in 0..self.actions.len() {
                if self.actions[index].state != ActionState::Pending {
                    continue;
                }
                if let Some(next) = self.next_of_pending(index) {
                    self.actions[index].state = next;
                    touched.insert(index);
                    moved = true;
                }
            }
            if !moved {
                return;
            }
        }
    }

    fn next_of_pending(&self, index: usize) -> Option<ActionState> {
        let needs = || self.actions[index].needs.iter().map(|need| &self.actions[*need]);
        let in_the_way = needs().find_map(|need| match need.outcome() {
            Some(outcome) if !need.passed() => Some(match outcome {
                Outcome::Skipped { .. } => format!("`{}` was skipped", need.name),
                Outcome::Failed { .. } => format!("`{}` failed", need.name),
                Outcome::TimedOut => format!("`{}` timed out", need.name),
                Outcome::Cancelled => format!("`{}` was cancelled", need.name),
                Outcome::Errored { .. } | Outcome::Succeeded => format!("`{}` errored", need.name),
            }),
            _ => None,
        });
        match in_the_way {
            Some(_) if self.cancel_wished => Some(ActionState::Finished(Outcome::Cancelled)),
            Some(because) => Some(ActionState::Finished(Outcome::Skipped { because })),
            None if needs().all(Action::passed) => Some(ActionState::Queued),
            None => None,
        }
    }
}
