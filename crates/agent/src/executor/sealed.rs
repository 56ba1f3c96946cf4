//! Makes the sealed environments of an agent's executors: what those on the host's own programs and those on an image have
//! in common.
//!
//! Each action has a helper process (`sealci_sandbox`), which makes its namespaces, mounts and filters, and puts the init
//! in. What is made hangs on these processes and on the action's control group; so the end of the one and the removal of
//! the other leave nothing, also after an agent that was killed. Without root it hangs on the helper's PID namespace; see
//! `rootless`.
//!
//! Invariant: no two environments that live have a user id in common, whichever executor made them; so an agent has one
//! [`Sealer`] for all.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sealci_core::plan::Network;
use sealci_guest::wire;
use sealci_sandbox::{
    GATE_ADDRESS, GateSpec, IDS_PER_SANDBOX, MachineSpec, NetworkSpec, Relay, RelayKind, RootSpec,
    SandboxSpec, Uplink, User, inside, machine,
};
use tokio_util::task::TaskTracker;

use super::cgroup::{Cgroups, Limits};
use super::environment::{
    DEFAULT_PIDS, Gift, Group, HostEnvironment, Running, RunningGuard, blocking, stand_by,
};
use super::helper::HelperCommand;
use super::init::{self, Environment, Prepared};
use super::neighbourhood::{Home, Neighbourhood};
use super::programs;
use super::rootless::{self, RootlessEnvironment};
use super::{ExecutionRequest, ExecutorError, Standby, gate};
use crate::causes::with_causes;

/// The ids that systemd leaves to containers; user databases keep clear of them.
pub(super) const ID_RANGE: std::ops::Range<u32> = 524_288..1_879_048_192;

/// What an installation may choose for all that is sealed.
#[derive(Debug, Clone)]
pub struct SealerOptions {
    pub helper: HelperCommand,
    /// Processes and threads of an action at a time.
    pub pids: u64,
    /// Whether actions that ask for it reach outwards.
    pub network: bool,
    /// What carries their traffic where the agent is not root's; none chooses by itself.
    pub relay: Option<RelayKind>,
    /// Whom to ask for names on behalf of those that are held to a list; none: this machine's own name servers.
    pub resolvers: Option<Vec<Ipv4Addr>>,
}

impl Default for SealerOptions {
    fn default() -> Self {
        let helper = HelperCommand::of_this_program();
        Self { helper, pids: DEFAULT_PIDS, network: true, relay: None, resolvers: None }
    }
}

/// Makes sealed environments. Its copies are one.
#[derive(Debug, Clone)]
pub struct Sealer(Arc<Means>);

#[derive(Debug)]
struct Means {
    data_dir: PathBuf,
    init: PathBuf,
    cgroups: Option<Cgroups>,
    options: SealerOptions,
    way_out: Result<WayOut, String>,
    rootless: bool,
    ids: IdRanges,
    /// Whether mounts of the data folder's file system can map owners.
    maps_owners: bool,
    running: Running,
}

/// How sealed environments reach outwards.
#[derive(Debug)]
enum WayOut {
    Link(Uplink),
    Relay(Relay),
}

fn way_out(options: &SealerOptions, open: impl FnOnce() -> Result<WayOut, String>) -> Result<WayOut, String> {
    if options.network { open() } else { Err("this agent's configuration does not allow it".to_owned()) }
}

impl Sealer {
    /// `data_dir` takes the init. This process must be root's. Where there can be no way outwards, all else works; see
    /// [`Sealer::network_problem`].
    pub fn new(data_dir: &Path, cgroups: Cgroups, options: SealerOptions) -> Result<Self, ExecutorError> {
        let way_out =
            way_out(&options, || Uplink::open().map(WayOut::Link).map_err(|error| with_causes(&error)));
        Self::with(data_dir, Some(cgroups), options, way_out, false)
    }

