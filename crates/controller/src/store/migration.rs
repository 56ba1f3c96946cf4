//! Makes the tables. A migration that has been released is never changed; the next one comes after it.

mod storage;

use sea_orm::{ConnectionTrait, EntityTrait, Schema};
use sea_orm_migration::prelude::*;

use super::entity::{
    actions, agent_instances, agents, attempts, commands, counters, log_chunks, pipelines, rounds,
};
use super::log::log_is_open;

/// All migrations, in their order.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(First), Box::new(OpenLogs), Box::new(storage::Storage)]
    }
}

/// A migration is made whole or not at all, on SQLite too, where the library does not do so by itself.
const WHOLE: Option<bool> = Some(true);

struct First;

impl MigrationName for First {
    fn name(&self) -> &str {
        "m0001_first"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for First {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    #[allow(elided_lifetimes_in_paths)] // the trait's own signature elides it, and the two must agree
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        create_table(manager, pipelines::Entity).await?;
        create_table(manager, actions::Entity).await?;
        create_table(manager, attempts::Entity).await?;
        create_table(manager, commands::Entity).await?;
        create_table(manager, log_chunks::Entity).await?;
        create_table(manager, agents::Entity).await?;
        create_table(manager, agent_instances::Entity).await?;
        create_table(manager, rounds::Entity).await?;
        create_table(manager, counters::Entity).await?;

        let by_state = Index::create()
            .name("pipelines_by_state")
            .table(pipelines::Entity)
            .col(pipelines::Column::State)
            .col(pipelines::Column::Number)
            .to_owned();
        manager.create_index(by_state).await?;
        let by_repository = Index::create()
            .name("pipelines_by_repository")
            .table(pipelines::Entity)
            .col(pipelines::Column::Repository)
            .col(pipelines::Column::Number)
            .to_owned();
        manager.create_index(by_repository).await?;
        let of_pipeline = Index::create()
            .name("actions_of_pipeline")
            .table(actions::Entity)
            .col(actions::Column::PipelineId)
            .col(actions::Column::Ordinal)
            .to_owned();
        manager.create_index(of_pipeline).await?;

        for name in ["pipeline", "token"] {
            let row = counters::ActiveModel { name: sea_orm::Set(name.into()), next: sea_orm::Set(1) };
            counters::Entity::insert(row).exec_without_returning(manager.get_connection()).await?;
        }
        Ok(())
    }
}

/// Finds the attempts whose log is not whole, which are few, among all that ever were.
struct OpenLogs;

impl MigrationName for OpenLogs {
    fn name(&self) -> &str {
        "m0002_open_logs"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for OpenLogs {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    #[allow(elided_lifetimes_in_paths)] // the trait's own signature elides it, and the two must agree
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let index = Index::create()
            .name("attempts_with_open_logs")
            .table(attempts::Entity)
            .col(attempts::Column::FinishedAt)
            .cond_where(log_is_open())
            .to_owned();
        manager.create_index(index).await
    }
}

async fn create_table<E: EntityTrait>(manager: &SchemaManager<'_>, entity: E) -> Result<(), DbErr> {
    let connection = manager.get_connection();
    let schema = Schema::new(connection.get_database_backend());
    manager.create_table(schema.create_table_from_entity(entity)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_migration_can_be_left_half_made() {
        for migration in Migrator::migrations() {
            assert_eq!(migration.use_transaction(), Some(true), "{}", migration.name());
        }
    }
}
