//! Plays the histories of many seeds. `SEALCI_SIMULATION_SEEDS` says how many, `SEALCI_SIMULATION_FIRST` from which on,
//! `SEALCI_SIMULATION_SEED` plays that one again and prints its steps.

use std::time::{Duration, Instant};

use sealci_simulation::history::play;

/// In the test command so long.
const USUALLY: Duration = Duration::from_secs(20);

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn histories_end_as_they_must() {
    if let Some(seed) = number("SEALCI_SIMULATION_SEED") {
        play(seed, true);
        return;
    }
    let count = number("SEALCI_SIMULATION_SEEDS");
    let first = number("SEALCI_SIMULATION_FIRST").unwrap_or_else(|| rand::random::<u32>().into());
    let start = Instant::now();
    let (mut played, mut steps) = (0, 0);
    while count.map_or(start.elapsed() < USUALLY, |count| played < count) {
        steps += play(first + played, false).steps;
        played += 1;
    }
    println!("{played} histories from seed {first} on, {steps} steps, in {:?}", start.elapsed());
}

#[test]
fn a_seed_plays_the_same_each_time() {
    // With those that have found something.
    for seed in (0..8).chain([32, 983, 1035, 1075, 400_030, 400_377, 400_703, 2_934_925_960]) {
        assert_eq!(play(seed, false), play(seed, false), "seed {seed}");
    }
}
