//! Who takes over the process that runs a guest has nothing: looked at from outside, while a guest runs.

use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;

use tempfile::TempDir;

use super::initramfs::Initramfs;
use super::lab::{Lab, Running, run};

const NOBODY: u32 = 65_534;
/// Someone without rights.
const USER: u32 = 64_999;

const KINDS: [&str; 6] = ["user", "mnt", "net", "pid", "ipc", "uts"];

fn goes_on(lab: &Lab) -> tempfile::NamedTempFile {
    Initramfs::running(&lab.busybox, "echo ready; sleep 1000\n").file()
}

/// What /proc/PID/status says.
fn status(guest: &Running, name: &str) -> Vec<String> {
    let status = fs::read_to_string(guest.proc("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}: {status}")).split_whitespace().map(str::to_owned).collect()
}

fn limit(guest: &Running, name: &str) -> String {
    let limits = fs::read_to_string(guest.proc("limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

/// The names in the root that it sees.
fn root(guest: &Running) -> Vec<String> {
    let names = fs::read_dir(guest.proc("root")).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn holds_nothing(guest: &Running, user: u32) {
    for kind in KINDS {
        let own = fs::read_link(guest.proc(&format!("ns/{kind}"))).unwrap();
        assert_ne!(own, fs::read_link(format!("/proc/self/ns/{kind}")).unwrap(), "{kind}");
    }
    let user = user.to_string();
    assert!(status(guest, "Uid").iter().chain(&status(guest, "Gid")).all(|id| *id == user));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(guest, set), ["0000000000000000"], "{set}");
    }
    assert_eq!((status(guest, "NoNewPrivs"), status(guest, "Seccomp")), (vec!["1".into()], vec!["2".into()]));
    // It is the first process of its namespace: all in there ends with it.
    assert_eq!(status(guest, "NSpid").last().map(String::as_str), Some("1"));
    let map = fs::read_to_string(guest.proc("uid_map")).unwrap();
    assert_eq!(map.split_whitespace().next(), Some("65534"), "{map}");
    assert_eq!(limit(guest, "Max processes"), "0");
    assert_eq!(limit(guest, "Max core file size"), "0");
    assert_eq!(limit(guest, "Max open files"), "1024");
}

#[test]
fn who_takes_it_over_has_nothing() {
    let Some(lab) = Lab::open() else { return };
    // A descriptor that whoever starts it has left open.
    let folder = TempDir::new().unwrap();
    let leak = File::create(folder.path().join("leak")).unwrap();
    let socket = folder.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    let initramfs = goes_on(&lab);
    let mut command = lab.console(&initramfs);
    command.arg("--vsock").arg(format!("7={}", socket.display()));
    let kept = leak.as_raw_fd();
    let keep = move || {
        // SAFETY: it makes a copy of an open descriptor, and touches no memory.
        if unsafe { libc::dup2(kept, 77) } == 77 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: dup2 may be called between fork and exec.
    unsafe { command.pre_exec(keep) };
    let mut guest = Running::start(command);
    guest.wait_for("ready");
    holds_nothing(&guest, NOBODY);
    assert_eq!(status(&guest, "Groups"), Vec::<String>::new());
    assert_eq!(root(&guest), ["port-7"]);
    for descriptor in fs::read_dir(guest.proc("fd")).unwrap() {
        let to = fs::read_link(descriptor.unwrap().path()).unwrap();
        let to = to.to_string_lossy();
        assert!(["anon_inode:", "pipe:", "socket:"].iter().any(|kind| to.starts_with(kind)), "{to} is open");
    }
    // It ends with who was started, which is killed without having a say.
    let process = guest.proc("");
    guest.kill();
    assert!(!process.join("root").exists());
}

#[test]
fn a_user_without_rights_has_it_as_tight() {
    let Some(lab) = Lab::open() else { return };
    // As udev lets the group kvm.
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666)).unwrap();
    let initramfs = goes_on(&lab);
    fs::set_permissions(initramfs.path(), Permissions::from_mode(0o644)).unwrap();
    let mut command = lab.console(&initramfs);
    command.uid(USER).gid(USER);
    let guest = Running::start(command);
    guest.wait_for("ready");
    holds_nothing(&guest, USER);
    assert_eq!(root(&guest), Vec::<String>::new());
}

#[test]
fn a_socket_that_nobody_may_use_is_refused() {
    let Some(lab) = Lab::open() else { return };
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();
    let initramfs = goes_on(&lab);
    let mut command = lab.command(&initramfs);
    command.arg("--vsock").arg(format!("7={}", socket.display()));
    let outcome = run(command, std::time::Duration::from_secs(60)).unwrap();
    assert_eq!(outcome.status.code(), Some(1));
    assert!(outcome.said.contains("give it the mode 0666"), "{outcome:?}");
}
