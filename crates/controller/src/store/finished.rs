//! Reads and writes the rows of finished logs.
//!
//! A log moves in steps that a crash may come between, each of which may be done twice and by several replicas at once:
//! its object's name becomes loose, the object is written, and one transaction makes it the log's ([`Store::keep_logs`]).
//! From then on readers take the object; the chunks go in bounded pieces ([`Store::drop_chunks`]), so that no large
//! log keeps other writers waiting. Deleting a log is the same the other way round.

use std::collections::{HashMap, HashSet};

use sea_orm::sea_query::{Alias, Expr, Func, OnConflict};
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, EntityTrait, ExprTrait, QueryFilter, QueryOrder, QuerySelect,
    TransactionTrait,
};
use sealci_core::ids::{ActionId, AttemptId};
use uuid::Uuid;

use super::batch::insertable;
use super::entity::log_chunks;
use super::entity::storage::{finished_logs, loose_objects};
use super::{Store, StoreError, rows};

/// One statement deletes at most so many chunks, and of so many bytes of log: some milliseconds of the writer's time.
const CHUNKS_AT_ONCE: u64 = 256;
const BYTES_AT_ONCE: i64 = 8 << 20;

/// Where a list of finished logs goes on: behind this time, action and attempt.
pub type FinishedCursor = (i64, Uuid, i32);

impl Store {
    /// Attempts that have chunks, behind `after`, in the order of their ids; the open ones, too.
    pub async fn logs_with_chunks(
        &self,
        after: Option<AttemptId>,
        limit: u64,
    ) -> Result<Vec<AttemptId>, StoreError> {
        use log_chunks::Column;
        let mut query = log_chunks::Entity::find().select_only().columns([Column::ActionId, Column::Number]);
        if let Some(after) = after {
            let (action, number) = key(after);
            let same = Condition::all().add(Column::ActionId.eq(action)).add(Column::Number.gt(number));
            // The first of these bounds is for the index.
            query = query
                .filter(Column::ActionId.gte(action))
                .filter(Condition::any().add(Column::ActionId.gt(action)).add(same));
        }
        let query = query.distinct().order_by_asc(Column::ActionId).order_by_asc(Column::Number).limit(limit);
        let found: Vec<(Uuid, i32)> = query.into_tuple().all(&self.readers).await?;
        Ok(found.into_iter().map(|(action, number)| id(action, number)).collect())
    }

    /// The chunks and gaps from `start` on, in order; not all of them at once.
    pub async fn chunks(
        &self,
        log: AttemptId,
        start: u64,
        limit: u64,
    ) -> Result<Vec<log_chunks::Model>, StoreError> {
        let start = i64::try_from(start).unwrap_or(i64::MAX);
        let query = chunks_of(log).filter(log_chunks::Column::Start.gte(start));
        Ok(query.order_by_asc(log_chunks::Column::Start).limit(limit).all(&self.readers).await?)
    }

    /// The finished log of an attempt; none if it has not moved.
    pub async fn finished_log(&self, log: AttemptId) -> Result<Option<finished_logs::Model>, StoreError> {
        Ok(finished_logs::Entity::find_by_id(key(log)).one(&self.readers).await?)
    }

    /// Those of these logs that have moved.
    pub async fn finished_of(
        &self,
        logs: &[AttemptId],
    ) -> Result<HashMap<AttemptId, finished_logs::Model>, StoreError> {
        let keys: Vec<(Uuid, i32)> = logs.iter().copied().map(key).collect();
        let rows = finished_logs::Entity::find().filter(keys_of(&keys)).all(&self.readers).await?;
        Ok(rows.into_iter().map(|row| (finished_id(&row), row)).collect())
    }

    /// How many bytes of the log below `offset` are in gaps that end there or before.
    pub async fn missing_below(&self, log: AttemptId, offset: u64) -> Result<u64, StoreError> {
        use log_chunks::Column;
        let offset = i64::try_from(offset).unwrap_or(i64::MAX);
        let length = Expr::col(Column::End).sub(Expr::col(Column::Start));
        let sum: Option<Option<i64>> = chunks_of(log)
            .filter(Column::Data.is_null())
            .filter(Column::End.lte(offset))
            .select_only()
            .column_as(whole_sum(length), "missing")
            .into_tuple()
            .one(&self.readers)
            .await?;
        Ok(sum.flatten().unwrap_or(0).unsigned_abs())
    }

