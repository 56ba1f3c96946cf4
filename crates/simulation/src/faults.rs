//! Decides what goes wrong, and how badly.

use rand::Rng;

use crate::line::Party;
use crate::world::{Event, World};

/// How badly things go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Nothing goes wrong; messages take their time, and cross.
    Calm,
    /// Nothing that may cost an attempt: each absence is shorter than what makes one lost, and they come one after the other.
    Gentle,
    /// Everything: crashes in the middle of commits, agents that are away for long, cuts in one direction.
    Wild,
}

/// Between the beginnings of two faults, where an absence must not follow another.
const GENTLE_PAUSE_MS: u64 = 12_000;

impl Mood {
    /// So long things go wrong.
    pub fn lasts_ms(self) -> u64 {
        match self {
            Self::Calm => 20_000,
            Self::Gentle => 60_000,
            Self::Wild => 60_000,
        }
    }

    /// So long people wish things.
    pub fn wishes_ms(self) -> u64 {
        self.lasts_ms() * 2 / 3
    }

    /// Whether people end pipelines.
    pub fn has_cancels(self) -> bool {
        true
    }
}

impl World {
    /// Things begin to go wrong.
    pub fn faults_begin(&mut self) {
        if self.mood != Mood::Calm {
            self.next_fault();
        }
    }

    fn next_fault(&mut self) {
        let ms = match self.mood {
            Mood::Calm => return,
            Mood::Gentle => GENTLE_PAUSE_MS + self.dice.random_range(0..3000),
            Mood::Wild => self.dice.random_range(100..4000),
        };
        self.in_ms(ms, Event::Fault);
    }

    /// How long a dead process stays dead.
    pub fn down_ms(&mut self) -> u64 {
        match self.mood {
            _ if self.is_healed => 300,
            Mood::Calm | Mood::Gentle => self.dice.random_range(10..2500),
            Mood::Wild => match self.dice.random_range(0..4) {
                0 => self.dice.random_range(4000..25_000),
                _ => self.dice.random_range(10..3000),
            },
        }
    }

    pub fn fault(&mut self) {
        if self.is_healed {
            return;
        }
        self.next_fault();
        let agent = self.dice.random_range(0..self.size.agents);
        let scheduler = self.dice.random_range(0..self.size.schedulers);
        let controller = self.dice.random_range(0..self.size.controllers);
        let for_ms = self.down_ms();
        let is_wild = self.mood == Mood::Wild;
        match self.dice.random_range(0..10) {
            0 | 1 => {
                let pair = (Party::Agent(agent), Party::Scheduler(scheduler));
                self.cut_some(pair, for_ms);
            }
            2 | 3 => {
                let pair = (Party::Controller(controller), Party::Scheduler(scheduler));
                self.cut_some(pair, for_ms);
            }
            4 => self.kill_scheduler(scheduler, for_ms),
            5 => self.kill_controller(controller, for_ms),
            6 | 7 => {
                let edge = self.controllers[controller].edges.count() + self.dice.random_range(1..12);
                self.controllers[controller].edges.end_at(edge);
            }
            8 | 9 if is_wild => self.kill_agent(agent, for_ms),
            _ => self.cut_some((Party::Agent(agent), Party::Scheduler(scheduler)), for_ms.min(200)),
        }
    }

    /// In both directions, or in one.
    fn cut_some(&mut self, (one, other): (Party, Party), for_ms: u64) {
        let pairs: &[(Party, Party)] = match self.dice.random_range(0..4) {
            0 => &[(one, other)],
            1 => &[(other, one)],
            _ => &[(one, other), (other, one)],
        };
        self.note(&format!("cut {pairs:?} for {for_ms} ms"));
        self.cut(pairs, for_ms);
    }
}
