//! Plays a scheduler with a controller behind it: a real gRPC server whose every word a test decides, and a record
//! that takes claims, events and log down as a controller does.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;
use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::workspace::{Checkout, Source, WorkspaceError};
use sealci_agent::{AgentError, Config, Periods, Shutdown};
use sealci_core::attempt::{Attempt, Claimant, JournalEntry};
use sealci_core::ids::{ActionId, AgentId, AttemptId, FencingToken, InstanceId};
use sealci_core::outcome::Outcome;
use sealci_core::plan::Resources;
use sealci_proto::agent::agent_service_server::{AgentService, AgentServiceServer};
use sealci_proto::agent::{
    self, ActionSpec, AgentMessage, DesiredNumber, EnrolRequest, EnrolResponse, SchedulerMessage,
    agent_message, claim_answer, desired_entry, event, scheduler_message,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

/// No single thing a test waits for takes so long.
pub const PATIENCE: Duration = Duration::from_secs(20);

// ---- the scheduler's side -------------------------------------------------------------------------------------------

/// A scheduler on a free port.
pub struct ScriptedScheduler {
    pub url: String,
    lines: mpsc::Receiver<Line>,
    pub enrolments: mpsc::Receiver<EnrolRequest>,
    refusals: Arc<AtomicU64>,
    server: JoinHandle<()>,
}

struct Doors {
    lines: mpsc::Sender<Line>,
    enrolments: mpsc::Sender<EnrolRequest>,
    /// So many sessions are refused before one is taken.
    refusals: Arc<AtomicU64>,
}

/// One stream of an agent.
pub struct Line {
    inbound: Streaming<AgentMessage>,
    outbound: mpsc::Sender<Result<SchedulerMessage, Status>>,
    pub agent_id: String,
    pub authorization: String,
    counter: u64,
}

#[tonic::async_trait]
impl AgentService for Doors {
    type SessionStream = ReceiverStream<Result<SchedulerMessage, Status>>;

    async fn enrol(&self, request: Request<EnrolRequest>) -> Result<Response<EnrolResponse>, Status> {
        let request = request.into_inner();
        let known = request.token == "let me in";
        self.enrolments.send(request).await.unwrap();
        if known {
            Ok(Response::new(EnrolResponse {}))
        } else {
            Err(Status::unauthenticated("unknown token"))
        }
    }

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let one_less = |left: u64| left.checked_sub(1);
        if self.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            return Err(Status::unauthenticated("unknown agent"));
        }
        let header = |name| request.metadata().get(name).unwrap().to_str().unwrap().to_owned();
        let (agent_id, authorization) = (header("sealci-agent-id"), header("authorization"));
        let (outbound, receiver) = mpsc::channel(64);
        let line = Line { inbound: request.into_inner(), outbound, agent_id, authorization, counter: 0 };
        self.lines.send(line).await.map_err(|_| Status::unavailable("the test is over"))?;
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl ScriptedScheduler {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (lines, lines_receiver) = mpsc::channel(16);
        let (enrolments, enrolments_receiver) = mpsc::channel(16);
        let refusals = Arc::new(AtomicU64::new(0));
        let doors = Doors { lines, enrolments, refusals: refusals.clone() };
        let serving = tonic::transport::Server::builder()
            .add_service(AgentServiceServer::new(doors))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Self { url, lines: lines_receiver, enrolments: enrolments_receiver, refusals, server }
    }

    pub fn refuse(&self, sessions: u64) {
        self.refusals.store(sessions, Ordering::Relaxed);
    }

    /// The next stream, with its Hello and first Held taken in and answered with Welcome.
    pub async fn greet(&mut self) -> (Line, agent::Hello, agent::Held) {
        let mut line = self.answer().await;
        let agent_message::Body::Hello(hello) = line.hear().await else { panic!("Hello comes first") };
        let agent_message::Body::Held(held) = line.hear().await else { panic!("Held comes second") };
        let welcome = agent::Welcome { protocol: 1, incarnation: 1, stream: 1, held_interval_ms: 1000 };
        line.say(scheduler_message::Body::Welcome(welcome)).await;
        (line, hello, held)
    }

    pub async fn answer(&mut self) -> Line {
        within(self.lines.recv()).await.unwrap()
    }
}

