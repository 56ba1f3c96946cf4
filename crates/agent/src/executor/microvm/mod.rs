//! Runs each action in a machine of its own, behind hardware virtualization: the image's files as a disk that is only read, and
//! nothing of the host.
//!
//! ```text
//!   image ──▶ squashfs ──┐
//!   kernel, init ──▶ RAM disk ──▶ sealci-vmm, in a control group ⇄ channel ⇄ conversation
//! ```
//!
//! The channel is the monitor's standard input: it joins the port that the machine's init calls with that, and ends when the
//! channel does, also when this process is killed. The workspace goes in through the channel, and what is wanted of it comes
//! out the same way. What an action with a network reaches is what it would reach in a sandbox (see `network`). An action's
//! services live in its machine (see `services`). Whom programs run as is looked up by the machine's init, in the image.

mod machine;
mod network;
mod services;
mod template;

use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use machine::{Recipe, Wanted, prepare};
use network::Link;
use sealci_core::plan::{Container, ExecutorKind, Network};
use sealci_guest::wire::{self, machine as inside};
use sealci_image::{Image, ImageConfig, StoreOptions};
use sealci_microvm::initramfs::{Initramfs, InitramfsStore};
use sealci_microvm::kernel::{FOR_MACHINE, Kernel, KernelError, KernelStore, UnpackError, Unpacked};
use sealci_microvm::root::{Root, RootError, RootStore};
use sealci_microvm::scratch::Blank;
use services::{Companion, Share, check_room};
use template::Templates;
use tokio_util::task::TaskTracker;

use super::cgroup::Cgroups;
use super::container::wrapper;
use super::environment::{Running, blocking, stand_by};
use super::init::Prepared;
use super::neighbourhood::{Home, Neighbourhood};
use super::sealed::{Place, Sealer};
use super::{ExecutionRequest, Executor, ExecutorError, Images, ServiceRole, Standby, init, programs};

pub(super) use services::Company;

/// What a machine may write, where nothing else is said. It takes room as it is written.
pub const DEFAULT_DISK_BYTES: u64 = 16 << 30;

/// What an installation may choose.
#[derive(Debug, Clone)]
pub struct MicrovmOptions {
    /// A bzImage, or what was extracted from one; none: the host's best.
    pub kernel: Option<PathBuf>,
    /// The folder with its modules; none: the host's for its release.
    pub modules: Option<PathBuf>,
    /// Where images' root file systems are kept, which agents may share; none: below the agent's data folder.
    pub roots: Option<PathBuf>,
    /// How much of the disk these may take; those used longest ago go first.
    pub roots_budget_bytes: u64,
    /// How much of the same disk machines may take that were saved for others to go on from; 0: each machine boots.
    pub templates_budget_bytes: u64,
    /// What a machine may write to its disk.
    pub disk_bytes: u64,
}

impl Default for MicrovmOptions {
    fn default() -> Self {
        Self {
            kernel: None,
            modules: None,
            roots: None,
            roots_budget_bytes: StoreOptions::default().budget_bytes,
            templates_budget_bytes: StoreOptions::default().budget_bytes,
            disk_bytes: DEFAULT_DISK_BYTES,
        }
    }
}

/// The executor that runs machines.
#[derive(Debug)]
pub struct MicrovmExecutor {
    means: Arc<Means>,
    images: Arc<dyn Images>,
    sealer: Option<Sealer>,
    /// None: each machine boots.
    templates: Option<Arc<Templates>>,
    running: Running,
    tasks: TaskTracker,
}

/// What all machines of an agent have in common.
#[derive(Debug)]
struct Means {
    vmm: PathBuf,
    kernel: Kernel,
    /// The kernel without its packing, with which a machine starts sooner; none where it boots only as it is.
    unpacked: Option<Unpacked>,
    initramfs: Initramfs,
    roots: RootStore,
    roots_budget_bytes: u64,
    /// What each machine's disk is a copy of.
    blank: Blank,
    cgroups: Option<Cgroups>,
}

