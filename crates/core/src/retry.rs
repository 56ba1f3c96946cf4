//! Decides whether an attempt is followed by another one in its round, and says why.
//!
//! There are two purses. What the infrastructure loses is tried again by itself, until a round has had
//! [`ATTEMPTS_PER_ROUND`] attempts that way. The manifest's `retry` adds its own to that, after the outcomes that it names;
//! it pays only when the first purse does not. So a round has at most [`ATTEMPTS_PER_ROUND`] and `times` attempts. An
//! exclusive action has the second purse alone: nobody but its author knows whether it can run twice.

use std::fmt;

use crate::outcome::{Cause, Outcome};
use crate::plan::Retry;

/// An action whose attempts the infrastructure loses gets so many in a round by itself, the first included.
pub const ATTEMPTS_PER_ROUND: u32 = 3;

/// What an action's author says of further attempts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Rules {
    pub retry: Retry,
    /// Its attempts must not overlap, so it gets none by itself.
    pub exclusive: bool,
}

/// How often an action was tried in its round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tries {
    pub attempts: u32,
    /// Those of them that the manifest's `retry` gave, the next one included.
    pub by_retry: u32,
}

/// Who gives the next attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// The infrastructure lost this one.
    ByItself {
        attempt: u32,
    },
    ByRetry {
        number: u32,
        times: u32,
    },
}

impl Rules {
    /// Whether a result is followed by another attempt. Nobody has wished the action ended.
    pub fn again(&self, tries: Tries, result: &Outcome) -> Option<Again> {
        let by_itself = tries.attempts.saturating_sub(tries.by_retry);
        match result {
            Outcome::Errored { cause, .. }
                if !self.exclusive && cause.is_transient() && by_itself < ATTEMPTS_PER_ROUND =>
            {
                Some(Again::ByItself { attempt: by_itself + 1 })
            }
            result if self.retry.covers(result) && tries.by_retry < self.retry.times => {
                Some(Again::ByRetry { number: tries.by_retry + 1, times: self.retry.times })
            }
            _ => None,
        }
    }

    /// Why each of a round's attempts, given by how they ended, was followed by another. The last is told as if nobody had
    /// wished the action ended.
    pub fn story<'o>(&self, ends: impl IntoIterator<Item = Option<&'o Outcome>>) -> Vec<Option<String>> {
        let mut tries = Tries::default();
        let tell = |end: Option<&Outcome>| {
            tries.attempts += 1;
            let result = unasked(end?.clone());
            let again = self.again(tries, &result)?;
            tries.by_retry += u32::from(matches!(again, Again::ByRetry { .. }));
            Some(again.after(&result))
        };
        ends.into_iter().map(tell).collect()
    }
}

impl Again {
    /// One line for a person: `it failed (exit code 7): retry 1 of 2`.
    pub fn after(&self, result: &Outcome) -> String {
        format!("it {result}: {self}")
    }
}

impl fmt::Display for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByItself { attempt } => {
                write!(f, "tried again by itself, {attempt} of {ATTEMPTS_PER_ROUND}")
            }
            Self::ByRetry { number, times } => write!(f, "retry {number} of {times}"),
        }
    }
}

/// What an attempt's outcome is to an action that nobody wished ended.
pub fn unasked(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Cancelled => Outcome::Errored {
            cause: Cause::Executor,
            message: "the agent ended it without being asked to".into(),
        },
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::RetryOn;

    const FAILED: Outcome = Outcome::Failed { exit_code: 7, limit: None };

    fn lost() -> Outcome {
        Outcome::Errored { cause: Cause::AgentLost, message: "silent".into() }
    }

    fn rules(times: u32, on: &[RetryOn], exclusive: bool) -> Rules {
        Rules { retry: Retry { times, on: on.to_vec() }, exclusive }
    }

    /// How many attempts are made when each ends so, the last answer repeated.
    fn attempts(rules: &Rules, ends: &[Outcome]) -> usize {
        let ends = ends.iter().chain(std::iter::repeat(ends.last().unwrap_or(&FAILED))).take(50);
        1 + rules.story(ends.map(Some)).iter().take_while(|why| why.is_some()).count()
    }

    #[test]
    fn what_is_lost_has_three_attempts_and_what_retry_adds() {
        assert_eq!(attempts(&rules(0, &[], false), &[lost()]), 3);
        assert_eq!(attempts(&rules(2, &[RetryOn::Errored], false), &[lost()]), 5);
        assert_eq!(attempts(&rules(2, &[RetryOn::Failed], false), &[lost()]), 3);
        assert_eq!(attempts(&rules(2, &[RetryOn::Failed], false), &[FAILED]), 3);
        assert_eq!(attempts(&rules(0, &[], false), &[FAILED]), 1);
        assert_eq!(attempts(&rules(1, &[RetryOn::TimedOut], false), &[Outcome::TimedOut]), 2);
    }

    #[test]
    fn a_retry_does_not_cost_what_is_lost_its_attempts() {
        let rules = rules(2, &[RetryOn::Failed], false);
        assert_eq!(attempts(&rules, &[FAILED, lost(), FAILED, lost(), lost()]), 5);
    }

    #[test]
    fn what_can_never_succeed_is_tried_again_only_if_asked() {
        let image = Outcome::Errored { cause: Cause::Image, message: "none".into() };
        assert_eq!(attempts(&rules(0, &[], false), std::slice::from_ref(&image)), 1);
        assert_eq!(attempts(&rules(1, &[RetryOn::Errored], false), &[image]), 2);
    }

    #[test]
    fn an_exclusive_action_is_tried_again_only_if_asked() {
        assert_eq!(attempts(&rules(0, &[], true), &[lost()]), 1);
        assert_eq!(attempts(&rules(2, &[RetryOn::Errored], true), &[lost()]), 3);
    }

    #[test]
    fn the_story_says_why() {
        let rules = rules(1, &[RetryOn::Failed], false);
        let told = rules.story([Some(&lost()), Some(&FAILED), Some(&Outcome::Cancelled), None]);
        let told: Vec<_> = told.iter().map(Option::as_deref).collect();
        assert_eq!(
            told,
            [
                Some("it errored (agent_lost: silent): tried again by itself, 2 of 3"),
                Some("it failed (exit code 7): retry 1 of 1"),
                Some(
                    "it errored (executor: the agent ended it without being asked to): tried again by itself, 3 of 3"
                ),
                None
            ]
        );
    }
}
