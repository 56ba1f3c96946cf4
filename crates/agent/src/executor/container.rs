//! Seals actions in images, without a daemon: as `sandbox` does, on the image's files instead of the host's.
//!
//! ```text
//! obtain the image ──▶ [copy its layers, where they cannot be stacked] ──▶ the helper stacks and seals ──▶ stands by
//! ```
//!
//! The image stays on disk while the environment lives; what is written goes to the attempt's scratch, where `room`
//! measures it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use sealci_core::plan::{Container, Entrypoint, ExecutorKind};
use sealci_guest::wire;
use sealci_sandbox::{
    Assembly, COPY_ARGUMENT, Capability, IMAGE_PROBE_ARGUMENT, ImageProbe, ImageRoot, RootSpec, SandboxSpec,
    User,
};
use tokio_util::task::TaskTracker;

use super::environment::blocking;

use super::helper::HelperCommand;
use super::sealed::{ID_RANGE, Sealed, Sealer, start_message, write_description};
use super::{ExecutionRequest, Executor, ExecutorError, Images, ServiceRole, Standby};
use crate::workspace;

/// What an installation may choose.
#[derive(Debug, Clone, Default)]
pub struct ContainerOptions {
    /// Where the images' layers are; none: below the agent's data folder.
    pub layers: Option<PathBuf>,
    /// What root in an image may do beyond what its files allow.
    pub capabilities: Vec<Capability>,
    /// Layers are copied even where they could be stacked.
    pub copies_layers: bool,
}

/// The executor that runs images.
#[derive(Debug)]
pub struct ContainerExecutor {
    sealer: Sealer,
    images: Arc<dyn Images>,
    capabilities: Vec<Capability>,
    /// Why layers are copied, where they are.
    no_stacking: Option<String>,
    tasks: TaskTracker,
}

impl ContainerExecutor {
    /// Tries once how layers become one tree here. Blocks meanwhile.
    pub fn new(
        sealer: Sealer,
        images: Arc<dyn Images>,
        options: ContainerOptions,
    ) -> Result<Self, ExecutorError> {
        let no_stacking = if options.copies_layers {
            Some("this agent's configuration says so".to_owned())
        } else {
            let layers = options.layers.as_deref().unwrap_or(sealer.data_dir());
            try_stacking(sealer.helper(), layers, sealer.data_dir())?
        };
        let ContainerOptions { capabilities, .. } = options;
        Ok(Self { sealer, images, capabilities, no_stacking, tasks: TaskTracker::new() })
    }

    /// Why an image's layers are copied for each action instead of being stacked by the kernel, where they are; for a
    /// person.
    pub fn stacking_problem(&self) -> Option<&str> {
        self.no_stacking.as_deref()
    }

    /// Those of services: the programs that images start with change owners and users before they become a server, and in
    /// user ids of their own that reaches nobody else.
    fn capabilities_of(&self, request: &ExecutionRequest) -> Vec<Capability> {
        if request.service.is_some() { Capability::ALL.to_vec() } else { self.capabilities.clone() }
    }

    /// Copies the layers to one tree; tells whom the image runs as.
    async fn copy(&self, request: &ExecutionRequest, spec: &SandboxSpec) -> Result<User, ExecutorError> {
        let (own_request, own_spec) = (request.clone(), spec.clone());
        let description = blocking(move || write_description(&own_request, &own_spec)).await?;
        if let Some(why) = &self.no_stacking {
            request.notes.say(format_args!("copying the image's layers, for they cannot be stacked: {why}"));
        }
        let arguments = [OsStr::new(COPY_ARGUMENT), description.as_os_str()];
        self.sealer.helper().ask("copy the image's layers", &arguments, &request.stop).await
    }
}

