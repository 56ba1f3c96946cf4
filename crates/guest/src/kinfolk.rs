//! Finds and signals all processes below the init.
//!
//! In a PID namespace of its own the kernel knows them all; elsewhere they are read from `/proc`, where the parent of an
//! orphan is this process again (a subreaper), so none can leave the family.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use crate::sys;

/// So long they are tried to be caught at most. Who blocks TERM for good, to read it from a signalfd, never is, and hears it.
const CATCH_PATIENCE: Duration = Duration::from_millis(500);
/// So often the stopped are looked at before they are let go again: a stop takes hold when a fork that is under way is done.
const LOOKS_PER_STOP: u32 = 20;
/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

/// Signals every process below this one.
pub fn signal_all(signal: i32) {
    if std::process::id() == 1 {
        sys::kill(-1, signal);
        return;
    }
    for relative in descendants() {
        sys::kill(relative.pid, signal);
    }
}

/// Asks every process below this one to end, also those that are forked meanwhile: TERM, once to each.
///
/// Two could be left out. A child that is forked between the reading of `/proc` and the TERM to its parent; and one whose
/// parent has TERM blocked just while it forks, as dash and posix_spawn(3) do: the parent dies of it afterwards, the child
/// never had it. Both cannot be asked later, for what a handler of TERM starts to clean up must not be asked. So all are
/// stopped first, let go again until nobody is caught at such a moment, and only then asked.
pub fn ask_all_to_end() {
    let give_up_at = Instant::now() + CATCH_PATIENCE;
    while !caught_all() && Instant::now() < give_up_at {
        signal_all(libc::SIGCONT);
        std::thread::sleep(LOOK_INTERVAL);
    }
    // A handler runs only once all have their TERM: what it forks has none.
    signal_all(libc::SIGTERM);
    signal_all(libc::SIGCONT);
}

/// Stops all. False: one of them stands where TERM does not reach it, or what it forks; or cannot be stopped, as the parent
/// of a vfork whose child is stopped.
fn caught_all() -> bool {
    let mut quiet_looks = 0;
    for _ in 0..LOOKS_PER_STOP {
        signal_all(libc::SIGSTOP);
        let family = descendants();
        if family.iter().any(|relative| relative.rests && relative.blocks_term) {
            return false;
        }
        if family.iter().all(|relative| relative.rests) {
            quiet_looks += 1;
        } else {
            quiet_looks = 0;
        }
        // A child may have been forked behind the reader's back by one that was read as stopped a moment later.
        if quiet_looks == 2 {
            return true;
        }
        if quiet_looks == 0 {
            std::thread::sleep(LOOK_INTERVAL);
        }
    }
    false
}

/// How many processes live below this one.
pub fn count() -> u32 {
    u32::try_from(descendants().len()).unwrap_or(u32::MAX)
}

/// A process below this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Relative {
    pid: i32,
    /// It is stopped, and so cannot fork. Waiting uninterruptibly is no rest: a fork itself may wait.
    rests: bool,
    /// TERM would wait for it.
    blocks_term: bool,
}

fn descendants() -> Vec<Relative> {
    let mut children: HashMap<i32, Vec<Relative>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let status = fs::read(entry.path().join("status")).unwrap_or_default();
        if let Some((parent, relative)) = parent_and_child(pid, &status) {
            children.entry(parent).or_default().push(relative);
        }
    }
    let mut found = Vec::new();
    let mut parents = vec![i32::try_from(std::process::id()).unwrap_or(1)];
    while let Some(parent) = parents.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            found.push(child);
            parents.push(child.pid);
        }
    }
    found
}

/// What `/proc/<pid>/status` says of a process, and its parent (proc(5)); none of a zombie, whose signalling is over. A name
/// with a line feed in it is shown without, so that no line is anybody's but the kernel's.
fn parent_and_child(pid: i32, status: &[u8]) -> Option<(i32, Relative)> {
    let status = String::from_utf8_lossy(status);
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim_start)
    };
    let state = field("State")?.chars().next()?;
    let parent = field("PPid")?.parse().ok()?;
    let blocked = u64::from_str_radix(field("SigBlk")?, 16).ok()?;
    let relative = Relative {
        pid,
        rests: matches!(state, 'T' | 't'),
        blocks_term: blocked & (1 << (libc::SIGTERM - 1)) != 0,
    };
    (!matches!(state, 'Z' | 'X')).then_some((parent, relative))
}

/// The fields of `/proc/<pid>/stat` from the third on: the second, the name in parentheses, may hold anything.
pub fn fields_after_name(stat: &[u8]) -> Option<impl Iterator<Item = &str>> {
    let end_of_name = stat.iter().rposition(|byte| *byte == b')')?;
    std::str::from_utf8(&stat[end_of_name + 1..]).ok().map(str::split_ascii_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_past_a_name_that_looks_like_lines() {
        let status = |name: &str, state: &str, blocked: &str| {
            format!("Name:\t{name}\nUmask:\t0022\nState:\t{state}\nTgid:\t12\nPPid:\t7\nSigBlk:\t{blocked}\n")
        };
        let read = |name, state, blocked| parent_and_child(12, status(name, state, blocked).as_bytes());
        let relative = |rests, blocks_term| Some((7, Relative { pid: 12, rests, blocks_term }));
        let none = "0000000000000000";
        assert_eq!(read("a\\nPPid:\\t1", "S (sleeping)", none), relative(false, false));
        assert_eq!(read("x", "T (stopped)", none), relative(true, false));
        assert_eq!(read("x", "T (stopped)", "0000000000004000"), relative(true, true));
        assert_eq!(read("x", "D (disk sleep)", "fffffffe7ffbfeff"), relative(false, true));
        assert_eq!(read("x", "Z (zombie)", none), None);
        for cut in [&b""[..], b"Name:\tx\n", b"State:\tS\n", b"State:\tS\nPPid:\tx\nSigBlk:\t0\n"] {
            assert_eq!(parent_and_child(12, cut), None);
        }
    }
}
