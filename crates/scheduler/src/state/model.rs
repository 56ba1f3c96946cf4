//! Lets agents, controllers and the scheduler meet in any order, and checks what must never happen and what must happen
//! in the end.
//!
//! The peers here are as simple as the contract allows: an agent runs what it is asked to and asks for claims, a
//! controller keeps one table of attempts and grants the first claim. Every stream is a queue in each direction, so
//! messages cross, and are lost with their stream.

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

    // ---- agents

    fn connect(&mut self, position: usize) {
        self.disconnect(position);
        let session = SessionId(self.next());
        let agent = &mut self.agents[position];
        let (identity, instance) = (identity(position), agent.instance);
        let to_scheduler = VecDeque::new();
        let to_agent = VecDeque::new();
        agent.stream = Some(AgentStream { session, number: None, to_agent, to_scheduler });
        self.agent_says_held(position);
        let id = kit::agent_id(identity);
        self.identities.insert(session, (id, kit::instance_id(instance)));
        let hello = agent::Hello { offer: Some(kit::offer(AGENT_CPUS, 8)), ..kit::hello(instance) };
        let credential_sha256 = [identity as u8; 32];
        self.input(Input::AgentArrived { session, agent: id, credential_sha256, hello });
    }

    fn disconnect(&mut self, position: usize) {
        if let Some(session) = self.agents[position].stream.as_ref().map(|stream| stream.session) {
            self.cut(session);
            self.input(Input::AgentGone { session });
        }
    }

    fn cut(&mut self, session: SessionId) {
        for agent in &mut self.agents {
            agent.stream.take_if(|stream| stream.session == session);
        }
        self.wanted.remove(&session);
        self.delivered_held.remove(&session);
    }

    /// Everything on it is lost, the spool included.
    fn crash(&mut self, position: usize) {
        self.disconnect(position);
        self.agents[position].held.clear();
    }

    fn renew_instance(&mut self, position: usize) {
        self.crash(position);
        self.agents[position].instance = 100 + self.next();
    }

    fn agent_says_held(&mut self, position: usize) {
        let agent = &mut self.agents[position];
        let attempts = agent
            .held
            .iter()
            .map(|(attempt, state)| agent::HeldAttempt {
                attempt: Some((*attempt).into()),
                state: (*state).into(),
                reserved: agent.reserved.get(attempt).copied(),
                ..Default::default()
            })
            .collect();
        if let Some(stream) = &mut agent.stream {
            let held = agent::Held { answers: stream.number, attempts };
            stream.to_scheduler.push_back(agent_message::Body::Held(held));
        }
    }

    /// The agent reads one message.
    fn deliver_down(&mut self, position: usize) -> bool {
        let Some(message) =
            self.agents[position].stream.as_mut().and_then(|stream| stream.to_agent.pop_front())
        else {
            return false;
        };
        match message {
            down::Body::Desired(desired) => {
                for entry in desired.entries {
                    self.agent_obeys(position, entry);
                }
                if let Some(stream) = &mut self.agents[position].stream {
                    stream.number = desired.number;
                }
                self.agent_says_held(position);
            }
            down::Body::ClaimAnswer(answer) => {
                let attempt = sealci_proto::attempt_id(&answer.attempt).unwrap();
                let held = &mut self.agents[position].held;
                match answer.answer.unwrap() {
                    agent::claim_answer::Answer::Granted(_) => {
                        if let Some(state) = held.get_mut(&attempt) {
                            *state = HeldState::Claimed;
                        }
                    }
                    agent::claim_answer::Answer::Refused(_) => drop(held.remove(&attempt)),
                }
                self.agent_says_held(position);
            }
            down::Body::Ack(ack) if ack.closed => {
                let attempt = sealci_proto::attempt_id(&ack.attempt).unwrap();
                self.agents[position].held.remove(&attempt);
                self.agent_says_held(position);
            }
            _ => {}
        }
        true
    }

    fn agent_obeys(&mut self, position: usize, entry: agent::DesiredEntry) {
        let attempt = sealci_proto::attempt_id(&entry.attempt).unwrap();
        let agent = &mut self.agents[position];
        match entry.wish.unwrap() {
            desired_entry::Wish::Run(run) => {
                agent.reserved.insert(attempt, run.reserved.unwrap());
                agent.held.entry(attempt).or_insert(HeldState::Assigned);
                self.agent_claims(position, attempt);
            }
            desired_entry::Wish::Drop(_) => drop(agent.held.remove(&attempt)),
            desired_entry::Wish::Cancel(_) => {
                if let Some(state) = agent.held.get_mut(&attempt) {
                    *state = HeldState::Finished;
                    self.agent_reports_end(position, attempt);
                }
            }
            desired_entry::Wish::Keep(_) => {}
        }
    }

    fn agent_claims(&mut self, position: usize, attempt: AttemptId) {
        if let Some(stream) = &mut self.agents[position].stream {
            let claim = agent::Claim { attempt: Some(attempt.into()), claim_id: String::new() };
            stream.to_scheduler.push_back(agent_message::Body::Claim(claim));
        }
    }

    fn agent_reports_end(&mut self, position: usize, attempt: AttemptId) {
        if let Some(stream) = &mut self.agents[position].stream {
            let event = agent::Event { attempt: Some(attempt.into()), token: 1, ..Default::default() };
            stream.to_scheduler.push_back(agent_message::Body::Event(event));
        }
    }

    /// The agent repeats what was not answered, and finishes what it has claimed.
    fn agent_works(&mut self, position: usize) {
        let held: Vec<_> = self.agents[position].held.iter().map(|(id, state)| (*id, *state)).collect();
        for (attempt, state) in held {
            if state == HeldState::Assigned {
                self.agent_claims(position, attempt);
            } else {
                self.agents[position].held.insert(attempt, HeldState::Finished);
                self.agent_reports_end(position, attempt);
            }
        }
        self.agent_says_held(position);
    }

    /// The scheduler reads one message of the agent.
    fn deliver_up(&mut self, position: usize) -> bool {
        let Some(stream) = &mut self.agents[position].stream else { return false };
        // It is not admitted yet: nobody reads.
        if !self.scheduler.sessions.contains_key(&stream.session) {
            return false;
        }
        let Some(message) = stream.to_scheduler.pop_front() else { return false };
        let session = stream.session;
        if let agent_message::Body::Held(held) = &message {
            let attempts: BTreeMap<_, _> = held
                .attempts
                .iter()
                .map(|held| (sealci_proto::attempt_id(&held.attempt).unwrap(), held.state()))
                .collect();
            if let (Some(answers), Some(wanted)) = (&held.answers, self.wanted.get_mut(&session)) {
                wanted.retain(|attempt, wanted| {
                    attempts.contains_key(attempt) || wanted.counter > answers.counter
                });
            }
            self.delivered_held.insert(session, attempts);
        }
        self.input(Input::FromAgent { session, message });
        true
    }

    // ---- the controller

    fn connect_controller(&mut self) {
        self.disconnect_controller();
        let id = self.next();
        self.epoch += 1;
        self.controller = Some(ControllerStream { id, ..Default::default() });
        let replica_id = ReplicaId::from_parts(id, &[5; 10]).to_string();
        let hello = scheduler::Hello { protocol_min: 1, protocol_max: 1, replica_id };
        self.input(Input::ControllerArrived { controller: ControllerId(id), hello });
        let agents = (0..AGENTS).map(|agent| self.entry(agent)).collect();
        self.state(up::Body::Directory(scheduler::Directory { complete: true, agents }));
        let mut unfinished: Vec<_> = self
            .truth
            .iter()
            .filter(|(_, truth)| **truth != Truth::Gone)
            .map(|(attempt, _)| pipeline_of(*attempt))
            .collect();
        unfinished.dedup();
        let pipelines = unfinished
            .iter()
            .map(|pipeline| scheduler::PipelineEpoch {
                pipeline_id: kit::pipeline_id(*pipeline).to_string(),
                epoch: self.epoch,
            })
            .collect();
        self.state(up::Body::Snapshot(scheduler::Snapshot { pipelines }));
        for pipeline in unfinished {
            let attempts: Vec<_> =
                self.truth.keys().copied().filter(|attempt| pipeline_of(*attempt) == pipeline).collect();
            self.state_wants(pipeline, true, &attempts);
        }
    }

    fn entry(&self, agent: u64) -> scheduler::DirectoryEntry {
        kit::entry(agent, self.current.get(&agent).copied())
    }

    fn disconnect_controller(&mut self) {
        if let Some(stream) = self.controller.take() {
            self.input(Input::ControllerGone { controller: ControllerId(stream.id) });
        }
    }

    fn state(&mut self, message: up::Body) {
        if let Some(stream) = &mut self.controller {
            stream.to_scheduler.push_back(message);
        }
    }

    fn state_wants(&mut self, pipeline: u64, complete: bool, attempts: &[AttemptId]) {
        let attempts = attempts
            .iter()
            .map(|attempt| scheduler::Want {
                attempt: Some((*attempt).into()),
                state: Some(wire(self.truth[attempt], *attempt)),
            })
            .collect();
        let pipeline_id = kit::pipeline_id(pipeline).to_string();
        let wants = scheduler::Wants { pipeline_id, epoch: self.epoch, complete, attempts };
        self.state(up::Body::Wants(wants));
    }

    fn set_truth(&mut self, attempt: AttemptId, truth: Truth) {
        self.truth.insert(attempt, truth);
        self.state_wants(pipeline_of(attempt), false, &[attempt]);
    }

    fn add(&mut self, cpu: u64) {
        let n = self.next();
        self.set_truth(kit::attempt_id(n), Truth::Queued { cpu });
    }

    fn lose(&mut self, attempt: AttemptId) {
        if let Some(Truth::Claimed { cpu, cancelled, .. }) = self.truth.get(&attempt).copied() {
            self.set_truth(attempt, Truth::Gone);
            if !cancelled {
                let next = AttemptId { number: attempt.number + 1, ..attempt };
                self.set_truth(next, Truth::Queued { cpu });
            }
        }
    }

    fn cancel(&mut self, attempt: AttemptId) {
        match self.truth.get(&attempt).copied() {
            Some(Truth::Queued { .. }) => self.set_truth(attempt, Truth::Gone),
            Some(Truth::Claimed { agent, instance, cpu, .. }) => {
                self.set_truth(attempt, Truth::Claimed { agent, instance, cpu, cancelled: true });
            }
            _ => {}
        }
    }

    /// The controller reads one message.
    fn deliver_to_controller(&mut self) -> bool {
        let Some(message) = self.controller.as_mut().and_then(|stream| stream.to_controller.pop_front())
        else {
            return false;
        };
        match message {
            to_controller::Body::AgentState(state) if state.connected => self.see_instance(&state),
            to_controller::Body::FromAgent(from) => self.answer(from),
            to_controller::Body::Absent(absent) => {
                let attempt = sealci_proto::attempt_id(&absent.attempt).unwrap();
                let by = (absent.agent_id, absent.instance_id);
                if self.claimant(attempt) == Some(by) {
                    let (agent, instance) = match self.truth[&attempt] {
                        Truth::Claimed { agent, instance, .. } => (agent, instance),
                        _ => unreachable!(),
                    };
                    let has_it = (0..self.agents.len()).any(|position| {
                        let one = &self.agents[position];
                        identity(position) == agent
                            && one.instance == instance
                            && one.held.contains_key(&attempt)
                    });
                    assert!(!has_it, "{attempt} is called absent where it is held");
                    self.lose(attempt);
                }
            }
            _ => {}
        }
        true
    }

    fn see_instance(&mut self, state: &scheduler::AgentState) {
        let Some(position) = (0..self.agents.len()).find(|position| {
            kit::instance_id(self.agents[*position].instance).to_string() == state.instance_id
        }) else {
            return;
        };
        let (agent, instance) = (identity(position), self.agents[position].instance);
        let is_new = self.current.get(&agent).is_none_or(|current| *current < instance);
        if is_new {
            self.current.insert(agent, instance);
            let agents = vec![self.entry(agent)];
            self.state(up::Body::Directory(scheduler::Directory { complete: false, agents }));
        }
    }

    fn claimant(&self, attempt: AttemptId) -> Option<(String, String)> {
        match self.truth.get(&attempt)? {
            Truth::Claimed { agent, instance, .. } => {
                Some((kit::agent_id(*agent).to_string(), kit::instance_id(*instance).to_string()))
            }
            _ => None,
        }
    }

    fn answer(&mut self, from: scheduler::FromAgent) {
        let by = (from.agent_id.clone(), from.instance_id.clone());
        let body = match from.body.unwrap() {
            from_agent::Body::Claim(claim) => {
                let attempt = sealci_proto::attempt_id(&claim.attempt).unwrap();
                let position = (0..self.agents.len())
                    .find(|position| kit::instance_id(self.agents[*position].instance).to_string() == by.1);
                if let (Some(Truth::Queued { cpu }), Some(position)) =
                    (self.truth.get(&attempt).copied(), position)
                {
                    let (agent, instance) = (identity(position), self.agents[position].instance);
                    self.set_truth(attempt, Truth::Claimed { agent, instance, cpu, cancelled: false });
                }
                let answer = if self.claimant(attempt) == Some(by) {
                    let granted = agent::ClaimGranted { token: 1, sealed_secrets: vec![] };
                    agent::claim_answer::Answer::Granted(granted)
                } else {
                    agent::claim_answer::Answer::Refused(agent::ClaimRefused::default())
                };
                let attempt = claim.attempt;
                to_agent::Body::ClaimAnswer(agent::ClaimAnswer {
                    attempt,
                    answer: Some(answer),
                    ..Default::default()
                })
            }
            from_agent::Body::Event(event) => {
                let attempt = sealci_proto::attempt_id(&event.attempt).unwrap();
                if self.claimant(attempt) == Some(by) {
                    self.set_truth(attempt, Truth::Gone);
                }
                to_agent::Body::Ack(agent::Ack { attempt: event.attempt, closed: true, ..Default::default() })
            }
            from_agent::Body::LogChunk(_) => return,
        };
        self.state(up::Body::ToAgent(scheduler::ToAgent { session: from.session, body: Some(body) }));
    }

    /// The scheduler reads one message of the controller.
    fn deliver_from_controller(&mut self) -> bool {
        let Some((id, message)) =
            self.controller.as_mut().and_then(|stream| Some((stream.id, stream.to_scheduler.pop_front()?)))
        else {
            return false;
        };
        match &message {
            up::Body::Directory(directory) => {
                for entry in &directory.agents {
                    if let Ok(instance) = entry.current_instance_id.parse() {
                        self.stated_current.insert(entry.agent_id.parse().unwrap(), instance);
                    }
                }
            }
            up::Body::Wants(wants) => {
                for want in &wants.attempts {
                    let attempt = sealci_proto::attempt_id(&want.attempt).unwrap();
                    self.stated.insert(attempt, self.read(want));
                }
            }
            _ => {}
        }
        self.input(Input::FromController { controller: ControllerId(id), message });
        true
    }

    fn read(&self, wire: &scheduler::Want) -> Truth {
        match wire.state.as_ref().unwrap() {
            want::State::Queued(_) => Truth::Queued { cpu: 0 },
            want::State::Gone(_) => Truth::Gone,
            want::State::Claimed(claimed) => {
                let find = |numbers: Vec<u64>, text: &str, name: fn(u64) -> String| {
                    numbers.into_iter().find(|n| name(*n) == text).unwrap_or(u64::MAX)
                };
                let agent = find((0..AGENTS).collect(), &claimed.agent_id, |n| kit::agent_id(n).to_string());
                let instances = self.agents.iter().map(|agent| agent.instance).collect();
                let instance = find(instances, &claimed.instance_id, |n| kit::instance_id(n).to_string());
                Truth::Claimed { agent, instance, cpu: 0, cancelled: claimed.cancel.is_some() }
            }
        }
    }

    // ---- the end

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