impl Means {
    fn kernel_file(&self) -> &Path {
        self.unpacked.as_ref().map_or(&*self.kernel.image, Unpacked::path)
    }
}

impl MicrovmExecutor {
    /// `data_dir` takes the monitor and the machines' disks; of `sealer` machines have their network, where it has one. Finds the
    /// kernel, and packs its modules. Whether this machine runs machines is told by nothing but running one: see
    /// [`MicrovmExecutor::probe`]. Blocks.
    pub fn new(
        data_dir: &Path,
        images: Arc<dyn Images>,
        cgroups: Option<Cgroups>,
        sealer: Option<Sealer>,
        options: &MicrovmOptions,
    ) -> Result<Self, ExecutorError> {
        let vmm = programs::install(data_dir, programs::VMM)?;
        let kernel = match &options.kernel {
            Some(path) => Kernel::at(path, options.modules.as_deref()),
            None => Kernel::find(Path::new("/boot"), Path::new("/lib/modules")),
        };
        let kernel = kernel.map_err(unusable_kernel)?;
        let modules = kernel.modules(FOR_MACHINE).map_err(unusable_kernel)?;
        let folder = data_dir.join("machines");
        let unpacked = unpack(&folder, &kernel.image, &vmm)?;
        let initramfs = InitramfsStore::open(&folder)
            .and_then(|store| {
                let initramfs = store.obtain(programs::INIT.bytes, &modules)?;
                // Former inits' and kernels'.
                store.clear()?;
                Ok(initramfs)
            })
            .map_err(|error| failed("make the machines' initial RAM disk", error))?;
        let shared = options.roots.as_deref().unwrap_or(&folder);
        let roots = RootStore::open(shared).map_err(unusable_root)?;
        let MicrovmOptions { roots_budget_bytes, templates_budget_bytes, disk_bytes, .. } = *options;
        let blank =
            Blank::make(&folder, disk_bytes).map_err(|error| failed("make machines' disks", error))?;
        let means = Means { vmm, kernel, unpacked, initramfs, roots, roots_budget_bytes, blank, cgroups };
        let templates = (templates_budget_bytes > 0)
            .then(|| Templates::open(shared, &folder, &means, templates_budget_bytes).map(Arc::new));
        let (means, templates) = (Arc::new(means), templates.transpose()?);
        Ok(Self { means, images, sealer, templates, running: Running::default(), tasks: TaskTracker::new() })
    }

    /// Runs a small machine until its init calls: whether machines run here at all. Blocks.
    pub fn probe(&self, patience: Duration) -> Result<(), ExecutorError> {
        machine::probe(&self.recipe(None), patience)
    }

    fn recipe(&self, root: Option<Root>) -> Recipe {
        Recipe { means: self.means.clone(), root: root.map(Arc::new) }
    }

    /// What an action that reaches outwards has for that.
    fn network(&self, request: &ExecutionRequest) -> Result<Option<(Place, Link)>, ExecutorError> {
        if request.network == Network::Off {
            return Ok(None);
        }
        let sealer = self.sealer.as_ref().ok_or_else(|| {
            ExecutorError::Unsupported(
                "this agent has no network for machines, because it can make no sandbox (`sealci doctor` says why); an action \
                 that needs none says `network: off`"
                    .to_owned(),
            )
        })?;
        let place = sealer.reserve(request)?;
        let link = Link { helper: sealer.helper().clone(), spec: place.for_machine(request) };
        Ok(Some((place, link)))
    }

    /// An image's files as a disk, and what the image says.
    async fn obtain(
        &self,
        request: &ExecutionRequest,
        container: &Container,
    ) -> Result<(Root, ImageConfig), ExecutorError> {
        let obtaining = self.images.obtain(container, &request.notes);
        let image = request.stop.run_until_cancelled(obtaining).await.ok_or(ExecutorError::Stopped)??;
        let (means, stop) = (self.means.clone(), Arc::new(AtomicBool::new(false)));
        let making = {
            let stop = stop.clone();
            blocking(move || {
                let root = obtain(&means.roots, means.roots_budget_bytes, &image, &stop);
                root.map(|root| (root, image.config)).map_err(unusable_root)
            })
        };
        // It goes on until it has seen that, and leaves nothing.
        let _stopping = Stopping(stop);
        request.stop.run_until_cancelled(making).await.ok_or(ExecutorError::Stopped)?
    }

