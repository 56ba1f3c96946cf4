//! Reads what the database has of an attempt's log, by offset, in bounded pieces.

use bytes::Bytes;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, Condition, EntityTrait, ExprTrait, QueryFilter, QueryOrder, QuerySelect};
use sealci_core::ids::{ActionId, AttemptId};
use sealci_proto::MAX_LOG_CHUNK_BYTES;

use super::entity::{attempts, log_chunks};
use super::{Malformed, Store, StoreError, rows};

/// The next piece of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogPiece {
    Bytes { offset: u64, bytes: Bytes },
    Gap { from: u64, to: u64, reason: String },
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

    /// Why a log that was closed without its end has none: the reason of the empty gap at `end`.
    pub async fn log_closed_because(&self, log: AttemptId, end: u64) -> Result<Option<String>, StoreError> {
        let start = i64::try_from(end).unwrap_or(i64::MAX);
        let key = (log.action.as_uuid(), rows::number(log.number), start);
        let row = log_chunks::Entity::find_by_id(key).one(&self.readers).await?;
        Ok(row.filter(|row| row.end == row.start).and_then(|row| row.gap))
    }

    /// How far the log is now; none if there is no such attempt.
    pub async fn log_extent(&self, log: AttemptId) -> Result<Option<LogExtent>, StoreError> {
        let key = (log.action.as_uuid(), rows::number(log.number));
        let row = attempts::Entity::find_by_id(key).one(&self.readers).await?;
        Ok(row.as_ref().map(extent_of))
    }

    /// How far these logs are, of those attempts that there are.
    pub async fn extents_of(&self, logs: &[AttemptId]) -> Result<Vec<(AttemptId, LogExtent)>, StoreError> {
        use attempts::Column;
        let any = logs.iter().fold(Condition::any(), |any, log| {
            let number = rows::number(log.number);
            any.add(
                Condition::all()
                    .add(Column::ActionId.eq(log.action.as_uuid()))
                    .add(Column::Number.eq(number)),
            )
        });
        let rows = attempts::Entity::find().filter(any).all(&self.readers).await?;
        let of = |row: attempts::Model| {
            let (action, number) = (ActionId::from_uuid(row.action_id), row.number.unsigned_abs());
            (AttemptId { action, number }, extent_of(&row))
        };
        Ok(rows.into_iter().map(of).collect())
    }

    /// The first gap that ends after `offset`: its bounds and its reason.
    pub async fn next_gap(
        &self,
        log: AttemptId,
        offset: u64,
    ) -> Result<Option<(u64, u64, String)>, StoreError> {
        use log_chunks::Column;
        let row = log_chunks::Entity::find()
            .filter(Column::ActionId.eq(log.action.as_uuid()))
            .filter(Column::Number.eq(rows::number(log.number)))
            .filter(Column::End.gt(i64::try_from(offset).unwrap_or(i64::MAX)))
            .filter(Column::Gap.is_not_null())
            .order_by_asc(Column::Start)
            .limit(1)
            .one(&self.readers)
            .await?;
        Ok(row.map(|row| (row.start.unsigned_abs(), row.end.unsigned_abs(), row.gap.unwrap_or_default())))
    }

    /// The chunk or gap that holds `offset`, cut to begin there; none where the database has nothing.
    pub async fn log_chunk(&self, log: AttemptId, offset: u64) -> Result<Option<LogPiece>, StoreError> {
        use log_chunks::Column;
        let at = i64::try_from(offset).unwrap_or(i64::MAX);
        let row = log_chunks::Entity::find()
            .filter(Column::ActionId.eq(log.action.as_uuid()))
            .filter(Column::Number.eq(rows::number(log.number)))
            .filter(Column::Start.lte(at))
            .order_by_desc(Column::Start)
            .limit(1)
            .one(&self.readers)
            .await?;
        let Some(row) = row.filter(|row| row.end > at) else { return Ok(None) };
        let (to, skip) = (row.end.unsigned_abs(), usize::try_from(at - row.start).unwrap_or(usize::MAX));
        Ok(Some(match contents_of(row)? {
            Contents::Gap(reason) => LogPiece::Gap { from: offset, to, reason },
            Contents::Bytes(bytes) => LogPiece::Bytes { offset, bytes: Bytes::from(bytes).slice(skip..) },
        }))
    }
}

fn extent_of(row: &attempts::Model) -> LogExtent {
    LogExtent { end: row.log_end.unsigned_abs(), length: row.log_length.map(i64::unsigned_abs) }
}

/// What a row of `log_chunks` holds.
#[derive(Debug)]
pub enum Contents {
    Bytes(Vec<u8>),
    /// The reason of a gap.
    Gap(String),
}

/// Unpacks a row, and holds it against its bounds.
pub fn contents_of(row: log_chunks::Model) -> Result<Contents, Malformed> {
    if let Some(reason) = row.gap {
        return Ok(Contents::Gap(reason));
    }
    let malformed = |what: String| {
        Malformed::new("log_chunks", format!("{}.{}:{}", row.action_id, row.number, row.start), what)
    };
    let data = row.data.as_deref().unwrap_or_default();
    // No larger chunk is taken, whatever a damaged row says.
    let bytes =
        zstd::bulk::decompress(data, MAX_LOG_CHUNK_BYTES).map_err(|error| malformed(error.to_string()))?;
    if bytes.len() as u64 != row.end.abs_diff(row.start) {
        return Err(malformed(format!("{} bytes instead of {}", bytes.len(), row.end - row.start)));
    }
    Ok(Contents::Bytes(bytes))
}
