//! Makes the messages of scripted peers, and takes what comes out of the scheduler apart.

use std::time::Duration;

use sealci_core::ids::{ActionId, AgentId, AttemptId, InstanceId, PipelineId, ReplicaId};
use sealci_core::plan::Resources;
use sealci_proto::agent::{self, HeldState, agent_message, desired_entry, scheduler_message as down};
use sealci_proto::scheduler::{self, controller_message as up, scheduler_message as to_controller, want};

use super::*;

pub const INCARNATION: u64 = 77;

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

pub fn offer(cpu: u64, slots: u32) -> agent::Offer {
    agent::Offer {
        capacity: Some(agent::Resources { cpu_millis: cpu * 1000, memory_bytes: 64 << 30 }),
        executors: vec!["sandbox".into()],
        accepting: true,
        slots,
        ..Default::default()
    }
}

pub fn hello(instance: u64) -> agent::Hello {
    agent::Hello {
        protocol_min: 1,
        protocol_max: 1,
        instance_id: instance_id(instance).to_string(),
        version: "0.1.0".into(),
        offer: Some(offer(4, 4)),
    }
}

pub fn entry(agent: u64, instance: Option<u64>) -> scheduler::DirectoryEntry {
    scheduler::DirectoryEntry {
        agent_id: agent_id(agent).to_string(),
        name: format!("agent-{agent}"),
        credential_sha256: vec![agent as u8; 32],
        current_instance_id: instance.map(|n| instance_id(n).to_string()).unwrap_or_default(),
        drained: false,
        removed: false,
    }
}

pub fn queued(n: u64, cpu: u64) -> scheduler::Want {
    let resources = Resources { cpu_millis: cpu * 1000, memory_bytes: 1 << 30 };
    scheduler::Want {
        attempt: Some(attempt_id(n).into()),
        state: Some(want::State::Queued(scheduler::WantQueued {
            requirements: Some(scheduler::Requirements {
                resources: Some(resources.into()),
                ..Default::default()
            }),
            priority: 0,
            order: n,
            repository: "r".into(),
            spec: vec![n as u8],
            exclusive: false,
        })),
    }
}

pub fn claimed(n: u64, agent: u64, instance: u64, cancel: Option<u64>) -> scheduler::Want {
    scheduler::Want {
        attempt: Some(attempt_id(n).into()),
        state: Some(want::State::Claimed(scheduler::WantClaimed {
            agent_id: agent_id(agent).to_string(),
            instance_id: instance_id(instance).to_string(),
            cancel: cancel.map(|grace_ms| agent::Cancel { grace_ms }),
        })),
    }
}

pub fn gone(n: u64) -> scheduler::Want {
    scheduler::Want {
        attempt: Some(attempt_id(n).into()),
        state: Some(want::State::Gone(scheduler::WantGone {})),
    }
}

pub fn held_attempt(n: u64, state: HeldState) -> agent::HeldAttempt {
    agent::HeldAttempt {
        attempt: Some(attempt_id(n).into()),
        state: state.into(),
        reserved: Some(agent::Resources { cpu_millis: 1000, memory_bytes: 1 << 30 }),
        ..Default::default()
    }
}

/// A scheduler with a clock that stands still unless told otherwise.
pub struct Bench {
    pub scheduler: Scheduler,
    pub now: Duration,
    outputs: Vec<Output>,
}

/// What an agent was told, in short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    Run(u64),
    Keep(u64),
    Cancel(u64),
    Drop(u64),
    Superseded,
    Welcome,
}

impl Bench {
    pub fn new() -> Self {
        let scheduler = Scheduler::new(Settings::default(), INCARNATION);
        Self { scheduler, now: Duration::ZERO, outputs: Vec::new() }
    }

    pub fn input(&mut self, input: Input) {
        self.scheduler.handle(self.now, input);
        self.settle();
    }

    fn settle(&mut self) {
        self.scheduler.settle(self.now);
        self.outputs.extend(self.scheduler.take_outputs());
    }

