//! Scripted agents and controllers that speak real gRPC with a real scheduler on a port of its own.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use sealci_core::ids::{ActionId, AgentId, AttemptId, InstanceId, PipelineId, ReplicaId};
use sealci_proto::agent::agent_service_client::AgentServiceClient;
use sealci_proto::agent::{
    self, AgentMessage, HeldState, SchedulerMessage, agent_message, desired_entry, scheduler_message,
};
use sealci_proto::scheduler::scheduler_service_client::SchedulerServiceClient;
use sealci_proto::scheduler::{
    self, ControllerMessage, controller_message, scheduler_message as to_controller, to_agent, want,
};
use sealci_scheduler::{Config, ServeError, serve};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

pub const SECRET: &str = "the cluster's secret";

/// Waits for what must come, for so long that only a fault makes it fail.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(20), future).await {
        Ok(value) => value,
        Err(_) => panic!("{what} did not come"),
    }
}

pub fn config() -> Config {
    Config::new(SECRET.into())
}

pub struct Scheduler {
    pub address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Scheduler {
    pub async fn start(config: Config) -> Self {
        Self::start_on(config, "127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_on(config: Config, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(config, listener, stop.clone()));
        Self { address, stop, task }
    }

    pub async fn stop(self) {
        self.stop.cancel();
        soon("the scheduler's end", self.task).await.unwrap().unwrap();
    }
}

async fn channel(address: SocketAddr) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))
}

// ---- names

pub fn agent_id(n: u64) -> AgentId {
    AgentId::from_parts(n, &[1; 10])
}

pub fn instance_id(n: u64) -> InstanceId {
    InstanceId::from_parts(n, &[2; 10])
}

pub fn attempt_id(n: u64) -> AttemptId {
    AttemptId { action: ActionId::from_parts(n, &[3; 10]), number: 1 }
}

pub fn pipeline_id(n: u64) -> PipelineId {
    PipelineId::from_parts(n, &[4; 10])
}

fn number(attempt: &Option<agent::AttemptRef>) -> u64 {
    let attempt = sealci_proto::attempt_id(attempt).unwrap();
    (attempt.action.as_uuid().as_u128() >> 80) as u64
}

// ---- agents

/// What an agent comes with.
pub struct Identity {
    pub agent: String,
    pub credential: String,
    pub hello: agent::Hello,
}

pub fn identity(agent: u64, instance: u64) -> Identity {
    Identity {
        agent: agent_id(agent).to_string(),
        credential: format!("{:02x}", agent as u8).repeat(32),
        hello: agent::Hello {
            protocol_min: 1,
            protocol_max: 1,
            instance_id: instance_id(instance).to_string(),
            version: "0.1.0".into(),
            offer: Some(agent::Offer {
                capacity: Some(agent::Resources { cpu_millis: 4000, memory_bytes: 8 << 30 }),
                executors: vec!["sandbox".into()],
                accepting: true,
                slots: 4,
                ..Default::default()
            }),
        },
    }
}

pub async fn enrol(address: SocketAddr) -> Result<(), Status> {
    let enrol = agent::EnrolRequest { token: "token".into(), name: "a".into(), ..Default::default() };
    AgentServiceClient::new(channel(address).await?).enrol(enrol).await.map(drop)
}

pub struct Agent {
    to: mpsc::Sender<AgentMessage>,
    from: Streaming<SchedulerMessage>,
    pub welcome: agent::Welcome,
    pub credit: u64,
}

/// What an agent is told, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    Run(u64),
    Keep(u64),
    Cancel(u64),
    Drop(u64),
    Granted(u64),
    Ack(u64),
    Superseded,
    Renewed(u64),
}

impl Agent {
    pub async fn connect(address: SocketAddr, agent: u64, instance: u64) -> Self {
        soon("admission", Self::try_connect(address, identity(agent, instance))).await.unwrap()
    }

    pub async fn try_connect(address: SocketAddr, identity: Identity) -> Result<Self, Status> {
        let hello = agent_message::Body::Hello(identity.hello);
        Self::open(address, &identity.agent, &identity.credential, hello).await
    }

