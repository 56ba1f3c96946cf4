//! Makes one sandbox, waits for its init, and takes it down with itself.

use std::error::Error;
use std::ffi::OsString;
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

use crate::bundle;
use crate::cgroups;
use crate::network::Link;
use crate::rootless::{self, RootlessError};
use crate::seccomp::{Filters, SeccompError};
use crate::spec::{NetworkSpec, SandboxSpec, inside};
use crate::staging::{self, Stage, StagingError};
use crate::sys;

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
    let (Some(path), None) = (arguments.next(), arguments.next()) else { return Err(HelperError::Usage) };
    if path == rootless::PROBE_ARGUMENT {
        return rootless::probe().map_err(io_error("tell what was found"));
    }
    let text = fs::read(path).map_err(io_error("read the sandbox's description"))?;
    let spec: SandboxSpec = serde_json::from_slice(&text).map_err(HelperError::Spec)?;
    // A /dev/null from outside would be opened anew inside, and read-only at that.
    sys::redirect(io::stderr().as_fd(), 1).map_err(io_error("redirect the standard output"))?;

    sys::reset_umask();
    let filters = Filters::compile()?;
    if spec.rootless {
        if let Some(code) = rootless::enclose()? {
            return Ok(code);
        }
        rootless::part_from_host(&spec)?;
    } else {
        part_from_host(&spec.network)?;
    }
    let user_namespace =
        sys::user_namespace(spec.id_base, spec.ids()).map_err(io_error("make a user namespace"))?;
    let mut root = Stage::build(&spec, &user_namespace)?;
    // In memory, and gone with the helper's mounts.
    let mut folder = staging::folder(&spec);
    let mut namespace_path =
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), user_namespace.as_raw_fd()));
    if spec.rootless {
        root = rootless::leave_host(&folder, &root)?;
        folder = PathBuf::from("/");
        namespace_path = rootless::name_namespace(&namespace_path)?;
    }
    let pid = start_container(&spec, &folder, &root, &namespace_path, filters)?;

    // The channel is the init's alone from here on, so that its end is the channel's.
    let null = File::open("/dev/null").map_err(io_error("open /dev/null"))?;
    sys::redirect(null.as_fd(), 0).map_err(io_error("let go of the channel"))?;
    sys::wait(pid).map_err(io_error("wait for sealci-init"))
}

/// Leaves the host's mounts and network.
fn part_from_host(network: &NetworkSpec) -> Result<(), HelperError> {
    let link = match network {
        NetworkSpec::On { .. } => Some(Link::prepare().map_err(io_error("prepare the link to the host"))?),
        NetworkSpec::Off | NetworkSpec::Relayed { .. } => None,
    };
    sys::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET).map_err(io_error("make namespaces"))?;
    // Whatever is mounted or detached from here on stays in this namespace.
    sys::mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "")
        .map_err(io_error("make the mounts private"))?;
    cgroups::hide().map_err(io_error("hide the host's control groups"))?;
    sys::raise_loopback().map_err(io_error("raise the loopback"))?;
    if let (Some(link), NetworkSpec::On { host_interface, host_address, address, .. }) = (link, network) {
        link.make(host_interface, *host_address, *address).map_err(io_error("make the link to the host"))?;
    }
    Ok(())
}

fn start_container(
    spec: &SandboxSpec,
    folder: &Path,
    root: &Path,
    user_namespace: &Path,
    filters: Filters,
) -> Result<i32, HelperError> {
    let bundle = folder.join("bundle");
    let state = folder.join("state");
    for folder in [&bundle, &state] {
        fs::create_dir(folder).map_err(io_error("make the container's folders"))?;
    }
    let processes = spec.rootless.then(|| rootless::process_limit(spec.pids));
    let config = bundle::config(spec, root, user_namespace, processes);
    fs::write(bundle.join("config.json"), config.to_string())
        .map_err(io_error("write the container's description"))?;
    let container_error = |error| HelperError::Container(Box::new(error));
    let mut container = ContainerBuilder::new("sandbox".to_owned(), SyscallType::default())
        .with_executor(Seal { filters })
        .with_root_path(&state)
        .map_err(container_error)?
        .as_init(&bundle)
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
        Err(failed(sys::exec(inside::INIT).into()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn setup_envs(&self, _: std::collections::HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // `exec` passes none.
        Ok(())
    }
}
