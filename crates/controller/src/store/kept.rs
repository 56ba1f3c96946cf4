//! Reads and writes the rows of what is kept of actions: blobs, artifacts, caches, reports.
//!
//! A blob is deleted only by [`Store::release_blob`] (`due`), whose one statement finds it untouched for long and unreferred to. Who
//! refers to a blob touches it first, in the transaction that writes the reference: either that waits for the deletion and
//! finds no blob, or the deletion waits for it and finds a blob that was just touched.

use sea_orm::sea_query::{Alias, Expr, Func, OnConflict};
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, EntityTrait, ExprTrait,
    IntoActiveModel, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, TransactionTrait,
};
use sealci_core::ids::{ActionId, AttemptId, PipelineId};
use uuid::Uuid;

use super::batch::insertable;
use super::entity::storage::{
    artifacts, blob_owners, blobs, caches, loose_objects, shared_keys, test_reports,
};
use super::entity::{actions, attempts, pipelines};
use super::{Malformed, Store, StoreError, ids_of_actions, rows};

/// An attempt with what it is part of.
#[derive(Debug, Clone)]
pub struct AttemptRows {
    pub attempt: attempts::Model,
    pub action: actions::Model,
    pub pipeline: pipelines::Model,
}

/// What became of a reference to a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Referred<T> {
    To(T),
    /// Its owner has not brought it, or it has been deleted since.
    NotUploaded,
}

/// Where a list of cache entries goes on: below this use, and of the same one below this id.
pub type CacheCursor = (i64, Uuid);

/// Whether an attempt's result is its action's: what it kept counts (I2).
pub fn counts(action: &actions::Model, attempt: &attempts::Model) -> bool {
    action.state == "finished"
        && attempt.state == "finished"
        && !attempt.fenced
        && attempt.action_id == action.id
        && attempt.number == action.attempts
        // An action that was cancelled in a later round before it had an attempt ended another way than the one before.
        && attempt.outcome == action.outcome
}

impl Store {
    /// The key of this name; `fresh` becomes it where there is none yet.
    pub async fn shared_key(&self, name: &str, fresh: Vec<u8>) -> Result<Vec<u8>, StoreError> {
        let row = shared_keys::Model { name: name.to_owned(), key: fresh };
        shared_keys::Entity::insert(insertable::<_, shared_keys::ActiveModel>(row))
            .on_conflict(OnConflict::column(shared_keys::Column::Name).do_nothing().to_owned())
            .exec_without_returning(&self.writer)
            .await?;
        let row = shared_keys::Entity::find_by_id(name).one(&self.writer).await?;
        Ok(row.ok_or_else(|| Malformed::new("shared_keys", name, "the row is missing"))?.key)
    }

    /// An attempt with its action and pipeline.
    pub async fn attempt_rows(&self, id: AttemptId) -> Result<Option<AttemptRows>, StoreError> {
        let key = (id.action.as_uuid(), rows::number(id.number));
        let Some(attempt) = attempts::Entity::find_by_id(key).one(&self.readers).await? else {
            return Ok(None);
        };
        let Some(action) = self.action(id.action).await? else { return Ok(None) };
        let pipeline = self.pipeline_row(PipelineId::from_uuid(action.pipeline_id)).await?;
        Ok(pipeline.map(|pipeline| AttemptRows { attempt, action, pipeline }))
    }

    /// One blob.
    pub async fn blob(&self, digest: &str) -> Result<Option<blobs::Model>, StoreError> {
        Ok(blobs::Entity::find_by_id(digest).one(&self.readers).await?)
    }

    /// Touches a blob that this owner has brought before; none if it has not.
    pub async fn touch_owned(
        &self,
        digest: &str,
        owner: &str,
        now_ms: i64,
    ) -> Result<Option<blobs::Model>, StoreError> {
        let transaction = self.writer.begin().await?;
        let is_there = refer(&transaction, digest, owner, now_ms).await?;
        let blob = match is_there {
            true => blobs::Entity::find_by_id(digest).one(&transaction).await?,
            false => None,
        };
        transaction.commit().await?;
        Ok(blob)
    }

    /// Notes an owner of a blob that stands; false if it does not (any more).
    pub async fn add_owner(&self, digest: &str, owner: &str, now_ms: i64) -> Result<bool, StoreError> {
        let transaction = self.writer.begin().await?;
        let stands = touch(&transaction, digest, now_ms).await?;
        if stands {
            own(&transaction, digest, owner).await?;
        }
        transaction.commit().await?;
        Ok(stands)
    }

