//! Runs actions: one trait, and for each kind of environment one way to fulfil it.
//!
//! An executor knows commands, folders and limits; it knows nothing of repositories, spools or schedulers. What
//! an execution tells is an ordered stream that ends with exactly one `Finished`:
//!
//! ```text
//! (Started  (CommandStarted  Output*  CommandFinished)*  Output*  Over?)?  Finished
//! ```
//!
//! `Output` between two commands (of something left in the background) belongs to neither. A `CommandFinished` may be
//! missing where the environment broke in mid command, and every command after the last that started never ran.

pub mod cgroup;
pub mod container;
pub mod docker;
pub mod door;
mod environment;
pub mod fake;
mod gate;
pub mod helper;
mod images;
pub mod init;
pub mod microvm;
mod neighbourhood;
mod notes;
pub mod process;
mod programs;
pub mod rootless;
pub mod sandbox;
pub mod sealed;

pub use environment::DEFAULT_PIDS;
pub use images::Images;
pub use neighbourhood::Neighbourhood;
pub use notes::{NoteReader, Notes, notes};
pub use programs::MONITOR_PROGRAM;
pub use sealci_guest::wire::Lease;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use door::{Door, Request};
use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, ExecutorKind, Network, Resources, Service};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::causes::{is_disk_full, with_causes};

/// How many events wait for a slow reader. With the largest output frame this bounds an execution's memory.
const EVENT_CAPACITY: usize = 8;

/// What runs actions in one kind of environment.
///
/// **Lifecycle.** [`Executor::prepare`] makes the environment, in which nothing of the action runs until
/// [`Standby::begin`]; everything afterwards, trouble included, comes through the [`Execution`]. So the environment is made
/// while the workspace is still being filled and the claim is under way. An error from `prepare` means that nothing is left
/// behind. The environment is gone (no process, mount, namespace, cgroup) before `Finished` is told. The workspace and
/// the scratch folder are the caller's: they exist before `prepare`, the workspace is filled before `begin`, and both are
/// deleted by the caller after `Finished`.
///
/// **Idempotence.** An attempt is prepared at most once per executor; a second time while the first lives is refused. [`Executor::sweep`] may run any number of times while nothing of this executor runs.
///
/// **Concurrency.** All methods may be called at the same time from any task. How many executions run at once is the
/// caller's affair: an executor neither queues nor counts.
///
/// **Ending.** Cancel and kill are wishes that may be repeated, and come too late harmlessly: the stream says how it ended.
/// Dropping an [`Execution`] kills it; the clean-up then goes on by itself, and [`Executor::close`] waits for it.
#[async_trait]
pub trait Executor: Send + Sync {
    /// Which kind of environment it makes.
    fn kind(&self) -> ExecutorKind;

    /// Whether commands see the workspace. Where they do not, nothing needs to be checked out.
    fn uses_workspace(&self) -> bool {
        true
    }

    /// Makes the environment. Dropping the future takes down what is made so far.
    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError>;

    /// Ends and removes what an earlier process of this agent left behind. To be called before the first start.
    async fn sweep(&self) -> Result<(), ExecutorError>;

    /// Waits until all that was started is over and cleaned up. Nothing may be started any more.
    async fn close(&self);
}