    pub async fn open(
        address: SocketAddr,
        agent: &str,
        credential: &str,
        first: agent_message::Body,
    ) -> Result<Self, Status> {
        let (to, messages) = mpsc::channel(64);
        to.send(AgentMessage { body: Some(first) }).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(messages));
        let metadata = request.metadata_mut();
        metadata.insert("authorization", format!("Bearer {credential}").parse().unwrap());
        metadata.insert("sealci-agent-id", agent.parse().unwrap());
        let mut client = AgentServiceClient::new(channel(address).await?);
        let mut from = client.session(request).await?.into_inner();
        let Some(SchedulerMessage { body: Some(scheduler_message::Body::Welcome(welcome)) }) =
            from.message().await?
        else {
            panic!("the first message is not `welcome`");
        };
        Ok(Self { to, from, welcome, credit: 0 })
    }

    pub async fn say(&self, body: agent_message::Body) {
        self.to.send(AgentMessage { body: Some(body) }).await.unwrap();
    }

    pub async fn held(&self, answers: Option<u64>, attempts: &[(u64, HeldState)]) {
        let agent::Welcome { incarnation, stream, .. } = self.welcome;
        let answers = answers.map(|counter| agent::DesiredNumber { incarnation, stream, counter });
        let attempts = attempts
            .iter()
            .map(|(n, state)| agent::HeldAttempt {
                attempt: Some(attempt_id(*n).into()),
                state: (*state).into(),
                reserved: Some(agent::Resources { cpu_millis: 1000, memory_bytes: 1 << 30 }),
                ..Default::default()
            })
            .collect();
        self.say(agent_message::Body::Held(agent::Held { answers, attempts })).await;
    }

    pub async fn claim(&self, n: u64) {
        let claim = agent::Claim { attempt: Some(attempt_id(n).into()), claim_id: "claim".into() };
        self.say(agent_message::Body::Claim(claim)).await;
    }

    pub async fn log(&self, n: u64, bytes: usize) {
        let chunk = agent::LogChunk {
            attempt: Some(attempt_id(n).into()),
            token: 1,
            data: vec![b'x'; bytes].into(),
            ..Default::default()
        };
        self.say(agent_message::Body::LogChunk(chunk)).await;
    }

    /// The next that it is told; credit is counted by the way.
    pub async fn next(&mut self) -> Result<Vec<Told>, Status> {
        loop {
            let message = soon("a message to the agent", self.from.message()).await?;
            let Some(message) = message else { return Ok(vec![]) };
            return Ok(match message.body.unwrap() {
                scheduler_message::Body::Credit(credit) => {
                    self.credit += credit.bytes;
                    continue;
                }
                scheduler_message::Body::Desired(desired) => desired.entries.iter().map(short).collect(),
                scheduler_message::Body::ClaimAnswer(answer) => vec![Told::Granted(number(&answer.attempt))],
                scheduler_message::Body::Ack(ack) => vec![Told::Ack(number(&ack.attempt))],
                scheduler_message::Body::Superseded(_) => vec![Told::Superseded],
                scheduler_message::Body::Renewed(renewed) => vec![Told::Renewed(number(&renewed.attempt))],
                scheduler_message::Body::Welcome(_) => panic!("a second `welcome`"),
            });
        }
    }

    /// Hears, and lets everything pass, until the scheduler is gone.
    pub async fn ended(&mut self) {
        while let Ok(Some(_)) = self.from.message().await {}
    }

    /// Waits until it has been given so much credit in all.
    pub async fn credit_of(&mut self, bytes: u64) {
        while self.credit < bytes {
            let message = soon("credit", self.from.message()).await.unwrap().unwrap();
            match message.body.unwrap() {
                scheduler_message::Body::Credit(credit) => self.credit += credit.bytes,
                other => panic!("expected credit, got {other:?}"),
            }
        }
        assert_eq!(self.credit, bytes);
    }
}

fn short(entry: &agent::DesiredEntry) -> Told {
    let n = number(&entry.attempt);
    match entry.wish.as_ref().unwrap() {
        desired_entry::Wish::Run(run) => {
            assert_eq!(run.spec, n.to_be_bytes(), "the spec is passed on as it is");
            Told::Run(n)
        }
        desired_entry::Wish::Keep(_) => Told::Keep(n),
        desired_entry::Wish::Cancel(_) => Told::Cancel(n),
        desired_entry::Wish::Drop(_) => Told::Drop(n),
    }
}

// ---- controllers

pub struct Controller {
    to: mpsc::Sender<ControllerMessage>,
    from: Streaming<scheduler::SchedulerMessage>,
    pub welcome: scheduler::Welcome,
}

