//! Keeps what the agent owes: every attempt it holds, until all of it is acknowledged.
//!
//! ```text
//!   <spool>/instance                     the spool's id; locked while an agent uses the spool
//!   <spool>/<action>.<number>/journal    claim, token, events (frames)
//!   <spool>/<action>.<number>/log-<at>   the log from offset <at> on (frames)
//!   <spool>/gone-…                       on its way out
//! ```
//!
//! - A crash of the process loses nothing: what is acted upon or sent was written before. Nothing is synced to the disk,
//!   which would cost each attempt milliseconds; a crash of the machine may lose an attempt, which is then run again.
//! - The whole is bounded. What an attempt needs for its journal and result is set aside before its claim is asked; a log
//!   that finds no room is cut, visibly.
//! - One agent at a time: the spool is locked.

mod attempt;
mod doorbell;
pub mod failpoint;
pub mod frame;
mod journal;
pub mod log;
mod room;
mod segment;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use sealci_core::ids::{AttemptId, ClaimId, InstanceId};
use sealci_core::plan::Resources;

pub use attempt::AttemptSpool;
pub use doorbell::Doorbell;
pub use log::ReadPlace;
pub use segment::Piece;

use crate::causes::is_disk_full;
use crate::private::{Persistence, write_private};
use attempt::Files;
use journal::{Claim, JournalFile, Record};
use log::{Bounds, Log};
use room::Room;

/// Why the spool does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error(
        "the spool {path} is in use by the agent with process id {pid}; stop that agent, or give this one its own data folder"
    )]
    InUse { path: PathBuf, pid: String },
    #[error("cannot read {path} in the agent's spool: {source}; check that the agent may read and write it")]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "cannot write {path} in the agent's spool: {source}; check its permissions and the room on its disk"
    )]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "{path} in the agent's spool holds no instance id; move the spool's folder away to begin a new one"
    )]
    NoInstance { path: PathBuf },
    #[error("the spool is full: {free_bytes} bytes are free, {needed_bytes} are needed")]
    Full { free_bytes: u64, needed_bytes: u64 },
}

impl SpoolError {
    /// Whether there is just no room, now.
    pub fn is_out_of_room(&self) -> bool {
        match self {
            Self::Full { .. } => true,
            Self::Write { source, .. } => is_disk_full(source),
            _ => false,
        }
    }
}

/// What bounds a spool.
#[derive(Debug, Clone, Copy)]
pub struct SpoolLimits {
    /// Everything on disk.
    pub disk_bytes: u64,
    /// Log bytes kept in memory on their way out, over all attempts.
    pub window_bytes: u64,
}

impl Default for SpoolLimits {
    fn default() -> Self {
        Self { disk_bytes: 1 << 30, window_bytes: 16 << 20 }
    }
}

/// An attempt that is about to be taken on.
#[derive(Debug, Clone)]
pub struct NewAttempt {
    pub attempt: AttemptId,
    pub claim_id: ClaimId,
    pub reserved: Resources,
    /// The encoded `ActionSpec`.
    pub spec: Bytes,
    /// How many commands it has: each has events.
    pub commands: usize,
    pub log_quota_bytes: u64,
}

/// The agent's spool, locked.
#[derive(Debug)]
pub struct Spool {
    folder: PathBuf,
    instance: InstanceId,
    bounds: Arc<Bounds>,
    doorbell: Arc<Doorbell>,
    /// Held for as long as the spool is; closed on exec, so that no child keeps it.
    _lock: File,
}

/// For the journal of any attempt, whatever its commands.
const JOURNAL_BASE_BYTES: u64 = 16 << 10;
/// For the events of one command.
const JOURNAL_COMMAND_BYTES: u64 = 256;
/// A spool that cannot take this much takes no attempt.
const SMALLEST_ROOM_BYTES: u64 = 64 << 10;

impl Spool {
    /// Locks the spool, making it where there is none, and finds all attempts that a former process left. `make_id` is
    /// asked for an instance id if there is none.
    pub fn open(
        folder: &Path,
        limits: SpoolLimits,
        persistence: Persistence,
        make_id: impl FnOnce() -> InstanceId,
    ) -> Result<(Self, Vec<Arc<AttemptSpool>>), SpoolError> {
        fs::create_dir_all(folder).map_err(write_error(folder))?;
        let lock = lock(folder)?;
        let instance = instance(folder, persistence, make_id)?;
        let bounds = Arc::new(Bounds {
            disk: Room::new(limits.disk_bytes),
            window: Room::new(limits.window_bytes),
            segment_bytes: (limits.disk_bytes / 16).clamp(64 << 10, 8 << 20),
        });
        let spool =
            Self { folder: folder.to_owned(), instance, bounds, doorbell: Arc::default(), _lock: lock };
        let attempts = spool.scan()?;
        Ok((spool, attempts))
    }

    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Rings when an attempt has something new.
    pub fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    /// Whether another attempt would find room.
    pub fn has_room(&self) -> bool {
        self.bounds.disk.free_bytes() >= SMALLEST_ROOM_BYTES
    }