impl Drop for ScriptedScheduler {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Fails the test when something does not come.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it should have come by now")
}

impl Line {
    pub async fn say(&self, body: scheduler_message::Body) {
        within(self.outbound.send(Ok(SchedulerMessage { body: Some(body) }))).await.unwrap();
    }

    pub async fn hear(&mut self) -> agent_message::Body {
        self.hear_or_end().await.expect("the agent ended the stream")
    }

    pub async fn hear_or_end(&mut self) -> Option<agent_message::Body> {
        within(self.inbound.message()).await.ok().flatten().map(|message| message.body.unwrap())
    }

    /// Hears until something is found, and lets the rest pass.
    pub async fn hear_until<T>(&mut self, mut find: impl FnMut(agent_message::Body) -> Option<T>) -> T {
        loop {
            if let Some(found) = find(self.hear().await) {
                return found;
            }
        }
    }

    /// Hears until a Held answers the last Desired.
    pub async fn answered(&mut self) -> agent::Held {
        let counter = self.counter;
        self.hear_until(|body| match body {
            agent_message::Body::Held(held) if held.answers.is_some_and(|n| n.counter == counter) => {
                Some(held)
            }
            _ => None,
        })
        .await
    }

    pub async fn desire(&mut self, entries: impl IntoIterator<Item = (AttemptId, desired_entry::Wish)>) {
        self.counter += 1;
        let number = DesiredNumber { incarnation: 1, stream: 1, counter: self.counter };
        let entry =
            |(id, wish): (AttemptId, _)| agent::DesiredEntry { attempt: Some(id.into()), wish: Some(wish) };
        let entries = entries.into_iter().map(entry).collect();
        self.say(scheduler_message::Body::Desired(agent::Desired { number: Some(number), entries })).await;
    }

    pub async fn credit(&self, bytes: u64) {
        self.say(scheduler_message::Body::Credit(agent::Credit { bytes })).await;
    }

    /// Lets the record answer everything until it says enough.
    pub async fn serve(&mut self, record: &mut Record, mut enough: impl FnMut(&Record) -> bool) {
        while !enough(record) {
            let body = self.hear().await;
            for answer in record.take(body) {
                self.say(answer).await;
            }
        }
    }
}

// ---- the controller's side ------------------------------------------------------------------------------------------

/// What a controller knows, and how it answers.
#[derive(Default)]
pub struct Record {
    pub attempts: BTreeMap<AttemptId, Recorded>,
    /// The last Held.
    pub held: agent::Held,
    pub offer: Option<agent::Offer>,
    pub claims: Vec<(AttemptId, String)>,
    /// Acknowledgements that are not given: the line breaks before.
    pub mute: bool,
    /// Claims are taken down and not answered.
    pub keep_claims: bool,
    /// Credit is given back as log comes in.
    pub stingy: bool,
}

/// One attempt as recorded.
pub struct Recorded {
    pub attempt: Attempt,
    pub claim_id: String,
    pub events: Vec<agent::Event>,
    /// What was not kept is none.
    pub log: Vec<Option<u8>>,
    pub gaps: Vec<(u64, u64, String)>,
    /// Log messages that came a second time or out of place.
    pub repeated: u64,
}

impl Recorded {
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.log.iter().map(|byte| byte.expect("the log has a gap")).collect();
        String::from_utf8(bytes).unwrap()
    }

    pub fn kinds(&self) -> Vec<&'static str> {
        let kind = |event: &agent::Event| match event.body.as_ref().unwrap() {
            event::Body::Running(_) => "running",
            event::Body::CommandStarted(_) => "command started",
            event::Body::CommandFinished(_) => "command finished",
            event::Body::Finished(_) => "finished",
        };
        self.events.iter().map(kind).collect()
    }

    pub fn outcome(&self) -> Option<&Outcome> {
        self.attempt.outcome()
    }
}

pub const TOKEN: u64 = 41;

impl Record {
    pub fn of(&self, id: AttemptId) -> &Recorded {
        self.attempts.get(&id).expect("it was never claimed")
    }

    pub fn is_closed(&self, id: AttemptId) -> bool {
        self.attempts.get(&id).is_some_and(|recorded| recorded.attempt.is_closed())
    }