    /// What is to be beside the action, in the order of the request.
    async fn companions(&self, request: &ExecutionRequest) -> Result<Vec<Companion>, ExecutorError> {
        let obtaining = request.services.iter().map(|service| async move {
            let (root, config) = self.obtain(request, &service.container).await?;
            let user = user_of(&service.container, &config);
            Ok(Companion { name: service.name.clone(), root, config, user })
        });
        futures_util::future::try_join_all(obtaining).await
    }

    /// Has a service stand by in its action's machine.
    async fn join(&self, request: ExecutionRequest, role: &ServiceRole) -> Result<Standby, ExecutorError> {
        let home = request.neighbourhood.as_ref().and_then(Neighbourhood::home);
        let (Some(Home::Machine(company)), Some(container)) = (home, &request.container) else {
            return Err(ExecutorError::Unsupported(format!(
                "the service `{}` has no machine of an action to be in",
                role.name
            )));
        };
        let seat = company.take(&role.name)?;
        let start = seat.start(&request, role, container)?;
        let channel = seat.called(&request.stop).await?;
        let (timeout, grace) = (request.timeout, request.grace);
        let prepared = Prepared { channel, start, environment: Box::new(Share::default()), timeout, grace };
        stand_by(&self.tasks, std::future::ready(Ok(prepared)), ()).await
    }
}

/// Finds or makes an image's root, and makes room for it behind that: it cannot be among those that go.
fn obtain(roots: &RootStore, budget_bytes: u64, image: &Image, stop: &AtomicBool) -> Result<Root, RootError> {
    let root = roots.obtain(image, stop)?;
    match roots.collect(budget_bytes) {
        Ok(collected) if collected.removed > 0 => tracing::info!(
            roots = collected.removed,
            freed_bytes = collected.freed_bytes,
            "machines' root file systems were removed to keep the budget"
        ),
        Ok(_) => {}
        // The next action does it again.
        Err(error) => tracing::warn!(%error, "machines' root file systems may be over their budget"),
    }
    Ok(root)
}

/// Says that what is being made is not wanted any more.
struct Stopping(Arc<AtomicBool>);

impl Drop for Stopping {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[async_trait]
impl Executor for MicrovmExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Microvm
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        if let Some(role) = request.service.clone() {
            return self.join(request, &role).await;
        }
        let container = request.container.clone().ok_or_else(|| {
            ExecutorError::Unsupported(
                "the action names no image: it says `executor: microvm` and has no `container`".to_owned(),
            )
        })?;
        check_room(&request)?;
        let network = self.network(&request)?;
        let guard = self.running.enter(request.attempt)?;
        let ((root, config), companions) =
            tokio::try_join!(self.obtain(&request, &container), self.companions(&request))?;
        let start = start_message(&request, &config, wrapper(&container, &config.entrypoint));
        let (company, services) = Company::gather(&request.scratch, &companions)?;
        let over = company.machine_is_over().clone().drop_guard();
        if let Some(neighbourhood) = &request.neighbourhood {
            neighbourhood.found(Home::Machine(company));
        }
        let recipe = self.recipe(Some(root));
        let (place, link) = network.unzip();
        let (start, user) = (init::encoded(start)?, user_of(&container, &config));
        let wanted = Wanted { request, start, user, link, services, over };
        let making = prepare(recipe, self.templates.clone(), wanted);
        stand_by(&self.tasks, making, (guard, place, companions)).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        match self.means.cgroups.clone() {
            Some(cgroups) => blocking(move || cgroups.sweep().map_err(ExecutorError::Cgroup)).await,
            None => Ok(()),
        }
    }

    async fn close(&self) {
        if let Some(templates) = &self.templates {
            templates.stop();
        }
        self.tasks.close();
        self.tasks.wait().await;
        if let Some(templates) = &self.templates {
            templates.close().await;
        }
        self.images.close().await;
    }
}

