//! Plays the agents: real spools, attempts and sessions, each agent in a runtime of its own whose clock is the world's.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use rand::Rng;
use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::executor::{ExecutionRequest, Executor, ExecutorError, Standby};
use sealci_agent::testing::{SteppedAgent, make_identity};
use sealci_agent::workspace::{Checkout, Source, WorkspaceError};
use sealci_agent::{Config, Periods, Persistence, SpoolLimits};
use sealci_core::ids::{AgentId, AttemptId};
use sealci_core::plan::{ExecutorKind, Resources};
use sealci_proto::agent::{EnrolRequest, SchedulerMessage, scheduler_message as to_agent};
use secrecy::SecretString;
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;

use crate::line::{Packet, Party, Way};
use crate::plans;
use crate::spools::SpoolEnding;
use crate::world::{AgentLine, Event, LineRef, World};

/// Lets agents enrol.
pub const ENROLMENT_TOKEN: &str = "simulated agents enrol with this";

/// An agent looks what there is to say at least so often.
const SPEAKS_EVERY_MS: u64 = 120;

/// So long a scheduler may take to admit an agent.
const ADMISSION_MS: u64 = 4000;

/// One agent's machine; its process may be dead, its data folder stays.
pub struct SimAgent {
    pub id: AgentId,
    pub credential_sha256: [u8; 32],
    pub data: PathBuf,
    process: Option<Process>,
    processes: u64,
    /// The scheduler that is tried.
    scheduler: usize,
    /// Every attempt whose commands began here, once for each time.
    pub begun: Arc<Mutex<Vec<AttemptId>>>,
    pub deaths: u64,
    /// Has it die at one of its writes.
    pub ending: Option<SpoolEnding>,
}

/// Dropped, it dies, as a process does.
struct Process {
    number: u64,
    agent: SteppedAgent,
    line: Option<usize>,
    speaks_at: Option<Duration>,
    /// When its clock began.
    since: Duration,
    clock: tokio::time::Instant,
    /// Last: what its tasks hold goes with it.
    runtime: Runtime,
}

/// Nothing is checked out: no command reads a file.
struct NoCheckout;

#[async_trait]
impl Checkout for NoCheckout {
    async fn prepare(&self, _source: &Source, _into: &Path) -> Result<(), WorkspaceError> {
        Ok(())
    }
}

/// The executor `fake`, whose commands know their attempt's name.
struct Named(FakeExecutor);

#[async_trait]
impl Executor for Named {
    fn kind(&self) -> ExecutorKind {
        self.0.kind()
    }

    fn uses_workspace(&self) -> bool {
        false
    }

    async fn prepare(&self, mut request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        request.commands = plans::of_attempt(&request.commands, request.attempt);
        self.0.prepare(request).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        self.0.sweep().await
    }

    async fn close(&self) {
        self.0.close().await;
    }
}

impl SimAgent {
    pub fn new(folder: &Path, index: usize) -> Self {
        let data = folder.join(format!("agent-{index}"));
        std::fs::create_dir_all(&data).unwrap();
        let id = AgentId::from_parts(index as u64 + 1, &[7; 10]);
        let secret = [index as u8 + 1; 32];
        make_identity(&data, id, secret).unwrap();
        Self {
            id,
            credential_sha256: Sha256::digest(secret).into(),
            data,
            process: None,
            processes: 0,
            scheduler: index,
            begun: Arc::default(),
            deaths: 0,
            ending: None,
        }
    }

    /// The process that is there.
    pub fn number(&self) -> Option<u64> {
        self.process.as_ref().map(|process| process.number)
    }

    pub fn enrolment(&self) -> Option<EnrolRequest> {
        self.process.as_ref()?.agent.enrolment()
    }

