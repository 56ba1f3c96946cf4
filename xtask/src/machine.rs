//! Finds out what the machine has, and installs Debian packages where that is possible.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// What a test may need of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    Git,
    /// A C compiler, for what tests run that no shell can do.
    Cc,
    /// A C++ compiler: libFuzzer is built.
    Cxx,
    Deny,
    Postgres,
    Root,
    /// User, mount, process and network namespaces.
    Namespaces,
    /// An ordinary user's sandbox, and both programs that can give it a network.
    Rootless,
    /// Packets can be filtered and translated.
    Netfilter,
    Kvm,
    /// A server and a client, both OpenSSH's.
    Ssh,
    /// An S3 server to keep objects in.
    S3,
    /// A registry of images, and what pushes to it.
    Registry,
    /// A Docker daemon that tests may start.
    Docker,
    /// A guest that is made of Debian's packages; emulated where it cannot be virtualized.
    Qemu,
}

impl Capability {
    pub const ALL: [Self; 15] = [
        Self::Git,
        Self::Cc,
        Self::Cxx,
        Self::Deny,
        Self::Postgres,
        Self::Root,
        Self::Namespaces,
        Self::Rootless,
        Self::Netfilter,
        Self::Kvm,
        Self::Ssh,
        Self::S3,
        Self::Registry,
        Self::Docker,
        Self::Qemu,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Git => "git",
            Self::Cc => "cc",
            Self::Cxx => "cxx",
            Self::Deny => "deny",
            Self::Postgres => "postgres",
            Self::Root => "root",
            Self::Namespaces => "namespaces",
            Self::Rootless => "rootless",
            Self::Netfilter => "netfilter",
            Self::Kvm => "kvm",
            Self::Ssh => "ssh",
            Self::S3 => "s3",
            Self::Registry => "registry",
            Self::Docker => "docker",
            Self::Qemu => "qemu",
        }
    }
}

/// Reads `SEALCI_REQUIRE`.
pub fn required(text: &str) -> Result<Vec<Capability>> {
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let known = Capability::ALL.into_iter().find(|capability| capability.name() == name);
            known.with_context(|| {
                let names: Vec<_> = Capability::ALL.iter().map(|capability| capability.name()).collect();
                format!("SEALCI_REQUIRE names `{name}`; there are {}", names.join(", "))
            })
        })
        .collect()
}

/// A program that tests use, and the package that brings it.
const PROGRAMS: &[(&str, &str)] = &[
    ("git", "git"),
    ("cc", "gcc"),
    ("c++", "g++"),
    ("nft", "nftables"),
    ("iptables", "iptables"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
    ("ssh", "openssh-client"),
    ("sshd", "openssh-server"),
    ("pasta", "passt"),
    ("slirp4netns", "slirp4netns"),
    ("docker-registry", "docker-registry"),
    ("skopeo", "skopeo"),
    ("dockerd", "docker.io"),
    ("busybox", "busybox-static"),
    ("unsquashfs", "squashfs-tools"),
    ("cpio", "cpio"),
];

/// Those that make and run a guest, which is of this kind of machine only.
const GUEST_PROGRAMS: &[(&str, &str)] = if cfg!(target_arch = "x86_64") {
    &[("qemu-system-x86_64", "qemu-system-x86"), ("mmdebstrap", "mmdebstrap"), ("mkfs.ext4", "e2fsprogs")]
} else {
    &[]
};
/// A guest's memory, and what else it takes.
const GUEST_MEMORY_MEBIBYTES: u64 = 3000;

/// The packages that are not there.
pub fn missing_packages() -> Vec<&'static str> {
    let programs = PROGRAMS.iter().chain(GUEST_PROGRAMS);
    let mut packages: Vec<_> =
        programs.filter(|(program, _)| find(program).is_none()).map(|(_, package)| *package).collect();
    if !Path::new("/usr/include/stdio.h").exists() {
        packages.push("libc6-dev");
    }
    if postgres_programs().is_none() {
        packages.push("postgresql");
    }
    if crate::s3::lacks_python() {
        packages.push("python3-venv");
    }
    packages
}

/// Why packages cannot be installed here; none if they can.
pub fn cannot_install() -> Option<&'static str> {
    if std::env::var("SEALCI_INSTALL").is_ok_and(|value| value == "no") {
        Some("SEALCI_INSTALL=no")
    } else if !is_root() {
        Some("only root may install packages")
    } else if find("apt-get").is_none() {
        Some("there is no apt-get")
    } else {
        None
    }
}

/// Where Debian asks whether a package's service may be started (invoke-rc.d(8)).
const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Keeps the services of packages from starting as they are installed: tests start their own, on ports of their own.
struct ServicesAtRest {
    is_ours: bool,
}

impl ServicesAtRest {
    fn begin() -> Self {
        // It lets everything start again once this process is gone, should it be killed before it can remove it.
        let text = format!(
            "#!/bin/sh\n# Made by SealCI's `cargo xtask test` while it installs packages; it may be removed.\n\
             kill -0 {} 2>/dev/null && exit 101\nexit 0\n",
            std::process::id()
        );
        let write = || {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY)?;
            file.write_all(text.as_bytes())
        };
        // Somebody else's stays: it is the machine's own policy.
        Self { is_ours: write().is_ok() }
    }
}

