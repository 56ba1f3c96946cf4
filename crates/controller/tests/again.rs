//! Plays actions that are tried again through real gRPC and real HTTP.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use sealci_proto::agent::outcome;
use support::*;

const LONG: Duration = Duration::from_secs(600);

const FAILED: outcome::Kind =
    outcome::Kind::Failed(sealci_proto::agent::outcome::Failed { exit_code: 7, limit: String::new() });

async fn fail(line: &mut Line) {
    let attempt = line.queued().await;
    let mut agent = line.granted(&attempt).await;
    agent.running().await;
    agent.finished(FAILED, 0).await;
    agent.line.acknowledged(2, 0).await;
}

#[tokio::test]
async fn a_failed_action_is_retried_in_its_round_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let mut world = World::on(database, LONG).await;
        let mut line = world.line().await;
        let manifest = "name: n\nactions:\n  a: {commands: [x], retry: {times: 2, on: [failed]}}\n  b: {commands: [y]}\n";
        let id = world.create(manifest).await;
        fail(&mut line).await;
        // A crash forgets nothing of it.
        world.crash().await;
        world.start().await;
        line = world.standing_line().await;
        fail(&mut line).await;
        let third = line.queued().await;
        assert_eq!(third.number, 3);
        let shown = world.get(&format!("/api/v1/pipelines/{id}/actions")).await;
        let action = &shown["actions"][0];
        let why: Vec<_> =
            action["attempts"].as_array().unwrap().iter().map(|one| &one["retried_because"]).collect();
        assert_eq!(why, ["it failed (exit code 7): retry 1 of 2", "it failed (exit code 7): retry 2 of 2"]);
        assert_eq!((&action["state"], &action["attempts"][1]["round"]), (&"queued".into(), &1.into()));
        let path = format!("/api/v1/actions/{}/why", third.action_id);
        let asked = world.get(&path);
        let answered = async {
            let request = line
                .until(|body| match body {
                    sealci_proto::scheduler::controller_message::Body::WhyQuestion(question) => {
                        Some(question.request)
                    }
                    _ => None,
                })
                .await;
            let answer = sealci_proto::scheduler::WhyAnswer {
                request,
                queued: true,
                reasons: vec!["no agent".into()],
            };
            line.say(sealci_proto::scheduler::scheduler_message::Body::WhyAnswer(answer)).await;
        };
        let (why, ()) = tokio::join!(asked, answered);
        let reasons = ["no agent", "it is tried again: attempt 2 failed (exit code 7)"];
        assert_eq!(why["reasons"], serde_json::json!(reasons));

        // The last one fails, and that is the action's end.
        let mut agent = line.granted(&third).await;
        agent.running().await;
        agent.finished(FAILED, 0).await;
        agent.line.acknowledged(2, 0).await;
        let shown = world.get(&format!("/api/v1/pipelines/{id}/actions")).await;
        assert_eq!(shown["actions"][0]["outcome"]["kind"], "failed");
        assert_eq!(shown["actions"][1]["outcome"]["kind"], "skipped");
        assert!(shown["actions"][0]["attempts"][2]["retried_because"].is_null());
    }
}
