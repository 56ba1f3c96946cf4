//! Steps an agent's session: what it hears is handed in, what it says handed out, and the time comes in with both. Not for
//! production.
//!
//! Everything behind the session is the agent's own: its spool, its attempts, its executors. What belongs to their tasks goes on
//! in the runtime in which a [`SteppedAgent`] is opened and stepped; dropped with that runtime, it dies as a process does,
//! and leaves its data folder.

use std::path::{Path, PathBuf};
use std::time::Instant;

use sealci_core::ids::AgentId;
use sealci_proto::Malformed;
use sealci_proto::agent::{AgentMessage, EnrolRequest, SchedulerMessage};
use sha2::{Digest, Sha256};

use crate::agent::Agent;
use crate::connect::enrol_request;
use crate::identity::Identity;
use crate::session::{Session, Shutdown};
use crate::stream::Stream;
use crate::{AgentError, Config, Opened, Parts, Persistence};

pub use crate::spool::failpoint::{Told, tell_of_writes};

/// Gives a data folder an identity, so that what follows from its numbers is the same each time.
pub fn make_identity(data_folder: &Path, agent: AgentId, bytes: [u8; 32]) -> Result<(), AgentError> {
    Ok(Identity::make_of(data_folder, agent, bytes)?)
}

/// An agent without a line to anybody.
pub struct SteppedAgent {
    data_folder: PathBuf,
    agent: Agent,
    session: Session,
    stream: Option<Stream>,
}

impl SteppedAgent {
    /// Opens the data folder, as the agent does.
    pub async fn open(config: Config) -> Result<Self, AgentError> {
        let data_folder = config.data_folder.clone();
        let Parts { agent, session, .. } = Opened::open(config).await?.assemble(Shutdown::default());
        Ok(Self { data_folder, agent, session, stream: None })
    }

    pub fn id(&self) -> AgentId {
        self.session.identity.agent
    }

    /// What schedulers compare.
    pub fn credential_sha256(&self) -> [u8; 32] {
        Sha256::digest(self.session.identity.credential.bytes()).into()
    }

    /// What it asks to be enrolled with; none without a token.
    pub fn enrolment(&self) -> Option<EnrolRequest> {
        let token = self.session.enrolment_token.as_ref()?;
        Some(enrol_request(&self.session.identity, &self.session.name, token))
    }

    /// Whether the installation knew it when it was opened.
    pub fn is_enrolled(&self) -> bool {
        self.session.identity.is_enrolled()
    }

    /// The installation knows it now: it remembers that.
    pub fn enrolled(&self) -> Result<(), AgentError> {
        Ok(Identity::load_or_make(&self.data_folder, Persistence::Scratch)?.enrolled()?)
    }

    /// Begins a stream; what it says first, `Hello` before all.
    pub fn connect(&mut self, now: Instant) -> Vec<AgentMessage> {
        let (rhythm, version) = (self.session.times.rhythm, &self.session.version);
        let (stream, first) = Stream::open(&mut self.agent, rhythm, version, now);
        self.stream = Some(stream);
        first
    }

    /// The stream is broken.
    pub fn disconnect(&mut self) {
        self.stream = None;
    }

    /// Takes one message in.
    pub fn hear(&mut self, message: SchedulerMessage, now: Instant) -> Result<(), Malformed> {
        match &mut self.stream {
            Some(stream) => stream.heard(&mut self.agent, message, now),
            None => Ok(()),
        }
    }

    /// Notes what became of attempts, and what is due; what it then has to say, at most so many messages.
    pub async fn speak(&mut self, most: usize, now: Instant) -> Vec<AgentMessage> {
        let mut changed = self.agent.spool.doorbell().rung();
        while let Some(joined) = self.agent.tasks.try_join_next_with_id() {
            changed.extend(self.agent.joined(joined));
        }
        while self.agent.removals.join_next().await.is_some() {}
        let Some(stream) = &mut self.stream else { return Vec::new() };
        for id in changed {
            stream.noticed(&self.agent, id, now);
        }
        stream.ticked(&mut self.agent, now);
        let mut said = Vec::new();
        while said.len() < most {
            match stream.next_message(&self.agent, now) {
                Some(message) => said.push(message),
                None if stream.is_reading() => stream.read().await,
                None => break,
            }
        }
        said
    }

    /// Takes no more, finishes what runs.
    pub fn drain(&mut self) {
        self.agent.draining = true;
    }

    /// Whether nothing runs and nothing is owed.
    pub fn is_done(&self) -> bool {
        self.agent.is_done()
    }
}
