//! Tells whether control groups still have an agent, by a lock that goes with the agent's process however that ends.
//!
//! A file's lock is taken before the groups are made, and the file is removed, under its lock, after them.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// What lies here is gone after the machine's next start, as control groups are.
const FOLDER: &str = "/run/sealci";
const PREFIX: &str = "cgroups-";
const SUFFIX: &str = ".lock";

/// Whoever clears up after another agent has its lock for a moment.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// Where the locks are: root's, or one user's where the groups are.
pub fn folder(is_users: bool) -> PathBuf {
    let users = is_users.then(|| std::env::var_os("XDG_RUNTIME_DIR")).flatten();
    users.map_or_else(|| FOLDER.into(), |folder| Path::new(&folder).join("sealci"))
}

/// Held for as long as the groups of this name are in use.
#[derive(Debug)]
pub struct GroupsLock {
    path: PathBuf,
    /// Closing it gives the lock back.
    _file: File,
}

impl GroupsLock {
    /// Takes the lock of one's own groups. None where another process keeps it: the groups are that one's to remove.
    pub fn take(folder: &Path, name: &str) -> io::Result<Option<Self>> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(folder)?;
        let path = folder.join(format!("{PREFIX}{name}{SUFFIX}"));
        for _ in 1..TRIES {
            if let Some(lock) = Self::try_take(&path, true)? {
                return Ok(Some(lock));
            }
            thread::sleep(BETWEEN_TRIES);
        }
        Self::try_take(&path, true)
    }

    /// The names of groups whose agent is no more, with their locks.
    pub fn left_behind(folder: &Path) -> Vec<(String, Self)> {
        let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let left = names.filter_map(|file| {
            let name = file.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.to_owned();
            // One that is gone by now is another's success.
            Some((name, Self::try_take(&folder.join(&file), false).ok()??))
        });
        left.collect()
    }

    /// Nothing of the groups is left.
    pub fn discard(self) {
        // One that stays is found by the next agent that starts.
        let _ = fs::remove_file(&self.path);
    }

    fn try_take(path: &Path, create: bool) -> io::Result<Option<Self>> {
        let mut options = OpenOptions::new();
        options.create(create).truncate(false).write(true).mode(0o600);
        loop {
            let file = options.open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
            // Whoever had it may have removed the file since it was opened: then this lock is nobody's.
            let of_path = fs::metadata(path).map(|file| (file.dev(), file.ino()));
            let of_file = file.metadata().map(|file| (file.dev(), file.ino()))?;
            if of_path.is_ok_and(|of_path| of_path == of_file) {
                return Ok(Some(Self { path: path.to_owned(), _file: file }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("made");
        let lock = GroupsLock::take(&place, "a").unwrap().unwrap();
        let other = GroupsLock::take(&place, "b").unwrap().unwrap();
        assert!(GroupsLock::left_behind(&place).is_empty());
        drop(other);
        let left = GroupsLock::left_behind(&place);
        assert_eq!(left.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["b"]);
        assert!(GroupsLock::left_behind(&place).is_empty(), "one clears up, not two");
        left.into_iter().for_each(|(_, lock)| lock.discard());
        lock.discard();
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    }

    #[test]
    fn a_lock_waits_for_who_clears_up() {
        let folder = tempfile::tempdir().unwrap();
        let lock = GroupsLock::take(folder.path(), "a").unwrap().unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| GroupsLock::take(folder.path(), "a").unwrap());
            thread::sleep(BETWEEN_TRIES);
            // Removed under the waiting one: what it opened before is nobody's lock.
            lock.discard();
            let taken = waiting.join().unwrap().unwrap();
            assert!(taken.path.exists());
        });
    }
}
