//! Drives a scheduler through real gRPC, with scripted agents and controllers at the other ends.

// Peers that break off are failed tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod peers;
mod thousand;
mod tls;

use std::time::Duration;

use peers::{
    Agent, Controller, Identity, SECRET, Scheduler, Told, attempt_id, claimed, config, enrol, identity,
    instance_id, queued, soon,
};
use sealci_proto::Versions;
use sealci_proto::agent::{self, HeldState, agent_message};
use sealci_proto::scheduler::{
    self, EnrolRefusal, controller_message, from_agent, scheduler_message as to_controller, to_agent,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;

#[tokio::test]
async fn an_agent_is_enrolled_by_the_controller() {
    let scheduler = Scheduler::start(config()).await;
    assert_eq!(enrol(scheduler.address).await.unwrap_err().code(), Code::Unavailable);
    let mut controller = Controller::connect(scheduler.address, &[]).await;
    for (refusal, because, code) in [
        (EnrolRefusal::Unspecified, "", None),
        (EnrolRefusal::Unauthenticated, "the token is revoked", Some(Code::Unauthenticated)),
        (EnrolRefusal::AlreadyExists, "the id is taken", Some(Code::AlreadyExists)),
        (EnrolRefusal::Invalid, "the name is empty", Some(Code::InvalidArgument)),
    ] {
        let asked = async {
            let question = controller
                .next("the question", |body| match body {
                    to_controller::Body::EnrolQuestion(question) => Some(question),
                    _ => None,
                })
                .await;
            assert_eq!(question.enrol.unwrap().token, "token");
            let answer = scheduler::EnrolAnswer {
                request: question.request,
                refused_because: because.into(),
                refusal: refusal.into(),
            };
            controller.say(controller_message::Body::EnrolAnswer(answer)).await;
        };
        let (result, ()) = tokio::join!(enrol(scheduler.address), asked);
        assert_eq!(result.as_ref().err().map(|status| status.code()), code);
        if let Err(status) = result {
            assert_eq!(status.message(), because);
        }
    }
    scheduler.stop().await;
}

#[tokio::test]
async fn agents_without_the_right_credential_are_refused() {
    let scheduler = Scheduler::start(config()).await;
    let address = scheduler.address;
    let _controller = Controller::connect(address, &[(1, None)]).await;
    let other = identity(2, 1);
    let known = identity(1, 1);
    for (agent, credential) in [
        (&other.agent, &other.credential),
        (&known.agent, &other.credential),
        (&known.agent, &"secret".to_owned()),
        (&known.agent, &String::new()),
        (&"not-an-id".to_owned(), &known.credential),
    ] {
        let identity =
            Identity { agent: agent.clone(), credential: credential.clone(), hello: known.hello.clone() };
        let status = soon("refusal", Agent::try_connect(address, identity)).await.err().unwrap();
        assert_eq!(status.code(), Code::Unauthenticated, "{agent} {credential}");
    }
    Agent::connect(address, 1, 1).await;
    scheduler.stop().await;
}

#[tokio::test]
async fn controllers_without_the_secret_are_refused() {
    let scheduler = Scheduler::start(config()).await;
    for secret in ["", "another secret", &SECRET[..5]] {
        let status =
            Controller::open(scheduler.address, secret, Controller::hello(1, 1)).await.err().unwrap();
        assert_eq!(status.code(), Code::Unauthenticated);
    }
    scheduler.stop().await;
}

#[tokio::test]
async fn a_version_that_is_not_shared_is_refused_by_name() {
    let scheduler = Scheduler::start(config()).await;
    let address = scheduler.address;
    let status = Controller::open(address, SECRET, Controller::hello(7, 7)).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let told = "you speak version 7 of the protocol, this scheduler speaks 1: bring the older of the two to a release \
                that is at most one behind the other's";
    assert_eq!(status.message(), told);

    let _controller = Controller::connect(address, &[(1, None)]).await;
    let status = Agent::try_connect(address, speaking(1, (2, 3))).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("version 2 to 3"), "{status}");
    scheduler.stop().await;
}

/// An agent that speaks these versions.
fn speaking(n: u64, (min, max): (u32, u32)) -> Identity {
    let mut identity = identity(n, n);
    (identity.hello.protocol_min, identity.hello.protocol_max) = (min, max);
    identity
}

