//! Says what shall be done: the plan that a manifest becomes for one event.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A manifest, checked and made explicit: defaults filled in, names resolved, the graph acyclic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    /// In the order of the manifest. Names are unique.
    pub actions: Vec<PlannedAction>,
}

/// One action of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedAction {
    pub name: String,
    /// Indices into [`Plan::actions`], ascending, without doubles, never a cycle.
    pub needs: Vec<usize>,
    /// At least one.
    pub commands: Vec<String>,
    /// What runs the commands, all of them in one.
    pub shell: Shell,
    /// The pipeline's and the action's variables; the action's win.
    pub env: BTreeMap<String, String>,
    pub environment: Environment,
    /// From the start of the first command.
    pub timeout: Duration,
    pub allow_failure: AllowFailure,
}

/// The shell in which an action's commands run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shell {
    #[default]
    Sh,
    Bash,
}

impl Shell {
    /// All there are, in the order in which people are shown them.
    pub const ALL: [Self; 2] = [Self::Sh, Self::Bash];

    /// The name in manifests and on every wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sh => "sh",
            Self::Bash => "bash",
        }
    }

    /// Reads [`Shell::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|shell| shell.as_str() == name)
    }
}

/// What an action asks of the machine that runs it: `configuration` in the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// An OCI image reference.
    pub container: Option<String>,
    /// None: `container` where an image is named, else the agent's default.
    pub executor: Option<ExecutorKind>,
    /// An agent must offer each of these.
    pub labels: BTreeMap<String, String>,
    pub resources: Resources,
    pub network: Network,
}

impl Environment {
    /// The executor that an agent must offer; none where any agent's default will do.
    pub fn required_executor(&self) -> Option<ExecutorKind> {
        self.executor.or(self.container.as_ref().map(|_| ExecutorKind::Container))
    }
}

/// What runs an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecutorKind {
    Process,
    Sandbox,
    Container,
    Docker,
    Microvm,
    Fake,
}

impl ExecutorKind {
    /// All there are, in the order in which people are shown them.
    pub const ALL: [Self; 6] =
        [Self::Process, Self::Sandbox, Self::Container, Self::Docker, Self::Microvm, Self::Fake];

    /// The name in manifests and on every wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Sandbox => "sandbox",
            Self::Container => "container",
            Self::Docker => "docker",
            Self::Microvm => "microvm",
            Self::Fake => "fake",
        }
    }

    /// Reads [`ExecutorKind::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// An amount of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu_millis: u64,
    pub memory_bytes: u64,
}

impl Resources {
    /// What an action gets that names nothing: one CPU, 1 GiB.
    pub const DEFAULT: Self = Self { cpu_millis: 1000, memory_bytes: 1 << 30 };

    /// Whether all of `wanted` is here.
    pub fn fits(&self, wanted: &Self) -> bool {
        wanted.cpu_millis <= self.cpu_millis && wanted.memory_bytes <= self.memory_bytes
    }

    /// What is left without `taken`; never below 0.
    pub fn minus(&self, taken: &Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_sub(taken.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_sub(taken.memory_bytes),
        }
    }

    /// Both together.
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
        }
    }
}

/// What an action may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Outwards; never the host's loopback nor metadata addresses.
    #[default]
    On,
    /// Its own loopback only.
    Off,
}

/// Which failures do not count.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllowFailure {
    #[default]
    Never,
    Always,
    ExitCodes(Vec<i32>),
}

impl AllowFailure {
    /// Whether an action that failed with this code counts as passed.
    pub fn allows(&self, exit_code: i32) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::ExitCodes(codes) => codes.contains(&exit_code),
        }
    }
}
