//! Lets agents, controllers and the scheduler meet in any order, and checks what must never happen and what must happen
//! in the end.
//!
//! The peers here are as simple as the contract allows: an agent runs what it is asked to and asks for claims, a
//! controller keeps one table of attempts and grants the first claim. Every stream is a queue in each direction, so
//! messages cross, and are lost with their stream.

mod agents;
mod controller;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proptest::prelude::*;
use sealci_core::ids::{AgentId, AttemptId, InstanceId, ReplicaId};
use sealci_proto::agent::{self, HeldState, agent_message, desired_entry, scheduler_message as down};
use sealci_proto::scheduler::{
    self, controller_message as up, from_agent, scheduler_message as to_controller, to_agent, want,
};

use super::kit;
use super::*;

const AGENTS: u64 = 3;
const AGENT_CPUS: u64 = 4;

/// What an agent knows of itself; it outlives its streams.
#[derive(Debug, Default)]
struct Agent {
    /// Another machine with the same identity counts as another agent here; `instance` is its spool.
    instance: u64,
    held: BTreeMap<AttemptId, HeldState>,
    /// What it was told to reserve, of each attempt it ever had.
    reserved: BTreeMap<AttemptId, agent::Resources>,
    stream: Option<AgentStream>,
}

#[derive(Debug)]
struct AgentStream {
    session: SessionId,
    number: Option<agent::DesiredNumber>,
    to_agent: VecDeque<down::Body>,
    to_scheduler: VecDeque<agent_message::Body>,
}

#[derive(Debug, Default)]
struct ControllerStream {
    id: u64,
    to_controller: VecDeque<to_controller::Body>,
    to_scheduler: VecDeque<up::Body>,
}

/// What the controller's table says of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Queued { cpu: u64 },
    Claimed { agent: u64, instance: u64, cpu: u64, cancelled: bool },
    Gone,
}

/// What a session is wanted to do, as far as the scheduler has said and not been answered otherwise.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    counter: u64,
    cpu: u64,
    is_run: bool,
}

struct World {
    now: Duration,
    scheduler: Scheduler,
    /// Their position is their number; several can be instances of one identity.
    agents: Vec<Agent>,
    controller: Option<ControllerStream>,
    truth: BTreeMap<AttemptId, Truth>,
    /// What was last delivered to the scheduler.
    stated: BTreeMap<AttemptId, Truth>,
    current: BTreeMap<u64, u64>,
    /// As delivered to the scheduler.
    stated_current: BTreeMap<AgentId, InstanceId>,
    epoch: u64,
    ids: u64,
    wanted: BTreeMap<SessionId, BTreeMap<AttemptId, Wanted>>,
    delivered_held: BTreeMap<SessionId, BTreeMap<AttemptId, HeldState>>,
    identities: BTreeMap<SessionId, (AgentId, InstanceId)>,
}

/// Agents 0, 1, 2 have their own identities; 3 is another instance of agent 0.
fn identity(position: usize) -> u64 {
    position as u64 % AGENTS
}

impl World {
    fn new() -> Self {
        let settings = Settings { silence: Duration::MAX / 4, ..Settings::default() };
        Self {
            now: Duration::ZERO,
            scheduler: Scheduler::new(settings, kit::INCARNATION),
            agents: (0..AGENTS + 1).map(|n| Agent { instance: n + 1, ..Agent::default() }).collect(),
            controller: None,
            truth: BTreeMap::new(),
            stated: BTreeMap::new(),
            current: BTreeMap::new(),
            stated_current: BTreeMap::new(),
            epoch: 0,
            ids: 0,
            wanted: BTreeMap::new(),
            delivered_held: BTreeMap::new(),
            identities: BTreeMap::new(),
        }
    }

