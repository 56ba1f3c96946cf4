//! Puts the machine's process where there is nothing: namespaces of its own, a root that is empty, the rights of nobody.
//!
//! ```text
//!   Keeper ── fork ──▶ Cell, the first process of a namespace: opens what the machine is made of
//!     │                 │ lock: own users, mounts, network, messages and names
//!     │ ◀── whose? ─────┤       (asked where root started it: only who is outside may name another user)
//!     │                 │       an empty root ─▶ nobody ─▶ no capabilities, no files, no processes
//!     └─ waits for its end                     the guest runs
//! ```
//!
//! Invariants: it is whole or an error, but for landlock on kernels without it; the cell ends with its keeper, however that
//! one ends, and with the cell all that it was made of: nobody has to clean up.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, CWD, access};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{
    DumpableBehavior, Pid, Resource, Rlimit, Signal, WaitOptions, chdir, getegid, geteuid, getrlimit,
    pivot_root, set_dumpable_behavior, set_parent_process_death_signal, setrlimit, waitpid,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};
use thiserror::Error;

use super::landlock;

/// Debian's and most others' user and group `nobody`.
const NOBODY: u32 = 65_534;
/// A folder that is there wherever a machine can be: /dev/kvm was opened in it.
const MOUNT_POINT: &str = "/dev";
/// More than a machine ever has open: its guest's connections, and what its devices and virtual CPUs have.
const MOST_FILES: u64 = 1024;

/// Why there is no jail.
#[derive(Debug, Error)]
pub enum CellError {
    #[error(
        "the machine's process cannot have namespaces of its own: start it as root, or let users make them (sysctl \
         user.max_user_namespaces and kernel.unprivileged_userns_clone, or AppArmor's userns)"
    )]
    Namespaces(#[source] io::Error),
    #[error("the machine's process cannot be jailed: {what}")]
    Step { what: &'static str, source: io::Error },
    #[error("the socket {} cannot be had in the jail", path.display())]
    Door { path: PathBuf, source: io::Error },
    #[error(
        "the socket {} lets only its owner connect, and the machine's process is nobody: give it the mode 0666, in a \
         folder that is yours alone",
        .0.display()
    )]
    ShutDoor(PathBuf),
    #[error("who started the machine's process is gone")]
    Alone,
    #[error("the machine's process was ended by signal {0}")]
    Killed(i32),
}

fn step(what: &'static str) -> impl Fn(rustix::io::Errno) -> CellError {
    move |error| CellError::Step { what, source: error.into() }
}

/// A socket of the host's that can be connected to from within.
#[derive(Debug)]
pub struct Door {
    pub outside: PathBuf,
    /// Its name in the root that is empty otherwise.
    pub inside: String,
}

/// In which of the two processes this is.
pub enum Side {
    Inside(Cell),
    Outside(Keeper),
}

/// The process that is to be jailed.
pub struct Cell {
    keeper: UnixStream,
    is_root: bool,
}

/// The process that was started.
pub struct Keeper {
    cell: Pid,
    line: UnixStream,
}

/// Closes what was inherited, and goes on as two processes. Nothing may have been opened yet, and no thread been started.
pub fn enter() -> Result<Side, CellError> {
    // SAFETY: nobody in this process has a descriptor beyond the standard ones.
    if unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) } != 0 {
        let source = io::Error::last_os_error();
        return Err(CellError::Step { what: "close what was inherited", source });
    }
    let (user, group) = (geteuid(), getegid());
    // Root in a namespace of one user has no nobody to become, as little as an ordinary user has.
    let is_root =
        user.is_root() && is_mapped(&fs::read_to_string("/proc/self/uid_map").unwrap_or_default(), NOBODY);
    if !is_root {
        own(UnshareFlags::NEWUSER)?;
        name_user(Path::new("/proc/self"), user.as_raw(), group.as_raw())?;
    }
    own(UnshareFlags::NEWPID)?;
    let pair = UnixStream::pair();
    let (keeper, line) = pair.map_err(|source| CellError::Step { what: "make a line to it", source })?;
    // SAFETY: this thread is the only one, so that no lock is held in the child that nobody would ever release.
    let child = unsafe { libc::fork() };
    if child == 0 {
        die_with_keeper()?;
        return Ok(Side::Inside(Cell { keeper, is_root }));
    }
    match Pid::from_raw(child).filter(|_| child > 0) {
        Some(cell) => Ok(Side::Outside(Keeper { cell, line })),
        None => Err(CellError::Step { what: "start it", source: io::Error::last_os_error() }),
    }
}

impl Keeper {
    /// Waits for the other's end; its exit code.
    pub fn keep(mut self) -> Result<u8, CellError> {
        // It hangs up when it is locked in.
        if matches!(self.line.read(&mut [0]), Ok(1)) {
            let folder = format!("/proc/{}", self.cell);
            name_user(Path::new(&folder), NOBODY, NOBODY)?;
            // Should it be gone, that shows in its end.
            let _ = self.line.write_all(&[0]);
        }
        loop {
            match waitpid(Some(self.cell), WaitOptions::empty()) {
                Ok(Some((_, status))) => {
                    if let Some(signal) = status.terminating_signal() {
                        return Err(CellError::Killed(signal));
                    }
                    if let Some(code) = status.exit_status() {
                        return Ok(code as u8);
                    }
                }
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(step("wait for it")(error)),
            }
        }
    }
}

