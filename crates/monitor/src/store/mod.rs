//! Keeps configurations, cursors and the outbox in the monitor's own database.
//!
//! Every function is one transaction, or one statement.

mod entity;
mod migration;

use std::time::Duration;

use sea_orm::sea_query::{Expr, OnConflict, Query};
use sea_orm::{
    ActiveModelTrait, ActiveValue, ColumnTrait, Condition, ConnectionTrait, DatabaseTransaction, DbErr,
    EntityTrait, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect, Set, TransactionTrait,
};
use sea_orm_migration::MigratorTrait;
use sealci_core::event::{Event, EventKind};
use sealci_core::ids::ConfigurationId;
use sealci_service::database::{Database, DatabaseUrl};
use sha2::{Digest, Sha256};

use self::entity::{configuration, cursor, manifest, outbox};
use crate::ServeError;
use crate::changes::{Changes, Cursors};
use crate::configuration::Settings;
use crate::sink::{OutboundEvent, WhichManifest};
use crate::status::LastDelivery;

/// Rows that one statement inserts: databases bound how many values it may carry.
const ROWS_PER_INSERT: usize = 1000;

/// The database, open and up to date. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Store {
    database: Database,
}

/// A configuration as it is kept.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its place in the order of creation, and its key.
    pub number: i64,
    pub id: ConfigurationId,
    pub settings: Settings,
    pub manifest_digest: Option<String>,
    pub created_at: String,
    pub last_delivery: Option<LastDelivery>,
}

/// The oldest event not yet delivered.
#[derive(Debug, Clone)]
pub struct Pending {
    pub sequence: i64,
    pub event: OutboundEvent,
}

/// Why the database did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the database failed")]
    Database(#[from] DbErr),
    #[error("the database holds something this version cannot read: {what}")]
    Unreadable { what: String },
    #[error("the configuration was changed or deleted meanwhile")]
    Superseded,
}

impl Store {
    pub async fn open(url: &DatabaseUrl) -> Result<Self, ServeError> {
        let database = Database::open(url).await?;
        migration::Migrator::up(&database.writer, None).await.map_err(ServeError::Migrate)?;
        Ok(Self { database })
    }

    pub async fn close(self) -> Result<(), DbErr> {
        self.database.close().await
    }

    /// Asks the database anything at all.
    pub async fn ping(&self) -> Result<(), DbErr> {
        self.database.readers.ping().await
    }

    pub async fn add(
        &self,
        id: ConfigurationId,
        settings: &Settings,
        manifest: Option<&str>,
        created_at: String,
    ) -> Result<Stored, StoreError> {
        let transaction = self.database.writer.begin().await?;
        let manifest_digest = keep_manifest(&transaction, manifest).await?;
        let mut row = configuration::ActiveModel {
            id: Set(id.as_uuid()),
            manifest_digest: Set(manifest_digest),
            has_baseline: Set(false),
            created_at: Set(created_at),
            ..Default::default()
        };
        write_settings(&mut row, settings);
        let row = row.insert(&transaction).await?;
        transaction.commit().await?;
        read_row(row)
    }

    pub async fn find(&self, id: ConfigurationId) -> Result<Option<Stored>, StoreError> {
        let row = by_id(id).one(&self.database.readers).await?;
        row.map(read_row).transpose()
    }

    /// Configurations before the number, newest first.
    pub async fn page(&self, limit: u64, before: Option<i64>) -> Result<Vec<Stored>, StoreError> {
        let mut query =
            configuration::Entity::find().order_by_desc(configuration::Column::Number).limit(limit);
        if let Some(before) = before {
            query = query.filter(configuration::Column::Number.lt(before));
        }
        query.all(&self.database.readers).await?.into_iter().map(read_row).collect()
    }

    pub async fn all(&self) -> Result<Vec<Stored>, StoreError> {
        let rows = configuration::Entity::find().all(&self.database.readers).await?;
        rows.into_iter().map(read_row).collect()
    }

