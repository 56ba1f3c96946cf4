//! Brings a database to the tables of this version, one step after the other. Steps are never changed once released.

use sea_orm_migration::prelude::*;
use sea_orm_migration::schema::{
    big_integer, big_integer_null, boolean, json_binary, json_binary_null, text, text_null, uuid_uniq,
};

/// All steps, oldest first.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![Box::new(First)]
    }

    /// The monitor's own, so that it can share a PostgreSQL database with other services.
    fn migration_table_name() -> DynIden {
        "monitor_migrations".into_iden()
    }
}

/// A migration is made whole or not at all, on SQLite too, where the library does not do so by itself.
const WHOLE: Option<bool> = Some(true);

struct First;

impl MigrationName for First {
    fn name(&self) -> &str {
        "0001_first"
    }
}

// The trait leaves the lifetime out, and only an implementation that does so too fits it.
#[allow(elided_lifetimes_in_paths)]
#[async_trait::async_trait]
impl MigrationTrait for First {
    fn use_transaction(&self) -> Option<bool> {
        WHOLE
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let number = |name: &'static str| {
            ColumnDef::new(name).big_integer().not_null().auto_increment().primary_key().to_owned()
        };
        let manifests = Table::create()
            .table("monitor_manifests")
            .col(ColumnDef::new("digest").text().not_null().primary_key())
            .col(text("body"))
            .to_owned();
        let configurations = Table::create()
            .table("monitor_configurations")
            .col(number("number"))
            .col(uuid_uniq("id"))
            .col(text("repository_url"))
            .col(text_null("credentials"))
            .col(json_binary("events"))
            .col(json_binary("branches"))
            .col(json_binary("tags"))
            .col(text("manifest_path"))
            .col(text_null("manifest_digest"))
            .col(big_integer_null("poll_interval_ms"))
            .col(boolean("enabled"))
            .col(boolean("build_existing"))
            .col(boolean("has_baseline"))
            .col(text("created_at"))
            .col(json_binary_null("last_delivery"))
            .foreign_key(
                ForeignKey::create()
                    .from("monitor_configurations", "manifest_digest")
                    .to("monitor_manifests", "digest"),
            )
            .to_owned();
        let of_configuration = |table: &'static str| {
            ForeignKey::create()
                .from(table, "configuration")
                .to("monitor_configurations", "number")
                .on_delete(ForeignKeyAction::Cascade)
                .to_owned()
        };
        let cursors = Table::create()
            .table("monitor_cursors")
            .col(big_integer("configuration"))
            .col(text("ref_name"))
            .col(text("revision"))
            .primary_key(Index::create().col("configuration").col("ref_name"))
            .foreign_key(&mut of_configuration("monitor_cursors"))
            .to_owned();
        let outbox = Table::create()
            .table("monitor_outbox")
            .col(number("sequence"))
            .col(big_integer("configuration"))
            .col(text("repository_url"))
            .col(text("kind"))
            .col(text("ref_name"))
            .col(text("revision"))
            .col(text("manifest_path"))
            .col(text_null("manifest_digest"))
            .foreign_key(&mut of_configuration("monitor_outbox"))
            .foreign_key(
                ForeignKey::create()
                    .from("monitor_outbox", "manifest_digest")
                    .to("monitor_manifests", "digest"),
            )
            .to_owned();
        for table in [manifests, configurations, cursors, outbox] {
            manager.create_table(table).await?;
        }
        let order = Index::create()
            .name("monitor_outbox_order")
            .table("monitor_outbox")
            .col("configuration")
            .col("sequence")
            .to_owned();
        manager.create_index(order).await
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
