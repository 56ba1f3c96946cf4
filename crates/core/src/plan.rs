//! Says what shall be done: the plan that a manifest becomes for one event.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::destination::Destination;
use crate::outcome::Outcome;
use crate::retry::Rules;
use crate::template::Template;

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
    #[serde(default)]
    pub retry: Retry,
    /// Its attempts never overlap.
    #[serde(default)]
    pub exclusive: bool,
    /// Whose artifacts stand in the workspace: indices into [`Plan::actions`], each an ancestor by `needs` that has some.
    pub uses: Vec<usize>,
    /// What runs beside the action. Names are unique.
    pub services: Vec<Service>,
    pub caches: Vec<Cache>,
    pub artifacts: Option<Artifacts>,
    pub reports: Reports,
}

impl PlannedAction {
    /// What decides whether it is tried again.
    pub fn rules(&self) -> Rules {
        Rules { retry: self.retry.clone(), exclusive: self.exclusive }
    }

    /// Whether anything of it is kept by, or brought from, the controller's storage.
    pub fn uses_storage(&self) -> bool {
        !self.uses.is_empty()
            || !self.services.is_empty()
            || !self.caches.is_empty()
            || self.artifacts.is_some()
            || !self.reports.junit.is_empty()
    }
}

/// Which ends of an action are followed by another attempt because its author wishes so.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, Hash)]
pub struct Retry {
    /// So many further attempts in a round; 0: none.
    pub times: u32,
    /// Without doubles.
    pub on: Vec<RetryOn>,
}

impl Retry {
    /// Whether this end is named.
    pub fn covers(&self, outcome: &Outcome) -> bool {
        self.on.iter().any(|on| on.as_str() == outcome.kind())
    }
}

/// An end after which a manifest can wish another attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetryOn {
    Failed,
    Errored,
    TimedOut,
}

impl RetryOn {
    /// All there are, in the order in which people are shown them.
    pub const ALL: [Self; 3] = [Self::Failed, Self::Errored, Self::TimedOut];

    /// The name in manifests; the outcome's.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Errored => "errored",
            Self::TimedOut => "timed_out",
        }
    }

    /// Reads [`RetryOn::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|on| on.as_str() == name)
    }
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
    pub container: Option<Container>,
    /// None: `container` where an image is named, else the agent's default.
    pub executor: Option<ExecutorKind>,
    /// An agent must offer each of these.
    pub labels: BTreeMap<String, String>,
    pub resources: Resources,
    pub network: Network,
}

impl Default for Environment {
    /// What an action gets that says nothing.
    fn default() -> Self {
        Self {
            container: None,
            executor: None,
            labels: BTreeMap::new(),
            resources: Resources::DEFAULT,
            network: Network::default(),
        }
    }
}

impl Environment {
    /// The executor that an agent must offer; none where any agent's default will do.
    pub fn required_executor(&self) -> Option<ExecutorKind> {
        self.executor.or(self.container.as_ref().map(|_| ExecutorKind::Container))
    }
}

/// The image in which something runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// An OCI image reference; its grammar is checked by who pulls it.
    pub image: String,
    pub pull: Pull,
    pub entrypoint: Entrypoint,
    /// `user`, `uid`, `user:group` or `uid:gid`; none: the image's.
    pub user: Option<String>,
}

impl Container {
    /// The image as it is.
    pub fn of(image: impl Into<String>) -> Self {
        Self { image: image.into(), pull: Pull::default(), entrypoint: Entrypoint::default(), user: None }
    }
}

/// When an image's registry is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pull {
    /// When the agent does not have the image.
    #[default]
    IfMissing,
    Always,
    Never,
}

impl Pull {
    /// All there are, in the order in which people are shown them.
    pub const ALL: [Self; 3] = [Self::IfMissing, Self::Always, Self::Never];

    /// The name in manifests and on every wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::IfMissing => "if-missing",
            Self::Always => "always",
            Self::Never => "never",
        }
    }

    /// Reads [`Pull::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pull| pull.as_str() == name)
    }
}

/// What stands in front of what a container runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entrypoint {
    /// Nothing for an action, whose shell is started as it is; the image's for a service.
    #[default]
    Default,
    /// The image's own.
    Image,
    /// These words; none: nothing.
    Words(Vec<String>),
}

/// A container beside an action, in the same network: reached at `localhost` and by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// A host name of one label, in lower case.
    pub name: String,
    pub container: Container,
    /// Words behind the entrypoint; none: the image's.
    pub command: Option<Vec<String>>,
    pub env: BTreeMap<String, String>,
    /// None: it counts as ready when it runs.
    pub ready: Option<Ready>,
}

/// How a service shows that it can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Run by the container's `sh` until it succeeds.
    pub command: String,
    pub timeout: Duration,
}

/// Files that later pipelines find again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cache {
    pub key: Template,
    /// What keys may begin with where `key` itself is not there, the most wanted first. The newest of those is taken.
    pub restore: Vec<Template>,
    /// Files, folders and patterns: in the workspace, below `~/`, or absolute; one that begins with `!` leaves out.
    pub paths: Vec<String>,
}

/// Files that are kept of an action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifacts {
    /// Files, folders and patterns in the workspace; one that begins with `!` leaves out.
    pub paths: Vec<String>,
    pub when: When,
    /// None: as long as the installation keeps them.
    pub keep: Option<Duration>,
}

/// After which end of the commands something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum When {
    #[default]
    Succeeded,
    Failed,
    Always,
}

impl When {
    /// All there are, in the order in which people are shown them.
    pub const ALL: [Self; 3] = [Self::Succeeded, Self::Failed, Self::Always];

    /// The name in manifests and on every wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Always => "always",
        }
    }

    /// Reads [`When::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|when| when.as_str() == name)
    }

    /// Whether it is done after commands that succeeded or did not.
    pub fn holds(self, succeeded: bool) -> bool {
        match self {
            Self::Succeeded => succeeded,
            Self::Failed => !succeeded,
            Self::Always => true,
        }
    }
}

/// What is read of the files that an action leaves.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reports {
    /// Patterns of JUnit's XML files.
    pub junit: Vec<String>,
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
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Network {
    /// Outwards; never the host's loopback nor metadata addresses.
    #[default]
    On,
    /// Its own loopback only.
    Off,
    /// As [`Network::On`], and of that only these.
    Allow(Vec<Destination>),
}

/// Which failures do not count.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
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
