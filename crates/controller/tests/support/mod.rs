//! A controller with a real database and real HTTP, and a scheduler that a test plays by hand.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod emitted;
pub mod inside;
pub mod keeping;
pub mod proxy;
pub mod s3;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use sealci_controller::storage::StorageConfig;
use sealci_controller::storage::objects::{ObjectsConfig, ObjectsLocation};
use sealci_controller::{Config, serve};
use sealci_git::AllowedTransports;
use sealci_proto::agent::{
    AttemptRef, Claim, Event, Finished, LogChunk, LogGap, Outcome, Running, claim_answer, event, outcome,
};
use sealci_proto::scheduler::scheduler_service_server::{SchedulerService, SchedulerServiceServer};
use sealci_proto::scheduler::{
    ControllerMessage, FromAgent, SchedulerMessage, Want, Welcome, controller_message, from_agent,
    scheduler_message, to_agent, want,
};
use sealci_service::auth::{Role, Token, Tokens};
use sealci_service::database::DatabaseUrl;
use sealci_service::listen::{Security, bind};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub const AGENT: &str = "018f0000-0000-7000-8000-00000000000a";
pub const INSTANCE: &str = "018f0000-0000-7000-8000-00000000001a";
pub const CLAIM: &str = "018f0000-0000-7000-8000-00000000002a";
pub const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";
pub const PATIENCE: Duration = Duration::from_secs(20);

/// One stream of the controller, as the scheduler sees it.
pub struct Line {
    /// What came while something else was waited for.
    backlog: Vec<controller_message::Body>,
    pub incoming: Streaming<ControllerMessage>,
    pub outgoing: mpsc::Sender<Result<SchedulerMessage, Status>>,
}

struct Door(mpsc::Sender<Line>);

#[tonic::async_trait]
impl SchedulerService for Door {
    type ControlStream = Pin<Box<dyn Stream<Item = Result<SchedulerMessage, Status>> + Send>>;

