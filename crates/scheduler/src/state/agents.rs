//! Handles what agents do: arrive, say what they offer and hold, send what is meant for controllers, and go.

use std::time::Duration;

use prost::Message;
use sealci_core::ids::{AgentId, AttemptId, InstanceId};
use sealci_proto::agent::{self, HeldState, agent_message, scheduler_message};
use sealci_proto::scheduler::{self, from_agent};
use sealci_proto::{Malformed, Versions, attempt_id};
use tracing::{info, warn};

use super::session::Session;
use super::wants::WantState;
use super::{Arrival, ControllerId, Ended, Output, Scheduler, SessionId, Timer};
use crate::pool::{PoolAgent, Reservation};

/// The most bytes a log chunk may have.
const MAX_CHUNK_BYTES: usize = 1 << 20;

/// The most bytes of what an agent says of itself. It is kept, and repeated to controllers.
const MAX_OFFER_BYTES: usize = 64 << 10;

fn check_size(what: &str, bytes: usize) -> Result<(), Malformed> {
    if bytes <= MAX_OFFER_BYTES {
        return Ok(());
    }
    Err(Malformed(format!("`{what}` has {bytes} bytes, at most {MAX_OFFER_BYTES} may be")))
}

impl Scheduler {
    pub(super) fn agent_arrived(
        &mut self,
        now: Duration,
        session: SessionId,
        agent: AgentId,
        credential_sha256: [u8; 32],
        hello: agent::Hello,
    ) {
        let arrival = match self.read_arrival(agent, credential_sha256, hello) {
            Ok(arrival) => arrival,
            Err(ended) => return self.refuse(session, ended),
        };
        if self.directory.complete {
            self.admit(now, session, arrival);
        } else {
            self.arrivals.insert(session, arrival);
            self.timers.set(now + self.settings.directory_wait, Timer::Directory(session));
        }
    }

    fn read_arrival(
        &self,
        agent: AgentId,
        credential_sha256: [u8; 32],
        hello: agent::Hello,
    ) -> Result<Arrival, Ended> {
        let protocol = self.common_protocol(hello.protocol_min, hello.protocol_max)?;
        check_size("hello", hello.encoded_len())?;
        let instance = hello.instance_id.parse().map_err(Malformed::from)?;
        if !self.directory.complete && self.arrivals.len() >= self.settings.max_waiting {
            return Err(Ended::TooManyWaiting { waiting: self.arrivals.len() });
        }
        Ok(Arrival { agent, credential_sha256, instance, protocol, hello })
    }

    /// The version to speak with the one at the other end.
    pub(super) fn common_protocol(&self, min: u32, max: u32) -> Result<u32, Ended> {
        let (theirs, ours) = (Versions { min, max }, self.settings.protocols);
        ours.highest_common(theirs).ok_or(Ended::Protocol { theirs, ours })
    }

    fn refuse(&mut self, session: SessionId, ended: Ended) {
        self.outputs.push(Output::EndAgent { session, ended });
    }

    /// Admits who waited for a directory.
    pub(super) fn admit_arrivals(&mut self, now: Duration) {
        for (session, arrival) in std::mem::take(&mut self.arrivals) {
            self.admit(now, session, arrival);
        }
    }

    pub(super) fn directory_due(&mut self, session: SessionId) {
        if self.arrivals.remove(&session).is_some() {
            self.refuse(session, Ended::NoDirectory { waited: self.settings.directory_wait });
        }
    }

    fn admit(&mut self, now: Duration, id: SessionId, arrival: Arrival) {
        let Arrival { agent, credential_sha256, instance, protocol, hello } = arrival;
        if !self.directory.accepts(agent, &credential_sha256) {
            info!(agent.id = %agent, "refused an agent: unknown, or another credential");
            return self.refuse(id, Ended::Unauthenticated { agent });
        }
        if let Some(older) = self.streams.get(&(agent, instance)).copied() {
            self.end_session(now, older, Some(Ended::Replaced));
        }
        info!(agent.id = %agent, agent.instance = %instance, session = id.0, "an agent connected");
        let offer = hello.offer.unwrap_or_default();
        self.sessions.insert(id, Session::new(agent, instance, hello.version, offer, now));
        self.streams.insert((agent, instance), id);
        self.tell_agent(
            id,
            scheduler_message::Body::Welcome(agent::Welcome {
                protocol,
                incarnation: self.incarnation,
                stream: id.0,
                held_interval_ms: self.settings.held_interval.as_millis() as u64,
            }),
        );
        self.credit.open(id);
        self.timers.set(now + self.settings.silence, Timer::Silence(id));
        for (attempt, wish) in self.wants.claimed_by(agent, instance) {
            self.ask(id, attempt, wish);
        }
        if !self.stand(now, id) {
            self.timers.set(now + self.settings.supersede_after, Timer::Supersede(id));
        }
        self.announce(id, true);
    }

