//! Follows logs through real gRPC and real HTTP to their end, and to the end of those that have none.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use futures_util::StreamExt;
use sealci_proto::agent::{AttemptRef, outcome};
use sealci_proto::scheduler::to_agent;
use support::*;

const MANIFEST: &str = "name: logs\nactions:\n  one:\n    commands: [echo a]\n";

#[tokio::test]
async fn followers_see_a_log_grow_and_end() {
    let (_folder, database) = sqlite();
    let world = World::on(database, Duration::from_secs(600)).await;
    let mut line = world.line().await;
    world.create(MANIFEST).await;
    let one = line.queued().await;
    let mut agent = line.granted(&one).await;
    agent.running().await;
    agent.line.acknowledged(1, 0).await;
    let follow = format!("{}/api/v1/actions/{}/attempts/1/log/follow", world.url, one.action_id);
    let response = world.http.get(follow).bearer_auth(world.token.expose()).send().await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut events = response.bytes_stream();
    let mut text = String::new();
    for (offset, part) in [(0, "abc"), (3, "def")] {
        agent.log(offset, part.as_bytes()).await;
        let expected = format!("id: {}", offset + 3);
        while !text.contains(&expected) {
            text.push_str(&String::from_utf8_lossy(&within(events.next()).await.unwrap().unwrap()));
        }
    }
    agent.finished(outcome::Kind::Failed(outcome::Failed { exit_code: 7, limit: String::new() }), 6).await;
    while let Some(part) = within(events.next()).await {
        text.push_str(&String::from_utf8_lossy(&part.unwrap()));
    }
    assert!(text.contains("event: end") && text.contains("\"length\":6"), "{text}");
}

#[tokio::test]
async fn a_log_that_nobody_delivers_to_its_end_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let mut world = World::on(database, Duration::from_millis(300)).await;
        world.crash().await;
        world.config.close_logs_after = Duration::from_millis(100);
        world.start().await;
        let mut line = world.standing_line().await;
        world.create(MANIFEST).await;
        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        let token = agent.token;
        agent.running().await;
        agent.log(0, b"abc").await;
        // One that finishes, and owes the rest of its log.
        assert_eq!(line.queued().await.number, 2, "the first is lost");
        let two = AttemptRef { number: 2, ..one.clone() };
        let mut agent = line.granted(&two).await;
        agent.running().await;
        agent
            .finished(outcome::Kind::Failed(outcome::Failed { exit_code: 1, limit: String::new() }), 9)
            .await;

        let followed = |number: u32| {
            let follow =
                format!("{}/api/v1/actions/{}/attempts/{number}/log/follow", world.url, one.action_id);
            let asked = world.http.get(follow).bearer_auth(world.token.expose()).send();
            async move { within(async { asked.await.unwrap().text().await.unwrap() }).await }
        };
        let lost = followed(1).await;
        assert!(lost.contains("event: gap") && lost.contains(r#""to":3"#), "{lost}");
        assert!(lost.contains("event: end") && lost.contains(r#""length":3"#), "{lost}");
        let cut = followed(2).await;
        assert!(cut.contains(r#""to":9"#) && cut.contains(r#""length":9"#), "{cut}");
        let log = format!("{}/api/v1/actions/{}/attempts/1/log", world.url, one.action_id);
        let whole = world.http.get(log).bearer_auth(world.token.expose()).send().await.unwrap();
        assert_eq!(whole.headers()["sealci-log-complete"], "true");
        let whole = whole.text().await.unwrap();
        assert!(whole.starts_with("abc\n[SealCI: the rest of this log is missing:"), "{whole}");

        // Its agent comes back all the same: nothing more is wanted of it.
        let mut zombie = ScriptedAgent { line: &mut line, attempt: one.clone(), token, sequence: 1 };
        zombie.log(3, b"late").await;
        let closed = |body| match to_agent_body(body)? {
            to_agent::Body::Ack(ack) => (ack.closed && ack.attempt.as_ref() == Some(&one)).then_some(ack),
            _ => None,
        };
        assert!(line.until(closed).await.fenced);
    }
}