    async fn control(
        &self,
        request: Request<Streaming<ControllerMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let (outgoing, messages) = mpsc::channel(1024);
        let welcome = scheduler_message::Body::Welcome(Welcome { protocol: 1, incarnation: 1 });
        outgoing
            .send(Ok(SchedulerMessage { body: Some(welcome) }))
            .await
            .map_err(|_| Status::aborted("gone"))?;
        let line = Line { backlog: Vec::new(), incoming: request.into_inner(), outgoing };
        self.0.send(line).await.map_err(|_| Status::aborted("gone"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

/// The stage of a test.
pub struct World {
    pub url: String,
    pub http: reqwest::Client,
    pub token: Token,
    pub read_token: Token,
    pub enrolment: Token,
    pub config: Config,
    lines: Arc<Mutex<mpsc::Receiver<Line>>>,
    controller: Option<(CancellationToken, JoinHandle<()>)>,
    _scheduler: JoinHandle<()>,
    _folder: tempfile::TempDir,
}

/// The databases to test on: SQLite always, PostgreSQL where there is a server.
pub async fn databases(folder: &std::path::Path) -> Vec<DatabaseUrl> {
    let mut databases = vec![DatabaseUrl::Sqlite(folder.join("controller.sqlite"))];
    databases.extend(sealci_service::testing::postgres("controller").await);
    databases
}

impl World {
    /// A controller on a database, and the scheduler it connects to.
    pub async fn on(database: DatabaseUrl, lost_after: Duration) -> Self {
        Self::with(database, lost_after, |_| ()).await
    }

    /// The same, configured otherwise than usual.
    pub async fn with(database: DatabaseUrl, lost_after: Duration, change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (door, lines) = mpsc::channel(4);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheduler = format!("http://{}", listener.local_addr().unwrap());
        let service = SchedulerServiceServer::new(Door(door));
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let (token, read_token, enrolment) = (token(), token(), token());
        let objects = ObjectsLocation::Folder(folder.path().join("objects"));
        let mut config = Config {
            database,
            data: folder.path().join("controller"),
            tokens: Tokens::default().with(&token, Role::Admin).with(&read_token, Role::Read),
            enrolment_tokens: vec![enrolment.clone()],
            schedulers: vec![scheduler],
            scheduler_ca_pem: None,
            cluster_secret: self::token(),
            transports: AllowedTransports { http: true, file: true },
            credentials: Arc::default(),
            allow_local_addresses: true,
            git_ca: None,
            git_known_hosts: None,
            lost_after,
            lease: Duration::from_secs(3),
            close_logs_after: sealci_controller::CLOSE_LOGS_AFTER,
            log_quota_bytes: sealci_controller::LOG_QUOTA_BYTES,
            grace: Duration::from_secs(10),
            storage: StorageConfig::new(ObjectsConfig { location: objects, aws: BTreeMap::new() }),
        };
        config.storage.move_logs_after = Duration::ZERO;
        change(&mut config);
        let mut world = Self {
            url: String::new(),
            http: reqwest::Client::new(),
            token,
            read_token,
            enrolment,
            config,
            lines: Arc::new(Mutex::new(lines)),
            controller: None,
            _scheduler: tokio::spawn(async move { serving.await.unwrap() }),
            _folder: folder,
        };
        world.start().await;
        world
    }

    /// Another replica of this one's controller: the same database and tokens, its own data folder and line.
    pub async fn replica(&self) -> Self {
        let config = &self.config;
        let mut replica = Self::on(config.database.clone(), config.lost_after).await;
        replica.crash().await;
        replica.lines.lock().await.try_recv().ok();
        replica.config.tokens = config.tokens.clone();
        replica.config.enrolment_tokens = config.enrolment_tokens.clone();
        (replica.token, replica.enrolment) = (self.token.clone(), self.enrolment.clone());
        replica.start().await;
        replica
    }

    /// Starts the controller (again).
    pub async fn start(&mut self) {
        self.start_as(true).await;
    }

    /// Starts a controller that does not know where agents reach it.
    pub async fn start_without_agents_url(&mut self) {
        self.start_as(false).await;
    }

    async fn start_as(&mut self, knows_its_address: bool) {
        let loopback: SocketAddr = ([127, 0, 0, 1], 0).into();
        let (door, address) = bind(loopback, Security::PlainLoopback).await.unwrap();
        self.url = format!("http://{address}");
        self.config.storage.agents_url = knows_its_address.then(|| self.url.clone());
        let (config, stop) = (self.config.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let task = tokio::spawn(async move { serve(config, door, stopped).await.unwrap() });
        self.controller = Some((stop, task));
    }

    /// Ends the controller at once, as a crash would: nothing is said to anyone.
    pub async fn crash(&mut self) {
        let (_, task) = self.controller.take().unwrap();
        task.abort();
        let _ = task.await;
    }

    /// The next stream that the controller opens.
    pub async fn line(&self) -> Line {
        within(async { self.lines.lock().await.recv().await.unwrap() }).await
    }

    /// The stream that stands now, of those that were opened since the last one was taken.
    pub async fn standing_line(&self) -> Line {
        let ready = async {
            while self.call(reqwest::Method::GET, "/readyz", None).await.0 != 200 {
                tokio::task::yield_now().await;
            }
        };
        within(ready).await;
        let mut lines = self.lines.lock().await;
        let mut last = None;
        while let Ok(line) = lines.try_recv() {
            last = Some(line);
        }
        last.expect("a line stands, so it was opened")
    }

    pub async fn call(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request =
            self.http.request(method, format!("{}{path}", self.url)).bearer_auth(self.token.expose());
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(reqwest::Method::GET, path, None).await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.call(reqwest::Method::POST, path, Some(body)).await
    }

    /// A pipeline with a manifest of its own; its id.
    pub async fn create(&self, manifest: &str) -> String {
        let (status, body) = self.post("/api/v1/pipelines", push(manifest)).await;
        assert_eq!(status, 201, "{body}");
        body["id"].as_str().unwrap().to_owned()
    }
}

/// A push to main.
pub fn push(manifest: &str) -> Value {
    serde_json::json!({
        "repo_url": "https://forge.example.org/o/r.git", "ref": "refs/heads/main", "revision": REVISION,
        "body": manifest,
    })
}

/// What an agent says, through the scheduler.
pub struct ScriptedAgent<'a> {
    pub line: &'a mut Line,
    pub attempt: AttemptRef,
    pub token: u64,
    pub sequence: u64,
}

impl Line {
    async fn next(&mut self) -> controller_message::Body {
        within(async { self.incoming.next().await.expect("the controller hung up").unwrap().body.unwrap() })
            .await
    }

    /// Reads on until the controller hangs up.
    pub async fn ended(&mut self) {
        within(async { while let Some(Ok(_)) = self.incoming.next().await {} }).await;
    }

    pub async fn say(&self, body: scheduler_message::Body) {
        self.outgoing.send(Ok(SchedulerMessage { body: Some(body) })).await.unwrap();
    }

    /// The first message that is what is waited for, of those that came and those to come; the others stay.
    pub async fn until<T>(&mut self, mut wanted: impl FnMut(controller_message::Body) -> Option<T>) -> T {
        for index in 0..self.backlog.len() {
            if let Some(found) = wanted(self.backlog[index].clone()) {
                self.backlog.remove(index);
                return found;
            }
        }
        loop {
            let message = self.next().await;
            match wanted(message.clone()) {
                Some(found) => return found,
                None => self.backlog.push(message),
            }
        }
    }

    /// The next queued want.
    pub async fn queued(&mut self) -> AttemptRef {
        self.until(|body| find_want(body, |want| matches!(want.state, Some(want::State::Queued(_))))).await
    }

    pub async fn forward(&self, body: from_agent::Body) {
        self.forward_from(AGENT, body).await;
    }

    pub async fn forward_from(&self, agent_id: &str, body: from_agent::Body) {
        self.say(scheduler_message::Body::FromAgent(FromAgent {
            session: 7,
            agent_id: agent_id.into(),
            instance_id: INSTANCE.into(),
            body: Some(body),
        }))
        .await;
    }

    /// Claims; the answer.
    pub async fn claim(&mut self, attempt: &AttemptRef, claim_id: &str) -> claim_answer::Answer {
        let claim = Claim { attempt: Some(attempt.clone()), claim_id: claim_id.into() };
        self.forward(from_agent::Body::Claim(claim)).await;
        self.until(|body| match to_agent_body(body)? {
            to_agent::Body::ClaimAnswer(answer) => answer.answer,
            _ => None,
        })
        .await
    }

    /// Claims and must be granted.
    pub async fn granted(&mut self, attempt: &AttemptRef) -> ScriptedAgent<'_> {
        let claim_answer::Answer::Granted(granted) = self.claim(attempt, CLAIM).await else {
            panic!("the claim was refused")
        };
        ScriptedAgent { line: self, attempt: attempt.clone(), token: granted.token, sequence: 0 }
    }

    /// The acknowledgement that covers events below `sequence` and log bytes below `offset`.
    pub async fn acknowledged(&mut self, sequence: u64, offset: u64) -> sealci_proto::agent::Ack {
        self.until(|body| match to_agent_body(body)? {
            to_agent::Body::Ack(ack) if ack.next_sequence >= sequence && ack.next_offset >= offset => {
                Some(ack)
            }
            _ => None,
        })
        .await
    }
}

pub fn find_want(body: controller_message::Body, wanted: impl Fn(&Want) -> bool) -> Option<AttemptRef> {
    let controller_message::Body::Wants(wants) = body else { return None };
    wants.attempts.into_iter().find(|want| wanted(want)).and_then(|want| want.attempt)
}

pub fn to_agent_body(body: controller_message::Body) -> Option<to_agent::Body> {
    match body {
        controller_message::Body::ToAgent(to_agent) => to_agent.body,
        _ => None,
    }
}

impl ScriptedAgent<'_> {
    pub async fn event(&mut self, body: event::Body) {
        let event = Event {
            attempt: Some(self.attempt.clone()),
            token: self.token,
            sequence: self.sequence,
            at_unix_ms: 1_700_000_000_000,
            body: Some(body),
        };
        self.sequence += 1;
        self.line.forward(from_agent::Body::Event(event)).await;
    }

    pub async fn running(&mut self) {
        self.event(event::Body::Running(Running { executor: "fake".into() })).await;
    }

    pub async fn log(&mut self, offset: u64, bytes: &[u8]) {
        let chunk = LogChunk {
            attempt: Some(self.attempt.clone()),
            token: self.token,
            offset,
            data: bytes::Bytes::copy_from_slice(bytes),
            gap: None,
        };
        self.line.forward(from_agent::Body::LogChunk(chunk)).await;
    }

    pub async fn gap(&mut self, offset: u64, to: u64, reason: &str) {
        let chunk = LogChunk {
            attempt: Some(self.attempt.clone()),
            token: self.token,
            offset,
            data: bytes::Bytes::new(),
            gap: Some(LogGap { to, reason: reason.to_owned() }),
        };
        self.line.forward(from_agent::Body::LogChunk(chunk)).await;
    }

    pub async fn finished(&mut self, kind: outcome::Kind, log_length: u64) {
        let outcome = Some(Outcome { kind: Some(kind) });
        self.event(event::Body::Finished(Finished { outcome, log_length })).await;
    }

    /// Runs to its end at once, with an empty log, and waits until that is recorded.
    pub async fn succeed(mut self) {
        self.running().await;
        self.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), 0).await;
        self.line.acknowledged(2, 0).await;
    }
}

pub async fn within<T>(wanted: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, wanted).await.expect("it did not come in time")
}

pub fn sqlite() -> (tempfile::TempDir, DatabaseUrl) {
    let folder = tempfile::tempdir().unwrap();
    let location = DatabaseUrl::Sqlite(PathBuf::from(folder.path()).join("c.sqlite"));
    (folder, location)
}

fn token() -> Token {
    Token::generate().unwrap()
}
