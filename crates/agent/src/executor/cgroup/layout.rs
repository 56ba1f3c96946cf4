//! Finds where a machine keeps its control groups: hierarchies of version 1, of version 2, or both side by side.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::{CgroupError, delegation, io_error};

/// What limits a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    pub(super) const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// Where this machine keeps its control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    cpu: (Version, PathBuf),
    memory: (Version, PathBuf),
    pids: (Version, PathBuf),
    /// The version 2 hierarchy, even if it limits nothing here: it kills a whole group in one write.
    pub(super) unified: Option<PathBuf>,
    pub(super) freezer: Option<PathBuf>,
    /// `unified` is not a whole hierarchy, but the group in it that was given to this user.
    pub(super) is_given: bool,
}

impl Layout {
    /// Reads the layout of the running system.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let mounts = fs::read_to_string(path).map_err(io_error("read", path))?;
        let given = (!nix::unistd::geteuid().is_root())
            .then(|| delegation::given_group(&fs::read_to_string("/proc/self/cgroup").unwrap_or_default()));
        Self::from_mounts(&mounts, given.as_deref(), |unified| {
            fs::read_to_string(unified.join("cgroup.controllers")).unwrap_or_default()
        })
    }

    /// Reads `/proc/self/mountinfo` (proc_pid_mountinfo(5)); `given` is the user's group below a version 2 mount, and
    /// `controllers` tells what is offered there.
    fn from_mounts(
        mounts: &str,
        given: Option<&Path>,
        controllers: impl Fn(&Path) -> String,
    ) -> Result<Self, CgroupError> {
        let mut unified = None;
        let mut version_1: Vec<(PathBuf, Vec<&str>)> = Vec::new();
        for line in mounts.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let Some(mount_point) = before.split(' ').nth(4) else { continue };
            let mut after = after.split(' ');
            let (kind, options) = (after.next().unwrap_or(""), after.nth(1).unwrap_or(""));
            match kind {
                "cgroup2" if unified.is_none() => {
                    let mount_point = Path::new(mount_point);
                    unified =
                        Some(given.map_or_else(|| mount_point.to_owned(), |given| mount_point.join(given)));
                }
                "cgroup" => version_1.push((PathBuf::from(mount_point), options.split(',').collect())),
                _ => {}
            }
        }
        let offered = unified.as_deref().map(&controllers).unwrap_or_default();
        let in_version_1 = |name: &str| {
            let (path, _) = version_1.iter().find(|(_, options)| options.contains(&name))?;
            Some(path.clone())
        };
        let find = |controller: Controller| {
            let name = controller.as_str();
            match (&unified, in_version_1(name)) {
                (_, Some(path)) => Ok((Version::V1, path)),
                (Some(path), None) if offered.split_whitespace().any(|offer| offer == name) => {
                    Ok((Version::V2, path.clone()))
                }
                _ => Err(CgroupError::NoController { controller }),
            }
        };
        Ok(Self {
            cpu: find(Controller::Cpu)?,
            memory: find(Controller::Memory)?,
            pids: find(Controller::Pids)?,
            freezer: in_version_1("freezer"),
            unified,
            is_given: given.is_some(),
        })
    }

    /// Every hierarchy in use, once, the one that kills first.
    pub(super) fn hierarchies(&self) -> Vec<&Path> {
        let killer = self.unified.as_ref().or(self.freezer.as_ref()).map(PathBuf::as_path);
        let mut all: Vec<&Path> = killer.into_iter().collect();
        for (_, path) in [&self.memory, &self.pids, &self.cpu] {
            if !all.contains(&path.as_path()) {
                all.push(path);
            }
        }
        all
    }

    pub(super) fn of(&self, controller: Controller) -> &(Version, PathBuf) {
        match controller {
            Controller::Cpu => &self.cpu,
            Controller::Memory => &self.memory,
            Controller::Pids => &self.pids,
        }
    }

    pub(super) fn needs_version_2(&self) -> Vec<Controller> {
        Controller::ALL.into_iter().filter(|controller| self.of(*controller).0 == Version::V2).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
37 31 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
    const PURE: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn path(text: &str) -> PathBuf {
        PathBuf::from(text)
    }

    #[test]
    fn a_hybrid_host_limits_by_version_1_and_kills_by_version_2() {
        let layout = Layout::from_mounts(HYBRID, None, |_| "hugetlb\n".into()).unwrap();
        assert_eq!(layout.cpu, (Version::V1, path("/sys/fs/cgroup/cpu,cpuacct")));
        assert_eq!(layout.memory, (Version::V1, path("/sys/fs/cgroup/memory")));
        assert_eq!(layout.pids, (Version::V1, path("/sys/fs/cgroup/pids")));
        assert_eq!(layout.hierarchies()[0], path("/sys/fs/cgroup/unified"));
        assert_eq!(layout.hierarchies().len(), 4);
        assert!(layout.needs_version_2().is_empty());
    }

    #[test]
    fn a_pure_host_has_one_hierarchy() {
        let layout = Layout::from_mounts(PURE, None, |_| "cpuset cpu io memory pids\n".into()).unwrap();
        assert_eq!(layout.memory, (Version::V2, path("/sys/fs/cgroup")));
        assert_eq!(layout.hierarchies(), [Path::new("/sys/fs/cgroup")]);
        assert_eq!(layout.needs_version_2(), Controller::ALL);
    }

    #[test]
    fn a_users_groups_stand_in_the_one_that_was_given() {
        let offered = |group: &Path| {
            assert_eq!(group, Path::new("/sys/fs/cgroup/user.slice/ci"));
            "cpu memory pids".to_owned()
        };
        let layout = Layout::from_mounts(PURE, Some(Path::new("user.slice/ci")), offered).unwrap();
        assert_eq!(layout.hierarchies(), [Path::new("/sys/fs/cgroup/user.slice/ci")]);
        assert!(layout.is_given);
    }

    #[test]
    fn a_version_1_host_kills_by_its_freezer() {
        let mounts: String =
            HYBRID.lines().filter(|line| !line.contains("cgroup2")).collect::<Vec<_>>().join("\n");
        let layout = Layout::from_mounts(&mounts, None, |_| unreachable!("there is no version 2")).unwrap();
        assert_eq!(layout.hierarchies()[0], path("/sys/fs/cgroup/freezer"));
    }

    #[test]
    fn a_missing_controller_is_named() {
        let error = Layout::from_mounts(PURE, None, |_| "cpu pids".into()).unwrap_err();
        assert!(matches!(error, CgroupError::NoController { controller: Controller::Memory }), "{error}");
        assert!(Layout::from_mounts("", None, |_| String::new()).is_err());
    }
}
