//! Finds and signals all processes below the init.
//!
//! In a PID namespace of its own the kernel knows them all; elsewhere they are read from `/proc`, where the parent of an
//! orphan is this process again (a subreaper), so none can leave the family.

use std::collections::HashMap;
use std::fs;

use crate::sys;

/// Signals every process below this one.
pub fn signal_all(signal: i32) {
    if std::process::id() == 1 {
        sys::kill(-1, signal);
        return;
    }
    for pid in descendants() {
        sys::kill(pid, signal);
    }
}

/// How many processes live below this one.
pub fn count() -> u32 {
    u32::try_from(descendants().len()).unwrap_or(u32::MAX)
}

fn descendants() -> Vec<i32> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(parent) = fs::read(entry.path().join("stat")).ok().and_then(|stat| parent_of(&stat)) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut parents = vec![i32::try_from(std::process::id()).unwrap_or(1)];
    while let Some(parent) = parents.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            found.push(child);
            parents.push(child);
        }
    }
    found
}

/// The fourth field of `/proc/<pid>/stat`; zombies, whose signalling is over, have none.
fn parent_of(stat: &[u8]) -> Option<i32> {
    let mut fields = fields_after_name(stat)?;
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(parent)
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
        assert_eq!(parent_of(b"12 (a) R 7 (b) S 3 1 1 0"), Some(3));
        assert_eq!(parent_of(b"12 (\xff) S 3 1 1 0"), Some(3));
        assert_eq!(parent_of(b"12 (x) Z 3 1 1 0"), None);
        assert_eq!(parent_of(b"12"), None);
        assert_eq!(parent_of(b""), None);
    }
}
