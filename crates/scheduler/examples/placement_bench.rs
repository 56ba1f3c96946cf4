//! Measures how long placement takes with 100,000 waiting attempts, or as many as are named, and 1,000 agents.
//!
//! `cargo run --release -p sealci-scheduler --example placement_bench [ATTEMPTS]`
//!
//! First the empty pool is filled, then one running attempt after the other ends and its room is given away again. A
//! *decision* is one call that places an attempt or finds that nothing more can be placed; a *round* is the end of an
//! attempt and all decisions that follow from it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealci_core::ids::{ActionId, AgentId, AttemptId};
use sealci_core::plan::Resources;
use sealci_scheduler::placement::{Placed, Placement};
use sealci_scheduler::pool::PoolAgent;
use sealci_scheduler::queue::Waiting;
use sealci_scheduler::requirements::{Offer, Requirements};

const ATTEMPTS: u64 = 100_000;
const AGENTS: u64 = 1_000;
const REPOSITORIES: u64 = 200;
const ROUNDS: u64 = 20_000;
const GIB: u64 = 1 << 30;

/// Pseudo-random numbers, the same in every run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

fn agent(n: u64) -> PoolAgent {
    let cpus = [4, 8, 16, 32][n as usize % 4];
    let offer = Offer {
        capacity: Resources { cpu_millis: cpus * 1000, memory_bytes: cpus * 2 * GIB },
        labels: [("zone".to_owned(), (n % 8).to_string()), ("arch".to_owned(), (n % 3).to_string())].into(),
        executors: vec!["sandbox".into(), "process".into()],
        slots: 64,
        closed_because: None,
    };
    let mut agent = PoolAgent::new(format!("agent-{n}"), offer, false);
    agent.ready = true;
    agent
}

/// Sizes, labels and executors of all kinds: about 500 classes; one in 1,000 fits nowhere.
fn waiting(order: u64, numbers: &mut Numbers) -> Waiting {
    let cpus = [1, 1, 1, 2, 4, 8, 16][numbers.below(7) as usize];
    let memory = 1 + numbers.below(4);
    let mut labels = BTreeMap::new();
    match numbers.below(6) {
        0 => drop(labels.insert("zone".to_owned(), numbers.below(8).to_string())),
        1 => drop(labels.insert("arch".to_owned(), numbers.below(3).to_string())),
        _ => {}
    }
    if numbers.below(1000) == 0 {
        labels.insert("gpu".into(), "true".into());
    }
    let executor = (numbers.below(4) == 0).then(|| "process".to_owned());
    let resources = Resources { cpu_millis: cpus * 1000, memory_bytes: memory * GIB };
    Waiting {
        requirements: Arc::new(Requirements { resources, labels, executor }),
        priority: [-1, 0, 0, 0, 1][numbers.below(5) as usize],
        order,
        repository: format!("repository-{}", numbers.below(REPOSITORIES)).into(),
    }
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |per_mille: usize| times[(times.len() - 1) * per_mille / 1000];
    println!(
        "{what}: {} times, p50 {:?}, p99 {:?}, p99.9 {:?}, longest {:?}",
        times.len(),
        at(500),
        at(990),
        at(999),
        at(1000)
    );
}

/// Places all that can be placed, and notes how long each decision took.
fn place_all(placement: &mut Placement, running: &mut Vec<Placed>, times: &mut Vec<Duration>) {
    loop {
        let start = Instant::now();
        let placed = placement.place_next();
        times.push(start.elapsed());
        match placed {
            Some(placed) => running.push(placed),
            None => return,
        }
    }
}

fn main() {
    let attempts = std::env::args().nth(1).and_then(|count| count.parse().ok()).unwrap_or(ATTEMPTS);
    let mut numbers = Numbers(1);
    let mut placement = Placement::default();
    let start = Instant::now();
    for n in 0..attempts {
        let attempt = AttemptId { action: ActionId::from_parts(n, &[0; 10]), number: 1 };
        placement.enqueue(attempt, waiting(n, &mut numbers));
    }
    println!("{attempts} attempts enqueued in {:?}", start.elapsed());
    for n in 0..AGENTS {
        placement.join(AgentId::from_parts(n, &[1; 10]), agent(n));
    }

    let (mut running, mut times) = (Vec::new(), Vec::new());
    place_all(&mut placement, &mut running, &mut times);
    println!("{} placed on {AGENTS} agents, {} wait", running.len(), placement.queue().len());
    report("decisions while filling", times);

    let (mut decisions, mut rounds) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        if running.is_empty() {
            break;
        }
        let ended = running.swap_remove(numbers.below(running.len() as u64) as usize);
        let start = Instant::now();
        placement.release(ended.agent, ended.attempt);
        place_all(&mut placement, &mut running, &mut decisions);
        rounds.push(start.elapsed());
        // As many come as go.
        let attempt = AttemptId { action: ActionId::from_parts(attempts + round, &[0; 10]), number: 1 };
        placement.enqueue(attempt, waiting(attempts + round, &mut numbers));
    }
    println!("{} run, {} wait", running.len(), placement.queue().len());
    report("decisions afterwards", decisions);
    report("rounds afterwards", rounds);
}
