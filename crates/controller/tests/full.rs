//! Fills the disk under the database: what cannot be recorded is refused, and all goes on when there is room again.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use sealci_proto::agent::outcome;
use sealci_service::database::DatabaseUrl;
use sealci_service::testing::SmallDisk;
use serde_json::json;
use support::*;

const MANIFEST: &str = "name: x\nactions:\n  a:\n    commands: [\"true\"]\n";

#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    let Some(disk) = SmallDisk::mount("4m") else { return };
    let world = World::on(DatabaseUrl::Sqlite(disk.path().join("c.sqlite")), Duration::from_secs(600)).await;
    let mut line = world.line().await;
    let id = world.create(MANIFEST).await;
    let attempt = line.queued().await;
    let token = line.granted(&attempt).await.token;

    let filler = disk.fill();
    // The log's bytes need room; nothing of this commit may be acknowledged.
    let mut agent = ScriptedAgent { line: &mut line, attempt: attempt.clone(), token, sequence: 0 };
    let incompressible: Vec<u8> =
        (0..900_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    agent.log(0, &incompressible).await;
    // A failed commit ends the line, since the scheduler may have been told of what is not.
    line.ended().await;
    let mut body = push(MANIFEST);
    body["revision"] = json!("f".repeat(40));
    let (status, problem) = loop {
        // What little room is left in the file's pages may take a few more.
        let answer = world.post("/api/v1/pipelines", body.clone()).await;
        body["revision"] = json!(format!("{:040x}", rand::random::<u64>()));
        if answer.0 != 201 {
            break answer;
        }
    };
    assert_eq!(status, 503, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("could not be recorded"), "{problem}");

    std::fs::remove_file(filler).unwrap();
    let mut line = world.standing_line().await;
    let mut agent = ScriptedAgent { line: &mut line, attempt: attempt.clone(), token, sequence: 0 };
    agent.running().await;
    agent.log(0, &incompressible[..1000]).await;
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 1000).await;
    assert!(line.acknowledged(2, 1000).await.closed);
    let shown = world.get(&format!("/api/v1/pipelines/{id}")).await;
    assert_eq!(shown["outcome"], "succeeded", "{shown}");
    body["revision"] = json!("e".repeat(40));
    assert_eq!(world.post("/api/v1/pipelines", body).await.0, 201, "there is room again");
}
