//! Finds and deletes what of artifacts, caches and blobs has had its time.
//!
//! What a dry run counts is found by the same conditions as what is deleted.

use sea_orm::sea_query::{Query, SelectStatement};
use sea_orm::{
    ColumnTrait, Condition, EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
    TransactionTrait,
};

use super::batch::insertable;
use super::entity::storage::{artifacts, blob_owners, blobs, caches, loose_objects};
use super::{CacheCursor, Store, StoreError};

/// What has had its time.
#[derive(Debug, Clone, Copy)]
pub struct Due {
    /// Artifacts that expire until then.
    pub artifacts_until_ms: i64,
    /// Entries of caches that were used before then for the last time.
    pub caches_before_ms: i64,
    /// The last used entry of those that do not fit into the budget; it goes, and all behind it.
    pub caches_from: Option<CacheCursor>,
    /// Blobs that nothing refers to and objects that nothing stands for, since before then.
    pub loose_before_ms: i64,
}

impl Due {
    fn artifacts(&self) -> Condition {
        Condition::all().add(artifacts::Column::ExpiresAt.lte(self.artifacts_until_ms))
    }

    fn caches(&self) -> Condition {
        use caches::Column;
        let mut due = Condition::any().add(Column::LastUsedAt.lt(self.caches_before_ms));
        if let Some((used, id)) = self.caches_from {
            let same = Condition::all().add(Column::LastUsedAt.eq(used)).add(Column::Id.lte(id));
            due = due.add(Column::LastUsedAt.lt(used)).add(same);
        }
        due
    }

    /// Untouched blobs that nothing refers to but what goes as well.
    fn blobs(&self) -> Condition {
        let of_artifacts = Query::select()
            .column(artifacts::Column::Digest)
            .from(artifacts::Entity)
            .cond_where(self.artifacts().not())
            .to_owned();
        let of_caches = Query::select()
            .column(caches::Column::Digest)
            .from(caches::Entity)
            .cond_where(self.caches().not())
            .to_owned();
        Condition::all()
            .add(blobs::Column::TouchedAt.lt(self.loose_before_ms))
            .add(blobs::Column::Digest.not_in_subquery(of_artifacts))
            .add(blobs::Column::Digest.not_in_subquery(of_caches))
    }
}

impl Store {
    /// Deletes artifacts and entries of caches; how many of each.
    pub async fn delete_due(&self, due: &Due) -> Result<(u64, u64), StoreError> {
        let artifacts = artifacts::Entity::delete_many().filter(due.artifacts()).exec(&self.writer).await?;
        let caches = caches::Entity::delete_many().filter(due.caches()).exec(&self.writer).await?;
        Ok((artifacts.rows_affected, caches.rows_affected))
    }

    /// How many artifacts and entries of caches [`Store::delete_due`] would delete.
    pub async fn count_due(&self, due: &Due) -> Result<(u64, u64), StoreError> {
        let artifacts = artifacts::Entity::find().filter(due.artifacts()).count(&self.readers).await?;
        let caches = caches::Entity::find().filter(due.caches()).count(&self.readers).await?;
        Ok((artifacts, caches))
    }

    /// One page of the blobs that go, behind the digest `after`.
    pub async fn due_blobs(
        &self,
        due: &Due,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Vec<blobs::Model>, StoreError> {
        let mut query = blobs::Entity::find().filter(due.blobs());
        if let Some(after) = after {
            query = query.filter(blobs::Column::Digest.gt(after));
        }
        Ok(query.order_by_asc(blobs::Column::Digest).limit(limit).all(&self.readers).await?)
    }

    /// Forgets a blob, if nothing refers to it and it is untouched since `before_ms`; its object is loose then.
    pub async fn release_blob(&self, blob: &blobs::Model, before_ms: i64) -> Result<bool, StoreError> {
        let digest = blob.digest.as_str();
        let transaction = self.writer.begin().await?;
        let of_artifacts = digests::<artifacts::Entity>(artifacts::Column::Digest)
            .and_where(artifacts::Column::Digest.eq(digest))
            .to_owned();
        let of_caches = digests::<caches::Entity>(caches::Column::Digest)
            .and_where(caches::Column::Digest.eq(digest))
            .to_owned();
        let deleted = blobs::Entity::delete_many()
            .filter(blobs::Column::Digest.eq(digest))
            .filter(blobs::Column::Object.eq(blob.object.as_str()))
            .filter(blobs::Column::TouchedAt.lt(before_ms))
            .filter(blobs::Column::Digest.not_in_subquery(of_artifacts))
            .filter(blobs::Column::Digest.not_in_subquery(of_caches))
            .exec(&transaction)
            .await?;
        if deleted.rows_affected == 0 {
            return Ok(false);
        }
        blob_owners::Entity::delete_many()
            .filter(blob_owners::Column::Digest.eq(digest))
            .exec(&transaction)
            .await?;
        // No upload is under way under this name: it can be deleted at once.
        let loose = loose_objects::Model { object: blob.object.clone(), multipart: None, since: 0 };
        let loose = insertable::<_, loose_objects::ActiveModel>(loose);
        loose_objects::Entity::insert(loose).exec_without_returning(&transaction).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// One page of the objects that nothing stands for since before then, behind the name `after`.
    pub async fn due_objects(
        &self,
        due: &Due,
        after: Option<&str>,
        limit: u64,
    ) -> Result<Vec<loose_objects::Model>, StoreError> {
        let mut query =
            loose_objects::Entity::find().filter(loose_objects::Column::Since.lt(due.loose_before_ms));
        if let Some(after) = after {
            query = query.filter(loose_objects::Column::Object.gt(after));
        }
        Ok(query.order_by_asc(loose_objects::Column::Object).limit(limit).all(&self.readers).await?)
    }
}

fn digests<E: EntityTrait>(column: impl ColumnTrait) -> SelectStatement {
    Query::select().column(column).from(E::default()).to_owned()
}
