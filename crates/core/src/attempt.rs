//! Decides what may happen to one attempt: one execution of an action, by one agent, under one fencing token.
//!
//! ```text
//!   assigned ──claim granted──▶ claimed ──running──▶ running ──finished──▶ finished(outcome)
//!                                  │                    │                        ▲
//!                                  └────────finished────┴───────lost─────────────┘
//! ```
//!
//! `assigned` is a placement and lives in the scheduler and the agent; an [`Attempt`] begins with its claim. Its journal
//! is a sequence of events from 0 without a hole, its log a range of bytes from 0 without a hole (what was not kept is a
//! gap, which counts). Both are recorded at most once: what was recorded is acknowledged again, what comes too early is
//! told what is expected.
//!
//! A *fenced* attempt has lost its action. Its journal and log are still recorded, for people to read; its outcome
//! stays what it was when it was fenced. A log that nobody delivers to its end is closed at last, with a gap.

use std::ops::Range;

use crate::ids::{AgentId, ClaimId, FencingToken, InstanceId};
use crate::outcome::{Cause, Outcome};

/// Where an attempt stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AttemptState {
    /// An agent was chosen; nothing is recorded yet.
    Assigned,
    /// The agent may prepare and start; it has the fencing token.
    Claimed,
    /// Its first command is about to start, or has.
    Running,
    Finished(Outcome),
}

impl AttemptState {
    /// The name on every wire and in the database.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Assigned => "assigned",
            Self::Claimed => "claimed",
            Self::Running => "running",
            Self::Finished(_) => "finished",
        }
    }
}

/// Who asks for an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claimant {
    pub claim: ClaimId,
    pub agent: AgentId,
    pub instance: InstanceId,
}

/// One claimed attempt.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Attempt {
    /// From 1, over all rounds of the action.
    pub number: u32,
    /// The pipeline's round it belongs to.
    pub round: u32,
    pub claimant: Claimant,
    pub token: FencingToken,
    pub state: AttemptState,
    /// It lost its action: its outcome is not taken from its journal.
    pub fenced: bool,
    /// Events below this sequence are recorded.
    pub next_sequence: u64,
    /// Log bytes below this offset are recorded.
    pub log_end: u64,
    /// The log's whole length, once the terminal event told it.
    pub log_length: Option<u64>,
}

/// One entry of an attempt's journal, as far as it decides anything.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum JournalEntry {
    Running,
    CommandStarted { index: u32 },
    CommandFinished { index: u32, exit_code: i32 },
    Finished { outcome: Outcome, log_length: u64 },
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// It is new: record it.
    Now,
    /// It was recorded before: acknowledge it again.
    Before,
}

/// Why a write of an attempt is refused. None of them changes anything.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteRefusal {
    #[error("the fencing token {given} is not this attempt's")]
    WrongToken { given: u64 },
    #[error("event {given} came before event {expected}")]
    EventAhead { given: u64, expected: u64 },
    #[error("log bytes from {given} came before those from {expected}")]
    LogAhead { given: u64, expected: u64 },
    #[error("the attempt's journal ended below event {end}")]
    AfterTheEnd { end: u64 },
    #[error("`{what}` cannot follow in state `{state}`")]
    OutOfPlace { what: &'static str, state: &'static str },
    #[error("log bytes {from}..{to} overlap what is recorded up to {end}")]
    LogOverlap { from: u64, to: u64, end: u64 },
    #[error("log bytes up to {to} lie past the log's length of {length}")]
    LogPastTheEnd { to: u64, length: u64 },
    #[error("the log is {end} bytes long already, the terminal event says {length}")]
    LogLongerThanTold { end: u64, length: u64 },
}

impl Attempt {
    /// Begins an attempt with its granted claim.
    pub fn claimed(number: u32, round: u32, claimant: Claimant, token: FencingToken) -> Self {
        Self {
            number,
            round,
            claimant,
            token,
            state: AttemptState::Claimed,
            fenced: false,
            next_sequence: 0,
            log_end: 0,
            log_length: None,
        }
    }

