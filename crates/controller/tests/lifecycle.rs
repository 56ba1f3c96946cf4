//! Plays the life of pipelines through real gRPC and real HTTP, on every database.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use crypto_box::SecretKey;
use crypto_box::aead::OsRng;
use prost::Message as _;
use sealci_git::CredentialBook;
use sealci_proto::agent::{
    ActionSpec, AttemptRef, Event, HeldAttempt, HeldState, LogChunk, Running, claim_answer, event, outcome,
};
use sealci_proto::scheduler::{
    Absent, AgentState, EnrolQuestion, WhyAnswer, controller_message, from_agent, scheduler_message,
    to_agent, want,
};
use serde_json::json;
use support::*;

const TWO: &str =
    "name: two\nactions:\n  one:\n    commands: [echo a, echo b]\n  two:\n    commands: [echo c]\n";
const LONG: Duration = Duration::from_secs(600);

/// What the scheduler says of an agent that holds an attempt.
fn agent_state(attempt: &AttemptRef, token: u64, state: HeldState) -> scheduler_message::Body {
    let held = HeldAttempt {
        attempt: Some(attempt.clone()),
        state: state.into(),
        claim_id: CLAIM.into(),
        token,
        reserved: None,
    };
    scheduler_message::Body::AgentState(AgentState {
        session: 7,
        agent_id: AGENT.into(),
        instance_id: INSTANCE.into(),
        connected: true,
        held: vec![held],
        ..AgentState::default()
    })
}

#[tokio::test]
async fn a_push_goes_through_and_its_log_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut line = world.line().await;
        let id = world.create(TWO).await;
        let (status, again) = world.post("/api/v1/pipelines", push(TWO)).await;
        assert_eq!(
            (status, again["id"].as_str().unwrap()),
            (200, id.as_str()),
            "one event makes one pipeline"
        );

        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        agent.running().await;
        agent.log(0, b"hello ").await;
        agent.log(6, b"world\n").await;
        agent.log(0, b"hello ").await; // sent again: acknowledged again, recorded once
        agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 12).await;
        let ack = line.acknowledged(2, 12).await;
        assert!(ack.closed && !ack.fenced);

        let two = line.queued().await;
        assert_ne!(two.action_id, one.action_id);
        line.granted(&two).await.succeed().await;

        let shown = world.get(&format!("/api/v1/pipelines/{id}?verbose=true")).await;
        assert_eq!(shown["state"], "finished");
        assert_eq!(shown["outcome"], "succeeded");
        assert_eq!(shown["actions"][0]["attempts"][0]["log_length"], 12);
        let log = format!("{}/api/v1/actions/{}/attempts/1/log", world.url, one.action_id);
        let read = |range: Option<&'static str>| {
            let mut request = world.http.get(&log).bearer_auth(world.read_token.expose());
            if let Some(range) = range {
                request = request.header("range", range);
            }
            async move {
                let response = request.send().await.unwrap();
                (response.status().as_u16(), response.text().await.unwrap())
            }
        };
        assert_eq!(read(None).await, (200, "hello world\n".into()));
        assert_eq!(read(Some("bytes=4-7")).await, (206, "o wo".into()));
        assert_eq!(read(Some("bytes=-2")).await, (206, "d\n".into()));
        assert_eq!(read(Some("bytes=12-")).await.0, 416);
    }
}

#[tokio::test]
async fn a_claim_is_granted_once_and_repeated_to_the_same() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut line = world.line().await;
        world.create(TWO).await;
        let one = line.queued().await;
        let first = line.claim(&one, CLAIM).await;
        assert!(matches!(first, claim_answer::Answer::Granted(_)));
        assert_eq!(line.claim(&one, CLAIM).await, first, "the answer may have been lost");
        let stranger = "018f0000-0000-7000-8000-00000000002b";
        assert!(matches!(line.claim(&one, stranger).await, claim_answer::Answer::Refused(_)));
    }
}

