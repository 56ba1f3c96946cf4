//! Looks into a controller's database, and opens further replicas of its storage.

use std::time::Duration;

use sea_orm::ConnectionTrait as _;
use sealci_controller::storage::{Storage, StorageConfig};
use sealci_controller::store::Store;
use sealci_service::database::DatabaseUrl;

use super::World;

/// A look into the database of a world.
pub struct Inside(sea_orm::DatabaseConnection);

impl Inside {
    pub async fn of(world: &World) -> Self {
        let url = match &world.config.database {
            DatabaseUrl::Sqlite(path) | DatabaseUrl::Scratch(path) => format!("sqlite:{}", path.display()),
            DatabaseUrl::Postgres(url) => url.clone(),
        };
        Self(sea_orm::Database::connect(url).await.unwrap())
    }

    pub async fn count(&self, what: &str) -> i64 {
        let question = format!("SELECT count(*) FROM {what}");
        let statement = sea_orm::Statement::from_string(self.0.get_database_backend(), question);
        self.0.query_one_raw(statement).await.unwrap().unwrap().try_get_by_index(0).unwrap()
    }

    pub async fn execute(&self, statement: &str) {
        self.0.execute_unprepared(statement).await.unwrap();
    }

    pub async fn objects(&self) -> Vec<String> {
        let question = "SELECT object FROM finished_logs WHERE deleted_at IS NULL ORDER BY moved_at";
        let statement = sea_orm::Statement::from_string(self.0.get_database_backend(), question);
        let rows = self.0.query_all_raw(statement).await.unwrap();
        rows.iter().map(|row| row.try_get_by_index(0).unwrap()).collect()
    }

    /// Waits until so many logs have moved, and nothing of any log but gaps is in the database.
    pub async fn moved(&self, logs: i64) {
        let moving = async {
            while self.count("finished_logs").await < logs
                || self.count("log_chunks WHERE data IS NOT NULL").await > 0
                || self.count("loose_objects").await > 0
            {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), moving).await.expect("they do not move");
        assert_eq!(self.count("finished_logs").await, logs);
    }

    /// Another replica's storage.
    pub async fn replica(&self, config: &StorageConfig, change: impl FnOnce(&mut StorageConfig)) -> Storage {
        let store = Store::open(self.0.clone(), self.0.clone()).await.unwrap();
        let mut config = config.clone();
        change(&mut config);
        Storage::open(store, config).await.unwrap()
    }
}
