//! The flags about images: where they come from, how much of the disk they may take, what may be done in them, and whether they
//! run in machines, too.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs, io};

use clap::Args;
use sealci_agent::executor::cgroup::Cgroups;
use sealci_agent::executor::container::{ContainerExecutor, ContainerOptions};
use sealci_agent::executor::docker::socket_of;
use sealci_agent::executor::microvm::{MicrovmExecutor, MicrovmOptions};
use sealci_agent::executor::sealed::Sealer;
use sealci_agent::executor::{Executor, ExecutorError};
use sealci_image::{Credentials, ImageStore, Registries, StoreOptions};
use sealci_sandbox::Capability;
use sealci_service::problem::chain;

use crate::exit::{Exit, Failure};

/// A machine is up in a tenth of a second, and where its processor is emulated in some seconds.
const MACHINE_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default, Clone, Args)]
#[command(next_help_heading = "Images")]
pub struct ImageArgs {
    /// The disk that unpacked images may take, machines' root file systems as much again, and saved machines, from which others
    /// go on, as much again; those used longest ago go first [default: 20 GiB]
    #[arg(long, value_name = "BYTES")]
    pub images_budget_bytes: Option<u64>,
    /// The folder below which `oci:NAME` and `docker-archive:NAME` are found [default: there are none]
    #[arg(long, value_name = "DIR", env = "SEALCI_IMAGES_FOLDER")]
    pub images_folder: Option<PathBuf>,
    /// A registry that is asked before another, such as docker.io=mirror.example.org; may be given several times
    #[arg(long, value_name = "REGISTRY=MIRROR")]
    pub registry_mirror: Vec<String>,
    /// A registry that is spoken to without TLS, such as localhost:5000; may be given several times
    #[arg(long, value_name = "HOST[:PORT]")]
    pub insecure_registry: Vec<String>,
    /// The logins of registries, as `docker login` writes them [default: ~/.docker/config.json, if there is one]
    #[arg(long, value_name = "FILE", env = "SEALCI_REGISTRY_LOGINS")]
    pub registry_logins: Option<PathBuf>,
    /// The authority of registries' certificates, PEM, besides those that this system trusts
    #[arg(long, value_name = "FILE", env = "SEALCI_REGISTRY_CA")]
    pub registry_ca: Option<PathBuf>,
    /// What root in an image may do to the image's own files and processes: chown, dac_override, fowner, kill, setgid or setuid;
    /// may be given several times [default: nothing]
    #[arg(long, value_name = "NAME", value_parser = capability)]
    pub container_capability: Vec<Capability>,
    /// Docker or Podman on this machine, for actions that ask for the executor docker, such as unix:///var/run/docker.sock; with a
    /// network they reach this machine's own addresses [default: none]
    #[arg(long, value_name = "HOST", env = "DOCKER_HOST")]
    pub docker_host: Option<String>,
    /// Also run actions that ask for the executor microvm, each in a machine of its own: where /dev/kvm runs machines
    #[arg(long)]
    pub microvms: bool,
    /// The kernel of the machines [default: the newest of this machine's that has what they need]
    #[arg(long, value_name = "FILE", requires = "microvms")]
    pub microvm_kernel: Option<PathBuf>,
    /// The folder with that kernel's modules [default: this machine's for its release]
    #[arg(long, value_name = "DIR", requires = "microvm_kernel")]
    pub microvm_modules: Option<PathBuf>,
}

fn capability(name: &str) -> Result<Capability, String> {
    Capability::parse(name).ok_or_else(|| {
        let names = Capability::ALL.map(Capability::as_str);
        format!("it is one of {}", names.join(", "))
    })
}

/// Where images come from and are kept.
#[derive(Debug, Clone)]
pub struct ImageOffer {
    folder: PathBuf,
    store: StoreOptions,
    capabilities: Vec<Capability>,
    /// None: no action runs in a machine.
    machines: Option<MicrovmOptions>,
}

