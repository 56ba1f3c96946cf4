//! Plays several replicas of one controller over PostgreSQL: what one begins, another goes on with.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use sealci_proto::agent::{
    AttemptRef, Claim, EnrolRequest, HeldAttempt, HeldState, LogChunk, claim_answer, outcome,
};
use sealci_proto::scheduler::{
    AgentState, DirectoryEntry, EnrolQuestion, FromAgent, SchedulerMessage, Wants, controller_message,
    from_agent, scheduler_message, to_agent, want,
};
use serde_json::{Value, json};
use support::inside::Inside;
use support::*;

const ONE: &str = "name: one\nactions:\n  one:\n    commands: [echo a]\n";
const LONG: Duration = Duration::from_secs(600);

/// Two replicas, each with its line; none, loudly, where there is no PostgreSQL.
async fn two() -> Option<[(World, Line); 2]> {
    let database = sealci_service::testing::postgres("replicas").await?;
    let one = World::on(database, LONG).await;
    let mut other = one.replica().await;
    let (line, others_line) = (one.line().await, other.standing_line().await);
    other.config.lost_after = LONG;
    Some([(one, line), (other, others_line)])
}

/// A pipeline of its own each time.
fn another_push(revision: u32) -> Value {
    let mut push = push(ONE);
    push["revision"] = json!(format!("{revision:040x}"));
    push
}

async fn created(world: &World, revision: u32) -> String {
    let (status, body) = world.post("/api/v1/pipelines", another_push(revision)).await;
    assert_eq!(status, 201, "{body}");
    body["id"].as_str().unwrap().to_owned()
}

impl Line {
    /// The next complete statement about a pipeline.
    async fn stated(&mut self, pipeline: &str) -> Wants {
        self.until(|body| match body {
            controller_message::Body::Wants(wants) if wants.complete && wants.pipeline_id == pipeline => {
                Some(wants)
            }
            _ => None,
        })
        .await
    }

    /// The next word about an agent.
    async fn told_of(&mut self, agent: &str) -> DirectoryEntry {
        self.until(|body| match body {
            controller_message::Body::Directory(directory) => {
                directory.agents.into_iter().find(|entry| entry.agent_id == agent)
            }
            _ => None,
        })
        .await
    }

    /// Asserts that a claim gets no answer: what is asked after it is answered first.
    async fn claims_in_vain(&mut self, attempt: &AttemptRef) {
        for attempt in [attempt.clone(), AttemptRef { action_id: CLAIM.into(), number: 1 }] {
            let claim = Claim { attempt: Some(attempt), claim_id: CLAIM.into() };
            self.forward(from_agent::Body::Claim(claim)).await;
        }
        let answer = self
            .until(|body| match to_agent_body(body)? {
                to_agent::Body::ClaimAnswer(answer) => Some(answer),
                _ => None,
            })
            .await;
        assert_eq!(answer.attempt.as_ref().unwrap().action_id, CLAIM, "{answer:?}");
    }
}

#[tokio::test]
async fn what_a_dead_replica_owned_goes_on_at_another() {
    let Some([(mut one, mut line), (other, mut others_line)]) = two().await else { return };
    let (waiting, running) = (created(&one, 1).await, created(&one, 2).await);
    let attempts = [line.queued().await, line.queued().await];
    let mut agent = line.granted(&attempts[1]).await;
    agent.running().await;
    agent.log(0, b"before\n").await;
    agent.line.acknowledged(1, 7).await;
    let (token, sequence) = (agent.token, agent.sequence);
    one.crash().await;

    let wants = others_line.stated(&waiting).await;
    assert_eq!(wants.epoch, 2);
    assert!(matches!(wants.attempts[0].state, Some(want::State::Queued(_))));
    let wants = others_line.stated(&running).await;
    assert_eq!(wants.epoch, 2);
    assert!(
        matches!(&wants.attempts[0].state, Some(want::State::Claimed(claimed)) if claimed.agent_id == AGENT)
    );
    let attempt = attempts[1].clone();
    let mut agent = ScriptedAgent { line: &mut others_line, attempt, token, sequence };
    agent.log(7, b"after\n").await;
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 13).await;
    agent.line.acknowledged(2, 13).await;
    let pipeline = other.get(&format!("/api/v1/pipelines/{running}")).await;
    assert_eq!(pipeline["outcome"], "succeeded");
    others_line.granted(&attempts[0]).await.succeed().await;
    assert_eq!(other.get(&format!("/api/v1/pipelines/{waiting}")).await["outcome"], "succeeded");

    // Who comes back owns nothing, and takes part again.
    one.start().await;
    let mut line = one.standing_line().await;
    created(&one, 3).await;
    let attempt = line.queued().await;
    line.granted(&attempt).await.succeed().await;
}