/// A scheduler of release N, which speaks N and N-1, with neighbours one release older and newer, and two.
#[tokio::test]
async fn releases_that_are_one_apart_speak_with_each_other() {
    let mut config = config();
    config.settings.protocols = Versions { min: 4, max: 5 };
    let scheduler = Scheduler::start(config).await;
    let address = scheduler.address;
    let mut controllers = Vec::new();
    for ((min, max), chosen) in [((3, 4), 4), ((4, 5), 5), ((5, 6), 5)] {
        let hello = Controller::hello(min, max);
        let controller = soon("admission", Controller::open(address, SECRET, hello)).await.unwrap();
        assert_eq!(controller.welcome.protocol, chosen, "a controller that speaks {min} to {max}");
        controller.directory(true, &[(3, None), (4, None), (5, None)]).await;
        controllers.push(controller);
    }
    for ((min, max), chosen) in [((3, 4), 4), ((4, 5), 5), ((5, 6), 5)] {
        let agent = Agent::try_connect(address, speaking(u64::from(min), (min, max)));
        let agent = soon("admission", agent).await.unwrap();
        assert_eq!(agent.welcome.protocol, chosen, "an agent that speaks {min} to {max}");
    }
    for (min, max) in [(2, 3), (6, 7)] {
        let refused = [
            Agent::try_connect(address, speaking(3, (min, max))).await.err().unwrap(),
            Controller::open(address, SECRET, Controller::hello(min, max)).await.err().unwrap(),
        ];
        for status in refused {
            assert_eq!(status.code(), Code::FailedPrecondition);
            let both = format!("version {min} to {max} of the protocol, this scheduler speaks 4 to 5");
            assert!(status.message().contains(&both), "{status}");
        }
    }
    scheduler.stop().await;
}

#[tokio::test]
async fn a_stream_that_does_not_begin_with_hello_is_refused() {
    let scheduler = Scheduler::start(config()).await;
    let address = scheduler.address;
    let _controller = Controller::connect(address, &[(1, None)]).await;
    let Identity { agent, credential, .. } = identity(1, 1);
    let first = agent_message::Body::Held(agent::Held::default());
    let status = Agent::open(address, &agent, &credential, first).await.err().unwrap();
    assert_eq!(status.code(), Code::InvalidArgument);
    let first = controller_message::Body::Snapshot(scheduler::Snapshot::default());
    let status = Controller::open(address, SECRET, first).await.err().unwrap();
    assert_eq!(status.code(), Code::InvalidArgument);
    scheduler.stop().await;
}

#[tokio::test]
async fn an_agent_waits_for_a_controller_and_not_for_ever() {
    let mut config = config();
    config.settings.directory_wait = Duration::from_millis(50);
    let scheduler = Scheduler::start(config).await;
    let status = soon("refusal", Agent::try_connect(scheduler.address, identity(1, 1))).await.err().unwrap();
    assert_eq!(status.code(), Code::Unavailable);
    scheduler.stop().await;

    let scheduler = Scheduler::start(peers::config()).await;
    let (agent, _controller) = tokio::join!(
        Agent::connect(scheduler.address, 1, 1),
        Controller::connect(scheduler.address, &[(1, None)])
    );
    assert_eq!(agent.welcome.protocol, 1);
    scheduler.stop().await;
}

/// A scheduler with controller 1 and agent 1, which holds nothing.
async fn one_agent() -> (Scheduler, Controller, Agent) {
    let scheduler = Scheduler::start(config()).await;
    let mut controller = Controller::connect(scheduler.address, &[(1, Some(1))]).await;
    let agent = Agent::connect(scheduler.address, 1, 1).await;
    agent.held(None, &[]).await;
    controller.sees(1, true, 0).await;
    (scheduler, controller, agent)
}

