//! A stock kernel's own drivers use the virtio devices.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use tempfile::{NamedTempFile, TempDir};

use super::initramfs::Initramfs;
use super::lab::{Lab, Outcome, figure};

const VIRTIO: [&str; 3] = ["virtio_ring", "virtio", "virtio_mmio"];
const BLOCK: &str = "virtio_blk";
const BALLOON: &str = "virtio_balloon";
const ENTROPY: &str = "virtio-rng";
const VSOCK: [&str; 3] = ["vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"];

const DISK_BYTES: u64 = 64 << 20;

/// Runs a script in a guest that has these modules beside the transport's.
fn run(lab: &Lab, modules: &[&str], script: &str, arguments: &[String]) -> Outcome {
    run_with(lab, modules, script, arguments, |initramfs| initramfs)
}

fn run_with(
    lab: &Lab,
    modules: &[&str],
    script: &str,
    arguments: &[String],
    change: impl FnOnce(Initramfs) -> Initramfs,
) -> Outcome {
    let initramfs = with_modules(lab, modules, &format!("{script}\nreboot -f\n"));
    let outcome = lab.run_with(change(initramfs), arguments);
    assert!(outcome.status.success(), "{outcome:?}");
    outcome
}

fn with_modules(lab: &Lab, modules: &[&str], script: &str) -> Initramfs {
    let mut prologue = String::new();
    let names = VIRTIO.iter().chain(modules);
    let files: Vec<_> = names.map(|name| (format!("modules/{name}.ko"), lab.module(name))).collect();
    for (name, _) in &files {
        prologue.push_str(&format!("insmod /{name} || echo no {name}\n"));
    }
    let initramfs = Initramfs::running(&lab.busybox, &format!("{prologue}{script}"));
    files.iter().fold(initramfs, |initramfs, (name, bytes)| initramfs.with(name, bytes))
}

fn disk() -> NamedTempFile {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(DISK_BYTES).unwrap();
    disk
}

fn as_argument(disk: &NamedTempFile, suffix: &str) -> [String; 2] {
    ["--disk".to_owned(), format!("{}{suffix}", disk.path().display())]
}

#[test]
fn a_disk_keeps_what_is_written_and_gives_back_what_is_discarded() {
    let Some(lab) = Lab::open() else { return };
    let disk = disk();
    const WRITTEN: usize = 32 << 20;
    const DISCARDED: usize = 16 << 20;
    let script = format!(
        "echo sectors=$(cat /sys/block/vda/size)\n\
        yes 'a line of the guest' | head -c {WRITTEN} >/dev/vda && sync && echo written=1\n\
        blkdiscard -o 0 -l {DISCARDED} /dev/vda && echo discarded=1"
    );
    let outcome = run(&lab, &[BLOCK], &script, &as_argument(&disk, ""));
    assert_eq!(figure(&outcome.console, "sectors"), DISK_BYTES / 512);
    assert_eq!((figure(&outcome.console, "written"), figure(&outcome.console, "discarded")), (1, 1));
    let bytes = fs::read(disk.path()).unwrap();
    let written = b"a line of the guest\n".repeat(WRITTEN.div_ceil(20));
    // Whole slices are compared: byte by byte it would take longer than the guest.
    assert!(bytes[..DISCARDED] == vec![0; DISCARDED], "what was discarded is there");
    assert!(bytes[DISCARDED..WRITTEN] == written[DISCARDED..WRITTEN], "what was written is not there");
    assert!(bytes[WRITTEN..] == vec![0; bytes.len() - WRITTEN], "what was not written is there");
    let used = disk.as_file().metadata().unwrap().blocks() * 512;
    assert!(used <= 17 << 20, "{used} bytes of the host's disk");
}

#[test]
fn file_systems_live_on_disks_and_read_only_is_kept() {
    let Some(lab) = Lab::open() else { return };
    let (first, second) = (disk(), disk());
    let script = "mke2fs /dev/vda >/dev/null 2>&1; mount -t ext4 /dev/vda /tmp && echo 'of the first' >/tmp/file && umount /tmp";
    run(&lab, &[BLOCK], script, &as_argument(&first, ""));
    let before = fs::read(first.path()).unwrap();

    let script = "mount -t ext4 -o ro,noload /dev/vda /tmp && cat /tmp/file; umount /tmp\n\
        echo ro=$(cat /sys/block/vda/ro) rest\n\
        echo x 2>/dev/null >/dev/vda || echo refused\n\
        mke2fs /dev/vdb >/dev/null 2>&1; mount -t ext4 /dev/vdb /tmp && echo 'of the second' >/tmp/file && cat /tmp/file; umount /tmp";
    let arguments = [as_argument(&first, ":ro"), as_argument(&second, "")].concat();
    let outcome = run(&lab, &[BLOCK], script, &arguments);
    for expected in ["of the first\n", "ro=1 rest\n", "refused\n", "of the second\n"] {
        assert!(outcome.console.contains(expected), "{expected:?}: {outcome:?}");
    }
    assert!(fs::read(first.path()).unwrap() == before, "a disk that is read-only was written");
}

