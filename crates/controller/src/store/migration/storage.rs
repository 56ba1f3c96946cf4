//! Makes the tables of what is kept of actions.

use sea_orm::Iden;
use sea_orm_migration::prelude::*;

use super::super::entity::storage::{
    artifacts, blob_owners, blobs, caches, loose_objects, shared_keys, test_reports,
};
use super::{WHOLE, create_table};

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
        create_table(manager, shared_keys::Entity).await?;
        create_table(manager, loose_objects::Entity).await?;
        create_table(manager, blobs::Entity).await?;
        create_table(manager, blob_owners::Entity).await?;
        create_table(manager, artifacts::Entity).await?;
        create_table(manager, caches::Entity).await?;
        create_table(manager, test_reports::Entity).await?;

        use artifacts::Column as A;
        let one_of_each = Index::create()
            .name("artifacts_of_attempt")
            .table(artifacts::Entity)
            .unique()
            .col(A::ActionId)
            .col(A::Number)
            .col(A::Kind)
            .col(A::Name)
            .to_owned();
        manager.create_index(one_of_each).await?;
        index(manager, "artifacts_of_pipeline", artifacts::Entity, A::PipelineId).await?;
        index(manager, "artifacts_by_digest", artifacts::Entity, A::Digest).await?;
        index(manager, "artifacts_by_expiry", artifacts::Entity, A::ExpiresAt).await?;
        use caches::Column as C;
        index(manager, "caches_of_repository", caches::Entity, C::Repository).await?;
        index(manager, "caches_by_digest", caches::Entity, C::Digest).await?;
        index(manager, "caches_by_use", caches::Entity, C::LastUsedAt).await?;
        index(manager, "blobs_by_touch", blobs::Entity, blobs::Column::TouchedAt).await
    }
}

async fn index<T: Iden + 'static, C: Iden + 'static>(
    manager: &SchemaManager<'_>,
    name: &str,
    table: T,
    column: C,
) -> Result<(), DbErr> {
    manager.create_index(Index::create().name(name).table(table).col(column).to_owned()).await
}
