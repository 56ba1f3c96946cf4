//! The model's controller: one table of attempts, which grants the first claim and states what changed.

use super::*;

impl World {
    pub(super) fn connect_controller(&mut self) {
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

    pub(super) fn entry(&self, agent: u64) -> scheduler::DirectoryEntry {
        kit::entry(agent, self.current.get(&agent).copied())
    }

    pub(super) fn disconnect_controller(&mut self) {
        if let Some(stream) = self.controller.take() {
            self.input(Input::ControllerGone { controller: ControllerId(stream.id) });
        }
    }

    pub(super) fn state(&mut self, message: up::Body) {
        if let Some(stream) = &mut self.controller {
            stream.to_scheduler.push_back(message);
        }
    }

    pub(super) fn state_wants(&mut self, pipeline: u64, complete: bool, attempts: &[AttemptId]) {
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

    pub(super) fn set_truth(&mut self, attempt: AttemptId, truth: Truth) {
        self.truth.insert(attempt, truth);
        self.state_wants(pipeline_of(attempt), false, &[attempt]);
    }

    pub(super) fn add(&mut self, cpu: u64) {
        let n = self.next();
        self.set_truth(kit::attempt_id(n), Truth::Queued { cpu });
    }

    pub(super) fn lose(&mut self, attempt: AttemptId) {
        if let Some(Truth::Claimed { cpu, cancelled, .. }) = self.truth.get(&attempt).copied() {
            self.set_truth(attempt, Truth::Gone);
            if !cancelled {
                let next = AttemptId { number: attempt.number + 1, ..attempt };
                self.set_truth(next, Truth::Queued { cpu });
            }
        }
    }

    pub(super) fn cancel(&mut self, attempt: AttemptId) {
        match self.truth.get(&attempt).copied() {
            Some(Truth::Queued { .. }) => self.set_truth(attempt, Truth::Gone),
            Some(Truth::Claimed { agent, instance, cpu, .. }) => {
                self.set_truth(attempt, Truth::Claimed { agent, instance, cpu, cancelled: true });
            }
            _ => {}
        }
    }

    /// The controller reads one message.
    pub(super) fn deliver_to_controller(&mut self) -> bool {
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

    pub(super) fn see_instance(&mut self, state: &scheduler::AgentState) {
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

    pub(super) fn claimant(&self, attempt: AttemptId) -> Option<(String, String)> {
        match self.truth.get(&attempt)? {
            Truth::Claimed { agent, instance, .. } => {
                Some((kit::agent_id(*agent).to_string(), kit::instance_id(*instance).to_string()))
            }
            _ => None,
        }
    }

    pub(super) fn answer(&mut self, from: scheduler::FromAgent) {
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
                    let granted = agent::ClaimGranted { token: 1, ..Default::default() };
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
            from_agent::Body::LogChunk(_) | from_agent::Body::Renew(_) => return,
        };
        self.state(up::Body::ToAgent(scheduler::ToAgent { session: from.session, body: Some(body) }));
    }

    /// The scheduler reads one message of the controller.
    pub(super) fn deliver_from_controller(&mut self) -> bool {
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

    pub(super) fn read(&self, wire: &scheduler::Want) -> Truth {
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
}
