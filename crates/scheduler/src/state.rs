//! Reconciles what controllers want with what agents hold.
//!
//! [`Scheduler`] is a value: inputs go in with the time they came at, outputs come out, and nothing else happens. It is
//! owned by one task (the driver's) or by a test. Every statement of a peer is level-triggered, so a stream that
//! broke costs nothing but its renewal: the next one starts with everything.
//!
//! An attempt as the scheduler sees it:
//!
//! ```text
//!                  ┌── its agent's stream ended, or the agent answered and does not hold it ──┐
//!                  ▼                                                                          │
//!   queued: waiting ──placed (Desired run), or found held by an agent──▶ queued: placed ──────┘
//!      │                                                                     │
//!      └──────────────── the controller says: claimed by (agent, instance) ──┤
//!                                                                            ▼
//!   gone ◀── the controller says so, or states all and leaves it out ──── claimed (Desired keep or cancel)
//! ```
//!
//! Invariants:
//! - an attempt is wanted to run by at most one connected stream at a time, and what is claimed is placed by nobody;
//! - only the current instance of an agent gets new work, after it has said what it holds;
//! - what no controller speaks of is neither dropped nor cancelled;
//! - an absence is concluded only from an answer to a number of the same stream;
//! - of an exclusive action nothing is placed while a connected agent holds a former attempt of it;
//! - nothing is placed while no controller is connected, and no agent is kept for long by a scheduler without one.

mod agents;
mod controllers;
mod credit;
mod directory;
mod ended;
mod session;
mod timers;
mod wants;

#[cfg(test)]
mod kit;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use sealci_core::ids::{AgentId, AttemptId, InstanceId};
use sealci_proto::{PROTOCOLS, Versions, agent, scheduler};

use crate::placement::Placement;
use controllers::{Controller, Question};
use credit::CreditPool;
use directory::Directory;
use session::Session;
use timers::{Timer, Timers};
use wants::Wants;

pub use credit::CreditLimits;
pub use ended::{Ended, EnrolRefused};

/// One stream of an agent. Chosen by whoever feeds the scheduler, never twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// One stream of a controller. Chosen like [`SessionId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ControllerId(pub u64);

/// One request to enrol. Chosen like [`SessionId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EnrolId(pub u64);

/// What happens to the scheduler.
#[derive(Debug)]
pub enum Input {
    /// An agent opened a stream and said `Hello`. It is admitted by its first message (`Welcome`), or ended.
    AgentArrived {
        session: SessionId,
        agent: AgentId,
        credential_sha256: [u8; 32],
        hello: agent::Hello,
    },
    FromAgent {
        session: SessionId,
        message: agent::agent_message::Body,
    },
    /// The stream ended by itself. Of one that the scheduler ended, nothing needs to be said.
    AgentGone {
        session: SessionId,
    },
    /// A controller opened a stream and said `Hello`; admitted like an agent.
    ControllerArrived {
        controller: ControllerId,
        hello: scheduler::Hello,
    },
    FromController {
        controller: ControllerId,
        message: scheduler::controller_message::Body,
    },
    ControllerGone {
        controller: ControllerId,
    },
    Enrol {
        request: EnrolId,
        enrol: agent::EnrolRequest,
    },
}

/// What the scheduler wants done.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    ToAgent {
        session: SessionId,
        message: agent::scheduler_message::Body,
    },
    /// The stream is over for the scheduler; tell the agent why.
    EndAgent {
        session: SessionId,
        ended: Ended,
    },
    ToController {
        controller: ControllerId,
        message: scheduler::scheduler_message::Body,
    },
    EndController {
        controller: ControllerId,
        ended: Ended,
    },
    Enrolled {
        request: EnrolId,
        result: Result<(), EnrolRefused>,
    },
}

/// Periods and bounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// At least so often an agent says what it holds.
    pub held_interval: Duration,
    /// A session that said nothing of what it holds for so long is ended.
    pub silence: Duration,
    /// So long an agent waits for a controller that knows it.
    pub directory_wait: Duration,
    /// So long agents are kept while no controller is connected; after it they may find one by another scheduler, before what
    /// they run is taken for lost.
    pub deserted_after: Duration,
    /// So long a controller has to make a newly seen instance the current one, before that instance is told that
    /// another one is.
    pub supersede_after: Duration,
    pub enrol_timeout: Duration,
    /// So long after the first directory the agents that are connected may take to say what they hold, before
    /// anything is placed without them.
    pub settle_at_most: Duration,
    pub credit: CreditLimits,
    /// At most so many agents wait for a directory, and so many others to be enrolled.
    pub max_waiting: usize,
    /// What it speaks with agents and controllers.
    pub protocols: Versions,
    /// A `Desired` is no larger, but for one that carries a single larger spec.
    pub max_desired_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            held_interval: Duration::from_secs(10),
            silence: Duration::from_secs(35),
            directory_wait: Duration::from_secs(30),
            deserted_after: Duration::from_secs(10),
            supersede_after: Duration::from_secs(5),
            enrol_timeout: Duration::from_secs(10),
            settle_at_most: Duration::from_secs(2),
            credit: CreditLimits::default(),
            max_waiting: 4096,
            protocols: PROTOCOLS,
            max_desired_bytes: 1 << 20,
        }
    }
}

