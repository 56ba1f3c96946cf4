//! Names why a stream or a request was ended or refused, in words for the one at its other end.

use std::time::Duration;

use sealci_core::ids::AgentId;
use sealci_proto::{Malformed, Versions};

/// Why the scheduler ended a stream, or refused to begin one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    #[error(
        "you speak version {theirs} of the protocol, this scheduler speaks {ours}: bring the older of the two to a \
         release that is at most one behind the other's"
    )]
    Protocol { theirs: Versions, ours: Versions },
    #[error("agent {agent} is not known here, or its credential is another: enrol it")]
    Unauthenticated { agent: AgentId },
    #[error("agent {agent} was removed: enrol it again to use it")]
    Removed { agent: AgentId },
    #[error("no controller has told this scheduler which agents exist: waited {} ms, try again", .waited.as_millis())]
    NoDirectory { waited: Duration },
    #[error("no controller was connected to this scheduler for {} ms: try the next one", .waited.as_millis())]
    Deserted { waited: Duration },
    #[error("{waiting} agents wait for a controller already: try again")]
    TooManyWaiting { waiting: usize },
    #[error("a newer stream of the same instance took the place of this one")]
    Replaced,
    #[error("sent {sent_bytes} bytes of log with credit for {credit_bytes}")]
    Overspent { sent_bytes: u64, credit_bytes: u64 },
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("nothing was heard for {} ms", .waited.as_millis())]
    Silent { waited: Duration },
    #[error("messages were not read for so long that no more can be kept: connect again")]
    Unread,
    #[error("the scheduler is shutting down")]
    ShuttingDown,
}

/// Why an agent was not enrolled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnrolRefused {
    #[error("no controller is connected to this scheduler: try again")]
    NoController,
    #[error("{waiting} others are being enrolled: try again")]
    TooMany { waiting: usize },
    #[error("the controller did not answer in {} ms: try again", .waited.as_millis())]
    TimedOut { waited: Duration },
    #[error("{0}")]
    Unauthenticated(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    Other(String),
}