    /// Lets the session into the pool or out of it, as the directory says. Whether it is in the pool then.
    pub(super) fn stand(&mut self, now: Duration, id: SessionId) -> bool {
        let Some(session) = self.sessions.get(&id) else { return false };
        let agent = session.agent;
        let Some(known) = self.directory.agent(agent) else { return false };
        let is_current = known.current == Some(session.instance);
        let is_pooled = self.pooled.get(&agent) == Some(&id);
        if is_current == is_pooled {
            return is_pooled;
        }
        if is_current && session.superseded {
            // It takes nothing new on this stream any more.
            self.end_session(now, id, Some(Ended::CurrentAgain));
            return false;
        }
        if is_current {
            let mut pool_agent =
                PoolAgent::new(known.name.clone(), session.offer.clone().into(), known.drained);
            pool_agent.ready = session.ready;
            self.placement.join(agent, pool_agent);
            self.pooled.insert(agent, id);
            self.touched.insert(id);
            self.adopt_held(now, id);
        } else {
            self.placement.leave(agent);
            self.pooled.remove(&agent);
            self.supersede(id);
        }
        is_current
    }

    /// Tells an instance that another one gets the new work, once.
    fn supersede(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        if std::mem::replace(&mut session.superseded, true) {
            return;
        }
        let (agent, instance) = (session.agent, session.instance);
        let name = self.directory.agent(agent).map_or("", |known| &known.name);
        let reason = format!(
            "another instance of agent {name} ({agent}) was first seen later and gets the new work; this one \
             ({instance}) finishes what it claimed. If both are meant to work, enrol one of them anew."
        );
        info!(agent.id = %agent, agent.instance = %instance, "an older instance was told that it is not the current one");
        self.tell_agent(id, scheduler_message::Body::Superseded(agent::Superseded { reason }));
    }

    /// The controllers have had the time to make this instance the current one.
    pub(super) fn supersede_due(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let current = self.directory.agent(session.agent).and_then(|known| known.current);
        if current.is_some_and(|current| current != session.instance) {
            self.supersede(id);
        }
    }

    pub(super) fn silence_due(&mut self, now: Duration, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let until = session.heard_at + self.settings.silence;
        if until <= now {
            let waited = self.settings.silence;
            self.end_session(now, id, Some(Ended::Silent { waited }));
        } else {
            self.timers.set(until, Timer::Silence(id));
        }
    }

    /// Ends a session; with a reason, the agent is told. What was placed with it and is not claimed waits again.
    pub(super) fn end_session(&mut self, now: Duration, id: SessionId, ended: Option<Ended>) {
        self.arrivals.remove(&id);
        if let Some(ended) = ended {
            self.refuse(id, ended);
        }
        if !self.sessions.contains_key(&id) {
            return;
        }
        self.announce(id, false);
        let Some(session) = self.sessions.remove(&id) else { return };
        info!(agent.id = %session.agent, session = id.0, "an agent's stream ended");
        self.credit.close(id);
        self.streams.remove(&(session.agent, session.instance));
        self.touched.remove(&id);
        self.changed.remove(&id);
        if self.pooled.get(&session.agent) == Some(&id) {
            self.pooled.remove(&session.agent);
            self.placement.leave(session.agent);
        }
        for attempt in session.held.keys() {
            self.forget_holder(*attempt, id);
        }
        self.seek_held_back(now);
        for attempt in session.asked() {
            if self.wants.placed_on(attempt) == Some(id) {
                self.wants.unplace(attempt);
                self.seek_agent(now, attempt);
            }
        }
    }

    pub(super) fn forget_holder(&mut self, attempt: AttemptId, id: SessionId) {
        if let Some(holders) = self.holders.get_mut(&attempt) {
            holders.remove(&id);
            if holders.is_empty() {
                self.holders.remove(&attempt);
            }
        }
    }