    pub fn is_running(&self, id: AttemptId) -> bool {
        self.attempts.get(&id).is_some_and(|recorded| !recorded.events.is_empty())
    }

    pub fn log_end(&self, id: AttemptId) -> u64 {
        self.attempts.get(&id).map_or(0, |recorded| recorded.attempt.log_end)
    }

    /// Takes a message down and says how it is answered.
    pub fn take(&mut self, body: agent_message::Body) -> Vec<scheduler_message::Body> {
        match body {
            agent_message::Body::Hello(_) => panic!("Hello comes once"),
            agent_message::Body::Held(held) => {
                self.held = held;
                vec![]
            }
            agent_message::Body::Offer(offer) => {
                self.offer = Some(offer);
                vec![]
            }
            agent_message::Body::Claim(claim) => {
                let id = sealci_proto::attempt_id(&claim.attempt).unwrap();
                self.claims.push((id, claim.claim_id.clone()));
                if self.keep_claims { vec![] } else { vec![self.grant(id, claim.claim_id)] }
            }
            agent_message::Body::Event(event) => self.take_event(event),
            agent_message::Body::LogChunk(chunk) => self.take_log(chunk),
            agent_message::Body::Renew(renew) => {
                let agent::Renew { attempt, token, number } = renew;
                vec![scheduler_message::Body::Renewed(agent::Renewed { attempt, token, number })]
            }
        }
    }

    pub fn grant(&mut self, id: AttemptId, claim_id: String) -> scheduler_message::Body {
        let claimant = Claimant {
            claim: claim_id.parse().unwrap(),
            agent: AgentId::from_parts(1, &[1; 10]),
            instance: InstanceId::from_parts(1, &[1; 10]),
        };
        let recorded = self.attempts.entry(id).or_insert_with(|| Recorded {
            attempt: Attempt::claimed(id.number, 1, claimant, FencingToken(TOKEN)),
            claim_id: claim_id.clone(),
            events: Vec::new(),
            log: Vec::new(),
            gaps: Vec::new(),
            repeated: 0,
        });
        assert_eq!(recorded.claim_id, claim_id, "another claim for a claimed attempt");
        let granted = agent::ClaimGranted { token: TOKEN, ..Default::default() };
        claim_answer(id, claim_id, claim_answer::Answer::Granted(granted))
    }

    fn take_event(&mut self, event: agent::Event) -> Vec<scheduler_message::Body> {
        let id = sealci_proto::attempt_id(&event.attempt).unwrap();
        let recorded = self.attempts.get_mut(&id).expect("an event before the grant");
        let entry = JournalEntry::try_from(&event).unwrap();
        let before = recorded.attempt.next_sequence;
        let taken = recorded.attempt.record_event(FencingToken(event.token), event.sequence, &entry);
        if recorded.attempt.next_sequence > before {
            recorded.events.push(event);
        } else if let Err(refusal) = taken {
            assert!(!matches!(refusal, sealci_core::attempt::WriteRefusal::OutOfPlace { .. }), "{refusal}");
        }
        self.ack(id)
    }

    fn take_log(&mut self, chunk: agent::LogChunk) -> Vec<scheduler_message::Body> {
        let id = sealci_proto::attempt_id(&chunk.attempt).unwrap();
        let recorded = self.attempts.get_mut(&id).expect("log before the grant");
        let to = chunk.gap.as_ref().map_or(chunk.offset + chunk.data.len() as u64, |gap| gap.to);
        let before = recorded.attempt.log_end;
        let _ = recorded.attempt.record_log(FencingToken(chunk.token), chunk.offset, to);
        if recorded.attempt.log_end > before {
            recorded.log.extend(chunk.data.iter().copied().map(Some));
            if let Some(gap) = &chunk.gap {
                recorded.log.extend((chunk.offset..gap.to).map(|_| None));
                recorded.gaps.push((chunk.offset, gap.to, gap.reason.clone()));
            }
            assert_eq!(recorded.log.len() as u64, recorded.attempt.log_end);
        } else {
            recorded.repeated += 1;
        }
        let mut answers = self.ack(id);
        if !self.stingy && !chunk.data.is_empty() {
            answers.push(scheduler_message::Body::Credit(agent::Credit { bytes: chunk.data.len() as u64 }));
        }
        answers
    }

