//! Wraps what only the first process of a machine asks of its kernel.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use super::check;

/// Flags of mount(2).
pub const READ_ONLY: libc::c_ulong = libc::MS_RDONLY;
pub const NO_ATIME: libc::c_ulong = libc::MS_NOATIME;
/// For what is no place for programs.
pub const PLAIN: libc::c_ulong = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
pub const NO_SETUID: libc::c_ulong = libc::MS_NOSUID;

/// Mounts a file system of the kind `kind` (mount(2)).
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong, data: &str) -> io::Result<()> {
    let [source, target, kind, data] = [source, target, kind, data].map(CString::new);
    let (source, target, kind, data) = (source?, target?, kind?, data?);
    // SAFETY: all four are NUL-terminated strings that live over the call.
    let mounted =
        unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    check(mounted).map(drop)
}

/// Makes the file system that is mounted at `folder` the root of this process and of all that it starts.
pub fn move_root(folder: &str) -> io::Result<()> {
    std::env::set_current_dir(folder)?;
    // SAFETY: three NUL-terminated strings, and no data. An initial RAM disk cannot be pivoted away (pivot_root(2)).
    let moved = unsafe {
        libc::mount(c".".as_ptr(), c"/".as_ptr(), std::ptr::null(), libc::MS_MOVE, std::ptr::null())
    };
    check(moved)?;
    // SAFETY: a NUL-terminated string.
    check(unsafe { libc::chroot(c".".as_ptr()) })?;
    std::env::set_current_dir("/")
}

/// Goes on as two processes: this one, and the first of a PID namespace, which has mounts, names and messages of its own, too
/// (clone(2)). None in the latter. To be called by a process of one thread.
pub fn fork_apart() -> io::Result<Option<libc::pid_t>> {
    let kinds = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    let flags = libc::c_long::from(kinds | libc::SIGCHLD);
    // SAFETY: without a stack of its own the child goes on on a copy of this one; where there is one thread, no lock is held in
    // the child that nobody would ever release.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    let pid = check(libc::pid_t::try_from(pid).map_err(io::Error::other)?)?;
    Ok(Some(pid).filter(|pid| *pid != 0))
}

/// Waits for a child's end.
pub fn wait_for_child() -> io::Result<libc::pid_t> {
    // SAFETY: no status is asked for.
    check(unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) })
}

/// Becomes a user. Another than root has no capability then, and no way to one.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    if uid != 0 {
        give_up_capabilities()?;
    }
    // SAFETY: the pointer is to so many ids, which live over the call.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })?;
    // SAFETY: takes integers only.
    check(unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: as above. The kernel takes all capabilities with root's id (capabilities(7)).
    check(unsafe { libc::setresuid(uid, uid, uid) }).map(drop)
}

/// Has nothing that is executed from here on bring capabilities, or another user.
fn give_up_capabilities() -> io::Result<()> {
    const NOTHING: libc::c_ulong = 0;
    const YES: libc::c_ulong = 1;
    for capability in 0..libc::c_ulong::from(u64::BITS) {
        // SAFETY: takes integers only.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, NOTHING, NOTHING, NOTHING) }) {
            Ok(_) => {}
            // The kernel has no more of them.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            Err(error) => return Err(error),
        }
    }
    // SAFETY: as above.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, YES, NOTHING, NOTHING, NOTHING) }).map(drop)
}

/// Loads a module; one that is there already is as good (finit_module(2)).
pub fn load_module(module: &File) -> io::Result<()> {
    // SAFETY: a descriptor that is open, a NUL-terminated string, and an integer.
    let loaded = unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    if loaded == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

/// Calls a port of the host's (vsock(7)). Without a word about it the kernel's patience is two seconds.
pub fn call(cid: u32, port: u32, patience: Option<Duration>) -> io::Result<File> {
    // SAFETY: takes integers only.
    let socket = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: socket has just returned this descriptor, and nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    if let Some(patience) = patience {
        wait_for_answer(&socket, patience)?;
    }
    // SAFETY: all zeroes is a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the pointer is to a sockaddr_vm of this length, which lives over the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    Ok(File::from(socket))
}

/// `SO_VM_SOCKETS_CONNECT_TIMEOUT` of linux/vm_sockets.h, which takes a timeval.
const CONNECT_TIMEOUT: libc::c_int = 6;

fn wait_for_answer(socket: &OwnedFd, patience: Duration) -> io::Result<()> {
    let seconds = libc::time_t::try_from(patience.as_secs()).map_err(io::Error::other)?;
    let time = libc::timeval { tv_sec: seconds, tv_usec: 0 };
    let length = size_of::<libc::timeval>() as libc::socklen_t;
    // SAFETY: the pointer is to a timeval of this length, which lives over the call.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const time).cast(),
            length,
        )
    };
    check(set).map(drop)
}

