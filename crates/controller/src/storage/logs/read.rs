//! Reads the log of an attempt by offset, wherever it is: in the database, in its object, or on the way between them.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use sealci_core::ids::AttemptId;
use tokio::sync::OnceCell;

use super::super::objects::ObjectsError;
use super::super::{Storage, StorageError};
use super::seekable::{self, NotPacked, TAIL_BYTES, Table, Tail};
use crate::store::entity::storage::finished_logs;
use crate::store::{LogExtent, LogPiece, StoreError};

/// Reads one attempt's log from an offset on.
#[derive(Debug)]
pub struct LogReader {
    storage: Storage,
    log: AttemptId,
    /// Once the log has moved it stays where it is.
    finished: OnceCell<finished_logs::Model>,
    object: OnceCell<Object>,
    /// What was read last of the object.
    ahead: Mutex<Window>,
}

/// Who reads on gets so much of an object at once, however many frames that is: a long log in a bucket takes that many
/// round trips less.
const AHEAD_BYTES: u64 = 1 << 20;

/// Some bytes of an object.
#[derive(Debug, Clone, Default)]
struct Window {
    start: u64,
    bytes: Bytes,
}

impl Window {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// A part of it; none if it is not all there.
    fn cut(&self, range: &Range<u64>) -> Option<Bytes> {
        let from = usize::try_from(range.start.checked_sub(self.start)?).ok()?;
        let to = usize::try_from(range.end.checked_sub(self.start)?).ok()?;
        (to <= self.bytes.len()).then(|| self.bytes.slice(from..to))
    }
}

/// What is known of an object: its table, and its last bytes, which of most logs are all.
#[derive(Debug)]
struct Object {
    table: Table,
    tail: Window,
}

impl Storage {
    /// A reader of an attempt's log.
    pub fn log(&self, log: AttemptId) -> LogReader {
        LogReader {
            storage: self.clone(),
            log,
            finished: OnceCell::new(),
            object: OnceCell::new(),
            ahead: Mutex::default(),
        }
    }
}

impl LogReader {
    /// Why a log that was closed without its end has none: the reason of the empty gap at `end`.
    pub async fn closed_because(&self, end: u64) -> Result<Option<String>, StoreError> {
        self.storage.0.store.log_closed_because(self.log, end).await
    }

    /// How far the log is now; none if there is no such attempt.
    pub async fn extent(&self) -> Result<Option<LogExtent>, StoreError> {
        self.storage.0.store.log_extent(self.log).await
    }

    /// The first gap that ends after `offset`: its bounds and its reason.
    pub async fn next_gap(&self, offset: u64) -> Result<Option<(u64, u64, String)>, StoreError> {
        self.storage.0.store.next_gap(self.log, offset).await
    }

    /// The piece that holds `offset`, cut to begin there; none where nothing is stored yet.
    ///
    /// The chunks are asked first: when they do not have it any more, the row of the finished log has been there for
    /// longer.
    pub async fn piece(&self, offset: u64) -> Result<Option<LogPiece>, StorageError> {
        let chunk = self.storage.0.store.log_chunk(self.log, offset).await?;
        if matches!(chunk, Some(LogPiece::Bytes { .. })) {
            return Ok(chunk);
        }
        let Some(finished) = self.finished().await? else { return Ok(chunk) };
        if let Some(deleted) = deletion_of(finished) {
            return Err(deleted);
        }
        // For a gap as well: a log that cannot be read is said to be so at its beginning, not after it.
        let object = self.object.get_or_try_init(|| self.object_of(finished)).await?;
        match chunk {
            Some(gap) => Ok(Some(gap)),
            None => self.piece_of(finished, object, offset).await,
        }
    }

    async fn finished(&self) -> Result<Option<&finished_logs::Model>, StoreError> {
        if self.finished.get().is_none()
            && let Some(row) = self.storage.0.store.finished_log(self.log).await?
        {
            return Ok(Some(self.finished.get_or_init(async || row).await));
        }
        Ok(self.finished.get())
    }

