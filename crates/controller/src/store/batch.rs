//! Collects what one commit writes. Many inputs share one commit (group commit), and a row that several of them changed
//! is written once.

use std::collections::{BTreeMap, BTreeSet};

use sea_orm::sea_query::{Expr, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, DbErr, EntityTrait, ExprTrait,
    IntoActiveModel, Iterable, PrimaryKeyToColumn, QueryFilter, TransactionTrait,
};
use sealci_core::ids::{ActionId, AttemptId, PipelineId};
use uuid::Uuid;

use super::entity::{
    actions, agent_instances, agents, attempts, commands, counters, log_chunks, pipelines, rounds,
};
use super::lease::Held;
use super::news::{self, News};
use super::{Malformed, Store, StoreError};

/// Databases bound the number of parameters of one statement (SQLite: 32,766); so many rows stay below it.
const ROWS_PER_STATEMENT: usize = 500;

/// What one commit writes. Every row is given whole, as it shall stand.
#[derive(Debug, Default)]
pub struct Batch {
    /// Where the database is shared: what must be held for it to be written, also where nothing is.
    pub held: Option<Held>,
    /// Pipelines whose number is 0 get theirs by the commit.
    pub pipelines: BTreeMap<Uuid, pipelines::Model>,
    pub actions: BTreeMap<Uuid, actions::Model>,
    pub attempts: BTreeMap<(Uuid, i32), attempts::Model>,
    pub commands: BTreeMap<(Uuid, i32, i32), commands::Model>,
    /// Only ever added.
    pub log_chunks: Vec<log_chunks::Model>,
    /// Added where they are not there yet.
    pub new_agents: BTreeMap<Uuid, agents::Model>,
    /// Each becomes its agent's current one, where it is seen for the first time.
    pub agent_instances: Vec<agent_instances::Model>,
    /// Which agents take no new work from now on, or take it again.
    pub drained: BTreeMap<Uuid, bool>,
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
            && self.changes_no_agent()
            && self.rounds.is_empty()
    }

    fn changes_no_agent(&self) -> bool {
        self.new_agents.is_empty() && self.agent_instances.is_empty() && self.drained.is_empty()
    }

    pub(super) async fn commit(&mut self, store: &Store) -> Result<(), StoreError> {
        let holds_nothing = self.held.as_ref().is_none_or(|held| held.epochs.is_empty());
        if self.is_empty() && holds_nothing {
            return Ok(());
        }
        let transaction = store.writer.begin().await?;
        if let Some(held) = &self.held {
            held.lock(&transaction).await?;
        }
        self.number_new_pipelines(&transaction).await?;
        put::<pipelines::Entity, _, _>(&transaction, self.pipelines.values()).await?;
        put::<actions::Entity, _, _>(&transaction, self.actions.values()).await?;
        put::<attempts::Entity, _, _>(&transaction, self.attempts.values()).await?;
        put::<commands::Entity, _, _>(&transaction, self.commands.values()).await?;
        add::<log_chunks::Entity, _, _>(&transaction, &self.log_chunks).await?;
        add::<rounds::Entity, _, _>(&transaction, &self.rounds).await?;
        self.change_agents(&transaction).await?;
        if let Some(held) = self.held.as_ref().filter(|held| held.has_others) {
            news::tell(&transaction, held.replica, self.news()).await?;
        }
        store.write(transaction.commit()).await?;
        Ok(())
    }

    /// Changes single columns: other replicas may have changed the others meanwhile.
    async fn change_agents(&self, transaction: &DatabaseTransaction) -> Result<(), DbErr> {
        for row in self.new_agents.values() {
            add_if_new::<agents::Entity, _, _>(transaction, row.clone(), agents::Column::Id).await?;
        }
        for row in &self.agent_instances {
            let id = agent_instances::Column::Id;
            if add_if_new::<agent_instances::Entity, _, _>(transaction, row.clone(), id).await? {
                let current = Expr::value(row.id);
                change_agent(transaction, row.agent_id, agents::Column::CurrentInstance, current).await?;
            }
        }
        for (id, drained) in &self.drained {
            change_agent(transaction, *id, agents::Column::Drained, Expr::value(*drained)).await?;
        }
        Ok(())
    }

    /// What others may be waiting for.
    fn news(&self) -> BTreeSet<News> {
        let pipelines = self.pipelines.keys().chain(self.held.iter().flat_map(|held| held.epochs.keys()));
        let mut news: BTreeSet<News> =
            pipelines.map(|id| News::Pipeline(PipelineId::from_uuid(*id))).collect();
        let log = |action: Uuid, number: i32| {
            News::Log(AttemptId { action: ActionId::from_uuid(action), number: number.unsigned_abs() })
        };
        news.extend(self.attempts.keys().map(|(action, number)| log(*action, *number)));
        if !self.changes_no_agent() {
            news.insert(News::Agents);
        }
        news
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

async fn change_agent(
    transaction: &DatabaseTransaction,
    id: Uuid,
    column: agents::Column,
    value: Expr,
) -> Result<(), DbErr> {
    let update = agents::Entity::update_many().col_expr(column, value).filter(agents::Column::Id.eq(id));
    update.exec(transaction).await.map(drop)
}

/// Inserts a row, if none stands under its key; whether it did.
async fn add_if_new<E, M, A>(transaction: &DatabaseTransaction, row: M, key: E::Column) -> Result<bool, DbErr>
where
    E: EntityTrait<Model = M, ActiveModel = A>,
    M: IntoActiveModel<A>,
    A: ActiveModelTrait<Entity = E>,
{
    let on_conflict = OnConflict::column(key).do_nothing().to_owned();
    let added =
        E::insert(insertable(row)).on_conflict(on_conflict).exec_without_returning(transaction).await?;
    Ok(added > 0)
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