#[tokio::test]
async fn a_failure_skips_what_needs_it_and_a_rerun_takes_it_up() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut line = world.line().await;
        let id = world.create(TWO).await;
        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        agent.running().await;
        agent
            .finished(outcome::Kind::Failed(outcome::Failed { exit_code: 7, limit: String::new() }), 0)
            .await;
        line.acknowledged(2, 0).await;
        let shown = world.get(&format!("/api/v1/pipelines/{id}")).await;
        assert_eq!(shown["outcome"], "failed");
        assert_eq!(shown["actions"][0]["outcome"]["exit_code"], 7);
        assert_eq!(shown["actions"][1]["outcome"]["because"], "`one` failed");

        let rerun = format!("/api/v1/pipelines/{id}/rerun");
        let (status, body) = world.post(&rerun, json!({"request_id": "r1", "scope": "failed"})).await;
        assert_eq!((status, body["round"].as_i64()), (200, Some(2)), "{body}");
        let (status, body) = world.post(&rerun, json!({"request_id": "r1", "scope": "failed"})).await;
        assert_eq!((status, body["round"].as_i64()), (200, Some(2)), "a repeat opens no other round: {body}");
        let (status, _) = world.post(&rerun, json!({"request_id": "r2", "scope": "all"})).await;
        assert_eq!(status, 409, "an action is unfinished");

        let again = line.queued().await;
        assert_eq!((again.action_id.as_str(), again.number), (one.action_id.as_str(), 2));
        line.granted(&again).await.succeed().await;
        let two = line.queued().await;
        line.granted(&two).await.succeed().await;
        let shown = world.get(&format!("/api/v1/pipelines/{id}?verbose=true")).await;
        assert_eq!(shown["outcome"], "succeeded");
        assert_eq!(shown["actions"][0]["attempts"].as_array().unwrap().len(), 2, "every attempt is kept");
    }
}

#[tokio::test]
async fn a_restart_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let mut world = World::on(database, LONG).await;
        let mut line = world.line().await;
        let id = world.create(TWO).await;
        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        let token = agent.token;
        agent.running().await;
        agent.log(0, b"before").await;
        line.acknowledged(1, 6).await;

        world.crash().await;
        world.start().await;
        let mut line = world.line().await;
        let claimed = line
            .until(|body| {
                if let controller_message::Body::Snapshot(snapshot) = &body {
                    assert_eq!(snapshot.pipelines.len(), 1);
                }
                find_want(body, |want| matches!(want.state, Some(want::State::Claimed(_))))
            })
            .await;
        assert_eq!(claimed, one, "what was claimed is claimed, and nothing is queued again");
        let mut agent = line.granted(&one).await;
        assert_eq!(agent.token, token, "the same claim has the same token, also after a restart");
        agent.sequence = 1;
        agent.log(0, b"before").await;
        agent.log(6, b" after").await;
        agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 12).await;
        assert!(line.acknowledged(2, 12).await.closed);
        let shown = world.get(&format!("/api/v1/pipelines/{id}?verbose=true")).await;
        assert_eq!(shown["actions"][0]["outcome"]["kind"], "succeeded");
        assert_eq!(shown["actions"][0]["attempts"].as_array().unwrap().len(), 1);
    }
}

/// An agent comes back to be told at once how far it was heard, without sending anything again first.
#[tokio::test]
async fn who_was_there_hears_from_a_controller_that_comes_back() {
    let (_folder, database) = sqlite();
    let mut world = World::on(database, LONG).await;
    let mut line = world.line().await;
    world.create(TWO).await;
    let one = line.queued().await;
    let mut agent = line.granted(&one).await;
    let token = agent.token;
    agent.running().await;
    agent.log(0, b"before").await;
    line.acknowledged(1, 6).await;

    world.crash().await;
    world.start().await;
    let mut line = world.line().await;
    line.say(agent_state(&one, token, HeldState::Finished)).await;
    let ack = line.acknowledged(1, 6).await;
    assert!(!ack.fenced && !ack.closed, "the rest is waited for");
    // Its later words are no first ones: the next acknowledgement is for what it sends.
    line.say(agent_state(&one, token, HeldState::Finished)).await;
    let mut agent = ScriptedAgent { line: &mut line, attempt: one.clone(), token, sequence: 1 };
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 6).await;
    let ack = line
        .until(|body| match to_agent_body(body)? {
            to_agent::Body::Ack(ack) => Some(ack),
            _ => None,
        })
        .await;
    assert!(ack.closed && ack.next_sequence == 2, "{ack:?}");
}