    pub fn ack(&self, id: AttemptId) -> Vec<scheduler_message::Body> {
        if self.mute {
            return vec![];
        }
        let attempt = &self.of(id).attempt;
        vec![scheduler_message::Body::Ack(agent::Ack {
            attempt: Some(id.into()),
            token: attempt.token.0,
            next_sequence: attempt.next_sequence,
            next_offset: attempt.log_end,
            fenced: attempt.fenced,
            closed: attempt.is_closed(),
        })]
    }
}

pub fn claim_answer(
    id: AttemptId,
    claim_id: String,
    answer: claim_answer::Answer,
) -> scheduler_message::Body {
    let answer = agent::ClaimAnswer { attempt: Some(id.into()), claim_id, answer: Some(answer) };
    scheduler_message::Body::ClaimAnswer(answer)
}

// ---- the agent's side -----------------------------------------------------------------------------------------------

/// A running agent.
pub struct TestAgent {
    pub shutdown: Shutdown,
    running: JoinHandle<Result<(), AgentError>>,
}

/// Leaves workspaces empty; fails where the repository's URL says so.
pub struct NoCheckout;

#[async_trait]
impl Checkout for NoCheckout {
    async fn prepare(&self, source: &Source, into: &Path) -> Result<(), WorkspaceError> {
        assert!(into.is_dir());
        if source.repository_url.ends_with("/broken") {
            return Err(WorkspaceError::Checkout {
                repository: "forge.example.org/broken".into(),
                revision: source.revision.clone(),
                message: "the server knows no such commit".into(),
                disk_full: false,
            });
        }
        Ok(())
    }
}

pub fn config(folder: &Path, url: &str) -> Config {
    let executors: Vec<Arc<dyn sealci_agent::executor::Executor>> =
        vec![Arc::new(FakeExecutor::new().with_workspace())];
    let mut config =
        Config::new("test".into(), folder.to_owned(), vec![url.to_owned()], executors, Arc::new(NoCheckout));
    config.enrolment_token = Some("let me in".to_owned().into());
    config.capacity = Some(Resources { cpu_millis: 4000, memory_bytes: 4 << 30 });
    config.min_free_disk_bytes = 0;
    config.periods = Periods {
        backoff_shortest: Duration::from_millis(10),
        backoff_longest: Duration::from_millis(100),
        backoff_refused: Duration::from_millis(50),
        resend: Duration::from_secs(1),
        tick: Duration::from_millis(20),
        ..Periods::default()
    };
    config
}

impl TestAgent {
    pub fn start(config: Config) -> Self {
        let shutdown = Shutdown { drain: CancellationToken::new(), stop: CancellationToken::new() };
        let running = tokio::spawn(sealci_agent::run(config, shutdown.clone()));
        Self { shutdown, running }
    }

    /// Ends it as a crash would: nothing is cleaned up, nothing said.
    pub async fn crash(self) {
        self.running.abort();
        assert!(self.running.await.unwrap_err().is_cancelled());
    }

    pub async fn ended(self) -> Result<(), AgentError> {
        within(self.running).await.unwrap()
    }

    pub async fn stop(self) {
        self.shutdown.stop.cancel();
        self.ended().await.unwrap();
    }
}

pub fn attempt(number: u32) -> AttemptId {
    AttemptId { action: ActionId::from_parts(1, &[7; 10]), number }
}

pub fn spec(commands: &[&str]) -> ActionSpec {
    ActionSpec {
        pipeline_id: "p".into(),
        pipeline_name: "hello".into(),
        action_name: "build".into(),
        source: Some(agent::Source {
            repository_url: "https://forge.example.org/o/r".into(),
            r#ref: "refs/heads/main".into(),
            revision: "a".repeat(40),
            event_kind: "push".into(),
            needs_credentials: false,
        }),
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
        shell: "sh".into(),
        timeout_ms: 60_000,
        grace_ms: 100,
        network: agent::Network::Off.into(),
        ..ActionSpec::default()
    }
}

pub fn run(spec: &ActionSpec) -> desired_entry::Wish {
    let reserved = Some(Resources { cpu_millis: 500, memory_bytes: 1 << 20 }.into());
    desired_entry::Wish::Run(agent::Run { spec: spec.encode_to_vec(), reserved })
}
