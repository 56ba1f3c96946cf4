//! Plays the schedulers: the real state machine, handed what arrives.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng;
use sealci_proto::agent::{AgentMessage, agent_message, scheduler_message as to_agent};
use sealci_proto::scheduler::{ControllerMessage, controller_message};
use sealci_scheduler::state::{
    ControllerId, CreditLimits, EnrolId, Input, Output, Scheduler, SessionId, Settings,
};

use crate::line::{Packet, Party, Way};
use crate::world::{Event, LineRef, World};

/// One scheduler's place; its process may be dead.
#[derive(Default)]
pub struct SimScheduler {
    pub process: Option<Scheduler>,
    /// The agents' streams, by what the scheduler calls them.
    pub sessions: BTreeMap<SessionId, usize>,
    pub streams: BTreeMap<ControllerId, usize>,
    /// Who asked to be enrolled: the agent and its process.
    pub enrols: BTreeMap<EnrolId, (usize, u64)>,
    due: Option<Duration>,
}

impl SimScheduler {
    fn session_of(&self, line: usize) -> Option<SessionId> {
        self.sessions.iter().find(|(_, of)| **of == line).map(|(session, _)| *session)
    }

    fn stream_of(&self, line: usize) -> Option<ControllerId> {
        self.streams.iter().find(|(_, of)| **of == line).map(|(stream, _)| *stream)
    }
}

/// A tenth, or so, of the usual periods; and credit so short that logs wait for it.
fn settings() -> Settings {
    Settings {
        held_interval: Duration::from_millis(2000),
        silence: Duration::from_secs(7),
        directory_wait: Duration::from_secs(6),
        deserted_after: Duration::from_secs(3),
        supersede_after: Duration::from_millis(1000),
        enrol_timeout: Duration::from_secs(2),
        settle_at_most: Duration::from_millis(500),
        credit: CreditLimits { pool_bytes: 160 << 10, session_bytes: 48 << 10, minimum_bytes: 4 << 10 },
        ..Settings::default()
    }
}

fn index_of(party: Party) -> usize {
    match party {
        Party::Agent(index) | Party::Controller(index) | Party::Scheduler(index) => index,
    }
}

impl World {
    pub fn start_scheduler(&mut self, index: usize) {
        if self.schedulers[index].process.is_some() {
            return;
        }
        let incarnation = self.dice.random();
        self.schedulers[index] = SimScheduler::default();
        self.schedulers[index].process = Some(Scheduler::new(settings(), incarnation));
        self.note(&format!("scheduler {index} starts"));
    }

    pub fn kill_scheduler(&mut self, index: usize, for_ms: u64) {
        if self.schedulers[index].process.take().is_none() {
            return;
        }
        self.note(&format!("scheduler {index} dies"));
        self.close_all_of(Party::Scheduler(index));
        self.in_ms(for_ms, Event::SchedulerStarts(index));
    }

    pub fn scheduler_hears_agent(&mut self, line: usize, packet: Packet<AgentMessage>) {
        let index = index_of(self.agent_lines[line].scheduler);
        if !self.agent_lines[line].up.is_open || self.schedulers[index].process.is_none() {
            return;
        }
        let session = self.schedulers[index].session_of(line);
        let input = match (packet, session) {
            (Packet::Closed(_), session) => {
                self.close(LineRef::Agent(line), Way::Up, false, "");
                let Some(session) = session else { return };
                self.schedulers[index].sessions.remove(&session);
                Input::AgentGone { session }
            }
            (Packet::Message(message), None) => {
                let Some(agent_message::Body::Hello(hello)) = message.body else { return };
                let session = SessionId(self.id());
                self.schedulers[index].sessions.insert(session, line);
                let agent = &self.agents[index_of(self.agent_lines[line].caller)];
                Input::AgentArrived {
                    session,
                    agent: agent.id,
                    credential_sha256: agent.credential_sha256,
                    hello,
                }
            }
            (Packet::Message(message), Some(session)) => {
                let Some(body) = message.body else { return };
                let agent = index_of(self.agent_lines[line].caller);
                self.note_agent_message(agent, index, &body);
                Input::FromAgent { session, message: body }
            }
        };
        self.give(index, input);
    }

    pub fn scheduler_hears_controller(&mut self, line: usize, packet: Packet<ControllerMessage>) {
        let index = index_of(self.controller_lines[line].scheduler);
        if !self.controller_lines[line].up.is_open || self.schedulers[index].process.is_none() {
            return;
        }
        let stream = self.schedulers[index].stream_of(line);
        let input = match (packet, stream) {
            (Packet::Closed(_), stream) => {
                self.close(LineRef::Controller(line), Way::Up, false, "");
                let Some(controller) = stream else { return };
                self.schedulers[index].streams.remove(&controller);
                Input::ControllerGone { controller }
            }
            (Packet::Message(message), None) => {
                let Some(controller_message::Body::Hello(hello)) = message.body else { return };
                let controller = ControllerId(self.id());
                self.schedulers[index].streams.insert(controller, line);
                Input::ControllerArrived { controller, hello }
            }
            (Packet::Message(message), Some(controller)) => {
                let Some(message) = message.body else { return };
                Input::FromController { controller, message }
            }
        };
        self.give(index, input);
    }