    fn next(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    fn input(&mut self, input: Input) {
        self.scheduler.handle(self.now, input);
        self.settle();
    }

    fn settle(&mut self) {
        self.scheduler.settle(self.now);
        for output in self.scheduler.take_outputs() {
            self.output(output);
        }
        self.check();
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.settle();
    }

    // ---- what comes out

    fn output(&mut self, output: Output) {
        match output {
            Output::ToAgent { session, message } => {
                if let down::Body::Desired(desired) = &message {
                    self.note_desired(session, desired);
                }
                for agent in &mut self.agents {
                    if let Some(stream) = agent.stream.as_mut().filter(|stream| stream.session == session) {
                        stream.to_agent.push_back(message.clone());
                    }
                }
            }
            Output::EndAgent { session, .. } => self.cut(session),
            Output::ToController { controller, message } => {
                if let Some(stream) = self.controller.as_mut().filter(|stream| stream.id == controller.0) {
                    stream.to_controller.push_back(message);
                }
            }
            Output::EndController { ended, .. } => panic!("the controller was cut off: {ended}"),
            Output::Enrolled { .. } => {}
        }
    }

    fn note_desired(&mut self, session: SessionId, desired: &agent::Desired) {
        let counter = desired.number.as_ref().unwrap().counter;
        for entry in &desired.entries {
            let attempt = sealci_proto::attempt_id(&entry.attempt).unwrap();
            let wanted = self.wanted.entry(session).or_default();
            match entry.wish.as_ref().unwrap() {
                desired_entry::Wish::Drop(_) => {
                    wanted.remove(&attempt);
                    let claimed_here = match self.stated.get(&attempt) {
                        Some(Truth::Claimed { agent, instance, .. }) => {
                            self.identities.get(&session)
                                == Some(&(kit::agent_id(*agent), kit::instance_id(*instance)))
                        }
                        _ => false,
                    };
                    assert!(!claimed_here, "{attempt} is dropped where it is claimed");
                }
                desired_entry::Wish::Run(run) => {
                    let cpu = run.reserved.as_ref().unwrap().cpu_millis;
                    wanted.insert(attempt, Wanted { counter, cpu, is_run: true });
                    self.check_run(session, attempt);
                }
                desired_entry::Wish::Keep(_) | desired_entry::Wish::Cancel(_) => {
                    wanted.entry(attempt).or_insert(Wanted { counter, cpu: 0, is_run: false });
                }
            }
        }
    }

    fn check_run(&self, session: SessionId, attempt: AttemptId) {
        assert!(matches!(self.stated.get(&attempt), Some(Truth::Queued { .. })), "{attempt} is not queued");
        let (agent, instance) = self.identities[&session];
        assert_eq!(self.stated_current.get(&agent), Some(&instance), "only the current instance gets work");
        assert!(self.delivered_held.contains_key(&session), "it has not said what it holds");
        for (other, held) in &self.delivered_held {
            let state = held.get(&attempt);
            let is_claimed = matches!(state, Some(HeldState::Claimed | HeldState::Running));
            assert!(*other == session || !is_claimed, "{attempt} is claimed by another that is connected");
        }
    }

    fn check(&self) {
        let mut wanted_by: BTreeMap<AttemptId, Vec<SessionId>> = BTreeMap::new();
        for (session, wanted) in &self.wanted {
            for attempt in wanted.keys() {
                wanted_by.entry(*attempt).or_default().push(*session);
            }
        }
        for (attempt, sessions) in wanted_by {
            assert!(sessions.len() <= 1, "{attempt} is wanted by {sessions:?}");
        }
        for (session, wanted) in &self.wanted {
            let cpu: u64 = wanted.values().filter(|wanted| wanted.is_run).map(|wanted| wanted.cpu).sum();
            assert!(cpu <= AGENT_CPUS * 1000, "{session:?} is asked to run more than it can");
        }
    }

    /// Nothing fails any more: everything that is wanted must come to its end.
    fn all_ends_well(&mut self) {
        for position in 0..self.agents.len() {
            self.connect(position);
        }
        self.connect_controller();
        for _ in 0..200 {
            self.deliver_all();
            let connected: BTreeSet<_> = self.agents.iter().map(|agent| agent.instance).collect();
            let lost: Vec<_> = self
                .truth
                .iter()
                .filter(|(_, truth)| {
                    matches!(truth, Truth::Claimed { instance, .. } if !connected.contains(instance))
                })
                .map(|(attempt, _)| *attempt)
                .collect();
            for attempt in lost {
                self.lose(attempt);
            }
            for position in 0..self.agents.len() {
                self.agent_works(position);
            }
            self.deliver_all();
            if self.truth.values().all(|truth| *truth == Truth::Gone) {
                return self.check_nothing_is_left();
            }
            self.pass(Duration::from_secs(40));
        }
        panic!("it does not end: {:?}", self.truth);
    }

    fn deliver_all(&mut self) {
        let mut delivered = true;
        while delivered {
            delivered = self.deliver_from_controller() | self.deliver_to_controller();
            for position in 0..self.agents.len() {
                delivered |= self.deliver_down(position) | self.deliver_up(position);
            }
        }
    }

    fn check_nothing_is_left(&mut self) {
        for position in 0..self.agents.len() {
            self.agent_works(position);
            self.deliver_all();
            assert!(self.agents[position].held.is_empty());
        }
        assert!(self.scheduler.wants.is_empty());
        assert!(self.scheduler.placement.queue().is_empty());
        for agent in self.scheduler.placement.pool().agents().values() {
            assert_eq!(agent.available().cpu_millis, AGENT_CPUS * 1000, "room was never given back");
        }
        for session in self.scheduler.sessions.values() {
            assert_eq!(session.asked().count(), 0, "something is still being asked for");
        }
    }
}

/// Three attempts to the pipeline.
fn pipeline_of(attempt: AttemptId) -> u64 {
    (attempt.action.as_uuid().as_u128() >> 80) as u64 / 3
}

fn wire(truth: Truth, attempt: AttemptId) -> want::State {
    let n = (attempt.action.as_uuid().as_u128() >> 80) as u64;
    let made = match truth {
        Truth::Queued { cpu } => kit::queued(n, cpu),
        Truth::Claimed { agent, instance, cancelled, .. } => {
            kit::claimed(n, agent, instance, cancelled.then_some(1))
        }
        Truth::Gone => kit::gone(n),
    };
    made.state.unwrap()
}

#[derive(Debug, Clone)]
enum Step {
    Connect(usize),
    Disconnect(usize),
    Crash(usize),
    RenewInstance(usize),
    Down(usize),
    Up(usize),
    Work(usize),
    ConnectController,
    DisconnectController,
    ToController,
    FromController,
    Add(u64),
    Cancel(prop::sample::Index),
    Pass(u64),
    DeliverAll,
}

fn step() -> impl Strategy<Value = Step> {
    let agent = 0..AGENTS as usize + 1;
    prop_oneof![
        3 => agent.clone().prop_map(Step::Connect),
        1 => agent.clone().prop_map(Step::Disconnect),
        1 => agent.clone().prop_map(Step::Crash),
        1 => agent.clone().prop_map(Step::RenewInstance),
        8 => agent.clone().prop_map(Step::Down),
        10 => agent.clone().prop_map(Step::Up),
        2 => agent.prop_map(Step::Work),
        1 => Just(Step::ConnectController),
        1 => Just(Step::DisconnectController),
        8 => Just(Step::ToController),
        10 => Just(Step::FromController),
        4 => (1..=AGENT_CPUS).prop_map(Step::Add),
        1 => any::<prop::sample::Index>().prop_map(Step::Cancel),
        1 => (1..20_u64).prop_map(Step::Pass),
        2 => Just(Step::DeliverAll),
    ]
}

fn take(world: &mut World, step: Step) {
    match step {
        Step::Connect(position) => world.connect(position),
        Step::Disconnect(position) => world.disconnect(position),
        Step::Crash(position) => world.crash(position),
        Step::RenewInstance(position) => world.renew_instance(position),
        Step::Down(position) => drop(world.deliver_down(position)),
        Step::Up(position) => drop(world.deliver_up(position)),
        Step::Work(position) => world.agent_works(position),
        Step::ConnectController => world.connect_controller(),
        Step::DisconnectController => world.disconnect_controller(),
        Step::ToController => drop(world.deliver_to_controller()),
        Step::FromController => drop(world.deliver_from_controller()),
        Step::Add(cpu) => world.add(cpu),
        Step::Cancel(index) if !world.truth.is_empty() => {
            let attempt = *index.get(&world.truth.keys().copied().collect::<Vec<_>>());
            world.cancel(attempt);
        }
        Step::Cancel(_) => {}
        Step::Pass(seconds) => world.pass(Duration::from_secs(seconds)),
        Step::DeliverAll => world.deliver_all(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_leads_astray(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        world.connect_controller();
        for step in steps {
            take(&mut world, step);
        }
        world.all_ends_well();
    }
}
