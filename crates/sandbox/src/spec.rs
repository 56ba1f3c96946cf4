//! Says what sandbox to make: the agent writes it to a file, the helper reads it.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::network::Relay;

/// The hidden subcommand with which a binary hands itself over to [`crate::helper_main`]. Its one argument is the path of a
/// [`SandboxSpec`] as JSON.
pub const HELPER_COMMAND: &str = "internal-sandbox";

/// How many user and group ids a sandbox has, from its `id_base` on.
pub const IDS_PER_SANDBOX: u32 = 65536;

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
    /// An existing, empty folder on the host. The action's home and `/tmp` are kept in it.
    pub scratch: PathBuf,
    /// More folders and files of the host, seen at the same place inside, read-only.
    pub extra_paths: Vec<PathBuf>,
    /// The host's id of root inside; [`IDS_PER_SANDBOX`] from it on belong to this sandbox alone. Without root it is 0:
    /// the helper's own user is all there is, and root in its own eyes.
    pub id_base: u32,
    /// Made by an ordinary user, with a user namespace around all that root would be needed for.
    #[serde(default)]
    pub rootless: bool,
    /// Processes and threads at a time, where no control group of the agent's limits them.
    #[serde(default)]
    pub pids: u64,
    /// Whether mounts map owners. Where they cannot, whoever fills the workspace gives it to `id_base`.
    pub maps_owners: bool,
    /// How much the throw-away layer over the host's files may hold, in memory.
    pub layer_bytes: u64,
    pub network: NetworkSpec,
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
}

impl NetworkSpec {
    /// Whom to ask for names; none where there is nobody to ask.
    pub fn resolvers(&self) -> &[String] {
        match self {
            Self::Off => &[],
            Self::On { resolvers, .. } | Self::Relayed { resolvers, .. } => resolvers,
        }
    }
}

impl SandboxSpec {
    /// How many ids are mapped into it.
    pub fn ids(&self) -> u32 {
        if self.rootless { 1 } else { IDS_PER_SANDBOX }
    }
}
