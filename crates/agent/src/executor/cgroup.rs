//! Keeps an action within its limits and ends it for sure, by control groups: version 1, version 2, or both side by side.
//!
//! ```text
//! <each hierarchy>/sealci-<instance>/<name>/      one per action, `name` holds no slash
//! ```
//!
//! Invariants: a group in use is in every hierarchy the [`Layout`] names, with the same members; all groups of an agent
//! instance stand under one folder, so that leftovers are found without knowing what ran. The folder goes with the agent;
//! that of one that was killed goes when the next one starts, whichever that is. Without root all of it stands in the group
//! that was given to the user; see `delegation`.

mod delegation;
mod layout;
mod lock;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sealci_core::outcome::Limit;
use sealci_core::plan::Resources;
use sealci_sandbox::birth::Entrance;

pub use self::layout::{Controller, Layout};

use self::layout::Version;
use self::lock::GroupsLock;
use super::all_of;

/// How long a group's members may take to be gone once killed.
const REMOVAL_PATIENCE: Duration = Duration::from_secs(10);
/// The scheduler's period in which the quota counts, as the kernel's own default.
const CPU_PERIOD_US: u64 = 100_000;

/// What cannot be done to a control group.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "there is no control group for {controller} here; mount a cgroup2 file system at /sys/fs/cgroup, or run the agent where one is \
         (systemd gives users what `Delegate=cpu memory pids` in user@.service says)"
    )]
    NoController { controller: Controller },
    #[error(
        "{} has other members than this agent, and so cannot limit what is below it; start the agent in a group by itself, as \
         `systemd-run --user --scope -p Delegate=yes sealci …` does", path.display()
    )]
    Shared {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the members of {} are still there {patience:?} after they were killed: {members}", path.display())]
    StillPopulated { path: PathBuf, patience: Duration, members: String },
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { doing, path, source }
}

/// What a group may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    /// Processes and threads together.
    pub pids: u64,
}

impl Limits {
    /// What was reserved for an action, and so many processes.
    pub fn of(resources: &Resources, pids: u64) -> Self {
        Self { cpu_millis: resources.cpu_millis, memory_bytes: resources.memory_bytes, pids }
    }
}

/// The groups of one agent instance. Its folders go with the last clone, if they are empty.
#[derive(Debug, Clone)]
pub struct Cgroups(Arc<Instance>);

#[derive(Debug)]
struct Instance {
    layout: Layout,
    /// `sealci-<instance>`.
    folder: String,
    /// None where another process has the same instance, or none can be had: then the folders stay.
    lock: Option<GroupsLock>,
}

impl Instance {
    /// Removes the folders; says whether all are gone. What is not empty stays for the next sweep.
    fn remove_folders(&self) -> bool {
        let gone = |hierarchy: &&Path| is_gone(fs::remove_dir(hierarchy.join(&self.folder)));
        self.layout.hierarchies().iter().filter(|hierarchy| !gone(hierarchy)).count() == 0
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(lock) = self.lock.take()
            && self.remove_folders()
        {
            lock.discard();
        }
    }
}

impl Cgroups {
    /// Makes the instance's folder in each hierarchy. Fails where this process may not, as without root.
    pub fn open(layout: Layout, instance: &str) -> Result<Self, CgroupError> {
        let locks = lock::folder(layout.is_given);
        clear_up_after_others(&layout, &locks);
        let folder = format!("sealci-{instance}");
        let lock = GroupsLock::take(&locks, &folder).unwrap_or_else(|error| {
            tracing::warn!(%error, folder = %locks.display(), "no lock can be had: empty control groups will stay");
            None
        });
        let groups = Self(Arc::new(Instance { layout, folder, lock }));
        let Instance { layout, folder, .. } = groups.0.as_ref();
        let controllers = layout.needs_version_2();
        for hierarchy in layout.hierarchies() {
            let folder = hierarchy.join(folder);
            let is_unified = layout.unified.as_deref() == Some(hierarchy);
            if is_unified && layout.is_given {
                delegation::step_aside(hierarchy)
                    .map_err(io_error("move this agent below", hierarchy))
                    .map_err(is_shared(hierarchy))?;
            }
            make_folder(&folder)?;
            if is_unified {
                hand_down(hierarchy, &controllers).map_err(is_shared(hierarchy))?;
                hand_down(&folder, &controllers)?;
            }
        }
        Ok(groups)
    }

    /// The group of this name, which somebody else makes and removes.
    pub fn of(&self, name: &str) -> Cgroup {
        self.group(name)
    }

    /// Makes a group with these limits.
    pub fn create(&self, name: &str, limits: &Limits) -> Result<Cgroup, CgroupError> {
        let group = self.group(name);
        let made = group.make().and_then(|()| group.limit(limits));
        match made {
            Ok(()) => Ok(group),
            Err(error) => {
                // What went wrong first is what should be told.
                let _ = group.remove();
                Err(error)
            }
        }
    }

