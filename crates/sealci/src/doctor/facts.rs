//! Looks at the machine. What can be tried is tried, and undone: a kernel that knows user namespaces may still refuse
//! them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use sealci_agent::executor::container::try_stacking;
use sealci_agent::executor::docker;
use sealci_agent::executor::helper::HelperCommand;
use sealci_agent::executor::rootless;
use sealci_microvm::kernel::{FOR_MACHINE, Kernel, KernelError};
use sealci_microvm::scratch;
use sealci_service::problem::chain;

use crate::serve::cached_images;

/// Which control groups are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    V2,
    V1,
    Hybrid,
    None,
}

/// What is so on this machine.
#[derive(Debug, Clone)]
pub struct Facts {
    pub is_root: bool,
    pub git_version: Option<(u32, u32)>,
    pub cgroups: Cgroups,
    pub cgroups_writable: bool,
    /// One was made.
    pub user_namespaces: bool,
    pub max_user_namespaces: Option<u64>,
    /// Debian's own switch; none where the kernel has none.
    pub unprivileged_user_namespaces: Option<bool>,
    /// Why an ordinary user's sandbox cannot be sealed, or have a network; tried as the agent does, not asked of root.
    pub sealing_problem: Option<String>,
    pub network_problem: Option<String>,
    pub overlay: bool,
    /// Why an image's layers cannot be stacked where `run` keeps them, if so; the error says why that was not found out.
    pub stacking: Result<Option<String>, String>,
    pub nft: bool,
    pub iptables: bool,
    pub ip: bool,
    pub pasta: bool,
    pub slirp4netns: bool,
    /// None where the device is not there.
    pub kvm: Option<bool>,
    /// The release of the kernel that microVMs would run, or why there is none.
    pub machine_kernel: Result<String, String>,
    pub makes_disks: bool,
    /// Whether taps can be had, to which machines' network cards lead.
    pub has_taps: bool,
    /// What runs containers here, or why it does not answer; none where nobody names one and none listens.
    pub daemon: Option<Result<String, String>>,
}

impl Facts {
    pub async fn look() -> Self {
        let cgroups = cgroups(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default());
        let is_root = effective_uid() == Some(0);
        let (sealing_problem, network_problem) = if is_root { (None, None) } else { rootless_problems() };
        Self {
            is_root,
            git_version: output("git", &["--version"]).and_then(|text| version(&text)),
            cgroups,
            cgroups_writable: cgroups_writable(cgroups),
            user_namespaces: succeeds("unshare", &["--user", "--map-root-user", "true"]),
            max_user_namespaces: number("/proc/sys/user/max_user_namespaces"),
            unprivileged_user_namespaces: number("/proc/sys/kernel/unprivileged_userns_clone")
                .map(|n| n != 0),
            sealing_problem,
            network_problem,
            overlay: knows_overlay(),
            stacking: stacking(),
            nft: is_installed("nft"),
            iptables: is_installed("iptables"),
            ip: is_installed("ip"),
            pasta: is_installed("pasta"),
            slirp4netns: is_installed("slirp4netns"),
            kvm: Path::new("/dev/kvm")
                .exists()
                .then(|| fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()),
            machine_kernel: machine_kernel().map_err(|error| chain(&error)),
            makes_disks: scratch::program().is_some(),
            has_taps: fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok(),
            daemon: daemon().await,
        }
    }
}

/// One with every module that a machine needs.
fn machine_kernel() -> Result<String, KernelError> {
    let kernel = Kernel::find(Path::new("/boot"), Path::new("/lib/modules"))?;
    kernel.modules(FOR_MACHINE)?;
    Ok(kernel.release)
}

/// Tried in the folder that the images' would be made in.
fn stacking() -> Result<Option<String>, String> {
    let folder = cached_images().map_err(|failure| failure.to_string())?;
    let there = folder.ancestors().find(|folder| folder.is_dir()).ok_or("no folder of it is there")?;
    try_stacking(&HelperCommand::of_this_program(), there, there).map_err(|error| error.message())
}

/// Docker or Podman, where the agent's flag would find it.
async fn daemon() -> Option<Result<String, String>> {
    let named = std::env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty());
    let host = match named {
        Some(host) => host,
        None => Path::new(docker::DEFAULT_SOCKET).exists().then(|| docker::DEFAULT_SOCKET.to_owned())?,
    };
    Some(ask(&host).await.map_err(|error| chain(&error)))
}

async fn ask(host: &str) -> Result<String, docker::DockerError> {
    let told = docker::probe(&docker::socket_of(host)?).await?;
    let whose = if told.is_rootless { ", of an ordinary user" } else { "" };
    let (name, version, api) = (told.engine.as_str(), told.version, told.api_version);
    Ok(format!("{name} {version}, API {api}{whose}, at {host}"))
}

fn rootless_problems() -> (Option<String>, Option<String>) {
    match rootless::probe(&HelperCommand::of_this_program()) {
        Ok(found) => (None, found.network),
        Err(error) => (Some(error.message()), None),
    }
}

fn effective_uid() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output =
        Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    output(program, arguments).is_some()
}

/// `git version 2.39.5 (Debian)` → (2, 39).
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(2)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// On the path, or where Debian keeps what only root's path has.
fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|folder| folder.join(program).is_file())
}

fn knows_overlay() -> bool {
    let known = || {
        fs::read_to_string("/proc/filesystems")
            .is_ok_and(|text| text.lines().any(|line| line.split_whitespace().last() == Some("overlay")))
    };
    // A module that is not loaded yet is loaded by the first mount; asking for it does the same.
    known() || (succeeds("modprobe", &["overlay"]) && known())
}

/// Reads proc_pid_mountinfo(5): the file system's type stands behind the lone dash.
fn cgroups(mountinfo: &str) -> Cgroups {
    let has = |kind: &str| {
        mountinfo
            .lines()
            .any(|line| line.split_once(" - ").is_some_and(|(_, rest)| rest.split(' ').next() == Some(kind)))
    };
    match (has("cgroup"), has("cgroup2")) {
        (true, true) => Cgroups::Hybrid,
        (true, false) => Cgroups::V1,
        (false, true) => Cgroups::V2,
        (false, false) => Cgroups::None,
    }
}

/// Makes a group where an agent would, and removes it.
fn cgroups_writable(cgroups: Cgroups) -> bool {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own_path = |controller: &str| {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let controllers = fields.next()?;
            controllers.split(',').any(|name| name == controller).then(|| fields.next().map(str::to_owned))?
        })
    };
    let folder = match cgroups {
        Cgroups::V2 => own_path("").map(|path| format!("/sys/fs/cgroup{path}")),
        Cgroups::V1 | Cgroups::Hybrid => {
            own_path("memory").map(|path| format!("/sys/fs/cgroup/memory{path}"))
        }
        Cgroups::None => None,
    };
    folder.is_some_and(|folder| {
        let probe = Path::new(&folder).join(format!("sealci-doctor-{}", std::process::id()));
        fs::create_dir(&probe).is_ok() && fs::remove_dir(&probe).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_mounts_are_read() {
        assert_eq!(version("git version 2.39.5 (Debian 1)\n"), Some((2, 39)));
        assert_eq!(version("git\n"), None);
        let v1 = "30 23 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n";
        let v2 = "31 23 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroups(v1), Cgroups::V1);
        assert_eq!(cgroups(v2), Cgroups::V2);
        assert_eq!(cgroups(&format!("{v1}{v2}")), Cgroups::Hybrid);
        assert_eq!(cgroups("1 2 0:1 / /cgroup rw - tmpfs none rw\n"), Cgroups::None);
    }
}
