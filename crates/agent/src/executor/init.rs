//! Drives what every environment with a `sealci-init` in it has in common: the conversation over its channel, from the first
//! file put in to `Finished`, and the clean-up behind it.
//!
//! An executor makes an [`Environment`] with an init in it that waits for its `Start`; from there on [`drive`] is the same
//! for all. Invariants: the init is believed only as far as it hurts itself (offsets are counted here, texts are
//! bounded); an environment is cleared before its end is told; an init that does not answer in time is ended by force,
//! but never while what it sent still waits to be taken.

mod cargo;
mod channel;
mod conversation;
mod errands;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use conversation::Conversation;
use sealci_core::outcome::{Cause, Limit, Outcome};
use sealci_guest::wire::{self, Ending, ToInit, WireError};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::door::Request;
use super::{Backstage, ExecutionEvent, ExecutorError, Lease, Wish, cause_of_complaint};

/// What an init runs in.
#[async_trait]
pub(super) trait Environment: Send {
    /// Does what has to be done between the filling of the workspace and the first command.
    async fn open_up(&mut self) -> Result<(), ExecutorError>;

    /// What is particular to its init, where that is a machine's.
    fn machine(&self) -> Option<Machine> {
        None
    }

    /// A machine's memory ran out, says its init.
    fn ran_out_of_memory(&mut self) {}

    /// Ends everything in it, the init included, without asking. May be repeated.
    fn kill(&mut self);

    /// The limit that was run into so far. Asked again after `clear`.
    fn limit_reached(&self) -> Option<Limit>;

    /// Waits for the init's end, and takes the environment down: nothing of it is left afterwards, but what the error
    /// names. `orderly` says that the init has reported that nothing lives.
    async fn clear(&mut self, orderly: bool) -> Result<(), String>;

    /// What init and helpers complained of on their standard error; for a person, bounded. Asked after `clear`.
    fn complaints(&mut self) -> String;
}

/// What a machine's init needs: it calls when the machine has come up, knows neither the time nor its name, and sees no folder
/// of the host's.
#[derive(Clone)]
pub(super) struct Machine {
    pub host_name: String,
    /// More names for `localhost`.
    pub names: Vec<String>,
    pub network: Option<wire::Network>,
    /// The host's folder that becomes the working folder.
    pub workspace: PathBuf,
    /// Whom the action runs as, in the words of images.
    pub user: String,
    /// Likewise whom each of the services runs as that it has beside it.
    pub services: Vec<String>,
}

impl Machine {
    /// What it is told once it has called.
    fn wake(&self) -> wire::Wake {
        let unix_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        wire::Wake {
            unix_time_us: u64::try_from(unix_time.as_micros()).unwrap_or(0),
            host_boot_ms: u64::try_from(crate::lease::boot_time().as_millis()).unwrap_or(u64::MAX),
            entropy: rand::random::<[u8; 32]>().to_vec(),
            host_name: self.host_name.clone(),
            names: self.names.clone(),
            network: self.network.clone(),
            user: self.user.clone(),
            services: self.services.clone(),
        }
    }
}

/// An environment whose init waits for its `Start`.
pub(super) struct Prepared {
    pub channel: UnixStream,
    pub start: Opening,
    pub environment: Box<dyn Environment>,
    pub timeout: Duration,
    pub grace: Duration,
}

/// An encoded `Start`, and what of it matters before.
pub(super) struct Opening {
    frame: Vec<u8>,
    workdir: Vec<u8>,
    home: Option<Vec<u8>>,
}

/// Encodes what sets the commands going.
pub(super) fn encoded(start: wire::Start) -> Result<Opening, ExecutorError> {
    let workdir = start.workdir.clone();
    let home = start.env.iter().find(|(name, _)| name == "HOME").map(|(_, home)| home.clone().into_bytes());
    let mut frame = Vec::new();
    ToInit::Start(start).encode(&mut frame).map_err(ExecutorError::TooLarge)?;
    Ok(Opening { frame, workdir, home })
}