/// Whom an image's programs run as, in its own words.
fn user_of(container: &Container, config: &ImageConfig) -> String {
    container.user.clone().unwrap_or_else(|| config.user.clone())
}

fn start_message(request: &ExecutionRequest, config: &ImageConfig, wrapper: Vec<String>) -> wire::Start {
    let mut env = config.env.clone();
    env.extend(request.env.clone());
    env.entry("TMPDIR".to_owned()).or_insert_with(|| "/tmp".to_owned());
    env.insert("SEALCI_ATTEMPT".to_owned(), request.attempt.to_string());
    env.insert("SEALCI_WORKSPACE".to_owned(), inside::WORKSPACE.to_owned());
    wire::Start {
        commands: request.commands.clone(),
        wrapper,
        shell: request.shell.as_str().to_owned(),
        env: env.into_iter().collect(),
        workdir: inside::WORKSPACE.into(),
        scratch: inside::SCRATCH.into(),
        timeout_ms: Some(u64::try_from(request.timeout.as_millis()).unwrap_or(u64::MAX)),
        grace_ms: u64::try_from(request.grace.as_millis()).unwrap_or(u64::MAX),
        stays: request.stays,
        ..wire::Start::default()
    }
}

/// What the monitor finds in the image; none where it finds nothing that it can unpack.
fn unpack(folder: &Path, image: &Path, vmm: &Path) -> Result<Option<Unpacked>, ExecutorError> {
    let by_monitor = |file: &File| {
        let mut command = Command::new(vmm);
        command.arg("--kernel").arg(image).args(["--extract", "-"]).stdin(Stdio::null());
        let output = command.stdout(file.try_clone()?).stderr(Stdio::piped()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(io::Error::other(said.trim().to_owned())) }
    };
    let obtain = |store: KernelStore| {
        let unpacked = store.obtain(image, by_monitor)?;
        store.clear()?;
        Ok(unpacked)
    };
    match KernelStore::open(folder).and_then(obtain) {
        Ok(unpacked) => Ok(Some(unpacked)),
        Err(UnpackError::Refused { source, .. }) => {
            tracing::info!(kernel = %image.display(), reason = %source, "machines boot the kernel as it is");
            Ok(None)
        }
        Err(error) => Err(failed("keep the machines' kernel", error)),
    }
}

fn failed<E: std::error::Error + Send + Sync + 'static>(doing: impl fmt::Display, error: E) -> ExecutorError {
    ExecutorError::io(doing)(io::Error::other(error))
}

fn unusable_kernel(error: KernelError) -> ExecutorError {
    failed("start machines", error)
}

fn unusable_root(error: RootError) -> ExecutorError {
    match error {
        RootError::Stopped => ExecutorError::Stopped,
        RootError::DiskFull { source } => ExecutorError::io("make the machine's root file system")(source),
        error => failed("make the machine's root file system", error),
    }
}

#[cfg(test)]
mod tests {
    use sealci_image::{ImageConfig, Lease};

    use super::*;

    #[test]
    fn roots_that_nobody_uses_go_when_there_are_too_many() {
        let folder = tempfile::tempdir().unwrap();
        let layer = folder.path().join("layer");
        std::fs::create_dir(&layer).unwrap();
        std::fs::write(layer.join("file"), "text").unwrap();
        let roots = RootStore::open(&folder.path().join("roots")).unwrap();
        let obtain = |name: &str, budget_bytes| {
            let (config, layers) = (ImageConfig::default(), vec![layer.clone()]);
            let image = Image { digest: name.to_owned(), config, layers, lease: Lease::none() };
            obtain(&roots, budget_bytes, &image, &AtomicBool::new(false)).unwrap()
        };
        let used = obtain("used", u64::MAX);
        let unused = obtain("unused", u64::MAX).path().to_owned();
        assert!(unused.exists());
        let next = obtain("next", 0);
        assert!(used.path().exists() && next.path().exists() && !unused.exists());
    }
}
