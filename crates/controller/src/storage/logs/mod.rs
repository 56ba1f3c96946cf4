//! Moves logs that are whole out of the database: each becomes one object, which [`seekable`] describes.
//!
//! ```text
//!   whole ──▶ name is loose ──▶ object is written ──▶ row says so ──▶ chunks go
//!             (one commit for many)                   (one commit for many)
//! ```
//!
//! Invariants:
//! - whoever reads a log finds the same bytes and gaps at the same offsets, before, during and after; the gaps stay in the
//!   database;
//! - until the row of a finished log is committed its chunks are the log, from then on its object is; a crash in between leaves a
//!   loose object, one after it leaves chunks that are found at the next start;
//! - several replicas may move the same log: one of them makes the row, the others delete what they wrote;
//! - memory is bounded, however long a log is; no commit is long;
//! - what cannot be moved now stays in the database and is tried again.

mod read;
pub mod seekable;
mod whole;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use sealci_core::ids::AttemptId;
use sealci_service::problem::chain;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use read::LogReader;
pub use whole::WholeLogs;

use super::upload::{LONGEST, now_ms};
use super::{Inner, Storage, StorageError};
use crate::store::entity::log_chunks;
use crate::store::entity::storage::finished_logs;
use crate::store::{Contents, Malformed, StoreError, contents_of};
use seekable::Packer;
use whole::Wanted;

/// So many logs share their two commits, as far as they are there.
const LOGS_AT_ONCE: usize = 64;
/// So many objects are written at once: a store that is far away takes its time for each.
pub(super) const WRITES_AT_ONCE: usize = 16;
/// A log takes one of [`WRITES_AT_ONCE`] places for each so many of its bytes: a long one is written alone. So all of them
/// together take some MiB of memory, and a part of an upload.
const BYTES_PER_PLACE: u64 = 256 << 10;
/// So many chunks of a log are in memory at once; each is at most 1 MiB.
const CHUNKS_AT_ONCE: u64 = 4;
/// The chunks of logs up to here go in the commit that makes the object the log.
const LIGHT_CHUNKS: usize = 32;
const LIGHT_BYTES: u64 = 256 << 10;
/// The logs' budget is looked at when so much has come to them, or a sixteenth of it.
const LOOK_AFTER_BYTES: u64 = 256 << 20;

/// Pauses after a failure.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// A log that is whole.
struct Whole {
    log: AttemptId,
    length: u64,
    /// The name of the object that it becomes.
    object: String,
}

/// A log whose object is written.
struct Written {
    row: finished_logs::Model,
    is_light: bool,
}

/// What moves logs, and how it goes.
struct Mover {
    storage: Storage,
    /// Came to the logs since their budget was last looked at.
    grown_bytes: u64,
    /// After a failure one log is tried alone.
    at_once: usize,
}

impl Storage {
    /// Moves every log a while after it became whole, and at its start those that were left, until told to stop.
    pub async fn keep_moving(self, stop: CancellationToken) {
        let whole = self.0.whole_logs.clone();
        let mut mover = Mover { storage: self, grown_bytes: 0, at_once: LOGS_AT_ONCE };
        let mut pause = FIRST_PAUSE;
        whole.look();
        loop {
            let moved = tokio::select! {
                () = stop.cancelled() => return,
                () = whole.news() => stop.run_until_cancelled(mover.move_all()).await,
            };
            match moved {
                None => return,
                Some(Ok(())) => pause = FIRST_PAUSE,
                Some(Err(error)) => {
                    tracing::warn!(
                        error = %chain(&error),
                        pause.ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX),
                        "finished logs stay in the database for now"
                    );
                    mover.at_once = 1;
                    if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        return;
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    whole.look();
                }
            }
        }
    }
}

#[cfg(feature = "testing")]
impl Storage {
    /// Moves every log that is whole, once.
    pub async fn move_once(&self) -> Result<(), StorageError> {
        self.0.whole_logs.look();
        Mover { storage: self.clone(), grown_bytes: 0, at_once: LOGS_AT_ONCE }.move_all().await
    }
}

impl Mover {
    /// Moves all that is known to be whole.
    async fn move_all(&mut self) -> Result<(), StorageError> {
        loop {
            match self.storage.0.whole_logs.take(self.at_once, Instant::now()) {
                Wanted::Nothing => return Ok(()),
                Wanted::These(logs) => self.move_some(&logs).await?,
                Wanted::All => {
                    let mut after = None;
                    loop {
                        let limit = self.at_once as u64;
                        let logs = self.storage.0.store.logs_with_chunks(after, limit).await?;
                        let Some(last) = logs.last() else { break };
                        after = Some(*last);
                        self.move_some(&logs).await?;
                    }
                }
            }
        }
    }

