//! Says how a daemon is to make an action's container: the init as its first process, sealed as far as daemons go.

use std::collections::HashMap;
use std::path::Path;

use bollard::models::{
    ContainerCreateBody, HealthConfig, HostConfig, HostConfigCgroupnsModeEnum, HostConfigLogConfig, Mount,
    MountType,
};
use sealci_core::plan::Resources;
use sealci_sandbox::inside;

use super::environment::MARKER;
use crate::executor::ExecutionRequest;

/// Which agent a container or network is of.
pub(super) const AGENT_LABEL: &str = "sealci.agent";
/// Which attempt a container is of.
pub(super) const ATTEMPT_LABEL: &str = "sealci.attempt";

/// The first port that needs no privilege (ip(7)); newer Docker makes it 0 by itself.
const LOWEST_PORT: &str = "net.ipv4.ip_unprivileged_port_start";
/// Of a CPU's time, in microseconds.
const CPU_PERIOD_US: i64 = 100_000;
/// Docker makes no container with less.
const LEAST_MEMORY_BYTES: u64 = 6 << 20;
const LEAST_CPU_QUOTA_US: i64 = 1000;

/// What goes into a recipe beside the request.
#[derive(Debug)]
pub(super) struct Ingredients<'a> {
    pub image: &'a str,
    pub init: &'a Path,
    pub agent: &'a str,
    pub user: &'a str,
    pub pids: u64,
    pub network: &'a Net,
}

/// The network of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Net {
    Off,
    /// Of this name.
    Of(String),
    /// That of the container with this id, and its names.
    Joined(String),
}

impl Net {
    fn mode(&self) -> String {
        match self {
            Self::Off => "none".to_owned(),
            Self::Of(name) => name.clone(),
            Self::Joined(id) => format!("container:{id}"),
        }
    }
}

pub(super) fn labels(agent: &str) -> HashMap<String, String> {
    [(AGENT_LABEL.to_owned(), agent.to_owned())].into()
}

/// The action's container.
pub(super) fn action(request: &ExecutionRequest, ingredients: &Ingredients<'_>) -> ContainerCreateBody {
    let Ingredients { agent, user, network, .. } = *ingredients;
    let attempt = request.attempt.to_string();
    let mut labels = labels(agent);
    labels.insert(ATTEMPT_LABEL.to_owned(), attempt.clone());
    let (memory, quota) = limits(&request.resources);
    let names = request.names.iter().filter(|name| is_host_name(name));
    let names = names.map(|name| format!("{name}:127.0.0.1")).collect();
    let is_joined = matches!(network, Net::Joined(_));
    let sealed = sealed(request, ingredients);
    ContainerCreateBody {
        user: Some(user.to_owned()),
        // The commands have another environment; by this one their init is found.
        env: Some(vec![format!("{MARKER}={attempt}")]),
        cmd: Some(vec!["--stdio".to_owned()]),
        labels: Some(labels),
        attach_stdin: Some(true),
        open_stdin: Some(true),
        // The end of the connection is the end of the standard input.
        stdin_once: Some(true),
        host_config: Some(HostConfig {
            auto_remove: Some(true),
            memory,
            memory_swap: memory,
            cpu_period: quota.map(|_| CPU_PERIOD_US),
            cpu_quota: quota,
            pids_limit: i64::try_from(ingredients.pids).ok(),
            network_mode: Some(network.mode()),
            // May not be given with a network that is joined: Docker's file of names comes with that one, Podman's does not.
            extra_hosts: (!is_joined).then_some(names),
            // Of a network of its own every port is the action's.
            sysctls: (!is_joined).then(|| [(LOWEST_PORT.to_owned(), "0".to_owned())].into()),
            tmpfs: Some(
                [(inside::SCRATCH.to_owned(), "rw,nosuid,nodev,noexec,mode=1777,size=64m".to_owned())].into(),
            ),
            ..sealed.host_config.unwrap_or_default()
        }),
        ..sealed
    }
}

/// A container that changes the workspace's owners.
pub(super) fn courier(request: &ExecutionRequest, ingredients: &Ingredients<'_>) -> ContainerCreateBody {
    let sealed = sealed(request, ingredients);
    let abilities = ["CHOWN", "DAC_OVERRIDE", "FOWNER"];
    ContainerCreateBody {
        user: Some("0:0".to_owned()),
        labels: Some(labels(ingredients.agent)),
        host_config: Some(HostConfig {
            network_mode: Some("none".to_owned()),
            cap_add: Some(abilities.map(str::to_owned).to_vec()),
            ..sealed.host_config.unwrap_or_default()
        }),
        ..sealed
    }
}

/// What all have in common. The seccomp profile is the daemon's own.
fn sealed(request: &ExecutionRequest, ingredients: &Ingredients<'_>) -> ContainerCreateBody {
    let bind = |source: &Path, target: &str, read_only| Mount {
        typ: Some(MountType::BIND),
        source: Some(source.to_string_lossy().into_owned()),
        target: Some(target.to_owned()),
        read_only: Some(read_only),
        ..Mount::default()
    };
    ContainerCreateBody {
        image: Some(ingredients.image.to_owned()),
        entrypoint: Some(vec![inside::INIT.to_owned()]),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        working_dir: Some("/".to_owned()),
        // An image's own would run beside the action.
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".to_owned()]), ..HealthConfig::default() }),
        host_config: Some(HostConfig {
            mounts: Some(vec![
                bind(&request.workspace, inside::WORKSPACE, false),
                bind(ingredients.init, inside::INIT, true),
            ]),
            cap_drop: Some(vec!["ALL".to_owned()]),
            security_opt: Some(vec!["no-new-privileges".to_owned()]),
            cgroupns_mode: Some(HostConfigCgroupnsModeEnum::PRIVATE),
            ipc_mode: Some("private".to_owned()),
            // The log is taken as it comes; the daemon would keep it once more.
            log_config: Some(HostConfigLogConfig { typ: Some("none".to_owned()), config: None }),
            ..HostConfig::default()
        }),
        ..ContainerCreateBody::default()
    }
}

/// Bytes of memory, and microseconds of each period; none where nothing was reserved.
fn limits(resources: &Resources) -> (Option<i64>, Option<i64>) {
    let memory = (resources.memory_bytes > 0).then(|| resources.memory_bytes.max(LEAST_MEMORY_BYTES));
    let quota = resources.cpu_millis.saturating_mul(100);
    (
        memory.and_then(|bytes| i64::try_from(bytes).ok()),
        (quota > 0).then(|| i64::try_from(quota).unwrap_or(i64::MAX).max(LEAST_CPU_QUOTA_US)),
    )
}

fn is_host_name(name: &str) -> bool {
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_is_the_limit() {
        let limits_of = |cpu_millis, memory_bytes| limits(&Resources { cpu_millis, memory_bytes });
        assert_eq!(limits_of(2500, 1 << 30), (Some(1 << 30), Some(250_000)));
        assert_eq!(limits_of(1, 1), (Some(6 << 20), Some(1000)));
        assert_eq!(limits_of(0, 0), (None, None));
    }

    #[test]
    fn names_are_host_names() {
        assert!(is_host_name("db-1.local"));
        for name in ["", "a b", "a\nb", "a:b"] {
            assert!(!is_host_name(name), "{name:?}");
        }
    }
}
