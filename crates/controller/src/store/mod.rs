//! Keeps the truth: the tables, one commit for many changes, and what is read of them.
//!
//! Of pipelines there is one writer, the dispatch driver, through [`Batch`]; what is kept of actions is written by whoever
//! keeps it (`kept`, `finished`, `due`), in short transactions. Readers have connections of their own. Nothing here decides
//! anything: what may happen is the core's business, when it happens the driver's.

mod batch;
mod due;
mod edge;
pub mod entity;
mod finished;
mod kept;
mod lease;
mod list;
mod log;
mod migration;
mod news;
mod rows;

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseConnection, DbBackend, DbErr, EntityTrait, QueryFilter, QueryOrder,
};
use sealci_core::ids::{ActionId, AttemptId, PipelineId};

pub use batch::Batch;
pub use due::Due;
#[cfg(feature = "testing")]
pub use edge::Edges;
pub use finished::{FinishedCursor, finished_id};
pub use kept::{AttemptRows, CacheCursor, Referred, counts};
pub use lease::{Held, Ownership};
pub use list::{ListFilter, Page};
pub use log::{Contents, LogExtent, LogPiece, contents_of};
pub use news::{News, NewsListener};
pub use rows::{Malformed, aggregate, attempt_of_row, outcome_of_json, outcome_to_json, row_of_attempt};

use entity::{actions, agents, attempts, commands, pipelines, rounds};

/// What went wrong with the database.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the database failed")]
    Database(#[from] DbErr),
    #[error("the database holds what it must not: {0}")]
    Corrupt(#[from] Malformed),
    #[error("another replica has taken over what was to be changed")]
    TakenOver,
    #[error("this replica was silent for too long, and others have taken over what it owned")]
    LeaseLost,
}

/// The database, as one connection that writes and others that read.
#[derive(Debug, Clone)]
pub struct Store {
    writer: DatabaseConnection,
    readers: DatabaseConnection,
    is_shared: bool,
    #[cfg(feature = "testing")]
    edges: Edges,
}

/// A pipeline's rows, as the driver needs them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineRows {
    pub pipeline: pipelines::Model,
    /// In order.
    pub actions: Vec<actions::Model>,
    /// The last attempt of each action that has one.
    pub attempts: Vec<attempts::Model>,
    /// The commands that started and have not finished.
    pub commands: Vec<commands::Model>,
}

/// All there is to show of a pipeline.
#[derive(Debug, Clone)]
pub struct PipelineStory {
    pub pipeline: pipelines::Model,
    pub actions: Vec<actions::Model>,
    pub attempts: Vec<attempts::Model>,
    pub commands: Vec<commands::Model>,
}

impl Store {
    /// Takes the database over and brings its tables up to date.
    pub async fn open(writer: DatabaseConnection, readers: DatabaseConnection) -> Result<Self, StoreError> {
        migration::bring_up(&writer).await?;
        let is_shared = writer.get_database_backend() == DbBackend::Postgres;
        Ok(Self {
            writer,
            readers,
            is_shared,
            #[cfg(feature = "testing")]
            edges: Edges::default(),
        })
    }

    /// For several replicas within one test's process, on whatever database; and where this one's commits end.
    #[cfg(feature = "testing")]
    pub fn of_replica(&self, edges: Edges) -> Self {
        Self { is_shared: true, edges, ..self.clone() }
    }

    /// For a process that has the database alone; and where its commits end.
    #[cfg(feature = "testing")]
    pub fn with_edges(&self, edges: Edges) -> Self {
        Self { edges, ..self.clone() }
    }

    /// Whether other processes may have the database open, too.
    pub fn is_shared(&self) -> bool {
        self.is_shared
    }

    /// Commits a batch: all of it, or nothing. New pipelines have their number afterwards.
    pub async fn commit(&self, batch: &mut Batch) -> Result<(), StoreError> {
        batch.commit(self).await
    }

    /// Takes `count` numbers of a sequence; returns the first. What is taken and not used is never given again.
    pub async fn take_numbers(&self, counter: &str, count: i64) -> Result<i64, StoreError> {
        self.write(batch::take_numbers(&self.writer, counter, count)).await
    }

    /// One pipeline as the driver needs it. It reads through the writer: it sees every commit.
    pub async fn pipeline(&self, id: PipelineId) -> Result<Option<PipelineRows>, StoreError> {
        let Some(pipeline) = pipelines::Entity::find_by_id(id.as_uuid()).one(&self.writer).await? else {
            return Ok(None);
        };
        let actions = actions_of(&self.writer, id).await?;
        let mut attempts = attempts_of(&self.writer, id).await?;
        attempts.retain(|attempt| {
            actions.iter().any(|action| action.id == attempt.action_id && action.attempts == attempt.number)
        });
        let commands = commands::Entity::find()
            .filter(commands::Column::ActionId.in_subquery(ids_of_actions(id)))
            .filter(commands::Column::ExitCode.is_null())
            .all(&self.writer)
            .await?;
        Ok(Some(PipelineRows { pipeline, actions, attempts, commands }))
    }

