//! Keeps what the controllers want, and moves attempts between waiting, placed, claimed and gone.
//!
//! Of several statements about a pipeline the highest epoch wins, and none below the epoch that a connected controller's
//! snapshot names: what another replica states of an earlier epoch is the past.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use sealci_core::ids::{AgentId, AttemptId, InstanceId, PipelineId};
use sealci_proto::agent::HeldState;
use sealci_proto::scheduler::{self, want};
use sealci_proto::{Malformed, attempt_id};
use tracing::warn;

use super::session::Wish;
use super::{ControllerId, Scheduler, SessionId, Timer};
use crate::placement::Placed;
use crate::queue::Waiting;

/// An attempt that is to be placed.
#[derive(Debug)]
pub(super) struct QueuedWant {
    waiting: Waiting,
    spec: Vec<u8>,
    /// Attempts of its action never overlap.
    exclusive: bool,
    /// Where it was placed; none while it waits.
    pub placed: Option<SessionId>,
    /// How often an agent took it on and let go of it.
    let_go: u32,
    /// It is not placed before.
    not_before: Duration,
}

/// Who claimed an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ClaimedWant {
    agent: AgentId,
    instance: InstanceId,
    /// The grace period, once the action is to be cancelled.
    cancel_grace_ms: Option<u64>,
}

impl ClaimedWant {
    pub fn key(&self) -> (AgentId, InstanceId) {
        (self.agent, self.instance)
    }

    fn wish(&self) -> Wish {
        match self.cancel_grace_ms {
            Some(grace_ms) => Wish::Cancel { grace_ms },
            None => Wish::Keep,
        }
    }
}

/// What is wanted of an attempt.
#[derive(Debug)]
pub(super) enum WantState {
    Queued(Box<QueuedWant>),
    Claimed(ClaimedWant),
}

#[derive(Debug)]
struct Wanted {
    pipeline: PipelineId,
    state: WantState,
}

#[derive(Debug)]
struct Pipeline {
    epoch: u64,
    /// Who stated it last.
    owner: ControllerId,
    attempts: BTreeSet<AttemptId>,
    /// Whose attempts they are, once one of them was queued.
    repository: Option<Arc<str>>,
    /// A snapshot names a higher epoch: nothing is placed before that is stated.
    stale: bool,
}

#[derive(Debug, Default)]
pub(super) struct Wants {
    pipelines: HashMap<PipelineId, Pipeline>,
    attempts: HashMap<AttemptId, Wanted>,
    claims: HashMap<(AgentId, InstanceId), BTreeSet<AttemptId>>,
}

impl Wants {
    pub fn state(&self, attempt: AttemptId) -> Option<&WantState> {
        self.attempts.get(&attempt).map(|wanted| &wanted.state)
    }

    fn queued(&self, attempt: AttemptId) -> Option<&QueuedWant> {
        match self.state(attempt)? {
            WantState::Queued(want) => Some(want),
            WantState::Claimed(_) => None,
        }
    }

    fn queued_mut(&mut self, attempt: AttemptId) -> Option<&mut QueuedWant> {
        match &mut self.attempts.get_mut(&attempt)?.state {
            WantState::Queued(want) => Some(want),
            WantState::Claimed(_) => None,
        }
    }

    fn claimed(&self, attempt: AttemptId) -> Option<&ClaimedWant> {
        match self.state(attempt)? {
            WantState::Claimed(claimant) => Some(claimant),
            WantState::Queued(_) => None,
        }
    }

    pub fn placed_on(&self, attempt: AttemptId) -> Option<SessionId> {
        self.queued(attempt)?.placed
    }

    pub fn unplace(&mut self, attempt: AttemptId) {
        if let Some(want) = self.queued_mut(attempt) {
            want.placed = None;
        }
    }

    pub fn spec(&self, attempt: AttemptId) -> Option<&[u8]> {
        self.queued(attempt).map(|want| &*want.spec)
    }

    pub fn owner(&self, attempt: AttemptId) -> Option<ControllerId> {
        self.pipelines.get(&self.attempts.get(&attempt)?.pipeline).map(|pipeline| pipeline.owner)
    }