/// What to run, and in what.
#[derive(Debug, Clone)]
pub struct ExecutionRequest {
    pub attempt: AttemptId,
    /// At least one. They run in one shell, in order, until one fails.
    pub commands: Vec<String>,
    pub shell: ShellKind,
    /// The commands' whole environment, but for what the executor alone knows and adds where absent: `PATH`, `HOME`,
    /// `TMPDIR`; and what it always sets: `SEALCI_ATTEMPT`, `SEALCI_WORKSPACE`.
    pub env: BTreeMap<String, String>,
    /// An existing folder on the host: the commands' working directory, theirs to change.
    pub workspace: PathBuf,
    /// An existing, empty folder on the host, of this attempt alone: the executor's to fill.
    pub scratch: PathBuf,
    /// The image to run in, for executors that run images.
    pub container: Option<Container>,
    /// Takes what there is to say while the environment is made.
    pub notes: Notes,
    /// Cancelled: what is being made is not wanted any more, and [`Executor::prepare`] is to come back soon.
    pub stop: CancellationToken,
    /// Enforced where the executor can.
    pub resources: Resources,
    pub network: Network,
    /// With whom the network is shared, where the executor can.
    pub neighbourhood: Option<Neighbourhood>,
    /// Instead of the commands: what it is beside another environment of the attempt, in the same neighbourhood. It has that
    /// one's limits together with it where the executor can, and ends with it at the latest.
    pub service: Option<ServiceRole>,
    /// What will be prepared beside it, in its neighbourhood, for executors that make room for that beforehand.
    pub services: Vec<Service>,
    /// More names for `localhost`, where the executor can.
    pub names: Vec<String>,
    /// From the first command's start.
    pub timeout: Duration,
    /// Between TERM and KILL when the timeout is reached.
    pub grace: Duration,
    /// Whether the environment is kept when the commands are over, for files to be taken out of it: see
    /// [`ExecutionEvent::Over`].
    pub stays: bool,
}

/// A program of an image, which runs beside an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRole {
    /// `[a-z0-9-]`; the attempt has one of each name.
    pub name: String,
    /// Words behind the image's entrypoint; none: the image's.
    pub command: Option<Vec<String>>,
}

impl ExecutionRequest {
    /// Names the environment among those that live: `[A-Za-z0-9_.-]`.
    pub fn environment_name(&self) -> String {
        match &self.service {
            Some(service) => format!("{}.{}", self.attempt, service.name),
            None => self.attempt.to_string(),
        }
    }

    /// What an executor says that runs no services.
    fn refuse_service(&self, kind: ExecutorKind) -> Result<(), ExecutorError> {
        match &self.service {
            Some(service) => Err(ExecutorError::Unsupported(format!(
                "the executor `{}` runs no services, so `{}` cannot be had",
                kind.as_str(),
                service.name
            ))),
            None => Ok(()),
        }
    }
}

/// Which shell reads the commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ShellKind {
    #[default]
    Sh,
    Bash,
}

impl ShellKind {
    /// The name in manifests and on every wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sh => "sh",
            Self::Bash => "bash",
        }
    }

    /// Reads [`ShellKind::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Sh, Self::Bash].into_iter().find(|kind| kind.as_str() == name)
    }
}

/// What a command took. Zero where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResourceUse {
    pub cpu_user: Duration,
    pub cpu_system: Duration,
    pub memory_peak_bytes: u64,
    /// Of storage; what the page cache had is not in it.
    pub read_bytes: u64,
    pub write_bytes: u64,
}

/// What an execution tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecutionEvent {
    /// The environment stands and the first command is about to start.
    Started,
    CommandStarted {
        /// From 0.
        index: u32,
        /// How many bytes of output came before.
        log_offset: u64,
    },
    /// Standard output and standard error, in the order in which they were written.
    Output(Bytes),
    CommandFinished {
        index: u32,
        /// As a shell reports it: 128 + n for signal n.
        exit_code: i32,
        duration: Duration,
        log_offset: u64,
        resource_use: ResourceUse,
    },
    /// The commands are over and nothing of them lives; the environment is kept for files to be taken out, until
    /// [`Execution::leave`], a wish to end it, or its own end. Only where the request says that it stays, and not of what
    /// was cancelled or never began.
    Over {
        /// `Finished` says the same.
        outcome: Outcome,
    },
    /// The last event. Never `Skipped`.
    Finished {
        outcome: Outcome,
        /// What could not be taken down, for a person: something survived KILL, or a folder will not go. The
        /// reservation should stay until an operator, or the next sweep, has dealt with it.
        remains: Option<String>,
    },
}

/// An environment that stands and waits. Dropping it takes it down; [`Executor::close`] waits for that.
#[derive(Debug)]
pub struct Standby {
    execution: Execution,
    go: oneshot::Sender<()>,
}

impl Standby {
    /// The way into the environment, for files that are there before the first command.
    pub fn door(&self) -> Door {
        self.execution.door()
    }

    /// A handle that may be used before the beginning.
    pub fn handle(&self) -> ExecutionHandle {
        self.execution.handle()
    }