#[tokio::test]
async fn a_successor_on_the_same_folder_waits_for_no_lease() {
    let Some(database) = sealci_service::testing::postgres("replicas").await else { return };
    let mut world = World::on(database, LONG).await;
    world.crash().await;
    world.config.lease = LONG;
    world.start().await;
    let mut line = world.standing_line().await;
    let id = created(&world, 1).await;
    assert_eq!(line.stated(&id).await.epoch, 1);
    world.crash().await;
    world.start().await;
    assert_eq!(world.standing_line().await.stated(&id).await.epoch, 2);
}

#[tokio::test]
async fn a_wish_is_taken_by_any_replica() {
    let Some([(one, mut line), (other, mut others_line)]) = two().await else { return };
    let (cancelled, failed) = (created(&one, 1).await, created(&one, 2).await);
    let attempts = [line.queued().await, line.queued().await];
    let (status, body) = other.post(&format!("/api/v1/pipelines/{cancelled}/cancel"), json!({})).await;
    assert!((200..300).contains(&status), "{status} {body}");
    assert_eq!(other.get(&format!("/api/v1/pipelines/{cancelled}")).await["outcome"], "cancelled");
    assert_eq!(others_line.stated(&cancelled).await.epoch, 2);

    // What the first one thinks of it does not count any more, and it knows.
    let mut agent = line.granted(&attempts[1]).await;
    agent.finished(outcome::Kind::Failed(outcome::Failed { exit_code: 1, limit: String::new() }), 0).await;
    agent.line.acknowledged(1, 0).await;
    let claim_answer::Answer::Refused(refused) = line.claim(&attempts[0], CLAIM).await else {
        panic!("it is cancelled")
    };
    assert!(
        refused.reason.contains("cancelled") || refused.reason.contains("finished"),
        "{}",
        refused.reason
    );

    // The same request opens one round, wherever it comes in.
    let rerun = json!({"request_id": "again", "scope": "failed"});
    for world in [&other, &one, &other] {
        let (status, body) = world.post(&format!("/api/v1/pipelines/{failed}/rerun"), rerun.clone()).await;
        assert!((200..300).contains(&status), "{status} {body}");
        assert_eq!(body["round"], 2, "{body}");
    }
}

#[tokio::test]
async fn what_is_reported_at_the_wrong_replica_is_its_owners() {
    let Some([(one, mut line), (_other, mut others_line)]) = two().await else { return };
    let id = created(&one, 1).await;
    let attempt = line.queued().await;
    others_line.claims_in_vain(&attempt).await;
    line.granted(&attempt).await.succeed().await;
    assert_eq!(one.get(&format!("/api/v1/pipelines/{id}")).await["outcome"], "succeeded");

    // Unless it keeps coming there: then nobody else hears of it.
    let id = created(&one, 2).await;
    let attempt = line.queued().await;
    let answer = loop {
        let claim = Claim { attempt: Some(attempt.clone()), claim_id: CLAIM.into() };
        others_line.forward(from_agent::Body::Claim(claim)).await;
        let next = others_line.until(|body| match body {
            controller_message::Body::ToAgent(message) => message.body,
            _ => None,
        });
        // The agent asks again after a while.
        match tokio::time::timeout(Duration::from_millis(200), next).await {
            Ok(to_agent::Body::ClaimAnswer(answer)) => break answer.answer,
            _ => continue,
        }
    };
    assert!(matches!(answer, Some(claim_answer::Answer::Granted(_))), "{answer:?}");
    assert_eq!(others_line.stated(&id).await.epoch, 2);
}