    pub fn repository(&self, attempt: AttemptId) -> Option<Arc<str>> {
        self.pipelines.get(&self.attempts.get(&attempt)?.pipeline)?.repository.clone()
    }

    /// What an instance claimed, and what is wanted of it.
    pub fn claimed_by(&self, agent: AgentId, instance: InstanceId) -> Vec<(AttemptId, Wish)> {
        let Some(attempts) = self.claims.get(&(agent, instance)) else { return Vec::new() };
        attempts.iter().filter_map(|attempt| Some((*attempt, self.claimed(*attempt)?.wish()))).collect()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.pipelines.is_empty() && self.attempts.is_empty() && self.claims.is_empty()
    }

    fn is_stale(&self, attempt: AttemptId) -> bool {
        self.attempts
            .get(&attempt)
            .and_then(|wanted| self.pipelines.get(&wanted.pipeline))
            .is_some_and(|pipeline| pipeline.stale)
    }

    fn add_claim(&mut self, attempt: AttemptId, key: (AgentId, InstanceId)) {
        self.claims.entry(key).or_default().insert(attempt);
    }

    fn remove_claim(&mut self, attempt: AttemptId, key: (AgentId, InstanceId)) {
        if let Some(attempts) = self.claims.get_mut(&key) {
            attempts.remove(&attempt);
            if attempts.is_empty() {
                self.claims.remove(&key);
            }
        }
    }
}

/// A statement about one attempt, read.
enum Stated {
    Queued { waiting: Waiting, spec: Vec<u8>, exclusive: bool },
    Claimed(ClaimedWant),
    Gone,
}

fn read(wire: scheduler::Want) -> Result<(AttemptId, Stated), Malformed> {
    let attempt = attempt_id(&wire.attempt)?;
    let stated = match wire.state.ok_or_else(|| Malformed::missing("want.state"))? {
        want::State::Queued(queued) => {
            let requirements =
                queued.requirements.ok_or_else(|| Malformed::missing("queued.requirements"))?;
            let waiting = Waiting {
                requirements: Arc::new(requirements.try_into()?),
                priority: queued.priority,
                order: queued.order,
                repository: queued.repository.into(),
            };
            Stated::Queued { waiting, spec: queued.spec, exclusive: queued.exclusive }
        }
        want::State::Claimed(claimed) => Stated::Claimed(ClaimedWant {
            agent: claimed.agent_id.parse()?,
            instance: claimed.instance_id.parse()?,
            cancel_grace_ms: claimed.cancel.map(|cancel| cancel.grace_ms),
        }),
        want::State::Gone(_) => Stated::Gone,
    };
    Ok((attempt, stated))
}

impl Scheduler {
    pub(super) fn take_wants(
        &mut self,
        now: Duration,
        controller: ControllerId,
        wants: scheduler::Wants,
    ) -> Result<(), Malformed> {
        let id: PipelineId = wants.pipeline_id.parse()?;
        let stated = wants.attempts.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let known = self.wants.pipelines.get(&id).map(|pipeline| pipeline.epoch);
        if Some(wants.epoch) < known.max(self.snapshot_epoch(id)) {
            warn!(pipeline.id = %id, epoch = wants.epoch, "a statement of an earlier epoch does not count");
            return Ok(());
        }
        let pipeline = self.wants.pipelines.entry(id).or_insert_with(|| Pipeline {
            epoch: wants.epoch,
            owner: controller,
            attempts: BTreeSet::new(),
            repository: None,
            stale: false,
        });
        pipeline.epoch = wants.epoch;
        pipeline.owner = controller;
        let was_stale = std::mem::replace(&mut pipeline.stale, false);
        let named: HashSet<_> = stated.iter().map(|(attempt, _)| *attempt).collect();
        let left_out: Vec<_> =
            pipeline.attempts.iter().copied().filter(|attempt| !named.contains(attempt)).collect();
        for attempt in left_out {
            if wants.complete {
                self.attempt_gone(attempt);
            } else if was_stale {
                self.seek_agent(now, attempt);
            }
        }
        for (attempt, stated) in stated {
            self.take_want(now, id, attempt, stated);
        }
        self.forget_if_empty(id);
        Ok(())
    }

