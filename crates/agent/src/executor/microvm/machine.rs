//! Starts the monitor for one machine, and keeps it until the machine is over.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use sealci_core::outcome::Limit;
use sealci_core::plan::Resources;
use sealci_guest::wire::machine as inside;
use sealci_microvm::scratch;
use sealci_vmm::machine::MAX_VCPUS;
use tokio::net::UnixStream;
use tokio_util::sync::DropGuard;

use super::network::Link;
use super::services::Berth;
use crate::executor::cgroup::{Cgroups, Limits};
use crate::executor::environment::{Group, HostEnvironment};
use crate::executor::init::{Environment, Machine, Opening, Prepared};
use crate::executor::{ExecutionRequest, ExecutorError, gate};

/// What the monitor itself may take beside the machine's memory: a few MiB, and what the kernel keeps for it.
const MONITOR_BYTES: u64 = 64 << 20;
/// The monitor's threads: one for each virtual CPU, and a few more.
const MONITOR_PIDS: u64 = 128;
/// Less does not hold a kernel and what it unpacks.
const LEAST_MEBIBYTES: u64 = 128;
/// Where the init calls.
const PORT: u32 = 1024;

/// What machines are made of.
pub(super) struct Recipe {
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// A squashfs; none where the machine comes up and does nothing.
    pub root: Option<PathBuf>,
    pub disk_bytes: u64,
    pub cgroups: Option<Cgroups>,
}

impl Recipe {
    /// The monitor's command line.
    fn arguments(&self, resources: &Resources, disks: &[OsString], services: &[Berth]) -> Vec<OsString> {
        let mebibytes = (resources.memory_bytes >> 20).max(LEAST_MEBIBYTES);
        let vcpus = resources.cpu_millis.div_ceil(1000).clamp(1, u64::from(MAX_VCPUS));
        let mut arguments: Vec<OsString> = vec!["--end-with-stdin".into()];
        for (name, value) in [
            ("--kernel", self.kernel.clone().into_os_string()),
            ("--initramfs", self.initramfs.clone().into_os_string()),
            ("--memory-mib", mebibytes.to_string().into()),
            ("--vcpus", vcpus.to_string().into()),
            ("--vsock", format!("{PORT}=-").into()),
            ("--command-line-extra", format!("{}={PORT}", inside::PORT_KEY).into()),
        ] {
            arguments.extend([name.into(), value]);
        }
        for disk in disks {
            arguments.extend(["--disk".into(), disk.clone()]);
        }
        for (service, berth) in services.iter().enumerate() {
            let mut end = OsString::from(format!("{}=", inside::service_port(PORT, service)));
            end.push(&berth.socket);
            arguments.extend(["--vsock".into(), end]);
        }
        arguments
    }

    /// Starts the monitor. Its machine comes up by itself. Blocks.
    fn start(
        &self,
        name: String,
        resources: &Resources,
        disks: &[OsString],
        services: &[Berth],
        link: Option<&Link>,
    ) -> Result<(UnixStream, HostEnvironment), ExecutorError> {
        let limits = Limits {
            memory_bytes: resources.memory_bytes.max(LEAST_MEBIBYTES << 20) + MONITOR_BYTES,
            ..Limits::of(resources, MONITOR_PIDS)
        };
        let (mut program, mut arguments) = (self.vmm.clone(), self.arguments(resources, disks, services));
        if let Some(link) = link {
            (program, arguments) = link.around(&program, arguments)?;
        }
        let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
        let cgroup = self.cgroups.as_ref().map(|groups| groups.create(&name, &limits));
        let group = cgroup.transpose().map_err(ExecutorError::Cgroup)?.map_or(Group::None, Group::Own);
        HostEnvironment::spawn(&program, &arguments, group, name)
    }
}