    /// Notes an object that is about to be written.
    pub async fn add_loose(&self, object: &str, now_ms: i64) -> Result<(), StoreError> {
        let row = loose_objects::Model { object: object.to_owned(), multipart: None, since: now_ms };
        let row = insertable::<_, loose_objects::ActiveModel>(row);
        loose_objects::Entity::insert(row).exec_without_returning(&self.writer).await?;
        Ok(())
    }

    /// Notes by which name the object's upload can be ended.
    pub async fn name_multipart(&self, object: &str, multipart: &str) -> Result<(), StoreError> {
        loose_objects::Entity::update_many()
            .col_expr(loose_objects::Column::Multipart, Expr::value(multipart))
            .filter(loose_objects::Column::Object.eq(object))
            .exec(&self.writer)
            .await?;
        Ok(())
    }

    /// Whether nothing stands for an object.
    pub async fn is_loose(&self, object: &str) -> Result<bool, StoreError> {
        Ok(loose_objects::Entity::find_by_id(object).one(&self.writer).await?.is_some())
    }

    /// The object is gone.
    pub async fn drop_loose(&self, object: &str) -> Result<(), StoreError> {
        loose_objects::Entity::delete_by_id(object).exec(&self.writer).await?;
        Ok(())
    }

    /// Makes a written object its digest's blob, also in the place of an object that was `lost`; false if another one is
    /// already, and this object is loose still.
    pub async fn keep_blob(
        &self,
        blob: blobs::Model,
        lost: Option<&str>,
        owner: &str,
    ) -> Result<bool, StoreError> {
        let transaction = self.writer.begin().await?;
        let (digest, object, now_ms) = (blob.digest.clone(), blob.object.clone(), blob.touched_at);
        let mut added = 0;
        if let Some(lost) = lost {
            let replaced = blobs::Entity::update_many()
                .col_expr(blobs::Column::Object, Expr::value(object.as_str()))
                .col_expr(blobs::Column::TouchedAt, Expr::value(now_ms))
                .filter(blobs::Column::Digest.eq(digest.as_str()))
                .filter(blobs::Column::Object.eq(lost))
                .exec(&transaction)
                .await?;
            added = replaced.rows_affected;
        }
        if added == 0 {
            added = blobs::Entity::insert(insertable::<_, blobs::ActiveModel>(blob))
                .on_conflict(OnConflict::column(blobs::Column::Digest).do_nothing().to_owned())
                .exec_without_returning(&transaction)
                .await?;
        }
        if added == 1 {
            loose_objects::Entity::delete_by_id(object).exec(&transaction).await?;
        } else {
            touch(&transaction, &digest, now_ms).await?;
        }
        own(&transaction, &digest, owner).await?;
        transaction.commit().await?;
        Ok(added == 1)
    }

    /// Writes an artifact, unless its attempt has one of this kind and name; the one that stands.
    pub async fn keep_artifact(
        &self,
        row: artifacts::Model,
        owner: &str,
    ) -> Result<Referred<artifacts::Model>, StoreError> {
        use artifacts::Column;
        let transaction = self.writer.begin().await?;
        if !refer(&transaction, &row.digest, owner, row.created_at).await? {
            return Ok(Referred::NotUploaded);
        }
        let one_of_each = [Column::ActionId, Column::Number, Column::Kind, Column::Name];
        artifacts::Entity::insert(insertable::<_, artifacts::ActiveModel>(row.clone()))
            .on_conflict(OnConflict::columns(one_of_each).do_nothing().to_owned())
            .exec_without_returning(&transaction)
            .await?;
        let stands = artifacts::Entity::find()
            .filter(Column::ActionId.eq(row.action_id))
            .filter(Column::Number.eq(row.number))
            .filter(Column::Kind.eq(row.kind.as_str()))
            .filter(Column::Name.eq(row.name.as_str()))
            .one(&transaction)
            .await?;
        transaction.commit().await?;
        let stands = stands.ok_or_else(|| Malformed::new("artifacts", row.id, "it is not there"))?;
        Ok(Referred::To(stands))
    }

    /// The artifacts of a pipeline's attempts, whichever of them count, with the attempts.
    pub async fn artifacts_of_pipeline(
        &self,
        id: PipelineId,
        now_ms: i64,
    ) -> Result<Vec<artifacts::Model>, StoreError> {
        use artifacts::Column;
        let query = artifacts::Entity::find()
            .filter(Column::PipelineId.eq(id.as_uuid()))
            .filter(Column::ExpiresAt.gt(now_ms))
            .order_by_asc(Column::ActionId)
            .order_by_asc(Column::Number)
            .order_by_asc(Column::Kind)
            .order_by_asc(Column::Name);
        Ok(query.all(&self.readers).await?)
    }

