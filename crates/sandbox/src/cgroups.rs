//! Keeps libcontainer away from every control group of the host.
//!
//! The agent has put this process into the action's own groups, and what it forks is in them, too; there is nothing for
//! libcontainer to do. But it would: when a container cannot be made, its clean-up sends KILL to every process that
//! stands in the `cgroup.procs` of the path it was given, in *each* hierarchy of version 1, the ones in which this process
//! is at the root included. As root, that is the whole machine. So the helper's mount namespace has no control groups at
//! all: libcontainer finds none, and all it does with groups comes to nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::sys;

/// Where libcontainer looks. An empty tmpfs there means version 1 without any hierarchy.
const ROOT: &str = "/sys/fs/cgroup";
const MOUNTS: &str = "/proc/self/mountinfo";

/// Detaches every control group file system from this process's mount namespace, which must be its own and private.
/// Refuses if one stays: nothing of libcontainer may run then.
pub fn hide() -> io::Result<()> {
    // Usually all of them hang below this one and go with it. Each call waits for the kernel's grace period, and where
    // nothing is mounted here, or it is locked, the loop finds what there is.
    let _ = sys::detach(Path::new(ROOT));
    // The deepest first: what is mounted on top hides what is below.
    for mount in group_mounts(&fs::read_to_string(MOUNTS)?).into_iter().rev() {
        sys::detach(&mount)?;
    }
    sys::mount(
        "none",
        Path::new(ROOT),
        "tmpfs",
        libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
        "size=4k",
    )?;
    let left = group_mounts(&fs::read_to_string(MOUNTS)?);
    if left.is_empty() {
        Ok(())
    } else {
        Err(io::Error::other(format!("control groups are still mounted: {left:?}")))
    }
}

/// The mount points of control groups in a `mountinfo` (proc_pid_mountinfo(5)), in its order.
fn group_mounts(mounts: &str) -> Vec<PathBuf> {
    mounts
        .lines()
        .filter_map(|line| {
            let (before, after) = line.split_once(" - ")?;
            let kind = after.split(' ').next()?;
            let place = before.split(' ').nth(4)?;
            matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(unescape(place)))
        })
        .collect()
}

/// Space, tab, line feed and backslash stand there as octal escapes.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_control_group_mount_is_found() {
        let mounts = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:7 master:1 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /mnt/a\\040b rw - cgroup2 cgroup2 rw
42 31 0:38 / /proc rw - proc proc rw
";
        let found = group_mounts(mounts);
        assert_eq!(
            found,
            ["/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/systemd", "/mnt/a b"].map(PathBuf::from)
        );
    }
}