    fn take_want(&mut self, now: Duration, pipeline: PipelineId, attempt: AttemptId, stated: Stated) {
        if self.wants.attempts.get(&attempt).is_some_and(|wanted| wanted.pipeline != pipeline) {
            warn!(attempt = %attempt, pipeline.id = %pipeline, "an attempt is stated for two pipelines");
            return;
        }
        match stated {
            Stated::Queued { waiting, spec, exclusive } => {
                let want = QueuedWant { waiting, spec, exclusive, placed: None, let_go: 0, not_before: now };
                self.attempt_queued(now, pipeline, attempt, want);
            }
            Stated::Claimed(claimant) => self.attempt_claimed(now, pipeline, attempt, claimant),
            Stated::Gone => self.attempt_gone(attempt),
        }
    }

    fn attempt_queued(
        &mut self,
        now: Duration,
        pipeline: PipelineId,
        attempt: AttemptId,
        stated: QueuedWant,
    ) {
        if let Some(pipeline) = self.wants.pipelines.get_mut(&pipeline) {
            pipeline.repository = Some(Arc::clone(&stated.waiting.repository));
            pipeline.attempts.insert(attempt);
        }
        if let Some(claimant) = self.wants.claimed(attempt).cloned() {
            self.wants.remove_claim(attempt, claimant.key());
        }
        if let Some(want) = self.wants.queued_mut(attempt) {
            want.waiting = stated.waiting;
            want.spec = stated.spec;
            want.exclusive = stated.exclusive;
        } else {
            let state = WantState::Queued(Box::new(stated));
            self.wants.attempts.insert(attempt, Wanted { pipeline, state });
        }
        self.seek_agent(now, attempt);
    }

    fn attempt_claimed(
        &mut self,
        now: Duration,
        pipeline: PipelineId,
        attempt: AttemptId,
        claimant: ClaimedWant,
    ) {
        let key = claimant.key();
        let session = self.streams.get(&key).copied();
        self.placement.withdraw(attempt);
        self.held_back.remove(&attempt);
        let before = match self.wants.state(attempt) {
            Some(WantState::Queued(want)) => want.placed,
            Some(WantState::Claimed(earlier)) => {
                let earlier = earlier.key();
                self.wants.remove_claim(attempt, earlier);
                self.streams.get(&earlier).copied()
            }
            None => None,
        };
        if let Some(before) = before.filter(|before| Some(*before) != session) {
            self.ask(before, attempt, Wish::Drop);
        }
        for other in self.holders_that_only_prepare(attempt) {
            if Some(other) != session {
                self.ask(other, attempt, Wish::Drop);
            }
        }
        if let Some(pipeline) = self.wants.pipelines.get_mut(&pipeline) {
            pipeline.attempts.insert(attempt);
        }
        let wish = claimant.wish();
        self.wants.add_claim(attempt, key);
        let state = WantState::Claimed(claimant);
        self.wants.attempts.insert(attempt, Wanted { pipeline, state });
        if let Some(session) = session {
            self.ask(session, attempt, wish);
            // Whoever states it may not have heard of its absence.
            if let Some(session) = self.sessions.get_mut(&session) {
                session.report_again(attempt);
            }
            self.conclude_absences(now, session);
        }
    }

    /// Nothing more is wanted of the attempt. One that nobody claimed is dropped where it was placed; what was claimed
    /// is settled between agent and controller. Its claim and its end may come between two statements; then its agent has said
    /// that it holds it claimed, by this very stream, before it reported anything that could end it.
    fn attempt_gone(&mut self, attempt: AttemptId) {
        let Some(wanted) = self.wants.attempts.remove(&attempt) else { return };
        self.held_back.remove(&attempt);
        if let Some(pipeline) = self.wants.pipelines.get_mut(&wanted.pipeline) {
            pipeline.attempts.remove(&attempt);
        }
        match wanted.state {
            WantState::Queued(want) => match want.placed {
                Some(session) if self.has_claimed(session, attempt) => {
                    self.settled_elsewhere(Some(session), attempt)
                }
                Some(session) => self.ask(session, attempt, Wish::Drop),
                None => self.placement.withdraw(attempt),
            },
            WantState::Claimed(claimant) => {
                self.wants.remove_claim(attempt, claimant.key());
                self.settled_elsewhere(self.streams.get(&claimant.key()).copied(), attempt);
            }
        }
    }

