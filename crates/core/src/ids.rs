//! Names things: every id is a newtype of a UUID v7, so ids of one kind sort by creation and cannot be confused with
//! ids of another. Order is never decided by an id; it comes from a database sequence.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What [`FromStr`] of an id refuses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {what}")]
pub struct InvalidId {
    text: String,
    what: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Makes an id from the time in milliseconds since 1970 and ten random bytes (RFC 9562, section 5.7).
            pub fn from_parts(unix_ms: u64, random: &[u8; 10]) -> Self {
                Self(uuid::Builder::from_unix_timestamp_millis(unix_ms, random).into_uuid())
            }

            /// Takes any UUID, as read from a database or a message.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The UUID itself, for a database.
            pub const fn as_uuid(&self) -> Uuid {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Uuid::parse_str(text)
                    .map(Self)
                    .map_err(|_| InvalidId { text: text.chars().take(64).collect(), what: $what })
            }
        }
    };
}

id!(
    /// One run of a manifest for one event.
    PipelineId,
    "a pipeline id (a UUID)"
);
id!(
    /// The unit that is scheduled. It keeps its id over attempts and rounds.
    ActionId,
    "an action id (a UUID)"
);
id!(
    /// A machine that offers executors.
    AgentId,
    "an agent id (a UUID)"
);
id!(
    /// One spool of an agent: a restart keeps it, a copy of the machine has another.
    InstanceId,
    "an agent instance id (a UUID)"
);
id!(
    /// One asking for an attempt, repeated under the same id until answered.
    ClaimId,
    "a claim id (a UUID)"
);
id!(
    /// One process of a controller.
    ReplicaId,
    "a replica id (a UUID)"
);
id!(
    /// A repository that the monitor watches, and how.
    ConfigurationId,
    "a configuration id (a UUID)"
);

/// One execution of an action: attempts of an action are numbered from 1, over all rounds. Written `<action>.<number>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AttemptId {
    pub action: ActionId,
    pub number: u32,
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.action, self.number)
    }
}

impl fmt::Debug for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for AttemptId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            text: text.chars().take(64).collect(),
            what: "an attempt id (`<action id>.<number>`)",
        };
        let (action, number) = text.rsplit_once('.').ok_or_else(invalid)?;
        let number = number.parse().ok().filter(|number| *number > 0).ok_or_else(invalid)?;
        Ok(Self { action: action.parse().map_err(|_| invalid())?, number })
    }
}

/// Proves that a write comes from the attempt that owns its action. Tokens come from a database sequence and are never
/// 0; every grant of a claim has its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FencingToken(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_id_reads_what_it_writes() {
        let id = AttemptId { action: ActionId::from_parts(1_700_000_000_000, &[7; 10]), number: 12 };
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn an_attempt_id_refuses_number_zero_and_strangers() {
        let action = ActionId::from_parts(1, &[0; 10]);
        for text in
            [format!("{action}.0"), format!("{action}"), "x.1".into(), String::new(), format!("{action}.-1")]
        {
            assert!(text.parse::<AttemptId>().is_err(), "{text}");
        }
    }
}
