//! Makes the tables. A migration that has been released is never changed; the next one comes after it.

mod leases;
mod logs;
mod retries;
mod storage;

use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, EntityTrait, Schema, StatementBuilder, TransactionTrait,
};
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
        vec![
            Box::new(First),
            Box::new(OpenLogs),
            Box::new(storage::Storage),
            Box::new(logs::FinishedLogs),
            Box::new(leases::Leases),
            Box::new(retries::Retries),
        ]
    }
}

/// Of PostgreSQL's advisory locks, the one under which tables are made. Any number that nobody else takes would do.
const MIGRATION_LOCK: i64 = 0x5ea1_c100;

/// Brings the tables up to date; one replica at a time, where several start at once.
pub(super) async fn bring_up(writer: &DatabaseConnection) -> Result<(), DbErr> {
    if writer.get_database_backend() != DbBackend::Postgres {
        return Migrator::up(writer, None).await;
    }
    let transaction = writer.begin().await?;
    transaction.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")).await?;
    Migrator::up(&transaction, None).await?;
    transaction.commit().await
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
        let connection = manager.get_connection();
        let mut all = Statements::new(connection.get_database_backend());
        all.table(pipelines::Entity);
        all.table(actions::Entity);
        all.table(attempts::Entity);
        all.table(commands::Entity);
        all.table(log_chunks::Entity);
        all.table(agents::Entity);
        all.table(agent_instances::Entity);
        all.table(rounds::Entity);
        all.table(counters::Entity);
        all.add(
            Index::create()
                .name("pipelines_by_state")
                .table(pipelines::Entity)
                .col(pipelines::Column::State)
                .col(pipelines::Column::Number),
        );
        all.add(
            Index::create()
                .name("pipelines_by_repository")
                .table(pipelines::Entity)
                .col(pipelines::Column::Repository)
                .col(pipelines::Column::Number),
        );
        all.add(
            Index::create()
                .name("actions_of_pipeline")
                .table(actions::Entity)
                .col(actions::Column::PipelineId)
                .col(actions::Column::Ordinal),
        );
        connection.execute_unprepared(&all.text).await?;

        let rows = ["pipeline", "token"]
            .map(|name| counters::ActiveModel { name: sea_orm::Set(name.into()), next: sea_orm::Set(1) });
        counters::Entity::insert_many(rows).exec_without_returning(connection).await?;
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

/// Statements that the database gets at once: asked for one by one they take several times as long.
struct Statements {
    backend: DbBackend,
    text: String,
}

impl Statements {
    fn new(backend: DbBackend) -> Self {
        Self { backend, text: String::new() }
    }

    fn table<E: EntityTrait>(&mut self, entity: E) {
        self.add(&Schema::new(self.backend).create_table_from_entity(entity));
    }

    fn add(&mut self, statement: &impl StatementBuilder) {
        self.text += &self.backend.build(statement).sql;
        self.text += ";\n";
    }
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
