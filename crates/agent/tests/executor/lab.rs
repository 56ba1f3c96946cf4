//! Gives each test an executor, folders, and a record of what an execution told.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealci_agent::executor::cgroup::{Cgroups, Layout};
use sealci_agent::executor::container::{ContainerExecutor, ContainerOptions};
use sealci_agent::executor::helper::HelperCommand;
use sealci_agent::executor::microvm::{MicrovmExecutor, MicrovmOptions};
use sealci_agent::executor::process::ProcessExecutor;
use sealci_agent::executor::sandbox::SandboxExecutor;
use sealci_agent::executor::sealed::{Sealer, SealerOptions};
use sealci_agent::executor::{Execution, ExecutionEvent, ExecutionRequest, Executor, Notes, ShellKind};
use sealci_core::ids::{ActionId, AttemptId};
use sealci_core::outcome::Outcome;
use sealci_core::plan::{Container, Network, Resources};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::images::TestImages;

/// Longer than anything here takes, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Enough for everything here, and a small fork bomb.
pub const PIDS: u64 = 300;

/// Tells a test that runs as an ordinary user of the outside that root has made: the host's address and the outside's.
pub const GIVEN: &str = "SEALCI_TEST_OUTSIDE";

/// Where the outside is, once it is made.
pub fn outside_address() -> Ipv4Addr {
    if let Ok(given) = std::env::var(GIVEN) {
        return given.split_once(' ').unwrap().1.parse().unwrap();
    }
    let number = u8::try_from(std::process::id() % 200).unwrap();
    Ipv4Addr::new(198, 18, number, 2)
}

/// An executor and room to work in.
pub struct Lab {
    pub executor: Box<dyn Executor>,
    pub folder: TempDir,
    /// Whether limits are enforced.
    pub limits: bool,
    pub cgroup_folders: Vec<PathBuf>,
    /// Under which its control groups are found again.
    pub instance: String,
    /// What the sandbox shows as an extra path.
    pub shown: TempDir,
    /// What `container` runs.
    pub images: Arc<TestImages>,
    /// Variables for this test's own processes.
    pub given: Vec<(&'static str, String)>,
}

impl Lab {
    /// The bare `process` executor: what works without root.
    pub fn process() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let executor = Box::new(ProcessExecutor::new(folder.path(), None).unwrap());
        Some(Self::of(executor, folder, None))
    }

