//! Chooses which attempt goes to which agent.
//!
//! Attempts are tried in the queue's order, each on the agent where it leaves the least room over. The first one that
//! some agent could run but that fits nowhere now gets room *kept* for it on one agent: nothing of its priority or a
//! lower one is placed there any more until it has been placed itself, on that agent or another, so small attempts
//! cannot pass a large one for ever. Room is kept for one attempt at a time, and goes over to another only when that
//! one has a higher priority: would it follow each change of the order, two large attempts could keep each other
//! waiting. What no agent could run has no room kept and holds nobody back.
//!
//! Invariants: an agent's reservations never grow past its capacity and slots by a placement; the same calls in the same
//! order place the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use sealci_core::ids::{AgentId, AttemptId};

use crate::pool::{Pool, PoolAgent, Reservation};
use crate::queue::{Candidates, Head, Queue, Standing, Waiting};
use crate::requirements::{Offer, Requirements};

/// An attempt and the agent chosen for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    pub attempt: AttemptId,
    pub agent: AgentId,
}

/// Room that is kept for an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kept {
    pub attempt: AttemptId,
    pub agent: AgentId,
    pub priority: i32,
    /// Nothing has been freed since it was tried in vain.
    tried: bool,
}

impl Kept {
    /// Whether an attempt of this priority must stay off this agent.
    pub fn bars(&self, agent: AgentId, priority: i32) -> bool {
        self.agent == agent && priority <= self.priority
    }
}

/// Queue and pool together.
#[derive(Debug, Default)]
pub struct Placement {
    pub(crate) queue: Queue,
    pub(crate) pool: Pool,
    pub(crate) kept: Option<Kept>,
}

impl Placement {
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Lets an attempt wait.
    pub fn enqueue(&mut self, attempt: AttemptId, waiting: Waiting) {
        self.queue.insert(attempt, waiting);
    }

    /// Takes an attempt out of the queue, if it waits.
    pub fn withdraw(&mut self, attempt: AttemptId) {
        self.queue.remove(attempt);
    }

    /// Takes a connected agent in, holding nothing yet.
    pub fn join(&mut self, id: AgentId, agent: PoolAgent) {
        self.leave(id);
        self.pool.join(id, agent);
        self.room_changed(id);
    }

    /// Takes an agent out; what it had reserved is free of use.
    pub fn leave(&mut self, id: AgentId) {
        let Some(agent) = self.pool.leave(id) else { return };
        for reservation in agent.reservations().values() {
            self.count_usage(reservation, false);
        }
    }

    pub fn set_offer(&mut self, id: AgentId, offer: Offer) {
        self.change(id, |agent| agent.offer = offer);
    }

    pub fn set_drained(&mut self, id: AgentId, drained: bool) {
        self.change(id, |agent| agent.drained = drained);
    }

    pub fn set_ready(&mut self, id: AgentId) {
        self.change(id, |agent| agent.ready = true);
    }

    pub fn set_name(&mut self, id: AgentId, name: String) {
        self.pool.change(id, |agent| agent.name = name);
    }

    /// Makes these all that an agent has reserved.
    pub fn set_reservations(&mut self, id: AgentId, mut wanted: BTreeMap<AttemptId, Reservation>) {
        let Some(agent) = self.pool.agents().get(&id) else { return };
        let mut over = Vec::new();
        for (attempt, reservation) in agent.reservations() {
            match wanted.get(attempt) {
                None => over.push(*attempt),
                Some(same) if same == reservation => drop(wanted.remove(attempt)),
                Some(_) => {}
            }
        }
        if over.is_empty() && wanted.is_empty() {
            return;
        }
        for attempt in over {
            if let Some(before) = self.pool.release(id, attempt) {
                self.count_usage(&before, false);
            }
        }
        for (attempt, reservation) in wanted {
            self.reserve(id, attempt, reservation);
        }
        self.room_changed(id);
    }

    /// Frees what one attempt has reserved.
    pub fn release(&mut self, id: AgentId, attempt: AttemptId) {
        if let Some(before) = self.pool.release(id, attempt) {
            self.count_usage(&before, false);
            self.room_changed(id);
        }
    }

    /// Places the next attempt, if any can be placed now: it leaves the queue, and its room is reserved.
    pub fn place_next(&mut self) -> Option<Placed> {
        loop {
            self.drop_void_keep();
            let next = self.queue.first_open();
            self.keep_room(next);
            if let Some(kept) = &mut self.kept
                && !kept.tried
                && next.is_none_or(|next| next.priority() <= kept.priority)
            {
                kept.tried = true;
                let attempt = kept.attempt;
                if let Some(placed) = self.try_place_kept(attempt) {
                    self.end_keep();
                    return Some(placed);
                }
                continue;
            }
            let next = next?;
            if let Some(placed) = self.try_place(next.attempt) {
                return Some(placed);
            }
            self.queue.set_standing(next.line(), Standing::Blocked);
        }
    }