#[tokio::test]
async fn a_silent_attempt_is_lost_fenced_and_taken_up_again() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, Duration::from_millis(300)).await;
        let mut line = world.line().await;
        world.create(TWO).await;
        let one = line.queued().await;
        let mut agent = line.granted(&one).await;
        let token = agent.token;
        agent.running().await;
        let again = line.queued().await;
        assert_eq!((again.action_id.as_str(), again.number), (one.action_id.as_str(), 2));

        // The first comes back: its log is kept, its result is not, and it is told so.
        let mut zombie = ScriptedAgent { line: &mut line, attempt: one.clone(), token, sequence: 1 };
        zombie.log(0, b"late").await;
        zombie.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 4).await;
        let ack = line.acknowledged(2, 4).await;
        assert!(ack.fenced && ack.closed);
        let shown = world.get(&format!("/api/v1/actions/{}", one.action_id)).await;
        assert_eq!(shown["state"], "queued");
        assert_eq!(shown["attempts"][0]["outcome"]["cause"], "agent_lost");
        assert_eq!(shown["attempts"][0]["log_end"], 4);
    }
}

#[tokio::test]
async fn an_agent_that_comes_back_without_it_loses_it_at_once() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    world.create(TWO).await;
    let one = line.queued().await;
    line.granted(&one).await.running().await;
    let absent = Absent { attempt: Some(one.clone()), agent_id: AGENT.into(), instance_id: INSTANCE.into() };
    line.say(scheduler_message::Body::Absent(absent)).await;
    assert_eq!(line.queued().await.number, 2);
}

#[tokio::test]
async fn who_holds_in_vain_is_told_to_end_it() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    world.create(TWO).await;
    let one = line.queued().await;
    let token = line.granted(&one).await.token;
    let absent = Absent { attempt: Some(one.clone()), agent_id: AGENT.into(), instance_id: INSTANCE.into() };
    line.say(scheduler_message::Body::Absent(absent)).await;
    line.queued().await;
    line.say(agent_state(&one, token, HeldState::Running)).await;
    let ack = line
        .until(|body| match to_agent_body(body)? {
            to_agent::Body::Ack(ack) => Some(ack),
            _ => None,
        })
        .await;
    assert!(ack.fenced && ack.attempt.unwrap() == one);
}

#[tokio::test]
async fn an_agent_cannot_report_for_anothers_attempt() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    world.create(TWO).await;
    let one = line.queued().await;
    let token = line.granted(&one).await.token;
    let stranger = "018f0000-0000-7000-8000-00000000000b";
    let running = Event {
        attempt: Some(one.clone()),
        token,
        sequence: 0,
        at_unix_ms: 1,
        body: Some(event::Body::Running(Running { executor: "fake".into() })),
    };
    line.forward_from(stranger, from_agent::Body::Event(running.clone())).await;
    line.forward(from_agent::Body::Event(running)).await;
    line.acknowledged(1, 0).await;
    let chunk = LogChunk {
        attempt: Some(one.clone()),
        token,
        offset: 0,
        data: bytes::Bytes::from_static(b"forged"),
        gap: None,
    };
    line.forward_from(stranger, from_agent::Body::LogChunk(chunk)).await;
    let mut agent = ScriptedAgent { line: &mut line, attempt: one.clone(), token, sequence: 1 };
    agent.log(0, b"real").await;
    line.acknowledged(1, 4).await;
    let shown = world.get(&format!("/api/v1/actions/{}", one.action_id)).await;
    assert_eq!(shown["attempts"][0]["log_end"], 4, "the forged chunk was left out");
}

