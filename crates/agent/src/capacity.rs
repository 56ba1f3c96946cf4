//! Finds out what this machine has to give: what it has, bounded by what its cgroup lets this agent use.

use std::fs;
use std::path::{Path, PathBuf};

use sealci_core::plan::Resources;

/// What the agent offers where its configuration names nothing: all CPUs, and 90 % of the memory, so that the agent
/// and the system keep some.
pub fn detected() -> Resources {
    // The standard library asks the scheduler's affinity mask and the cgroup's CPU quota.
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    let installed = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text));
    let allowed = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| cgroup_limit(&text));
    let memory_bytes = [installed, allowed].into_iter().flatten().min().unwrap_or(1 << 30);
    Resources { cpu_millis: cpus * 1000, memory_bytes: memory_bytes / 10 * 9 }
}

/// `MemTotal` of proc_meminfo(5), in bytes.
fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The smallest memory limit of the process's cgroup and those above it.
fn cgroup_limit(proc_self_cgroup: &str) -> Option<u64> {
    memory_cgroups(proc_self_cgroup)
        .into_iter()
        .filter_map(|file| memory_limit(&fs::read_to_string(file).ok()?))
        .min()
}

/// The files that may hold a limit, from `/proc/self/cgroup` (cgroups(7)): version 2 has one hierarchy with number 0,
/// version 1 one with the controller `memory`.
fn memory_cgroups(proc_self_cgroup: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in proc_self_cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let (root, file) = match (number, controllers) {
            ("0", "") => ("/sys/fs/cgroup", "memory.max"),
            (_, controllers) if controllers.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let cgroup = Path::new(path.trim_start_matches('/'));
        files.extend(cgroup.ancestors().map(|cgroup| Path::new(root).join(cgroup).join(file)));
    }
    files
}

/// A limit's file: `max`, or bytes. Version 1 writes a number near 2⁶³ where there is no limit.
fn memory_limit(text: &str) -> Option<u64> {
    text.trim().parse().ok().filter(|bytes| *bytes < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_detected_here() {
        let capacity = detected();
        assert!(capacity.cpu_millis >= 1000 && capacity.memory_bytes > 1 << 24, "{capacity:?}");
    }

    #[test]
    fn memory_is_read_in_kibibytes() {
        assert_eq!(total_memory("MemTotal:       24689744 kB\nMemFree: 1 kB\n"), Some(24_689_744 * 1024));
        assert_eq!(total_memory("nothing"), None);
    }

    #[test]
    fn limits_are_looked_for_all_the_way_up() {
        let files = memory_cgroups("0::/a/b\n");
        let expected = ["a/b/memory.max", "a/memory.max", "memory.max"];
        assert_eq!(files, expected.map(|file| Path::new("/sys/fs/cgroup").join(file)));
        let files = memory_cgroups("5:cpu,cpuacct:/x\n3:memory:/x\n");
        let expected = ["x/memory.limit_in_bytes", "memory.limit_in_bytes"];
        assert_eq!(files, expected.map(|file| Path::new("/sys/fs/cgroup/memory").join(file)));
    }

    #[test]
    fn no_limit_is_none() {
        assert_eq!(memory_limit("max\n"), None);
        assert_eq!(memory_limit("9223372036854771712\n"), None);
        assert_eq!(memory_limit("1073741824\n"), Some(1 << 30));
    }
}