/// Of what an agent holds every replica hears: it is taken over by nobody for that, running or finished.
#[tokio::test]
async fn replicas_do_not_fight_for_what_an_agent_holds() {
    let Some([(one, mut line), (other, mut others_line)]) = two().await else { return };
    let (running, finished) = (created(&one, 1).await, created(&one, 2).await);
    let attempts = [line.queued().await, line.queued().await];
    let mut agent = line.granted(&attempts[0]).await;
    agent.running().await;
    let mut tokens = vec![agent.token];
    let mut agent = line.granted(&attempts[1]).await;
    agent.running().await;
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 4).await;
    agent.line.acknowledged(2, 0).await;
    tokens.push(agent.token);
    let states = [HeldState::Running, HeldState::Finished];
    let held = attempts.iter().zip(&tokens).zip(states).map(|((attempt, token), state)| HeldAttempt {
        attempt: Some(attempt.clone()),
        token: *token,
        state: state.into(),
        ..HeldAttempt::default()
    });
    let state = AgentState {
        session: 7,
        agent_id: AGENT.into(),
        instance_id: INSTANCE.into(),
        connected: true,
        held: held.collect(),
        ..AgentState::default()
    };
    // For as long as an owner that does not come by its pipelines may take; a line would end with a take-over.
    let begun = Instant::now();
    while begun.elapsed() < one.config.lease {
        for line in [&mut line, &mut others_line] {
            line.say(scheduler_message::Body::AgentState(state.clone())).await;
            line.claims_in_vain(&AttemptRef { action_id: CLAIM.into(), number: 2 }).await;
        }
    }
    // What comes of the finished one at the other is that one's from then on, and of no interest to the first.
    let chunk = LogChunk {
        attempt: Some(attempts[1].clone()),
        token: tokens[1],
        offset: 0,
        data: bytes::Bytes::from_static(b"last"),
        gap: None,
    };
    others_line.forward(from_agent::Body::LogChunk(chunk)).await;
    assert!(others_line.acknowledged(2, 4).await.closed);
    let begun = Instant::now();
    while begun.elapsed() < one.config.lease {
        for line in [&mut line, &mut others_line] {
            line.say(scheduler_message::Body::AgentState(state.clone())).await;
            line.claims_in_vain(&AttemptRef { action_id: CLAIM.into(), number: 2 }).await;
        }
    }
    let (status, _) = one.post(&format!("/api/v1/pipelines/{running}/cancel"), json!({})).await;
    assert!((200..300).contains(&status), "{status}");
    assert_eq!(line.stated(&running).await.epoch, 1);
    let rerun = json!({"request_id": "again", "scope": "all"});
    let (status, _) = other.post(&format!("/api/v1/pipelines/{finished}/rerun"), rerun).await;
    assert!((200..300).contains(&status), "{status}");
    let epoch = others_line.stated(&finished).await.epoch;
    assert!(epoch <= 3, "taken over for the log, and for the wish: epoch {epoch}");
}

/// A replica that lost a pipeline and was not told of it: what it remembers is no answer to an agent that says something again,
/// and nothing to tell a scheduler.
#[tokio::test]
async fn what_another_replica_took_over_is_not_answered_from_memory() {
    let Some([(one, mut line), (other, _others_line)]) = two().await else { return };
    let (running, waiting) = (created(&one, 1).await, created(&one, 2).await);
    let attempts = [line.queued().await, line.queued().await];
    let mut agent = line.granted(&attempts[0]).await;
    agent.running().await;
    agent.log(0, b"before\n").await;
    agent.line.acknowledged(1, 7).await;
    let token = agent.token;
    // Taken over, and the news of it is lost.
    let theirs = created(&other, 3).await;
    let owner = format!("(SELECT owner FROM pipelines WHERE id = '{theirs}')");
    let take_over =
        format!("UPDATE pipelines SET owner = {owner}, epoch = 2 WHERE id IN ('{running}', '{waiting}')");
    Inside::of(&one).await.execute(&take_over).await;

    let chunk = LogChunk {
        attempt: Some(attempts[0].clone()),
        token,
        offset: 0,
        data: bytes::Bytes::from_static(b"before\n"),
        gap: None,
    };
    line.forward(from_agent::Body::LogChunk(chunk)).await;
    line.ended().await;
    let mut line = one.standing_line().await;
    let ours = created(&one, 4).await;
    let stated = line.until(|body| match body {
        controller_message::Body::Wants(wants) => Some(wants.pipeline_id),
        _ => None,
    });
    assert_eq!(stated.await, ours, "the others are not this replica's");
}

