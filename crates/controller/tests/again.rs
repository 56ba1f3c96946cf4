//! Plays actions that are tried again, and those whose attempts must not overlap, through real gRPC and real HTTP.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use sealci_proto::agent::{ActionSpec, AttemptRef, Renew, Renewed, outcome};
use sealci_proto::scheduler::{WantQueued, from_agent, to_agent, want};
use support::*;

const LONG: Duration = Duration::from_secs(600);

const FAILED: outcome::Kind =
    outcome::Kind::Failed(sealci_proto::agent::outcome::Failed { exit_code: 7, limit: String::new() });

/// The next queued want, whole.
async fn wanted(line: &mut Line) -> (AttemptRef, WantQueued) {
    line.until(|body| {
        let sealci_proto::scheduler::controller_message::Body::Wants(wants) = body else { return None };
        wants.attempts.into_iter().find_map(|want| match want.state {
            Some(want::State::Queued(queued)) => Some((want.attempt?, queued)),
            _ => None,
        })
    })
    .await
}

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

#[tokio::test]
async fn an_exclusive_attempt_is_renewed_while_it_is_its_actions() {
    let (_folder, database) = sqlite();
    let lost_after = Duration::from_millis(1500);
    let world = World::on(database, lost_after).await;
    let mut line = world.line().await;
    let manifest = "name: n\nactions:\n  a: {commands: [x], exclusive: true, retry: {times: 1, on: [errored]}}\n  b: {needs: [], commands: [y]}\n";
    world.create(manifest).await;
    let (attempt, queued) = wanted(&mut line).await;
    let spec = <ActionSpec as prost::Message>::decode(queued.spec.as_slice()).unwrap();
    assert!(queued.exclusive);
    assert_eq!(spec.exclusive_lease_ms, 1000, "two thirds of the silence that makes it lost");
    let token = line.granted(&attempt).await.token;
    let renew =
        |number, token| from_agent::Body::Renew(Renew { attempt: Some(attempt.clone()), token, number });
    // It is alive for longer than any silence may be, by its questions alone.
    let began = std::time::Instant::now();
    let mut number = 0;
    while began.elapsed() < lost_after * 2 {
        number += 1;
        line.forward(renew(number, token)).await;
        let answer = line.until(|body| match to_agent_body(body)? {
            to_agent::Body::Renewed(renewed) => Some(renewed),
            _ => None,
        });
        assert_eq!(answer.await, Renewed { attempt: Some(attempt.clone()), token, number });
        tokio::time::sleep(lost_after / 5).await;
    }
    // Silence loses it; what asks then, or under another's name or token, is not answered.
    let (next, _) = wanted(&mut line).await;
    assert_eq!((next.action_id.as_str(), next.number), (attempt.action_id.as_str(), 2));
    line.forward(renew(number + 1, token)).await;
    let second = line.granted(&next).await.token;
    let late = Renew { attempt: Some(next.clone()), token: second + 1, number: 1 };
    line.forward(from_agent::Body::Renew(late)).await;
    let stranger = Renew { attempt: Some(next.clone()), token: second, number: 2 };
    line.forward_from("018f0000-0000-7000-8000-00000000beef", from_agent::Body::Renew(stranger)).await;
    let good = Renew { attempt: Some(next.clone()), token: second, number: 3 };
    line.forward(from_agent::Body::Renew(good)).await;
    let answer = line.until(|body| match to_agent_body(body)? {
        to_agent::Body::Renewed(renewed) => Some(renewed.number),
        _ => None,
    });
    assert_eq!(answer.await, 3);
}