impl Cell {
    /// Shuts it. Whether the kernel's landlock is part of it.
    pub fn lock(mut self, doors: &[Door]) -> Result<bool, CellError> {
        let kinds = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
        if self.is_root {
            set_thread_groups(&[]).map_err(step("leave its groups"))?;
            own(kinds | UnshareFlags::NEWUSER)?;
            self.ask_for_user()?;
        } else {
            own(kinds)?;
        }
        // As who started it, who may have them in a folder of his own.
        let sockets: Vec<_> = doors.iter().map(take_along).collect::<Result<_, _>>()?;
        if self.is_root {
            let (group, user) = (Gid::from_raw(NOBODY), Uid::from_raw(NOBODY));
            set_thread_res_gid(group, group, group).map_err(step("become nobody"))?;
            set_thread_res_uid(user, user, user).map_err(step("become nobody"))?;
        }
        empty_root(doors, &sockets)?;
        drop_rights()?;
        let has_landlock = landlock::forbid_all()
            .map_err(|source| CellError::Step { what: "forbid it all files by landlock", source })?;
        limit(Resource::Core, 0)?;
        limit(Resource::Nofile, MOST_FILES)?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("hide its memory"))?;
        // Becoming another user took it back.
        die_with_keeper()?;
        self.is_kept()?;
        Ok(has_landlock)
    }

    /// Only who is outside may make this process another user than it was.
    fn ask_for_user(&mut self) -> Result<(), CellError> {
        let asked = self.keeper.write_all(&[0]).and_then(|()| self.keeper.read_exact(&mut [0]));
        asked.map_err(|_| CellError::Alone)
    }

    /// It may have gone before its end was to be ours.
    fn is_kept(&mut self) -> Result<(), CellError> {
        let read = self.keeper.set_nonblocking(true).and_then(|()| self.keeper.read(&mut [0]));
        match read {
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            _ => Err(CellError::Alone),
        }
    }
}

/// Has this process start no other and no thread any more.
pub fn forbid_processes() -> Result<(), CellError> {
    limit(Resource::Nproc, 0)
}

fn own(kinds: UnshareFlags) -> Result<(), CellError> {
    // SAFETY: the table of descriptors stays as it is.
    unsafe { unshare_unsafe(kinds) }.map_err(|error| CellError::Namespaces(error.into()))
}

/// Makes a user and a group of the host's the only ones in a process's namespace, as nobody.
fn name_user(process: &Path, user: u32, group: u32) -> Result<(), CellError> {
    let write = |name: &str, text: &str| fs::write(process.join(name), text);
    write("setgroups", "deny")
        .and_then(|()| write("gid_map", &format!("{NOBODY} {group} 1")))
        .and_then(|()| write("uid_map", &format!("{NOBODY} {user} 1")))
        .map_err(CellError::Namespaces)
}

/// Whether a map of users has this one (user_namespaces(7)): its lines are the first inside, the first outside, and how many.
fn is_mapped(map: &str, user: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().filter_map(|number| number.parse::<u64>().ok());
        let (first, count) = (numbers.next().unwrap_or(0), numbers.nth(1).unwrap_or(0));
        (first..first.saturating_add(count)).contains(&u64::from(user))
    })
}

fn die_with_keeper() -> Result<(), CellError> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(step("have it end with who started it"))
}

fn take_along(door: &Door) -> Result<OwnedFd, CellError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, &door.outside, flags)
        .map_err(|error| CellError::Door { path: door.outside.clone(), source: error.into() })
}

/// Leaves it no other file than these sockets.
fn empty_root(doors: &[Door], sockets: &[OwnedFd]) -> Result<(), CellError> {
    let all = step("give it an empty root");
    let nothing_special = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    // What happens to mounts here is nobody else's business, and the other way about.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(&all)?;
    mount("tmpfs", MOUNT_POINT, "tmpfs", nothing_special, c"mode=0555,size=4k").map_err(&all)?;
    chdir(MOUNT_POINT).map_err(&all)?;
    for (door, socket) in doors.iter().zip(sockets) {
        File::create(&door.inside)
            .and_then(|_| {
                let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
                Ok(move_mount(socket, "", CWD, &door.inside, flags)?)
            })
            .map_err(|source| CellError::Door { path: door.outside.clone(), source })?;
    }
    // pivot_root(2): the old root is over the new one then, and taken away.
    pivot_root(".", ".").map_err(&all)?;
    unmount(".", UnmountFlags::DETACH).map_err(&all)?;
    chdir("/").map_err(&all)?;
    mount_remount("/", nothing_special | MountFlags::BIND | MountFlags::RDONLY, "").map_err(&all)?;
    for door in doors {
        access(&door.inside, Access::WRITE_OK).map_err(|_| CellError::ShutDoor(door.outside.clone()))?;
    }
    Ok(())
}

fn drop_rights() -> Result<(), CellError> {
    let all = step("take its capabilities");
    for capability in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << capability)) {
            Ok(()) => {}
            // The kernel has no more of them.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(all(error)),
        }
    }
    clear_ambient_capability_set().map_err(&all)?;
    let none = CapabilitySet::empty();
    let none = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, none).map_err(&all)?;
    set_no_new_privs(true).map_err(&all)
}

fn limit(resource: Resource, most: u64) -> Result<(), CellError> {
    let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
        .map_err(step("limit what it has"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_where_a_map_says_so() {
        assert!(is_mapped("         0          0 4294967295\n", NOBODY));
        assert!(is_mapped("0 1000 1\n1 100000 65536\n", NOBODY));
        assert!(!is_mapped("         0       1000          1\n", NOBODY) && !is_mapped("", NOBODY));
    }
}