    /// As [`Sealer::new`], for an ordinary user: actions see the host's programs read-only and have one user id, and
    /// without `cgroups` nothing but the number of their processes is limited. Fails where this machine lets that user seal
    /// nothing.
    pub fn rootless(
        data_dir: &Path,
        cgroups: Option<Cgroups>,
        options: SealerOptions,
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
        options: SealerOptions,
        way_out: Result<WayOut, String>,
        rootless: bool,
    ) -> Result<Self, ExecutorError> {
        let init = programs::install(data_dir, programs::INIT)?;
        Ok(Self(Arc::new(Means {
            data_dir: data_dir.to_owned(),
            init,
            cgroups,
            options,
            way_out,
            rootless,
            ids: IdRanges::default(),
            maps_owners: !rootless && sealci_sandbox::maps_owners(data_dir, ID_RANGE.start),
            running: Running::default(),
        })))
    }

    /// Why actions cannot reach outwards, where they cannot; for a person.
    pub fn network_problem(&self) -> Option<&str> {
        self.0.way_out.as_ref().err().map(String::as_str)
    }

    pub(super) fn data_dir(&self) -> &Path {
        &self.0.data_dir
    }

    pub(super) fn helper(&self) -> &HelperCommand {
        &self.0.options.helper
    }

    /// Ends and removes what an earlier process of this agent left behind.
    pub(super) async fn sweep(&self) -> Result<(), ExecutorError> {
        let Some(cgroups) = self.0.cgroups.clone() else { return Ok(()) };
        blocking(move || cgroups.sweep().map_err(ExecutorError::Cgroup)).await
    }

    /// Keeps a place for an attempt.
    pub(super) fn reserve(&self, request: &ExecutionRequest) -> Result<Place, ExecutorError> {
        // A service's name is the plan's to keep apart.
        let is_action = request.service.is_none();
        let guard = is_action.then(|| self.0.running.enter(request.attempt)).transpose()?;
        let ids = self.0.ids.take()?;
        let (network, gate) = match request.neighbourhood.as_ref().and_then(Neighbourhood::home) {
            // Whoever made it has the gate, if there is one.
            Some(Home::Helper(joined)) => (joined, None),
            Some(Home::Container(_) | Home::Machine(_)) | None => {
                let resolvers =
                    self.0.options.resolvers.clone().unwrap_or_else(sealci_sandbox::host_resolvers);
                (self.network(&request.network, ids.slot)?, gate::spec(request, &resolvers))
            }
        };
        Ok(Place { sealer: self.clone(), network, gate, ids, _guard: guard })
    }