    fn settled_elsewhere(&mut self, session: Option<SessionId>, attempt: AttemptId) {
        if let Some(session) = session.and_then(|session| self.sessions.get_mut(&session)) {
            session.forget(attempt);
        }
    }

    /// Whether the session's agent has said that it holds the attempt claimed.
    fn has_claimed(&self, session: SessionId, attempt: AttemptId) -> bool {
        let held = self.sessions.get(&session).and_then(|session| session.held.get(&attempt));
        held.is_some_and(|held| held.state != HeldState::Assigned)
    }

    fn forget_if_empty(&mut self, id: PipelineId) {
        if self.wants.pipelines.get(&id).is_some_and(|pipeline| pipeline.attempts.is_empty()) {
            self.wants.pipelines.remove(&id);
        }
    }

    /// Compares a snapshot with what is known: what it names at a higher epoch is not placed until that is stated; what
    /// it does not name, and whose owner is gone, is over.
    pub(super) fn take_snapshot_epochs(&mut self) {
        let mut over = Vec::new();
        let mut stale = Vec::new();
        for (id, pipeline) in &self.wants.pipelines {
            let epoch = self.snapshot_epoch(*id);
            if epoch > Some(pipeline.epoch) && !pipeline.stale {
                stale.push(*id);
            } else if epoch.is_none() && !self.controllers.contains_key(&pipeline.owner) {
                over.push(*id);
            }
        }
        for id in stale {
            let Some(pipeline) = self.wants.pipelines.get_mut(&id) else { continue };
            pipeline.stale = true;
            for attempt in &pipeline.attempts {
                self.placement.withdraw(*attempt);
                self.held_back.remove(attempt);
            }
        }
        for id in over {
            let Some(pipeline) = self.wants.pipelines.get(&id) else { continue };
            for attempt in pipeline.attempts.clone() {
                self.attempt_gone(attempt);
            }
            self.forget_if_empty(id);
        }
    }

    /// Finds a place for an attempt that is queued and not placed: with the agent that holds it already, else in the
    /// queue. Of any other attempt it does nothing.
    pub(super) fn seek_agent(&mut self, now: Duration, attempt: AttemptId) {
        let Some(want) = self.wants.queued(attempt).filter(|want| want.placed.is_none()) else { return };
        self.held_back.remove(&attempt);
        if let Some((session, wish)) = self.holder_for(attempt, want) {
            self.placement.withdraw(attempt);
            self.set_placed(attempt, session, wish);
        } else if want.exclusive && self.former_holder(attempt).is_some() {
            self.placement.withdraw(attempt);
            self.held_back.insert(attempt);
        } else if self.wants.is_stale(attempt) {
            self.placement.withdraw(attempt);
        } else if want.not_before > now {
            self.timers.set(want.not_before, Timer::Retry(attempt));
        } else {
            self.placement.enqueue(attempt, want.waiting.clone());
        }
    }

    /// Looks again for places for what waits until former attempts are gone.
    pub(super) fn seek_held_back(&mut self, now: Duration) {
        for attempt in self.held_back.clone() {
            self.seek_agent(now, attempt);
        }
    }

    /// A connected agent that holds an earlier attempt of the same action, and which one.
    fn former_holder(&self, attempt: AttemptId) -> Option<(AttemptId, SessionId)> {
        (1..attempt.number).rev().find_map(|number| {
            let former = AttemptId { number, ..attempt };
            let session = self.holders.get(&former)?.first()?;
            Some((former, *session))
        })
    }

    /// Who holds the attempt and shall go on with it. What is only being prepared counts on a current instance, what
    /// is claimed or further on any: that claim was granted, and the controller will say so.
    fn holder_for(&self, attempt: AttemptId, want: &QueuedWant) -> Option<(SessionId, Wish)> {
        let holders = self.holders.get(&attempt)?;
        holders.iter().find_map(|id| {
            let session = self.sessions.get(id)?;
            let is_current = self.pooled.get(&session.agent) == Some(id);
            match session.held.get(&attempt)?.state {
                HeldState::Claimed | HeldState::Running | HeldState::Finished => Some((*id, Wish::Keep)),
                _ if is_current => Some((*id, Wish::Run { resources: want.waiting.requirements.resources })),
                _ => None,
            }
        })
    }