    /// Ends and removes what is left of an instance whose agent never comes again; nothing is, usually.
    pub fn clear_up_after(layout: Layout, instance: &str) -> Result<(), CgroupError> {
        let folder = format!("sealci-{instance}");
        if layout.hierarchies().iter().any(|hierarchy| hierarchy.join(&folder).exists()) {
            return Self::open(layout, instance)?.sweep();
        }
        Ok(())
    }

    /// Ends and removes every group of this instance, and its folders.
    pub fn sweep(&self) -> Result<(), CgroupError> {
        let hierarchies = self.0.layout.hierarchies().into_iter();
        let names = hierarchies.flat_map(|hierarchy| children(&hierarchy.join(&self.0.folder)));
        all_of(names.map(|name| self.group(&name).remove()))
    }

    fn group(&self, name: &str) -> Cgroup {
        let below = Path::new(&self.0.folder).join(name);
        Cgroup { layout: self.0.layout.clone(), below }
    }
}

/// Removes what is empty of the groups whose agents are no more.
fn clear_up_after_others(layout: &Layout, locks: &Path) {
    for (folder, lock) in GroupsLock::left_behind(locks) {
        let gone = |hierarchy: &&Path| is_gone(remove_tree(&hierarchy.join(&folder)));
        if layout.hierarchies().iter().filter(|hierarchy| !gone(hierarchy)).count() == 0 {
            tracing::info!(folder, "removed the control groups of an agent that is no more");
            lock.discard();
        }
    }
}

/// Whether a removed folder is gone, by whomever.
fn is_gone(removed: io::Result<()>) -> bool {
    removed.map_or_else(|error| error.kind() == io::ErrorKind::NotFound, |()| true)
}

/// One action's group. It stays until it is removed.
#[derive(Debug, Clone)]
pub struct Cgroup {
    layout: Layout,
    /// Below each hierarchy's root.
    below: PathBuf,
}

impl Cgroup {
    fn make(&self) -> Result<(), CgroupError> {
        for hierarchy in self.layout.hierarchies() {
            let path = hierarchy.join(&self.below);
            fs::create_dir(&path).map_err(io_error("make the control group", &path))?;
        }
        Ok(())
    }

    fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        let quota_us = (limits.cpu_millis.saturating_mul(CPU_PERIOD_US) / 1000).max(1000);
        let memory = limits.memory_bytes.to_string();
        match self.layout.of(Controller::Cpu).0 {
            Version::V2 => self.write(Controller::Cpu, "cpu.max", &format!("{quota_us} {CPU_PERIOD_US}"))?,
            Version::V1 => {
                self.write(Controller::Cpu, "cpu.cfs_period_us", &CPU_PERIOD_US.to_string())?;
                self.write(Controller::Cpu, "cpu.cfs_quota_us", &quota_us.to_string())?;
            }
        }
        // Swap would only make reaching the limit slow; kernels without its accounting have no such file.
        match self.layout.of(Controller::Memory).0 {
            Version::V2 => {
                self.write(Controller::Memory, "memory.max", &memory)?;
                let _ = self.write(Controller::Memory, "memory.swap.max", "0");
            }
            Version::V1 => {
                self.write(Controller::Memory, "memory.limit_in_bytes", &memory)?;
                let _ = self.write(Controller::Memory, "memory.memsw.limit_in_bytes", &memory);
            }
        }
        self.write(Controller::Pids, "pids.max", &limits.pids.to_string())
    }

    /// What a process needs to be born in the group; what it forks is in, too.
    pub fn entrance(&self) -> Result<Entrance, CgroupError> {
        let mut entrance = Entrance::default();
        for hierarchy in self.layout.hierarchies() {
            let folder = hierarchy.join(&self.below);
            if self.layout.unified.as_deref() == Some(hierarchy) {
                let opened = fs::File::open(&folder).map_err(io_error("open", &folder))?;
                entrance.unified = Some(opened.into());
            } else {
                let path = folder.join("tasks");
                let opened = fs::File::options().write(true).open(&path).map_err(io_error("open", &path))?;
                entrance.tasks.push(opened);
            }
        }
        Ok(entrance)
    }

    /// Sends KILL to all members.
    pub fn kill(&self) {
        if let Some(unified) = &self.layout.unified
            && fs::write(unified.join(&self.below).join("cgroup.kill"), "1").is_ok()
        {
            return;
        }
        // Before kernel 5.14: frozen, none forks while the others are killed.
        let frozen = self.layout.freezer.as_ref().map(|path| path.join(&self.below).join("freezer.state"));
        if let Some(state) = &frozen {
            let _ = fs::write(state, "FROZEN");
        }
        for pid in self.members() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if let Some(state) = &frozen {
            let _ = fs::write(state, "THAWED");
        }
    }

    /// The limit that something in the group has run into, if any. CPU is only ever slowed down.
    pub fn limit_reached(&self) -> Option<Limit> {
        let (memory_file, key) = match self.layout.of(Controller::Memory).0 {
            Version::V2 => ("memory.events", "oom_kill"),
            Version::V1 => ("memory.oom_control", "oom_kill"),
        };
        if self.counter(Controller::Memory, memory_file, key) > 0 {
            Some(Limit::Memory)
        } else if self.counter(Controller::Pids, "pids.events", "max") > 0 {
            Some(Limit::Pids)
        } else {
            None
        }
    }

    /// Kills what is left and removes the group. Waits for the dying, and so is not for an async task itself.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let until = Instant::now() + REMOVAL_PATIENCE;
        let mut pause = Duration::from_millis(1);
        loop {
            let mut busy = None;
            for hierarchy in self.layout.hierarchies() {
                let path = hierarchy.join(&self.below);
                match remove_tree(&path) {
                    Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => busy = Some(path),
                    result => result.map_err(io_error("remove the control group", &path))?,
                }
            }
            let Some(path) = busy else { return Ok(()) };
            if Instant::now() >= until {
                let members = self.members().iter().map(|pid| format!("pid {pid}")).collect::<Vec<_>>();
                return Err(CgroupError::StillPopulated {
                    path,
                    patience: REMOVAL_PATIENCE,
                    members: members.join(", "),
                });
            }
            self.kill();
            // Version 1 has no event for the last member's end.
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    fn members(&self) -> Vec<i32> {
        let mut members = Vec::new();
        for hierarchy in self.layout.hierarchies() {
            let path = hierarchy.join(&self.below).join("cgroup.procs");
            let text = fs::read_to_string(path).unwrap_or_default();
            members.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        members.sort_unstable();
        members.dedup();
        members
    }

    fn write(&self, controller: Controller, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.layout.of(controller).1.join(&self.below).join(file);
        fs::write(&path, value).map_err(io_error("write", &path))
    }

    fn counter(&self, controller: Controller, file: &str, key: &str) -> u64 {
        let path = self.layout.of(controller).1.join(&self.below).join(file);
        let text = fs::read_to_string(path).unwrap_or_default();
        read_counter(&text, key)
    }
}

fn read_counter(text: &str, key: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

/// A group hands nothing down while somebody is in it.
fn is_shared(path: &Path) -> impl FnOnce(CgroupError) -> CgroupError {
    let path = path.to_owned();
    move |error| match error {
        CgroupError::Io { source, .. } if source.raw_os_error() == Some(nix::libc::EBUSY) => {
            CgroupError::Shared { path, source }
        }
        error => error,
    }
}

fn make_folder(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(io_error("make the control group", path)(error))
        }
        _ => Ok(()),
    }
}

