//! Wraps the few kernel calls that std does not offer, each as a safe function.
//!
//! All unsafe code of the init stands here and in [`machine`].

// Named, for those who take this file by its path.
#[path = "sys/machine.rs"]
pub mod machine;

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes orphans below this process its children, as they are PID 1's (prctl(2), `PR_SET_CHILD_SUBREAPER`).
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: takes integers only and touches no memory of ours.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// Leaves the parent's session and terminal. Fails harmlessly in a process that leads a group already.
pub fn lead_session() {
    // SAFETY: takes no arguments and touches no memory.
    unsafe { libc::setsid() };
}

/// Closes this process's memory, descriptors and environment to others of the same user, who are what it supervises
/// (prctl(2), `PR_SET_DUMPABLE`). A command is open again once it has become another program.
pub fn close_to_others() -> io::Result<()> {
    // SAFETY: takes integers only.
    check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) }).map(drop)
}

/// Gives files that the commands make the usual mode.
pub fn reset_umask() {
    // SAFETY: takes an integer and cannot fail.
    unsafe { libc::umask(0o022) };
}

/// Keeps whatever the parent left open from reaching the commands.
pub fn close_on_exec_from(first: u32) {
    // SAFETY: marks descriptors and closes none, so no owner in this process loses its own. A kernel before 5.11 refuses,
    // and then only what a careless parent left open is passed on.
    unsafe { libc::close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
}

pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take integers; `fd` is open for as long as it is borrowed.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// Asks for a larger pipe; a user past their quota keeps the size they have.
pub fn enlarge_pipe(fd: BorrowedFd<'_>, bytes: libc::c_int) {
    // SAFETY: F_SETPIPE_SZ takes an integer; `fd` is open for as long as it is borrowed.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
}

/// How many bytes can be read without waiting.
pub fn bytes_readable(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, to which the pointer points; `fd` is open for as long as it is borrowed.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

pub fn make_fifo(path: &Path, mode: u32) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that lives over the call.
    check(unsafe { libc::mkfifo(path.as_ptr(), mode) }).map(drop)
}

/// As whom this process makes files.
pub fn own_uid() -> u32 {
    // SAFETY: takes no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

/// Sets when a symbolic link itself was changed last.
pub fn set_link_time(path: &Path, seconds: u64, nanoseconds: u32) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(seconds).unwrap_or(libc::time_t::MAX),
        tv_nsec: nanoseconds.into(),
    };
    // SAFETY: `path` is a NUL-terminated string and the times an array of two, both alive over the call.
    let result = unsafe {
        libc::utimensat(libc::AT_FDCWD, path.as_ptr(), [time, time].as_ptr(), libc::AT_SYMLINK_NOFOLLOW)
    };
    check(result).map(drop)
}

/// Turns signals into something to poll for: blocks them and opens a signalfd(2).
pub fn signal_file(signals: &[libc::c_int]) -> io::Result<File> {
    // SAFETY: all zeroes is a valid sigset_t, and sigemptyset makes it a defined one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid sigset_t, exclusively borrowed.
    unsafe { libc::sigemptyset(&mut set) };
    for signal in signals {
        // SAFETY: as above.
        check(unsafe { libc::sigaddset(&mut set, *signal) })?;
    }
    // SAFETY: `set` is initialised; no old mask is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) })?;
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = check(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: signalfd has just returned this descriptor, and nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// The kernel's clock that runs on in a suspended machine, and nobody sets (clock_gettime(2)).
pub fn boot_time() -> io::Result<Duration> {
    // SAFETY: all zeroes is a valid timespec.
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: `now` is exclusively borrowed.
    check(unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut now) })?;
    Ok(Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32))
}

/// Something to poll for that becomes readable when [`boot_time`] gets to what [`set_alarm`] said (timerfd_create(2)): also at
/// once after a suspension, where a timeout of poll(2) has only begun to count on.
pub fn boot_alarm() -> io::Result<File> {
    // SAFETY: no pointers are passed.
    let fd =
        check(unsafe { libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) })?;
    // SAFETY: timerfd_create has just returned this descriptor, and nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Sets the alarm to a [`boot_time`]; one that is past rings at once.
pub fn set_alarm(alarm: &File, at: Duration) -> io::Result<()> {
    let (tv_sec, tv_nsec) = (i64::try_from(at.as_secs()).unwrap_or(i64::MAX), i64::from(at.subsec_nanos()));
    // Zero would switch it off.
    let it_value = libc::timespec { tv_sec, tv_nsec: if at.is_zero() { 1 } else { tv_nsec } };
    let setting = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
    // SAFETY: `setting` is initialised; no old setting is asked for.
    let set = unsafe {
        libc::timerfd_settime(alarm.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &setting, std::ptr::null_mut())
    };
    check(set).map(drop)
}

/// The size of one entry that a signalfd yields.
pub const SIGNAL_ENTRY_BYTES: usize = size_of::<libc::signalfd_siginfo>();

/// The number of a signal and its sender's pid, 0 for one from outside of this PID namespace (signalfd(2)).
pub fn read_signal(entry: &[u8]) -> Option<(libc::c_int, u32)> {
    let number = entry.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))?;
    let sender = entry.get(SENDER_OFFSET..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))?;
    Some((number, sender))
}

const SENDER_OFFSET: usize = std::mem::offset_of!(libc::signalfd_siginfo, ssi_pid);

/// What to watch on a descriptor, and what poll(2) saw.
#[repr(transparent)]
pub struct Watch(libc::pollfd);