    async fn move_some(&mut self, logs: &[AttemptId]) -> Result<(), StorageError> {
        let inner = &self.storage.0;
        let wholes = inner.still_to_move(logs).await?;
        if wholes.is_empty() {
            return Ok(());
        }
        let objects: Vec<String> = wholes.iter().map(|whole| whole.object.clone()).collect();
        inner.store.add_all_loose(&objects, now_ms()).await?;
        let mut written = Vec::new();
        let mut failed = None;
        // Nothing is awaited between two of them: the others would stand still meanwhile, with the connections that they have.
        let mut writing = futures_util::stream::iter(wholes)
            .map(|whole| inner.try_log(whole))
            .buffer_unordered(WRITES_AT_ONCE);
        while let Some(log) = writing.next().await {
            match log {
                Ok(log) => written.extend(log),
                // The others of them would fail as well, each after its own tries.
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        drop(writing);
        self.grown_bytes += inner.keep_written(written).await?;
        if self.grown_bytes >= LOOK_AFTER_BYTES.min(inner.config.logs_budget_bytes / 16) {
            self.grown_bytes = 0;
            inner.logs_grown.notify_one();
        }
        match failed {
            Some(error) => Err(error),
            None => {
                self.at_once = LOGS_AT_ONCE;
                Ok(())
            }
        }
    }
}

impl Inner {
    /// Those of the logs that are whole and in the database. Of those that have moved it deletes what a crash left there.
    async fn still_to_move(&self, logs: &[AttemptId]) -> Result<Vec<Whole>, StoreError> {
        let moved = self.store.finished_of(logs).await?;
        let mut wholes = Vec::new();
        for (log, extent) in self.store.extents_of(logs).await? {
            if let Some(row) = moved.get(&log) {
                self.store.drop_chunks(row).await?;
            } else if extent.is_whole() && extent.end > 0 {
                let action = log.action.as_uuid().simple().to_string();
                let (spread, own) = (&action[action.len() - 2..], Uuid::now_v7().simple());
                let object = format!("logs/{spread}/{log}.{own}.zst");
                wholes.push(Whole { log, length: extent.end, object });
            }
        }
        Ok(wholes)
    }

    /// Writes the object of a log; none where the failure is this log's alone.
    async fn try_log(&self, whole: Whole) -> Result<Option<Written>, StorageError> {
        match self.write_log(&whole).await {
            Ok(written) => Ok(Some(written)),
            Err(error) => self.must_wait(&whole, error).await.map_or(Ok(None), Err),
        }
    }

    /// Writes the object of a log. What a failure leaves of it is deleted, now or later.
    async fn write_log(&self, whole: &Whole) -> Result<Written, StorageError> {
        let places = whole.length.div_ceil(BYTES_PER_PLACE).min(WRITES_AT_ONCE as u64);
        let places = u32::try_from(places).unwrap_or(u32::MAX);
        let _places = self.log_places.acquire_many(places).await.map_err(|_| StorageError::ShuttingDown)?;
        let mut multipart = None;
        let written = tokio::time::timeout(LONGEST, self.pack(whole, &mut multipart)).await;
        let written = written.unwrap_or_else(|_| Err(StorageError::BrokenOff("it took too long".into())));
        if written.is_err() {
            self.clear(&whole.object, multipart.as_deref()).await;
        }
        written
    }

    async fn pack(&self, whole: &Whole, multipart: &mut Option<String>) -> Result<Written, StorageError> {
        let mut upload = self.objects.begin(&whole.object, seekable::at_most(whole.length)).await?;
        if let Some(name) = upload.multipart() {
            *multipart = Some(name.to_owned());
            self.store.name_multipart(&whole.object, name).await?;
        }
        let mut packing = Packing::begin(whole)?;
        let (missing_bytes, chunks, size_bytes) = loop {
            let page = self.store.chunks(whole.log, packing.at, CHUNKS_AT_ONCE).await?;
            let working = tokio::task::spawn_blocking(move || packing.take(page));
            match working.await.map_err(|_| StorageError::ShuttingDown)?? {
                Packed::Some(rest, bytes) => {
                    packing = rest;
                    upload.write(&bytes).await?;
                }
                Packed::Last { bytes, size_bytes, missing_bytes, chunks } => {
                    upload.write(&bytes).await?;
                    break (missing_bytes, chunks, size_bytes);
                }
            }
        };
        upload.finish().await?;
        let row = finished_logs::Model {
            action_id: whole.log.action.as_uuid(),
            number: i32::try_from(whole.log.number).unwrap_or(i32::MAX),
            object: whole.object.clone(),
            size_bytes: i64::try_from(size_bytes).unwrap_or(i64::MAX),
            missing_bytes: i64::try_from(missing_bytes).unwrap_or(i64::MAX),
            moved_at: now_ms(),
            deleted_at: None,
            deleted_because: None,
        };
        Ok(Written { row, is_light: chunks <= LIGHT_CHUNKS && whole.length <= LIGHT_BYTES })
    }

    /// Makes the objects the logs, and deletes what is of no use any more; how much came to the logs.
    async fn keep_written(&self, written: Vec<Written>) -> Result<u64, StorageError> {
        if written.is_empty() {
            return Ok(0);
        }
        let light: HashSet<AttemptId> = written
            .iter()
            .filter(|written| written.is_light)
            .map(|written| crate::store::finished_id(&written.row))
            .collect();
        let rows: Vec<finished_logs::Model> = written.iter().map(|written| written.row.clone()).collect();
        let kept = self.store.keep_logs(rows, &light).await?;
        let mut grown = 0;
        for Written { row, is_light } in written {
            if !kept.contains(&row.object) {
                // Another replica was first.
                self.clear(&row.object, None).await;
                continue;
            }
            grown += row.size_bytes.unsigned_abs();
            if !is_light {
                self.store.drop_chunks(&row).await?;
            }
        }
        Ok(grown)
    }

    /// The failure, unless it is this log's alone: then it is left in the database as it is, where it can be read as far as
    /// it can be.
    async fn must_wait(&self, whole: &Whole, error: StorageError) -> Option<StorageError> {
        let StorageError::Store(StoreError::Corrupt(what)) = &error else { return Some(error) };
        match self.store.finished_log(whole.log).await {
            // Another replica moved it meanwhile.
            Ok(Some(_)) => None,
            Ok(None) => {
                tracing::error!(attempt.id = %whole.log, error = %what, "a finished log cannot be moved");
                None
            }
            Err(error) => Some(error.into()),
        }
    }
}

/// A log that is being packed.
struct Packing {
    packer: Packer,
    log: AttemptId,
    length: u64,
    at: u64,
    missing_bytes: u64,
    chunks: usize,
}

/// The next bytes of an object.
enum Packed {
    Some(Packing, Vec<u8>),
    Last { bytes: Vec<u8>, size_bytes: u64, missing_bytes: u64, chunks: usize },
}

impl Packing {
    fn begin(whole: &Whole) -> Result<Self, StorageError> {
        let packer = Packer::new().map_err(cannot_pack)?;
        let (log, length) = (whole.log, whole.length);
        Ok(Self { packer, log, length, at: 0, missing_bytes: 0, chunks: 0 })
    }

    /// Takes the next chunks. A log with a hole is none.
    fn take(mut self, page: Vec<log_chunks::Model>) -> Result<Packed, StorageError> {
        let hole = |at: u64| {
            StoreError::Corrupt(Malformed::new("log_chunks", self.log, format!("nothing is at {at}")))
        };
        if page.is_empty() {
            return Err(hole(self.at).into());
        }
        let mut bytes = Vec::new();
        for row in page {
            if row.start.unsigned_abs() != self.at {
                return Err(hole(self.at).into());
            }
            let to = row.end.unsigned_abs();
            match contents_of(row).map_err(StoreError::from)? {
                Contents::Gap(_) => self.missing_bytes += to - self.at,
                Contents::Bytes(some) => bytes.extend(self.packer.push(&some).map_err(cannot_pack)?),
            }
            self.chunks += 1;
            self.at = to;
        }
        if self.at < self.length {
            return Ok(Packed::Some(self, bytes));
        }
        let (rest, size_bytes) = self.packer.finish().map_err(cannot_pack)?;
        bytes.extend(rest);
        let (missing_bytes, chunks) = (self.missing_bytes, self.chunks);
        Ok(Packed::Last { bytes, size_bytes, missing_bytes, chunks })
    }
}

fn cannot_pack(error: std::io::Error) -> StorageError {
    StorageError::BrokenOff(format!("zstd: {error}"))
}
