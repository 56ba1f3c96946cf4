//! Wraps the kernel's calls for namespaces and mounts as safe functions.
//!
//! All unsafe code of this crate stands here.

mod child;
mod privileges;

pub use self::privileges::keep_network_only;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn text(bytes: &OsStr) -> io::Result<CString> {
    Ok(CString::new(bytes.as_bytes())?)
}

/// Gives what is made from here on the modes that are asked for, whatever the agent's mask is.
pub fn reset_umask() {
    // SAFETY: takes an integer and cannot fail.
    unsafe { libc::umask(0o022) };
}

/// Moves this process into new namespaces.
pub fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: takes an integer only. The process has one thread, so no other is surprised.
    check(unsafe { libc::unshare(flags) }.into()).map(drop)
}

/// mount(2). `data` holds the file system's options.
pub fn mount(source: &str, target: &Path, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let (source, target) = (text(OsStr::new(source))?, text(target.as_os_str())?);
    let (kind, data) = (text(OsStr::new(kind))?, text(OsStr::new(data))?);
    // SAFETY: all four are NUL-terminated strings that live over the call.
    let result =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    check(result.into()).map(drop)
}

/// Takes what is mounted at `target`, and on it, out of this mount namespace.
pub fn detach(target: &Path) -> io::Result<()> {
    let target = text(target.as_os_str())?;
    // SAFETY: `target` is a NUL-terminated string that lives over the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }.into()).map(drop)
}

/// A copy of what is mounted at `path`, mounted nowhere yet.
pub fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = text(path.as_os_str())?;
    let mut flags = libc::OPEN_TREE_CLONE as libc::c_uint | libc::O_CLOEXEC as libc::c_uint;
    if recursive {
        flags |= libc::AT_RECURSIVE as libc::c_uint;
    }
    // SAFETY: `path` is a NUL-terminated string that lives over the call; the rest are integers.
    let fd = check(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })?;
    // SAFETY: open_tree has just returned this descriptor, and nothing else owns it. Descriptors fit in 32 bits.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Sets attributes (`MOUNT_ATTR_*`) of a tree that is mounted nowhere yet; with `user_namespace`, maps its owners.
pub fn set_attributes(
    tree: &OwnedFd,
    recursive: bool,
    set: u64,
    user_namespace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let mut attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    if let Some(namespace) = user_namespace {
        attributes.attr_set |= libc::MOUNT_ATTR_IDMAP;
        // Descriptors are not negative.
        attributes.userns_fd = namespace.as_raw_fd() as u64;
    }
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is empty and static, `attributes` is a mount_attr of the size that is told, and both live over the
    // call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw mut attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// Mounts a tree from [`clone_tree`] on the folder or file that a descriptor stands for.
pub fn attach_tree_to(tree: &OwnedFd, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty and static; the rest are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH,
        )
    };
    check(result).map(drop)
}

/// Mounts a tree from [`clone_tree`].
pub fn attach_tree(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = text(target.as_os_str())?;
    // SAFETY: both paths are NUL-terminated strings that live over the call; the rest are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(result).map(drop)
}

/// Makes a user namespace in which `count` ids from 0 on are the host's from `base` on; see [`mapped_namespace`].
pub fn user_namespace(base: u32, count: u32) -> io::Result<OwnedFd> {
    let map = format!("0 {base} {count}");
    mapped_namespace(&map, &map)
}

/// Makes a user namespace with these maps of user and group ids, written as user_namespaces(7) says.
///
/// A child of this process is born in it and ends; the namespace lives on in the descriptor.
pub fn mapped_namespace(users: &str, groups: &str) -> io::Result<OwnedFd> {
    // SAFETY: all zeroes is a valid clone_args.
    let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
    how.flags = libc::CLONE_NEWUSER as u64;
    let mut stack = child::Stack::new();
    // SAFETY: takes nothing and cannot fail.
    let parent = unsafe { libc::getpid() };
    // SAFETY: `linger` takes a number for a pointer, and its stack lives until it is waited for.
    let pid = unsafe { child::start(how, &mut stack, linger, parent as usize as *const _) }?;
    let opened = fs::write(format!("/proc/{pid}/uid_map"), users)
        .and_then(|()| fs::write(format!("/proc/{pid}/gid_map"), groups))
        .and_then(|()| File::open(format!("/proc/{pid}/ns/user")));
    // SAFETY: takes integers only. The child is not waited for yet, so its id is its own.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    wait(pid)?;
    opened.map(OwnedFd::from)
}