#[tokio::test]
async fn an_attempt_is_placed_claimed_and_reported_through_the_scheduler() {
    let (scheduler, mut controller, mut agent) = one_agent().await;
    controller.wants(true, vec![queued(1)]).await;
    assert_eq!(agent.next().await.unwrap(), [Told::Run(1)]);
    let placed = controller
        .next("the placement", |body| match body {
            to_controller::Body::Placed(placed) => Some(placed),
            _ => None,
        })
        .await;
    assert_eq!(placed.agent_id, peers::agent_id(1).to_string());

    agent.held(Some(1), &[(1, HeldState::Assigned)]).await;
    let state = controller.sees(1, true, 1).await;
    assert_eq!(state.available.unwrap().cpu_millis, 3000);
    agent.claim(1).await;
    let forwarded = controller.forwarded().await;
    assert_eq!(forwarded.session, agent.welcome.stream);
    assert_eq!(forwarded.instance_id, instance_id(1).to_string());
    let Some(from_agent::Body::Claim(claim)) = forwarded.body else { panic!("not a claim") };
    controller.wants(false, vec![claimed(1, 1, 1)]).await;
    let granted = agent::ClaimGranted { token: 5, sealed_secrets: vec![1, 2], ..Default::default() };
    let answer = agent::ClaimAnswer {
        attempt: claim.attempt,
        claim_id: claim.claim_id,
        answer: Some(agent::claim_answer::Answer::Granted(granted)),
    };
    controller.to_agent(forwarded.session, to_agent::Body::ClaimAnswer(answer)).await;
    assert_eq!(agent.next().await.unwrap(), [Told::Granted(1)]);

    let event = agent::Event {
        attempt: Some(attempt_id(1).into()),
        token: 5,
        sequence: 0,
        body: Some(agent::event::Body::Running(agent::Running { executor: "sandbox".into() })),
        ..Default::default()
    };
    agent.say(agent_message::Body::Event(event.clone())).await;
    assert_eq!(controller.forwarded().await.body, Some(from_agent::Body::Event(event)));
    let ack =
        agent::Ack { attempt: Some(attempt_id(1).into()), token: 5, next_sequence: 1, ..Default::default() };
    controller.to_agent(forwarded.session, to_agent::Body::Ack(ack)).await;
    assert_eq!(agent.next().await.unwrap(), [Told::Ack(1)]);
    scheduler.stop().await;
}

#[tokio::test]
async fn a_restart_of_the_scheduler_places_nothing_that_is_held() {
    let (scheduler, controller, mut agent) = one_agent().await;
    let address = scheduler.address;
    controller.wants(true, vec![queued(1), queued(2)]).await;
    assert_eq!(agent.next().await.unwrap(), [Told::Run(1), Told::Run(2)]);
    let first_incarnation = agent.welcome.incarnation;
    scheduler.stop().await;
    assert_eq!(agent.next().await.unwrap_err().code(), Code::Unavailable);

    let scheduler = Scheduler::start_on(config(), address).await;
    // The first is claimed meanwhile, the second is only being prepared; a second agent has free hands.
    let connecting = async {
        let mut controller = Controller::connect(address, &[(1, Some(1)), (2, Some(2))]).await;
        controller.wants(true, vec![claimed(1, 1, 1), queued(2)]).await;
        controller.until_now().await;
        controller
    };
    let (mut first, second, mut controller) =
        tokio::join!(Agent::connect(address, 1, 1), Agent::connect(address, 2, 2), connecting);
    assert_ne!(first.welcome.incarnation, first_incarnation);
    assert_eq!(controller.welcome.incarnation, first.welcome.incarnation);
    second.held(None, &[]).await;
    first.held(None, &[(1, HeldState::Running), (2, HeldState::Assigned)]).await;
    assert_eq!(first.next().await.unwrap(), [Told::Keep(1)]);
    assert_eq!(first.next().await.unwrap(), [Told::Run(2)]);
    first.held(Some(2), &[(1, HeldState::Running), (2, HeldState::Assigned)]).await;
    controller.sees(1, true, 2).await;
    controller.wants(false, vec![queued(3)]).await;
    assert_eq!(first.next().await.unwrap(), [Told::Run(3)], "the fullest that fits");
    let absent = |body: &to_controller::Body| matches!(body, to_controller::Body::Absent(_));
    assert!(!controller.until_now().await.iter().any(absent));
    // Nothing ever went to the second agent: what it is told first is what is placed now.
    let mut second = second;
    controller.wants(false, vec![queued(4), queued(5), queued(6)]).await;
    assert_eq!(second.next().await.unwrap().len(), 2);
    scheduler.stop().await;
}

#[tokio::test]
async fn an_older_instance_is_told_and_keeps_what_it_claimed() {
    let (scheduler, mut controller, mut old) = one_agent().await;
    controller.wants(true, vec![claimed(1, 1, 1)]).await;
    assert_eq!(old.next().await.unwrap(), [Told::Keep(1)]);
    let mut new = Agent::connect(scheduler.address, 1, 2).await;
    new.held(None, &[]).await;
    controller.directory(false, &[(1, Some(2))]).await;
    assert_eq!(old.next().await.unwrap(), [Told::Superseded]);
    controller.wants(false, vec![queued(2)]).await;
    assert_eq!(new.next().await.unwrap(), [Told::Run(2)]);

    drop(old);
    controller.sees(1, false, 0).await;
    let mut old = Agent::connect(scheduler.address, 1, 1).await;
    assert_eq!(old.next().await.unwrap(), [Told::Keep(1)]);
    scheduler.stop().await;
}