    /// Takes an attempt on: its claim id is on disk when this returns, and room for its journal is set aside.
    pub fn hold(&self, new: NewAttempt) -> Result<Arc<AttemptSpool>, SpoolError> {
        let journal_bytes =
            JOURNAL_BASE_BYTES + new.spec.len() as u64 + JOURNAL_COMMAND_BYTES * new.commands as u64;
        if !self.bounds.disk.try_take(journal_bytes) {
            let free_bytes = self.bounds.disk.free_bytes();
            return Err(SpoolError::Full { free_bytes, needed_bytes: journal_bytes });
        }
        let folder = self.folder.join(new.attempt.to_string());
        let NewAttempt { claim_id, reserved, log_quota_bytes, spec, .. } = new;
        let claim = Claim { claim_id, reserved, log_quota_bytes, spec };
        let journal = make_folder(&folder, &claim, journal_bytes).inspect_err(|_| {
            self.bounds.disk.give_back(journal_bytes);
            // Whatever came of it so far holds no claim that was asked.
            let _ = fs::remove_dir_all(&folder);
        })?;
        let log = Log::create(folder.clone(), self.bounds.clone(), log_quota_bytes);
        Ok(self.attempt(new.attempt, claim, Files { folder, journal, journal_bytes, log }))
    }

    fn attempt(&self, id: AttemptId, claim: Claim, files: Files) -> Arc<AttemptSpool> {
        Arc::new(AttemptSpool::new(id, claim, files, self.bounds.clone(), self.doorbell.clone()))
    }

    /// Reads all attempts; removes what is none.
    fn scan(&self) -> Result<Vec<Arc<AttemptSpool>>, SpoolError> {
        let mut attempts = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(read_error(&self.folder))? {
            let path = entry.map_err(read_error(&self.folder))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            if name.starts_with(GONE) {
                fs::remove_dir_all(&path).map_err(write_error(&path))?;
            } else if let Ok(id) = name.parse()
                && let Some(attempt) = self.recover(id, path.clone())?
            {
                attempts.push(attempt);
            }
        }
        attempts.sort_by_key(|attempt| attempt.id());
        Ok(attempts)
    }

    /// Reads one attempt; none where not even its claim was written, so that nothing was asked either.
    fn recover(&self, id: AttemptId, folder: PathBuf) -> Result<Option<Arc<AttemptSpool>>, SpoolError> {
        let path = journal_path(&folder);
        let opened = match JournalFile::open(&path) {
            Ok(opened) => Some(opened),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(SpoolError::Read { path, source }),
        };
        let Some((journal, mut records)) = opened.filter(|(_, records)| !records.is_empty()) else {
            fs::remove_dir_all(&folder).map_err(write_error(&folder))?;
            return Ok(None);
        };
        let Record::Claim(claim) = records.remove(0) else {
            fs::remove_dir_all(&folder).map_err(write_error(&folder))?;
            return Ok(None);
        };
        let journal_bytes = JOURNAL_BASE_BYTES + claim.spec.len() as u64;
        self.bounds.disk.take(journal_bytes);
        let log = if records.iter().any(|record| matches!(record, Record::Token(_))) {
            Log::recover(folder.clone(), self.bounds.clone()).map_err(read_error(&folder))?
        } else {
            // Nothing was started, so there is no log; it may be started yet.
            Log::create(folder.clone(), self.bounds.clone(), claim.log_quota_bytes)
        };
        let attempt = self.attempt(id, claim, Files { folder, journal, journal_bytes, log });
        attempt.restore(records);
        Ok(Some(attempt))
    }
}

/// Makes an attempt's folder, with its claim in the journal.
fn make_folder(folder: &Path, claim: &Claim, journal_bytes: u64) -> Result<JournalFile, SpoolError> {
    failpoint::reached(folder);
    fs::create_dir(folder).map_err(write_error(folder))?;
    failpoint::reached(folder);
    let path = journal_path(folder);
    let mut file = JournalFile::create(&path, journal_bytes).map_err(write_error(&path))?;
    failpoint::reached(folder);
    file.append(&Record::Claim(claim.clone())).map_err(write_error(&path))?;
    failpoint::reached(folder);
    Ok(file)
}

const GONE: &str = "gone-";

fn gone_path(folder: &Path) -> PathBuf {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    folder.with_file_name(format!("{GONE}{name}"))
}

fn journal_path(folder: &Path) -> PathBuf {
    folder.join("journal")
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Read { path, source }
}

fn write_error(path: &Path) -> impl FnOnce(io::Error) -> SpoolError {
    let path = path.to_owned();
    move |source| SpoolError::Write { path, source }
}

/// Locks the spool for this process; names the one that holds it otherwise.
fn lock(folder: &Path) -> Result<File, SpoolError> {
    let path = folder.join("lock");
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(write_error(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let pid = fs::read_to_string(&path).unwrap_or_default();
            let pid = pid.trim();
            let pid = if pid.is_empty() { "unknown" } else { pid }.to_owned();
            return Err(SpoolError::InUse { path: folder.to_owned(), pid });
        }
        Err(fs::TryLockError::Error(source)) => return Err(SpoolError::Write { path, source }),
    }
    file.set_len(0).map_err(write_error(&path))?;
    (&file).write_all(std::process::id().to_string().as_bytes()).map_err(write_error(&path))?;
    Ok(file)
}

/// The spool's id, made with it.
fn instance(
    folder: &Path,
    persistence: Persistence,
    make_id: impl FnOnce() -> InstanceId,
) -> Result<InstanceId, SpoolError> {
    let path = folder.join("instance");
    match fs::read_to_string(&path) {
        Ok(text) => text.trim().parse().map_err(|_| SpoolError::NoInstance { path }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let instance = make_id();
            write_private(&path, instance.to_string().as_bytes(), persistence)
                .map_err(|source| SpoolError::Write { path, source })?;
            Ok(instance)
        }
        Err(source) => Err(SpoolError::Read { path, source }),
    }
}

#[cfg(test)]
mod tests;