    /// The pipeline that an action belongs to.
    pub async fn pipeline_of_action(&self, action: ActionId) -> Result<Option<PipelineId>, StoreError> {
        let row = actions::Entity::find_by_id(action.as_uuid()).one(&self.writer).await?;
        Ok(row.map(|row| PipelineId::from_uuid(row.pipeline_id)))
    }

    /// The pipeline with an identity, if one was made.
    pub async fn pipeline_with_identity(&self, identity: &str) -> Result<Option<PipelineId>, StoreError> {
        let query = pipelines::Entity::find().filter(pipelines::Column::Identity.eq(identity));
        Ok(query.one(&self.writer).await?.map(|row| PipelineId::from_uuid(row.id)))
    }

    /// The round that a re-run's request opened, if it did.
    pub async fn round_of_request(&self, id: PipelineId, request: &str) -> Result<Option<i32>, StoreError> {
        let row = rounds::Entity::find_by_id((id.as_uuid(), request.to_owned())).one(&self.writer).await?;
        Ok(row.map(|row| row.round))
    }

    /// One attempt's row, current or not.
    pub async fn attempt(&self, id: AttemptId) -> Result<Option<attempts::Model>, StoreError> {
        let key = (id.action.as_uuid(), rows::number(id.number));
        Ok(attempts::Entity::find_by_id(key).one(&self.writer).await?)
    }

    /// All agents.
    pub async fn agents(&self) -> Result<Vec<agents::Model>, StoreError> {
        Ok(agents::Entity::find().order_by_asc(agents::Column::Name).all(&self.writer).await?)
    }

    /// The agents' names, by their ids.
    pub async fn agent_names(&self) -> Result<HashMap<uuid::Uuid, String>, StoreError> {
        let rows = agents::Entity::find().all(&self.readers).await?;
        Ok(rows.into_iter().map(|row| (row.id, row.name)).collect())
    }

    /// One action's row, for showing.
    pub async fn action(&self, action: ActionId) -> Result<Option<actions::Model>, StoreError> {
        Ok(actions::Entity::find_by_id(action.as_uuid()).one(&self.readers).await?)
    }

    /// One pipeline's row, for showing.
    pub async fn pipeline_row(&self, id: PipelineId) -> Result<Option<pipelines::Model>, StoreError> {
        Ok(pipelines::Entity::find_by_id(id.as_uuid()).one(&self.readers).await?)
    }

    /// Whether an instance was ever seen.
    pub async fn instance_was_seen(&self, instance: uuid::Uuid) -> Result<bool, StoreError> {
        Ok(entity::agent_instances::Entity::find_by_id(instance).one(&self.writer).await?.is_some())
    }

    /// All there is to show of a pipeline, as one consistent state.
    pub async fn story(&self, id: PipelineId) -> Result<Option<PipelineStory>, StoreError> {
        use sea_orm::TransactionTrait;
        let snapshot = self.readers.begin().await?;
        let Some(pipeline) = pipelines::Entity::find_by_id(id.as_uuid()).one(&snapshot).await? else {
            return Ok(None);
        };
        let actions = actions_of(&snapshot, id).await?;
        let attempts = attempts_of(&snapshot, id).await?;
        let commands = commands::Entity::find()
            .filter(commands::Column::ActionId.in_subquery(ids_of_actions(id)))
            .order_by_asc(commands::Column::ActionId)
            .order_by_asc(commands::Column::Number)
            .order_by_asc(commands::Column::Index)
            .all(&snapshot)
            .await?;
        snapshot.rollback().await?;
        Ok(Some(PipelineStory { pipeline, actions, attempts, commands }))
    }

    /// Answers as soon as the database does.
    pub async fn ping(&self) -> Result<(), StoreError> {
        self.readers.execute_unprepared("SELECT 1").await?;
        Ok(())
    }
}

async fn actions_of(connection: &impl ConnectionTrait, id: PipelineId) -> Result<Vec<actions::Model>, DbErr> {
    actions::Entity::find()
        .filter(actions::Column::PipelineId.eq(id.as_uuid()))
        .order_by_asc(actions::Column::Ordinal)
        .all(connection)
        .await
}

async fn attempts_of(
    connection: &impl ConnectionTrait,
    id: PipelineId,
) -> Result<Vec<attempts::Model>, DbErr> {
    attempts::Entity::find()
        .filter(attempts::Column::ActionId.in_subquery(ids_of_actions(id)))
        .order_by_asc(attempts::Column::ActionId)
        .order_by_asc(attempts::Column::Number)
        .all(connection)
        .await
}

fn ids_of_actions(id: PipelineId) -> sea_orm::sea_query::SelectStatement {
    sea_orm::sea_query::Query::select()
        .column(actions::Column::Id)
        .from(actions::Entity)
        .and_where(actions::Column::PipelineId.eq(id.as_uuid()))
        .to_owned()
}