#[tokio::test]
async fn a_replica_that_was_silent_for_long_writes_nothing_and_begins_anew() {
    let Some([(mut one, _), (other, mut others_line)]) = two().await else { return };
    // It will not show itself in time, nor look at what the others do.
    one.crash().await;
    one.config.lease = LONG;
    one.start().await;
    let mut line = one.standing_line().await;
    let id = created(&one, 1).await;
    let attempt = line.queued().await;
    assert_eq!(others_line.stated(&id).await.epoch, 2);
    let claim = Claim { attempt: Some(attempt.clone()), claim_id: CLAIM.into() };
    line.forward(from_agent::Body::Claim(claim)).await;
    line.ended().await;
    others_line.granted(&attempt).await.succeed().await;
    let action = other.get(&format!("/api/v1/actions/{}", attempt.action_id)).await;
    assert_eq!(action["attempts"].as_array().unwrap().len(), 1, "{action}");
    // It owns nothing now, and takes part again.
    let mut line = one.standing_line().await;
    let id = created(&one, 2).await;
    assert_eq!(line.stated(&id).await.epoch, 1);
}

#[tokio::test]
async fn followers_hear_of_what_another_replica_records() {
    let Some([(one, mut line), (other, _others_line)]) = two().await else { return };
    let id = created(&one, 1).await;
    let attempt = line.queued().await;
    let mut agent = line.granted(&attempt).await;
    agent.running().await;
    agent.line.acknowledged(1, 0).await;
    let follow = |path: String| {
        let request = other.http.get(format!("{}{path}", other.url)).bearer_auth(other.token.expose());
        async move { request.send().await.unwrap().bytes_stream() }
    };
    let mut log = follow(format!("/api/v1/actions/{}/attempts/1/log/follow", attempt.action_id)).await;
    let mut watch = follow(format!("/api/v1/pipelines/{id}/watch")).await;
    let mut text = String::new();
    for (offset, part) in [(0, "abc"), (3, "def")] {
        agent.log(offset, part.as_bytes()).await;
        while !text.contains(&format!("id: {}", offset + 3)) {
            text.push_str(&String::from_utf8_lossy(&within(log.next()).await.unwrap().unwrap()));
        }
    }
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 6).await;
    for stream in [&mut log, &mut watch] {
        while let Some(part) = within(stream.next()).await {
            text.push_str(&String::from_utf8_lossy(&part.unwrap()));
        }
    }
    assert!(text.contains("\"length\":6") && text.contains("succeeded"), "{text}");
}

#[tokio::test]
async fn agents_are_known_to_all_replicas() {
    let Some([(one, mut line), (other, mut others_line)]) = two().await else { return };
    let enrol = EnrolRequest {
        token: one.enrolment.expose().to_owned(),
        agent_id: AGENT.into(),
        name: "builder".into(),
        credential: vec![1; 32],
        public_key: vec![2; 32],
    };
    let question = EnrolQuestion { request: 1, enrol: Some(enrol) };
    line.say(scheduler_message::Body::EnrolQuestion(question)).await;
    assert_eq!(others_line.told_of(AGENT).await.name, "builder");
    let state = scheduler_message::Body::AgentState(sealci_proto::scheduler::AgentState {
        session: 7,
        agent_id: AGENT.into(),
        instance_id: INSTANCE.into(),
        connected: true,
        ..Default::default()
    });
    // Both hear of the new instance at once; it is written down once.
    line.say(state.clone()).await;
    others_line.say(state).await;
    while line.told_of(AGENT).await.current_instance_id != INSTANCE {}
    while others_line.told_of(AGENT).await.current_instance_id != INSTANCE {}
    let (status, agent) =
        other.post(&format!("/api/v1/agents/{AGENT}/drain"), json!({"drained": true})).await;
    assert_eq!(status, 200, "{agent}");
    loop {
        let entry = line.told_of(AGENT).await;
        assert_eq!(entry.current_instance_id, INSTANCE, "nothing else of it is changed");
        if entry.drained {
            break;
        }
    }
    assert_eq!(one.get("/api/v1/agents").await["agents"][0]["drained"], true);
}