/// What is asked of one machine.
pub(super) struct Wanted {
    pub request: ExecutionRequest,
    pub start: Opening,
    /// Whom the action runs as, in the words of images.
    pub user: String,
    pub link: Option<Link>,
    /// What is beside the action.
    pub services: Vec<Berth>,
    /// Cancelled when it is over.
    pub over: DropGuard,
}

/// Starts an action's machine, with a disk of its own to write to. Blocks.
pub(super) fn prepare(recipe: &Recipe, wanted: Wanted) -> Result<Prepared, ExecutorError> {
    let Wanted { request, start, user, link, services, over } = wanted;
    let (timeout, grace) = (request.timeout, request.grace);
    let mut disks = Vec::new();
    if let Some(root) = &recipe.root {
        let written = request.scratch.join("disk");
        scratch::make(&written, recipe.disk_bytes)
            .map_err(|error| ExecutorError::io("make the machine's disk")(io::Error::other(error)))?;
        disks = vec![read_only(root), written.into_os_string()];
    }
    disks.extend(services.iter().map(|berth| read_only(&berth.root)));
    let name = request.attempt.to_string();
    let (channel, host) = recipe.start(name, &request.resources, &disks, &services, link.as_ref())?;
    let machine = Machine {
        host_name: "sealci".to_owned(),
        names: request.names,
        network: link.as_ref().map(Link::inside),
        workspace: request.workspace,
        user,
        services: services.into_iter().map(|berth| berth.user).collect(),
    };
    let record = link.as_ref().and_then(|link| link.spec.gate.clone());
    let environment =
        Box::new(MachineEnvironment { host, machine, link, ran_out_of_memory: false, _over: over });
    let environment = gate::told(environment, record.as_ref(), &request.notes);
    Ok(Prepared { channel, start, environment, timeout, grace })
}

/// A disk that nobody can write.
fn read_only(root: &Path) -> OsString {
    let mut disk = root.to_owned().into_os_string();
    disk.push(":ro");
    disk
}

/// Runs a machine without anything in it until its init calls. Blocks.
pub(super) fn probe(recipe: &Recipe, patience: Duration) -> Result<(), ExecutorError> {
    let resources = Resources { cpu_millis: 1000, memory_bytes: LEAST_MEBIBYTES << 20 };
    let failed = |error| ExecutorError::io("run a machine")(error);
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
    ours.set_read_timeout(Some(patience)).map_err(failed)?;
    let mut monitor = Command::new(&recipe.vmm)
        .args(recipe.arguments(&resources, &[], &[]))
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let called = ours.read_exact(&mut [0]);
    let _ = monitor.kill();
    let output = monitor.wait_with_output().map_err(failed)?;
    let complaint = match called {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            format!("its guest did not come up within {} s; `sealci doctor` says more", patience.as_secs())
        }
        Err(_) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    };
    Err(ExecutorError::Helper { doing: "run a machine", complaint })
}

struct MachineEnvironment {
    /// The monitor, or the helper around it.
    host: HostEnvironment,
    machine: Machine,
    /// None: it reaches nothing.
    link: Option<Link>,
    ran_out_of_memory: bool,
    _over: DropGuard,
}

#[async_trait]
impl Environment for MachineEnvironment {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn machine(&self) -> Option<Machine> {
        Some(self.machine.clone())
    }

    fn kill(&mut self) {
        if self.link.as_ref().is_some_and(|link| link.spec.rootless) {
            // The helper kills all that it holds together, and ends behind it.
            self.host.terminate();
        } else {
            self.host.kill();
        }
    }

    fn ran_out_of_memory(&mut self) {
        self.ran_out_of_memory = true;
    }

    fn limit_reached(&self) -> Option<Limit> {
        if self.ran_out_of_memory { Some(Limit::Memory) } else { self.host.limit_reached() }
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        // Nothing of the machine is wanted any more, its own way down neither.
        self.kill();
        self.host.clear(orderly).await
    }

    fn complaints(&mut self) -> String {
        self.host.complaints()
    }
}