    /// `process` within control groups.
    pub fn process_in_cgroup() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let (cgroups, cgroup_folders, instance) = cgroups("root")?;
        let executor = Box::new(ProcessExecutor::new(folder.path(), Some(cgroups)).unwrap().with_pids(PIDS));
        Some(Self::of(executor, folder, Some((cgroup_folders, instance))))
    }

    /// `sandbox`, for the tests that try to break out of it.
    pub fn sealed() -> Option<Self> {
        Self::sandbox()
    }

    /// `sandbox`, as root.
    pub fn sandbox() -> Option<Self> {
        Self::sandbox_with_network(false)
    }

    /// `sandbox` with a way outwards.
    pub fn networked() -> Option<Self> {
        Self::sandbox_with_network(true)
    }

    /// `sandbox` on a file system that knows no mapped owners.
    pub fn unmapped() -> Option<Self> {
        let lab = Self::sandbox_in(unmapped_folder()?, false, PIDS);
        assert!(lab.is_none() || !sealci_sandbox::maps_owners(lab.as_ref()?.folder.path(), 1 << 20));
        lab
    }

    fn sandbox_with_network(network: bool) -> Option<Self> {
        Self::sandbox_with(network, PIDS)
    }

    pub fn sandbox_with(network: bool, pids: u64) -> Option<Self> {
        Self::sandbox_in(TempDir::new().unwrap(), network, pids)
    }

    fn sandbox_in(folder: TempDir, network: bool, pids: u64) -> Option<Self> {
        let (sealer, groups) = sealer_in(&folder, network, pids)?;
        let shown = TempDir::new().unwrap();
        std::fs::write(shown.path().join("tool"), "a tool\n").unwrap();
        let executor = Box::new(SandboxExecutor::new(sealer, vec![shown.path().to_owned()]));
        let mut lab = Self::of(executor, folder, Some(groups));
        lab.shown = shown;
        Some(lab)
    }

    /// `container`, as root.
    pub fn container() -> Option<Self> {
        Self::container_with(TempDir::new().unwrap(), ContainerOptions::default(), false)
    }

    /// `container` with a way outwards.
    pub fn container_networked() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let (sealer, groups) = sealer_in(&folder, true, PIDS)?;
        let images = Arc::new(TestImages::new());
        let executor = ContainerExecutor::new(sealer, images.clone(), ContainerOptions::default()).unwrap();
        let mut lab = Self::of(Box::new(executor), folder, Some(groups));
        lab.images = images;
        Some(lab)
    }

    /// `container`, for the tests that try to break out of it.
    pub fn container_sealed() -> Option<Self> {
        Self::container()
    }

    /// `container` where layers are copied and mounts map owners.
    pub fn container_copied() -> Option<Self> {
        let options = ContainerOptions { copies_layers: true, ..ContainerOptions::default() };
        Self::container_with(TempDir::new().unwrap(), options, true)
    }

    /// `container` on a file system that knows no mapped owners, and of which no overlay can be made.
    pub fn container_unmapped() -> Option<Self> {
        let lab = Self::container_with(unmapped_folder()?, ContainerOptions::default(), true)?;
        assert!(!sealci_sandbox::maps_owners(lab.folder.path(), 1 << 20));
        Some(lab)
    }

    /// `container` whose root may do a little more.
    pub fn container_capable() -> Option<Self> {
        let capabilities = sealci_sandbox::Capability::ALL.to_vec();
        let options = ContainerOptions { capabilities, ..ContainerOptions::default() };
        Self::container_with(TempDir::new().unwrap(), options, false)
    }

    fn container_with(folder: TempDir, options: ContainerOptions, copies: bool) -> Option<Self> {
        let (sealer, groups) = sealer_in(&folder, false, PIDS)?;
        let images = Arc::new(TestImages::new());
        let executor = Box::new(ContainerExecutor::new(sealer, images.clone(), options).unwrap());
        assert_eq!(executor.stacking_problem().is_some(), copies, "{:?}", executor.stacking_problem());
        let mut lab = Self::of(executor, folder, Some(groups));
        lab.images = images;
        Some(lab)
    }

    /// `container` with a real store of images.
    pub fn container_stored() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let (sealer, groups) = sealer_in(&folder, false, PIDS)?;
        let store = Arc::new(TestImages::stored(folder.path()));
        let executor = ContainerExecutor::new(sealer, store, ContainerOptions::default()).unwrap();
        Some(Self::of(Box::new(executor), folder, Some(groups)))
    }

    /// `microvm`, where machines run, with a network for those who ask for it. Each machine boots.
    pub fn microvm() -> Option<Self> {
        // An image's root is made once for all tests.
        Self::microvm_with(|_| (shared_roots(), 0))
    }

    /// `microvm` whose machines go on from others, and which has seen none yet.
    pub fn microvm_with_templates() -> Option<Self> {
        Self::microvm_with(|folder| {
            let roots = roots_of(folder);
            std::fs::create_dir(&roots).unwrap();
            for entry in std::fs::read_dir(shared_roots()).into_iter().flatten().flatten() {
                if entry.path().extension().is_some_and(|extension| extension == "squashfs") {
                    std::fs::copy(entry.path(), roots.join(entry.file_name())).unwrap();
                }
            }
            (roots, 1 << 30)
        })
    }

    /// With where roots and templates are, and how much the templates may take.
    fn microvm_with(places: impl FnOnce(&Path) -> (PathBuf, u64)) -> Option<Self> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        let Some(kernel) = std::env::var_os("SEALCI_TEST_KERNEL") else {
            skip("kvm", &name, "`cargo xtask vm-test` runs it, in a guest that runs machines");
            return None;
        };
        let folder = TempDir::new().unwrap();
        let (cgroups, cgroup_folders, instance) = cgroups("root")?;
        let sealer = sealer_of(&folder, cgroups.clone(), true, PIDS);
        let (roots, templates_budget_bytes) = places(folder.path());
        let options = MicrovmOptions {
            kernel: Some(kernel.into()),
            modules: std::env::var_os("SEALCI_TEST_MODULES").map(PathBuf::from),
            roots: Some(roots),
            templates_budget_bytes,
            disk_bytes: 256 << 20,
            ..MicrovmOptions::default()
        };
        let images = Arc::new(TestImages::new());
        let executor =
            MicrovmExecutor::new(folder.path(), images.clone(), Some(cgroups), Some(sealer), &options)
                .unwrap();
        let mut lab = Self::of(Box::new(executor), folder, Some((cgroup_folders, instance)));
        lab.images = images;
        Some(lab)
    }

    /// With control groups where there are some: their folders, and the instance under which they are found again.
    pub fn of(executor: Box<dyn Executor>, folder: TempDir, groups: Option<(Vec<PathBuf>, String)>) -> Self {
        let limits = groups.is_some();
        let (cgroup_folders, instance) = groups.unwrap_or_else(|| (Vec::new(), "none".to_owned()));
        let (shown, images) = (TempDir::new().unwrap(), Arc::new(TestImages::empty()));
        Self { executor, folder, limits, cgroup_folders, instance, shown, images, given: Vec::new() }
    }

    pub fn request<C: Into<String>>(&self, commands: impl IntoIterator<Item = C>) -> ExecutionRequest {
        request_in(self.folder.path(), commands)
    }

    pub async fn start(&self, request: ExecutionRequest) -> Execution {
        self.executor.prepare(request).await.unwrap().begin()
    }

    /// Runs a request to its end.
    pub async fn run(&self, request: ExecutionRequest) -> Record {
        let attempt = request.attempt;
        let mut execution = self.start(request).await;
        let record = Record::of(&mut execution).await;
        assert_eq!(record.remains, None);
        assert_eq!(processes_of(attempt), Vec::<String>::new(), "processes outlive Finished");
        record
    }

    pub async fn run_commands<C: Into<String>>(&self, commands: impl IntoIterator<Item = C>) -> Record {
        self.run(self.request(commands)).await
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Empty unless an executor left something behind, which its own test finds.
        for folder in &self.cgroup_folders {
            let _ = std::fs::remove_dir(folder);
        }
        // An error unless something is mounted there.
        let _ = nix::mount::umount2(self.folder.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

fn shared_roots() -> PathBuf {
    std::env::temp_dir().join("sealci-test-roots")
}

/// Where a lab of its own has machines' roots and templates.
pub fn roots_of(folder: &Path) -> PathBuf {
    folder.join("roots")
}

/// A folder on a file system that knows no mapped owners.
fn unmapped_folder() -> Option<TempDir> {
    let folder = TempDir::new().unwrap();
    let mounted = Command::new("mount").args(["-t", "ramfs", "sealci-test"]).arg(folder.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: a file system can be mounted by root only");
        return None;
    }
    Some(folder)
}

/// What seals for root, and where its control groups are.
fn sealer_in(folder: &TempDir, network: bool, pids: u64) -> Option<(Sealer, (Vec<PathBuf>, String))> {
    let (cgroups, cgroup_folders, instance) = cgroups("root")?;
    Some((sealer_of(folder, cgroups, network, pids), (cgroup_folders, instance)))
}

fn sealer_of(folder: &TempDir, cgroups: Cgroups, network: bool, pids: u64) -> Sealer {
    // As the agent's own folder is.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
    let program = env!("CARGO_BIN_EXE_sealci-sandbox-helper").into();
    let helper = HelperCommand { program, arguments: Vec::new() };
    let resolvers = Some(vec![outside_address()]);
    let options = SealerOptions { helper, pids, network, relay: None, resolvers };
    let sealer = Sealer::new(folder.path(), cgroups, options).unwrap();
    assert_eq!(sealer.network_problem().is_none(), network, "{:?}", sealer.network_problem());
    sealer
}

/// Says loudly what was not tested, and why; `cargo xtask test` lists it at its end. Fails where `SEALCI_REQUIRE` names the
/// capability.
pub fn skip(capability: &str, test: &str, why: &str) {
    let required = std::env::var("SEALCI_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name.trim() == capability), "{test} needs {capability}: {why}");
    eprintln!("SKIPPED: {test}: {why}");
    if let Some(path) = std::env::var_os("SEALCI_SKIPS") {
        use std::io::Write;
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{test}: {why}").unwrap();
    }
}

/// Control groups for one lab; none where this user, who lacks this capability then, may not make any.
pub fn cgroups(capability: &str) -> Option<(Cgroups, Vec<PathBuf>, String)> {
    let instance = format!("test-{}", random_action());
    let opened = Layout::detect().and_then(|layout| Cgroups::open(layout, &instance));
    match opened {
        Ok(cgroups) => {
            let folders = cgroup_folders(&instance);
            assert!(!folders.is_empty());
            Some((cgroups, folders, instance))
        }
        Err(error) => {
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            skip(capability, &test, &format!("control groups cannot be used here: {error}"));
            None
        }
    }
}

pub fn cgroup_folders(instance: &str) -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let mut candidates = vec![root.to_owned()];
    candidates.extend(std::fs::read_dir(root).unwrap().flatten().map(|entry| entry.path()));
    // A user's stand in the group that was given to that user, below which this process may have moved.
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    if !own.is_empty() {
        candidates.push(root.join(own).parent().unwrap().to_owned());
        candidates.push(root.join(own));
    }
    candidates.sort();
    candidates.dedup();
    candidates
        .into_iter()
        .map(|path| path.join(format!("sealci-{instance}")))
        .filter(|path| path.exists())
        .collect()
}

pub fn random_action() -> ActionId {
    ActionId::from_parts(1_700_000_000_000, &rand::random())
}

/// A request with fresh folders below `folder`.
pub fn request_in<C: Into<String>>(folder: &Path, commands: impl IntoIterator<Item = C>) -> ExecutionRequest {
    let attempt = AttemptId { action: random_action(), number: 1 };
    let make = |kind: &str| {
        let path = folder.join(kind).join(attempt.to_string());
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    ExecutionRequest {
        attempt,
        commands: commands.into_iter().map(Into::into).collect(),
        shell: ShellKind::Sh,
        env: BTreeMap::new(),
        workspace: make("workspaces"),
        scratch: make("scratch"),
        container: Some(Container::of(TestImages::TOOLS)),
        notes: Notes::default(),
        stop: CancellationToken::new(),
        resources: Resources { cpu_millis: 2000, memory_bytes: 1 << 30 },
        network: Network::Off,
        neighbourhood: None,
        service: None,
        services: Vec::new(),
        names: Vec::new(),
        timeout: PATIENCE,
        grace: Duration::from_secs(5),
        stays: false,
    }
}

/// What an execution told.
#[derive(Debug, Default)]
pub struct Record {
    pub output: Vec<u8>,
    pub commands: Vec<CommandRecord>,
    /// What the commands came to, where the environment was kept.
    pub over: Option<Outcome>,
    pub outcome: Option<Outcome>,
    pub remains: Option<String>,
    /// Output events, for judging their number.
    pub pieces: usize,
}

#[derive(Debug)]
pub struct CommandRecord {
    pub start: u64,
    pub end: Option<u64>,
    pub exit_code: Option<i32>,
    pub duration: Duration,
    pub cpu: Duration,
    pub memory_peak_bytes: u64,
}

impl Record {
    /// Takes all events to the end, and checks that their order and offsets hold.
    pub async fn of(execution: &mut Execution) -> Self {
        let mut record = Self::default();
        let deadline = tokio::time::Instant::now() + PATIENCE;
        while let Some(event) =
            tokio::time::timeout_at(deadline, execution.next()).await.expect("the execution ends in time")
        {
            record.take(event);
        }
        assert!(record.outcome.is_some(), "the stream ends with Finished: {record:?}");
        record
    }

    pub fn take(&mut self, event: ExecutionEvent) {
        assert_eq!(self.outcome, None, "nothing comes after Finished: {event:?}");
        let length = self.output.len() as u64;
        match event {
            ExecutionEvent::Started => assert!(self.commands.is_empty()),
            ExecutionEvent::Output(bytes) => {
                assert!(!bytes.is_empty());
                self.pieces += 1;
                self.output.extend_from_slice(&bytes);
            }
            ExecutionEvent::CommandStarted { index, log_offset } => {
                assert_eq!(index as usize, self.commands.len());
                assert!(self.commands.last().is_none_or(|command| command.end.is_some()));
                assert_eq!(log_offset, length);
                self.commands.push(CommandRecord {
                    start: log_offset,
                    end: None,
                    exit_code: None,
                    duration: Duration::ZERO,
                    cpu: Duration::ZERO,
                    memory_peak_bytes: 0,
                });
            }
            ExecutionEvent::CommandFinished { index, exit_code, duration, log_offset, resource_use } => {
                assert_eq!(index as usize + 1, self.commands.len());
                assert_eq!(log_offset, length);
                let command = self.commands.last_mut().unwrap();
                assert_eq!(command.end, None);
                command.end = Some(log_offset);
                command.exit_code = Some(exit_code);
                command.duration = duration;
                command.cpu = resource_use.cpu_user + resource_use.cpu_system;
                command.memory_peak_bytes = resource_use.memory_peak_bytes;
            }
            ExecutionEvent::Over { outcome } => {
                assert_eq!(self.over, None);
                self.over = Some(outcome);
            }
            ExecutionEvent::Finished { outcome, remains } => {
                assert!(self.over.as_ref().is_none_or(|over| *over == outcome), "{:?} stands", self.over);
                self.outcome = Some(outcome);
                self.remains = remains;
            }
        }
    }

    pub fn outcome(&self) -> &Outcome {
        self.outcome.as_ref().unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// What was written while a command ran.
    pub fn output_of(&self, index: usize) -> String {
        let command = &self.commands[index];
        let end = command.end.expect("the command finished");
        String::from_utf8_lossy(&self.output[command.start as usize..end as usize]).into_owned()
    }

    pub fn exit_codes(&self) -> Vec<Option<i32>> {
        self.commands.iter().map(|command| command.exit_code).collect()
    }
}

/// Takes events until the output so far holds `text`.
pub async fn until_output(execution: &mut Execution, text: &str) -> Record {
    let mut record = Record::default();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !record.text().contains(text) {
        let event = tokio::time::timeout_at(deadline, execution.next())
            .await
            .unwrap_or_else(|_| panic!("no `{text}` in time: {record:?}"));
        record.take(event.unwrap_or_else(|| panic!("no `{text}` in {record:?}")));
    }
    record
}

/// The command lines of all processes that carry the attempt's name in their environment. Zombies have none.
pub fn processes_of(attempt: AttemptId) -> Vec<String> {
    let marker = format!("SEALCI_ATTEMPT={attempt}");
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let environ = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if environ.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes()) {
            let command_line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command_line = String::from_utf8_lossy(&command_line).replace('\0', " ");
            found.push(format!("{} {command_line}", entry.file_name().to_string_lossy()));
        }
    }
    found
}

/// Waits for something that no event tells of.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
