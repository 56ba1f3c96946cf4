//! Does as an ordinary user what a sandbox needs root for: in a user namespace in which that user is root.
//!
//! ```text
//! helper (user) ── forks ──▶ PID 1 of a PID namespace, root in a user namespace of one id
//!   │ waits; TERM: kills it      │ own mounts; a network namespace, and the program that relays its traffic
//!   │                            │ stages the root, makes it its own, sees nothing else of the host any more
//!   ▼                            └ libcontainer: another user, pid, … namespace ── sealci-init
//! ends when all of it has
//! ```
//!
//! Invariants: everything that is started for a sandbox, the relay included, is in that PID namespace, and so ends with its
//! first process; the helper's own end means that all of it is gone, control groups or not. That first process dies with
//! the helper. libcontainer runs in a root without a control group, as with root (see `cgroups`), and here without the
//! host's other files as well: mounts that a more privileged namespace has made cannot be taken out one by one, but only
//! all together with their root.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cgroups;
use crate::helper::chain;
use crate::network::{self, RelayError, relay};
use crate::spec::NetworkSpec;
use crate::sys;

/// Given to the helper in the place of a description: it tries what a sandbox without root needs, and writes a [`Probe`]
/// as JSON to its standard output.
pub const PROBE_ARGUMENT: &str = "--probe";