    fn holders_that_only_prepare(&self, attempt: AttemptId) -> Vec<SessionId> {
        let prepares = |id: &SessionId| {
            self.sessions
                .get(id)
                .and_then(|session| session.held.get(&attempt))
                .is_some_and(|held| held.state == HeldState::Assigned)
        };
        self.holders.get(&attempt).into_iter().flatten().copied().filter(prepares).collect()
    }

    /// Places what can be placed, as long as a controller is there to be asked for claims.
    pub(super) fn place(&mut self, now: Duration) {
        if !self.knows_what_is_unfinished() || self.is_settling(now) {
            return;
        }
        while let Some(Placed { attempt, agent }) = self.placement.place_next() {
            let resources = self
                .wants
                .queued(attempt)
                .map(|want| want.waiting.requirements.resources)
                .unwrap_or_default();
            if let Some(session) = self.pooled.get(&agent).copied() {
                self.set_placed(attempt, session, Wish::Run { resources });
            }
        }
    }

    /// Whether agents that came back right after the scheduler's start have yet to say what they hold: what one of them
    /// prepares already shall not be placed with another.
    fn is_settling(&self, now: Duration) -> bool {
        now < self.settled_at && self.sessions.values().any(|session| !session.ready)
    }

    fn set_placed(&mut self, attempt: AttemptId, session: SessionId, wish: Wish) {
        if let Some(want) = self.wants.queued_mut(attempt) {
            want.placed = Some(session);
        }
        self.ask(session, attempt, wish);
        self.changed.insert(session);
        let agent = self.sessions.get(&session).map(|session| session.agent);
        if let (Some(owner), Some(agent)) = (self.owner_of(attempt), agent) {
            self.tell_controller(
                owner,
                scheduler::scheduler_message::Body::Placed(scheduler::Placed {
                    attempt: Some(attempt.into()),
                    agent_id: agent.to_string(),
                }),
            );
        }
    }

    /// An agent took the attempt on and has it no more, and nobody claimed it: it waits again. At once the first time;
    /// after that with growing pauses, so that an agent that refuses everything is not asked without end.
    pub(super) fn let_go(&mut self, now: Duration, session: SessionId, attempt: AttemptId) {
        if let Some(session) = self.sessions.get_mut(&session) {
            session.forget(attempt);
        }
        self.touched.insert(session);
        let Some(want) = self.wants.queued_mut(attempt) else { return };
        want.placed = None;
        want.let_go += 1;
        if let Some(doublings) = want.let_go.checked_sub(2) {
            want.not_before = now + FIRST_PAUSE * (1 << doublings.min(MOST_DOUBLINGS));
        }
        self.seek_agent(now, attempt);
    }

    /// Why the attempt waits; none where it does not.
    pub(super) fn why(&self, attempt: AttemptId) -> Option<Vec<String>> {
        let want = self.wants.queued(attempt).filter(|want| want.placed.is_none())?;
        if self.wants.is_stale(attempt) {
            return Some(vec!["its pipeline is passing from one controller to another".into()]);
        }
        if self.held_back.contains(&attempt)
            && let Some((former, session)) = self.former_holder(attempt)
        {
            let agent = self.sessions.get(&session).and_then(|session| self.directory.agent(session.agent));
            let agent = agent.map_or("an agent", |agent| &agent.name);
            let number = former.number;
            return Some(vec![format!(
                "it is exclusive, and attempt {number} is not gone yet from {agent}, where it is cleaned up"
            )]);
        }
        if !self.placement.queue().contains(attempt) {
            let times = want.let_go;
            return Some(vec![format!(
                "agents took it on and let go of it {times} times: it is tried again soon"
            )]);
        }
        let mut reasons = self.placement.why(attempt);
        if !self.knows_what_is_unfinished() {
            reasons.insert(0, "no controller has said yet which pipelines are unfinished".into());
        }
        Some(reasons)
    }
}

const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause is 32 s.
const MOST_DOUBLINGS: u32 = 5;