    /// Replaces the settings, and the uploaded manifest if there is a new one. Another repository loses its cursors.
    pub async fn update(
        &self,
        id: ConfigurationId,
        settings: &Settings,
        manifest: Option<&str>,
    ) -> Result<Option<Stored>, StoreError> {
        let transaction = self.database.writer.begin().await?;
        let Some(row) = by_id(id).lock_exclusive().one(&transaction).await? else { return Ok(None) };
        let (number, moved) = (row.number, row.repository_url != settings.repository_url);
        let mut row = configuration::ActiveModel::from(row);
        write_settings(&mut row, settings);
        if let Some(manifest) = manifest {
            row.manifest_digest = Set(keep_manifest(&transaction, Some(manifest)).await?);
        }
        if moved {
            row.has_baseline = Set(false);
            let stale = cursor::Entity::delete_many().filter(cursor::Column::Configuration.eq(number));
            stale.exec(&transaction).await?;
        }
        let row = row.update(&transaction).await?;
        drop_unused_manifests(&transaction).await?;
        transaction.commit().await?;
        read_row(row).map(Some)
    }

    /// Sets or takes away the uploaded manifest.
    pub async fn set_manifest(
        &self,
        id: ConfigurationId,
        manifest: Option<&str>,
    ) -> Result<Option<Stored>, StoreError> {
        let transaction = self.database.writer.begin().await?;
        let Some(row) = by_id(id).lock_exclusive().one(&transaction).await? else { return Ok(None) };
        let mut row = configuration::ActiveModel::from(row);
        row.manifest_digest = Set(keep_manifest(&transaction, manifest).await?);
        let row = row.update(&transaction).await?;
        drop_unused_manifests(&transaction).await?;
        transaction.commit().await?;
        read_row(row).map(Some)
    }

    pub async fn manifest(&self, digest: &str) -> Result<Option<String>, StoreError> {
        let found = manifest::Entity::find_by_id(digest).one(&self.database.readers).await?;
        Ok(found.map(|manifest| manifest.body))
    }

    /// Deletes the configuration with its cursors and undelivered events; tells whether it was there.
    pub async fn delete(&self, id: ConfigurationId) -> Result<bool, StoreError> {
        let transaction = self.database.writer.begin().await?;
        let delete = configuration::Entity::delete_many().filter(configuration::Column::Id.eq(id.as_uuid()));
        let deleted = delete.exec(&transaction).await?.rows_affected;
        drop_unused_manifests(&transaction).await?;
        transaction.commit().await?;
        Ok(deleted > 0)
    }

    /// Where each ref was last seen; `None` when the repository was never looked at.
    pub async fn cursors(&self, number: i64) -> Result<Option<Cursors>, StoreError> {
        // From the writer: what it has committed is what counts.
        let transaction = self.database.writer.begin().await?;
        let row = configuration::Entity::find_by_id(number).one(&transaction).await?;
        if !row.ok_or(StoreError::Superseded)?.has_baseline {
            return Ok(None);
        }
        let rows =
            cursor::Entity::find().filter(cursor::Column::Configuration.eq(number)).all(&transaction).await?;
        transaction.commit().await?;
        let read = |row: cursor::Model| Some((row.ref_name.parse().ok()?, row.revision.parse().ok()?));
        // A row that cannot be read is as good as none: the ref counts as new.
        Ok(Some(rows.into_iter().filter_map(read).collect()))
    }