impl Controller {
    pub async fn open(
        address: SocketAddr,
        secret: &str,
        first: controller_message::Body,
    ) -> Result<Self, Status> {
        let (to, messages) = mpsc::channel(64);
        to.send(ControllerMessage { body: Some(first) }).await.unwrap();
        let mut request = Request::new(ReceiverStream::new(messages));
        request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse().unwrap());
        let mut client = SchedulerServiceClient::new(channel(address).await?);
        let mut from = client.control(request).await?.into_inner();
        let Some(scheduler::SchedulerMessage { body: Some(to_controller::Body::Welcome(welcome)) }) =
            from.message().await?
        else {
            panic!("the first message is not `welcome`");
        };
        Ok(Self { to, from, welcome })
    }

    pub fn hello(protocol_min: u32, protocol_max: u32) -> controller_message::Body {
        controller_message::Body::Hello(scheduler::Hello {
            protocol_min,
            protocol_max,
            replica_id: ReplicaId::from_parts(u64::from(protocol_min), &[5; 10]).to_string(),
        })
    }

    /// One that has said everything but its wants: these agents exist, each with this current instance.
    pub async fn connect(address: SocketAddr, agents: &[(u64, Option<u64>)]) -> Self {
        let controller = soon("admission", Self::open(address, SECRET, Self::hello(1, 1))).await.unwrap();
        controller.directory(true, agents).await;
        controller.say(controller_message::Body::Snapshot(scheduler::Snapshot::default())).await;
        controller
    }

    pub async fn say(&self, body: controller_message::Body) {
        self.to.send(ControllerMessage { body: Some(body) }).await.unwrap();
    }

    pub async fn directory(&self, complete: bool, agents: &[(u64, Option<u64>)]) {
        let entry = |(agent, instance): &(u64, Option<u64>)| scheduler::DirectoryEntry {
            agent_id: agent_id(*agent).to_string(),
            name: format!("agent-{agent}"),
            credential_sha256: Sha256::digest([*agent as u8; 32]).to_vec(),
            current_instance_id: instance.map(|n| instance_id(n).to_string()).unwrap_or_default(),
            ..Default::default()
        };
        let agents = agents.iter().map(entry).collect();
        self.say(controller_message::Body::Directory(scheduler::Directory { complete, agents })).await;
    }

    pub async fn wants(&self, complete: bool, attempts: Vec<scheduler::Want>) {
        let wants =
            scheduler::Wants { pipeline_id: pipeline_id(1).to_string(), epoch: 1, complete, attempts };
        self.say(controller_message::Body::Wants(wants)).await;
    }

    /// Hears, and lets everything pass, until the scheduler is gone.
    pub async fn ended(&mut self) {
        while let Ok(Some(_)) = self.from.message().await {}
    }

    pub async fn to_agent(&self, session: u64, body: to_agent::Body) {
        let message = scheduler::ToAgent { session, body: Some(body) };
        self.say(controller_message::Body::ToAgent(message)).await;
    }

    /// The next message of which `pick` makes something; others are passed over.
    pub async fn next<T>(&mut self, what: &str, mut pick: impl FnMut(to_controller::Body) -> Option<T>) -> T {
        loop {
            let message = soon(what, self.from.message()).await.unwrap().unwrap();
            if let Some(picked) = message.body.and_then(&mut pick) {
                return picked;
            }
        }
    }

    pub async fn forwarded(&mut self) -> scheduler::FromAgent {
        self.next("a forwarded message", |body| match body {
            to_controller::Body::FromAgent(from) => Some(from),
            _ => None,
        })
        .await
    }

    /// Waits until this agent is connected, or not, and has said to hold so many.
    pub async fn sees(&mut self, agent: u64, connected: bool, held: usize) -> scheduler::AgentState {
        let id = agent_id(agent).to_string();
        self.next("the agent's state", |body| match body {
            to_controller::Body::AgentState(state)
                if state.agent_id == id && state.connected == connected && state.held.len() == held =>
            {
                Some(state)
            }
            _ => None,
        })
        .await
    }

    /// Everything that the scheduler had for this controller until now, which it is asked for by a question.
    pub async fn until_now(&mut self) -> Vec<to_controller::Body> {
        let question = scheduler::WhyQuestion { request: u64::MAX, attempt: None };
        self.say(controller_message::Body::WhyQuestion(question)).await;
        let mut all = Vec::new();
        self.next("the answer", |body| match body {
            to_controller::Body::WhyAnswer(answer) if answer.request == u64::MAX => Some(()),
            other => {
                all.push(other);
                None
            }
        })
        .await;
        all
    }

    pub async fn end(mut self) -> Status {
        loop {
            match soon("the stream's end", self.from.message()).await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended without a reason"),
                Err(status) => return status,
            }
        }
    }
}

pub fn queued(n: u64) -> scheduler::Want {
    scheduler::Want {
        attempt: Some(attempt_id(n).into()),
        state: Some(want::State::Queued(scheduler::WantQueued {
            requirements: Some(scheduler::Requirements {
                resources: Some(agent::Resources { cpu_millis: 1000, memory_bytes: 1 << 30 }),
                ..Default::default()
            }),
            order: n,
            repository: "r".into(),
            spec: n.to_be_bytes().to_vec(),
            ..Default::default()
        })),
    }
}

pub fn claimed(n: u64, agent: u64, instance: u64) -> scheduler::Want {
    scheduler::Want {
        attempt: Some(attempt_id(n).into()),
        state: Some(want::State::Claimed(scheduler::WantClaimed {
            agent_id: agent_id(agent).to_string(),
            instance_id: instance_id(instance).to_string(),
            cancel: None,
        })),
    }
}
