//! Makes the tables of what is kept of actions.

use sea_orm::Iden;
use sea_orm_migration::prelude::*;

use super::super::entity::storage::{
    artifacts, blob_owners, blobs, caches, loose_objects, shared_keys, test_reports,
};
use super::{Statements, WHOLE};

pub(super) struct Storage;

impl MigrationName for Storage {
    fn name(&self) -> &str {
        "m0003_storage"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Storage {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    #[allow(elided_lifetimes_in_paths)] // the trait's own signature elides it, and the two must agree
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        let mut all = Statements::new(connection.get_database_backend());
        all.table(shared_keys::Entity);
        all.table(loose_objects::Entity);
        all.table(blobs::Entity);
        all.table(blob_owners::Entity);
        all.table(artifacts::Entity);
        all.table(caches::Entity);
        all.table(test_reports::Entity);

        use artifacts::Column as A;
        let mut one_of_each = index("artifacts_of_attempt", artifacts::Entity, A::ActionId);
        all.add(one_of_each.col(A::Number).col(A::Kind).col(A::Name).unique());
        all.add(&index("artifacts_of_pipeline", artifacts::Entity, A::PipelineId));
        all.add(&index("artifacts_by_digest", artifacts::Entity, A::Digest));
        all.add(&index("artifacts_by_expiry", artifacts::Entity, A::ExpiresAt));
        use caches::Column as C;
        all.add(&index("caches_of_repository", caches::Entity, C::Repository));
        all.add(&index("caches_by_digest", caches::Entity, C::Digest));
        all.add(&index("caches_by_use", caches::Entity, C::LastUsedAt));
        all.add(&index("blobs_by_touch", blobs::Entity, blobs::Column::TouchedAt));
        connection.execute_unprepared(&all.text).await?;
        Ok(())
    }
}

fn index<T: Iden + 'static, C: Iden + 'static>(name: &str, table: T, column: C) -> IndexCreateStatement {
    Index::create().name(name).table(table).col(column).to_owned()
}