    /// Moves the cursors and puts the events into the outbox, all or nothing. `looked_at` is the URL that was polled: if
    /// it is not the configuration's any more, nothing is recorded.
    pub async fn record(&self, number: i64, looked_at: &str, changes: &Changes) -> Result<(), StoreError> {
        let transaction = self.database.writer.begin().await?;
        let row = configuration::Entity::find_by_id(number).lock_exclusive().one(&transaction).await?;
        let row = row.filter(|row| row.repository_url == looked_at).ok_or(StoreError::Superseded)?;
        for names in changes.gone.chunks(ROWS_PER_INSERT) {
            let gone = Condition::all()
                .add(cursor::Column::Configuration.eq(number))
                .add(cursor::Column::RefName.is_in(names.iter().map(|name| name.as_str())));
            cursor::Entity::delete_many().filter(gone).exec(&transaction).await?;
        }
        for moved in changes.moved.chunks(ROWS_PER_INSERT) {
            let rows = moved.iter().map(|found| cursor::ActiveModel {
                configuration: Set(number),
                ref_name: Set(found.name.to_string()),
                revision: Set(found.revision.to_string()),
            });
            let replace = OnConflict::columns([cursor::Column::Configuration, cursor::Column::RefName])
                .update_column(cursor::Column::Revision)
                .to_owned();
            cursor::Entity::insert_many(rows)
                .on_conflict(replace)
                .exec_without_returning(&transaction)
                .await?;
        }
        for events in changes.events.chunks(ROWS_PER_INSERT) {
            let rows = events.iter().map(|event| outbox_row(&row, event));
            outbox::Entity::insert_many(rows).exec_without_returning(&transaction).await?;
        }
        if !row.has_baseline {
            let mut row = configuration::ActiveModel::from(row);
            row.has_baseline = Set(true);
            row.update(&transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    pub async fn undelivered(&self, number: i64) -> Result<u64, StoreError> {
        let query = outbox::Entity::find().filter(outbox::Column::Configuration.eq(number));
        Ok(query.count(&self.database.readers).await?)
    }

    /// The configuration's oldest event that is not delivered.
    pub async fn next_pending(&self, number: i64) -> Result<Option<Pending>, StoreError> {
        let query = outbox::Entity::find().filter(outbox::Column::Configuration.eq(number));
        let query = query.order_by_asc(outbox::Column::Sequence);
        let Some(row) = query.one(&self.database.readers).await? else { return Ok(None) };
        let unreadable =
            |what: &str| StoreError::Unreadable { what: format!("{what} of event {}", row.sequence) };
        let manifest = match &row.manifest_digest {
            None => WhichManifest::InRepository(row.manifest_path),
            Some(digest) => {
                WhichManifest::Given(self.manifest(digest).await?.ok_or_else(|| unreadable("the manifest"))?)
            }
        };
        let event = Event {
            kind: EventKind::parse(&row.kind).ok_or_else(|| unreadable("the kind"))?,
            r#ref: Some(row.ref_name.parse().map_err(|_| unreadable("the ref"))?),
            revision: row.revision.parse().map_err(|_| unreadable("the revision"))?,
        };
        let event = OutboundEvent { repository_url: row.repository_url, event, manifest };
        Ok(Some(Pending { sequence: row.sequence, event }))
    }

    /// Takes an event out of the outbox and notes what became of it.
    pub async fn settle(
        &self,
        number: i64,
        sequence: i64,
        delivery: &LastDelivery,
    ) -> Result<(), StoreError> {
        let delivery = serde_json::to_value(delivery)
            .map_err(|error| StoreError::Unreadable { what: format!("a delivery: {error}") })?;
        let transaction = self.database.writer.begin().await?;
        outbox::Entity::delete_by_id(sequence).exec(&transaction).await?;
        configuration::Entity::update_many()
            .col_expr(configuration::Column::LastDelivery, Expr::value(delivery))
            .filter(configuration::Column::Number.eq(number))
            .exec(&transaction)
            .await?;
        drop_unused_manifests(&transaction).await?;
        transaction.commit().await?;
        Ok(())
    }
}

fn by_id(id: ConfigurationId) -> sea_orm::Select<configuration::Entity> {
    configuration::Entity::find().filter(configuration::Column::Id.eq(id.as_uuid()))
}

fn outbox_row(row: &configuration::Model, event: &Event) -> outbox::ActiveModel {
    outbox::ActiveModel {
        sequence: ActiveValue::NotSet,
        configuration: Set(row.number),
        repository_url: Set(row.repository_url.clone()),
        kind: Set(event.kind.as_str().to_owned()),
        ref_name: Set(event.r#ref.as_ref().map(ToString::to_string).unwrap_or_default()),
        revision: Set(event.revision.to_string()),
        manifest_path: Set(row.manifest_path.clone()),
        manifest_digest: Set(row.manifest_digest.clone()),
    }
}

/// Stores an uploaded manifest, once however often it is uploaded.
async fn keep_manifest(
    transaction: &DatabaseTransaction,
    manifest: Option<&str>,
) -> Result<Option<String>, StoreError> {
    let Some(body) = manifest else { return Ok(None) };
    let digest: String = Sha256::digest(body).iter().map(|byte| format!("{byte:02x}")).collect();
    if manifest::Entity::find_by_id(&digest).one(transaction).await?.is_none() {
        let row = manifest::ActiveModel { digest: Set(digest.clone()), body: Set(body.to_owned()) };
        manifest::Entity::insert(row).exec_without_returning(transaction).await?;
    }
    Ok(Some(digest))
}

/// Deletes manifests that neither a configuration nor an undelivered event refers to.
async fn drop_unused_manifests(transaction: &impl ConnectionTrait) -> Result<(), StoreError> {
    let used_by =
        |column: sea_orm::sea_query::SelectStatement| manifest::Column::Digest.not_in_subquery(column);
    let configured = Query::select()
        .column(configuration::Column::ManifestDigest)
        .from(configuration::Entity)
        .and_where(configuration::Column::ManifestDigest.is_not_null())
        .to_owned();
    let pending = Query::select()
        .column(outbox::Column::ManifestDigest)
        .from(outbox::Entity)
        .and_where(outbox::Column::ManifestDigest.is_not_null())
        .to_owned();
    let unused = Condition::all().add(used_by(configured)).add(used_by(pending));
    manifest::Entity::delete_many().filter(unused).exec(transaction).await?;
    Ok(())
}

fn write_settings(row: &mut configuration::ActiveModel, settings: &Settings) {
    row.repository_url = Set(settings.repository_url.clone());
    row.credentials = Set(settings.credentials.clone());
    row.events = Set(serde_json::json!(settings.events));
    row.branches = Set(serde_json::json!(settings.branches));
    row.tags = Set(serde_json::json!(settings.tags));
    row.manifest_path = Set(settings.manifest_path.clone());
    row.poll_interval_ms =
        Set(settings.poll_interval.map(|interval| i64::try_from(interval.as_millis()).unwrap_or(i64::MAX)));
    row.enabled = Set(settings.enabled);
    row.build_existing = Set(settings.build_existing);
}

fn read_row(row: configuration::Model) -> Result<Stored, StoreError> {
    fn json<T: serde::de::DeserializeOwned>(
        what: &str,
        id: uuid::Uuid,
        value: serde_json::Value,
    ) -> Result<T, StoreError> {
        serde_json::from_value(value).map_err(|error| StoreError::Unreadable {
            what: format!("{what} of configuration {id}: {error}"),
        })
    }
    let id = row.id;
    let settings = Settings {
        repository_url: row.repository_url,
        credentials: row.credentials,
        events: json("the events", id, row.events)?,
        branches: json("the branches", id, row.branches)?,
        tags: json("the tags", id, row.tags)?,
        manifest_path: row.manifest_path,
        poll_interval: row.poll_interval_ms.map(|interval| Duration::from_millis(interval.unsigned_abs())),
        enabled: row.enabled,
        build_existing: row.build_existing,
    };
    Ok(Stored {
        number: row.number,
        id: ConfigurationId::from_uuid(id),
        settings,
        manifest_digest: row.manifest_digest,
        created_at: row.created_at,
        last_delivery: row.last_delivery.map(|value| json("the last delivery", id, value)).transpose()?,
    })
}
