//! Makes the table of leases, and finds what a replica owns.

use sea_orm::ExprTrait;
use sea_orm_migration::prelude::*;

use super::super::entity::{leases, pipelines};
use super::{Statements, WHOLE};

pub(super) struct Leases;

impl MigrationName for Leases {
    fn name(&self) -> &str {
        "m0005_leases"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Leases {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    #[allow(elided_lifetimes_in_paths)] // the trait's own signature elides it, and the two must agree
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let mut all = Statements::new(connection.get_database_backend());
        all.table(leases::Entity);
        // The unfinished are few among all that ever were.
        all.add(
            Index::create()
                .name("pipelines_by_owner")
                .table(pipelines::Entity)
                .col(pipelines::Column::Owner)
                .cond_where(Expr::col(pipelines::Column::State).ne("finished")),
        );
        connection.execute_unprepared(&all.text).await?;
        Ok(())
    }
}