/// Does nothing until it is killed, or its parent ends.
unsafe extern "C" fn linger(parent: *const libc::c_void) -> ! {
    // SAFETY: takes integers only, and ends the child at once if its parent was quicker.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        while libc::getppid() as usize == parent as usize {
            libc::pause();
        }
        libc::_exit(0)
    }
}

/// A network namespace in which nobody is, after `prepare` was run in it.
///
/// A child of this process makes it and ends; the namespace lives on in the descriptor. To be called in a process with
/// one thread, in which `/proc` shows its own children.
pub fn network_namespace(prepare: impl FnOnce() -> io::Result<()>) -> io::Result<OwnedFd> {
    let (mut from_child, mut to_parent) = io::pipe()?;
    let (mut from_parent, to_child) = io::pipe()?;
    let Some(pid) = fork()? else {
        drop((from_child, to_child));
        let made = unshare(libc::CLONE_NEWNET).and_then(|()| prepare());
        let code = made.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
        // Until the parent has opened the namespace: the other end closes.
        let _ = to_parent.write_all(&code.to_ne_bytes()).and_then(|()| from_parent.read(&mut [0]));
        exit_now(0)
    };
    drop((to_parent, from_parent));
    let mut code = [0; 4];
    let opened = from_child.read_exact(&mut code).and_then(|()| match i32::from_ne_bytes(code) {
        0 => File::open(format!("/proc/{pid}/ns/net")),
        code => Err(io::Error::from_raw_os_error(code)),
    });
    drop(to_child);
    let _ = wait(pid);
    opened.map(OwnedFd::from)
}

/// Moves this process into a namespace.
pub fn enter(namespace: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes integers only; the descriptor is open.
    check(unsafe { libc::setns(namespace.as_raw_fd(), 0) }.into()).map(drop)
}

/// Splits this process in two; none in the child. To be called in a process with one thread.
pub fn fork() -> io::Result<Option<libc::pid_t>> {
    // SAFETY: this process has one thread, so the child may do all that a process may.
    let pid = check(unsafe { libc::fork() }.into())?;
    // Process ids fit in 32 bits.
    Ok((pid != 0).then_some(pid as libc::pid_t))
}

/// Ends this process at once, running nothing of what its ends usually run.
pub fn exit_now(code: libc::c_int) -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(code) }
}

/// The user and group as which this process acts.
pub fn acting_ids() -> (u32, u32) {
    // SAFETY: both take nothing and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Has this thread make files as this user and group, and keeps it allowed to go everywhere all the same.
pub fn act_on_files_as(id: u32) -> io::Result<()> {
    // SAFETY: all take integers only. They tell the id before, and -1 changes nothing.
    let ids = unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
        [libc::setfsgid(libc::gid_t::MAX), libc::setfsuid(libc::uid_t::MAX)]
    };
    // Ids of the kernel's are compared bit by bit, whatever their sign.
    if ids.iter().any(|now| *now as u32 != id) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // Another user than root loses what lets root act on everybody's files (capabilities(7)).
    caps::read(None, caps::CapSet::Permitted)
        .and_then(|permitted| caps::set(None, caps::CapSet::Effective, &permitted))
        .map_err(io::Error::other)
}

/// Keeps TERM and the news of a child's end for [`wait_or_end`]. Inherited by what is forked, until [`release_signals`].
pub fn hold_signals() -> io::Result<()> {
    change_mask(libc::SIG_BLOCK)
}

/// Undoes [`hold_signals`].
pub fn release_signals() -> io::Result<()> {
    change_mask(libc::SIG_UNBLOCK)
}

fn held_signals() -> libc::sigset_t {
    // SAFETY: all zeroes is a valid sigset_t; the calls change only that one.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGCHLD);
        set
    }
}

fn change_mask(how: libc::c_int) -> io::Result<()> {
    let set = held_signals();
    // SAFETY: `set` is a whole sigset_t, and no old one is asked for.
    check(unsafe { libc::sigprocmask(how, &set, ptr::null_mut()) }.into()).map(drop)
}

/// Waits for a child's end as [`wait`] does; kills it when asked to end by TERM. Signals must be held.
pub fn wait_or_end(pid: libc::pid_t) -> io::Result<i32> {
    let set = held_signals();
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to whole values that live over the call.
        if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if signal == libc::SIGTERM {
            // SAFETY: takes integers only. The child is not waited for yet, so its id is its own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            return wait(pid);
        }
        let mut status = 0;
        // SAFETY: the pointer is to an exclusively borrowed int.
        if check(unsafe { libc::waitpid(pid, &mut status, libc::WNOHANG) }.into())? != 0 {
            return Ok(exit_code(status));
        }
    }
}