    pub(super) fn agent_said(&mut self, now: Duration, id: SessionId, message: agent_message::Body) {
        if !self.sessions.contains_key(&id) {
            return;
        }
        let taken = match message {
            agent_message::Body::Hello(_) => Err(Malformed("`hello` comes once".into()).into()),
            agent_message::Body::Offer(offer) => {
                let checked = check_size("offer", offer.encoded_len()).map_err(Ended::from);
                checked.map(|()| self.take_offer(id, offer))
            }
            agent_message::Body::Held(held) => self.take_held(now, id, held),
            agent_message::Body::Claim(claim) => {
                self.forward(id, attempt_id(&claim.attempt), from_agent::Body::Claim(claim), 0)
            }
            agent_message::Body::Event(event) => {
                self.forward(id, attempt_id(&event.attempt), from_agent::Body::Event(event), 0)
            }
            agent_message::Body::Renew(renew) => {
                self.forward(id, attempt_id(&renew.attempt), from_agent::Body::Renew(renew), 0)
            }
            agent_message::Body::LogChunk(chunk) if chunk.data.len() > MAX_CHUNK_BYTES => {
                let bytes = chunk.data.len();
                Err(Malformed(format!("a log chunk has {bytes} bytes, at most {MAX_CHUNK_BYTES} may be"))
                    .into())
            }
            agent_message::Body::LogChunk(chunk) => {
                let bytes = chunk.data.len() as u64;
                self.forward(id, attempt_id(&chunk.attempt), from_agent::Body::LogChunk(chunk), bytes)
            }
        };
        if let Err(ended) = taken {
            warn!(session = id.0, error = %ended, "an agent's stream is ended");
            self.end_session(now, id, Some(ended));
        }
    }

