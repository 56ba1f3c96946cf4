//! Describes the container to libcontainer, as an OCI runtime specification.
//!
//! What is made elsewhere is absent here: the root's mounts (`staging`), the network namespace (the helper's own is
//! inherited), the user namespace (joined by its path), control groups (the agent's; this process is in them), seccomp
//! (applied in the executor: this build of libcontainer ignores a `seccomp` section without a word).

use std::path::Path;

use serde_json::{Value, json};

use crate::spec::{RootSpec, SandboxSpec, inside};
use crate::staging::User;

/// What of `/proc` tells of the host or changes it.
const MASKED: [&str; 10] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What is known once the root stands.
pub struct Bundle<'a> {
    pub spec: &'a SandboxSpec,
    pub root: &'a Path,
    /// Whom the init runs as.
    pub user: &'a User,
    pub user_namespace: &'a Path,
    /// How many processes there are at a time, where no control group limits them.
    pub processes: Option<u64>,
}

/// The runtime specification (OCI runtime-spec 1.0.2).
pub fn config(bundle: &Bundle<'_>) -> Value {
    let Bundle { spec, root, user, user_namespace, processes } = *bundle;
    let mut terminals = vec!["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"];
    if spec.ids() > 5 {
        // The group `tty`, which the kernel refuses where it is not mapped.
        terminals.push("gid=5");
    }
    // A core would be piped to the host's handler. The other limits are inherited: a hard one cannot be raised.
    let mut limits = vec![json!({"type": "RLIMIT_CORE", "hard": 0, "soft": 0})];
    // What another user than root is let alone would be lost by the change of user.
    let capabilities: Vec<String> = match &spec.root {
        RootSpec::Image(image) if user.uid == 0 => {
            image.capabilities.iter().map(|capability| capability.kernel_name()).collect()
        }
        _ => Vec::new(),
    };
    if let Some(pids) = processes {
        limits.push(json!({"type": "RLIMIT_NPROC", "hard": pids, "soft": pids}));
    }
    json!({
        "ociVersion": "1.0.2",
        "hostname": spec.id.chars().take(63).collect::<String>(),
        "root": {"path": root, "readonly": false},
        "process": {
            "terminal": false,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
            "args": [inside::INIT],
            "cwd": "/",
            // The executor passes none on. Without it libcontainer would look for a home in the image's own `/etc/passwd`,
            // whatever that is: a pipe, say.
            "env": ["HOME=/"],
            // Nothing is handed down to another user.
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "inheritable": [], "ambient": [],
            },
            "rlimits": limits,
            "noNewPrivileges": true,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": terminals},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "user", "path": user_namespace},
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"},
            ],
            // Never the group of anybody: see `cgroups`, where also this is made to lead nowhere.
            "cgroupsPath": format!("/sealci-unused-{}", spec.id),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}