    /// Whether it is there, and owes nothing.
    pub fn is_done(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.agent.is_done())
    }

    fn config(&self) -> Config {
        let fake = FakeExecutor::new().noting(self.begun.clone());
        let schedulers = vec!["http://127.0.0.1:1".to_owned()];
        let mut config = Config::new(
            self.id.to_string(),
            self.data.clone(),
            schedulers,
            vec![Arc::new(Named(fake))],
            Arc::new(NoCheckout),
        );
        config.persistence = Persistence::Scratch;
        config.enrolment_token = Some(SecretString::from(ENROLMENT_TOKEN));
        config.capacity = Some(Resources { cpu_millis: 4000, memory_bytes: 1 << 30 });
        config.slots = 3;
        config.spool = SpoolLimits { disk_bytes: 64 << 20, window_bytes: 24 << 10 };
        config.min_free_disk_bytes = 0;
        config.disk_probe = Box::new(|_| Ok(u64::MAX));
        config.periods = Periods {
            resend: Duration::from_millis(2000),
            held_interval: Duration::from_millis(2000),
            ..Periods::default()
        };
        config
    }
}

impl Process {
    /// Lets its tasks do all they can up to this moment of the world.
    fn advance(&self, now: Duration) {
        let until = self.clock + now.saturating_sub(self.since);
        self.runtime.block_on(async { tokio::time::sleep_until(until).await });
    }
}

impl World {
    pub fn start_agent(&mut self, index: usize) {
        if self.agents[index].process.is_some() {
            return;
        }
        self.note(&format!("agent {index} starts"));
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let config = self.agents[index].config();
        let (agent, clock) = runtime
            .block_on(async { (SteppedAgent::open(config).await.unwrap(), tokio::time::Instant::now()) });
        let this = &mut self.agents[index];
        this.processes += 1;
        let number = this.processes;
        let process = Process { number, agent, line: None, speaks_at: None, since: self.now, clock, runtime };
        this.process = Some(process);
        if !self.died_at_write(index) {
            self.in_ms(1, Event::AgentConnects(index, number));
            self.agent_is_to_speak(index, 2);
        }
    }

    /// Has it die, where the write at which it dies was among its last: nothing that it did or said after that has been.
    fn died_at_write(&mut self, index: usize) -> bool {
        let this = &mut self.agents[index];
        let Some(left) = this.ending.as_ref().and_then(SpoolEnding::left) else { return false };
        this.ending = None;
        this.process = None;
        this.deaths += 1;
        left.restore(&this.data, &this.begun);
        self.note(&format!("agent {index} dies at a write"));
        self.close_all_of(Party::Agent(index));
        self.in_ms(200, Event::AgentStarts(index));
        true
    }

    pub fn kill_agent(&mut self, index: usize, for_ms: u64) {
        let Some(process) = self.agents[index].process.take() else { return };
        self.note(&format!("agent {index} dies"));
        self.agents[index].deaths += 1;
        drop(process);
        self.close_all_of(Party::Agent(index));
        self.in_ms(for_ms, Event::AgentStarts(index));
    }

    /// Asks to be enrolled, or opens a stream, at the scheduler whose turn it is.
    pub fn agent_connects(&mut self, index: usize, number: u64) {
        let schedulers = self.size.schedulers;
        let this = &mut self.agents[index];
        let Some(process) = this.process.as_mut().filter(|process| process.number == number) else { return };
        if process.line.is_some() {
            return;
        }
        let scheduler = this.scheduler % schedulers;
        let is_enrolled = process.agent.is_enrolled();
        let (us, them) = (Party::Agent(index), Party::Scheduler(scheduler));
        let is_away =
            self.schedulers[scheduler].process.is_none() || self.is_cut(us, them) || self.is_cut(them, us);
        if !is_enrolled {
            let ms = self.dice.random_range(1..30);
            self.in_ms(ms, Event::EnrolArrives { agent: index, process: number, scheduler });
        }
        if is_away || !is_enrolled {
            self.agents[index].scheduler += 1;
            let ms = self.dice.random_range(300..1200);
            return self.in_ms(ms, Event::AgentConnects(index, number));
        }
        let line = self.agent_lines.len();
        self.agent_lines.push(AgentLine::new(us, them));
        self.note(&format!("agent {index} connects to scheduler {scheduler}"));
        let (now, instant) = (self.now, self.instant());
        let Some(process) = &mut self.agents[index].process else { return };
        process.advance(now);
        process.line = Some(line);
        let entered = process.runtime.enter();
        let first = process.agent.connect(instant);
        drop(entered);
        self.say_to_scheduler(line, first);
        if schedulers > 1 {
            self.in_ms(ADMISSION_MS, Event::NotAdmitted(index, line));
        }
    }