#[test]
fn random_numbers_come_from_the_host() {
    let Some(lab) = Lab::open() else { return };
    let script = "cat /sys/class/misc/hw_random/rng_current\n\
        echo bytes=$(head -c 64 /dev/hwrng | wc -c)\n\
        echo different=$(for i in 1 2 3 4; do head -c 16 /dev/hwrng | md5sum; done | sort -u | wc -l)";
    let outcome = run(&lab, &[ENTROPY], script, &[]);
    assert!(outcome.console.contains("virtio_rng"), "{outcome:?}");
    assert_eq!((figure(&outcome.console, "bytes"), figure(&outcome.console, "different")), (64, 4));
}

#[test]
fn memory_that_the_guest_frees_goes_back_to_the_host() {
    let Some(lab) = Lab::open() else { return };
    // Its driver reports two seconds after there is something to report.
    let script = "mount -t tmpfs -o size=90% tmpfs /tmp\n\
        yes | head -c 100000000 >/tmp/file; echo full; sleep 3; rm /tmp/file; sleep 8; echo freed; sleep 1000\n";
    let initramfs = with_modules(&lab, &[BALLOON], script).file();
    let guest = lab.start(&initramfs, ["--memory-mib", "256"]);
    guest.wait_for("full");
    let (full, _) = guest.resident(256);
    guest.wait_for("freed");
    let (freed, _) = guest.resident(256);
    assert!(full >= 100 << 10 && freed + (64 << 10) <= full, "{full} KiB, then {freed} KiB");
}

/// Root's machines are nobody.
fn open_to_all(socket: &Path) {
    fs::set_permissions(socket, fs::Permissions::from_mode(0o666)).unwrap();
}

/// Answers each connection with how much came, once all of it has come.
fn count_at(socket: &Path) {
    let listener = UnixListener::bind(socket).unwrap();
    open_to_all(socket);
    // It ends with the test program.
    thread::spawn(move || {
        for peer in listener.incoming() {
            let mut peer = peer.unwrap();
            let (mut bytes, mut sum) = ([0; 65536], 0_u64);
            let mut count = 0;
            loop {
                let read = peer.read(&mut bytes).unwrap();
                if read == 0 {
                    break;
                }
                count += read;
                sum += bytes[..read].iter().map(|byte| u64::from(*byte)).sum::<u64>();
            }
            writeln!(peer, "count={count}\nsum={sum}").unwrap();
        }
    });
}

#[test]
fn the_guest_talks_with_the_hosts_sockets() {
    let Some(lab) = Lab::open() else { return };
    let Some(peer) = lab.peer() else { return };
    let folder = TempDir::new().unwrap();
    let (seven, eight) = (folder.path().join("seven"), folder.path().join("eight"));
    count_at(&seven);
    count_at(&eight);
    let script = "printf hello | /bin/peer 7\n\
        yes 123456789 | head -c 8000000 | /bin/peer 8 | sed 's/^/large-/'\n\
        echo | /bin/peer 9 || echo nobody\n\
        (printf a | /bin/peer 7 >/one; echo) & (printf ab | /bin/peer 7 >/two; echo) & wait; cat /one /two | sed 's/^/at-once-/'";
    let arguments = ["--vsock".to_owned(), format!("7={}", seven.display())];
    let arguments = [&arguments[..], &["--vsock".to_owned(), format!("8={}", eight.display())]].concat();
    let outcome = run_with(&lab, &VSOCK, script, &arguments, |initramfs| initramfs.with("bin/peer", &peer));
    let console = &outcome.console;
    assert_eq!((figure(console, "count"), figure(console, "sum")), (5, 532));
    let line: u64 = b"123456789\n".iter().map(|byte| u64::from(*byte)).sum();
    assert_eq!((figure(console, "large-count"), figure(console, "large-sum")), (8_000_000, line * 800_000));
    assert!(console.contains("nobody\n"), "{outcome:?}");
    assert!(console.contains("at-once-count=1\n") && console.contains("at-once-count=2\n"), "{outcome:?}");
}