/// Why there is no sandbox without root.
#[derive(Debug, thiserror::Error)]
pub enum RootlessError {
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot give it a network")]
    Network(#[from] RelayError),
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> RootlessError {
    move |source| RootlessError::Io { doing, source }
}

/// Which of the two this process is.
pub enum Enclosed {
    /// The one outside, after the other's end; with that one's exit code.
    Ended(i32),
    /// Root in namespaces of its own.
    Inside {
        /// The network that it shall be in.
        joined: Option<fs::File>,
    },
}

/// Splits this process in two: the one that goes on inside, and the other, which returns only after that one's end. To be
/// called in a process with one thread.
pub fn enclose(network: &NetworkSpec) -> Result<Enclosed, RootlessError> {
    let joined = match network {
        NetworkSpec::Joined { helper, .. } => {
            Some(join(*helper).map_err(io_error("enter the other sandbox's user namespace"))?)
        }
        NetworkSpec::Off | NetworkSpec::On { .. } | NetworkSpec::Relayed { .. } => {
            become_root()?;
            None
        }
    };
    sys::unshare(libc::CLONE_NEWPID).map_err(io_error("make a PID namespace"))?;
    sys::hold_signals().map_err(io_error("hold signals back"))?;
    if let Some(pid) = sys::fork().map_err(io_error("start another process"))? {
        // The channel is the other's alone, so that its end is the channel's.
        let null = fs::File::open("/dev/null").map_err(io_error("open /dev/null"))?;
        sys::redirect(null.as_fd(), 0).map_err(io_error("let go of the channel"))?;
        return sys::wait_or_end(pid).map(Enclosed::Ended).map_err(io_error("wait for the sandbox's end"));
    }
    sys::release_signals().map_err(io_error("let signals through"))?;
    sys::die_with_parent().map_err(io_error("bind this process to its parent"))?;
    Ok(Enclosed::Inside { joined })
}

/// Becomes root in the user namespace of another sandbox's helper; returns that sandbox's network. The helper is the half
/// outside, which has one child, the half inside.
fn join(helper: u32) -> io::Result<fs::File> {
    let inside = || {
        let children = fs::read_to_string(format!("/proc/{helper}/task/{helper}/children"))?;
        let first = children.split_whitespace().next().and_then(|id| id.parse().ok());
        first.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    };
    let network = network::of_another(inside)?;
    // By now the half outside is in it, too.
    let user = fs::File::open(format!("/proc/{helper}/ns/user"))?;
    sys::enter(user.as_fd())?;
    Ok(network)
}

fn become_root() -> Result<(), RootlessError> {
    let (user, group) = sys::acting_ids();
    sys::unshare(libc::CLONE_NEWUSER).map_err(io_error("make a user namespace"))?;
    // Without that, groups could be dropped that are there to keep somebody from something (user_namespaces(7)).
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {user} 1")),
        ("gid_map", format!("0 {group} 1")),
    ] {
        fs::write(format!("/proc/self/{file}"), text)
            .map_err(io_error("become root in the user namespace"))?;
    }
    Ok(())
}

/// Takes a mount namespace of its own, in which `/proc` shows the processes of this sandbox, and enters the network that
/// the sandbox will have. `scratch` is for what the relay needs meanwhile.
pub fn part_from_host(
    network: &NetworkSpec,
    scratch: &Path,
    joined: Option<fs::File>,
) -> Result<(), RootlessError> {
    take_mounts()?;
    match (network, joined) {
        (_, Some(namespace)) => {
            sys::enter(namespace.as_fd()).map_err(io_error("enter the other sandbox's network"))?;
        }
        (NetworkSpec::Relayed { relay, .. }, None) => relay::connect(relay, scratch)?,
        (NetworkSpec::Off | NetworkSpec::On { .. } | NetworkSpec::Joined { .. }, None) => {
            sys::unshare(libc::CLONE_NEWNET).map_err(io_error("make a network namespace"))?;
            network::arrange().map_err(io_error("raise the loopback"))?;
        }
    }
    Ok(())
}

/// A mount namespace of its own, in which `/proc` shows the processes of this sandbox.
pub fn take_mounts() -> Result<(), RootlessError> {
    sys::unshare(libc::CLONE_NEWNS).map_err(io_error("make a mount namespace"))?;
    sys::mount("none", Path::new("/"), "", libc::MS_REC | libc::MS_PRIVATE, "")
        .map_err(io_error("make the mounts private"))?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    sys::mount("proc", Path::new("/proc"), "proc", flags, "").map_err(io_error("mount /proc"))
}

/// Makes the stage this process's root, with `/proc` and `/dev` beside what will be the sandbox's root, and nothing else;
/// returns where the sandbox's root is from here on. No control group can be seen afterwards.
pub fn leave_host(stage: &Path, root: &Path) -> Result<PathBuf, RootlessError> {
    for folder in ["proc", "dev", "sys/fs/cgroup"] {
        fs::create_dir_all(stage.join(folder)).map_err(io_error("make the stage's folders"))?;
    }
    for folder in ["proc", "dev"] {
        sys::clone_tree(&Path::new("/").join(folder), true)
            .and_then(|tree| sys::attach_tree(&tree, &stage.join(folder)))
            .map_err(io_error("take /proc and /dev along"))?;
    }
    std::env::set_current_dir(stage).map_err(io_error("enter the stage"))?;
    sys::pivot_here().map_err(io_error("leave the host's files"))?;
    cgroups::hide().map_err(io_error("hide the host's control groups"))?;
    Ok(root.strip_prefix(stage).map_or_else(|_| root.to_owned(), |below| Path::new("/").join(below)))
}

/// Gives the sandbox's user namespace a name in this process's root. libcontainer hides its descriptors from its own
/// children, which here have no privilege to look all the same.
pub fn name_namespace(descriptor: &Path) -> Result<PathBuf, RootlessError> {
    let name = PathBuf::from("/user-namespace");
    fs::write(&name, b"")
        .and_then(|()| sys::mount(&descriptor.to_string_lossy(), &name, "", libc::MS_BIND, ""))
        .map_err(io_error("name the user namespace"))?;
    Ok(name)
}

/// `wanted`, or this process's own limit where that is lower, for it cannot be raised. From Linux 5.14 on the kernel counts
/// them in each user namespace by itself, before that all of the user's.
pub fn process_limit(wanted: u64) -> u64 {
    hard_limit(&fs::read_to_string("/proc/self/limits").unwrap_or_default())
        .map_or(wanted, |own| own.min(wanted))
}

/// None where there is no limit (proc_pid_limits(5)).
fn hard_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max processes"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// What a sandbox without root lacks on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Why there can be no sandbox at all.
    pub sealing: Option<String>,
    /// Why none can have a network; whether a relay is installed is not looked at.
    pub network: Option<String>,
}

/// Tries it, and tells on the standard output. Where this process is split, one half tells.
pub fn probe() -> io::Result<i32> {
    let found = match enclose(&NetworkSpec::Off) {
        Ok(Enclosed::Ended(code)) => return Ok(code),
        Ok(Enclosed::Inside { .. }) => look(),
        Err(error) => Probe { sealing: Some(chain(&error)), ..Probe::default() },
    };
    serde_json::to_writer(io::stdout(), &found)?;
    Ok(0)
}

fn look() -> Probe {
    let mounted = take_mounts().and_then(|()| {
        sys::mount("none", Path::new("/tmp"), "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "size=4k")
            .map_err(io_error("mount a tmpfs"))
    });
    Probe {
        sealing: mounted.err().map(|error| chain(&error)),
        network: relay::filtered_namespace().err().map(|error| chain(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_processes_is_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units\n\
            Max stack size            8388608              unlimited            bytes\n\
            Max processes             96365                96366                processes\n";
        assert_eq!(hard_limit(limits), Some(96366));
        assert_eq!(hard_limit(&limits.replace("96366", "unlimited")), None);
        assert_eq!(hard_limit(""), None);
    }
}