    fn take_offer(&mut self, id: SessionId, offer: agent::Offer) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.offer = offer;
        let agent = session.agent;
        if self.pooled.get(&agent) == Some(&id) {
            self.placement.set_offer(agent, session.offer.clone().into());
        }
        self.changed.insert(id);
    }

    fn take_held(&mut self, now: Duration, id: SessionId, held: agent::Held) -> Result<(), Ended> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(()) };
        let of_this_stream =
            |number: &agent::DesiredNumber| number.incarnation == self.incarnation && number.stream == id.0;
        let answers = held.answers.filter(of_this_stream).map(|number| number.counter);
        let before: Vec<_> = session.held.keys().copied().collect();
        session.take_held(held.attempts, answers)?;
        session.heard_at = now;
        let agent = session.agent;
        let after: Vec<_> = session.held.keys().copied().collect();
        for attempt in before {
            self.forget_holder(attempt, id);
        }
        for attempt in after {
            self.holders.entry(attempt).or_default().insert(id);
        }
        if self.pooled.get(&agent) == Some(&id)
            && self.placement.pool().agents().get(&agent).is_some_and(|agent| !agent.ready)
        {
            // Its reservations first: nothing is placed in between.
            self.refresh_reservation(id);
            self.placement.set_ready(agent);
        }
        self.adopt_held(now, id);
        self.conclude_absences(now, id);
        self.seek_held_back(now);
        self.touched.insert(id);
        self.changed.insert(id);
        Ok(())
    }

    /// Compares what the agent holds with what is wanted: what waits and is held is placed there; what another claimed
    /// is dropped, as long as it could not be claimed here.
    fn adopt_held(&mut self, now: Duration, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let key = (session.agent, session.instance);
        let held: Vec<_> = session.held.iter().map(|(attempt, held)| (*attempt, held.state)).collect();
        for (attempt, state) in held {
            match self.wants.state(attempt) {
                Some(WantState::Queued(want)) if want.placed.is_none() => self.seek_agent(now, attempt),
                Some(WantState::Claimed(claimant))
                    if claimant.key() != key && state == HeldState::Assigned =>
                {
                    self.ask(id, attempt, super::session::Wish::Drop);
                }
                _ => {}
            }
        }
    }

    /// Acts on what the agent was asked to have, has answered for, and does not hold.
    pub(super) fn conclude_absences(&mut self, now: Duration, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        let (agent, instance) = (session.agent, session.instance);
        for attempt in session.absent() {
            match self.wants.state(attempt) {
                Some(WantState::Queued(want)) if want.placed == Some(id) => {
                    self.let_go(now, id, attempt);
                }
                Some(WantState::Claimed(claimant)) if claimant.key() == (agent, instance) => {
                    self.report_absent(id, attempt, agent, instance);
                }
                _ => {
                    if let Some(session) = self.sessions.get_mut(&id) {
                        session.forget(attempt);
                    }
                }
            }
        }
    }

    fn report_absent(&mut self, id: SessionId, attempt: AttemptId, agent: AgentId, instance: InstanceId) {
        // Without its owner nobody could act on it. Whoever states the attempt next is told.
        let Some(owner) = self.owner_of(attempt) else { return };
        if let Some(session) = self.sessions.get_mut(&id) {
            session.reported(attempt);
        }
        info!(attempt = %attempt, agent.id = %agent, "an agent does not hold what it claimed");
        self.tell_controller(
            owner,
            scheduler::scheduler_message::Body::Absent(scheduler::Absent {
                attempt: Some(attempt.into()),
                agent_id: agent.to_string(),
                instance_id: instance.to_string(),
            }),
        );
    }

    /// Passes on what is meant for a controller. With none connected it is dropped: the agent sends it again.
    fn forward(
        &mut self,
        id: SessionId,
        attempt: Result<AttemptId, Malformed>,
        body: from_agent::Body,
        log_bytes: u64,
    ) -> Result<(), Ended> {
        let attempt = attempt?;
        let Some(session) = self.sessions.get(&id) else { return Ok(()) };
        let (agent_id, instance_id) = (session.agent.to_string(), session.instance.to_string());
        let controller = self.route(attempt);
        self.credit
            .spend(id, controller, log_bytes)
            .map_err(|credit_bytes| Ended::Overspent { sent_bytes: log_bytes, credit_bytes })?;
        if let Some(controller) = controller {
            let message = scheduler::FromAgent { session: id.0, agent_id, instance_id, body: Some(body) };
            self.tell_controller(controller, scheduler::scheduler_message::Body::FromAgent(message));
        }
        Ok(())
    }

    /// The controller that owns the attempt's pipeline, if that is known and connected, else the one that connected
    /// first.
    fn route(&self, attempt: AttemptId) -> Option<ControllerId> {
        self.owner_of(attempt).or_else(|| self.controllers.keys().next().copied())
    }

    pub(super) fn owner_of(&self, attempt: AttemptId) -> Option<ControllerId> {
        self.wants.owner(attempt).filter(|owner| self.controllers.contains_key(owner))
    }

    /// Tells all controllers how an agent stands.
    pub(super) fn announce(&mut self, id: SessionId, connected: bool) {
        let controllers: Vec<_> = self.controllers.keys().copied().collect();
        for controller in controllers {
            self.announce_to(controller, id, connected);
        }
    }

    pub(super) fn announce_to(&mut self, controller: ControllerId, id: SessionId, connected: bool) {
        let Some(session) = self.sessions.get(&id) else { return };
        let capacity = session.offer.capacity.map(Into::into).unwrap_or_default();
        let reserved = session
            .reserved()
            .values()
            .fold(sealci_core::plan::Resources::default(), |sum, one| sum.plus(one));
        let state = scheduler::AgentState {
            session: id.0,
            agent_id: session.agent.to_string(),
            instance_id: session.instance.to_string(),
            version: session.version.clone(),
            connected,
            offer: Some(session.offer.clone()),
            available: Some(sealci_core::plan::Resources::minus(&capacity, &reserved).into()),
            held: session.held.values().map(|held| held.wire.clone()).collect(),
        };
        self.tell_controller(controller, scheduler::scheduler_message::Body::AgentState(state));
    }

    /// Brings the pool up to what the touched sessions have reserved.
    pub(super) fn refresh_reservations(&mut self) {
        let touched: Vec<_> = self.touched.iter().copied().collect();
        for id in touched {
            self.refresh_reservation(id);
        }
    }

    fn refresh_reservation(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        if self.pooled.get(&session.agent) != Some(&id) {
            return;
        }
        let reservations = session
            .reserved()
            .into_iter()
            .map(|(attempt, resources)| {
                (attempt, Reservation { resources, repository: self.wants.repository(attempt) })
            })
            .collect();
        self.placement.set_reservations(session.agent, reservations);
    }

    /// Sends what the touched sessions were asked and not told yet.
    pub(super) fn send_desired(&mut self) {
        for id in std::mem::take(&mut self.touched) {
            let Some(session) = self.sessions.get_mut(&id).filter(|session| session.has_unsent()) else {
                continue;
            };
            let wants = &self.wants;
            let messages = session.unsent_desired(self.settings.max_desired_bytes, |attempt| {
                wants.spec(attempt).map(<[u8]>::to_vec)
            });
            for (counter, entries) in messages {
                let number = agent::DesiredNumber { incarnation: self.incarnation, stream: id.0, counter };
                let desired = agent::Desired { number: Some(number), entries };
                self.tell_agent(id, scheduler_message::Body::Desired(desired));
            }
        }
    }

    pub(super) fn ask(&mut self, id: SessionId, attempt: AttemptId, wish: super::session::Wish) {
        if let Some(session) = self.sessions.get_mut(&id) {
            session.ask(attempt, wish);
            self.touched.insert(id);
        }
    }
}
