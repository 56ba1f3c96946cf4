//! Keeps running actions from filling the disk: each has a bound for what its folders hold, and all of them together leave
//! a reserve for the spool and whoever else writes there.
//!
//! ```text
//!   free space, often ──▶ shrank enough, or below the reserve? ──▶ measure folders ──▶ over its bound: stop it
//!                                                                                  └▶ below the reserve: stop the largest
//!                                                                                     of those that grow
//! ```
//!
//! Quotas of the file system would be exact, and are not to be had everywhere. Measuring is: the free space costs one
//! system call, and folders are walked only when the disk has lost so much since the last walk that somebody can have
//! come near its bound. Walking takes at most a tenth of the time, below the reserve at most half.
//!
//! - Nobody is stopped for what others wrote: only a folder that was seen to grow is, or one over its own bound.
//! - What the agent cannot see is not measured: files that are open but removed, and, without root, unreadable folders.

mod ledger;

use std::collections::HashSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Limit, Outcome};
use tokio::sync::{Notify, watch};

use self::ledger::Ledger;
use crate::offer::human;
use crate::workspace::free_disk_bytes;

/// Between two looks at the free space, while actions run.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// A folder with more entries counts as over any bound: a disk runs out of inodes, too.
const MAX_ENTRIES: u64 = 2_000_000;
/// As a shell reports the end by KILL.
const KILLED: i32 = 128 + 9;

/// How much of the disk actions may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoomLimits {
    /// For each: its workspace and scratch folder together.
    pub workspace_bytes: u64,
    /// With less free on the disk, actions that grow are stopped. 0: never.
    pub reserve_bytes: u64,
}

impl Default for RoomLimits {
    fn default() -> Self {
        Self { workspace_bytes: 32 << 30, reserve_bytes: 512 << 20 }
    }
}

/// Why an action is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its folders hold more than one action may have.
    OverBound { size_bytes: u64, bound_bytes: u64 },
    /// It grew while the disk was all but full.
    DiskAlmostFull { size_bytes: u64, free_bytes: u64, reserve_bytes: u64 },
}

/// With less free than this a disk is full.
const FULL_BYTES: u64 = 1 << 20;

impl Stop {
    /// How the action ended by it. Too much is the action's own doing; a small disk is not.
    pub fn outcome(self) -> Outcome {
        match self {
            Self::OverBound { .. } => Outcome::Failed { exit_code: KILLED, limit: Some(Limit::Disk) },
            Self::DiskAlmostFull { .. } => {
                Outcome::Errored { cause: Cause::DiskFull, message: self.to_string() }
            }
        }
    }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::OverBound { size_bytes: u64::MAX, .. } => write!(
                f,
                "stopped: its workspace and scratch folder hold more than {MAX_ENTRIES} files, which is more than an \
                 action may have"
            ),
            Self::OverBound { size_bytes, bound_bytes } => write!(
                f,
                "stopped: its workspace and scratch folder hold {}, and an action may have {} on this agent \
                 (--workspace-bytes)",
                about(size_bytes),
                human(bound_bytes)
            ),
            Self::DiskAlmostFull { size_bytes, free_bytes, reserve_bytes } => write!(
                f,
                "stopped so that the agent's disk does not fill up: {} are free, {} are kept in reserve \
                 (--disk-reserve-bytes), and its folders grew to {}; give the agent a larger disk, or fewer actions at \
                 a time",
                about(free_bytes),
                human(reserve_bytes),
                about(size_bytes)
            ),
        }
    }
}

/// A measured size for people.
fn about(bytes: u64) -> String {
    match bytes {
        u64::MAX => "too many files".to_owned(),
        bytes if bytes >= 10 << 30 => human(bytes >> 30 << 30),
        bytes if bytes >= 1 << 20 => human(bytes >> 20 << 20),
        bytes => human(bytes),
    }
}

/// The running actions' folders, and who is to be told to stop.
#[derive(Debug)]
pub struct Room {
    disk: PathBuf,
    inner: Mutex<Inner>,
    somebody: Notify,
}

#[derive(Debug)]
struct Inner {
    ledger: Ledger,
    occupants: BTreeMap<AttemptId, Occupant>,
}

#[derive(Debug)]
struct Occupant {
    folder: Arc<Path>,
    stop: watch::Sender<Option<Stop>>,
}

impl Room {
    /// Actions work below the folder `disk`.
    pub fn new(disk: PathBuf, limits: RoomLimits) -> Self {
        let inner = Inner { ledger: Ledger::new(limits), occupants: BTreeMap::new() };
        Self { disk, inner: Mutex::new(inner), somebody: Notify::new() }
    }

    /// Watches over an attempt's folder until the answer is dropped, which is when the folder is gone.
    pub fn enter(self: &Arc<Self>, attempt: AttemptId, folder: &Path) -> Occupancy {
        let (stop, told) = watch::channel(None);
        let mut inner = self.lock();
        inner.ledger.enter(attempt);
        inner.occupants.insert(attempt, Occupant { folder: folder.into(), stop });
        self.somebody.notify_one();
        Occupancy { room: self.clone(), attempt, told }
    }

    /// Watches without end.
    pub async fn watch(&self) -> std::convert::Infallible {
        loop {
            let somebody = self.somebody.notified();
            if self.lock().occupants.is_empty() {
                somebody.await;
            }
            let rest = self.look().await;
            tokio::time::sleep(rest).await;
        }
    }