impl ImageArgs {
    /// Reads the files that are named. `folder` is where images are kept.
    pub fn offer(&self, folder: PathBuf) -> Result<ImageOffer, Failure> {
        let mut registries = Registries { credentials: self.logins()?, ..Registries::default() };
        for text in &self.registry_mirror {
            let (registry, mirror) =
                text.split_once('=').filter(|(registry, _)| !registry.is_empty()).ok_or_else(|| {
                    Failure::usage(format!(
                        "--registry-mirror {text}: say REGISTRY=MIRROR, such as docker.io=mirror.example.org"
                    ))
                })?;
            registries.mirrors.entry(registry.to_owned()).or_default().push(mirror.to_owned());
        }
        registries.insecure.extend(self.insecure_registry.iter().cloned());
        if let Some(path) = &self.registry_ca {
            registries.authorities = sealci_service::tls::read_authority(path)
                .map_err(|error| Failure::of_error(Exit::Usage, "--registry-ca", &error))?;
        }
        let usual = StoreOptions::default();
        let store = StoreOptions {
            budget_bytes: self.images_budget_bytes.unwrap_or(usual.budget_bytes),
            images_folder: self.images_folder.clone(),
            registries,
            ..usual
        };
        let machines = self.microvms.then(|| MicrovmOptions {
            kernel: self.microvm_kernel.clone(),
            modules: self.microvm_modules.clone(),
            roots: Some(folder.join("machines")),
            roots_budget_bytes: store.budget_bytes,
            templates_budget_bytes: store.budget_bytes,
            ..MicrovmOptions::default()
        });
        Ok(ImageOffer { folder, store, capabilities: self.container_capability.clone(), machines })
    }

    /// Where the daemon listens, if one is named.
    pub fn docker_socket(&self) -> Result<Option<PathBuf>, Failure> {
        let socket = self.docker_host.as_deref().map(socket_of).transpose();
        socket.map_err(|error| Failure::of_error(Exit::Usage, "--docker-host", &error))
    }

    /// The file of logins; it may not be there, unless it was named.
    pub fn logins_file(&self) -> Option<PathBuf> {
        let usual = || env::home_dir().map(|home| home.join(".docker/config.json"));
        self.registry_logins.clone().or_else(usual)
    }

    fn logins(&self) -> Result<Credentials, Failure> {
        let Some(path) = self.logins_file() else {
            return Ok(Credentials::default());
        };
        let name = || format!("--registry-logins {}", path.display());
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.registry_logins.is_none() => {
                return Ok(Credentials::default());
            }
            Err(error) => return Err(Failure::of_error(Exit::Usage, name(), &error)),
        };
        Credentials::from_docker_config(&text).map_err(|error| Failure::of_error(Exit::Usage, name(), &error))
    }
}

impl ImageOffer {
    /// Opens where images are kept. The error is for a person.
    pub fn open(&self) -> Result<Arc<ImageStore>, String> {
        fs::create_dir_all(&self.folder)
            .map_err(|error| format!("cannot make the folder {}: {error}", self.folder.display()))?;
        ImageStore::open(&self.folder, self.store.clone()).map(Arc::new).map_err(|error| chain(&error))
    }

    /// What runs actions in images. The error is for a person. Blocks for a moment.
    pub fn executor(&self, sealer: Sealer, store: Arc<ImageStore>) -> Result<Arc<dyn Executor>, String> {
        let options = ContainerOptions {
            layers: Some(self.folder.clone()),
            capabilities: self.capabilities.clone(),
            copies_layers: false,
        };
        let executor = ContainerExecutor::new(sealer, store, options).map_err(|error| error.message())?;
        if let Some(problem) = executor.stacking_problem() {
            tracing::warn!(problem, "the layers of images are copied for each action");
        }
        Ok(Arc::new(executor))
    }

    /// What runs actions in machines, where that is wanted: one was run. Blocks meanwhile.
    pub fn machines(
        &self,
        own: &Path,
        store: Arc<ImageStore>,
        cgroups: Option<Cgroups>,
        sealer: Option<Sealer>,
    ) -> Result<Option<Arc<dyn Executor>>, ExecutorError> {
        let Some(options) = &self.machines else { return Ok(None) };
        let executor = MicrovmExecutor::new(own, store, cgroups, sealer, options)?;
        executor.probe(MACHINE_PATIENCE)?;
        Ok(Some(Arc::new(executor)))
    }
}

/// Where a user's own runs keep images: `$XDG_CACHE_HOME/sealci/images`.
pub fn cached_images() -> Result<PathBuf, Failure> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).and_then(absolute);
    let cache = cache.or_else(|| env::home_dir().map(|home| home.join(".cache")));
    let cache = cache.ok_or_else(|| {
        Failure::infrastructure("there is no folder to keep images in").help("set $XDG_CACHE_HOME or $HOME")
    })?;
    Ok(cache.join("sealci/images"))
}