#[tokio::test]
async fn a_cancel_ends_what_waits_and_asks_what_runs_to_end() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    let id = world.create(TWO).await;
    let one = line.queued().await;
    let mut agent = line.granted(&one).await;
    agent.running().await;
    agent.line.acknowledged(1, 0).await;
    let (status, _) = world.post(&format!("/api/v1/pipelines/{id}/cancel"), json!({})).await;
    assert_eq!(status, 200);
    let cancelled = |want: &sealci_proto::scheduler::Want| matches!(&want.state, Some(want::State::Claimed(claimed)) if claimed.cancel.is_some());
    assert_eq!(agent.line.until(|body| find_want(body, cancelled)).await, one);
    agent.finished(outcome::Kind::Cancelled(outcome::Cancelled {}), 0).await;
    agent.line.acknowledged(2, 0).await;
    let shown = world.get(&format!("/api/v1/pipelines/{id}")).await;
    assert_eq!(shown["outcome"], "cancelled");
    assert_eq!(shown["actions"][1]["outcome"]["kind"], "cancelled");
}

#[tokio::test]
async fn why_answers_for_every_state() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    let id = world.create(TWO).await;
    let one = line.queued().await;
    let actions = world.get(&format!("/api/v1/pipelines/{id}/actions")).await;
    let second = actions["actions"][1]["id"].as_str().unwrap().to_owned();
    let pending = world.get(&format!("/api/v1/actions/{second}/why")).await;
    assert_eq!(pending["reasons"][0], "it needs `one`, which is queued");

    let path = format!("/api/v1/actions/{}/why", one.action_id);
    let asked = world.get(&path);
    let answered = async {
        let request = line
            .until(|body| match body {
                controller_message::Body::WhyQuestion(question) => Some(question.request),
                _ => None,
            })
            .await;
        let reasons = vec!["no agent is connected".to_owned()];
        line.say(scheduler_message::Body::WhyAnswer(WhyAnswer { request, queued: true, reasons })).await;
    };
    let (queued, ()) = tokio::join!(asked, answered);
    assert_eq!(queued["reasons"][0], "no agent is connected");

    line.granted(&one).await.succeed().await;
    let finished = world.get(&path).await;
    assert_eq!(finished["reasons"][0], "it is finished: succeeded");
}

#[tokio::test]
async fn an_agent_enrols_with_a_token_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut line = world.line().await;
        let enrol = |token: &str, credential: u8| sealci_proto::agent::EnrolRequest {
            token: token.into(),
            agent_id: AGENT.into(),
            name: "builder".into(),
            credential: vec![credential; 32],
            public_key: vec![2; 32],
        };
        let right = world.enrolment.expose().to_owned();
        let cases = [("nonsense", 1, false), (&right, 1, true), (&right, 1, true), (&right, 9, false)];
        for (request, (token, credential, is_let_in)) in (1..).zip(cases) {
            let question = EnrolQuestion { request, enrol: Some(enrol(token, credential)) };
            line.say(scheduler_message::Body::EnrolQuestion(question)).await;
            let answer = line
                .until(|body| match body {
                    controller_message::Body::EnrolAnswer(answer) => Some(answer),
                    _ => None,
                })
                .await;
            assert_eq!(answer.request, request);
            assert_eq!(answer.refused_because.is_empty(), is_let_in, "{token} {}", answer.refused_because);
        }
        let agents = world.get("/api/v1/agents").await;
        assert_eq!(agents["agents"][0]["name"], "builder");
        let (status, agent) =
            world.post(&format!("/api/v1/agents/{AGENT}/drain"), json!({"drained": true})).await;
        assert_eq!((status, agent["drained"].as_bool()), (200, Some(true)));
    }
}

