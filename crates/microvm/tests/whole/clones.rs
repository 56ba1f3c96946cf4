//! Machines that go on from one that was saved before it called: none knows anything of another.

use std::fs;
use std::time::Duration;

use sealci_guest::wire::{Ending, ToInit, VERSION};

use crate::host::Machine;
use crate::lab::{Lab, Wanted};
use crate::{A_TIME, start, wake_at};

const DAY: Duration = Duration::from_secs(24 * 3600);
const RUNS: usize = 5;
/// By the clock of the machine around it, which counts instructions where that is emulated by `cargo xtask vm-test`.
const MOST_OF_A_BOOT: f64 = 0.12;
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
fn a_clone_is_there_soon_and_takes_little() {
    let Some(lab) = Lab::open() else { return };
    let wanted = wanted(&lab);
    let snapshot = lab.save(&wanted);
    let (mut boots, mut clones, mut private) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..RUNS {
        boots.push(lab.boot(&wanted).ready_after);
        let clone = lab.go_on(&snapshot, &wanted, &format!("clone{run}"));
        clones.push(clone.ready_after);
        private.push(private_kibibytes(clone.monitor));
    }
    eprintln!(
        "to the init's first word, booted: {boots:?}, cloned: {clones:?}; of a clone's own: {private:?} KiB"
    );
    // Of emulated times only ratios mean something.
    let ratio = median(&mut clones).as_secs_f64() / median(&mut boots).as_secs_f64();
    let kibibytes = median(&mut private);
    eprintln!("clone/boot {ratio:.3}, {kibibytes} KiB");
    assert!(ratio <= MOST_OF_A_BOOT, "{ratio:.3} of a boot");
    assert!(kibibytes <= MOST_KIBIBYTES, "{kibibytes} KiB");
}

fn median<T: Ord + Copy>(values: &mut [T]) -> T {
    values.sort_unstable();
    values[values.len() / 2]
}

/// What the process that runs the guest, the only child of the one that was started, does not share with any other.
fn private_kibibytes(keeper: u32) -> u64 {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    let process = children.trim();
    let rollup = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