    pub fn enrol_answered(&mut self, index: usize, number: u64, is_enrolled: bool) {
        let this = &mut self.agents[index];
        let Some(process) = this.process.as_mut().filter(|process| process.number == number) else { return };
        if !is_enrolled || process.agent.is_enrolled() {
            return;
        }
        process.agent.enrolled().unwrap();
        // It goes on with what it has written down.
        self.note(&format!("agent {index} is enrolled"));
        self.agents[index].process = None;
        self.start_agent(index);
    }

    pub fn not_admitted(&mut self, index: usize, line: usize) {
        let is_waiting =
            self.agents[index].process.as_ref().is_some_and(|process| process.line == Some(line));
        if is_waiting && !self.agent_lines[line].is_welcomed {
            self.agent_leaves(index, line, "not admitted");
        }
    }

    /// Gives a line up, and tries the next scheduler after a while.
    fn agent_leaves(&mut self, index: usize, line: usize, why: &str) {
        self.note(&format!("agent {index} has no line: {why}"));
        self.close(LineRef::Agent(line), Way::Down, true, why);
        let this = &mut self.agents[index];
        let Some(process) = &mut this.process else { return };
        process.line = None;
        process.agent.disconnect();
        this.scheduler += 1;
        let number = process.number;
        let ms = self.dice.random_range(50..1000);
        self.in_ms(ms, Event::AgentConnects(index, number));
    }

    pub fn agent_hears(&mut self, line: usize, packet: Packet<to_agent::Body>) {
        let Party::Agent(index) = self.agent_lines[line].caller else { return };
        let (now, instant) = (self.now, self.instant());
        let Some(process) = &mut self.agents[index].process else { return };
        if process.line != Some(line) {
            return;
        }
        let body = match packet {
            Packet::Message(body) => body,
            Packet::Closed(why) => {
                let why = why.split([':', ',']).next().unwrap_or_default().to_owned();
                let why =
                    if why.contains(&self.agents[index].id.to_string()) { "refused".into() } else { why };
                return self.agent_leaves(index, line, &why);
            }
        };
        if matches!(body, to_agent::Body::Welcome(_)) {
            self.agent_lines[line].is_welcomed = true;
        }
        process.advance(now);
        let entered = process.runtime.enter();
        process.agent.hear(SchedulerMessage { body: Some(body) }, instant).unwrap();
        drop(entered);
        if self.died_at_write(index) {
            return;
        }
        let ms = self.dice.random_range(1..6);
        self.agent_is_to_speak(index, ms);
    }

    /// Takes note of what its attempts did, and says what there is to say, or some of it.
    pub fn agent_speaks(&mut self, index: usize, number: u64) {
        let (now, instant) = (self.now, self.instant());
        let most = self.dice.random_range(1..8);
        let later = self.dice.random_range(SPEAKS_EVERY_MS / 2..SPEAKS_EVERY_MS);
        let Some(process) = &mut self.agents[index].process else { return };
        if process.number != number || process.speaks_at != Some(now) {
            return;
        }
        process.speaks_at = None;
        process.advance(now);
        let said = process.runtime.block_on(process.agent.speak(most, instant));
        let line = process.line;
        let has_more = said.len() == most;
        if self.died_at_write(index) {
            return;
        }
        if let Some(line) = line {
            self.say_to_scheduler(line, said);
        }
        self.agent_is_to_speak(index, if has_more { 1 } else { later });
    }

    /// An agent speaks so many milliseconds from now, unless it does so earlier anyway.
    fn agent_is_to_speak(&mut self, index: usize, ms: u64) {
        let moment = self.now + Duration::from_millis(ms);
        let Some(process) = &mut self.agents[index].process else { return };
        if process.speaks_at.is_none_or(|before| moment < before) {
            process.speaks_at = Some(moment);
            let number = process.number;
            self.at(moment, Event::AgentSpeaks(index, number));
        }
    }
}
