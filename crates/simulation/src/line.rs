//! Carries what two parties say to each other: in order within a stream, late, and, where the line is cut, not at all.

use std::collections::VecDeque;

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    Agent(usize),
    Controller(usize),
    Scheduler(usize),
}

/// Which of the two streams of a line: towards the scheduler, or from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    Up,
    Down,
}

impl Way {
    pub fn other(self) -> Self {
        match self {
            Self::Up => Self::Down,
            Self::Down => Self::Up,
        }
    }
}

/// What is on its way.
#[derive(Debug, Clone)]
pub enum Packet<M> {
    Message(M),
    /// The end that speaks is closed, and why.
    Closed(String),
}

/// One stream.
#[derive(Debug)]
pub struct Stream<M> {
    pub packets: VecDeque<Packet<M>>,
    /// The next one is to arrive at a moment that is fixed already.
    pub is_due: bool,
    /// Whether the end that it goes to still listens.
    pub is_open: bool,
}

impl<M> Stream<M> {
    fn new() -> Self {
        Self { packets: VecDeque::new(), is_due: false, is_open: true }
    }
}

/// A line between one who called and a scheduler.
#[derive(Debug)]
pub struct Line<U, D> {
    pub caller: Party,
    pub scheduler: Party,
    pub up: Stream<U>,
    pub down: Stream<D>,
    /// The scheduler has said `Welcome`, and the caller has heard it.
    pub is_welcomed: bool,
}

impl<U, D> Line<U, D> {
    pub fn new(caller: Party, scheduler: Party) -> Self {
        Self { caller, scheduler, up: Stream::new(), down: Stream::new(), is_welcomed: false }
    }

    /// From whom to whom a stream goes.
    pub fn ends(&self, way: Way) -> (Party, Party) {
        match way {
            Way::Up => (self.caller, self.scheduler),
            Way::Down => (self.scheduler, self.caller),
        }
    }

    pub fn is_between(&self, one: Party, other: Party) -> bool {
        (self.caller, self.scheduler) == (one, other) || (self.caller, self.scheduler) == (other, one)
    }

    /// Whether the end at which a stream arrives still has the line.
    pub fn listens(&self, way: Way) -> bool {
        match way {
            Way::Up => self.up.is_open,
            Way::Down => self.down.is_open,
        }
    }

    /// An end closes the line: it hears nothing more, and the other one will learn of it, should that arrive. Of what it said
    /// last, `kept` packets are on their way still.
    pub fn close(&mut self, hears: Way, kept: usize, is_told: bool, why: &str) {
        match hears {
            Way::Down => {
                self.down.is_open = false;
                self.down.packets.clear();
                self.up.packets.truncate(kept);
            }
            Way::Up => {
                self.up.is_open = false;
                self.up.packets.clear();
                self.down.packets.truncate(kept);
            }
        }
        if is_told {
            match hears {
                Way::Down => self.up.packets.push_back(Packet::Closed(why.to_owned())),
                Way::Up => self.down.packets.push_back(Packet::Closed(why.to_owned())),
            }
        }
    }
}