    /// Notes objects that are about to be written.
    pub async fn add_all_loose(&self, objects: &[String], now_ms: i64) -> Result<(), StoreError> {
        let rows = objects.iter().map(|object| loose(object.clone(), now_ms));
        self.write(loose_objects::Entity::insert_many(rows).exec_without_returning(&self.writer)).await?;
        Ok(())
    }

    /// Makes written objects their logs', but where another replica was first; the names of those that are. The chunks of
    /// `light` ones, which are few, go with it.
    pub async fn keep_logs(
        &self,
        mut moved: Vec<finished_logs::Model>,
        light: &HashSet<AttemptId>,
    ) -> Result<HashSet<String>, StoreError> {
        use finished_logs::Column;
        // Replicas that move the same logs wait for each other's rows: in one order, or two would wait for ever.
        moved.sort_by_key(|row| (row.action_id, row.number));
        let objects: HashSet<String> = moved.iter().map(|row| row.object.clone()).collect();
        let keys: Vec<(Uuid, i32)> = moved.iter().map(|row| (row.action_id, row.number)).collect();
        let transaction = self.writer.begin().await?;
        let rows = moved.into_iter().map(insertable::<_, finished_logs::ActiveModel>);
        finished_logs::Entity::insert_many(rows)
            .on_conflict(OnConflict::columns([Column::ActionId, Column::Number]).do_nothing().to_owned())
            .exec_without_returning(&transaction)
            .await?;
        let mut stand = finished_logs::Entity::find().filter(keys_of(&keys)).all(&transaction).await?;
        stand.retain(|row| objects.contains(&row.object));
        let kept: HashSet<String> = stand.iter().map(|row| row.object.clone()).collect();
        loose_objects::Entity::delete_many()
            .filter(loose_objects::Column::Object.is_in(kept.iter().map(String::as_str)))
            .exec(&transaction)
            .await?;
        for log in stand.iter().map(finished_id).filter(|log| light.contains(log)) {
            delete_chunks(&transaction, log, i64::MAX, Which::Bytes).await?;
        }
        self.write(transaction.commit()).await?;
        Ok(kept)
    }

    /// Deletes the chunks of a log that has moved, and of one that is deleted its gaps as well.
    pub async fn drop_chunks(&self, log: &finished_logs::Model) -> Result<(), StoreError> {
        use log_chunks::Column;
        let which = if log.deleted_at.is_some() { Which::All } else { Which::Bytes };
        let log = finished_id(log);
        loop {
            let bounds: Vec<(i64, i64)> = chunks_of(log)
                .filter(which.condition())
                .select_only()
                .columns([Column::Start, Column::End])
                .order_by_asc(Column::Start)
                .limit(CHUNKS_AT_ONCE)
                .into_tuple()
                .all(&self.readers)
                .await?;
            let Some((first, _)) = bounds.first() else { return Ok(()) };
            let within = bounds.iter().rev().find(|(_, end)| end - first <= BYTES_AT_ONCE);
            let last = within.map_or(*first, |(start, _)| *start);
            self.write(delete_chunks(&self.writer, log, last, which)).await?;
        }
    }

    /// What all finished logs that are kept take.
    pub async fn logs_size(&self) -> Result<u64, StoreError> {
        use finished_logs::Column;
        let sum: Option<Option<i64>> = finished_logs::Entity::find()
            .filter(Column::DeletedAt.is_null())
            .select_only()
            .column_as(whole_sum(Expr::col(Column::SizeBytes)), "size")
            .into_tuple()
            .one(&self.readers)
            .await?;
        Ok(sum.flatten().unwrap_or(0).unsigned_abs())
    }

