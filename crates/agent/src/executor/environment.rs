//! Keeps what an action has on this host: the process that is, or leads to, its init, and the control group around it.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Limit;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use super::ExecutorError;
use super::cgroup::Cgroup;
use super::init::Environment;

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
    /// The init itself, or the helper around it.
    child: Child,
    cgroup: Option<Cgroup>,
    attempt: String,
}

impl HostEnvironment {
    /// Starts an init, or the helper that leads to one, with the channel as its standard input, within the group; removes
    /// the group if that fails. `attempt` is what the commands have as `SEALCI_ATTEMPT`.
    pub fn spawn(
        mut command: Command,
        cgroup: Option<Cgroup>,
        attempt: String,
    ) -> Result<(UnixStream, Self), ExecutorError> {
        let spawned = Self::spawn_in(&mut command, cgroup.as_ref());
        match (spawned, cgroup) {
            (Ok((channel, child)), cgroup) => Ok((channel, Self { child, cgroup, attempt })),
            (Err(error), Some(cgroup)) => {
                // The first error is the one to tell; the next sweep takes what stays.
                let _ = cgroup.remove();
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn spawn_in(
        command: &mut Command,
        cgroup: Option<&Cgroup>,
    ) -> Result<(UnixStream, Child), ExecutorError> {
        let (ours, theirs) =
            std::os::unix::net::UnixStream::pair().map_err(ExecutorError::io("make a socket pair"))?;
        let channel = ours
            .set_nonblocking(true)
            .and_then(|()| UnixStream::from_std(ours))
            .map_err(ExecutorError::io("set up the channel"))?;
        command
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let child = spawn_written(command)
            .map_err(ExecutorError::io(format_args!("start {}", command.as_std().get_program().display())))?;
        // Our copy of the other end would keep the channel open.
        command.stdin(Stdio::null());
        // Init and helper alike do nothing before the opening arrives, so everything they ever fork is in the group.
        if let (Some(cgroup), Some(pid)) = (cgroup, child.id()) {
            cgroup.add(pid).map_err(ExecutorError::Cgroup)?;
        }
        Ok((channel, child))
    }

    /// The init itself, or the helper around it, until its end was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }
}

#[async_trait]
impl Environment for HostEnvironment {
    fn kill(&mut self) {
        // An error means that it is gone.
        let _ = self.child.start_kill();
        match &self.cgroup {
            Some(cgroup) => cgroup.kill(),
            None => kill_by_environment(&self.attempt),
        }
    }

    fn limit_reached(&self) -> Option<Limit> {
        self.cgroup.as_ref().and_then(Cgroup::limit_reached)
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        // Its channel is closed: it ends what it runs, then itself.
        if tokio::time::timeout(EXIT_PATIENCE, self.child.wait()).await.is_err() {
            self.kill();
        }
        if !orderly {
            // What the init's end set free, and what was forked meanwhile.
            self.kill();
        }
        let Some(cgroup) = self.cgroup.take() else { return Ok(()) };
        blocking(move || cgroup.remove().map_err(ExecutorError::Cgroup))
            .await
            .map_err(|error| error.message())
    }

    fn complaints(&mut self) -> String {
        let Some(stderr) = self.child.stderr.take() else {
            return String::new();
        };
        read_complaints(stderr.into_owned_fd())
    }
}

/// What stands in a pipe already. Whoever else holds it, nothing is waited for.
fn read_complaints(pipe: std::io::Result<OwnedFd>) -> String {
    let mut bytes = vec![0; COMPLAINT_BYTES];
    // tokio has made the pipe non-blocking.
    let count = pipe.map(fs::File::from).and_then(|mut file| file.read(&mut bytes)).unwrap_or(0);
    String::from_utf8_lossy(&bytes[..count]).trim().to_owned()
}

/// Kills every process of this attempt that shows its environment. A last resort: whoever has cleared it stays.
fn kill_by_environment(attempt: &str) {
    let marker = format!("SEALCI_ATTEMPT={attempt}");
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
fn spawn_written(command: &mut Command) -> std::io::Result<Child> {
    const TRIES: u32 = 50;
    for _ in 1..TRIES {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
    command.spawn()
}
