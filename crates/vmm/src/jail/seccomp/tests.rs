use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};

use super::super::super::virtio::block::{Access, Block};
use super::super::super::virtio::driver::{DATA, Driver, Part};
use super::super::super::virtio::vsock::{HostEnd, Vsock};
use super::super::super::virtio::{Cause, Device, balloon::Balloon, entropy::Entropy};
use super::*;

#[test]
fn threads_have_no_more_calls_than_was_promised() {
    assert!(calls(Role::Vcpu).len() <= 15, "{}", calls(Role::Vcpu).len());
    assert!(calls(Role::Devices).len() <= 35, "{}", calls(Role::Devices).len());
    for role in [Role::Vcpu, Role::Devices, Role::Main] {
        Filter::compile(role).unwrap();
    }
}

/// Names for a child what it does.
const WHAT: &str = "SEALCI_SECCOMP_TEST";

/// Runs `inside` in a process of its own, as it may end the process.
fn child(what: &str) -> ExitStatus {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", "jail::seccomp::tests::inside", "--ignored"]).env(WHAT, what);
    command.output().unwrap().status
}

/// What a thread tries under its filter.
const FORBIDDEN: &[(&str, Role, fn())] = &[
    ("open", Role::Devices, || drop(std::fs::File::open("/dev/null"))),
    ("process", Role::Devices, || drop(Command::new("/bin/true").status())),
    ("thread", Role::Vcpu, || drop(std::thread::Builder::new().spawn(|| {}))),
    ("internet", Role::Devices, || drop(std::net::UdpSocket::bind("127.0.0.1:0"))),
    ("socket of a virtual CPU", Role::Vcpu, || drop(UnixStream::pair())),
    // SAFETY: none of these calls touches memory that is used.
    ("code", Role::Devices, || unsafe {
        let rights = libc::PROT_READ | libc::PROT_EXEC;
        libc::mmap(std::ptr::null_mut(), 4096, rights, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
    }),
    // SAFETY: as above.
    ("another ioctl", Role::Vcpu, || unsafe {
        libc::ioctl(0, libc::TIOCGWINSZ, std::ptr::null_mut::<u8>());
    }),
    // SAFETY: as above; nobody has this address.
    ("a process's memory", Role::Devices, || unsafe {
        libc::process_vm_readv(1, std::ptr::null(), 0, std::ptr::null(), 0, 0);
    }),
];

#[test]
fn a_call_that_a_thread_does_not_need_ends_the_process() {
    for (what, ..) in FORBIDDEN {
        assert_eq!(child(what).signal(), Some(libc::SIGSYS), "{what}");
    }
}

#[test]
fn devices_do_all_of_their_work_under_their_filter() {
    let status = child("devices");
    assert!(status.success(), "{status}");
}

#[test]
fn a_virtual_cpus_thread_starts_resets_and_ends_under_its_filter() {
    let status = child("vcpu");
    assert!(status.success(), "{status}");
}

#[test]
#[ignore = "runs in a process of its own, by the tests above"]
fn inside() {
    let Ok(what) = std::env::var(WHAT) else { return };
    match what.as_str() {
        "devices" => under(Role::Devices, devices()),
        "vcpu" => under(Role::Vcpu, registers()),
        what => {
            let (_, role, does) = FORBIDDEN.iter().find(|(name, ..)| *name == what).unwrap();
            under(*role, does);
        }
    }
}

fn under(role: Role, does: impl FnOnce() + Send + 'static) {
    let filter = Filter::compile(role).unwrap();
    let thread = std::thread::spawn(move || {
        filter.apply().unwrap();
        does();
    });
    thread.join().unwrap();
}

fn header(kind: u32) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 12]].concat()
}

/// Disks, sockets, random numbers and free pages, all ways.
fn devices() -> impl FnOnce() + Send {
    let mut disk = tempfile::tempfile().unwrap();
    disk.write_all(&[1; 4096]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let start = |device: Box<dyn Device>| Driver::started_boxed(device);
    let mut block = start(Box::new(Block::new(disk, Access::ReadWrite, "").unwrap()));
    let ends = BTreeMap::from([(1, HostEnd::Listener(path))]);
    let mut vsock = start(Box::new(Vsock::new(3, ends).unwrap()));
    let mut entropy = start(Box::new(Entropy));
    let mut balloon = start(Box::<Balloon>::default());
    let interrupt = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let packet = |operation: u16, data: &[u8]| {
        let mut packet =
            [&3u64.to_le_bytes()[..], &2u64.to_le_bytes(), &7u32.to_le_bytes(), &1u32.to_le_bytes()].concat();
        packet.extend((data.len() as u32).to_le_bytes());
        packet.extend([1, 0]);
        packet.extend(operation.to_le_bytes());
        packet.extend([3, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]);
        packet.extend(data);
        packet
    };
    move || {
        for (kind, parts) in [
            (0, vec![Part::Write(DATA + 512, 512)]),
            (1, vec![Part::Read(&[2; 512])]),
            (4, vec![]),
            (11, vec![Part::Read(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])]),
            (13, vec![Part::Read(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])]),
        ] {
            let header = header(kind);
            block.offer(0, &[vec![Part::Read(&header)], parts, vec![Part::Write(DATA, 1)]].concat());
            block.notify(0);
            assert!(block.used(0).is_some());
            assert_eq!(block.bytes(DATA, 1), [0], "{kind}");
        }
        for _ in 0..8 {
            vsock.offer(0, &[Part::Write(DATA, 4096)]);
        }
        for (operation, data) in [(1, vec![]), (5, vec![7; 100_000]), (7, vec![]), (4, vec![])] {
            vsock.offer(1, &[Part::Read(&packet(operation, &data))]);
            vsock.notify(1);
            while vsock.transport.run(Cause::Ready) {}
            assert!(vsock.used(1).is_some());
        }
        entropy.offer(0, &[Part::Write(DATA, 1000)]);
        entropy.notify(0);
        assert_eq!(entropy.used(0).map(|(_, written)| written), Some(1000));
        balloon.offer(2, &[Part::Write(DATA, 4096)]);
        balloon.notify(2);
        assert!(balloon.used(2).is_some());
        interrupt.write(1).unwrap();
        interrupt.read().unwrap();
        // What a device keeps, and takes from the heap, is given back by this thread too.
        drop(vec![0u8; 8 << 20]);
        for driver in [&block, &vsock, &entropy, &balloon] {
            driver.set(0x70, 0);
        }
        // To remove the folder is not a device's work.
        std::mem::forget((folder, listener));
    }
}

/// What a guest's register accesses take: a device is set up, and reset while it has connections.
fn registers() -> impl FnOnce() + Send {
    let (host, end) = UnixStream::pair().unwrap();
    let device = Vsock::new(3, BTreeMap::from([(1, HostEnd::Connected(end))])).unwrap();
    let driver = Driver::new(device);
    let interrupt = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    move || {
        driver.start(0);
        interrupt.write(1).unwrap();
        driver.set(0x70, 0);
        drop(driver);
        drop(vec![0u8; 8 << 20]);
        drop(host);
    }
}
