//! Measures machines beside QEMU's, in turns: how soon they are over that do nothing, how soon they can be used, booted and gone on,
//! and what they take beside what their guests were given.
//!
//! `cargo xtask bench machines` runs it where there is a `/dev/kvm` that works, and makes the table. It prints a line when
//! something begins and one when it is over, so that whoever reads them has a clock of his own: an emulated machine's clock
//! counts its instructions.
//!
//! ```text
//! measure: begin WHAT
//! measure: end WHAT MILLISECONDS
//! measure: memory WHAT KIBIBYTES
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sealci_guest::wire::{ToInit, VERSION};

#[path = "../tests/whole/host.rs"]
#[allow(dead_code)]
mod host;
#[path = "../tests/whole/lab.rs"]
#[allow(dead_code)]
mod lab;

use host::{Machine, Said};
use lab::{Lab, Wanted};

/// The first of each is for warming up.
const RUNS: usize = 1 + 5;
const A_TIME: Duration = Duration::from_secs(1_927_857_906);
const SCRATCH_BYTES: u64 = 64 << 20;

/// What every kernel of ours is told (`sealci_vmm::x86_64::boot`), and QEMU's.
const COMMAND_LINE: &str = "reboot=t panic=-1 i8042.noaux i8042.nokbd tsc=reliable no_timer_check random.trust_cpu=on \
                            cryptomgr.notests quiet loglevel=1 8250.nr_uarts=0";
/// Reads, writes, speaks, and goes on.
const BUSY: &[&str] = &[
    "while :; do cat /bin/busybox /bin/busybox >/copy; head -c 1000000 /dev/zero | tail -c 100000; echo; echo again; done",
];
/// So often it has done that when it is measured.
const ROUNDS: usize = 3;

fn main() {
    let Some(mut lab) = Lab::open() else { return };
    let qemu = std::env::var_os("SEALCI_BENCH_QEMU").map(PathBuf::from);
    let packed = lab.image.clone();
    let unpacked = unpack(&lab);
    lab.image.clone_from(&unpacked);
    let wanted = Wanted { scratch_bytes: Some(SCRATCH_BYTES), ..lab.wanted() };
    let snapshot = lab.save(&wanted);
    for run in 0..RUNS {
        if let Some(folder) = &qemu {
            measured(run, "qemu: over", || qemus(&lab, folder));
        }
        lab.image.clone_from(&packed);
        measured(run, "packed: over", || boot_in_vain(&lab));
        lab.image.clone_from(&unpacked);
        measured(run, "unpacked: over", || boot_in_vain(&lab));
        let booted = measured(run, "booted: ready", || lab.boot(&wanted));
        if run > 0 {
            say(&format!("memory beside a busy guest's {}", beside_busy(booted)));
        }
        let name = format!("clone{run}");
        let clone = measured(run, "restored: ready", || lab.go_on(&snapshot, &wanted, &name));
        if run > 0 {
            say(&format!("memory of a clone's own {}", lab::private_kibibytes(clone.monitor)));
        }
    }
}

fn measured<T>(run: usize, what: &str, work: impl FnOnce() -> T) -> T {
    if run == 0 {
        return work();
    }
    say(&format!("begin {what}"));
    let begun = Instant::now();
    let done = work();
    say(&format!("end {what} {:.3}", begun.elapsed().as_secs_f64() * 1000.0));
    done
}

/// At once, not when there is enough to be written.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "measure: {line}").and_then(|()| out.flush()).unwrap();
}

/// The kernel without its packing, as agents have it.
fn unpack(lab: &Lab) -> PathBuf {
    let unpacked = lab.folder.path().join("vmlinux");
    let mut command = Command::new(&lab.vmm);
    command.arg("--kernel").arg(&lab.kernel.image).arg("--extract").arg(&unpacked);
    host::ended_or_killed(command.stdout(Stdio::piped()).spawn().unwrap());
    unpacked
}

/// A guest that has nobody to call, and so ends when it is up.
fn boot_in_vain(lab: &Lab) {
    let mut command = lab.command(&Wanted { port: "", ..lab.wanted() });
    host::ended_or_killed(command.spawn().unwrap());
}

/// Such a guest in QEMU's usual machine.
fn qemus(lab: &Lab, folder: &Path) {
    let mut command = Command::new(folder.join("qemu-system-x86_64"));
    command.env("LD_LIBRARY_PATH", folder.join("lib")).arg("-L").arg(folder.join("share"));
    command.args(["-M", "pc", "-accel", "kvm", "-cpu", "host", "-m", "256", "-smp", "1"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(&lab.kernel.image).arg("-initrd").arg(lab.initramfs.path());
    command.arg("-append").arg(COMMAND_LINE).stdin(Stdio::null()).stdout(Stdio::piped());
    host::ended_or_killed(command.spawn().unwrap());
}

/// What a monitor takes beside its guest's memory while an action reads, writes and speaks, in KiB.
fn beside_busy(mut machine: Machine) -> u64 {
    for message in [ToInit::Hello { version: VERSION }, host::wake_at(A_TIME, 7), host::start(BUSY)] {
        machine.send(&message);
    }
    // One that is cut in two by its frames is not counted; there will be others.
    let mut rounds = 0;
    while rounds < ROUNDS {
        match machine.hear() {
            Said::Output(piece) => rounds += piece.matches("again\n").count(),
            Said::Other => {}
            said => panic!("{said:?}"),
        }
    }
    kibibytes_beside(machine.monitor)
}

/// What of the process that runs the guest is in memory beside the guest's.
fn kibibytes_beside(keeper: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", lab::process_of(keeper))).unwrap();
    let figure = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    let (mut beside, mut is_guests, mut found) = (0, false, 0);
    for line in smaps.lines() {
        if line.starts_with("Size:") {
            is_guests = figure(line) == Some(lab::MEBIBYTES << 10);
            found += u64::from(is_guests);
        } else if line.starts_with("Rss:") && !is_guests {
            beside += figure(line).unwrap();
        }
    }
    assert_eq!(found, 1, "{smaps}");
    beside
}
