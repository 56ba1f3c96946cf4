//! Boots whole machines: roots, initial RAM disks and scratch disks of this crate's making, the host's kernel, the real
//! `sealci-init` and the real `sealci-vmm`. The test is what an agent would be.
//!
//! `cargo xtask vm-test` runs it where there is a `/dev/kvm` that works: within a QEMU guest.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clones;
mod host;
mod lab;

use std::time::Duration;

use sealci_guest::wire::{Ending, Lease, ToInit, VERSION};

use host::{Said, boot_ms, start, wake_at};
use lab::{Lab, Wanted};

/// 2031-02-03 04:05:06 UTC.
const A_TIME: Duration = Duration::from_secs(1_927_857_906);

fn wake() -> ToInit {
    wake_at(A_TIME, 7)
}

#[test]
fn an_image_runs_in_a_machine() {
    let Some(lab) = Lab::open() else { return };
    let mut machine = lab.boot(&Wanted { scratch_bytes: Some(1 << 30), ..lab.wanted() });
    machine.send(&ToInit::Hello { version: VERSION });
    machine.send(&wake());
    machine.send(&start(&[
        "echo in $(pwd), $(hostname), $(date -u +%Y-%m-%d) $(id -u)",
        "cut -d' ' -f2,3 /proc/mounts",
        "cat /sys/class/net/lo/operstate /sys/class/net/lo/flags; grep database /etc/hosts; uname -r",
        "test -c /dev/null -a -d /dev/pts -a -w /dev/shm -a -k /tmp -a -e /dev/fd/0 -a -r /sys/fs/cgroup/cgroup.procs",
        "echo written >/bin/new; cat /bin/new; df -k / | tail -n 1 | grep -o ' 10[0-9]* '; cat >&2 /etc/motd",
        "exit 7",
    ]));
    let (text, ending) = machine.listen();
    assert_eq!(ending, Ending::Failed { exit_code: 7 }, "{text}");
    assert!(text.starts_with("in /workspace, m1, 2031-02-03 0\n"), "{text}");
    for mount in [
        "/ overlay",
        "/proc proc",
        "/sys sysfs",
        "/dev devtmpfs",
        "/dev/pts devpts",
        "/sys/fs/cgroup cgroup2",
    ] {
        assert!(text.contains(&format!("\n{mount}\n")), "{mount}: {text}");
    }
    assert!(text.contains("\n0x9\n") && text.contains(" database "), "{text}");
    assert!(text.contains(&lab.kernel.release), "{text}");
    assert!(text.contains("\nwritten\n") && text.ends_with("of the image\n"), "{text}");
}

#[test]
fn what_is_written_takes_memory_where_there_is_no_disk_for_it() {
    let Some(lab) = Lab::open() else { return };
    let mut machine = lab.boot(&lab.wanted());
    machine.send(&ToInit::Hello { version: VERSION });
    machine.send(&wake());
    machine.send(&start(&["echo kept >/file; cat /file", "head -c 200000000 /dev/zero >/large 2>/dev/null"]));
    let (text, ending) = machine.listen();
    assert_eq!(
        (&text[..], ending),
        ("kept\n", Ending::Failed { exit_code: 1 }),
        "half of 256 MiB is its bound"
    );
}

#[test]
fn a_machine_without_memory_says_so_and_lives() {
    let Some(lab) = Lab::open() else { return };
    let mut machine = lab.boot(&Wanted { scratch_bytes: Some(1 << 30), ..lab.wanted() });
    machine.send(&ToInit::Hello { version: VERSION });
    machine.send(&wake());
    // Its buffer is more than there is, which is found out only as it is filled.
    machine.send(&start(&[
        "echo 1 >/proc/sys/vm/overcommit_memory",
        "dd if=/dev/zero of=/dev/null bs=400M count=1 2>/dev/null",
    ]));
    let (text, ending) = machine.listen();
    assert_eq!((text.lines().last(), ending), (Some("(out of memory)"), Ending::Failed { exit_code: 137 }));
}

#[test]
fn a_lease_holds_where_the_clocks_are_not_the_same() {
    let Some(lab) = Lab::open() else { return };
    let mut machine = lab.boot(&lab.wanted());
    machine.send(&ToInit::Hello { version: VERSION });
    machine.send(&wake());
    machine.send(&ToInit::Lease(Lease { until_boot_ms: boot_ms() + 4000, longest_ms: 5000 }));
    machine.send(&start(&["echo begun; sleep 600"]));
    assert_eq!(machine.listen(), ("begun\n".to_owned(), Ending::Expired));
}

#[test]
fn a_host_that_goes_ends_the_machine() {
    let Some(lab) = Lab::open() else { return };
    let mut machine = lab.boot(&lab.wanted());
    machine.send(&ToInit::Hello { version: VERSION });
    machine.send(&wake());
    machine.send(&start(&["echo begun; sleep 600"]));
    while machine.hear() != Said::Output("begun\n".to_owned()) {}
    let ended = machine.hang_up();
    assert!(ended.success(), "{ended}");
}

#[test]
fn a_machine_says_what_is_wrong_with_its_root() {
    let Some(lab) = Lab::open() else { return };
    let damaged = lab.folder.path().join("damaged");
    std::fs::write(&damaged, vec![0; 1 << 20]).unwrap();
    for (root, why) in [(Some(damaged), "squashfs"), (None, "/dev/vda")] {
        let mut machine = lab.boot(&Wanted { root, ..lab.wanted() });
        machine.send(&ToInit::Hello { version: VERSION });
        machine.send(&wake());
        machine.send(&start(&["true"]));
        let (_, ending) = machine.listen();
        assert!(matches!(&ending, Ending::Error(told) if told.contains(why)), "{why}: {ending:?}");
    }
}

#[test]
fn a_machine_that_cannot_call_says_so_on_its_console() {
    let Some(lab) = Lab::open() else { return };
    for (port, why) in [("", "sealci.port"), ("sealci.port=77", "port 77")] {
        let console = lab.boot_deaf(&Wanted { port, ..lab.wanted() });
        assert!(console.contains("sealci-init: cannot") && console.contains(why), "{console}");
    }
}
