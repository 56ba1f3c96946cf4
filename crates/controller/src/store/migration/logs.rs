//! Makes the table of finished logs.

use sea_orm::ExprTrait;
use sea_orm_migration::prelude::*;

use super::super::entity::storage::finished_logs;
use super::{Statements, WHOLE};

pub(super) struct FinishedLogs;

impl MigrationName for FinishedLogs {
    fn name(&self) -> &str {
        "m0004_finished_logs"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for FinishedLogs {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    #[allow(elided_lifetimes_in_paths)] // the trait's own signature elides it, and the two must agree
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        use finished_logs::Column;
        let connection = manager.get_connection();
        let mut all = Statements::new(connection.get_database_backend());
        all.table(finished_logs::Entity);
        // Finds those that are kept, oldest first, and what all of them take, without the many that are deleted.
        let mut kept = Index::create();
        kept.name("finished_logs_that_are_kept").table(finished_logs::Entity);
        kept.col(Column::MovedAt).col(Column::ActionId).col(Column::Number).col(Column::SizeBytes);
        all.add(kept.cond_where(Expr::col(Column::DeletedAt).is_null()));
        connection.execute_unprepared(&all.text).await?;
        Ok(())
    }
}