    /// The outcome, once there is one.
    pub fn outcome(&self) -> Option<&Outcome> {
        match &self.state {
            AttemptState::Finished(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Whether the terminal event is recorded, or is not taken any more.
    pub fn journal_ended(&self) -> bool {
        self.log_length.is_some()
    }

    /// Whether nothing more is wanted of the agent: the journal has ended and the log is whole.
    pub fn is_closed(&self) -> bool {
        self.log_length == Some(self.log_end)
    }

    /// Records one journal entry. The outcome counts only if the attempt was not fenced before.
    pub fn record_event(
        &mut self,
        token: FencingToken,
        sequence: u64,
        entry: &JournalEntry,
    ) -> Result<Recorded, WriteRefusal> {
        self.check_token(token)?;
        if sequence < self.next_sequence {
            return Ok(Recorded::Before);
        }
        if self.journal_ended() {
            return Err(WriteRefusal::AfterTheEnd { end: self.next_sequence });
        }
        if sequence > self.next_sequence {
            return Err(WriteRefusal::EventAhead { given: sequence, expected: self.next_sequence });
        }
        let out_of_place = |what| Err(WriteRefusal::OutOfPlace { what, state: self.state.as_str() });
        match (entry, &self.state) {
            (JournalEntry::Running, AttemptState::Claimed) => self.state = AttemptState::Running,
            (JournalEntry::Running, AttemptState::Finished(_)) if self.fenced => {}
            (JournalEntry::Running, _) => return out_of_place("running"),
            (JournalEntry::CommandStarted { .. }, AttemptState::Running) => {}
            (JournalEntry::CommandStarted { .. }, _) if self.fenced => {}
            (JournalEntry::CommandStarted { .. }, _) => return out_of_place("command started"),
            (JournalEntry::CommandFinished { .. }, AttemptState::Running) => {}
            (JournalEntry::CommandFinished { .. }, _) if self.fenced => {}
            (JournalEntry::CommandFinished { .. }, _) => return out_of_place("command finished"),
            (JournalEntry::Finished { outcome, log_length }, _) => {
                if *log_length < self.log_end {
                    return Err(WriteRefusal::LogLongerThanTold { end: self.log_end, length: *log_length });
                }
                self.log_length = Some(*log_length);
                if !self.fenced {
                    self.state = AttemptState::Finished(outcome.clone());
                }
            }
        }
        self.next_sequence += 1;
        Ok(Recorded::Now)
    }

    /// Records log bytes (or a gap) `from..to`. What lies wholly below the recorded end was recorded before.
    pub fn record_log(&mut self, token: FencingToken, from: u64, to: u64) -> Result<Recorded, WriteRefusal> {
        self.check_token(token)?;
        if to <= self.log_end {
            return Ok(Recorded::Before);
        }
        if from > self.log_end {
            return Err(WriteRefusal::LogAhead { given: from, expected: self.log_end });
        }
        if from < self.log_end {
            return Err(WriteRefusal::LogOverlap { from, to, end: self.log_end });
        }
        if let Some(length) = self.log_length.filter(|length| to > *length) {
            return Err(WriteRefusal::LogPastTheEnd { to, length });
        }
        self.log_end = to;
        Ok(Recorded::Now)
    }

    /// Ends the log of a finished attempt that nobody delivers to its end; nothing more of it is taken. The answer is the gap
    /// to be recorded: empty, at the end, where the terminal event never told how much is missing. None where there is
    /// nothing to close.
    pub fn close_log(&mut self) -> Option<Range<u64>> {
        if self.outcome().is_none() || self.is_closed() {
            return None;
        }
        let from = self.log_end;
        self.log_end = self.log_length.unwrap_or(from);
        self.log_length = Some(self.log_end);
        Some(from..self.log_end)
    }

    /// Gives the attempt up: it is finished and fenced, and what it still reports changes nothing but its own log.
    /// An attempt that finished keeps its outcome.
    pub(crate) fn lose(&mut self, cause: Cause, message: &str) {
        if self.outcome().is_none() {
            self.state = AttemptState::Finished(Outcome::Errored { cause, message: message.to_owned() });
            self.fenced = true;
        }
    }

    fn check_token(&self, token: FencingToken) -> Result<(), WriteRefusal> {
        if token == self.token { Ok(()) } else { Err(WriteRefusal::WrongToken { given: token.0 }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: FencingToken = FencingToken(7);

    fn claimed() -> Attempt {
        let claimant = Claimant {
            claim: ClaimId::from_parts(1, &[1; 10]),
            agent: AgentId::from_parts(1, &[2; 10]),
            instance: InstanceId::from_parts(1, &[3; 10]),
        };
        Attempt::claimed(1, 1, claimant, TOKEN)
    }

    fn finished(log_length: u64) -> JournalEntry {
        JournalEntry::Finished { outcome: Outcome::Succeeded, log_length }
    }

    #[test]
    fn events_are_recorded_once_and_in_order() {
        let mut attempt = claimed();
        assert_eq!(attempt.record_event(TOKEN, 0, &JournalEntry::Running), Ok(Recorded::Now));
        assert_eq!(attempt.record_event(TOKEN, 0, &JournalEntry::Running), Ok(Recorded::Before));
        assert_eq!(
            attempt.record_event(TOKEN, 2, &finished(0)),
            Err(WriteRefusal::EventAhead { given: 2, expected: 1 })
        );
        assert_eq!(attempt.record_event(TOKEN, 1, &finished(0)), Ok(Recorded::Now));
        assert_eq!(attempt.record_event(TOKEN, 2, &finished(0)), Err(WriteRefusal::AfterTheEnd { end: 2 }));
        assert_eq!(attempt.outcome(), Some(&Outcome::Succeeded));
    }

    #[test]
    fn another_token_writes_nothing() {
        let mut attempt = claimed();
        let before = attempt.clone();
        let stranger = FencingToken(8);
        assert!(attempt.record_event(stranger, 0, &JournalEntry::Running).is_err());
        assert!(attempt.record_log(stranger, 0, 5).is_err());
        assert_eq!(attempt, before);
    }

    #[test]
    fn the_log_has_no_hole_and_no_overlap() {
        let mut attempt = claimed();
        assert_eq!(attempt.record_log(TOKEN, 0, 10), Ok(Recorded::Now));
        assert_eq!(attempt.record_log(TOKEN, 0, 10), Ok(Recorded::Before));
        assert_eq!(
            attempt.record_log(TOKEN, 5, 12),
            Err(WriteRefusal::LogOverlap { from: 5, to: 12, end: 10 })
        );
        assert_eq!(
            attempt.record_log(TOKEN, 11, 12),
            Err(WriteRefusal::LogAhead { given: 11, expected: 10 })
        );
        assert_eq!(
            attempt.record_event(TOKEN, 0, &finished(9)),
            Err(WriteRefusal::LogLongerThanTold { end: 10, length: 9 })
        );
        assert_eq!(attempt.record_event(TOKEN, 0, &finished(12)), Ok(Recorded::Now));
        assert!(!attempt.is_closed());
        assert_eq!(
            attempt.record_log(TOKEN, 10, 13),
            Err(WriteRefusal::LogPastTheEnd { to: 13, length: 12 })
        );
        assert_eq!(attempt.record_log(TOKEN, 10, 12), Ok(Recorded::Now));
        assert!(attempt.is_closed());
    }

    #[test]
    fn a_fenced_attempt_delivers_its_log_but_not_its_outcome() {
        let mut attempt = claimed();
        attempt.record_event(TOKEN, 0, &JournalEntry::Running).unwrap();
        attempt.lose(Cause::AgentLost, "silent for 60 s");
        assert!(attempt.fenced);
        assert_eq!(attempt.record_log(TOKEN, 0, 3), Ok(Recorded::Now));
        assert_eq!(attempt.record_event(TOKEN, 1, &finished(3)), Ok(Recorded::Now));
        assert!(matches!(attempt.outcome(), Some(Outcome::Errored { cause: Cause::AgentLost, .. })));
        assert!(attempt.is_closed());
    }

    #[test]
    fn a_log_that_nobody_delivers_is_closed_with_a_gap() {
        let mut attempt = claimed();
        assert_eq!(attempt.close_log(), None, "it is not finished");
        attempt.lose(Cause::AgentLost, "silent for 60 s");
        assert_eq!(attempt.record_log(TOKEN, 0, 3), Ok(Recorded::Now));
        assert_eq!(attempt.close_log(), Some(3..3), "nobody knows how much is missing");
        assert!(attempt.is_closed());
        assert_eq!(attempt.close_log(), None, "it is closed");
        assert_eq!(
            attempt.record_event(TOKEN, 0, &JournalEntry::Running),
            Err(WriteRefusal::AfterTheEnd { end: 0 })
        );
        assert_eq!(attempt.record_log(TOKEN, 3, 5), Err(WriteRefusal::LogPastTheEnd { to: 5, length: 3 }));

        let mut attempt = claimed();
        attempt.record_event(TOKEN, 0, &finished(9)).unwrap();
        assert_eq!(attempt.record_log(TOKEN, 0, 3), Ok(Recorded::Now));
        assert_eq!(attempt.close_log(), Some(3..9));
        assert!(attempt.is_closed());
    }

    #[test]
    fn a_command_needs_a_running_attempt() {
        let mut attempt = claimed();
        let refused = attempt.record_event(TOKEN, 0, &JournalEntry::CommandStarted { index: 0 });
        assert_eq!(refused, Err(WriteRefusal::OutOfPlace { what: "command started", state: "claimed" }));
    }
}