#[tokio::test]
async fn a_lost_attempt_is_reported_once() {
    let (scheduler, mut controller, mut agent) = one_agent().await;
    controller.wants(true, vec![claimed(1, 1, 1)]).await;
    assert_eq!(agent.next().await.unwrap(), [Told::Keep(1)]);
    agent.held(None, &[]).await;
    controller.sees(1, true, 0).await;
    let absences = |messages: Vec<to_controller::Body>| {
        messages.iter().filter(|body| matches!(body, to_controller::Body::Absent(_))).count()
    };
    assert_eq!(absences(controller.until_now().await), 0);
    for _ in 0..3 {
        agent.held(Some(1), &[]).await;
    }
    let absent = controller
        .next("the absence", |body| match body {
            to_controller::Body::Absent(absent) => Some(absent),
            _ => None,
        })
        .await;
    assert_eq!(absent.attempt, Some(attempt_id(1).into()));
    drop(agent);
    let rest = controller
        .next("the end of the agent", |body| match body {
            to_controller::Body::AgentState(state) if !state.connected => Some(0),
            to_controller::Body::Absent(_) => Some(1),
            _ => None,
        })
        .await;
    assert_eq!(rest, 0);
    scheduler.stop().await;
}

#[tokio::test]
async fn log_bytes_are_paid_for_with_credit() {
    let mut config = config();
    config.settings.credit.session_bytes = 100_000;
    let scheduler = Scheduler::start(config).await;
    let mut controller = Controller::connect(scheduler.address, &[(1, Some(1))]).await;
    let mut agent = Agent::connect(scheduler.address, 1, 1).await;
    agent.credit_of(100_000).await;
    agent.log(1, 60_000).await;
    agent.log(1, 40_000).await;
    let session = controller.forwarded().await.session;
    controller.to_agent(session, to_agent::Body::ReleasedBytes(60_000)).await;
    agent.credit_of(160_000).await;
    agent.log(1, 60_001).await;
    assert_eq!(agent.next().await.unwrap_err().code(), Code::ResourceExhausted);
    controller.sees(1, false, 0).await;
    scheduler.stop().await;
}

#[tokio::test]
async fn a_waiting_attempt_says_why() {
    let (scheduler, mut controller, _agent) = one_agent().await;
    let mut wanted = queued(1);
    if let Some(scheduler::want::State::Queued(queued)) = &mut wanted.state {
        queued.requirements.as_mut().unwrap().labels.insert("gpu".into(), "true".into());
    }
    controller.wants(true, vec![wanted]).await;
    let question = scheduler::WhyQuestion { request: 3, attempt: Some(attempt_id(1).into()) };
    controller.say(controller_message::Body::WhyQuestion(question)).await;
    let answer = controller
        .next("the answer", |body| match body {
            to_controller::Body::WhyAnswer(answer) => Some(answer),
            _ => None,
        })
        .await;
    assert_eq!((answer.request, answer.queued), (3, true));
    assert_eq!(answer.reasons, ["0 of 1 agents have label gpu=true"]);
    scheduler.stop().await;
}

#[tokio::test]
async fn shutting_down_ends_every_stream_with_the_reason() {
    let (scheduler, controller, mut agent) = one_agent().await;
    scheduler.stop().await;
    assert_eq!(controller.end().await.code(), Code::Unavailable);
    assert_eq!(agent.next().await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_half_open_connection_is_found() {
    let mut config = config();
    config.keepalive_interval = Duration::from_millis(200);
    config.keepalive_timeout = Duration::from_millis(200);
    let scheduler = Scheduler::start(config).await;
    let mut controller = Controller::connect(scheduler.address, &[(1, Some(1))]).await;
    let line = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let through = line.local_addr().unwrap();
    let (cut, is_cut) = tokio::sync::oneshot::channel();
    let upstream = scheduler.address;
    let line = tokio::spawn(async move {
        let (mut near, _) = line.accept().await.unwrap();
        let mut far = TcpStream::connect(upstream).await.unwrap();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            _ = is_cut => {}
        }
        // Both ends stay open, and nothing passes any more; what arrives is swallowed.
        let mut sink = [0; 1024];
        while far.read(&mut sink).await.is_ok_and(|read| read > 0) {}
        near.shutdown().await
    });
    let agent = Agent::connect(through, 1, 1).await;
    agent.held(None, &[]).await;
    controller.sees(1, true, 0).await;
    cut.send(()).unwrap();
    controller.sees(1, false, 0).await;
    drop(agent);
    // The scheduler closed its end, so the line comes to its own.
    let _ = soon("the line's end", line).await.unwrap();
    scheduler.stop().await;
}