    /// The artifacts of one action that count, with the action.
    pub async fn artifacts_that_count(
        &self,
        action: ActionId,
        now_ms: i64,
    ) -> Result<Option<(actions::Model, Vec<artifacts::Model>)>, StoreError> {
        let Some(action) = self.action(action).await? else { return Ok(None) };
        let last = attempts::Entity::find_by_id((action.id, action.attempts)).one(&self.readers).await?;
        if last.is_none_or(|attempt| !counts(&action, &attempt)) {
            return Ok(Some((action, Vec::new())));
        }
        let found = artifacts::Entity::find()
            .filter(artifacts::Column::ActionId.eq(action.id))
            .filter(artifacts::Column::Number.eq(action.attempts))
            .filter(artifacts::Column::ExpiresAt.gt(now_ms))
            .order_by_asc(artifacts::Column::Kind)
            .order_by_asc(artifacts::Column::Name)
            .all(&self.readers)
            .await?;
        Ok(Some((action, found)))
    }

    /// One artifact with its action, if it counts.
    pub async fn artifact(
        &self,
        id: Uuid,
        now_ms: i64,
    ) -> Result<Option<(actions::Model, artifacts::Model)>, StoreError> {
        let Some(row) = artifacts::Entity::find_by_id(id).one(&self.readers).await? else { return Ok(None) };
        let found = self.artifacts_that_count(ActionId::from_uuid(row.action_id), now_ms).await?;
        Ok(found.and_then(|(action, all)| Some((action, all.into_iter().find(|row| row.id == id)?))))
    }

    /// Deletes an artifact; false if there is none.
    pub async fn delete_artifact(&self, id: Uuid) -> Result<bool, StoreError> {
        Ok(artifacts::Entity::delete_by_id(id).exec(&self.writer).await?.rows_affected > 0)
    }

    /// What the attempts of a pipeline say of their tests.
    pub async fn reports_of_pipeline(&self, id: PipelineId) -> Result<Vec<test_reports::Model>, StoreError> {
        let query = test_reports::Entity::find()
            .filter(test_reports::Column::ActionId.in_subquery(ids_of_actions(id)));
        Ok(query.all(&self.readers).await?)
    }

    /// Writes an attempt's report over the one before.
    pub async fn keep_report(&self, row: test_reports::Model) -> Result<(), StoreError> {
        use test_reports::Column;
        let replace =
            OnConflict::columns([Column::ActionId, Column::Number]).update_column(Column::Report).to_owned();
        test_reports::Entity::insert(insertable::<_, test_reports::ActiveModel>(row))
            .on_conflict(replace)
            .exec_without_returning(&self.writer)
            .await?;
        Ok(())
    }

    /// The entry with exactly this key.
    pub async fn cache_with_identity(&self, identity: &str) -> Result<Option<caches::Model>, StoreError> {
        let query = caches::Entity::find().filter(caches::Column::Identity.eq(identity));
        Ok(query.one(&self.readers).await?)
    }

    /// The newest entry whose key begins with a prefix.
    pub async fn cache_with_prefix(
        &self,
        repository: &str,
        scope: &str,
        prefix: &str,
    ) -> Result<Option<caches::Model>, StoreError> {
        use caches::Column;
        // LIKE would need escapes, and ignores case in one of the databases.
        let length = i32::try_from(prefix.chars().count()).unwrap_or(i32::MAX);
        let beginning = Func::cust(Alias::new("substr")).args([
            Expr::col((caches::Entity, Column::Key)),
            Expr::value(1_i32),
            Expr::value(length),
        ]);
        let query = caches::Entity::find()
            .filter(Column::Repository.eq(repository))
            .filter(Column::Scope.eq(scope))
            .filter(Expr::expr(beginning).eq(prefix))
            .order_by_desc(Column::CreatedAt)
            .order_by_desc(Column::Id)
            .limit(1);
        Ok(query.one(&self.readers).await?)
    }

    /// Notes that an entry was used, and so its blob.
    pub async fn cache_used(&self, row: &caches::Model, now_ms: i64) -> Result<(), StoreError> {
        let transaction = self.writer.begin().await?;
        touch(&transaction, &row.digest, now_ms).await?;
        caches::Entity::update_many()
            .col_expr(caches::Column::LastUsedAt, Expr::value(now_ms))
            .filter(caches::Column::Id.eq(row.id))
            .exec(&transaction)
            .await?;
        Ok(transaction.commit().await?)
    }