impl Watch {
    pub fn new(fd: &impl AsFd, readable: bool, writable: bool) -> Self {
        let mut events = 0;
        if readable {
            events |= libc::POLLIN;
        }
        if writable {
            events |= libc::POLLOUT;
        }
        // poll(2) ignores negative descriptors: what is not watched does not even report a hang-up.
        let fd = if events == 0 { -1 } else { fd.as_fd().as_raw_fd() };
        Self(libc::pollfd { fd, events, revents: 0 })
    }

    /// Takes bytes, or is broken: a write does not wait.
    pub fn writable(&self) -> bool {
        self.0.revents & (libc::POLLOUT | libc::POLLERR) != 0
    }

    /// Readable, hung up or broken: a read does not wait.
    pub fn readable(&self) -> bool {
        self.0.revents & (libc::POLLIN | libc::POLLHUP | libc::POLLERR) != 0
    }
}

/// Waits until something happens on a watched descriptor, a signal comes in, or the time is over.
pub fn poll(watches: &mut [Watch], timeout: Option<Duration>) -> io::Result<()> {
    // Rounded up, so that a deadline has passed when its poll is over.
    let timeout = match timeout {
        None => -1,
        Some(timeout) => {
            libc::c_int::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX)
        }
    };
    // SAFETY: `Watch` is transparently one pollfd; poll reads and writes as many of them as are exclusively borrowed here.
    let result = unsafe { libc::poll(watches.as_mut_ptr().cast(), watches.len() as libc::nfds_t, timeout) };
    match check(result) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        Err(error) => Err(error),
    }
}

/// A child that ended.
pub struct Reaped {
    pub pid: libc::pid_t,
    /// As a shell reports it: 128 + n for signal n.
    pub exit_code: i32,
    /// Of the child and all descendants it waited for.
    pub cpu_user: Duration,
    pub cpu_system: Duration,
    /// The largest resident set among them.
    pub memory_peak_bytes: u64,
    /// Of storage, by all of them.
    pub read_bytes: u64,
    pub write_bytes: u64,
}

/// What asking for an ended child found.
pub enum Reaping {
    Child(Reaped),
    /// There are children, and all of them live.
    NoneEnded,
    /// There is no child, and so no descendant.
    NoChildren,
}

/// Collects one ended child, without waiting.
pub fn reap() -> Reaping {
    let mut status: libc::c_int = 0;
    // SAFETY: all zeroes is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to exclusively borrowed values of the right type.
    let pid = unsafe { libc::wait4(-1, &mut status, libc::WNOHANG, &mut usage) };
    match pid {
        0 => Reaping::NoneEnded,
        pid if pid < 0 => Reaping::NoChildren,
        pid => Reaping::Child(Reaped {
            pid,
            exit_code: if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            },
            cpu_user: duration(usage.ru_utime),
            cpu_system: duration(usage.ru_stime),
            memory_peak_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
            // Linux counts in blocks of 512 bytes, whatever the file system's are.
            read_bytes: u64::try_from(usage.ru_inblock).unwrap_or(0) * 512,
            write_bytes: u64::try_from(usage.ru_oublock).unwrap_or(0) * 512,
        }),
    }
}

fn duration(time: libc::timeval) -> Duration {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let micros = u64::try_from(time.tv_usec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_micros(micros)
}

/// Sends a signal; a negative pid means a group, -1 everyone. Who is gone already needs none.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: takes integers only.
    unsafe { libc::kill(pid, signal) };
}

/// Clock ticks per second in `/proc/<pid>/stat`.
pub fn ticks_per_second() -> u64 {
    // SAFETY: takes an integer only.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|ticks| *ticks > 0).unwrap_or(100)
}

/// Runs ahead of what it supervises, where it may: a fork bomb shall not keep it from its work.
pub fn raise_priority() {
    // SAFETY: takes integers only. Without the privilege it fails, and all stays as it is.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, RAISED_PRIORITY) };
}

const RAISED_PRIORITY: libc::c_int = -10;

/// Whether [`be_spared`] was asked for.
static IS_SPARED: AtomicBool = AtomicBool::new(false);

/// Has the kernel kill whatever else before this process, to have memory (proc(5), `oom_score_adj`). What it supervises is not
/// spared.
pub fn be_spared() -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", "-1000")?;
    IS_SPARED.store(true, Ordering::Relaxed);
    Ok(())
}

/// Undoes [`be_spared`] in a child that has not executed yet.
fn be_spared_no_more() -> io::Result<()> {
    // SAFETY: all of these may be called between fork and exec; they take integers, a NUL-terminated string, and one byte that
    // lives over the call.
    unsafe {
        // The file is root's otherwise: closed to others as its parent is. What it becomes is open again anyway.
        check(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))?;
        let file = check(libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC))?;
        if libc::write(file, b"0".as_ptr().cast(), 1) != 1 {
            return Err(io::Error::last_os_error());
        }
        libc::close(file);
    }
    Ok(())
}

/// Undoes in a command what this process did to itself, and has the kernel kill it when the thread that spawns it dies:
/// of one thread, the whole init.
pub fn make_ordinary(command: &mut Command) {
    let hook = || {
        // SAFETY: all of these may be called between fork and exec (signal-safety(7)); they take integers, and a signal set
        // that sigemptyset defines before it is read.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            if libc::getpriority(libc::PRIO_PROCESS, 0) == RAISED_PRIORITY {
                libc::setpriority(libc::PRIO_PROCESS, 0, 0);
            }
            // std leaves the mask as it is in the parent.
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()))?;
        }
        if IS_SPARED.load(Ordering::Relaxed) { be_spared_no_more() } else { Ok(()) }
    };
    // SAFETY: the hook allocates nothing and takes no lock.
    unsafe { command.pre_exec(hook) };
}