/// An agent whose stream waits for a directory.
#[derive(Debug)]
struct Arrival {
    agent: AgentId,
    credential_sha256: [u8; 32],
    instance: InstanceId,
    /// The version that both sides speak.
    protocol: u32,
    hello: agent::Hello,
}

/// The scheduler, without clock and network.
#[derive(Debug)]
pub struct Scheduler {
    settings: Settings,
    incarnation: u64,
    placement: Placement,
    directory: Directory,
    /// Until then placement waits for agents that are connected and have not said what they hold.
    settled_at: Duration,
    arrivals: BTreeMap<SessionId, Arrival>,
    sessions: BTreeMap<SessionId, Session>,
    /// The stream of each connected instance.
    streams: BTreeMap<(AgentId, InstanceId), SessionId>,
    /// The stream of each agent that is in the pool: its current instance's.
    pooled: HashMap<AgentId, SessionId>,
    /// Who said to hold an attempt.
    holders: HashMap<AttemptId, BTreeSet<SessionId>>,
    /// Queued attempts of exclusive actions of which a former attempt is held.
    held_back: BTreeSet<AttemptId>,
    controllers: BTreeMap<ControllerId, Controller>,
    /// When the last controller went, while none is connected.
    deserted_at: Option<Duration>,
    wants: Wants,
    credit: CreditPool,
    enrols: BTreeMap<EnrolId, ControllerId>,
    timers: Timers,
    /// Sessions with something to be sent, or whose reservations changed.
    touched: BTreeSet<SessionId>,
    /// Sessions of which the controllers are told at the end of the round.
    changed: BTreeSet<SessionId>,
    questions: Vec<Question>,
    outputs: Vec<Output>,
}

impl Scheduler {
    /// A scheduler that knows nothing yet. `incarnation` is random: another one after each start.
    pub fn new(settings: Settings, incarnation: u64) -> Self {
        Self {
            incarnation,
            placement: Placement::default(),
            directory: Directory::default(),
            settled_at: Duration::ZERO,
            arrivals: BTreeMap::new(),
            sessions: BTreeMap::new(),
            streams: BTreeMap::new(),
            pooled: HashMap::new(),
            holders: HashMap::new(),
            held_back: BTreeSet::new(),
            controllers: BTreeMap::new(),
            deserted_at: None,
            wants: Wants::default(),
            credit: CreditPool::new(settings.credit),
            enrols: BTreeMap::new(),
            timers: Timers::default(),
            touched: BTreeSet::new(),
            changed: BTreeSet::new(),
            questions: Vec::new(),
            outputs: Vec::new(),
            settings,
        }
    }

    /// Takes one input. `now` is monotonic, since any fixed moment. What follows from it is complete only after
    /// [`Scheduler::settle`], which may be called once for many inputs.
    pub fn handle(&mut self, now: Duration, input: Input) {
        match input {
            Input::AgentArrived { session, agent, credential_sha256, hello } => {
                self.agent_arrived(now, session, agent, credential_sha256, hello);
            }
            Input::FromAgent { session, message } => self.agent_said(now, session, message),
            Input::AgentGone { session } => self.end_session(now, session, None),
            Input::ControllerArrived { controller, hello } => self.controller_arrived(now, controller, hello),
            Input::FromController { controller, message } => self.controller_said(now, controller, message),
            Input::ControllerGone { controller } => self.controller_gone(now, controller),
            Input::Enrol { request, enrol } => self.enrol(now, request, enrol),
        }
    }

    /// Acts on everything that came in: looks at what is due, places, and says what changed.
    pub fn settle(&mut self, now: Duration) {
        while let Some(timer) = self.timers.pop_due(now) {
            self.due(now, timer);
        }
        self.refresh_reservations();
        self.place(now);
        self.refresh_reservations();
        self.send_desired();
        for session in std::mem::take(&mut self.changed) {
            self.announce(session, true);
        }
        for (session, bytes) in self.credit.grants() {
            self.tell_agent(session, agent::scheduler_message::Body::Credit(agent::Credit { bytes }));
        }
        self.answer_questions();
    }

    /// What is to be done, in order; each is given once.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.outputs)
    }

    /// When [`Scheduler::settle`] must be called, even if nothing comes in.
    pub fn deadline(&self) -> Option<Duration> {
        self.timers.next()
    }

    /// Queue and pool, to look at.
    pub fn placement(&self) -> &Placement {
        &self.placement
    }

    fn due(&mut self, now: Duration, timer: Timer) {
        match timer {
            Timer::Directory(session) => self.directory_due(session),
            Timer::Silence(session) => self.silence_due(now, session),
            Timer::Supersede(session) => self.supersede_due(session),
            Timer::Enrol(request) => self.enrol_due(request),
            Timer::Deserted => self.deserted_due(now),
            Timer::Retry(attempt) => self.seek_agent(now, attempt),
            // Placement, which follows, waited for this.
            Timer::Settled => {}
        }
    }

    fn tell_agent(&mut self, session: SessionId, message: agent::scheduler_message::Body) {
        self.outputs.push(Output::ToAgent { session, message });
    }

    fn tell_controller(&mut self, controller: ControllerId, message: scheduler::scheduler_message::Body) {
        self.outputs.push(Output::ToController { controller, message });
    }
}