    /// Writes an entry unless one stands under its key; whether it is this one that is kept.
    pub async fn keep_cache(&self, row: caches::Model, owner: &str) -> Result<Referred<bool>, StoreError> {
        let transaction = self.writer.begin().await?;
        if !refer(&transaction, &row.digest, owner, row.created_at).await? {
            return Ok(Referred::NotUploaded);
        }
        let id = row.id;
        let identity = row.identity.clone();
        caches::Entity::insert(insertable::<_, caches::ActiveModel>(row))
            .on_conflict(OnConflict::column(caches::Column::Identity).do_nothing().to_owned())
            .exec_without_returning(&transaction)
            .await?;
        let stands =
            caches::Entity::find().filter(caches::Column::Identity.eq(identity)).one(&transaction).await?;
        transaction.commit().await?;
        Ok(Referred::To(stands.is_some_and(|row| row.id == id)))
    }

    /// Whether one of these scopes of a repository has an entry with this digest.
    pub async fn cache_has_digest(
        &self,
        repository: &str,
        scopes: &[String],
        digest: &str,
    ) -> Result<bool, StoreError> {
        let query = caches::Entity::find()
            .filter(caches::Column::Digest.eq(digest))
            .filter(caches::Column::Repository.eq(repository))
            .filter(caches::Column::Scope.is_in(scopes.iter().map(String::as_str)));
        Ok(query.count(&self.readers).await? > 0)
    }

    /// One page of cache entries, last used first.
    pub async fn list_caches(
        &self,
        repository: Option<&str>,
        below: Option<CacheCursor>,
        limit: u64,
    ) -> Result<Vec<caches::Model>, StoreError> {
        use caches::Column;
        let mut query = caches::Entity::find();
        if let Some(repository) = repository {
            query = query.filter(Column::Repository.eq(repository));
        }
        if let Some((used, id)) = below {
            let same = Condition::all().add(Column::LastUsedAt.eq(used)).add(Column::Id.lt(id));
            query = query.filter(Condition::any().add(Column::LastUsedAt.lt(used)).add(same));
        }
        let query = query.order_by_desc(Column::LastUsedAt).order_by_desc(Column::Id).limit(limit);
        Ok(query.all(&self.readers).await?)
    }

    /// Deletes an entry; false if there is none.
    pub async fn delete_cache(&self, id: Uuid) -> Result<bool, StoreError> {
        Ok(caches::Entity::delete_by_id(id).exec(&self.writer).await?.rows_affected > 0)
    }

    /// Deletes all entries with this digest; how many.
    pub async fn delete_caches_of(&self, digest: &str) -> Result<u64, StoreError> {
        let deleting = caches::Entity::delete_many().filter(caches::Column::Digest.eq(digest));
        Ok(deleting.exec(&self.writer).await?.rows_affected)
    }
}

/// Touches a blob; false if there is none.
async fn touch(transaction: &DatabaseTransaction, digest: &str, now_ms: i64) -> Result<bool, StoreError> {
    let touched = blobs::Entity::update_many()
        .col_expr(blobs::Column::TouchedAt, Expr::value(now_ms))
        .filter(blobs::Column::Digest.eq(digest))
        .exec(transaction)
        .await?;
    Ok(touched.rows_affected > 0)
}

/// Touches a blob that is about to be referred to; false if there is none, or the owner has not brought it.
async fn refer(
    transaction: &DatabaseTransaction,
    digest: &str,
    owner: &str,
    now_ms: i64,
) -> Result<bool, StoreError> {
    let key = (digest.to_owned(), owner.to_owned());
    let is_owner = blob_owners::Entity::find_by_id(key).one(transaction).await?.is_some();
    Ok(is_owner && touch(transaction, digest, now_ms).await?)
}

async fn own(transaction: &impl ConnectionTrait, digest: &str, owner: &str) -> Result<(), StoreError> {
    use blob_owners::Column;
    let row = blob_owners::Model { digest: digest.to_owned(), owner: owner.to_owned() };
    blob_owners::Entity::insert(row.into_active_model().reset_all())
        .on_conflict(OnConflict::columns([Column::Digest, Column::Owner]).do_nothing().to_owned())
        .exec_without_returning(transaction)
        .await?;
    Ok(())
}
