//! Machines that go on from one that was saved before it called: none knows anything of another.

use std::time::Duration;

use sealci_guest::wire::{Ending, ToInit, VERSION};

use crate::A_TIME;
use crate::host::{Machine, start, wake_at};
use crate::lab::{Lab, Wanted, private_kibibytes};

const DAY: Duration = Duration::from_secs(24 * 3600);
const MOST_KIBIBYTES: u64 = 12 << 10;

fn wanted(lab: &Lab) -> Wanted {
    Wanted { scratch_bytes: Some(64 << 20), ..lab.wanted() }
}

/// What it says to these commands, having been told the time and something secret.
fn told(machine: &mut Machine, time: Duration, secret: u8, commands: &[&str]) -> String {
    machine.send(&ToInit::Hello { version: VERSION });
    machine.send(&wake_at(time, secret));
    machine.send(&start(commands));
    let (text, ending) = machine.listen();
    assert_eq!(ending, Ending::Succeeded, "{text}");
    text
}

#[test]
fn clones_share_neither_clock_nor_random_numbers_nor_disk() {
    let Some(lab) = Lab::open() else { return };
    let wanted = wanted(&lab);
    let snapshot = lab.save(&wanted);
    let commands = [
        "busybox md5sum /etc/motd; date -u +%Y-%m-%d; head -c 16 /dev/urandom | busybox md5sum",
        "test ! -e /bin/new; echo written >/bin/new; cat /bin/new",
        "hostname",
    ];
    // Both are there before either has heard anything.
    let (mut one, mut other) = (lab.go_on(&snapshot, &wanted, "one"), lab.go_on(&snapshot, &wanted, "other"));
    let (first, second) =
        (told(&mut one, A_TIME, 7, &commands), told(&mut other, A_TIME + DAY, 8, &commands));
    let third = told(&mut lab.go_on(&snapshot, &wanted, "third"), A_TIME + 2 * DAY, 9, &commands);
    let lines: Vec<Vec<_>> = [&first, &second, &third].map(|text| text.lines().collect()).into();
    assert_eq!([0, 1, 2].map(|index: usize| lines[index][1]), ["2031-02-03", "2031-02-04", "2031-02-05"]);
    assert!(lines[0][0] == lines[1][0] && lines[0][3] == lines[2][3], "{lines:?}");
    let mut random = [0, 1, 2].map(|index: usize| lines[index][2]);
    random.sort_unstable();
    assert!(random[0] != random[1] && random[1] != random[2], "{random:?}");
    assert_eq!(lines[1][4], "m1");
}

#[test]
fn a_clone_takes_little_memory() {
    let Some(lab) = Lab::open() else { return };
    let wanted = wanted(&lab);
    let snapshot = lab.save(&wanted);
    let clone = lab.go_on(&snapshot, &wanted, "clone");
    let kibibytes = private_kibibytes(clone.monitor);
    eprintln!("of a clone's own: {kibibytes} KiB");
    assert!(kibibytes <= MOST_KIBIBYTES, "{kibibytes} KiB");
}
