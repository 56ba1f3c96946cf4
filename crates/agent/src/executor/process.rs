//! Runs actions as plain processes of this host: limited and ended for sure where control groups may be used, isolated never.
//!
//! Only for those who trust what they run: an action sees what the agent's user sees. What it starts cannot outlive it, for
//! its init takes in every orphan; an action that kills its own init is ended by its control group or, without one, by
//! looking for its `SEALCI_ATTEMPT` in every process's environment.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Limit;
use sealci_core::plan::ExecutorKind;
use sealci_guest::wire;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio_util::task::TaskTracker;

use super::cgroup::{Cgroup, Cgroups, Limits};
use super::init::{self, Environment, Prepared};
use super::{Execution, ExecutionRequest, Executor, ExecutorError, execution};

/// Enough for any build, and too little for a fork bomb to hurt the host.
pub const DEFAULT_PIDS: u64 = 8192;
/// How long an init may take to exit after its channel is closed.
const EXIT_PATIENCE: Duration = Duration::from_secs(5);
/// What is shown of an init's complaints.
const COMPLAINT_BYTES: usize = 2048;

/// The executor without isolation.
#[derive(Debug)]
pub struct ProcessExecutor {
    init: PathBuf,
    cgroups: Option<Cgroups>,
    pids: u64,
    tasks: TaskTracker,
    running: Running,
}

impl ProcessExecutor {
    /// `data_dir` takes the init; without `cgroups` nothing is limited.
    pub fn new(data_dir: &Path, cgroups: Option<Cgroups>) -> Result<Self, ExecutorError> {
        let init = init::install(data_dir)?;
        Ok(Self { init, cgroups, pids: DEFAULT_PIDS, tasks: TaskTracker::new(), running: Running::default() })
    }

    /// Sets how many processes and threads an action may have at a time.
    pub fn with_pids(mut self, pids: u64) -> Self {
        self.pids = pids;
        self
    }
}

#[async_trait]
impl Executor for ProcessExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Process
    }

    async fn start(&self, request: ExecutionRequest) -> Result<Execution, ExecutorError> {
        let guard = self.running.enter(request.attempt)?;
        let (init, cgroups, pids) = (self.init.clone(), self.cgroups.clone(), self.pids);
        let prepared = blocking(move || prepare(&init, cgroups.as_ref(), pids, request)).await?;
        let (execution, events, wishes) = execution();
        self.tasks.spawn(async move {
            init::drive(prepared, events, wishes).await;
            drop(guard);
        });
        Ok(execution)
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        match self.cgroups.clone() {
            Some(cgroups) => blocking(move || cgroups.sweep().map_err(ExecutorError::Cgroup)).await,
            None => Ok(()),
        }
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

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

fn prepare(
    init: &Path,
    cgroups: Option<&Cgroups>,
    pids: u64,
    request: ExecutionRequest,
) -> Result<Prepared, ExecutorError> {
    let attempt = request.attempt.to_string();
    let (timeout, grace) = (request.timeout, request.grace);
    let limits = Limits {
        cpu_millis: request.resources.cpu_millis,
        memory_bytes: request.resources.memory_bytes,
        pids,
    };
    let opening = init::opening(start_message(request)?)?;
    let cgroup =
        cgroups.map(|groups| groups.create(&attempt, &limits)).transpose().map_err(ExecutorError::Cgroup)?;
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().map_err(ExecutorError::io("make a socket pair"))?;
    let mut environment = ProcessEnvironment { child: None, cgroup, attempt };
    // From here on, dropping the environment without clearing it would leave its group behind.
    match spawn(init, theirs, ours, &mut environment) {
        Ok(channel) => Ok(Prepared { channel, opening, environment: Box::new(environment), timeout, grace }),
        Err(error) => {
            if let Some(cgroup) = &environment.cgroup {
                // The first error is the one to tell; the next sweep takes the rest.
                let _ = cgroup.remove();
            }
            Err(error)
        }
    }
}

fn spawn(
    init: &Path,
    theirs: std::os::unix::net::UnixStream,
    ours: std::os::unix::net::UnixStream,
    environment: &mut ProcessEnvironment,
) -> Result<UnixStream, ExecutorError> {
    let mut command = Command::new(init);
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let child =
        spawn_written(&mut command).map_err(ExecutorError::io(format_args!("start {}", init.display())))?;
    // Its copy of the init's end of the channel would keep the channel open.
    drop(command);
    let pid = child.id();
    environment.child = Some(child);
    // It runs nothing before its `Start`, so everything it will ever fork is in the group.
    if let (Some(cgroup), Some(pid)) = (&environment.cgroup, pid) {
        cgroup.add(pid).map_err(ExecutorError::Cgroup)?;
    }
    ours.set_nonblocking(true)
        .and_then(|()| UnixStream::from_std(ours))
        .map_err(ExecutorError::io("set up the channel"))
}

/// Starts what this very process may have written a moment ago: a fork of another thread can hold the file open for
/// writing until it execs, and the kernel executes nothing that is.
pub(super) fn spawn_written(command: &mut Command) -> std::io::Result<Child> {
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

fn start_message(request: ExecutionRequest) -> Result<wire::Start, ExecutorError> {
    let make = |name: &str| {
        let path = request.scratch.join(name);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(ExecutorError::io(format_args!("make the folder {}", path.display())))?;
        Ok::<_, ExecutorError>(path)
    };
    let scratch = make("init")?;
    let home = make("home")?;
    let temporary = make("tmp")?;
    let mut env = request.env;
    for (name, path) in [("HOME", &home), ("TMPDIR", &temporary)] {
        env.entry(name.to_owned()).or_insert_with(|| path.to_string_lossy().into_owned());
    }
    env.insert("SEALCI_ATTEMPT".to_owned(), request.attempt.to_string());
    env.insert("SEALCI_WORKSPACE".to_owned(), request.workspace.to_string_lossy().into_owned());
    Ok(wire::Start {
        commands: request.commands,
        shell: request.shell.as_str().to_owned(),
        env: env.into_iter().collect(),
        workdir: request.workspace.as_os_str().as_bytes().to_vec(),
        scratch: scratch.as_os_str().as_bytes().to_vec(),
        timeout_ms: Some(u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX)),
        grace_ms: u64::try_from(request.grace.as_millis()).unwrap_or(u64::MAX),
        user: None,
    })
}

struct ProcessEnvironment {
    child: Option<Child>,
    cgroup: Option<Cgroup>,
    attempt: String,
}

#[async_trait]
impl Environment for ProcessEnvironment {
    fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            // An error means that it is gone.
            let _ = child.start_kill();
        }
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
        if let Some(child) = &mut self.child
            && tokio::time::timeout(EXIT_PATIENCE, child.wait()).await.is_err()
        {
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
        let Some(stderr) = self.child.as_mut().and_then(|child| child.stderr.take()) else {
            return String::new();
        };
        read_complaints(stderr.into_owned_fd())
    }
}

/// What stands in a pipe already. Whoever else holds it, nothing is waited for.
pub(super) fn read_complaints(pipe: std::io::Result<OwnedFd>) -> String {
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
