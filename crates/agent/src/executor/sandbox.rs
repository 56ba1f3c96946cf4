//! Seals actions on this host's own programs, without images and without a daemon.
//!
//! Each action has a helper process (`sealci_sandbox`), which makes its namespaces, mounts and filters, and puts the init
//! in. What is made hangs on these processes and on the action's control group; so the end of the one and the removal of
//! the other leave nothing, also after an agent that was killed. Without root it hangs on the helper's PID namespace; see
//! `rootless`.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use sealci_core::plan::{ExecutorKind, Network};
use sealci_guest::wire;
use sealci_sandbox::{
    HELPER_COMMAND, IDS_PER_SANDBOX, NetworkSpec, Relay, RelayKind, SandboxSpec, Uplink, inside,
};
use tokio_util::task::TaskTracker;

use super::cgroup::{Cgroups, Limits};
use super::environment::{DEFAULT_PIDS, Gift, HostEnvironment, Running, blocking, stand_by};
use super::init::{self, Environment, Prepared};
use super::rootless::{self, RootlessEnvironment};
use super::{ExecutionRequest, Executor, ExecutorError, Standby};
use crate::causes::with_causes;

/// The ids that systemd leaves to containers; user databases keep clear of them.
const ID_RANGE: std::ops::Range<u32> = 524_288..1_879_048_192;

/// How to start the helper.
#[derive(Debug, Clone)]
pub struct HelperCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

impl HelperCommand {
    /// This very program's hidden subcommand; its `main` passes that on to [`sealci_sandbox::helper_main`].
    pub fn of_this_program() -> Self {
        // What runs, even if a newer version has taken its place on disk.
        Self { program: PathBuf::from("/proc/self/exe"), arguments: vec![HELPER_COMMAND.into()] }
    }
}

/// What an installation may choose.
#[derive(Debug, Clone)]
pub struct SandboxOptions {
    pub helper: HelperCommand,
    /// Folders and files of the host that actions see, read-only, at the same place: a toolchain, say.
    pub extra_paths: Vec<PathBuf>,
    /// Processes and threads of an action at a time.
    pub pids: u64,
    /// Whether actions that ask for it reach outwards.
    pub network: bool,
    /// What carries their traffic where the agent is not root's; none chooses by itself.
    pub relay: Option<RelayKind>,
}

impl Default for SandboxOptions {
    fn default() -> Self {
        Self {
            helper: HelperCommand::of_this_program(),
            extra_paths: Vec::new(),
            pids: DEFAULT_PIDS,
            network: true,
            relay: None,
        }
    }
}

/// The executor that seals.
#[derive(Debug)]
pub struct SandboxExecutor {
    init: PathBuf,
    cgroups: Option<Cgroups>,
    options: SandboxOptions,
    way_out: Result<WayOut, String>,
    rootless: bool,
    ids: IdRanges,
    /// Whether mounts of the data folder's file system can map owners.
    maps_owners: bool,
    tasks: TaskTracker,
    running: Running,
}

impl SandboxExecutor {
    /// `data_dir` takes the init. This process must be root's. Where there can be no way outwards, all else works; see
    /// [`SandboxExecutor::network_problem`].
    pub fn new(data_dir: &Path, cgroups: Cgroups, options: SandboxOptions) -> Result<Self, ExecutorError> {
        let way_out =
            way_out(&options, || Uplink::open().map(WayOut::Link).map_err(|error| with_causes(&error)));
        Self::with(data_dir, Some(cgroups), options, way_out, false)
    }

    /// As [`SandboxExecutor::new`], for an ordinary user: actions see the host's programs read-only, and without `cgroups`
    /// nothing but the number of their processes is limited. Fails where this machine lets that user make no sandbox.
    pub fn rootless(
        data_dir: &Path,
        cgroups: Option<Cgroups>,
        options: SandboxOptions,
    ) -> Result<Self, ExecutorError> {
        let probe = rootless::probe(&options.helper)?;
        let way_out = way_out(&options, || {
            let relay = Relay::find(options.relay).map_err(|error| with_causes(&error))?;
            probe.network.map_or(Ok(WayOut::Relay(relay)), Err)
        });
        Self::with(data_dir, cgroups, options, way_out, true)
    }

    fn with(
        data_dir: &Path,
        cgroups: Option<Cgroups>,
        options: SandboxOptions,
        way_out: Result<WayOut, String>,
        rootless: bool,
    ) -> Result<Self, ExecutorError> {
        let init = init::install(data_dir)?;
        Ok(Self {
            init,
            cgroups,
            options,
            way_out,
            rootless,
            ids: IdRanges::default(),
            maps_owners: !rootless && sealci_sandbox::maps_owners(data_dir, ID_RANGE.start),
            tasks: TaskTracker::new(),
            running: Running::default(),
        })
    }

    /// Why actions cannot reach outwards, where they cannot; for a person.
    pub fn network_problem(&self) -> Option<&str> {
        self.way_out.as_ref().err().map(String::as_str)
    }

    fn network(&self, network: Network, slot: u32) -> Result<NetworkSpec, ExecutorError> {
        let uplink = match (network, &self.way_out) {
            (Network::Off, _) => return Ok(NetworkSpec::Off),
            (Network::On, Ok(WayOut::Link(uplink))) => uplink,
            (Network::On, Ok(WayOut::Relay(relay))) => return Ok(relay.link()),
            (Network::On, Err(problem)) => {
                return Err(ExecutorError::Unsupported(format!(
                    "this agent has no network for sandboxes: {problem}; an action that needs none says `network: off`"
                )));
            }
        };
        uplink.link(slot).ok_or_else(|| {
            ExecutorError::Unsupported(
                "this agent has no network address left for another sandbox".to_owned(),
            )
        })
    }
}