    /// Hands something in; what follows from it is decided at once, or together with what comes right after it.
    pub fn give(&mut self, index: usize, input: Input) {
        let now = self.now;
        let Some(scheduler) = &mut self.schedulers[index].process else { return };
        scheduler.handle(now, input);
        if self.dice.random_bool(0.7) {
            self.settle(index);
        } else {
            let ms = self.dice.random_range(1..8);
            self.in_ms(ms, Event::SchedulerDue(index));
        }
    }

    pub fn settle(&mut self, index: usize) {
        let now = self.now;
        let Some(scheduler) = &mut self.schedulers[index].process else { return };
        scheduler.settle(now);
        let outputs = scheduler.take_outputs();
        let deadline = scheduler.deadline();
        for output in outputs {
            self.scheduler_says(index, output);
        }
        if let Some(deadline) = deadline.filter(|deadline| self.schedulers[index].due != Some(*deadline)) {
            self.schedulers[index].due = Some(deadline);
            // A timer is due when its moment is reached, not before.
            self.at(deadline.max(now + Duration::from_millis(1)), Event::SchedulerDue(index));
        }
    }

    fn scheduler_says(&mut self, index: usize, output: Output) {
        match output {
            Output::ToAgent { session, message } => {
                let Some(line) = self.schedulers[index].sessions.get(&session).copied() else { return };
                self.note_answer(line, &message);
                self.agent_lines[line].down.packets.push_back(Packet::Message(message));
                self.fetch(LineRef::Agent(line), Way::Down);
            }
            Output::EndAgent { session, ended } => {
                let Some(line) = self.schedulers[index].sessions.remove(&session) else { return };
                self.note(&format!("scheduler {index} ends an agent's stream: {}", kind_of(&ended)));
                self.end_by_scheduler(LineRef::Agent(line), &ended.to_string());
            }
            Output::ToController { controller, message } => {
                let Some(line) = self.schedulers[index].streams.get(&controller).copied() else { return };
                self.controller_lines[line].down.packets.push_back(Packet::Message(message));
                self.fetch(LineRef::Controller(line), Way::Down);
            }
            Output::EndController { controller, ended } => {
                let Some(line) = self.schedulers[index].streams.remove(&controller) else { return };
                self.note(&format!("scheduler {index} ends a controller's stream: {}", kind_of(&ended)));
                self.end_by_scheduler(LineRef::Controller(line), &ended.to_string());
            }
            Output::Enrolled { request, result } => {
                let Some((agent, process)) = self.schedulers[index].enrols.remove(&request) else { return };
                let ms = self.dice.random_range(1..50);
                let is_enrolled = result.is_ok();
                self.note(&format!("scheduler {index} answers agent {agent}: enrolled {is_enrolled}"));
                self.in_ms(ms, Event::EnrolAnswered { agent, process, is_enrolled });
            }
        }
    }

    fn end_by_scheduler(&mut self, line: LineRef, why: &str) {
        match line {
            LineRef::Agent(index) => self.agent_lines[index].close(Way::Up, usize::MAX, true, why),
            LineRef::Controller(index) => self.controller_lines[index].close(Way::Up, usize::MAX, true, why),
        }
        self.fetch(line, Way::Down);
    }

    pub fn enrol_arrives(&mut self, agent: usize, process: u64, scheduler: usize) {
        let cut = self.is_cut(Party::Agent(agent), Party::Scheduler(scheduler));
        if cut || self.schedulers[scheduler].process.is_none() || self.agents[agent].number() != Some(process)
        {
            return;
        }
        let Some(enrol) = self.agents[agent].enrolment() else { return };
        let request = EnrolId(self.id());
        self.schedulers[scheduler].enrols.insert(request, (agent, process));
        self.give(scheduler, Input::Enrol { request, enrol });
    }

    /// What an agent was told, as the oracle and the trace have it.
    fn note_answer(&mut self, line: usize, message: &to_agent::Body) {
        let agent = index_of(self.agent_lines[line].caller);
        self.note_said_to_agent(agent, message);
    }
}

/// What kind of end, without the figures and ids in it.
fn kind_of(ended: &sealci_scheduler::state::Ended) -> String {
    let text = format!("{ended:?}");
    text.split([' ', '(', '{']).next().unwrap_or_default().to_owned()
}
