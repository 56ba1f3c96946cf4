//! Tells whether a container ran into one of its limits: by its control groups, where this process sees them, and by what
//! the daemon tells of it.
//!
//! The control groups know at once and know both limits, but go with the container. The daemon tells of memory alone, and a
//! little later.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sealci_core::outcome::Limit;

const ROOT: &str = "/sys/fs/cgroup";

/// What is known of one container's limits.
#[derive(Debug, Clone, Default)]
pub(super) struct LimitWatch {
    /// Files with counters: of which limit, and the counter's name.
    counters: Vec<(Limit, PathBuf, &'static str)>,
    /// The daemon told that the kernel killed something for want of memory.
    memory_told: Arc<AtomicBool>,
}

impl LimitWatch {
    /// Where the daemon's word is put down.
    pub fn memory_told(&self) -> Arc<AtomicBool> {
        self.memory_told.clone()
    }

    /// Watches the groups of a process that is the first of a container.
    pub fn watch(&mut self, pid: i64, container: &str) {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        self.counters = counters(&text, container);
    }

    pub fn reached(&self) -> Option<Limit> {
        let counted = |(limit, file, key): &(Limit, PathBuf, &str)| {
            let text = fs::read_to_string(file).ok()?;
            let count: u64 = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok())?;
            (count > 0).then_some(*limit)
        };
        // Memory stands first.
        let memory_told = || self.memory_told.load(Ordering::Acquire).then_some(Limit::Memory);
        self.counters.iter().find_map(counted).or_else(memory_told)
    }
}

/// Reads `/proc/<pid>/cgroup` (cgroups(7)). A group that is not named after the container is somebody else's: the daemon
/// counts processes otherwise than this one does.
fn counters(text: &str, container: &str) -> Vec<(Limit, PathBuf, &'static str)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if container.is_empty() || !path.contains(container) {
            continue;
        }
        let group = |hierarchy: &str| Path::new(ROOT).join(hierarchy).join(path.trim_start_matches('/'));
        let has = |name: &str| controllers.split(',').any(|controller| controller == name);
        if has("memory") {
            found.push((Limit::Memory, group("memory").join("memory.oom_control"), "oom_kill "));
        }
        if has("pids") {
            found.push((Limit::Pids, group("pids").join("pids.events"), "max "));
        }
        if controllers.is_empty() {
            for hierarchy in ["", "unified"] {
                found.push((Limit::Memory, group(hierarchy).join("memory.events"), "oom_kill "));
                found.push((Limit::Pids, group(hierarchy).join("pids.events"), "max "));
            }
        }
    }
    found.sort_by_key(|(limit, ..)| *limit != Limit::Memory);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_in_every_layout() {
        let files = |text: &str| -> Vec<String> {
            counters(text, "c0ffee").iter().map(|(_, path, _)| path.display().to_string()).collect()
        };
        assert_eq!(
            files(
                "9:pids:/docker/c0ffee\n8:cpu,cpuacct:/docker/c0ffee\n7:memory:/docker/c0ffee\n1:name=systemd:/docker/c0ffee\n"
            ),
            [
                "/sys/fs/cgroup/memory/docker/c0ffee/memory.oom_control",
                "/sys/fs/cgroup/pids/docker/c0ffee/pids.events"
            ]
        );
        let unified = files("0::/system.slice/docker-c0ffee.scope\n");
        assert_eq!(unified[0], "/sys/fs/cgroup/system.slice/docker-c0ffee.scope/memory.events");
        assert_eq!(unified.len(), 4);
        assert_eq!(files("0::/user.slice\n7:memory:/\n"), Vec::<String>::new());
    }
}
