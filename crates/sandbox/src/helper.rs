//! Makes one sandbox, waits for its init, and takes it down with itself.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bundle::{self, Bundle};
use crate::cgroups;
use crate::network::machine::{self, TapError};
use crate::network::{self, GateError, Gatekeeper, Link, RelayError};
use crate::rootless::{self, Enclosed, RootlessError};
use crate::seccomp::{Filters, SeccompError};
use crate::spec::{GateSpec, IDS_PER_SANDBOX, MachineSpec, NetworkSpec, RootSpec, SandboxSpec, inside};
use crate::staging::{self, ImageProbe, Stage, Staged, StagingError};
use crate::sys;

/// Given to the helper in the place of a description, with two empty folders and the host's id of root inside (0 without
/// root): it tries whether layers below the one can be stacked with a folder below the other on top, and writes an
/// [`ImageProbe`] as JSON to its standard output.
pub const IMAGE_PROBE_ARGUMENT: &str = "--probe-image";

/// Given to the helper before a description: it copies the layers of the image to one tree in the scratch, for
/// [`crate::Assembly::Copied`], and writes a [`crate::User`] as JSON to its standard output.
pub const COPY_ARGUMENT: &str = "--copy-image";

/// Given to the helper before the description of a machine's network ([`MachineSpec`]), a program and its arguments: it becomes
/// that program, in that network, where there is the tap [`machine::TAP`].
pub const MACHINE_ARGUMENT: &str = "--machine";

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
enum HelperError {
    #[error("usage: {} <path of the sandbox's description>", crate::HELPER_COMMAND)]
    Usage,
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the sandbox's description is not one")]
    Spec(#[source] serde_json::Error),
    #[error("cannot put the sandbox's files together")]
    Staging(#[from] StagingError),
    #[error("cannot make a sandbox without root")]
    Rootless(#[from] RootlessError),
    #[error("cannot find out what a machine may not reach")]
    Forbidden(#[from] RelayError),
    #[error("cannot give a machine its network")]
    Tap(#[from] TapError),
    #[error("cannot hold it to what it may reach")]
    Gate(#[from] GateError),
    #[error("cannot prepare the filter of system calls")]
    Seccomp(#[from] SeccompError),
    #[error("cannot make the sandbox's container")]
    Container(#[source] Box<libcontainer::error::LibcontainerError>),
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> HelperError {
    move |source| HelperError::Io { doing, source }
}

/// Runs as the helper of one sandbox until its end, with the arguments behind [`crate::HELPER_COMMAND`].
///
/// To be called first thing in `main`, before any thread is started. Standard input is the init's channel; standard error
/// takes what goes wrong. The exit code is the init's, or 70 where there never was one.
pub fn helper_main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    match run(arguments) {
        Ok(code) => u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from),
        Err(error) => {
            eprintln!("{}", chain(&error));
            ExitCode::from(70)
        }
    }
}

/// An error and all that led to it, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

fn run(arguments: impl IntoIterator<Item = OsString>) -> Result<i32, HelperError> {
    let mut arguments = arguments.into_iter();
    let first = arguments.next().ok_or(HelperError::Usage)?;
    let further: Vec<OsString> = arguments.collect();
    if first == rootless::PROBE_ARGUMENT && further.is_empty() {
        return rootless::probe().map_err(io_error("tell what was found"));
    }
    if first == IMAGE_PROBE_ARGUMENT {
        let [layers, scratch, owner] = &further[..] else { return Err(HelperError::Usage) };
        let owner = owner.to_str().and_then(|owner| owner.parse().ok()).ok_or(HelperError::Usage)?;
        return probe_image(layers.as_ref(), scratch.as_ref(), owner);
    }
    if first == COPY_ARGUMENT {
        let [path] = &further[..] else { return Err(HelperError::Usage) };
        return copy_image(&read_spec(path)?);
    }
    if first == MACHINE_ARGUMENT {
        let [path, program, arguments @ ..] = &further[..] else { return Err(HelperError::Usage) };
        return start_machine(&read_spec(path)?, program, arguments);
    }
    if !further.is_empty() {
        return Err(HelperError::Usage);
    }
    let spec: SandboxSpec = read_spec(&first)?;
    // A /dev/null from outside would be opened anew inside, and read-only at that.
    sys::redirect(io::stderr().as_fd(), 1).map_err(io_error("redirect the standard output"))?;

    sys::reset_umask();
    let filters = Filters::compile()?;
    let mut gatekeeper = match part(&spec.network, spec.gate.as_ref(), &spec.scratch, spec.rootless)? {
        Parted::Ended(code) => return Ok(code),
        Parted::Inside(gatekeeper) => gatekeeper,
    };
    if let (Some(gatekeeper), Some(gate)) = (&mut gatekeeper, &spec.gate) {
        gatekeeper.close_up(gate, network::GATE_ADDRESS)?;
    }
    let user_namespace =
        sys::user_namespace(spec.id_base, spec.ids()).map_err(io_error("make a user namespace"))?;
    let Staged { mut root, user } = Stage::build(&spec, &user_namespace)?;
    // In memory, and gone with the helper's mounts.
    let mut folder = staging::folder(&spec);
    let mut namespace_path =
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), user_namespace.as_raw_fd()));
    if spec.rootless {
        root = rootless::leave_host(&folder, &root)?;
        folder = PathBuf::from("/");
        namespace_path = rootless::name_namespace(&namespace_path)?;
    }
    let processes = spec.rootless.then(|| rootless::process_limit(spec.pids));
    let bundle = Bundle { spec: &spec, root: &root, user: &user, user_namespace: &namespace_path, processes };
    let pid = start_container(&bundle, &folder, filters)?;

    if spec.rootless {
        // libcontainer has closed them, and they are what another sandbox's helper joins. Inside nobody sees this process.
        sys::show_namespaces().map_err(io_error("show the sandbox's namespaces"))?;
    }
    // The channel is the init's alone from here on, so that its end is the channel's.
    let null = File::open("/dev/null").map_err(io_error("open /dev/null"))?;
    sys::redirect(null.as_fd(), 0).map_err(io_error("let go of the channel"))?;
    let Some(gatekeeper) = gatekeeper else {
        return sys::wait(pid).map_err(io_error("wait for sealci-init"));
    };
    let code = gatekeeper.wait_for(pid)?;
    gatekeeper.dismiss()?;
    Ok(code)
}

fn read_spec<T: DeserializeOwned>(path: &OsStr) -> Result<T, HelperError> {
    let text = fs::read(path).map_err(io_error("read the sandbox's description"))?;
    serde_json::from_slice(&text).map_err(HelperError::Spec)
}

/// Becomes the program that runs a machine, in a network like a sandbox's in which there is a tap for it.
fn start_machine(spec: &MachineSpec, program: &OsStr, arguments: &[OsString]) -> Result<i32, HelperError> {
    let forbidden = machine::forbidden(&spec.network)?;
    let gatekeeper = match part(&spec.network, spec.gate.as_ref(), &spec.scratch, spec.rootless)? {
        Parted::Ended(code) => return Ok(code),
        Parted::Inside(gatekeeper) => gatekeeper,
    };
    machine::attach(&forbidden, spec.gate.is_some())?;
    if let (Some(mut gatekeeper), Some(gate)) = (gatekeeper, &spec.gate) {
        gatekeeper.close_up(gate, machine::GATEWAY)?;
    }
    Err(HelperError::Io { doing: "start the virtual machine monitor", source: sys::exec(program, arguments) })
}

/// Which half of the helper this process is.
enum Parted {
    /// The one outside, after the other's end; with that one's exit code.
    Ended(i32),
    Inside(Option<Gatekeeper>),
}

/// Leaves the host's mounts and network; behind, where there is to be a gate, stays its keeper.
fn part(
    network: &NetworkSpec,
    gate: Option<&GateSpec>,
    scratch: &Path,
    rootless: bool,
) -> Result<Parted, HelperError> {
    let start = || gate.map(|gate| Gatekeeper::start(gate, rootless)).transpose();
    if !rootless {
        let gatekeeper = start()?;
        part_from_host(network)?;
        return Ok(Parted::Inside(gatekeeper));
    }
    match rootless::enclose(network)? {
        Enclosed::Ended(code) => Ok(Parted::Ended(code)),
        Enclosed::Inside { joined } => {
            let gatekeeper = start()?;
            rootless::part_from_host(network, scratch, joined)?;
            Ok(Parted::Inside(gatekeeper))
        }
    }
}

fn part_from_host(network: &NetworkSpec) -> Result<(), HelperError> {
    let link = match network {
        NetworkSpec::On { .. } => Some(Link::prepare().map_err(io_error("prepare the link to the host"))?),
        NetworkSpec::Off | NetworkSpec::Relayed { .. } | NetworkSpec::Joined { .. } => None,
    };
    if let NetworkSpec::Joined { helper, .. } = network {
        network::of_another(|| Ok(*helper))
            .and_then(|namespace| sys::enter(namespace.as_fd()))
            .map_err(io_error("enter the other sandbox's network"))?;
        return part_from_mounts();
    }
    sys::unshare(libc::CLONE_NEWNET).map_err(io_error("make a network namespace"))?;
    part_from_mounts()?;
    network::arrange().map_err(io_error("raise the loopback"))?;
    if let (Some(link), NetworkSpec::On { host_interface, host_address, address, .. }) = (link, network) {
        link.make(host_interface, *host_address, *address).map_err(io_error("make the link to the host"))?;
    }
    Ok(())
}

fn part_from_mounts() -> Result<(), HelperError> {
    sys::unshare(libc::CLONE_NEWNS).map_err(io_error("make a mount namespace"))?;
    // Whatever is mounted or detached from here on stays in this namespace.
    sys::mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "")
        .map_err(io_error("make the mounts private"))?;
    cgroups::hide().map_err(io_error("hide the host's control groups"))
}

/// Finds out whether layers can be stacked, and tells on the standard output.
fn probe_image(layers: &Path, scratch: &Path, owner: u32) -> Result<i32, HelperError> {
    let tried = if owner == 0 {
        match rootless::enclose(&NetworkSpec::Off)? {
            Enclosed::Ended(code) => return Ok(code),
            Enclosed::Inside { .. } => rootless::take_mounts().map_err(HelperError::from),
        }
        .and_then(|()| Ok(staging::look(layers, scratch, owner, None)?))
    } else {
        part_from_mounts().and_then(|()| {
            let mapping =
                sys::user_namespace(owner, IDS_PER_SANDBOX).map_err(io_error("make a user namespace"))?;
            Ok(staging::look(layers, scratch, owner, Some(mapping.as_fd()))?)
        })
    };
    tell(&ImageProbe { stacking: tried.err().map(|error| chain(&error)) })
}

/// Copies an image's layers to one tree, and tells whom it runs as on the standard output.
fn copy_image(spec: &SandboxSpec) -> Result<i32, HelperError> {
    // Nobody would take what is copied for an agent that is gone.
    sys::die_with_parent().map_err(io_error("bind this process to its parent"))?;
    sys::reset_umask();
    let RootSpec::Image(image) = &spec.root else { return Err(HelperError::Usage) };
    if spec.rootless
        && let Enclosed::Ended(code) = rootless::enclose(&NetworkSpec::Off)?
    {
        return Ok(code);
    }
    tell(&staging::copy_image(spec, image)?)
}

fn tell(what: &impl Serialize) -> Result<i32, HelperError> {
    let told = serde_json::to_writer(io::stdout(), what);
    told.map_err(|error| HelperError::Io { doing: "tell what was found", source: error.into() })?;
    Ok(0)
}

fn start_container(bundle: &Bundle<'_>, folder: &Path, filters: Filters) -> Result<i32, HelperError> {
    let description = folder.join("bundle");
    let state = folder.join("state");
    for folder in [&description, &state] {
        fs::create_dir(folder).map_err(io_error("make the container's folders"))?;
    }
    fs::write(description.join("config.json"), bundle::config(bundle).to_string())
        .map_err(io_error("write the container's description"))?;
    let container_error = |error| HelperError::Container(Box::new(error));
    let mut container = ContainerBuilder::new("sandbox".to_owned(), SyscallType::default())
        .with_executor(Seal { filters })
        .with_root_path(&state)
        .map_err(container_error)?
        .as_init(&description)
        .with_systemd(false)
        .build()
        .map_err(container_error)?;
    container.start().map_err(container_error)?;
    container
        .pid()
        .map(|pid| pid.as_raw())
        .ok_or(HelperError::Io { doing: "find sealci-init", source: io::ErrorKind::NotFound.into() })
}

/// The last steps inside, on the way to the init.
#[derive(Clone)]
struct Seal {
    filters: Filters,
}

impl Executor for Seal {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let failed = |error: Box<dyn Error + Send + Sync>| ExecutorError::Execution(error);
        // After the last change of user, which would undo it.
        sys::die_with_parent().map_err(|error| failed(error.into()))?;
        self.filters.apply().map_err(|error| failed(error.into()))?;
        Err(failed(sys::exec(OsStr::new(inside::INIT), &[]).into()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn setup_envs(&self, _: std::collections::HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // `exec` passes none.
        Ok(())
    }
}
