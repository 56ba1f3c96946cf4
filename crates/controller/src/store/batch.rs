//! Collects what one commit writes. Many inputs share one commit (group commit), and a row that several of them changed
//! is written once.

use std::collections::BTreeMap;

use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbErr,
    EntityTrait, ExprTrait, IntoActiveModel, Iterable, PrimaryKeyToColumn, QueryFilter, TransactionTrait,
};
use uuid::Uuid;

use super::entity::{
    actions, agent_instances, agents, attempts, commands, counters, log_chunks, pipelines, rounds,
};
use super::{Malformed, StoreError};

/// Databases bound the number of parameters of one statement (SQLite: 32,766); so many rows stay below it.
const ROWS_PER_STATEMENT: usize = 500;

/// What one commit writes. Every row is given whole, as it shall stand.
#[derive(Debug, Default)]
pub struct Batch {
    /// Pipelines whose number is 0 get theirs by the commit.
    pub pipelines: BTreeMap<Uuid, pipelines::Model>,
    pub actions: BTreeMap<Uuid, actions::Model>,
    pub attempts: BTreeMap<(Uuid, i32), attempts::Model>,
    pub commands: BTreeMap<(Uuid, i32, i32), commands::Model>,
    /// Only ever added.
    pub log_chunks: Vec<log_chunks::Model>,
    pub agents: BTreeMap<Uuid, agents::Model>,
    /// Only ever added.
    pub agent_instances: Vec<agent_instances::Model>,
    /// Only ever added.
    pub rounds: Vec<rounds::Model>,
}

impl Batch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.pipelines.is_empty()
            && self.actions.is_empty()
            && self.attempts.is_empty()
            && self.commands.is_empty()
            && self.log_chunks.is_empty()
            && self.agents.is_empty()
            && self.agent_instances.is_empty()
            && self.rounds.is_empty()
    }

    pub(super) async fn commit(&mut self, writer: &DatabaseConnection) -> Result<(), StoreError> {
        if self.is_empty() {
            return Ok(());
        }
        let transaction = writer.begin().await?;
        self.number_new_pipelines(&transaction).await?;
        put::<pipelines::Entity, _, _>(&transaction, self.pipelines.values()).await?;
        put::<actions::Entity, _, _>(&transaction, self.actions.values()).await?;
        put::<attempts::Entity, _, _>(&transaction, self.attempts.values()).await?;
        put::<commands::Entity, _, _>(&transaction, self.commands.values()).await?;
        add::<log_chunks::Entity, _, _>(&transaction, &self.log_chunks).await?;
        put::<agents::Entity, _, _>(&transaction, self.agents.values()).await?;
        add::<agent_instances::Entity, _, _>(&transaction, &self.agent_instances).await?;
        add::<rounds::Entity, _, _>(&transaction, &self.rounds).await?;
        transaction.commit().await?;
        Ok(())
    }

    async fn number_new_pipelines(&mut self, transaction: &DatabaseTransaction) -> Result<(), StoreError> {
        let new = self.pipelines.values_mut().filter(|row| row.number == 0);
        let new: Vec<&mut pipelines::Model> = new.collect();
        if !new.is_empty() {
            let first = take_numbers(transaction, "pipeline", new.len() as i64).await?;
            for (row, number) in new.into_iter().zip(first..) {
                row.number = number;
            }
        }
        Ok(())
    }
}

/// Takes `count` numbers of a sequence; returns the first.
pub(super) async fn take_numbers(
    connection: &impl ConnectionTrait,
    counter: &str,
    count: i64,
) -> Result<i64, StoreError> {
    let rows = counters::Entity::update_many()
        .col_expr(counters::Column::Next, Expr::col(counters::Column::Next).add(count))
        .filter(counters::Column::Name.eq(counter))
        .exec_with_returning(connection)
        .await?;
    let row = rows.first().ok_or_else(|| Malformed::new("counters", counter, "the row is missing"))?;
    Ok(row.next - count)
}

/// Inserts rows, or replaces those that stand under the same key.
async fn put<'a, E, M, A>(
    transaction: &DatabaseTransaction,
    rows: impl Iterator<Item = &'a M>,
) -> Result<(), DbErr>
where
    E: EntityTrait<Model = M, ActiveModel = A>,
    M: Clone + IntoActiveModel<A> + 'a,
    A: ActiveModelTrait<Entity = E>,
{
    let keys: Vec<E::Column> = E::PrimaryKey::iter().map(PrimaryKeyToColumn::into_column).collect();
    let is_key = |column: &E::Column| keys.iter().any(|key| format!("{key:?}") == format!("{column:?}"));
    let replaced: Vec<E::Column> = E::Column::iter().filter(|column| !is_key(column)).collect();
    let rows: Vec<A> = rows.map(|row| insertable(row.clone())).collect();
    for some in rows.chunks(ROWS_PER_STATEMENT) {
        let on_conflict = OnConflict::columns(keys.clone()).update_columns(replaced.clone()).to_owned();
        E::insert_many(some.iter().cloned())
            .on_conflict(on_conflict)
            .exec_without_returning(transaction)
            .await?;
    }
    Ok(())
}

/// Inserts rows that must not stand yet.
async fn add<E, M, A>(transaction: &DatabaseTransaction, rows: &[M]) -> Result<(), DbErr>
where
    E: EntityTrait<Model = M, ActiveModel = A>,
    M: Clone + IntoActiveModel<A>,
    A: ActiveModelTrait<Entity = E>,
{
    for some in rows.chunks(ROWS_PER_STATEMENT) {
        let rows = some.iter().map(|row| insertable(row.clone()));
        E::insert_many(rows).exec_without_returning(transaction).await?;
    }
    Ok(())
}

/// A row as read counts as unchanged; to be inserted, every column must count as set.
pub(super) fn insertable<M, A>(row: M) -> A
where
    M: IntoActiveModel<A>,
    A: ActiveModelTrait,
{
    row.into_active_model().reset_all()
}
