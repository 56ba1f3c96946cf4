//! Says what sandbox to make: the agent writes it to a file, the helper reads it.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::network::Relay;

/// The hidden subcommand with which a binary hands itself over to [`crate::helper_main`]. Its one argument is the path of a
/// [`SandboxSpec`] as JSON.
pub const HELPER_COMMAND: &str = "internal-sandbox";

/// How many user and group ids a sandbox has, from its `id_base` on.
pub const IDS_PER_SANDBOX: u32 = sealci_guest::accounts::IDS;

/// Paths as seen from inside.
pub mod inside {
    /// Where the action's tree is.
    pub const WORKSPACE: &str = "/workspace";
    /// Where the init is, and what it and the shell pass to each other.
    pub const INIT_FOLDER: &str = "/run/sealci";
    pub const INIT: &str = "/run/sealci/sealci-init";
    /// The init's own; see `Start::scratch` of the protocol.
    pub const SCRATCH: &str = "/run/sealci/scratch";
    pub const HOME: &str = "/root";
    pub const TEMPORARY: &str = "/tmp";
}

/// What sandbox to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Unique among those that live; `[A-Za-z0-9_.-]`.
    pub id: String,
    /// The static init on the host.
    pub init: PathBuf,
    /// On the host; `/workspace` inside, to be changed by the action.
    pub workspace: PathBuf,
    /// An existing, empty folder on the host. What the action writes beside its workspace is kept in it.
    pub scratch: PathBuf,
    pub root: RootSpec,
    /// The host's id of root inside; [`IDS_PER_SANDBOX`] from it on belong to this sandbox alone. Without root it is 0:
    /// the helper's own user is all there is, and root in its own eyes.
    pub id_base: u32,
    /// Made by an ordinary user, with a user namespace around all that root would be needed for.
    #[serde(default)]
    pub rootless: bool,
    /// Processes and threads at a time, where no control group of the agent's limits them.
    #[serde(default)]
    pub pids: u64,
    /// Whether mounts map owners. Where they cannot, whoever fills the workspace gives it to whom the action runs as.
    pub maps_owners: bool,
    pub network: NetworkSpec,
    /// What stands between it and its network; none: all that the network reaches may be reached.
    #[serde(default)]
    pub gate: Option<GateSpec>,
    /// More names for this sandbox's own loopback, in `/etc/hosts`.
    #[serde(default)]
    pub names: Vec<String>,
}

/// What is at `/` inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RootSpec {
    /// The host's own programs; the action's home and `/tmp` are in the scratch.
    Host {
        /// More folders and files of the host, seen at the same place inside, read-only.
        extra_paths: Vec<PathBuf>,
        /// How much the throw-away layer over the host's files may hold, in memory.
        layer_bytes: u64,
    },
    Image(ImageRoot),
}

/// An image's tree, with a throw-away layer on top that is kept in the scratch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRoot {
    /// Folders with one unpacked layer each, the lowest first. What is removed or hidden in a layer is told in overlayfs's
    /// own way, in `user.overlay.*` attributes where attributes are needed (`userxattr`).
    pub layers: Vec<PathBuf>,
    pub assembly: Assembly,
    /// Whom the init runs as: `user`, `uid`, `user:group` or `uid:gid` with the image's own names; empty for root.
    pub user: String,
    /// What root inside may do beyond what its files allow. Nobody else may anything.
    #[serde(default)]
    pub capabilities: Vec<Capability>,
}

/// How one tree is made of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Assembly {
    /// By the kernel, in no time.
    Stacked,
    /// It has been made by [`crate::COPY_ARGUMENT`] already.
    Copied,
}

/// The privileges that an image's root may have: none that reaches past the files and processes of its own sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capability {
    Chown,
    DacOverride,
    Fowner,
    Kill,
    Setgid,
    Setuid,
}

impl Capability {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Chown, Self::DacOverride, Self::Fowner, Self::Kill, Self::Setgid, Self::Setuid];

    /// The name in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Chown => "chown",
            Self::DacOverride => "dac_override",
            Self::Fowner => "fowner",
            Self::Kill => "kill",
            Self::Setgid => "setgid",
            Self::Setuid => "setuid",
        }
    }

    /// Reads [`Capability::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|capability| capability.as_str() == name)
    }

    /// As capabilities(7) writes it.
    pub(crate) fn kernel_name(self) -> String {
        format!("CAP_{}", self.as_str().to_uppercase())
    }
}

/// In which network to start what runs a machine, as JSON behind [`crate::MACHINE_ARGUMENT`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// What the machine reaches.
    pub network: NetworkSpec,
    /// As a [`SandboxSpec`]'s.
    #[serde(default)]
    pub gate: Option<GateSpec>,
    /// An existing folder on the host.
    pub scratch: PathBuf,
    /// As a [`SandboxSpec`]'s.
    pub rootless: bool,
}

/// What of its network an environment may reach, and where that is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateSpec {
    pub names: Vec<AllowedName>,
    pub networks: Vec<AllowedNetwork>,
    /// Whom the gate asks for names, from the host's own network.
    pub resolvers: Vec<Ipv4Addr>,
    /// A file that it makes, of [`crate::Reached`].
    pub record: PathBuf,
}

/// Names whose addresses may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedName {
    /// In lower case, without a dot at its end.
    pub name: String,
    /// Not this name, but all below it.
    pub below: bool,
    pub ports: Vec<u16>,
}

/// Addresses that may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllowedNetwork {
    pub address: Ipv4Addr,
    pub prefix_bits: u8,
    pub ports: Vec<u16>,
}

/// What a sandbox reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetworkSpec {
    /// Its own loopback.
    Off,
    /// Outwards, over a link to the host; see [`crate::Uplink`].
    On {
        host_interface: String,
        host_address: Ipv4Addr,
        address: Ipv4Addr,
        /// Whom to ask for names.
        resolvers: Vec<String>,
    },
    /// Outwards, through a program that opens ordinary sockets of the agent's user; what there is without root.
    Relayed {
        relay: Relay,
        /// Whom to ask for names.
        resolvers: Vec<String>,
    },
    /// That of another sandbox, whatever it reaches.
    Joined {
        /// The process id of that one's helper, which whoever started it has not reaped yet.
        helper: u32,
        /// Whom to ask for names.
        resolvers: Vec<String>,
    },
}

impl NetworkSpec {
    /// As it is, but for whom to ask for names.
    #[must_use]
    pub fn asking(mut self, whom: Vec<String>) -> Self {
        match &mut self {
            Self::Off => {}
            Self::On { resolvers, .. } | Self::Relayed { resolvers, .. } | Self::Joined { resolvers, .. } => {
                *resolvers = whom;
            }
        }
        self
    }

    /// Whom to ask for names; none where there is nobody to ask.
    pub fn resolvers(&self) -> &[String] {
        match self {
            Self::Off => &[],
            Self::On { resolvers, .. } | Self::Relayed { resolvers, .. } | Self::Joined { resolvers, .. } => {
                resolvers
            }
        }
    }
}

impl SandboxSpec {
    /// How many ids are mapped into it.
    pub fn ids(&self) -> u32 {
        if self.rootless { 1 } else { IDS_PER_SANDBOX }
    }
}
