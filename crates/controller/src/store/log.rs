//! Reads the log of an attempt, by offset, in bounded pieces.

use bytes::Bytes;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, Condition, EntityTrait, ExprTrait, QueryFilter, QueryOrder, QuerySelect};
use sealci_core::ids::AttemptId;

use super::entity::{attempts, log_chunks};
use super::{Malformed, Store, StoreError, rows};

/// A chunk is at most so large (the contract's bound), whatever a damaged row says.
const MAX_CHUNK_BYTES: usize = 1 << 20;

/// The next piece of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogPiece {
    Bytes { offset: u64, bytes: Bytes },
    Gap { from: u64, to: u64, reason: String },
}

/// Reads one attempt's log from an offset on.
#[derive(Debug, Clone)]
pub struct LogReader {
    store: Store,
    attempt: AttemptId,
}

/// How far a log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogExtent {
    /// Bytes below this offset are stored.
    pub end: u64,
    /// The whole length, once known.
    pub length: Option<u64>,
}

impl LogExtent {
    /// Whether nothing more will come.
    pub fn is_whole(&self) -> bool {
        self.length == Some(self.end)
    }
}

/// Of an attempt's row: its log is not whole.
pub(super) fn log_is_open() -> Condition {
    let column = |column: attempts::Column| Expr::col(column);
    Condition::any()
        .add(column(attempts::Column::LogLength).is_null())
        .add(column(attempts::Column::LogLength).gt(column(attempts::Column::LogEnd)))
}

impl Store {
    /// A reader of an attempt's log.
    pub fn log(&self, attempt: AttemptId) -> LogReader {
        LogReader { store: self.clone(), attempt }
    }

    /// Attempts that finished before `finished_before_ms` and whose log is not whole, oldest first.
    pub async fn unfinished_logs(
        &self,
        finished_before_ms: i64,
        limit: u64,
    ) -> Result<Vec<attempts::Model>, StoreError> {
        let query = attempts::Entity::find()
            .filter(log_is_open())
            .filter(attempts::Column::State.eq("finished"))
            .filter(attempts::Column::FinishedAt.lt(finished_before_ms))
            .order_by_asc(attempts::Column::FinishedAt)
            .limit(limit);
        Ok(query.all(&self.writer).await?)
    }
}

impl LogReader {
    /// Why a log that was closed without its end has none: the reason of the empty gap at `end`.
    pub async fn closed_because(&self, end: u64) -> Result<Option<String>, StoreError> {
        let start = i64::try_from(end).unwrap_or(i64::MAX);
        let key = (self.attempt.action.as_uuid(), rows::number(self.attempt.number), start);
        let row = log_chunks::Entity::find_by_id(key).one(&self.store.readers).await?;
        Ok(row.filter(|row| row.end == row.start).and_then(|row| row.gap))
    }

    /// How far the log is now; none if there is no such attempt.
    pub async fn extent(&self) -> Result<Option<LogExtent>, StoreError> {
        let key = (self.attempt.action.as_uuid(), rows::number(self.attempt.number));
        let row = attempts::Entity::find_by_id(key).one(&self.store.readers).await?;
        Ok(row.map(|row| LogExtent {
            end: row.log_end.unsigned_abs(),
            length: row.log_length.map(i64::unsigned_abs),
        }))
    }

    /// The first gap that ends after `offset`: its bounds and its reason.
    pub async fn next_gap(&self, offset: u64) -> Result<Option<(u64, u64, String)>, StoreError> {
        use log_chunks::Column;
        let row = log_chunks::Entity::find()
            .filter(Column::ActionId.eq(self.attempt.action.as_uuid()))
            .filter(Column::Number.eq(rows::number(self.attempt.number)))
            .filter(Column::End.gt(i64::try_from(offset).unwrap_or(i64::MAX)))
            .filter(Column::Gap.is_not_null())
            .order_by_asc(Column::Start)
            .limit(1)
            .one(&self.store.readers)
            .await?;
        Ok(row.map(|row| (row.start.unsigned_abs(), row.end.unsigned_abs(), row.gap.unwrap_or_default())))
    }

    /// The piece that holds `offset`, cut to begin there; none where nothing is stored yet.
    pub async fn piece(&self, offset: u64) -> Result<Option<LogPiece>, StoreError> {
        use log_chunks::Column;
        let at = i64::try_from(offset).unwrap_or(i64::MAX);
        let row = log_chunks::Entity::find()
            .filter(Column::ActionId.eq(self.attempt.action.as_uuid()))
            .filter(Column::Number.eq(rows::number(self.attempt.number)))
            .filter(Column::Start.lte(at))
            .order_by_desc(Column::Start)
            .limit(1)
            .one(&self.store.readers)
            .await?;
        let Some(row) = row.filter(|row| row.end > at) else { return Ok(None) };
        let malformed =
            |what: String| Malformed::new("log_chunks", format!("{}:{}", self.attempt, row.start), what);
        if let Some(reason) = row.gap {
            return Ok(Some(LogPiece::Gap { from: offset, to: row.end.unsigned_abs(), reason }));
        }
        let data = row.data.as_deref().unwrap_or_default();
        let bytes =
            zstd::bulk::decompress(data, MAX_CHUNK_BYTES).map_err(|error| malformed(error.to_string()))?;
        if bytes.len() as u64 != row.end.abs_diff(row.start) {
            return Err(malformed(format!("{} bytes instead of {}", bytes.len(), row.end - row.start)).into());
        }
        let skip = usize::try_from(at - row.start).unwrap_or(bytes.len());
        Ok(Some(LogPiece::Bytes { offset, bytes: Bytes::from(bytes).slice(skip..) }))
    }
}
