//! Measures what one durable commit of one row costs in an embedded database, opened as the services open it.
//!
//! `cargo bench -p sealci-service --bench commits -- FOLDER` prints one JSON object. `cargo xtask bench` takes it as a floor.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;
use std::time::Instant;

use sea_orm::{ConnectionTrait, TransactionTrait};
use sealci_service::database::{Database, DatabaseUrl};

const COMMITS: usize = 100;

#[tokio::main]
async fn main() {
    let given = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = tempfile::tempdir_in(given.map_or_else(std::env::temp_dir, PathBuf::from)).unwrap();
    let database = Database::open(&DatabaseUrl::Sqlite(folder.path().join("floor.db"))).await.unwrap();
    database.writer.execute_unprepared("CREATE TABLE t (x TEXT)").await.unwrap();
    let mut times = Vec::with_capacity(COMMITS);
    for _ in 0..COMMITS {
        let started_at = Instant::now();
        let transaction = database.writer.begin().await.unwrap();
        transaction
            .execute_unprepared("INSERT INTO t VALUES ('a row of some forty bytes, no more')")
            .await
            .unwrap();
        transaction.commit().await.unwrap();
        times.push(started_at.elapsed());
    }
    times.sort();
    println!("{{\"commit_ms\": {:.3}}}", times[COMMITS / 2].as_secs_f64() * 1e3);
}