#[async_trait]
impl Executor for ContainerExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Container
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        let container = request.container.clone().ok_or_else(|| {
            ExecutorError::Unsupported(
                "the action names no image: it says `executor: container` and has no `container`".to_owned(),
            )
        })?;
        let place = self.sealer.reserve(&request)?;
        let obtaining = self.images.obtain(&container, &request.notes);
        let image = request.stop.run_until_cancelled(obtaining).await.ok_or(ExecutorError::Stopped)??;
        let root = ImageRoot {
            layers: image.layers.clone(),
            assembly: if self.no_stacking.is_some() { Assembly::Copied } else { Assembly::Stacked },
            user: container.user.clone().unwrap_or_else(|| image.config.user.clone()),
            capabilities: self.capabilities_of(&request),
        };
        let assembly = root.assembly;
        let spec = place.spec(&request, RootSpec::Image(root));
        let owner = match assembly {
            Assembly::Stacked => User::default(),
            Assembly::Copied => self.copy(&request, &spec).await?,
        };
        let mut env = image.config.env.clone();
        env.extend(request.env.clone());
        let start = start_message(&request, env);
        let start = match &request.service {
            Some(service) => wire::Start {
                program: service_program(
                    service,
                    &container,
                    &image.config.entrypoint,
                    &image.config.command,
                )?,
                workdir: service_folder(&image.config.working_folder).into(),
                stop_signal: stop_signal(&image.config.stop_signal),
                ..start
            },
            None => wire::Start { wrapper: wrapper(&container, &image.config.entrypoint), ..start },
        };
        place.stand_by(&self.tasks, Sealed { request, spec, owner, start }, image).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        self.sealer.sweep().await
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        self.images.close().await;
    }
}

/// Tries to stack layers that lie in one folder for actions that write below another; both stay as they were. Says why layers
/// are copied instead, where they have to be. Blocks.
pub fn try_stacking(
    helper: &HelperCommand,
    layers: &Path,
    written: &Path,
) -> Result<Option<String>, ExecutorError> {
    // Several may be made at the same time, by one process or more.
    let name = format!(".sealci-probe-{:016x}", rand::random::<u64>());
    let folders = [layers.join(format!("{name}-layers")), written.join(format!("{name}-scratch"))];
    let owner = if nix::unistd::geteuid().is_root() { ID_RANGE.start } else { 0 }.to_string();
    let ask = || {
        for folder in &folders {
            std::fs::create_dir_all(folder)
                .map_err(ExecutorError::io(format_args!("make the folder {}", folder.display())))?;
        }
        let arguments =
            [IMAGE_PROBE_ARGUMENT.as_ref(), folders[0].as_os_str(), folders[1].as_os_str(), owner.as_ref()];
        helper.ask_now::<ImageProbe>("try to stack an image's layers", &arguments)
    };
    let found = ask();
    for folder in &folders {
        if let Err(error) = workspace::remove_tree(folder) {
            tracing::warn!(folder = %folder.display(), %error, "cannot remove what an image was tried with");
        }
    }
    Ok(found?.stacking)
}

/// What a service runs: the entrypoint and what is behind it.
pub(super) fn service_program(
    service: &ServiceRole,
    container: &Container,
    image_entrypoint: &[String],
    image_command: &[String],
) -> Result<Vec<String>, ExecutorError> {
    let mut program = match &container.entrypoint {
        Entrypoint::Default | Entrypoint::Image => image_entrypoint.to_vec(),
        Entrypoint::Words(words) => words.clone(),
    };
    // Another entrypoint does not take the words that are meant for the image's.
    let is_images = !matches!(container.entrypoint, Entrypoint::Words(_));
    let command = service.command.clone().or_else(|| is_images.then(|| image_command.to_vec()));
    program.extend(command.unwrap_or_default());
    if program.is_empty() {
        return Err(ExecutorError::Unsupported(format!(
            "the image {} says nothing to run for the service `{}`; give it a `command`",
            container.image, service.name
        )));
    }
    Ok(program)
}

pub(super) fn service_folder(of_image: &str) -> &str {
    if of_image.is_empty() { "/" } else { of_image }
}

/// `SIGTERM`, `TERM` or `15`; that where it is none of them.
pub(super) fn stop_signal(text: &str) -> u8 {
    use nix::sys::signal::Signal;
    let by_number = text.parse::<u8>().ok().filter(|number| (1..=64).contains(number));
    let name = if text.starts_with("SIG") { text.to_owned() } else { format!("SIG{text}") };
    let by_name = || name.parse::<Signal>().ok().and_then(|signal| u8::try_from(signal as i32).ok());
    by_number.or_else(by_name).unwrap_or(wire::DEFAULT_STOP_SIGNAL)
}

/// The words in front of the shell.
pub(super) fn wrapper(container: &Container, image_entrypoint: &[String]) -> Vec<String> {
    match &container.entrypoint {
        Entrypoint::Default => Vec::new(),
        Entrypoint::Image => image_entrypoint.to_vec(),
        Entrypoint::Words(words) => words.clone(),
    }
}