/// How sandboxes reach outwards.
#[derive(Debug)]
enum WayOut {
    Link(Uplink),
    Relay(Relay),
}

fn way_out(
    options: &SandboxOptions,
    open: impl FnOnce() -> Result<WayOut, String>,
) -> Result<WayOut, String> {
    if options.network { open() } else { Err("this agent's configuration does not allow it".to_owned()) }
}

#[async_trait]
impl Executor for SandboxExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Sandbox
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        let guard = self.running.enter(request.attempt)?;
        let ids = self.ids.take()?;
        let id_base = (!self.rootless).then(|| ids.base());
        let network = self.network(request.network, ids.slot)?;
        let (init, cgroups, options) = (self.init.clone(), self.cgroups.clone(), self.options.clone());
        let maps_owners = self.maps_owners;
        let making = move || prepare(init, cgroups.as_ref(), options, id_base, maps_owners, network, request);
        stand_by(&self.tasks, making, (guard, ids)).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        let Some(cgroups) = self.cgroups.clone() else { return Ok(()) };
        blocking(move || cgroups.sweep().map_err(ExecutorError::Cgroup)).await
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

fn prepare(
    init: PathBuf,
    cgroups: Option<&Cgroups>,
    options: SandboxOptions,
    id_base: Option<u32>,
    maps_owners: bool,
    network: NetworkSpec,
    request: ExecutionRequest,
) -> Result<Prepared, ExecutorError> {
    let attempt = request.attempt.to_string();
    let (timeout, grace) = (request.timeout, request.grace);
    let limits = Limits::of(&request.resources, options.pids);
    let scratch = request.scratch.join("sandbox");
    fs::create_dir(&scratch)
        .map_err(ExecutorError::io(format_args!("make the folder {}", scratch.display())))?;
    let spec = SandboxSpec {
        id: attempt.clone(),
        init,
        workspace: request.workspace.clone(),
        scratch,
        extra_paths: options.extra_paths,
        id_base: id_base.unwrap_or(0),
        rootless: id_base.is_none(),
        pids: options.pids,
        maps_owners,
        // It is memory of the action's, and limited as such.
        layer_bytes: request.resources.memory_bytes,
        network,
    };
    let description = request.scratch.join("sandbox.json");
    let text = serde_json::to_vec(&spec).map_err(|error| ExecutorError::Unsupported(error.to_string()))?;
    fs::write(&description, text)
        .map_err(ExecutorError::io(format_args!("write {}", description.display())))?;
    let gift = id_base.filter(|_| !maps_owners).map(|id| Gift { folder: request.workspace.clone(), id });
    let start = init::encoded(start_message(request))?;
    let cgroup =
        cgroups.map(|groups| groups.create(&attempt, &limits)).transpose().map_err(ExecutorError::Cgroup)?;
    let mut arguments: Vec<&OsStr> = options.helper.arguments.iter().map(OsString::as_os_str).collect();
    arguments.push(description.as_os_str());
    let (channel, environment) =
        HostEnvironment::spawn(&options.helper.program, &arguments, cgroup, attempt)?;
    let environment = environment.give(gift);
    let environment: Box<dyn Environment> = match id_base {
        Some(_) => Box::new(environment),
        None => Box::new(RootlessEnvironment(environment)),
    };
    Ok(Prepared { channel, start, environment, timeout, grace })
}

fn start_message(request: ExecutionRequest) -> wire::Start {
    let mut env = request.env;
    for (name, path) in [("HOME", inside::HOME), ("TMPDIR", inside::TEMPORARY)] {
        env.entry(name.to_owned()).or_insert_with(|| path.to_owned());
    }
    env.insert("SEALCI_ATTEMPT".to_owned(), request.attempt.to_string());
    env.insert("SEALCI_WORKSPACE".to_owned(), inside::WORKSPACE.to_owned());
    wire::Start {
        commands: request.commands,
        shell: request.shell.as_str().to_owned(),
        env: env.into_iter().collect(),
        workdir: inside::WORKSPACE.into(),
        scratch: inside::SCRATCH.into(),
        timeout_ms: Some(u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX)),
        grace_ms: u64::try_from(request.grace.as_millis()).unwrap_or(u64::MAX),
        stays: request.stays,
        ..wire::Start::default()
    }
}

/// Gives every sandbox that lives user ids of its own.
#[derive(Debug, Clone, Default)]
struct IdRanges(Arc<Mutex<BTreeSet<u32>>>);

impl IdRanges {
    fn take(&self) -> Result<IdRange, ExecutorError> {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slots = (ID_RANGE.end - ID_RANGE.start) / IDS_PER_SANDBOX;
        let free = (0..slots).find(|slot| !taken.contains(slot));
        let slot = free.ok_or_else(|| {
            ExecutorError::Unsupported(format!(
                "{slots} sandboxes are running, and there are no more user ids"
            ))
        })?;
        taken.insert(slot);
        Ok(IdRange { ranges: self.clone(), slot })
    }
}

/// One sandbox's ids, until it is dropped.
#[derive(Debug)]
struct IdRange {
    ranges: IdRanges,
    slot: u32,
}

impl IdRange {
    fn base(&self) -> u32 {
        ID_RANGE.start + self.slot * IDS_PER_SANDBOX
    }
}

impl Drop for IdRange {
    fn drop(&mut self) {
        self.ranges.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.slot);
    }
}
