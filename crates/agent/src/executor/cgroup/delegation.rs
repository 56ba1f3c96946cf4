//! Finds the control group that was given to an ordinary user (cgroups(7), delegation), as systemd does with `Delegate=yes`.
//!
//! ```text
//! <the given group>/           hands its controllers down, and so may have no members
//!   sealci-agents/             the agent, who was born in the given group and has stepped aside
//!   sealci-<instance>/<name>/  one per action
//! ```
//!
//! Only version 2 is given away. Nobody but this process is moved: who else is in the group is not the agent's to judge.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the agents of one group are.
const ASIDE: &str = "sealci-agents";

/// The group that this process was born in, as a path below where version 2 is mounted. Reads `/proc/self/cgroup`
/// (proc_pid_cgroup(5)).
pub fn given_group(own: &str) -> PathBuf {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let path = Path::new(path);
    // One that has stepped aside, or was started by one that has.
    if path.ends_with(ASIDE) { path.parent().unwrap_or(path).to_owned() } else { path.to_owned() }
}

/// Takes this process out of the group, so that it can hand controllers down. Fails with `EBUSY`, as handing down would, where
/// that would not empty the group.
pub fn step_aside(group: &Path) -> io::Result<()> {
    let own = std::process::id().to_string();
    if fs::read_to_string(group.join("cgroup.procs"))?.lines().any(|member| member != own) {
        return Err(io::Error::from_raw_os_error(nix::libc::EBUSY));
    }
    let aside = group.join(ASIDE);
    match fs::create_dir(&aside) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // 0 is whoever writes.
    fs::write(aside.join("cgroup.procs"), "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_given_group_is_the_same_before_and_after_stepping_aside() {
        let given = Path::new("user.slice/user@7.service/ci.service");
        for text in [
            "0::/user.slice/user@7.service/ci.service\n",
            "0::/user.slice/user@7.service/ci.service/sealci-agents\n",
            "3:memory:/other\n1:name=systemd:/x\n0::/user.slice/user@7.service/ci.service\n",
        ] {
            assert_eq!(given_group(text), given, "{text}");
        }
        for text in ["0::/\n", "", "3:memory:/other\n"] {
            assert_eq!(given_group(text), Path::new(""), "{text}");
        }
    }
}
