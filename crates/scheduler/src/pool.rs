//! Keeps the agents that may get work: what each has, what of it is reserved, and whether it takes anything new.
//!
//! Only connected agents are here, each with its current instance. What an agent reserves is what it said to hold
//! together with what it was asked to take on and has not answered for yet; so nothing is given away twice while a
//! placement is under way.
//!
//! Invariant: `open` holds exactly the agents that take work and have a slot left, by the weight of their free room.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sealci_core::ids::{AgentId, AttemptId};
use sealci_core::plan::Resources;

use crate::requirements::{Offer, Requirements, weight};

/// What one attempt takes from an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reservation {
    pub resources: Resources,
    /// Whose it is, where that is known.
    pub repository: Option<Arc<str>>,
}

/// One agent of the pool.
#[derive(Debug, Clone)]
pub struct PoolAgent {
    /// What people see.
    pub name: String,
    pub offer: Offer,
    /// Takes no new work, by a person's wish.
    pub drained: bool,
    /// Has said what it holds. Before that its free room is not known.
    pub ready: bool,
    reservations: BTreeMap<AttemptId, Reservation>,
    reserved: Resources,
}

impl PoolAgent {
    pub fn new(name: String, offer: Offer, drained: bool) -> Self {
        Self {
            name,
            offer,
            drained,
            ready: false,
            reservations: BTreeMap::new(),
            reserved: Resources::default(),
        }
    }

    /// What is not reserved.
    pub fn available(&self) -> Resources {
        self.offer.capacity.minus(&self.reserved)
    }

    /// Whether it gets new work at all.
    pub fn takes_work(&self) -> bool {
        self.ready && !self.drained && self.offer.closed_because.is_none()
    }

    pub fn has_free_slot(&self) -> bool {
        self.reservations.len() < self.offer.slots as usize
    }

    /// Whether it has room for one more of this kind now.
    pub fn has_room(&self, wanted: &Requirements) -> bool {
        self.has_free_slot() && self.available().fits(&wanted.resources)
    }

    /// Whether it would take this kind if it held nothing.
    pub fn could_take(&self, wanted: &Requirements) -> bool {
        self.takes_work() && self.offer.could_run(wanted)
    }

    pub fn reservations(&self) -> &BTreeMap<AttemptId, Reservation> {
        &self.reservations
    }

    fn place_in_index(&self, id: AgentId) -> Option<Place> {
        (self.takes_work() && self.has_free_slot()).then(|| Place {
            free_weight: weight(&self.available()),
            attempts: self.reservations.len(),
            id,
        })
    }
}

/// Where an agent stands among those with room: the fullest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    free_weight: u64,
    attempts: usize,
    id: AgentId,
}

/// The connected agents.
#[derive(Debug, Default)]
pub struct Pool {
    agents: BTreeMap<AgentId, PoolAgent>,
    open: BTreeSet<Place>,
}

impl Pool {
    pub fn agents(&self) -> &BTreeMap<AgentId, PoolAgent> {
        &self.agents
    }

    /// Takes an agent in; one of that id that was here is replaced, its reservations forgotten.
    pub fn join(&mut self, id: AgentId, agent: PoolAgent) {
        self.leave(id);
        self.open.extend(agent.place_in_index(id));
        self.agents.insert(id, agent);
    }

    /// Takes an agent out; gives back what it was.
    pub fn leave(&mut self, id: AgentId) -> Option<PoolAgent> {
        let agent = self.agents.remove(&id)?;
        if let Some(place) = agent.place_in_index(id) {
            self.open.remove(&place);
        }
        Some(agent)
    }

    /// Changes what an agent offers or whether it takes work.
    pub fn change(&mut self, id: AgentId, change: impl FnOnce(&mut PoolAgent)) {
        let Some(agent) = self.agents.get_mut(&id) else { return };
        if let Some(place) = agent.place_in_index(id) {
            self.open.remove(&place);
        }
        change(agent);
        self.open.extend(agent.place_in_index(id));
    }

    /// Reserves room; an attempt that has some already gets this instead. Gives back what it had.
    pub fn reserve(
        &mut self,
        id: AgentId,
        attempt: AttemptId,
        reservation: Reservation,
    ) -> Option<Reservation> {
        let mut before = None;
        self.change(id, |agent| {
            agent.reserved = agent.reserved.plus(&reservation.resources);
            before = agent.reservations.insert(attempt, reservation);
            if let Some(before) = &before {
                agent.reserved = agent.reserved.minus(&before.resources);
            }
        });
        before
    }

    /// Frees what an attempt had.
    pub fn release(&mut self, id: AgentId, attempt: AttemptId) -> Option<Reservation> {
        let mut before = None;
        self.change(id, |agent| {
            before = agent.reservations.remove(&attempt);
            if let Some(before) = &before {
                agent.reserved = agent.reserved.minus(&before.resources);
            }
        });
        before
    }

    /// The agent with room for this that has the least room: so the largest room stays whole elsewhere. Among equals
    /// the one with the fewest attempts, then the lowest id.
    pub fn best_fit(&self, wanted: &Requirements, but_not: Option<AgentId>) -> Option<AgentId> {
        // Nothing lighter than what is wanted can hold it.
        let lowest_id = AgentId::from_uuid(Default::default());
        let from = Place { free_weight: weight(&wanted.resources), attempts: 0, id: lowest_id };
        self.open
            .range(from..)
            .map(|place| place.id)
            .filter(|id| Some(*id) != but_not)
            .find(|id| self.agents.get(id).is_some_and(|agent| fits_now(agent, wanted)))
    }

