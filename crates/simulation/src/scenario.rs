//! Plays one fixed history that comes by every kind of commit: an agent is enrolled, pipelines are made, claimed, reported on,
//! ended, cancelled and run again, an agent is drained, and, among replicas, what one owned is taken over.

use std::time::Duration;

use sealci_core::pipeline::RerunScope;
use sealci_core::plan::{PlannedAction, Retry, RetryOn};

use crate::faults::Mood;
use crate::history::end;
use crate::plans::{of_actions, planned};
use crate::spools::SpoolEnding;
use crate::wishes::Wished;
use crate::world::{Size, World};

/// Who is there, and who dies where.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    pub controllers: usize,
    /// The controller, and the edge of its commits at which it dies.
    pub edge: Option<(usize, u64)>,
    /// The write of the agent's spool at which it dies.
    pub write: Option<u64>,
}

/// How many edges each controller came to, and how many writes the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    pub edges: Vec<u64>,
    pub writes: u64,
}

const SEED: u64 = 7;

impl Scenario {
    /// Plays it to its end, and checks what is recorded.
    pub fn play(self, is_printed: bool) -> Passed {
        let size = Size { agents: 1, schedulers: 1, controllers: self.controllers };
        let mood = if self.write.is_some() { Mood::Wild } else { Mood::Gentle };
        let mut world = World::new(SEED, mood, size, is_printed);
        if let Some((controller, edge)) = self.edge {
            world.controllers[controller].edges.end_at(edge);
        }
        let (data, begun) = (world.agents[0].data.clone(), world.agents[0].begun.clone());
        let ending = SpoolEnding::new(&data, begun, self.write.unwrap_or_default());
        world.agents[0].ending = Some(ending);
        let first = planned(0, vec![], &["print ATTEMPT", "bytes 30000\nsleep 300\nbytes 500"]);
        world.make("chain", vec![first, planned(1, vec![0], &["print ATTEMPT again"])]);
        world.make("endless", vec![planned(0, vec![], &["print ATTEMPT", "hang"])]);
        let mut failing = planned(0, vec![], &["print ATTEMPT", "exit 3"]);
        failing.retry = Retry { times: 1, on: vec![RetryOn::Failed] };
        world.make("failing", vec![failing]);
        world.pass(3000);
        world.until_answered(|world, controller| world.cancel_by("endless", controller));
        world.pass(2000);
        world.until_answered(|world, controller| world.drain_by(0, true, controller));
        world.until_answered(|world, controller| {
            world.rerun_by("failing", "again", RerunScope::Failed, controller)
        });
        if self.controllers > 1 {
            // What it owns goes on at the other, once its lease has run out.
            world.kill_controller(0, 9000);
        }
        world.pass(500);
        world.until_answered(|world, controller| world.drain_by(0, false, controller));
        world.pass(8000);
        world.move_logs();
        end(&mut world);
        let edges = world.controllers.iter().map(|controller| controller.edges.count()).collect();
        let writes = world.agents[0].ending.as_ref().map_or(0, SpoolEnding::count);
        Passed { edges, writes }
    }
}

impl World {
    fn pass(&mut self, ms: u64) {
        self.play_until(self.now + Duration::from_millis(ms));
    }

    fn make(&mut self, identity: &str, actions: Vec<PlannedAction>) {
        let new = of_actions(identity, actions);
        let wished = Wished { new, id: None, is_cancelled: false, reruns: Default::default() };
        self.wishes.pipelines.insert(identity.to_owned(), wished);
        self.until_answered(|world, controller| {
            world.create_by(identity, controller);
            world.wishes.pipelines[identity].id.is_some()
        });
    }

    /// Asks one controller after the other until one of them answers.
    fn until_answered(&mut self, mut ask: impl FnMut(&mut Self, usize) -> bool) {
        for turn in 0.. {
            self.pass(400);
            if ask(self, turn % self.size.controllers) {
                return;
            }
            assert!(turn < 100, "nobody answers");
        }
    }

    /// Moves what is whole to the objects; a process that dies of it is followed by another.
    fn move_logs(&mut self) {
        for controller in 0..self.size.controllers {
            self.move_logs_by(controller);
        }
    }
}
