//! Keeps what an action has on this host: the process that is, or leads to, its init, and the control group around it.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Limit;
use sealci_sandbox::birth::{self, Birth, Entrance};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

use super::cgroup::Cgroup;
use super::init::{self, Environment, Prepared};
use super::{ExecutorError, Standby, standby};

/// Enough for any build, and too little for a fork bomb to hurt the host.
pub const DEFAULT_PIDS: u64 = 8192;
/// How long an init may take to exit after its channel is closed.
const EXIT_PATIENCE: Duration = Duration::from_secs(5);
/// What is shown of an init's complaints.
const COMPLAINT_BYTES: usize = 2048;

/// Runs what waits for the kernel where it holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ExecutorError> + Send + 'static,
) -> Result<T, ExecutorError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ExecutorError::io("make the environment")(std::io::Error::other(error))),
    }
}

/// Makes an environment and drives it in a task of its own, which `kept` goes with. The task takes down what was made
/// where nobody waits for it any more.
pub(super) async fn stand_by(
    tasks: &TaskTracker,
    making: impl Future<Output = Result<Prepared, ExecutorError>> + Send + 'static,
    kept: impl Send + 'static,
) -> Result<Standby, ExecutorError> {
    let (standby, backstage) = standby();
    let (tell, told) = oneshot::channel();
    tasks.spawn(async move {
        match making.await {
            Ok(prepared) => {
                // Who waited may have gone; then the standby is gone as well, and the drive ends before it begins.
                let _ = tell.send(Ok(()));
                init::drive(prepared, backstage).await;
            }
            Err(error) => {
                let _ = tell.send(Err(error));
            }
        }
        drop(kept);
    });
    match told.await {
        Ok(made) => made.map(|()| standby),
        Err(_) => Err(ExecutorError::io("make the environment")(io::Error::other("its task broke"))),
    }
}

/// Which attempts live.
#[derive(Debug, Clone, Default)]
pub(super) struct Running(Arc<Mutex<HashSet<AttemptId>>>);

impl Running {
    pub fn enter(&self, attempt: AttemptId) -> Result<RunningGuard, ExecutorError> {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(attempt) {
            Ok(RunningGuard { running: self.clone(), attempt })
        } else {
            Err(ExecutorError::AlreadyRunning(attempt))
        }
    }
}

/// Says that an attempt lives, until it is dropped.
#[derive(Debug)]
pub(super) struct RunningGuard {
    running: Running,
    attempt: AttemptId,
}

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.running.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.attempt);
    }
}

/// What stands on this host for one action.
#[derive(Debug)]
pub(super) struct HostEnvironment {
    /// A pidfd of the init itself, or of the helper around it.
    child: AsyncFd<OwnedFd>,
    complaints: File,
    cgroup: Option<Cgroup>,
    /// Whether others are in the group, which end with it.
    has_guests: bool,
    /// How its processes are found that have no group of their own; none: they end with the child.
    marker: Option<String>,
    gift: Option<Gift>,
}

/// The control group that an environment is made in.
#[derive(Debug)]
pub(super) enum Group {
    None,
    /// Its own, which goes with it.
    Own(Cgroup),
    /// Another one's, which outlives it.
    Guest(Cgroup),
}

impl Group {
    fn cgroup(&self) -> Option<&Cgroup> {
        match self {
            Self::None => None,
            Self::Own(cgroup) | Self::Guest(cgroup) => Some(cgroup),
        }
    }
}

/// What changes its owner before the commands start, where mounts cannot map owners.
#[derive(Debug)]
pub(super) struct Gift {
    pub folder: PathBuf,
    pub user: u32,
    pub group: u32,
}

