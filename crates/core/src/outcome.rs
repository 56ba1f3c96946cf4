//! Says how an attempt, an action or a pipeline ended.
//!
//! "The command failed" is another thing than "we failed": `failed` and `timed_out` belong to the user, `errored` to the
//! infrastructure, and only `errored` is tried again by itself.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How an attempt or an action ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Outcome {
    /// Every command exited with 0.
    Succeeded,
    /// A command ended with another code (as a shell reports it: 128 + n for signal n).
    Failed {
        exit_code: i32,
        /// The limit that ended it, if one did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit: Option<Limit>,
    },
    /// The infrastructure could not run it to its end.
    Errored { cause: Cause, message: String },
    /// A person or a newer pipeline wished it ended, and it ended for that.
    Cancelled,
    /// It ran into its timeout.
    TimedOut,
    /// It never ran. Only actions are skipped, never attempts.
    Skipped { because: String },
}

/// A limit of the environment that ended an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    Memory,
    Pids,
    Disk,
}

/// What went wrong on our side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// The agent was silent for too long, or came back without the attempt.
    AgentLost,
    /// The agent restarted and what it ran could not go on.
    AgentRestarted,
    /// The repository could not be read, or the revision is not in it.
    Workspace,
    /// There is no such image, or it is not one that can be run as the manifest asks.
    Image,
    /// The image's registry could not be reached, or did not go on.
    Registry,
    /// A service beside the action did not come up.
    Service,
    /// The environment could not be made or broke.
    Executor,
    /// What was to be brought from, or kept in, the storage could not be.
    Storage,
    /// The agent's disk is full.
    DiskFull,
    /// An exclusive action was killed, because the controller did not answer its agent.
    LeaseExpired,
    /// The agent does not understand what it is asked to do.
    Unsupported,
}

impl Cause {
    /// Whether another attempt may end otherwise. What stands in the manifest or the repository does not change, an image is what
    /// it is, and a service that does not come up has had its time.
    pub fn is_transient(self) -> bool {
        !matches!(self, Self::Unsupported | Self::Service | Self::Image)
    }

    const ALL: [Self; 11] = [
        Self::AgentLost,
        Self::AgentRestarted,
        Self::Workspace,
        Self::Image,
        Self::Registry,
        Self::Service,
        Self::Executor,
        Self::Storage,
        Self::DiskFull,
        Self::LeaseExpired,
        Self::Unsupported,
    ];

    /// The name on every wire and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AgentLost => "agent_lost",
            Self::AgentRestarted => "agent_restarted",
            Self::Workspace => "workspace",
            Self::Image => "image",
            Self::Registry => "registry",
            Self::Service => "service",
            Self::Executor => "executor",
            Self::Storage => "storage",
            Self::DiskFull => "disk_full",
            Self::LeaseExpired => "lease_expired",
            Self::Unsupported => "unsupported",
        }
    }

    /// Reads [`Cause::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.as_str() == name)
    }
}

impl Limit {
    const ALL: [Self; 3] = [Self::Memory, Self::Pids, Self::Disk];

    /// The name on every wire and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Disk => "disk",
        }
    }

    /// Reads [`Limit::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|limit| limit.as_str() == name)
    }
}

impl Outcome {
    /// The outcome's name alone: what lists and filters show.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed { .. } => "failed",
            Self::Errored { .. } => "errored",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Skipped { .. } => "skipped",
        }
    }
}

/// One line for a person: `failed (exit code 7)`.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Succeeded => f.write_str("succeeded"),
            Self::Failed { exit_code, limit: None } => write!(f, "failed (exit code {exit_code})"),
            Self::Failed { exit_code, limit: Some(limit) } => {
                write!(f, "failed (exit code {exit_code}, over its {} limit)", limit.as_str())
            }
            Self::Errored { cause, message } => write!(f, "errored ({}: {message})", cause.as_str()),
            Self::Cancelled => f.write_str("cancelled"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Skipped { because } => write!(f, "skipped ({because})"),
        }
    }
}