    /// One look; so long it may rest afterwards.
    async fn look(&self) -> Duration {
        let free_bytes = match free_disk_bytes(&self.disk) {
            Ok(free_bytes) => free_bytes,
            Err(error) => {
                tracing::debug!(folder = %self.disk.display(), %error, "the disk cannot be looked at");
                return LOOK_INTERVAL;
            }
        };
        let (folders, bound_bytes, is_low) = {
            let mut inner = self.lock();
            inner.ledger.note_free(free_bytes);
            let due = inner.ledger.due();
            let folder =
                |id| inner.occupants.get(&id).map(|occupant: &Occupant| (id, occupant.folder.clone()));
            let folders: Vec<_> = due.into_iter().filter_map(folder).collect();
            (folders, inner.ledger.bound_bytes(), inner.ledger.is_low())
        };
        if folders.is_empty() {
            return LOOK_INTERVAL;
        }
        let started_at = Instant::now();
        let measuring = tokio::task::spawn_blocking(move || {
            let measure = |(id, folder): (AttemptId, Arc<Path>)| (id, size(&folder, bound_bytes));
            folders.into_iter().map(measure).collect::<Vec<_>>()
        });
        match measuring.await {
            Ok(sizes) => self.stop_who_must(&sizes),
            Err(error) => tracing::error!(%error, "workspaces could not be measured"),
        }
        let busy = started_at.elapsed();
        LOOK_INTERVAL.max(if is_low { busy } else { busy * 9 })
    }

    fn stop_who_must(&self, sizes: &[(AttemptId, u64)]) {
        let mut inner = self.lock();
        for (attempt, stop) in inner.ledger.measured(sizes) {
            tracing::warn!(attempt.id = %attempt, why = %stop, "an action is stopped");
            if let Some(occupant) = inner.occupants.get(&attempt) {
                occupant.stop.send_replace(Some(stop));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An attempt's place in the room, until it is dropped.
#[derive(Debug)]
pub struct Occupancy {
    room: Arc<Room>,
    attempt: AttemptId,
    told: watch::Receiver<Option<Stop>>,
}

impl Occupancy {
    /// Waits until the action must stop; says so once.
    pub async fn must_stop(&mut self) -> Stop {
        loop {
            // The room outlives its occupants.
            if self.told.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
            if let Some(stop) = *self.told.borrow_and_update() {
                return stop;
            }
        }
    }

    /// What ended a command that failed just now, if it was the disk: a program that finds no room has ended before anybody
    /// looked.
    pub fn full_disk(&self) -> Option<Outcome> {
        let reserve_bytes = self.room.lock().ledger.reserve_bytes();
        let free_bytes = free_disk_bytes(&self.room.disk).ok()?;
        (free_bytes < FULL_BYTES.min(reserve_bytes)).then(|| Outcome::Errored {
            cause: Cause::DiskFull,
            message: format!(
                "a command failed while the agent's disk was full ({} are free, {} are kept in reserve by \
                 --disk-reserve-bytes); give the agent a larger disk, or fewer actions at a time",
                about(free_bytes),
                human(reserve_bytes)
            ),
        })
    }
}

impl Drop for Occupancy {
    fn drop(&mut self) {
        let mut inner = self.room.lock();
        inner.ledger.leave(self.attempt);
        if let Entry::Occupied(occupant) = inner.occupants.entry(self.attempt) {
            occupant.remove();
        }
    }
}

/// What a folder takes of its disk, in bytes; stops looking above `enough`. Never follows links, never leaves the disk,
/// and counts a file with several names once. What disappears meanwhile counts as gone.
fn size(folder: &Path, enough: u64) -> u64 {
    let Ok(disk) = std::fs::symlink_metadata(folder).map(|metadata| metadata.dev()) else { return 0 };
    let (mut bytes, mut entries) = (0_u64, 0_u64);
    let mut seen = HashSet::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(listing) = std::fs::read_dir(&folder) else { continue };
        for entry in listing.flatten() {
            entries += 1;
            // Does not follow symbolic links.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.dev() != disk {
                continue;
            }
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if metadata.nlink() > 1 && !seen.insert(metadata.ino()) {
                continue;
            }
            // In units of 512 bytes, whatever the file system's are (stat(2)).
            bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
        }
        if entries > MAX_ENTRIES {
            return u64::MAX;
        }
        if bytes > enough {
            return bytes;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_disk_counts_once_and_what_is_not_there_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::create_dir(path("deep")).unwrap();
        std::fs::write(path("deep/file"), vec![1; 1 << 20]).unwrap();
        std::fs::hard_link(path("deep/file"), path("again")).unwrap();
        std::os::unix::fs::symlink("/", path("elsewhere")).unwrap();
        std::fs::File::create(path("hole")).unwrap().set_len(1 << 40).unwrap();
        let size = size(folder.path(), u64::MAX);
        assert!((1 << 20..(1 << 20) + (64 << 10)).contains(&size), "{size}");
        assert_eq!(super::size(&path("none"), u64::MAX), 0);
    }

    #[test]
    fn what_is_said_names_size_bound_and_knob() {
        let stop = Stop::OverBound { size_bytes: (5 << 30) + 12345, bound_bytes: 4 << 30 };
        assert!(stop.to_string().contains("hold 5 GiB, and an action may have 4 GiB"), "{stop}");
        assert!(stop.to_string().contains("--workspace-bytes"));
        assert!(matches!(stop.outcome(), Outcome::Failed { limit: Some(Limit::Disk), .. }));
        let stop =
            Stop::DiskAlmostFull { size_bytes: 7 << 20, free_bytes: 1 << 20, reserve_bytes: 512 << 20 };
        let Outcome::Errored { cause: Cause::DiskFull, message } = stop.outcome() else { panic!("{stop}") };
        for part in ["1 MiB are free", "512 MiB are kept", "--disk-reserve-bytes", "grew to 7 MiB"] {
            assert!(message.contains(part), "{message}");
        }
    }
}