/// Makes the folder in which this process stands its root, and lets go of the old one with all that is mounted there.
pub fn pivot_here() -> io::Result<()> {
    // SAFETY: both paths are static; the rest are integers.
    unsafe {
        check(libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()))?;
        // The old root lies on top of the new one.
        check(libc::umount2(c".".as_ptr(), libc::MNT_DETACH).into())?;
    }
    std::env::set_current_dir("/")
}

fn exit_code(status: libc::c_int) -> i32 {
    if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
}

/// Waits for a child's end; 128 + n for signal n.
pub fn wait(pid: libc::pid_t) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to an exclusively borrowed int.
        match check(unsafe { libc::waitpid(pid, &mut status, 0) }.into()) {
            Ok(_) => return Ok(exit_code(status)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits for the end of one of these children, the first; as [`wait`]. The ends of others are passed over.
pub fn wait_for_either(one: libc::pid_t, other: libc::pid_t) -> io::Result<(libc::pid_t, i32)> {
    let mut status = 0;
    loop {
        // SAFETY: the pointer is to an exclusively borrowed int.
        match check(unsafe { libc::waitpid(-1, &mut status, 0) }.into()) {
            // Process ids fit in 32 bits.
            Ok(pid) if [one, other].contains(&(pid as libc::pid_t)) => {
                return Ok((pid as libc::pid_t, exit_code(status)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Has the kernel kill this process when its parent dies. Lost by any change of user: to be called after the last.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into()).map(drop)
}

/// Lets this process's namespaces be found by others of its user.
pub fn show_namespaces() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }.into()).map(drop)
}

/// Becomes another program, with no variables in its environment. Returns only what went wrong.
pub fn exec(program: &OsStr, arguments: &[OsString]) -> io::Error {
    let words = [program].into_iter().chain(arguments.iter().map(OsString::as_os_str)).map(text);
    let words: Vec<CString> = match words.collect() {
        Ok(words) => words,
        Err(error) => return error,
    };
    let pointers: Vec<_> = words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
    let environment = [ptr::null()];
    // SAFETY: there is one NUL-terminated string at least; both arrays end with a null pointer, and all live over the call.
    unsafe { libc::execve(pointers[0], pointers.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Has descriptor `target` mean what `source` means.
pub fn redirect(source: BorrowedFd<'_>, target: libc::c_int) -> io::Result<()> {
    // SAFETY: only for 0 to 2, which std never closes by itself, so no owner loses its own.
    debug_assert!((0..=2).contains(&target));
    // SAFETY: takes integers only; see above.
    check(unsafe { libc::dup2(source.as_raw_fd(), target) }.into()).map(drop)
}

/// A socket to one of the kernel's netlink families.
pub fn netlink(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    let socket =
        check(unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, family) }.into())?;
    // SAFETY: socket has just returned this descriptor, and nothing else owns it. Descriptors fit in 32 bits.
    Ok(unsafe { OwnedFd::from_raw_fd(socket as libc::c_int) })
}

/// Brings the loopback of this process's network namespace up.
pub fn raise_loopback() -> io::Result<()> {
    // SAFETY: takes integers only.
    let socket =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into())?;
    // SAFETY: socket has just returned this descriptor, and nothing else owns it. Descriptors fit in 32 bits.
    let socket = unsafe { OwnedFd::from_raw_fd(socket as libc::c_int) };
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(*b"lo") {
        *slot = byte as libc::c_char;
    }
    // IFF_UP is 1.
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads the ifreq to which the pointer points; the socket is open.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(result.into()).map(drop)
}

/// Makes taps, and opens them.
pub const TUNNEL_DEVICE: &str = "/dev/net/tun";

/// Makes a tap in this process's network namespace that stays until that goes.
pub fn make_tap(name: &str) -> io::Result<()> {
    let device = File::options().read(true).write(true).open(TUNNEL_DEVICE)?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left, which ends it.
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *slot = byte as libc::c_char;
    }
    // Both fit in 16 bits.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes the ifreq to which the pointer points; the device is open.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) }.into())?;
    // SAFETY: takes integers only.
    check(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST, 1) }.into()).map(drop)
}

/// clone3's flag, from linux/sched.h; `libc` cuts it off to an `int`.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// A child that does nothing but arrange itself and become another program.
pub struct Child<'a> {
    pub program: &'a CStr,
    /// With the program's name in front.
    pub arguments: &'a [CString],
    /// Become 0, 1 and 2.
    pub standard: [BorrowedFd<'a>; 3],
    /// Files that move the thread that writes `0` into them.
    pub tasks: &'a [BorrowedFd<'a>],
    /// Takes the error code of what goes wrong, as a native-endian `i32`; must close on exec.
    pub report: BorrowedFd<'a>,
}

