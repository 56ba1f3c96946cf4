//! What a guest costs beside what it was given.

use std::fs;
use std::time::Duration;

use super::initramfs::Initramfs;
use super::lab::{self, Lab, run, skip};

const PATIENCE: Duration = Duration::from_secs(150);
const MOST_EXITS: u64 = 300;
const MOST_PROGRAM_BYTES: u64 = 2_500_000;
const MOST_KIBIBYTES: u64 = 2048;

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

#[test]
fn a_guest_takes_little_memory_beside_its_own() {
    let Some(lab) = Lab::open() else { return };
    if lab::static_vmm().is_none() {
        return skip("SEALCI_TEST_VMM does not name the static program (cargo xtask vm-test builds it)");
    }
    let initramfs = Initramfs::running(&lab.busybox, "echo ready; sleep 1000\n").file();
    let guest = lab.start(&initramfs, ["--memory-mib", "128", "--vcpus", "2"]);
    guest.wait_for("ready");
    let (_, kibibytes) = guest.resident(128);
    eprintln!("memory beside the guest's: {kibibytes} KiB");
    assert!(kibibytes <= MOST_KIBIBYTES, "{kibibytes} KiB");
}

#[test]
fn every_thread_is_bound() {
    let Some(lab) = Lab::open() else { return };
    let initramfs = Initramfs::running(&lab.busybox, "echo ready; sleep 1000\n").file();
    let guest = lab.start(&initramfs, ["--vcpus", "2"]);
    guest.wait_for("ready");
    let mut bound = Vec::new();
    for thread in fs::read_dir(guest.proc("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim().to_owned()
        };
        // proc(5): 2 is a filter.
        bound.push((field("Name:"), field("Seccomp:") == "2"));
    }
    bound.sort();
    let all = ["devices", "sealci-vmm", "vcpu0", "vcpu1"].map(|name| (name.to_owned(), true));
    assert_eq!(bound, all);
}