    /// Sets the commands going.
    pub fn begin(self) -> Execution {
        // Its task waits for this and nothing else; were it gone, the execution's events would say so by their end.
        let _ = self.go.send(());
        self.execution
    }

    /// Takes the environment down; returns how it had ended before, `Cancelled` where it had not, and what could not be taken
    /// down, for a person.
    pub async fn abandon(self) -> (Outcome, Option<String>) {
        let Self { mut execution, go } = self;
        drop(go);
        while let Some(event) = execution.next().await {
            if let ExecutionEvent::Finished { outcome, remains } = event {
                return (outcome, remains);
            }
        }
        (Outcome::Cancelled, None)
    }
}

/// A running action: its events, and the handle to end it.
///
/// The stream holds back what writes into it: an execution whose events are not taken stands still, but for its timeout
/// and its ending. Dropping it kills what runs.
#[derive(Debug)]
pub struct Execution {
    events: mpsc::Receiver<ExecutionEvent>,
    handle: ExecutionHandle,
    door: Door,
    leave: CancellationToken,
}

impl Execution {
    /// The next event; none after `Finished`. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<ExecutionEvent> {
        self.events.recv().await
    }

    /// The way into the environment, for as long as it stands.
    pub fn door(&self) -> Door {
        self.door.clone()
    }

    /// Nothing more is wanted after `Over`. May be said before, and then nothing is waited for.
    pub fn leave(&self) {
        self.leave.cancel();
    }

    /// A handle that may be used while events are awaited.
    pub fn handle(&self) -> ExecutionHandle {
        self.handle.clone()
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        self.handle.kill();
    }
}

/// Ends an execution. Harmless after its end.
#[derive(Debug, Clone)]
pub struct ExecutionHandle {
    wish: watch::Sender<Wish>,
    lease: watch::Sender<Option<Lease>>,
}

impl ExecutionHandle {
    /// TERM to everything, and KILL to what lives after `grace`. A later cancel can only shorten the grace. The outcome
    /// is `Cancelled`, unless it was over before.
    pub fn cancel(&self, grace: Duration) {
        self.escalate(Wish::Cancel { grace });
    }

    /// KILL to everything, at once. The outcome is `Cancelled`, unless it was over before.
    pub fn kill(&self) {
        self.escalate(Wish::Kill);
    }

    /// It may run until then, and not a moment longer without another word. The environment counts that itself: its init kills
    /// everything when the last lease ends. Said before the beginning, it holds from the first command on.
    pub fn hold_until(&self, lease: Lease) {
        self.lease.send_if_modified(|current| {
            let later = current.is_none_or(|current| current < lease);
            if later {
                *current = Some(lease);
            }
            later
        });
    }

    /// Whether anyone has wished for its end.
    pub fn is_ended(&self) -> bool {
        *self.wish.borrow() != Wish::GoOn
    }

    fn escalate(&self, wish: Wish) {
        self.wish.send_if_modified(|current| {
            let stronger = wish.is_stronger_than(*current);
            if stronger {
                *current = wish;
            }
            stronger
        });
    }
}

/// What the owner wants of an execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    GoOn,
    Cancel { grace: Duration },
    Kill,
}

impl Wish {
    fn is_stronger_than(self, other: Self) -> bool {
        match (self, other) {
            (Self::Cancel { grace }, Self::Cancel { grace: before }) => grace < before,
            (Self::Cancel { .. }, Self::GoOn) => true,
            (Self::Kill, other) => other != Self::Kill,
            _ => false,
        }
    }
}

/// The driving task's end of an execution.
struct Backstage {
    /// An error: it will never go.
    go: oneshot::Receiver<()>,
    events: mpsc::Sender<ExecutionEvent>,
    wishes: watch::Receiver<Wish>,
    leases: watch::Receiver<Option<Lease>>,
    /// What is asked through the door.
    requests: mpsc::Receiver<Request>,
    /// Nothing more is wanted when the commands are over.
    leave: CancellationToken,
}

