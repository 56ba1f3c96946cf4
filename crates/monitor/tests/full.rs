//! Fills the disk under the database: what cannot be recorded is tried again, and all goes on when there is room again.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test

mod support;

use sealci_service::database::DatabaseUrl;
use sealci_service::testing::SmallDisk;
use serde_json::json;
use support::{Bench, text};

#[tokio::test]
async fn a_full_disk_is_said_and_what_follows_it_lasts() {
    let Some(disk) = SmallDisk::mount("2m") else { return };
    let bench = Bench::on(DatabaseUrl::Sqlite(disk.path().join("monitor.sqlite"))).await;
    let repository = bench.repository("a");
    repository.push_file("main", "a", "1");
    let monitor = bench.start().await;
    let settings = json!({"repository_url": repository.file_url()});
    let path = monitor.add_and_wait(settings.clone()).await;

    let filler = disk.fill();
    let first = repository.push_file("main", "a", "2");
    let failed = |error: &str| error.contains("could not be recorded") && error.contains("full");
    monitor.wait_until(&path, |shown| failed(&text(&shown["last_poll"], "error"))).await;
    let (status, problem) = monitor.ask("POST", "/api/v1/configurations", Some(settings)).await;
    assert_eq!(status, 503, "{problem}");
    assert!(bench.controller.taken().is_empty(), "nothing is sent that is not recorded");

    std::fs::remove_file(filler).unwrap();
    bench.controller.wait_for(1).await;
    let second = repository.push_file("main", "a", "3");
    bench.controller.wait_for(2).await;
    monitor.wait_until(&path, |shown| shown["undelivered"] == 0).await;
    monitor.kill().await;

    let monitor = bench.start().await;
    monitor.settle(&path).await;
    let expected = [first, second].map(|revision| ("refs/heads/main".to_owned(), revision.to_string()));
    assert_eq!(bench.controller.refs(), expected, "the cursor is where it was");
    monitor.stop().await;
}