#[tokio::test]
async fn an_agent_that_is_away_accepts_nothing() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    let enrol = sealci_proto::agent::EnrolRequest {
        token: world.enrolment.expose().into(),
        agent_id: AGENT.into(),
        name: "builder".into(),
        credential: vec![1; 32],
        public_key: vec![2; 32],
    };
    line.say(scheduler_message::Body::EnrolQuestion(EnrolQuestion { request: 1, enrol: Some(enrol) })).await;
    let enrolled = |body| matches!(body, controller_message::Body::EnrolAnswer(_)).then_some(());
    line.until(enrolled).await;
    let shown = async || world.get("/api/v1/agents").await["agents"][0].clone();
    let says = async |line: &Line, connected: bool| {
        let offer = sealci_proto::agent::Offer { accepting: true, ..Default::default() };
        let state = AgentState {
            session: 7,
            agent_id: AGENT.into(),
            instance_id: INSTANCE.into(),
            connected,
            offer: Some(offer),
            ..AgentState::default()
        };
        line.say(scheduler_message::Body::AgentState(state)).await;
        within(async { while shown().await["connected"] != connected {} }).await;
    };
    let away = |agent: &serde_json::Value| {
        (agent["accepting"].clone(), agent["not_accepting_because"].clone())
            == (json!(false), json!("it is not connected"))
    };
    assert!(away(&shown().await), "before it was ever there: {}", shown().await);
    says(&line, true).await;
    let there = shown().await;
    assert!(there["accepting"] == true && there["not_accepting_because"].is_null(), "{there}");
    // Its stream ends; the scheduler repeats what it last knew.
    says(&line, false).await;
    assert!(away(&shown().await), "{}", shown().await);
    // The line to the scheduler is gone: nothing is known of any agent.
    says(&line, true).await;
    drop(line);
    within(async { while shown().await["connected"] == true {} }).await;
    assert!(away(&shown().await), "{}", shown().await);
}

#[tokio::test]
async fn a_private_repositorys_credentials_are_sealed_for_the_agent_that_claims() {
    let (folder, database) = sqlite();
    let mut world = World::on(database, LONG).await;
    drop(world.line().await);
    world.crash().await;
    let file = folder.path().join("repositories.json");
    std::fs::write(folder.path().join("token"), "hunter2\n").unwrap();
    let entry = json!({"url": "https://forge.example.org/o/", "username": "ci", "token_file": "token"});
    std::fs::write(&file, json!({"repositories": [entry]}).to_string()).unwrap();
    world.config.credentials = Arc::new(CredentialBook::from_file(&file).unwrap());
    world.start().await;
    let mut line = world.line().await;

    let (key, stranger) = (SecretKey::generate(&mut OsRng), SecretKey::generate(&mut OsRng));
    let enrol = sealci_proto::agent::EnrolRequest {
        token: world.enrolment.expose().to_owned(),
        agent_id: AGENT.into(),
        name: "builder".into(),
        credential: vec![1; 32],
        public_key: key.public_key().as_bytes().to_vec(),
    };
    let question = EnrolQuestion { request: 1, enrol: Some(enrol) };
    line.say(scheduler_message::Body::EnrolQuestion(question)).await;

    // Its URL in the file is a folder's; of another folder it is public.
    for (repository, is_private) in
        [("https://forge.example.org/o/r.git", true), ("https://forge.example.org/other/r.git", false)]
    {
        let mut body = push(TWO);
        body["repo_url"] = json!(repository);
        assert_eq!(world.post("/api/v1/pipelines", body).await.0, 201);
        let (attempt, spec) = line
            .until(|body| {
                let controller_message::Body::Wants(wants) = body else { return None };
                wants.attempts.into_iter().find_map(|want| match want.state {
                    Some(want::State::Queued(queued)) => Some((want.attempt.unwrap(), queued.spec)),
                    _ => None,
                })
            })
            .await;
        let spec = ActionSpec::decode(spec.as_slice()).unwrap();
        assert_eq!(spec.source.unwrap().needs_credentials, is_private);
        for _ in ["at first", "repeated, for the answer may have been lost"] {
            let claim_answer::Answer::Granted(granted) = line.claim(&attempt, CLAIM).await else {
                panic!("the claim was refused")
            };
            let sealed = granted.sealed_credentials;
            assert!(!sealed.windows(7).any(|window| window == b"hunter2"));
            if is_private {
                let opened = key.unseal(&sealed).unwrap();
                let expected = json!({"username": "ci", "secret": "hunter2"});
                assert_eq!(serde_json::from_slice::<serde_json::Value>(&opened).unwrap(), expected);
                assert!(stranger.unseal(&sealed).is_err());
            } else {
                assert!(sealed.is_empty());
            }
        }
    }
}