    /// One page of the finished logs that are kept, those that moved first behind `after`.
    pub async fn oldest_logs(
        &self,
        after: Option<FinishedCursor>,
        limit: u64,
    ) -> Result<Vec<finished_logs::Model>, StoreError> {
        use finished_logs::Column;
        let mut query = finished_logs::Entity::find().filter(Column::DeletedAt.is_null());
        if let Some((moved, action, number)) = after {
            let same_action =
                Condition::all().add(Column::ActionId.eq(action)).add(Column::Number.gt(number));
            let later = Condition::any().add(Column::ActionId.gt(action)).add(same_action);
            let same_time = Condition::all().add(Column::MovedAt.eq(moved)).add(later);
            query = query.filter(Condition::any().add(Column::MovedAt.gt(moved)).add(same_time));
        }
        let query = query
            .order_by_asc(Column::MovedAt)
            .order_by_asc(Column::ActionId)
            .order_by_asc(Column::Number)
            .limit(limit);
        Ok(query.all(&self.readers).await?)
    }

    /// Deletes logs, unless somebody was first; their objects are loose then. Those that were deleted by this.
    pub async fn delete_logs(
        &self,
        logs: &[finished_logs::Model],
        why: &str,
        now_ms: i64,
    ) -> Result<Vec<finished_logs::Model>, StoreError> {
        use finished_logs::Column;
        let transaction = self.writer.begin().await?;
        let keys: Vec<(Uuid, i32)> = logs.iter().map(|row| (row.action_id, row.number)).collect();
        let deleted = finished_logs::Entity::update_many()
            .col_expr(Column::DeletedAt, Expr::value(now_ms))
            .col_expr(Column::DeletedBecause, Expr::value(why))
            .filter(keys_of(&keys))
            .filter(Column::DeletedAt.is_null())
            .exec_with_returning(&transaction)
            .await?;
        if deleted.is_empty() {
            return Ok(deleted);
        }
        // Nobody writes under these names: they can be deleted at once.
        let rows = deleted.iter().map(|row| loose(row.object.clone(), 0));
        loose_objects::Entity::insert_many(rows).exec_without_returning(&transaction).await?;
        self.write(transaction.commit()).await?;
        Ok(deleted)
    }
}

/// Which of a log's chunks.
#[derive(Clone, Copy)]
enum Which {
    Bytes,
    All,
}

impl Which {
    fn condition(self) -> Condition {
        match self {
            Self::Bytes => Condition::all().add(log_chunks::Column::Data.is_not_null()),
            Self::All => Condition::all(),
        }
    }
}

async fn delete_chunks(
    connection: &impl ConnectionTrait,
    log: AttemptId,
    last: i64,
    which: Which,
) -> Result<(), StoreError> {
    use log_chunks::Column;
    let (action, number) = key(log);
    log_chunks::Entity::delete_many()
        .filter(Column::ActionId.eq(action))
        .filter(Column::Number.eq(number))
        .filter(Column::Start.lte(last))
        .filter(which.condition())
        .exec(connection)
        .await?;
    Ok(())
}

fn chunks_of(log: AttemptId) -> sea_orm::Select<log_chunks::Entity> {
    let (action, number) = key(log);
    log_chunks::Entity::find()
        .filter(log_chunks::Column::ActionId.eq(action))
        .filter(log_chunks::Column::Number.eq(number))
}

fn keys_of(keys: &[(Uuid, i32)]) -> Condition {
    use finished_logs::Column;
    keys.iter().fold(Condition::any(), |any, (action, number)| {
        any.add(Condition::all().add(Column::ActionId.eq(*action)).add(Column::Number.eq(*number)))
    })
}

/// A sum as both databases give it alike: one of them widens it.
fn whole_sum(of: impl Into<Expr>) -> Expr {
    Func::cast_as(Func::sum(of), Alias::new("bigint")).into()
}

fn loose(object: String, since: i64) -> loose_objects::ActiveModel {
    insertable(loose_objects::Model { object, multipart: None, since })
}

fn key(log: AttemptId) -> (Uuid, i32) {
    (log.action.as_uuid(), rows::number(log.number))
}

fn id(action: Uuid, number: i32) -> AttemptId {
    AttemptId { action: ActionId::from_uuid(action), number: number.unsigned_abs() }
}

/// The attempt whose log it is.
pub fn finished_id(log: &finished_logs::Model) -> AttemptId {
    id(log.action_id, log.number)
}
