//! Looks at what of an action is on this machine: processes, control groups, namespaces, mounts, network links.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Whether this process is root's.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// The processes that have this entry, `NAME=value`, in their environment.
///
/// Each command of an action has its manifest's variables, and so has whatever it starts, unless that clears them.
pub fn processes_with(entry: &str) -> Vec<u32> {
    let has = |pid: &u32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|one| one == entry.as_bytes())
    };
    processes().into_iter().filter(has).collect()
}

fn processes() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// What an action has of its own on this machine, read while it runs.
#[derive(Debug)]
pub struct Footprint {
    /// Such as `net:[4026532000]`.
    namespaces: BTreeSet<PathBuf>,
    /// The groups' paths below their hierarchies.
    cgroups: BTreeSet<String>,
    /// The attempt's name, which its mounts and groups bear.
    attempt: String,
}

const NAMESPACES: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

impl Footprint {
    /// Reads it off one of the action's processes.
    pub fn of(pid: u32) -> Option<Self> {
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).ok()?;
        let attempt = environment.split('\0').find_map(|one| one.strip_prefix("SEALCI_ATTEMPT="))?.to_owned();
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let paths = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(str::to_owned);
        Some(Self {
            namespaces: namespaces_of(pid),
            cgroups: paths.filter(|path| path.contains(&attempt)).collect(),
            attempt,
        })
    }

    /// Whether it shares no namespace with this process, and stands in groups of its own.
    pub fn is_sealed(&self) -> bool {
        let ours = namespaces_of(std::process::id());
        self.namespaces.len() == NAMESPACES.len()
            && self.namespaces.is_disjoint(&ours)
            && !self.cgroups.is_empty()
    }

    /// What of it is still there; empty when all is gone.
    pub fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        // Whoever is in its mount namespace is found by the mounts. Namespaces' numbers tell nothing: the kernel gives
        // them to others once they are free.
        for pid in processes() {
            let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            for mount in mounts.lines().filter(|mount| mount.contains(&self.attempt)) {
                left.push(format!("process {pid} has the mount {mount}"));
            }
        }
        for hierarchy in cgroup_hierarchies() {
            for group in &self.cgroups {
                let path = hierarchy.join(group.trim_start_matches('/'));
                if path.exists() {
                    left.push(format!("the control group {}", path.display()));
                }
            }
        }
        left
    }
}

fn namespaces_of(pid: u32) -> BTreeSet<PathBuf> {
    NAMESPACES.iter().filter_map(|name| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok()).collect()
}

/// Where control groups are mounted, for version 1 and 2.
pub fn cgroup_hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let place = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup").then(|| before.split(' ').nth(4).map(PathBuf::from))?
    };
    mounts.lines().filter_map(place).collect()
}

/// The links that an agent has made for its sandboxes: their names begin with the block whose lock it holds.
pub fn network_links(agent: u32) -> Option<Vec<String>> {
    let descriptors = fs::read_dir(format!("/proc/{agent}/fd")).ok()?;
    let number = descriptors.flatten().find_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        let name = target.strip_prefix("/run/sealci").ok()?.to_str()?;
        name.strip_prefix("network-")?.strip_suffix(".lock")?.parse::<u32>().ok()
    })?;
    let prefix = format!("sealci{number:02}-");
    let names =
        fs::read_dir("/sys/class/net").ok()?.flatten().filter_map(|e| e.file_name().into_string().ok());
    Some(names.filter(|name| name.starts_with(&prefix)).collect())
}

/// Removes the control groups of an agent that is no more. One that is killed leaves its folder to its successor, which a
/// test's agent has not.
pub fn remove_cgroups(agent_folder: &Path) {
    // As the agent names them: by its folder's place (FNV-1a).
    let bytes = agent_folder.as_os_str().as_encoded_bytes();
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    for hierarchy in cgroup_hierarchies() {
        let folder = hierarchy.join(format!("sealci-{hash:016x}"));
        for group in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(group.path());
        }
        // What is still populated stays; a test that cares has looked.
        let _ = fs::remove_dir(&folder);
    }
}