impl Child<'_> {
    /// Starts it, in the control group of that folder if there is one; returns its pidfd.
    pub fn start(&self, cgroup: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
        // Made here: between fork and exec the child of a process with threads may not allocate.
        let mut arguments: Vec<*const libc::c_char> =
            self.arguments.iter().map(|argument| argument.as_ptr()).collect();
        arguments.push(ptr::null());
        let mut pidfd: libc::c_int = -1;
        // SAFETY: all zeroes is a valid clone_args.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        // Its parent waits until it is another program, or has ended.
        how.flags = libc::CLONE_PIDFD as u64 | libc::CLONE_VFORK as u64;
        how.pidfd = &raw mut pidfd as u64;
        if let Some(cgroup) = cgroup {
            how.flags |= CLONE_INTO_CGROUP;
            // Descriptors are not negative.
            how.cgroup = cgroup.as_raw_fd() as u64;
        }
        let birth = Birth { child: self, arguments: arguments.as_ptr() };
        // SAFETY: `pidfd`, `birth` and all it leads to live over the call, and so until the child needs them no more.
        unsafe { child::start(how, &mut child::Stack::new(), be_born, (&raw const birth).cast()) }?;
        // SAFETY: clone3 has just stored this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
    }

    /// # Safety
    ///
    /// Only for the child, and `arguments` has to end with a null pointer. Only what is async-signal-safe is called here:
    /// another thread may hold any lock, or have held it when the process was copied.
    unsafe fn become_it(&self, arguments: *const *const libc::c_char) -> ! {
        let environment = [ptr::null::<libc::c_char>()];
        // SAFETY: every pointer is to something that lives until the child is another program.
        unsafe {
            let mut done = true;
            for file in self.tasks {
                done = done && libc::write(file.as_raw_fd(), c"0".as_ptr().cast(), 1) == 1;
            }
            // Out of the way of 0 to 2 first, should they be among the three.
            let mut moved = [0; 3];
            for (moved, descriptor) in moved.iter_mut().zip(self.standard) {
                *moved = libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3);
                done = done && *moved >= 0;
            }
            for (target, moved) in (0..).zip(moved) {
                done = done && libc::dup2(moved, target) == target;
            }
            // The runtime ignores SIGPIPE, which would be handed down; a thread may block what it likes.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
            done = done && libc::chdir(c"/".as_ptr()) == 0;
            // What whoever started the agent forgot to close is not the action's.
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            if done {
                libc::execve(self.program.as_ptr(), arguments, environment.as_ptr());
            }
            let code = (*libc::__errno_location()).to_ne_bytes();
            libc::write(self.report.as_raw_fd(), code.as_ptr().cast(), code.len());
            libc::_exit(127)
        }
    }
}

/// What [`Child::start`] hands to its child.
struct Birth<'a> {
    child: &'a Child<'a>,
    /// Ends with a null pointer.
    arguments: *const *const libc::c_char,
}

/// Is what a [`Child`] begins with: `birth` is a [`Birth`].
unsafe extern "C" fn be_born(birth: *const libc::c_void) -> ! {
    // SAFETY: it is what `Child::start` has given, which waits.
    unsafe {
        let birth = &*birth.cast::<Birth<'_>>();
        birth.child.become_it(birth.arguments)
    }
}

/// Sends a signal to the process of a pidfd.
pub fn signal_process(pidfd: libc::c_int, signal: libc::c_int) -> io::Result<()> {
    let info = ptr::null::<libc::siginfo_t>();
    // SAFETY: takes integers, and a null pointer for "as kill(2) does".
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, info, 0) }).map(drop)
}

/// Waits for the end of a pidfd's process and takes note of it. A process that was reaped already is fine.
pub fn reap(pidfd: &OwnedFd) -> io::Result<()> {
    loop {
        // SAFETY: all zeroes is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // Descriptors are not negative.
        let id = pidfd.as_raw_fd() as libc::id_t;
        // SAFETY: the pointer is to an exclusively borrowed siginfo_t.
        match check(unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED) }.into()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(()),
            result => return result.map(drop),
        }
    }
}

/// Leaves a descriptor open over an exec.
#[cfg(test)]
pub fn let_be_inherited(file: &File) {
    // SAFETY: takes integers only.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, 0) };
}
