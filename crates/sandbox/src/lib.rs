//! Seals one action: the helper process that makes an environment from the host's own files or from an image's, and
//! puts `sealci-init` in it.
//!
//! The agent starts its own binary once more as this helper ([`helper_main`]), because a container's processes cannot be
//! cloned safely from a process with threads. The helper lives as long as the sandbox:
//!
//! ```text
//! agent ── spawns ──▶ helper                                     sealci-init (PID 1 inside)
//!   │                   │ own mount and network namespace             ▲
//!   │                   │ stages the root: tmpfs, overlays, binds     │
//!   │                   └ libcontainer: user, pid, ipc, uts, cgroup ──┘
//!   └────────────── channel: the helper's and the init's standard input ┘
//! ```
//!
//! Without root the helper is two processes, and what root would be needed for happens in a user namespace; see `rootless`.
//!
//! Invariants: everything made here hangs on the helper's namespaces, so that its and the init's end takes it down, however
//! they end; the init dies with the helper, and ends by itself when the agent closes the channel; nothing of the host is
//! visible inside but what [`SandboxSpec`] and the short lists in `staging` name; what is inside has no capability, in any
//! namespace, and the host knows its root as a user that owns nothing; libcontainer never sees a control group (`cgroups`
//! says why that matters more than it seems).

pub mod birth;
mod bundle;
mod cgroups;
mod helper;
mod network;
pub mod reached;
mod rootless;
mod seccomp;
mod spec;
mod staging;
mod sys;

pub use helper::{COPY_ARGUMENT, IMAGE_PROBE_ARGUMENT, MACHINE_ARGUMENT, helper_main};
pub use network::{GATE_ADDRESS, Relay, RelayError, RelayKind, Uplink, UplinkError, host_resolvers, machine};
pub use reached::Reached;
pub use rootless::{PROBE_ARGUMENT, Probe};
pub use spec::{
    AllowedName, AllowedNetwork, Assembly, Capability, GateSpec, HELPER_COMMAND, IDS_PER_SANDBOX, ImageRoot,
    MachineSpec, NetworkSpec, RootSpec, SandboxSpec, inside,
};
pub use staging::{ImageProbe, User, UserError, give_away, maps_owners};