/// Sets the wall clock (clock_settime(2)).
pub fn set_clock(since_1970: Duration) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: libc::time_t::try_from(since_1970.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: since_1970.subsec_nanos().into(),
    };
    // SAFETY: `time` is initialised and lives over the call.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &time) }).map(drop)
}

/// Has the kernel's generator start anew from what it had and these bytes (random(4)).
pub fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    let count = i32::try_from(bytes.len()).map_err(io::Error::other)?;
    // struct rand_pool_info: bits, bytes, and the bytes themselves.
    let mut pool = Vec::with_capacity(8 + bytes.len());
    pool.extend(count.saturating_mul(8).to_ne_bytes());
    pool.extend(count.to_ne_bytes());
    pool.extend(bytes);
    let random = File::open("/dev/random")?;
    // SAFETY: the pointer is to a rand_pool_info whose length stands in it; the kernel copies byte by byte, so its alignment
    // is of no matter.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) })?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }).map(drop)
}

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of linux/random.h.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

pub fn set_host_name(name: &str) -> io::Result<()> {
    // SAFETY: the pointer is to so many bytes, which live over the call.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// Sets a network interface going (netdevice(7)).
pub fn raise(interface: &str) -> io::Result<()> {
    let mut request = interface_request(interface);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the pointer is to an ifreq, which lives over the call.
    check(unsafe { libc::ioctl(any_socket()?.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}

/// Gives a network interface its one address (netdevice(7)).
pub fn set_address(interface: &str, address: Ipv4Addr, netmask: Ipv4Addr) -> io::Result<()> {
    let socket = any_socket()?;
    let mut request = interface_request(interface);
    request.ifr_ifru.ifru_addr = socket_address(address);
    // SAFETY: the pointer is to an ifreq, which lives over the call.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) })?;
    request.ifr_ifru.ifru_netmask = socket_address(netmask);
    // SAFETY: as above.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFNETMASK, &raw const request) }).map(drop)
}

/// Leads all that goes out by a gateway that an interface reaches (`SIOCADDRT` of linux/sockios.h).
pub fn route_by(gateway: Ipv4Addr) -> io::Result<()> {
    let anywhere = socket_address(Ipv4Addr::UNSPECIFIED);
    let route = Route {
        pad1: 0,
        destination: anywhere,
        gateway: socket_address(gateway),
        netmask: anywhere,
        flags: libc::RTF_UP | libc::RTF_GATEWAY,
        pad2: 0,
        pad3: 0,
        pad4: std::ptr::null(),
        metric: 0,
        device: std::ptr::null(),
        mtu: 0,
        window: 0,
        round_trip: 0,
    };
    // SAFETY: the pointer is to a rtentry, whose own pointers may be null.
    check(unsafe { libc::ioctl(any_socket()?.as_raw_fd(), libc::SIOCADDRT, &raw const route) }).map(drop)
}

/// struct rtentry of linux/route.h, which libc has for some C libraries only.
#[repr(C)]
struct Route {
    pad1: libc::c_ulong,
    destination: libc::sockaddr,
    gateway: libc::sockaddr,
    netmask: libc::sockaddr,
    flags: libc::c_ushort,
    pad2: libc::c_short,
    pad3: libc::c_ulong,
    pad4: *const libc::c_void,
    metric: libc::c_short,
    device: *const libc::c_char,
    mtu: libc::c_ulong,
    window: libc::c_ulong,
    round_trip: libc::c_ushort,
}

/// A socket by which interfaces and routes are told.
fn any_socket() -> io::Result<OwnedFd> {
    // SAFETY: takes integers only.
    let socket = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: socket has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left, which ends it.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request
}

/// A sockaddr_in without a port, as a sockaddr: family, port, address, and padding.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

/// Lets programs open as many files as they are used to elsewhere, if they ask.
pub fn raise_file_limit() -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: 1024, rlim_max: 1 << 19 };
    // SAFETY: `limit` is initialised and lives over the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }).map(drop)
}

/// Ends the machine, as whoever made it has it: by a restart, which ends the monitor that runs it.
pub fn restart() -> ! {
    // SAFETY: takes an integer only.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    // Not the first process of a machine, or not root: then ending is all there is to do.
    std::process::exit(1)
}