/// Lets the groups below `path` use these controllers.
fn hand_down(path: &Path, controllers: &[Controller]) -> Result<(), CgroupError> {
    let file = path.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&file).map_err(io_error("read", &file))?;
    for controller in controllers {
        if !enabled.split_whitespace().any(|name| name == controller.as_str()) {
            fs::write(&file, format!("+{controller}")).map_err(io_error("enable controllers in", &file))?;
        }
    }
    Ok(())
}

/// Removes a group and those below it; one that is gone is fine.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => {
            for child in children(path) {
                remove_tree(&path.join(child))?;
            }
            fs::remove_dir(path)
        }
        result => result,
    }
}

fn children(path: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of the running system that are there.
    fn folders(layout: &Layout, name: &str) -> usize {
        layout.hierarchies().iter().filter(|path| path.join(name).exists()).count()
    }

    #[test]
    fn empty_groups_go_with_their_agent_or_with_the_next_ones_start() {
        let name = |which: &str| format!("test-{which}-{}", std::process::id());
        let opened =
            Layout::detect().and_then(|layout| Ok((layout.clone(), Cgroups::open(layout, &name("one"))?)));
        let Ok((layout, one)) = opened else {
            return eprintln!("SKIPPED: control groups cannot be used here");
        };
        let all = layout.hierarchies().len();
        let limits = Limits::of(&Resources::DEFAULT, 10);
        let group = one.create("action", &limits).unwrap();
        let folder = format!("sealci-{}", name("one"));
        assert_eq!(folders(&layout, &folder), all);
        // One that is killed gives its lock back, and removes nothing.
        let killed = format!("sealci-{}", name("killed"));
        drop(GroupsLock::take(&lock::folder(layout.is_given), &killed).unwrap().unwrap());
        layout.hierarchies().iter().for_each(|path| fs::create_dir(path.join(&killed)).unwrap());

        let other = Cgroups::open(layout.clone(), &name("other")).unwrap();
        assert_eq!(folders(&layout, &killed), 0, "it is cleared up after");
        assert_eq!(folders(&layout, &folder), all, "what has an agent is left alone");
        drop((one, other));
        assert_eq!(folders(&layout, &format!("sealci-{}", name("other"))), 0);
        assert_eq!(folders(&layout, &folder), all, "it is not empty");
        group.remove().unwrap();
        drop(Cgroups::open(layout.clone(), &name("one")).unwrap());
        assert_eq!(folders(&layout, &folder), 0);
    }

    #[test]
    fn a_counter_is_read_by_its_whole_name() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 9\n";
        assert_eq!(read_counter(text, "oom_kill"), 2);
        assert_eq!(read_counter("", "oom_kill"), 0);
        assert_eq!(read_counter("max x\n", "max"), 0);
    }
}
