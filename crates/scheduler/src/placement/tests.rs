//! Drives placement at random against a plain model of agents on which attempts start and end.

use std::collections::HashMap;

use proptest::prelude::*;
use sealci_core::ids::ActionId;
use sealci_core::plan::Resources;

use super::*;

fn attempt(n: u64) -> AttemptId {
    AttemptId { action: ActionId::from_parts(n, &[0; 10]), number: 1 }
}

fn agent_id(n: u64) -> AgentId {
    AgentId::from_parts(n, &[0; 10])
}

fn agent(cpu: u64, memory: u64, slots: u32, label: u8) -> PoolAgent {
    let offer = Offer {
        capacity: Resources { cpu_millis: cpu, memory_bytes: memory },
        labels: [("zone".to_owned(), label.to_string())].into(),
        executors: vec!["sandbox".into()],
        slots,
        closed_because: None,
    };
    let mut agent = PoolAgent::new("a".into(), offer, false);
    agent.ready = true;
    agent
}

fn waiting(cpu: u64, memory: u64, label: Option<u8>, priority: i32, order: u64, repository: u8) -> Waiting {
    Waiting {
        requirements: Arc::new(Requirements {
            resources: Resources { cpu_millis: cpu, memory_bytes: memory },
            labels: label.map(|label| ("zone".to_owned(), label.to_string())).into_iter().collect(),
            executor: None,
        }),
        priority,
        order,
        repository: repository.to_string().into(),
    }
}

fn place_all(placement: &mut Placement) -> Vec<Placed> {
    std::iter::from_fn(|| placement.place_next()).collect()
}

#[test]
fn small_attempts_do_not_pass_a_large_one_for_ever() {
    let mut placement = Placement::default();
    placement.join(agent_id(1), agent(4, 4, 9, 0));
    let mut running: Vec<_> = (0..4).map(attempt).collect();
    for n in 0..4 {
        placement.enqueue(attempt(n), waiting(1, 1, None, 0, n, 1));
    }
    assert_eq!(place_all(&mut placement).len(), 4);
    placement.enqueue(attempt(100), waiting(4, 4, None, 0, 100, 2));
    for n in 101..200 {
        placement.enqueue(attempt(n), waiting(1, 1, None, 0, n, n as u8));
    }
    while let Some(ended) = running.pop() {
        assert!(place_all(&mut placement).is_empty(), "the room is kept");
        placement.release(agent_id(1), ended);
    }
    let placed = place_all(&mut placement);
    assert_eq!(placed.iter().map(|placed| placed.attempt).collect::<Vec<_>>(), [attempt(100)]);
}

#[test]
fn what_fits_nowhere_holds_nobody_back() {
    let mut placement = Placement::default();
    placement.join(agent_id(1), agent(4, 4, 9, 0));
    placement.enqueue(attempt(1), waiting(5, 1, None, 1, 1, 1));
    placement.enqueue(attempt(2), waiting(1, 1, Some(7), 1, 2, 1));
    placement.enqueue(attempt(3), waiting(4, 4, None, 0, 3, 1));
    assert_eq!(place_all(&mut placement).len(), 1);
    placement.join(agent_id(2), agent(5, 5, 9, 7));
    assert_eq!(place_all(&mut placement).len(), 1, "an agent that could run it came");
    placement.release(agent_id(2), attempt(1));
    assert_eq!(place_all(&mut placement).len(), 1);
}

#[test]
fn a_higher_priority_takes_the_room_that_is_kept() {
    let mut placement = Placement::default();
    placement.join(agent_id(1), agent(4, 4, 9, 0));
    placement.enqueue(attempt(1), waiting(2, 2, None, 0, 1, 1));
    place_all(&mut placement);
    placement.enqueue(attempt(2), waiting(4, 4, None, 0, 2, 2));
    placement.enqueue(attempt(3), waiting(2, 2, None, 0, 3, 3));
    assert!(place_all(&mut placement).is_empty());
    placement.enqueue(attempt(4), waiting(2, 2, None, 1, 4, 3));
    assert_eq!(place_all(&mut placement), [Placed { attempt: attempt(4), agent: agent_id(1) }]);
    placement.withdraw(attempt(2));
    placement.release(agent_id(1), attempt(4));
    assert_eq!(place_all(&mut placement).len(), 1, "nothing is kept for what is gone");
}