impl Drop for ServicesAtRest {
    fn drop(&mut self) {
        if self.is_ours {
            // What is left of it does nothing.
            let _ = fs::remove_file(POLICY);
        }
    }
}

/// Installs Debian packages. Their services are not started now; a machine that boots would start them.
pub fn install(packages: &[&str]) -> Result<()> {
    let _at_rest = ServicesAtRest::begin();
    apt_get(&["install", "--yes", "--no-install-recommends"], packages)
        .or_else(|_| {
            // A fresh machine has no package lists yet, or old ones.
            apt_get(&["update", "--quiet"], &[])?;
            apt_get(&["install", "--yes", "--no-install-recommends"], packages)
        })
        .with_context(|| format!("apt-get could not install {}", packages.join(" ")))
}

fn apt_get(arguments: &[&str], packages: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(arguments)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .status()?;
    if status.success() { Ok(()) } else { bail!("apt-get {} ended with {status}", arguments[0]) }
}

/// Why the machine lacks a capability; none if it is there.
pub fn lacks(capability: Capability) -> Option<String> {
    let unless = |there: bool, why: &str| (!there).then(|| why.to_owned());
    match capability {
        Capability::Git => unless(find("git").is_some(), "git is not installed"),
        Capability::Cc => unless(find("cc").is_some(), "no C compiler is installed (apt-get install gcc)"),
        Capability::Cxx => {
            unless(find("c++").is_some(), "no C++ compiler is installed (apt-get install g++)")
        }
        // Both are built or installed where they are not there, and missed then.
        Capability::Deny | Capability::S3 => None,
        Capability::Ssh => {
            unless(find("ssh").is_some() && find("sshd").is_some(), "ssh and sshd are not installed")
        }
        Capability::Registry => unless(
            find("docker-registry").is_some() && find("skopeo").is_some(),
            "docker-registry or skopeo is not installed",
        ),
        Capability::Docker => {
            unless(is_root() && find("dockerd").is_some(), "not running as root, or dockerd is not installed")
        }
        Capability::Qemu => lacks_for_guest(),
        Capability::Postgres => unless(postgres_programs().is_some(), "PostgreSQL's initdb is not installed"),
        Capability::Root => unless(is_root(), "not running as root"),
        Capability::Namespaces => unless(
            succeeds(
                "unshare",
                &["--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "true"],
            ),
            "namespaces cannot be made",
        ),
        Capability::Rootless => unless(
            find("setpriv").is_some() && find("pasta").is_some() && find("slirp4netns").is_some(),
            "setpriv, pasta or slirp4netns is not installed",
        ),
        Capability::Netfilter => unless(
            is_root() && (succeeds("nft", &["list", "tables"]) || succeeds("iptables", &["-S"])),
            "neither nft nor iptables works",
        ),
        Capability::Kvm => {
            let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
            unless(usable, "/dev/kvm is not usable")
        }
    }
}

pub fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status.lines().any(|line| line.starts_with("Uid:") && line.split_whitespace().nth(2) == Some("0"))
    })
}

/// A program on the path, or where only root's path leads.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

pub fn succeeds(program: &str, arguments: &[&str]) -> bool {
    let Some(program) = find(program) else { return false };
    let status = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// The folder with `initdb` and `postgres`, the newest where Debian has several.
pub fn postgres_programs() -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .collect();
    folders.sort_by_key(|folder| {
        let version = folder.parent().and_then(|parent| parent.file_name()).and_then(|name| name.to_str());
        std::cmp::Reverse(version.and_then(|version| version.parse::<u32>().ok()))
    });
    let on_path = find("initdb").and_then(|file| Some(fs::canonicalize(file).ok()?.parent()?.to_owned()));
    let is_whole = |folder: &PathBuf| folder.join("initdb").is_file() && folder.join("postgres").is_file();
    folders.into_iter().chain(on_path).find(is_whole)
}

fn lacks_for_guest() -> Option<String> {
    let is_debian = fs::read_to_string("/etc/os-release")
        .is_ok_and(|text| text.lines().any(|line| line == "ID=debian" || line == "ID=\"debian\""));
    let missing = GUEST_PROGRAMS.iter().find(|(program, _)| find(program).is_none());
    if !cfg!(target_arch = "x86_64") || !is_debian {
        Some("the guest is made of the packages of a Debian machine with x86-64".to_owned())
    } else if let Some((program, package)) = missing {
        Some(format!("{program} is not installed (apt-get install {package})"))
    } else if !is_root() {
        Some("only root can make the guest's root file system".to_owned())
    } else if available_memory_mebibytes() < GUEST_MEMORY_MEBIBYTES {
        Some(format!("less than {GUEST_MEMORY_MEBIBYTES} MiB of memory are available"))
    } else {
        None
    }
}

/// What programs can have without swapping (proc_meminfo(5)).
pub fn available_memory_mebibytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kibibytes.unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_are_names_of_capabilities() {
        assert_eq!(required("").unwrap(), []);
        assert_eq!(required("postgres, root,").unwrap(), [Capability::Postgres, Capability::Root]);
        assert!(required("postgers").unwrap_err().to_string().contains("postgres"));
    }
}