    pub fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.scheduler.deadline().filter(|deadline| *deadline <= end) {
            self.now = self.now.max(deadline);
            self.settle();
        }
        self.now = end;
    }

    // ---- agents

    pub fn agent(&mut self, session: u64, agent: u64, instance: u64) {
        self.agent_says_hello(session, agent, hello(instance));
    }

    pub fn agent_says_hello(&mut self, session: u64, agent: u64, hello: agent::Hello) {
        let credential_sha256 = [agent as u8; 32];
        let (session, agent) = (SessionId(session), agent_id(agent));
        self.input(Input::AgentArrived { session, agent, credential_sha256, hello });
    }

    pub fn held(&mut self, session: u64, answers: Option<u64>, attempts: &[(u64, HeldState)]) {
        self.held_of(session, answers.map(|counter| (INCARNATION, session, counter)), attempts);
    }

    pub fn held_of(&mut self, session: u64, answers: Option<(u64, u64, u64)>, attempts: &[(u64, HeldState)]) {
        let answers = answers.map(|(incarnation, stream, counter)| agent::DesiredNumber {
            incarnation,
            stream,
            counter,
        });
        let attempts = attempts.iter().map(|(n, state)| held_attempt(*n, *state)).collect();
        self.says(session, agent_message::Body::Held(agent::Held { answers, attempts }));
    }

    pub fn says(&mut self, session: u64, message: agent_message::Body) {
        self.input(Input::FromAgent { session: SessionId(session), message });
    }

    pub fn chunk(&mut self, session: u64, n: u64, bytes: usize) {
        self.says(
            session,
            agent_message::Body::LogChunk(agent::LogChunk {
                attempt: Some(attempt_id(n).into()),
                data: vec![0; bytes].into(),
                ..Default::default()
            }),
        );
    }

    pub fn agent_goes(&mut self, session: u64) {
        self.input(Input::AgentGone { session: SessionId(session) });
    }

    /// What a session was told since this was last asked, credit left out.
    pub fn told(&mut self, session: u64) -> Vec<Told> {
        let mut told = Vec::new();
        self.outputs.retain(|output| match output {
            Output::ToAgent { session: to, message } if *to == SessionId(session) => {
                match message {
                    down::Body::Welcome(_) => told.push(Told::Welcome),
                    down::Body::Superseded(_) => told.push(Told::Superseded),
                    down::Body::Desired(desired) => told.extend(desired.entries.iter().map(short)),
                    down::Body::ClaimAnswer(_) | down::Body::Ack(_) | down::Body::Renewed(_) => {}
                    down::Body::Credit(_) => return true,
                }
                false
            }
            _ => true,
        });
        told
    }

    /// The answers about leases that a session was told.
    pub fn renewed(&self, session: u64) -> Vec<agent::Renewed> {
        let renewed = |output: &Output| match output {
            Output::ToAgent { session: to, message: down::Body::Renewed(renewed) } if to.0 == session => {
                Some(renewed.clone())
            }
            _ => None,
        };
        self.outputs.iter().filter_map(renewed).collect()
    }

    pub fn credit(&mut self, session: u64) -> u64 {
        let mut bytes = 0;
        self.outputs.retain(|output| match output {
            Output::ToAgent { session: to, message: down::Body::Credit(credit) }
                if *to == SessionId(session) =>
            {
                bytes += credit.bytes;
                false
            }
            _ => true,
        });
        bytes
    }

    pub fn ended(&mut self, session: u64) -> Option<Ended> {
        self.outputs.iter().find_map(|output| match output {
            Output::EndAgent { session: to, ended } if *to == SessionId(session) => Some(ended.clone()),
            _ => None,
        })
    }

    // ---- controllers

    pub fn controller(&mut self, n: u64) {
        let hello = scheduler::Hello {
            protocol_min: 1,
            protocol_max: 1,
            replica_id: ReplicaId::from_parts(n, &[5; 10]).to_string(),
        };
        self.input(Input::ControllerArrived { controller: ControllerId(n), hello });
    }

    /// A controller that has said everything but its wants.
    pub fn ready_controller(&mut self, n: u64, agents: &[(u64, Option<u64>)], pipelines: &[(u64, u64)]) {
        self.controller(n);
        self.directory(n, true, agents.iter().map(|(agent, instance)| entry(*agent, *instance)).collect());
        let pipelines = pipelines
            .iter()
            .map(|(pipeline, epoch)| scheduler::PipelineEpoch {
                pipeline_id: pipeline_id(*pipeline).to_string(),
                epoch: *epoch,
            })
            .collect();
        self.states(n, up::Body::Snapshot(scheduler::Snapshot { pipelines }));
    }

    pub fn directory(&mut self, n: u64, complete: bool, agents: Vec<scheduler::DirectoryEntry>) {
        self.states(n, up::Body::Directory(scheduler::Directory { complete, agents }));
    }

    /// All wants of pipeline 1 at epoch 1.
    pub fn wants(&mut self, n: u64, attempts: Vec<scheduler::Want>) {
        self.wants_of(n, 1, 1, true, attempts);
    }

    pub fn change(&mut self, n: u64, attempts: Vec<scheduler::Want>) {
        self.wants_of(n, 1, 1, false, attempts);
    }

    pub fn wants_of(
        &mut self,
        n: u64,
        pipeline: u64,
        epoch: u64,
        complete: bool,
        attempts: Vec<scheduler::Want>,
    ) {
        let pipeline_id = pipeline_id(pipeline).to_string();
        self.states(n, up::Body::Wants(scheduler::Wants { pipeline_id, epoch, complete, attempts }));
    }

    pub fn states(&mut self, n: u64, message: up::Body) {
        self.input(Input::FromController { controller: ControllerId(n), message });
    }

    pub fn controller_goes(&mut self, n: u64) {
        self.input(Input::ControllerGone { controller: ControllerId(n) });
    }

    /// What a controller was sent since this was last asked.
    pub fn heard(&mut self, n: u64) -> Vec<to_controller::Body> {
        let mut heard = Vec::new();
        self.outputs.retain(|output| match output {
            Output::ToController { controller, message } if *controller == ControllerId(n) => {
                heard.push(message.clone());
                false
            }
            _ => true,
        });
        heard
    }

    /// The attempts that a controller was told are absent, since it was last asked anything.
    pub fn absences(&mut self, n: u64) -> Vec<AttemptId> {
        self.heard(n)
            .iter()
            .filter_map(|message| match message {
                to_controller::Body::Absent(absent) => {
                    Some(sealci_proto::attempt_id(&absent.attempt).unwrap())
                }
                _ => None,
            })
            .collect()
    }

    pub fn why(&mut self, n: u64, attempt: u64) -> Option<Vec<String>> {
        let attempt = Some(attempt_id(attempt).into());
        self.states(n, up::Body::WhyQuestion(scheduler::WhyQuestion { request: 9, attempt }));
        self.heard(n).into_iter().find_map(|message| match message {
            to_controller::Body::WhyAnswer(answer) => {
                assert_eq!(answer.request, 9);
                answer.queued.then_some(answer.reasons)
            }
            _ => None,
        })
    }

    pub fn enrol(&mut self, request: u64) {
        let enrol = agent::EnrolRequest { token: "t".into(), ..Default::default() };
        self.input(Input::Enrol { request: EnrolId(request), enrol });
    }

    pub fn enrolled(&mut self, request: u64) -> Option<Result<(), EnrolRefused>> {
        self.outputs.iter().find_map(|output| match output {
            Output::Enrolled { request: of, result } if *of == EnrolId(request) => Some(result.clone()),
            _ => None,
        })
    }
}

fn short(entry: &agent::DesiredEntry) -> Told {
    let n = number_of(&sealci_proto::attempt_id(&entry.attempt).unwrap());
    match entry.wish.as_ref().unwrap() {
        desired_entry::Wish::Run(_) => Told::Run(n),
        desired_entry::Wish::Keep(_) => Told::Keep(n),
        desired_entry::Wish::Cancel(_) => Told::Cancel(n),
        desired_entry::Wish::Drop(_) => Told::Drop(n),
    }
}

/// The number that an attempt id was made from: its first 48 bits, the time.
fn number_of(attempt: &AttemptId) -> u64 {
    (attempt.action.as_uuid().as_u128() >> 80) as u64
}