#[test]
fn repositories_take_turns() {
    let mut placement = Placement::default();
    placement.join(agent_id(1), agent(4, 4, 9, 0));
    for n in 0..20 {
        placement.enqueue(attempt(n), waiting(1, 1, None, 0, n, 1));
    }
    for n in 20..30 {
        placement.enqueue(attempt(n), waiting(1, 1, None, 0, n, 2));
    }
    let of_second = place_all(&mut placement).iter().filter(|placed| placed.attempt >= attempt(20)).count();
    assert_eq!(of_second, 2);
}

#[derive(Debug, Clone)]
enum Step {
    Enqueue { cpu: u64, memory: u64, label: Option<u8>, priority: i32, repository: u8 },
    Withdraw(prop::sample::Index),
    End(prop::sample::Index),
    Join { n: u64, cpu: u64, memory: u64, slots: u32, label: u8 },
    Leave(u64),
    Drain(u64, bool),
    Settle,
}

fn step() -> impl Strategy<Value = Step> {
    let enqueue = (1..9_u64, 0..9_u64, prop::option::weighted(0.3, 0..3_u8), -1..2_i32, 0..4_u8).prop_map(
        |(cpu, memory, label, priority, repository)| Step::Enqueue {
            cpu,
            memory,
            label,
            priority,
            repository,
        },
    );
    let join = (0..4_u64, 1..9_u64, 1..9_u64, 0..4_u32, 0..3_u8)
        .prop_map(|(n, cpu, memory, slots, label)| Step::Join { n, cpu, memory, slots, label });
    prop_oneof![
        6 => enqueue,
        1 => any::<prop::sample::Index>().prop_map(Step::Withdraw),
        4 => any::<prop::sample::Index>().prop_map(Step::End),
        2 => join,
        1 => (0..4_u64).prop_map(Step::Leave),
        1 => (0..4_u64, any::<bool>()).prop_map(|(n, drained)| Step::Drain(n, drained)),
        4 => Just(Step::Settle),
    ]
}

/// What the steps made of the world, and every placement in order.
#[derive(Default)]
struct World {
    placement: Placement,
    waiting: BTreeMap<AttemptId, Waiting>,
    running: BTreeMap<AttemptId, (AgentId, Waiting)>,
    placed: Vec<Placed>,
    arrivals: u64,
}

impl World {
    fn take(&mut self, step: &Step) {
        match step {
            Step::Enqueue { cpu, memory, label, priority, repository } => {
                self.arrivals += 1;
                let entry = waiting(*cpu, *memory, *label, *priority, self.arrivals, *repository);
                self.waiting.insert(attempt(self.arrivals), entry.clone());
                self.placement.enqueue(attempt(self.arrivals), entry);
            }
            Step::Withdraw(index) if !self.waiting.is_empty() => {
                let id = *index.get(&self.waiting.keys().collect::<Vec<_>>()).to_owned();
                self.waiting.remove(&id);
                self.placement.withdraw(id);
            }
            Step::End(index) if !self.running.is_empty() => {
                let id = *index.get(&self.running.keys().collect::<Vec<_>>()).to_owned();
                let Some((agent, _)) = self.running.remove(&id) else { return };
                self.placement.release(agent, id);
            }
            Step::Join { n, cpu, memory, slots, label } => {
                self.running.retain(|_, (on, _)| *on != agent_id(*n));
                self.placement.join(agent_id(*n), agent(*cpu, *memory, *slots, *label));
            }
            Step::Leave(n) => {
                self.running.retain(|_, (on, _)| *on != agent_id(*n));
                self.placement.leave(agent_id(*n));
            }
            Step::Drain(n, drained) => self.placement.set_drained(agent_id(*n), *drained),
            Step::Settle => self.settle(),
            Step::Withdraw(_) | Step::End(_) => {}
        }
    }

