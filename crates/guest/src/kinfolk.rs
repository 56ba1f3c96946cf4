//! Finds and signals all processes below the init.
//!
//! In a PID namespace of its own the kernel knows them all; elsewhere they are read from `/proc`, where the parent of an
//! orphan is this process again (a subreaper), so none can leave the family.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

use crate::sys;

/// So long `/proc` is read again and again at most, until all are stopped. The parent of a vfork never is, for one.
const STOP_PATIENCE: Duration = Duration::from_millis(200);
/// Between two readings.
const STOP_INTERVAL: Duration = Duration::from_millis(1);

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
/// A child that is forked between the reading of `/proc` and the TERM to its parent would be left out, and what a handler
/// of TERM starts to clean up must not be asked. So all are stopped first, until nobody moves who could fork; then those,
/// and only those, are asked. A stop takes hold when a fork that is under way is done, so a stopped state counts and not
/// the signal that was sent.
pub fn ask_all_to_end() {
    if std::process::id() == 1 {
        // The kernel reaches all of them in one step, and breaks off a fork that is under way.
        sys::kill(-1, libc::SIGTERM);
        // What is stopped could not hear it.
        sys::kill(-1, libc::SIGCONT);
        return;
    }
    let mut stopped = HashSet::new();
    // Who forks faster than it can be stopped is left to KILL.
    let give_up_at = Instant::now() + STOP_PATIENCE;
    while Instant::now() < give_up_at {
        let family = descendants();
        let mut all_rest = true;
        for relative in &family {
            if stopped.insert(relative.pid) {
                sys::kill(relative.pid, libc::SIGSTOP);
                all_rest = false;
            }
            all_rest &= relative.rests;
        }
        if all_rest {
            break;
        }
        std::thread::sleep(STOP_INTERVAL);
    }
    // Children come after their parents in no order: a handler runs only once all have their TERM.
    for signal in [libc::SIGTERM, libc::SIGCONT] {
        for pid in &stopped {
            sys::kill(*pid, signal);
        }
    }
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
}

fn descendants() -> Vec<Relative> {
    let mut children: HashMap<i32, Vec<Relative>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let stat = fs::read(entry.path().join("stat")).unwrap_or_default();
        if let Some((parent, rests)) = parent_and_rest(&stat) {
            children.entry(parent).or_default().push(Relative { pid, rests });
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

/// The fourth field of `/proc/<pid>/stat`, and whether the third says that it rests; zombies, whose signalling is over,
/// have none.
fn parent_and_rest(stat: &[u8]) -> Option<(i32, bool)> {
    let mut fields = fields_after_name(stat)?;
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some((parent, matches!(state, "T" | "t")))
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
    fn a_parent_is_read_past_a_name_that_looks_like_fields() {
        assert_eq!(parent_and_rest(b"12 (a) R 7 (b) S 3 1 1 0"), Some((3, false)));
        assert_eq!(parent_and_rest(b"12 (\xff) T 3 1 1 0"), Some((3, true)));
        assert_eq!(parent_and_rest(b"12 (x) Z 3 1 1 0"), None);
        assert_eq!(parent_and_rest(b"12"), None);
        assert_eq!(parent_and_rest(b""), None);
    }
}
