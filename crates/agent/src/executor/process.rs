//! Runs actions as plain processes of this host: limited and ended for sure where control groups may be used, isolated never.
//!
//! Only for those who trust what they run: an action sees what the agent's user sees. What it starts cannot outlive it, for
//! its init takes in every orphan; an action that kills its own init is ended by its control group or, without one, by
//! looking for its `SEALCI_ATTEMPT` in every process's environment.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use sealci_core::plan::ExecutorKind;
use sealci_guest::wire;
use tokio_util::task::TaskTracker;

use super::cgroup::{Cgroups, Limits};
use super::environment::{DEFAULT_PIDS, Group, HostEnvironment, Running, blocking, stand_by};
use super::init::{self, Prepared};
use super::programs;
use super::{ExecutionRequest, Executor, ExecutorError, Standby, gate};

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
        let init = programs::install(data_dir, programs::INIT)?;
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

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        request.refuse_service(self.kind())?;
        gate::refuse(&request, self.kind())?;
        let guard = self.running.enter(request.attempt)?;
        let (init, cgroups, pids) = (self.init.clone(), self.cgroups.clone(), self.pids);
        let making = move || prepare(&init, cgroups.as_ref(), pids, request);
        stand_by(&self.tasks, blocking(making), guard).await
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

fn prepare(
    init: &Path,
    cgroups: Option<&Cgroups>,
    pids: u64,
    request: ExecutionRequest,
) -> Result<Prepared, ExecutorError> {
    let attempt = request.attempt.to_string();
    let (timeout, grace) = (request.timeout, request.grace);
    let limits = Limits::of(&request.resources, pids);
    let start = init::encoded(start_message(request)?)?;
    let cgroup =
        cgroups.map(|groups| groups.create(&attempt, &limits)).transpose().map_err(ExecutorError::Cgroup)?;
    let group = cgroup.map_or(Group::None, Group::Own);
    let (channel, environment) = HostEnvironment::spawn(init, &[], group, attempt)?;
    Ok(Prepared { channel, start, environment: Box::new(environment), timeout, grace })
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
        stays: request.stays,
        ..wire::Start::default()
    })
}