    fn settle(&mut self) {
        for placed in place_all(&mut self.placement) {
            let waiting = self.waiting.remove(&placed.attempt).expect("only what waits is placed");
            self.running.insert(placed.attempt, (placed.agent, waiting));
            self.placed.push(placed);
        }
        self.check();
    }

    fn check(&self) {
        for (id, agent) in self.placement.pool().agents() {
            let here: Vec<_> = self.running.values().filter(|(on, _)| on == id).collect();
            let used = here
                .iter()
                .fold(Resources::default(), |used, (_, waiting)| used.plus(&waiting.requirements.resources));
            assert!(agent.offer.capacity.fits(&used), "{id} is over-committed");
            assert!(here.len() <= agent.offer.slots as usize);
            assert_eq!(agent.available(), agent.offer.capacity.minus(&used));
            assert!(here.iter().all(|(_, waiting)| agent.offer.could_run(&waiting.requirements)));
        }
        let mut usage: HashMap<&str, u64> = HashMap::new();
        for (_, waiting) in self.running.values() {
            *usage.entry(&waiting.repository).or_default() += waiting.requirements.resources.cpu_millis;
        }
        for repository in ["0", "1", "2", "3"] {
            let expected = usage.get(repository).copied().unwrap_or(0);
            assert_eq!(self.placement.queue().usage_cpu_millis(repository), expected);
        }
        assert_eq!(self.placement.queue().len(), self.waiting.len());
        for (id, waiting) in &self.waiting {
            let reasons = self.placement.why(*id);
            assert!(!reasons.is_empty() && reasons.iter().all(|reason| !reason.is_empty()));
            // Whoever waits though there is room waits because that room is kept for another.
            let room = self.placement.pool().agents().iter().any(|(agent, room)| {
                room.could_take(&waiting.requirements)
                    && room.has_room(&waiting.requirements)
                    && !self.placement.kept.is_some_and(|kept| kept.bars(*agent, waiting.priority))
            });
            assert!(!room, "{id} was left waiting: {reasons:?}");
        }
        for id in self.running.keys() {
            assert!(self.placement.why(*id).is_empty());
        }
    }

    /// Ends one attempt after the other, oldest first, while small ones keep coming; all that could be placed at the
    /// beginning must have been in the end.
    fn all_get_their_turn(&mut self) {
        self.settle();
        let placeable: Vec<_> = self
            .waiting
            .iter()
            .filter(|(_, waiting)| self.placement.pool().could_ever(&waiting.requirements))
            // Higher priorities may pass the others as long as they keep coming.
            .filter(|(_, waiting)| waiting.priority >= 0)
            .map(|(id, _)| *id)
            .collect();
        let deadline = 40 * (placeable.len() + self.running.len() + 1);
        for _ in 0..deadline {
            let small = Step::Enqueue {
                cpu: 1,
                memory: 0,
                label: None,
                priority: 0,
                repository: self.arrivals as u8 % 4,
            };
            self.take(&small);
            if let Some(id) = self.running.keys().next().copied()
                && let Some((agent, _)) = self.running.remove(&id)
            {
                self.placement.release(agent, id);
            }
            self.settle();
        }
        for id in placeable {
            assert!(!self.waiting.contains_key(&id), "{id} was starved: {:?}", self.placement.why(id));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn placement_keeps_its_promises(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::default();
        let mut twin = World::default();
        for step in &steps {
            world.take(step);
            twin.take(step);
        }
        prop_assert_eq!(&world.placed, &twin.placed);
        world.all_get_their_turn();
    }
}
