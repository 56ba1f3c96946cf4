//! What a guest costs beside what it was given.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::initramfs::Initramfs;
use super::lab::{self, Lab, run, skip};

const PATIENCE: Duration = Duration::from_secs(150);
const MOST_EXITS: u64 = 300;
const MOST_PROGRAM_BYTES: u64 = 2_500_000;
const MOST_KIBIBYTES: u64 = 2048;
/// In a line of smaps, which tells a mapping's size first.
const GUEST_KIBIBYTES: u64 = 128 << 10;

#[test]
fn a_boot_takes_few_exits() {
    let Some(lab) = Lab::open() else { return };
    let initramfs = Initramfs::only(&lab.busybox, "#!/bin/busybox sh\n/bin/busybox reboot -f\n").file();
    let outcome = run(lab.command(&initramfs), PATIENCE).unwrap();
    let words: Vec<_> = outcome.said.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).collect();
    let [ports, registers] = words[..] else { panic!("{outcome:?}") };
    eprintln!("exits: {ports} by ports, {registers} by registers");
    assert!(ports + registers <= MOST_EXITS, "{outcome:?}");
}

#[test]
fn the_program_is_small() {
    let Some(program) = lab::static_vmm() else {
        return skip("SEALCI_TEST_VMM does not name the static program (cargo xtask vm-test builds it)");
    };
    let bytes = fs::metadata(&program).unwrap().len();
    eprintln!("the program: {bytes} bytes");
    assert!(bytes <= MOST_PROGRAM_BYTES, "{bytes} bytes");
}

/// Kills it in the end, whatever happened.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_guest_takes_little_memory_beside_its_own() {
    let Some(lab) = Lab::open() else { return };
    if lab::static_vmm().is_none() {
        return skip("SEALCI_TEST_VMM does not name the static program (cargo xtask vm-test builds it)");
    }
    let initramfs = Initramfs::running(&lab.busybox, "echo ready; sleep 1000\n").file();
    let mut command = lab.command(&initramfs);
    command.args(["--memory-mib", "128", "--vcpus", "2", "--serial", "-", "--command-line-extra", "quiet"]);
    let mut guest = Running(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap());
    let console = BufReader::new(guest.0.stdout.take().unwrap());
    let (said, ready) = mpsc::sync_channel(1);
    let reader = thread::spawn(move || {
        let is_ready = console.lines().map_while(Result::ok).any(|line| line.trim() == "ready");
        said.send(is_ready).unwrap();
    });
    assert!(ready.recv_timeout(PATIENCE).unwrap(), "the guest ended");
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.0.id())).unwrap();
    drop(guest);
    reader.join().unwrap();

    let (mut kibibytes, mut is_guests, mut guests) = (0, false, 0);
    let figure = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            is_guests = figure(line).unwrap() == GUEST_KIBIBYTES;
            guests += u64::from(is_guests);
        } else if line.starts_with("Rss:") && !is_guests {
            kibibytes += figure(line).unwrap();
        }
    }
    eprintln!("memory beside the guest's: {kibibytes} KiB");
    assert_eq!(guests, 1, "{smaps}");
    assert!(kibibytes <= MOST_KIBIBYTES, "{kibibytes} KiB: {smaps}");
}