impl HostEnvironment {
    /// Starts an init, or the helper that leads to one, with the channel as its standard input, within the group; removes
    /// the group if that fails and it is its own. `attempt` is what the commands have as `SEALCI_ATTEMPT`.
    pub fn spawn(
        program: &Path,
        arguments: &[&OsStr],
        group: Group,
        attempt: String,
    ) -> Result<(UnixStream, Self), ExecutorError> {
        let spawned = spawn_in(program, arguments, group.cgroup());
        let (cgroup, marker) = match group {
            Group::Own(cgroup) => (Some(cgroup), None),
            Group::Guest(_) => (None, None),
            Group::None => (None, Some(format!("SEALCI_ATTEMPT={attempt}"))),
        };
        match (spawned, cgroup) {
            (Ok((channel, child, complaints)), cgroup) => {
                Ok((channel, Self { child, complaints, cgroup, has_guests: false, marker, gift: None }))
            }
            (Err(error), Some(cgroup)) => {
                // The first error is the one to tell; the next sweep takes what stays.
                let _ = cgroup.remove();
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    /// Has it end those who are guests in its group before the group is removed.
    pub fn with_guests(mut self, has_guests: bool) -> Self {
        self.has_guests = has_guests;
        self
    }

    /// Has the workspace change its owner before the commands start.
    pub fn give(mut self, gift: Option<Gift>) -> Self {
        self.gift = gift;
        self
    }

    /// The process id of the init, or the helper around it. Nobody else gets it before this is cleared.
    pub fn process(&self) -> io::Result<u32> {
        birth::id(self.child.get_ref())
    }

    /// Waits for the end of the init, or the helper around it.
    pub async fn ended(&self) {
        // An error would be the end of what tells of it.
        let _ = self.child.readable().await;
    }

    /// Sends TERM to the init, or the helper around it.
    pub fn terminate(&self) {
        // An error means that it is gone.
        let _ = birth::terminate(self.child.get_ref());
    }
}

/// Starts the program; returns our end of its channel, its pidfd, and what reads its standard error.
fn spawn_in(
    program: &Path,
    arguments: &[&OsStr],
    cgroup: Option<&Cgroup>,
) -> Result<(UnixStream, AsyncFd<OwnedFd>, File), ExecutorError> {
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().map_err(ExecutorError::io("make a socket pair"))?;
    let channel = ours
        .set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(ours))
        .map_err(ExecutorError::io("set up the channel"))?;
    let (complaints, stderr) = io::pipe().map_err(ExecutorError::io("make a pipe"))?;
    let complaints = File::from(OwnedFd::from(complaints));
    // Whoever else holds the pipe in the end, nothing is waited for.
    fcntl(&complaints, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map_err(|error| ExecutorError::io("set up a pipe")(error.into()))?;
    let null = File::options().write(true).open("/dev/null").map_err(ExecutorError::io("open /dev/null"))?;
    let nowhere = Entrance::default();
    let entrance =
        cgroup.map(Cgroup::entrance).transpose().map_err(ExecutorError::Cgroup)?.unwrap_or(nowhere);
    let starting = || {
        let birth = Birth {
            program,
            arguments: arguments.to_vec(),
            stdin: theirs.try_clone()?.into(),
            stdout: null.try_clone()?.into(),
            stderr: stderr.try_clone()?.into(),
            entrance: &entrance,
        };
        birth.spawn()
    };
    let child = spawn_written(starting)
        .and_then(watched)
        .map_err(ExecutorError::io(format_args!("start {}", program.display())))?;
    Ok((channel, child, complaints))
}

/// A pidfd is readable from its process's end on.
#[expect(
    deprecated,
    reason = "what replaces it is unsafe, for the sake of types that may close a descriptor early"
)]
fn watched(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(pidfd, Interest::READABLE)
}

#[async_trait]
impl Environment for HostEnvironment {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        let Some(Gift { folder, user, group }) = self.gift.take() else { return Ok(()) };
        blocking(move || {
            sealci_sandbox::give_away(&folder, user, group)
                .map_err(ExecutorError::io(format_args!("change the owners below {}", folder.display())))
        })
        .await
    }

    fn kill(&mut self) {
        // An error means that it is gone.
        let _ = birth::kill(self.child.get_ref());
        match (&self.cgroup, &self.marker) {
            (Some(cgroup), _) => cgroup.kill(),
            (None, Some(marker)) => kill_by_environment(marker),
            (None, None) => {}
        }
    }

    fn limit_reached(&self) -> Option<Limit> {
        self.cgroup.as_ref().and_then(Cgroup::limit_reached)
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        // Its channel is closed: it ends what it runs, then itself.
        if tokio::time::timeout(EXIT_PATIENCE, self.child.readable()).await.is_err() {
            self.kill();
            // Nobody survives KILL but who hangs in the kernel; of those the removal of the group tells.
            let _ = tokio::time::timeout(EXIT_PATIENCE, self.child.readable()).await;
        }
        let _ = birth::reap(self.child.get_ref());
        if !orderly || self.has_guests {
            // What the init's end set free, and what was forked meanwhile.
            self.kill();
        }
        let Some(cgroup) = self.cgroup.take() else { return Ok(()) };
        blocking(move || cgroup.remove().map_err(ExecutorError::Cgroup))
            .await
            .map_err(|error| error.message())
    }

    fn complaints(&mut self) -> String {
        let mut bytes = vec![0; COMPLAINT_BYTES];
        // What stands in the pipe already.
        let count = self.complaints.read(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).trim().to_owned()
    }
}

/// Kills every process that shows this in its environment, as `NAME=value`. A last resort: whoever has cleared it stays.
pub(super) fn kill_by_environment(marker: &str) {
    let is_marked =
        |environ: Vec<u8>| environ.split(|byte| *byte == 0).any(|entry| entry == marker.as_bytes());
    let Ok(entries) = fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if fs::read(entry.path().join("environ")).is_ok_and(is_marked) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Starts what this very process may have written a moment ago: a fork of another thread can hold the file open for
/// writing until it execs, and the kernel executes nothing that is.
fn spawn_written(start: impl Fn() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    const TRIES: u32 = 50;
    for _ in 1..TRIES {
        match start() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
    start()
}