/// What the owner of an execution holds the other end of, but for its beginning and its events.
struct Owner {
    wishes: watch::Receiver<Wish>,
    leases: watch::Receiver<Option<Lease>>,
    requests: mpsc::Receiver<Request>,
    leave: CancellationToken,
}

/// Waits until it may go, runs an environment to its end, and tells that last.
pub(super) async fn drive(prepared: Prepared, backstage: Backstage) {
    let Prepared { channel, start, mut environment, timeout, grace } = prepared;
    let Backstage { go, events, wishes, leases, requests, leave } = backstage;
    let owner = Owner { wishes, leases, requests, leave };
    let conversation =
        Conversation::new(channel::split(channel), environment.as_mut(), start, (timeout, grace), owner);
    // With it the channel ends, and with that the init, if anything of it is left.
    let (end, wish, over) = conversation.hold(go, &events).await;
    if matches!(end, End::Abandoned | End::NotOpened(_)) {
        environment.kill();
    }
    let limit = environment.limit_reached();
    let orderly = matches!(end, End::Told { survivors: 0, .. });
    let cleared = environment.clear(orderly).await;
    // Some environments hear of it only with their end.
    let limit = limit.or_else(|| environment.limit_reached());
    // What is told already stands.
    let outcome = over.unwrap_or_else(|| end.outcome(limit, wish, || environment.complaints()));
    // Nobody listens when the execution was dropped.
    let _ = events.send(ExecutionEvent::Finished { outcome, remains: cleared.err() }).await;
}

/// How a conversation ended.
enum End {
    Told {
        ending: Ending,
        survivors: u32,
    },
    /// The channel closed without a `Finished`: the init is dead, or was ended by force.
    Silent,
    /// It was not the init's language.
    Garbled(WireError),
    Late(&'static str),
    /// It did not end what ran into the timeout.
    LateAfterTimeout,
    /// It was not to go any more.
    Abandoned,
    /// What is to be done in front of the first command was not.
    NotOpened(ExecutorError),
}

impl End {
    fn outcome(self, limit: Option<Limit>, wish: Wish, complaints: impl FnOnce() -> String) -> Outcome {
        let errored = |message: String| Outcome::Errored { cause: Cause::Executor, message };
        let what = match self {
            Self::Told { ending, .. } => match ending {
                Ending::Succeeded => return Outcome::Succeeded,
                Ending::Failed { exit_code } => return Outcome::Failed { exit_code, limit },
                Ending::TimedOut => return Outcome::TimedOut,
                Ending::Cancelled => return Outcome::Cancelled,
                Ending::Error(message) => {
                    return Outcome::Errored { cause: cause_of_complaint(&message), message };
                }
                Ending::Expired => return expired(),
            },
            Self::Abandoned => return Outcome::Cancelled,
            Self::NotOpened(error) => {
                return Outcome::Errored { cause: error.cause(), message: error.message() };
            }
            _ if wish != Wish::GoOn => return Outcome::Cancelled,
            Self::LateAfterTimeout => return Outcome::TimedOut,
            // The kernel may choose the init itself to make room.
            Self::Silent if limit == Some(Limit::Memory) => {
                return Outcome::Failed { exit_code: 128 + nix::libc::SIGKILL, limit };
            }
            Self::Silent => "sealci-init ended without a report; was it killed?".to_owned(),
            Self::Garbled(error) => format!("sealci-init sent what is not understood: {error}"),
            Self::Late(what) => format!("sealci-init {what} in time, and was killed"),
        };
        let complaints = complaints();
        match cause_of_complaint(&complaints) {
            Cause::Executor if complaints.is_empty() => errored(what),
            Cause::Executor => errored(format!("{what}: {complaints}")),
            // It ended because of this, as it should.
            cause => Outcome::Errored { cause, message: complaints },
        }
    }
}

fn expired() -> Outcome {
    let message = "the controller did not answer for too long, so the exclusive action was killed before another \
                   attempt of it could begin";
    Outcome::Errored { cause: Cause::LeaseExpired, message: message.into() }
}

#[cfg(test)]
mod tests;
