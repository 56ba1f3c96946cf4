//! Converts between the wire and the core. What comes from the wire is checked here, once.

use sealci_core::attempt::{AttemptState, JournalEntry};
use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Limit, Outcome};
use sealci_core::plan::{Network, Resources};

use crate::agent::{self, event, outcome};

/// A message that is well-formed protobuf and yet means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {0}")]
pub struct Malformed(pub String);

impl Malformed {
    /// A field that must be there is not.
    pub fn missing(field: &str) -> Self {
        Self(format!("`{field}` is missing"))
    }
}

impl From<sealci_core::ids::InvalidId> for Malformed {
    fn from(error: sealci_core::ids::InvalidId) -> Self {
        Self(error.to_string())
    }
}

impl From<AttemptId> for agent::AttemptRef {
    fn from(id: AttemptId) -> Self {
        Self { action_id: id.action.to_string(), number: id.number }
    }
}

impl TryFrom<&agent::AttemptRef> for AttemptId {
    type Error = Malformed;

    fn try_from(wire: &agent::AttemptRef) -> Result<Self, Malformed> {
        if wire.number == 0 {
            return Err(Malformed("attempts are numbered from 1".into()));
        }
        Ok(Self { action: wire.action_id.parse()?, number: wire.number })
    }
}

/// Reads the field that every message about an attempt has.
pub fn attempt_id(wire: &Option<agent::AttemptRef>) -> Result<AttemptId, Malformed> {
    wire.as_ref().ok_or_else(|| Malformed::missing("attempt"))?.try_into()
}

impl From<Resources> for agent::Resources {
    fn from(resources: Resources) -> Self {
        Self { cpu_millis: resources.cpu_millis, memory_bytes: resources.memory_bytes }
    }
}

impl From<agent::Resources> for Resources {
    fn from(wire: agent::Resources) -> Self {
        Self { cpu_millis: wire.cpu_millis, memory_bytes: wire.memory_bytes }
    }
}

impl From<Network> for agent::Network {
    fn from(network: Network) -> Self {
        match network {
            Network::On => Self::On,
            Network::Off => Self::Off,
        }
    }
}

/// Sealed by default: what is not said to be on is off.
impl From<agent::Network> for Network {
    fn from(wire: agent::Network) -> Self {
        match wire {
            agent::Network::On => Self::On,
            agent::Network::Off | agent::Network::Unspecified => Self::Off,
        }
    }
}

/// What an attempt held by an agent says of itself.
impl From<&AttemptState> for agent::HeldState {
    fn from(state: &AttemptState) -> Self {
        match state {
            AttemptState::Assigned => Self::Assigned,
            AttemptState::Claimed => Self::Claimed,
            AttemptState::Running => Self::Running,
            AttemptState::Finished(_) => Self::Finished,
        }
    }
}

impl From<&Outcome> for agent::Outcome {
    /// A skipped action has no attempt; should one be asked for all the same, it is errored.
    fn from(outcome: &Outcome) -> Self {
        use outcome::{Cancelled, Errored, Failed, Kind, Succeeded, TimedOut};
        let kind = match outcome {
            Outcome::Succeeded => Kind::Succeeded(Succeeded {}),
            Outcome::Failed { exit_code, limit } => Kind::Failed(Failed {
                exit_code: *exit_code,
                limit: limit.map(|limit| limit.as_str().to_owned()).unwrap_or_default(),
            }),
            Outcome::Errored { cause, message } => {
                Kind::Errored(Errored { cause: cause.as_str().to_owned(), message: message.clone() })
            }
            Outcome::Cancelled => Kind::Cancelled(Cancelled {}),
            Outcome::TimedOut => Kind::TimedOut(TimedOut {}),
            Outcome::Skipped { because } => Kind::Errored(Errored {
                cause: Cause::Executor.as_str().to_owned(),
                message: because.clone(),
            }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<&agent::Outcome> for Outcome {
    type Error = Malformed;

    fn try_from(wire: &agent::Outcome) -> Result<Self, Malformed> {
        use outcome::Kind;
        Ok(match wire.kind.as_ref().ok_or_else(|| Malformed::missing("outcome.kind"))? {
            Kind::Succeeded(_) => Self::Succeeded,
            Kind::Failed(failed) => {
                let limit = match failed.limit.as_str() {
                    "" => None,
                    name => Some(
                        Limit::parse(name)
                            .ok_or_else(|| Malformed(format!("no limit is called `{name}`")))?,
                    ),
                };
                Self::Failed { exit_code: failed.exit_code, limit }
            }
            Kind::Errored(errored) => Self::Errored {
                cause: Cause::parse(&errored.cause)
                    .ok_or_else(|| Malformed(format!("no cause is called `{}`", errored.cause)))?,
                message: errored.message.clone(),
            },
            Kind::Cancelled(_) => Self::Cancelled,
            Kind::TimedOut(_) => Self::TimedOut,
        })
    }
}

/// What an event decides; its times and figures are for showing and are read where they are stored.
impl TryFrom<&agent::Event> for JournalEntry {
    type Error = Malformed;

    fn try_from(wire: &agent::Event) -> Result<Self, Malformed> {
        Ok(match wire.body.as_ref().ok_or_else(|| Malformed::missing("event.body"))? {
            event::Body::Running(_) => Self::Running,
            event::Body::CommandStarted(started) => Self::CommandStarted { index: started.index },
            event::Body::CommandFinished(finished) => {
                Self::CommandFinished { index: finished.index, exit_code: finished.exit_code }
            }
            event::Body::Finished(finished) => Self::Finished {
                outcome: finished
                    .outcome
                    .as_ref()
                    .ok_or_else(|| Malformed::missing("finished.outcome"))?
                    .try_into()?,
                log_length: finished.log_length,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_of_an_attempt_survives_the_wire() {
        for outcome in [
            Outcome::Succeeded,
            Outcome::Failed { exit_code: 137, limit: Some(Limit::Memory) },
            Outcome::Failed { exit_code: 1, limit: None },
            Outcome::Errored { cause: Cause::DiskFull, message: "no room".into() },
            Outcome::Cancelled,
            Outcome::TimedOut,
        ] {
            assert_eq!(Outcome::try_from(&agent::Outcome::from(&outcome)), Ok(outcome));
        }
    }

    #[test]
    fn what_means_nothing_is_malformed() {
        assert!(Outcome::try_from(&agent::Outcome { kind: None }).is_err());
        let odd =
            outcome::Kind::Errored(outcome::Errored { cause: "bad_luck".into(), message: String::new() });
        assert!(Outcome::try_from(&agent::Outcome { kind: Some(odd) }).is_err());
        assert!(AttemptId::try_from(&agent::AttemptRef { action_id: "x".into(), number: 1 }).is_err());
        assert!(attempt_id(&None).is_err());
    }

    #[test]
    fn an_unspecified_network_is_off() {
        assert_eq!(Network::from(agent::Network::Unspecified), Network::Off);
    }
}