    /// Tries an attempt with the agents that may have room for its line.
    fn try_place(&mut self, attempt: AttemptId) -> Option<Placed> {
        let (line, wanted) = self.queue.line_of(attempt)?;
        let barred = self.kept.filter(|kept| line.priority() <= kept.priority).map(|kept| kept.agent);
        let agent = match self.queue.candidates(line)? {
            Candidates::Any => self.pool.best_fit(&wanted, barred),
            Candidates::These(agents) => {
                let agents = agents.iter().copied().filter(|agent| Some(*agent) != barred);
                self.pool.best_fit_of(&wanted, agents)
            }
        };
        Some(self.give(attempt, &wanted, agent?))
    }

    /// Tries the attempt that room is kept for, with every agent.
    fn try_place_kept(&mut self, attempt: AttemptId) -> Option<Placed> {
        let (_, wanted) = self.queue.line_of(attempt)?;
        let agent = self.pool.best_fit(&wanted, None)?;
        Some(self.give(attempt, &wanted, agent))
    }

    fn give(&mut self, attempt: AttemptId, wanted: &Requirements, agent: AgentId) -> Placed {
        let repository = self.queue.remove(attempt);
        self.reserve(agent, attempt, Reservation { resources: wanted.resources, repository });
        Placed { attempt, agent }
    }

    /// Keeps room for the first attempt that waits in vain, if it comes before the next to try: what comes before it
    /// shall find the room as it is.
    fn keep_room(&mut self, next: Option<Head>) {
        while let Some(head) = self.queue.first_blocked() {
            let later = next.is_some_and(|next| next < head);
            let no_more_urgent = self.kept.is_some_and(|kept| head.priority() <= kept.priority);
            if later || no_more_urgent {
                return;
            }
            let soonest = self.queue.line_of(head.attempt).and_then(|(_, wanted)| self.pool.soonest(&wanted));
            let Some(agent) = soonest else {
                self.queue.set_standing(head.line(), Standing::Nowhere);
                continue;
            };
            self.end_keep();
            let priority = head.priority();
            self.kept = Some(Kept { attempt: head.attempt, agent, priority, tried: false });
            return;
        }
    }

    /// Ends keeping room where the attempt waits no longer, or the agent would not take it any more.
    fn drop_void_keep(&mut self) {
        let Some(kept) = self.kept else { return };
        let holds = self.queue.line_of(kept.attempt).is_some_and(|(_, wanted)| {
            self.pool.agents().get(&kept.agent).is_some_and(|agent| agent.could_take(&wanted))
        });
        if !holds {
            self.end_keep();
        }
    }

    fn end_keep(&mut self) {
        if let Some(kept) = self.kept.take() {
            self.room_changed(kept.agent);
        }
    }

    fn change(&mut self, id: AgentId, change: impl FnOnce(&mut PoolAgent)) {
        self.pool.change(id, change);
        self.room_changed(id);
    }

    fn reserve(&mut self, id: AgentId, attempt: AttemptId, reservation: Reservation) {
        self.count_usage(&reservation, true);
        if let Some(before) = self.pool.reserve(id, attempt, reservation) {
            self.count_usage(&before, false);
        }
    }

    fn count_usage(&mut self, reservation: &Reservation, more: bool) {
        let Some(repository) = &reservation.repository else { return };
        let cpu_millis = reservation.resources.cpu_millis;
        self.queue.change_usage(repository, |usage| match more {
            true => usage.saturating_add(cpu_millis),
            false => usage.saturating_sub(cpu_millis),
        });
    }

    /// Looks again at the lines that this agent has room for now.
    fn room_changed(&mut self, id: AgentId) {
        let Some(agent) = self.pool.agents().get(&id).filter(|agent| agent.takes_work()) else { return };
        if let Some(kept) = &mut self.kept
            && let Some((_, wanted)) = self.queue.line_of(kept.attempt)
            && agent.has_room(&wanted)
            && agent.could_take(&wanted)
        {
            kept.tried = false;
        }
        let kept = self.kept;
        let mut open = Vec::new();
        let mut blocked = Vec::new();
        for (line, wanted, standing) in self.queue.lines() {
            let barred = kept.is_some_and(|kept| kept.bars(id, line.priority()));
            let has_room = agent.has_room(wanted) && !barred;
            match standing {
                Standing::Open(Candidates::Any) => {}
                // What it could not be tried with before, it could not be placed on either.
                Standing::Open(_) | Standing::Blocked if !has_room => {}
                _ if !agent.could_take(wanted) => {}
                _ if has_room => open.push(line),
                _ => blocked.push(line),
            }
        }
        for line in open {
            self.queue.open_for(line, id);
        }
        for line in blocked {
            self.queue.set_standing(line, Standing::Blocked);
        }
    }

    /// What an attempt that waits asks for.
    pub fn requirements(&self, attempt: AttemptId) -> Option<Arc<Requirements>> {
        self.queue.line_of(attempt).map(|(_, wanted)| wanted)
    }
}

#[cfg(test)]
mod tests;
