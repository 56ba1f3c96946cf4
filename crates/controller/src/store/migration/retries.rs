//! Counts the attempts that `retry` gave.

use sea_orm_migration::prelude::*;

use super::super::entity::actions;
use super::WHOLE;

pub(super) struct Retries;

impl MigrationName for Retries {
    fn name(&self) -> &str {
        "m0006_retries"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Retries {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    #[allow(elided_lifetimes_in_paths)] // the trait's own signature elides it, and the two must agree
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // The first migration makes the table as it is now; only an older database lacks the column.
        if manager.has_column("actions", "retries_in_round").await? {
            return Ok(());
        }
        let column =
            ColumnDef::new(actions::Column::RetriesInRound).integer().not_null().default(0).to_owned();
        let add = Table::alter().table(actions::Entity).add_column(column).to_owned();
        manager.alter_table(add).await
    }
}