    fn network(&self, network: &Network, slot: u32) -> Result<NetworkSpec, ExecutorError> {
        let uplink = match (network, &self.0.way_out) {
            (Network::Off, _) => return Ok(NetworkSpec::Off),
            (_, Ok(WayOut::Link(uplink))) => uplink,
            (_, Ok(WayOut::Relay(relay))) => return Ok(relay.link()),
            (_, Err(problem)) => {
                return Err(ExecutorError::Unsupported(format!(
                    "this agent has no network for sandboxes and machines: {problem}; an action that needs none says `network: off`"
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

/// What one attempt has of the agent until it is over: user ids, an address, and that it runs once.
#[derive(Debug)]
pub(super) struct Place {
    sealer: Sealer,
    network: NetworkSpec,
    gate: Option<GateSpec>,
    ids: IdRange,
    _guard: Option<RunningGuard>,
}

impl Place {
    /// What network there is for who makes the rest by other means, and runs a machine in it.
    pub fn for_machine(&self, request: &ExecutionRequest) -> MachineSpec {
        MachineSpec {
            network: self.network_asking(machine::GATEWAY),
            gate: self.gate.clone(),
            scratch: request.scratch.clone(),
            rootless: self.sealer.0.rootless,
        }
    }

    /// The network, in which a gate is asked for names, if there is one, at this address.
    fn network_asking(&self, gate: Ipv4Addr) -> NetworkSpec {
        let network = self.network.clone();
        if self.gate.is_some() { network.asking(vec![gate.to_string()]) } else { network }
    }

    /// Says what is to be made for the attempt.
    pub fn spec(&self, request: &ExecutionRequest, root: RootSpec) -> SandboxSpec {
        let means = &self.sealer.0;
        SandboxSpec {
            id: request.environment_name(),
            init: means.init.clone(),
            workspace: request.workspace.clone(),
            scratch: request.scratch.join("sandbox"),
            root,
            id_base: if means.rootless { 0 } else { self.ids.base() },
            rootless: means.rootless,
            pids: means.options.pids,
            maps_owners: means.maps_owners,
            network: self.network_asking(GATE_ADDRESS),
            gate: self.gate.clone(),
            names: request.names.clone(),
        }
    }

    /// Has it made.
    pub async fn stand_by(
        self,
        tasks: &TaskTracker,
        sealed: Sealed,
        kept: impl Send + 'static,
    ) -> Result<Standby, ExecutorError> {
        let sealer = self.sealer.clone();
        stand_by(tasks, blocking(move || sealer.prepare(sealed)), (self, kept)).await
    }
}

/// What to make, and what to run in it.
#[derive(Debug)]
pub(super) struct Sealed {
    pub request: ExecutionRequest,
    pub spec: SandboxSpec,
    /// Whom the workspace is given to where mounts cannot map owners, in ids as seen from inside.
    pub owner: User,
    pub start: wire::Start,
}

/// Where a spec is written for the helper.
pub(super) fn write_description(
    request: &ExecutionRequest,
    spec: &SandboxSpec,
) -> Result<PathBuf, ExecutorError> {
    let description = request.scratch.join("sandbox.json");
    let text = serde_json::to_vec(spec).map_err(|error| ExecutorError::Unsupported(error.to_string()))?;
    fs::create_dir_all(&spec.scratch)
        .map_err(ExecutorError::io(format_args!("make the folder {}", spec.scratch.display())))?;
    fs::write(&description, text)
        .map_err(ExecutorError::io(format_args!("write {}", description.display())))?;
    Ok(description)
}

impl Sealer {
    fn prepare(&self, sealed: Sealed) -> Result<Prepared, ExecutorError> {
        let Means { cgroups, options, rootless, maps_owners, .. } = &*self.0;
        let Sealed { request, spec, owner, start } = sealed;
        let (timeout, grace) = (request.timeout, request.grace);
        let description = write_description(&request, &spec)?;
        let gift = (!rootless && !maps_owners).then(|| Gift {
            folder: request.workspace.clone(),
            user: spec.id_base + owner.uid,
            group: spec.id_base + owner.gid,
        });
        let start = init::encoded(start)?;
        let limits = Limits::of(&request.resources, options.pids);
        let group = match (cgroups, &request.service) {
            (None, _) => Group::None,
            (Some(groups), Some(_)) => Group::Guest(groups.of(&request.attempt.to_string())),
            (Some(groups), None) => {
                Group::Own(groups.create(&spec.id, &limits).map_err(ExecutorError::Cgroup)?)
            }
        };
        let mut arguments: Vec<&OsStr> = options.helper.arguments.iter().map(OsString::as_os_str).collect();
        arguments.push(description.as_os_str());
        let (channel, environment) =
            HostEnvironment::spawn(&options.helper.program, &arguments, group, spec.id.clone())?;
        if let (Some(neighbourhood), false) =
            (&request.neighbourhood, matches!(spec.network, NetworkSpec::Joined { .. }))
        {
            let helper = environment.process().map_err(ExecutorError::io("find the helper"))?;
            let resolvers = spec.network.resolvers().to_vec();
            neighbourhood.found(Home::Helper(NetworkSpec::Joined { helper, resolvers }));
        }
        let has_guests = request.neighbourhood.is_some() && request.service.is_none();
        let environment = environment.give(gift).with_guests(has_guests);
        let environment: Box<dyn Environment> =
            if *rootless { Box::new(RootlessEnvironment(environment)) } else { Box::new(environment) };
        let environment = gate::told(environment, spec.gate.as_ref(), &request.notes);
        Ok(Prepared { channel, start, environment, timeout, grace })
    }
}

/// What the init is told, with the commands' variables but for those that every environment has.
pub(super) fn start_message(
    request: &ExecutionRequest,
    variables: impl IntoIterator<Item = (String, String)>,
) -> wire::Start {
    let mut env: BTreeMap<_, _> = variables.into_iter().collect();
    env.entry("TMPDIR".to_owned()).or_insert_with(|| inside::TEMPORARY.to_owned());
    env.insert("SEALCI_ATTEMPT".to_owned(), request.attempt.to_string());
    env.insert("SEALCI_WORKSPACE".to_owned(), inside::WORKSPACE.to_owned());
    wire::Start {
        commands: request.commands.clone(),
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