/// Every replica gets the same event many times at once.
#[tokio::test]
async fn one_event_makes_one_pipeline_at_all_replicas() {
    let Some([(one, _line), (other, _others_line)]) = two().await else { return };
    for revision in 1..=20 {
        let deliver = async |world: &World| loop {
            let (status, body) = world.post("/api/v1/pipelines", another_push(revision)).await;
            match status {
                200 | 201 => break (status, body["id"].as_str().unwrap().to_owned()),
                // Nothing was recorded; whoever delivers tries again.
                503 => continue,
                _ => panic!("{status} {body}"),
            }
        };
        let answers = tokio::join!(deliver(&one), deliver(&other), deliver(&one), deliver(&other));
        let answers = [answers.0, answers.1, answers.2, answers.3];
        assert_eq!(answers.iter().filter(|(status, _)| *status == 201).count(), 1, "{answers:?}");
        assert!(answers.iter().all(|(_, id)| *id == answers[0].1), "{answers:?}");
    }
}

/// What is written of a pipeline while it is taken over is whole, or is not written: the next owner goes on where it ends.
#[tokio::test]
async fn a_log_that_grows_while_its_pipeline_is_taken_over_has_no_flaw() {
    const CHUNKS: u64 = 400;
    for _ in 0..3 {
        let Some([(one, mut line), (other, mut others_line)]) = two().await else { return };
        let id = created(&one, 1).await;
        let attempt = line.queued().await;
        let mut agent = line.granted(&attempt).await;
        agent.running().await;
        agent.line.acknowledged(1, 0).await;
        let token = agent.token;
        let cancel = format!("/api/v1/pipelines/{id}/cancel");
        let growing = async {
            for number in 0..CHUNKS {
                let chunk = LogChunk {
                    attempt: Some(attempt.clone()),
                    token,
                    offset: number * 10,
                    data: bytes::Bytes::from_static(b"123456789\n"),
                    gap: None,
                };
                let from = FromAgent {
                    session: 7,
                    agent_id: AGENT.into(),
                    instance_id: INSTANCE.into(),
                    body: Some(from_agent::Body::LogChunk(chunk)),
                };
                let body = Some(scheduler_message::Body::FromAgent(from));
                // The replica makes its line anew when it is refused.
                if agent.line.outgoing.send(Ok(SchedulerMessage { body })).await.is_err() {
                    break;
                }
            }
        };
        let (_, (status, _)) = tokio::join!(growing, other.post(&cancel, json!({})));
        assert!((200..300).contains(&status), "{status}");
        others_line.stated(&id).await;
        let mut agent =
            ScriptedAgent { line: &mut others_line, attempt: attempt.clone(), token, sequence: 1 };
        // One that is ahead is told where it ends.
        agent.log(CHUNKS * 10 + 10, b"ahead").await;
        let end = agent.line.acknowledged(1, 0).await.next_offset;
        for number in end / 10..CHUNKS {
            agent.log(number * 10, b"123456789\n").await;
        }
        agent.finished(outcome::Kind::Cancelled(outcome::Cancelled {}), CHUNKS * 10).await;
        agent.line.acknowledged(2, CHUNKS * 10).await;
        let log = format!("{}/api/v1/actions/{}/attempts/1/log", other.url, attempt.action_id);
        let log = other.http.get(log).bearer_auth(other.token.expose()).send().await.unwrap();
        assert_eq!(log.text().await.unwrap(), "123456789\n".repeat(CHUNKS as usize));
    }
}