    /// As [`Pool::best_fit`], of these agents only.
    pub fn best_fit_of(
        &self,
        wanted: &Requirements,
        agents: impl Iterator<Item = AgentId>,
    ) -> Option<AgentId> {
        agents
            .filter_map(|id| {
                let agent = self.agents.get(&id).filter(|agent| fits_now(agent, wanted))?;
                agent.place_in_index(id)
            })
            .min()
            .map(|place| place.id)
    }

    /// Whether any agent that takes work would take this if it held nothing.
    pub fn could_ever(&self, wanted: &Requirements) -> bool {
        self.agents.values().any(|agent| agent.could_take(wanted))
    }

    /// Where this will fit soonest: the agent that lacks the least, among equals the one with the most free.
    pub fn soonest(&self, wanted: &Requirements) -> Option<AgentId> {
        let distance = |(id, agent): &(&AgentId, &PoolAgent)| {
            let available = agent.available();
            let lacks = wanted.resources.minus(&available);
            (weight(&lacks), !agent.has_free_slot(), Reverse(weight(&available)), **id)
        };
        self.agents
            .iter()
            .filter(|(_, agent)| agent.could_take(wanted))
            .min_by_key(distance)
            .map(|(id, _)| *id)
    }
}

fn fits_now(agent: &PoolAgent, wanted: &Requirements) -> bool {
    agent.has_room(wanted) && agent.could_take(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn id(n: u64) -> AgentId {
        AgentId::from_parts(n, &[0; 10])
    }

    fn attempt(n: u64) -> AttemptId {
        AttemptId { action: sealci_core::ids::ActionId::from_parts(n, &[0; 10]), number: 1 }
    }

    fn agent(cpu_millis: u64, memory_bytes: u64, slots: u32) -> PoolAgent {
        let offer = Offer {
            capacity: Resources { cpu_millis, memory_bytes },
            executors: vec!["sandbox".into()],
            slots,
            ..Offer::default()
        };
        PoolAgent { ready: true, ..PoolAgent::new("a".into(), offer, false) }
    }

    fn asks(cpu_millis: u64, memory_bytes: u64) -> Requirements {
        Requirements {
            resources: Resources { cpu_millis, memory_bytes },
            labels: BTreeMap::new(),
            executor: None,
        }
    }

    fn takes(cpu_millis: u64) -> Reservation {
        Reservation { resources: Resources { cpu_millis, memory_bytes: 0 }, repository: None }
    }

    #[test]
    fn the_fullest_that_fits_is_chosen() {
        let mut pool = Pool::default();
        pool.join(id(1), agent(8000, 8 * GIB, 9));
        pool.join(id(2), agent(2000, 2 * GIB, 9));
        pool.join(id(3), agent(2000, 2 * GIB, 9));
        assert_eq!(pool.best_fit(&asks(1000, GIB), None), Some(id(2)), "equals go by id");
        pool.reserve(id(2), attempt(1), takes(0));
        assert_eq!(pool.best_fit(&asks(1000, GIB), None), Some(id(3)), "fewest attempts first");
        assert_eq!(pool.best_fit(&asks(1000, 4 * GIB), None), Some(id(1)));
        assert_eq!(pool.best_fit(&asks(1000, 4 * GIB), Some(id(1))), None);
        assert_eq!(pool.best_fit(&asks(9000, 0), None), None);
    }

    #[test]
    fn an_exact_fit_fits() {
        let mut pool = Pool::default();
        pool.join(AgentId::from_uuid(Default::default()), agent(1000, GIB, 1));
        assert!(pool.best_fit(&asks(1000, GIB), None).is_some());
    }

    #[test]
    fn slots_drain_and_silence_close_an_agent() {
        let mut pool = Pool::default();
        pool.join(id(1), agent(8000, 0, 1));
        pool.reserve(id(1), attempt(1), takes(1));
        assert_eq!(pool.best_fit(&asks(1, 0), None), None, "no slot");
        assert!(pool.could_ever(&asks(1, 0)));
        pool.release(id(1), attempt(1));
        assert_eq!(pool.best_fit(&asks(1, 0), None), Some(id(1)));
        for close in [
            (|agent: &mut PoolAgent| agent.drained = true) as fn(&mut PoolAgent),
            |agent| agent.ready = false,
            |agent| agent.offer.closed_because = Some("disk below 1 GiB".into()),
        ] {
            let before = pool.agents()[&id(1)].clone();
            pool.change(id(1), close);
            assert_eq!(pool.best_fit(&asks(1, 0), None), None);
            assert!(!pool.could_ever(&asks(1, 0)));
            pool.change(id(1), |agent| *agent = before);
        }
        pool.leave(id(1));
        assert!(pool.open.is_empty());
    }

    #[test]
    fn soonest_is_where_least_is_lacking() {
        let mut pool = Pool::default();
        pool.join(id(1), agent(4000, 0, 9));
        pool.join(id(2), agent(4000, 0, 9));
        pool.reserve(id(1), attempt(1), takes(3000));
        pool.reserve(id(2), attempt(2), takes(1000));
        assert_eq!(pool.soonest(&asks(4000, 0)), Some(id(2)));
        assert_eq!(pool.soonest(&asks(5000, 0)), None);
    }
}
