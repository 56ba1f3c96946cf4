//! The model's agents: they do what they are asked, ask for claims, and forget everything when they crash.

use super::*;

impl World {
    pub(super) fn connect(&mut self, position: usize) {
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

    pub(super) fn disconnect(&mut self, position: usize) {
        if let Some(session) = self.agents[position].stream.as_ref().map(|stream| stream.session) {
            self.cut(session);
            self.input(Input::AgentGone { session });
        }
    }

    pub(super) fn cut(&mut self, session: SessionId) {
        for agent in &mut self.agents {
            agent.stream.take_if(|stream| stream.session == session);
        }
        self.wanted.remove(&session);
        self.delivered_held.remove(&session);
    }

    /// Everything on it is lost, the spool included.
    pub(super) fn crash(&mut self, position: usize) {
        self.disconnect(position);
        self.agents[position].held.clear();
    }

    pub(super) fn renew_instance(&mut self, position: usize) {
        self.crash(position);
        self.agents[position].instance = 100 + self.next();
    }

    pub(super) fn agent_says_held(&mut self, position: usize) {
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
    pub(super) fn deliver_down(&mut self, position: usize) -> bool {
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

    pub(super) fn agent_obeys(&mut self, position: usize, entry: agent::DesiredEntry) {
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

    pub(super) fn agent_claims(&mut self, position: usize, attempt: AttemptId) {
        if let Some(stream) = &mut self.agents[position].stream {
            let claim = agent::Claim { attempt: Some(attempt.into()), claim_id: String::new() };
            stream.to_scheduler.push_back(agent_message::Body::Claim(claim));
        }
    }

    pub(super) fn agent_reports_end(&mut self, position: usize, attempt: AttemptId) {
        if let Some(stream) = &mut self.agents[position].stream {
            let event = agent::Event { attempt: Some(attempt.into()), token: 1, ..Default::default() };
            stream.to_scheduler.push_back(agent_message::Body::Event(event));
        }
    }

    /// The agent repeats what was not answered, and finishes what it has claimed.
    pub(super) fn agent_works(&mut self, position: usize) {
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
    pub(super) fn deliver_up(&mut self, position: usize) -> bool {
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
}