    async fn piece_of(
        &self,
        finished: &finished_logs::Model,
        object: &Object,
        offset: u64,
    ) -> Result<Option<LogPiece>, StorageError> {
        let store = &self.storage.0.store;
        let has_gaps = finished.missing_bytes > 0;
        let missing = if has_gaps { store.missing_below(self.log, offset).await? } else { 0 };
        let byte = offset.saturating_sub(missing);
        let Some(frame) = object.table.frame_at(byte) else { return Ok(None) };
        let packed = self.packed(finished, object, &frame.packed).await?;
        let skip = usize::try_from(byte - frame.log.start).unwrap_or(usize::MAX);
        let unpacking = tokio::task::spawn_blocking(move || seekable::unpack(&packed, &frame));
        let unpacked = unpacking.await.map_err(|_| StorageError::ShuttingDown)?;
        let Ok(unpacked) = unpacked else { return Err(self.damaged(finished)) };
        let mut bytes = Bytes::from(unpacked).slice(skip..);
        if has_gaps && let Some((from, ..)) = store.next_gap(self.log, offset).await? {
            bytes.truncate(usize::try_from(from.saturating_sub(offset)).unwrap_or(usize::MAX));
        }
        Ok(Some(LogPiece::Bytes { offset, bytes }))
    }

    /// A frame's bytes.
    async fn packed(
        &self,
        finished: &finished_logs::Model,
        object: &Object,
        frame: &Range<u64>,
    ) -> Result<Bytes, StorageError> {
        let ahead = self.ahead.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(bytes) = object.tail.cut(frame).or_else(|| ahead.cut(frame)) {
            return Ok(bytes);
        }
        let reads_on = (ahead.start..=ahead.end()).contains(&frame.start);
        let end = if reads_on { (frame.start + AHEAD_BYTES).min(object.tail.end()) } else { frame.end };
        let bytes = self.read(finished, frame.start..end.max(frame.end)).await?;
        let window = Window { start: frame.start, bytes };
        let packed = window.cut(frame).unwrap_or_default();
        *self.ahead.lock().unwrap_or_else(PoisonError::into_inner) = window;
        Ok(packed)
    }

    /// Reads the end of the object, and the table in it.
    async fn object_of(&self, finished: &finished_logs::Model) -> Result<Object, StorageError> {
        let extent = self.extent().await?.map_or(0, |extent| extent.end);
        let log_bytes = extent.saturating_sub(finished.missing_bytes.unsigned_abs());
        let size = finished.size_bytes.unsigned_abs();
        let mut wanted = TAIL_BYTES.min(size);
        loop {
            let tail_start = size - wanted;
            let tail = self.read(finished, tail_start..size).await?;
            match Table::read(&tail, size, log_bytes) {
                Ok(Tail::Table(table)) => {
                    return Ok(Object { table, tail: Window { start: tail_start, bytes: tail } });
                }
                Ok(Tail::Needs(bytes)) if bytes > wanted => wanted = bytes,
                Ok(Tail::Needs(_)) | Err(NotPacked) => return Err(self.damaged(finished)),
            }
        }
    }

    async fn read(&self, finished: &finished_logs::Model, range: Range<u64>) -> Result<Bytes, StorageError> {
        let length = range.end - range.start;
        let inner = &self.storage.0;
        let read =
            inner.objects.read_whole(&finished.object, finished.size_bytes.unsigned_abs(), range).await;
        match read {
            Ok(bytes) if bytes.len() as u64 == length => Ok(bytes.into()),
            Ok(_) | Err(ObjectsError::Damaged { .. }) => Err(self.damaged(finished)),
            Err(ObjectsError::Missing(_)) => {
                // It may have been deleted since this reader began.
                let now = inner.store.finished_log(self.log).await?;
                Err(now.as_ref().and_then(deletion_of).unwrap_or_else(|| self.lost(finished, "gone from")))
            }
            Err(source) => {
                let place = inner.config.objects.location.clone();
                Err(StorageError::LogAway { place, object: finished.object.clone(), source })
            }
        }
    }

    fn damaged(&self, finished: &finished_logs::Model) -> StorageError {
        self.lost(finished, "damaged in")
    }

    fn lost(&self, finished: &finished_logs::Model, how: &'static str) -> StorageError {
        tracing::error!(object = finished.object, how, "the object of a log is not what was written");
        let place = self.storage.0.config.objects.location.clone();
        StorageError::Lost { how, object: finished.object.clone(), place }
    }
}

/// Whether a log has been deleted, and why.
fn deletion_of(finished: &finished_logs::Model) -> Option<StorageError> {
    let at = jiff::Timestamp::from_millisecond(finished.deleted_at?).unwrap_or_default();
    let why = finished.deleted_because.clone().unwrap_or_default();
    Some(StorageError::LogDeleted { day: at.strftime("%Y-%m-%d").to_string(), why })
}
