//! Plays one history from its seed to its end, and says how to play it again where it fails.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::faults::Mood;
use crate::world::{Size, World};

/// So many of the last steps are printed where one fails.
const LAST_STEPS: usize = 60;

/// After everything has healed, all is to be over within so long: a single agent may have ten actions before it that each hang up to
/// their timeouts.
const QUIET_WITHIN: Duration = Duration::from_secs(600);

/// How a history went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Played {
    pub steps: usize,
    pub fingerprint: u64,
}

/// Plays the history of a seed. Panics, with the seed, where something does not hold.
pub fn play(seed: u64, is_printed: bool) -> Played {
    let mut dice = StdRng::seed_from_u64(seed);
    let mood = match dice.random_range(0..8) {
        0 => Mood::Calm,
        1 | 2 => Mood::Gentle,
        _ => Mood::Wild,
    };
    let size = Size {
        agents: dice.random_range(1..=3),
        schedulers: dice.random_range(1..=2),
        controllers: dice.random_range(1..=2),
    };
    let pipelines = dice.random_range(1..=4);
    let mut world = World::new(seed, mood, size, is_printed);
    let playing = catch_unwind(AssertUnwindSafe(|| {
        world.people_wish(pipelines);
        world.faults_begin();
        world.play_until(Duration::from_millis(mood.lasts_ms()));
        end(&mut world);
    }));
    if let Err(panic) = playing {
        println!("{}", world.trace.last(LAST_STEPS).join("\n"));
        println!(
            "{mood:?} {size:?}, {} steps; played again, with all steps printed, by",
            world.trace.steps()
        );
        println!("SEALCI_SIMULATION_SEED={seed} cargo test -p sealci-simulation --test simulation");
        resume_unwind(panic);
    }
    Played { steps: world.trace.steps(), fingerprint: world.trace.fingerprint() }
}

/// Heals everything, waits until all is over, and checks it.
pub fn end(world: &mut World) {
    world.heal_all();
    let until = world.now + QUIET_WITHIN;
    loop {
        world.play_until(world.now + Duration::from_millis(1500));
        world.ask_again();
        let Some(unsettled) = world.unsettled() else { break };
        assert!(world.now < until, "it does not come to an end: {unsettled}");
    }
    world.check();
}
