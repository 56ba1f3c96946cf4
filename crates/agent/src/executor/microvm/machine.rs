//! Starts the monitor for one machine, and keeps it until the machine is over.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use async_trait::async_trait;
use sealci_core::outcome::Limit;
use sealci_core::plan::Resources;
use sealci_guest::wire::machine as inside;
use sealci_vmm::machine::MAX_VCPUS;

use crate::executor::cgroup::{Cgroups, Limits};
use crate::executor::environment::{Group, HostEnvironment};
use crate::executor::init::{Environment, Machine, Opening, Prepared};
use crate::executor::{ExecutionRequest, ExecutorError};

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
    pub root: PathBuf,
    pub cgroups: Option<Cgroups>,
}

impl Recipe {
    /// The monitor's command line.
    fn arguments(&self, resources: &Resources) -> Vec<OsString> {
        let mebibytes = (resources.memory_bytes >> 20).max(LEAST_MEBIBYTES);
        let vcpus = resources.cpu_millis.div_ceil(1000).clamp(1, u64::from(MAX_VCPUS));
        let mut root = self.root.clone().into_os_string();
        root.push(":ro");
        let mut arguments: Vec<OsString> = Vec::new();
        for (name, value) in [
            ("--kernel", self.kernel.clone().into_os_string()),
            ("--initramfs", self.initramfs.clone().into_os_string()),
            ("--memory-mib", mebibytes.to_string().into()),
            ("--vcpus", vcpus.to_string().into()),
            ("--disk", root),
            ("--vsock", format!("{PORT}=-").into()),
            ("--command-line-extra", format!("{}={PORT}", inside::PORT_KEY).into()),
        ] {
            arguments.extend([name.into(), value]);
        }
        arguments
    }
}

/// Starts the monitor. Its machine comes up by itself. Blocks.
pub(super) fn prepare(
    recipe: &Recipe,
    request: ExecutionRequest,
    start: Opening,
) -> Result<Prepared, ExecutorError> {
    let (timeout, grace) = (request.timeout, request.grace);
    let attempt = request.attempt.to_string();
    let arguments = recipe.arguments(&request.resources);
    let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
    let limits = Limits {
        memory_bytes: request.resources.memory_bytes.max(LEAST_MEBIBYTES << 20) + MONITOR_BYTES,
        ..Limits::of(&request.resources, MONITOR_PIDS)
    };
    let cgroup = recipe.cgroups.as_ref().map(|groups| groups.create(&attempt, &limits));
    let group = cgroup.transpose().map_err(ExecutorError::Cgroup)?.map_or(Group::None, Group::Own);
    let (channel, host) = HostEnvironment::spawn(&recipe.vmm, &arguments, group, attempt)?;
    let environment = Box::new(MachineEnvironment { host, request });
    Ok(Prepared { channel, start, environment, timeout, grace })
}

struct MachineEnvironment {
    /// The monitor.
    host: HostEnvironment,
    request: ExecutionRequest,
}

#[async_trait]
impl Environment for MachineEnvironment {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn machine(&self) -> Option<Machine> {
        Some(Machine {
            host_name: "sealci".to_owned(),
            names: self.request.names.clone(),
            workspace: self.request.workspace.clone(),
        })
    }

    fn kill(&mut self) {
        self.host.kill();
    }

    fn limit_reached(&self) -> Option<Limit> {
        self.host.limit_reached()
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        // Nothing of the machine is wanted any more, its own way down neither.
        self.host.kill();
        self.host.clear(orderly).await
    }

    fn complaints(&mut self) -> String {
        self.host.complaints()
    }
}