/// The two ends of an execution: its owner's, and that of the task that drives it.
fn standby() -> (Standby, Backstage) {
    let (event_sender, events) = mpsc::channel(EVENT_CAPACITY);
    let (wish, wishes) = watch::channel(Wish::GoOn);
    let (lease, leases) = watch::channel(None);
    let (go, may_go) = oneshot::channel();
    let (door, requests) = door::door();
    let leave = CancellationToken::new();
    let execution = Execution { events, handle: ExecutionHandle { wish, lease }, door, leave: leave.clone() };
    (
        Standby { execution, go },
        Backstage { go: may_go, events: event_sender, wishes, leases, requests, leave },
    )
}

/// Has all of them done, whatever becomes of one: what will not go is no reason to leave the others. Tells the first error.
fn all_of<E>(done: impl IntoIterator<Item = Result<(), E>>) -> Result<(), E> {
    let mut told = Ok(());
    for each in done {
        told = told.and(each);
    }
    told
}

/// Why an action's environment could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ExecutorError {
    #[error("cannot {doing}")]
    Io {
        /// What was tried, with its path: `make the folder /x`.
        doing: String,
        #[source]
        source: io::Error,
    },
    #[error("cannot limit the action's resources")]
    Cgroup(#[source] cgroup::CgroupError),
    #[error(
        "the commands and their variables are too much for one action: {0}; move some of it into files of the repository"
    )]
    TooLarge(#[source] sealci_guest::wire::WireError),
    #[error("cannot have the image {image}")]
    Image {
        image: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
        /// For want of room on the agent's disk.
        disk_full: bool,
    },
    /// As [`ExecutorError::Image`], but the same, asked again, may go better.
    #[error("cannot have the image {image}")]
    Registry {
        image: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error(transparent)]
    Docker(#[from] docker::DockerError),
    #[error("cannot {doing}: {complaint}")]
    Helper { doing: &'static str, complaint: String },
    #[error("what it was being prepared for is over")]
    Stopped,
    #[error("attempt {0} is running already")]
    AlreadyRunning(AttemptId),
    #[error("{0}")]
    Unsupported(String),
}

impl ExecutorError {
    fn io(doing: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing: doing.to_string(), source }
    }

    /// Whose fault it is.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Io { source, .. } if is_disk_full(source) => Cause::DiskFull,
            Self::Image { disk_full: true, .. } => Cause::DiskFull,
            Self::Image { .. } => Cause::Image,
            Self::Registry { .. } => Cause::Registry,
            Self::Helper { complaint, .. } => cause_of_complaint(complaint),
            Self::Docker(error) => error.cause(),
            Self::Io { .. } | Self::Cgroup(_) | Self::Stopped | Self::AlreadyRunning(_) => Cause::Executor,
            Self::TooLarge(_) | Self::Unsupported(_) => Cause::Unsupported,
        }
    }

    /// The error and all that led to it, in one line.
    pub fn message(&self) -> String {
        with_causes(self)
    }
}

/// Whose fault it is that a helper could not seal an environment, by what it said.
fn cause_of_complaint(complaint: &str) -> Cause {
    if complaint.contains(sealci_guest::accounts::COMPLAINT) { Cause::Image } else { Cause::Executor }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_keeps_nothing_else_from_being_done() {
        let mut done = Vec::new();
        let each =
            ["one", "two", "three"].map(|name| (name, if name == "three" { Ok(()) } else { Err(name) }));
        let told = all_of(each.into_iter().map(|(name, result)| {
            done.push(name);
            result
        }));
        assert_eq!((told, done.len()), (Err("one"), 3));
    }

    #[test]
    fn a_wish_only_grows_stronger() {
        let short = Wish::Cancel { grace: Duration::from_secs(1) };
        let long = Wish::Cancel { grace: Duration::from_secs(2) };
        for (wish, before, stronger) in [
            (long, Wish::GoOn, true),
            (short, long, true),
            (long, short, false),
            (short, short, false),
            (Wish::Kill, short, true),
            (Wish::Kill, Wish::Kill, false),
            (short, Wish::Kill, false),
            (Wish::GoOn, Wish::Kill, false),
        ] {
            assert_eq!(wish.is_stronger_than(before), stronger, "{wish:?} after {before:?}");
        }
    }
}
