//! A stock kernel boots: with any number of virtual CPUs, with little memory and with much.

use std::fs;
use std::time::Duration;

use tempfile::TempDir;

use super::initramfs::Initramfs;
use super::lab::{Lab, figure, run, vmm};

const NOTHING: [&str; 0] = [];

#[test]
fn one_vcpu_says_hello() {
    let Some(lab) = Lab::open() else { return };
    let outcome = lab.run("echo hello; echo vcpus=$(nproc)", NOTHING);
    assert!(outcome.console.contains("hello\n"), "{outcome:?}");
    assert_eq!(figure(&outcome.console, "vcpus"), 1);
    assert!(outcome.status.success() && outcome.said.contains("has reset the machine"), "{outcome:?}");
}

#[test]
fn two_and_four_vcpus_all_run() {
    let Some(lab) = Lab::open() else { return };
    for vcpus in [2, 4] {
        // Each runs a process of its own, and they are cores of one package.
        let script = "echo vcpus=$(nproc)\n\
            for cpu in $(seq 0 $(($(nproc) - 1))); do taskset $((1 << cpu)) sh -c 'echo ran' & done; wait\n\
            echo packages=$(grep 'physical id' /proc/cpuinfo | sort -u | wc -l)\n\
            echo cores=$(grep 'core id' /proc/cpuinfo | sort -u | wc -l)";
        let outcome = lab.run(script, ["--vcpus", &vcpus.to_string()]);
        assert_eq!(figure(&outcome.console, "vcpus"), vcpus);
        assert_eq!(outcome.console.matches("ran\n").count() as u64, vcpus, "{outcome:?}");
        assert_eq!(figure(&outcome.console, "packages"), 1);
        assert_eq!(figure(&outcome.console, "cores"), vcpus);
        assert!(outcome.status.success(), "{outcome:?}");
    }
}

#[test]
fn little_memory_is_enough() {
    let Some(lab) = Lab::open() else { return };
    let outcome = lab.run("awk '/MemTotal/ { print \"memory=\" $2 }' /proc/meminfo", ["--memory-mib", "128"]);
    let kibibytes = figure(&outcome.console, "memory");
    assert!((80 << 10..128 << 10).contains(&kibibytes), "{outcome:?}");
}

#[test]
fn memory_above_four_gibibytes_is_used() {
    let Some(lab) = Lab::open() else { return };
    // Linux's zone `Normal` is what lies there.
    let script = "awk '/MemTotal/ { print \"memory=\" $2 }' /proc/meminfo\n\
        free() { awk '/zone/ { normal = $4 == \"Normal\" } normal && /nr_free_pages/ { print $2 }' /proc/zoneinfo; }\n\
        before=$(free); mount -t tmpfs tmpfs /tmp\n\
        yes 'what is written there is read there' | head -c 67108864 >/tmp/file\n\
        echo pages=$((before - $(free)))\n\
        [ $(md5sum </tmp/file | cut -c-32) = $(yes 'what is written there is read there' | head -c 67108864 | md5sum | cut -c-32) ] && echo same=1";
    let outcome = lab.run(script, ["--memory-mib", "6144"]);
    assert!(figure(&outcome.console, "memory") > 5900 << 10, "{outcome:?}");
    assert!(figure(&outcome.console, "pages") >= 64 << 8, "{outcome:?}");
    assert_eq!(figure(&outcome.console, "same"), 1);
}

#[test]
fn the_machine_can_be_turned_off() {
    let Some(lab) = Lab::open() else { return };
    let outcome = lab.run("poweroff -f; sleep 100", NOTHING);
    assert!(outcome.status.success() && outcome.said.contains("has turned the machine off"), "{outcome:?}");
}

#[test]
fn a_kernel_that_panics_ends() {
    let Some(lab) = Lab::open() else { return };
    let outcome = lab.run_with(Initramfs::empty(), NOTHING);
    assert!(outcome.said.contains("has reset the machine"), "{outcome:?}");
}

#[test]
fn a_kernel_that_was_unpacked_boots() {
    let Some(lab) = Lab::open() else { return };
    let folder = TempDir::new().unwrap();
    let vmlinux = folder.path().join("vmlinux");
    let mut command = vmm();
    command.arg("--kernel").arg(&lab.kernel).arg("--extract").arg(&vmlinux);
    let outcome = run(command, Duration::from_secs(60)).unwrap();
    assert!(outcome.status.success(), "{outcome:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left");

    let unpacked = Lab { kernel: vmlinux, ..lab };
    let outcome = unpacked.run("echo vcpus=$(nproc)", ["--vcpus", "2"]);
    assert_eq!(figure(&outcome.console, "vcpus"), 2);
    assert!(outcome.status.success(), "{outcome:?}");

    let mut again = vmm();
    again.arg("--kernel").arg(&unpacked.kernel).arg("--extract").arg(folder.path().join("twice"));
    let outcome = run(again, Duration::from_secs(60)).unwrap();
    assert!(outcome.said.contains("is a vmlinux already"), "{outcome:?}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left");
}
