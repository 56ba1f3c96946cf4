//! Runs one history: parties, the lines between them, one clock, and one thing at a time, in an order that a seed decides.
//!
//! ```text
//!   agents (own runtime each, its clock stands still between steps)
//!      │  lines: in order within a stream, late, cut, closed
//!   schedulers (values)
//!      │
//!   controllers (drivers, stepped) ──▶ one SQLite file
//! ```

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sealci_controller::storage::Storage;
use sealci_controller::store::Store;
use sealci_proto::agent::{AgentMessage, scheduler_message as to_agent};
use sealci_proto::scheduler::{ControllerMessage, scheduler_message as to_controller};
use sealci_service::database::Database;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::agents::SimAgent;
use crate::controllers::{self, SimController};
use crate::faults::Mood;
use crate::line::{Line, Packet, Party, Way};
use crate::oracle::Book;
use crate::schedulers::SimScheduler;
use crate::trace::Trace;
use crate::wishes::Wishes;

/// How many of each there are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub agents: usize,
    pub schedulers: usize,
    /// One has the database alone; several are replicas.
    pub controllers: usize,
}

pub type AgentLine = Line<AgentMessage, to_agent::Body>;
pub type ControllerLine = Line<ControllerMessage, to_controller::Body>;

/// Which line: an agent's or a controller's, by its place in the world's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LineRef {
    Agent(usize),
    Controller(usize),
}

/// What happens at a moment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    Arrive(LineRef, Way),
    /// One end of a line has heard nothing for so long that it gives the line up, if it is still cut.
    Unanswered(LineRef, Way, Party),
    AgentSpeaks(usize, u64),
    AgentConnects(usize, u64),
    AgentStarts(usize),
    /// Nobody has admitted the agent on this line.
    NotAdmitted(usize, usize),
    EnrolArrives {
        agent: usize,
        process: u64,
        scheduler: usize,
    },
    EnrolAnswered {
        agent: usize,
        process: u64,
        is_enrolled: bool,
    },
    Round(usize, u64),
    Tick(usize, u64),
    ControllerStarts(usize),
    ControllerConnects(usize, usize, u64),
    SchedulerDue(usize),
    SchedulerStarts(usize),
    Fault,
    Wish,
    Heal(u64),
}

/// Everything there is.
pub struct World {
    pub now: Duration,
    pub start: Instant,
    pub dice: StdRng,
    pub mood: Mood,
    pub size: Size,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    order: u64,
    pub schedulers: Vec<SimScheduler>,
    pub controllers: Vec<SimController>,
    pub agents: Vec<SimAgent>,
    pub agent_lines: Vec<AgentLine>,
    pub controller_lines: Vec<ControllerLine>,
    /// From whom to whom nothing arrives, and the number of the cut.
    pub cuts: BTreeMap<(Party, Party), u64>,
    pub ids: u64,
    pub trace: Trace,
    pub book: Book,
    pub wishes: Wishes,
    /// Nothing goes wrong any more.
    pub is_healed: bool,
    pub store: Store,
    pub storage: Storage,
    /// The controllers', which wait for their database in real time.
    pub runtime: Runtime,
    _database: Database,
    pub folder: TempDir,
}

/// Where histories are kept while they are played.
fn scratch() -> TempDir {
    let memory = PathBuf::from("/dev/shm");
    let mut builder = tempfile::Builder::new();
    builder.prefix("sealci-simulation-");
    if memory.is_dir() { builder.tempdir_in(memory).unwrap() } else { builder.tempdir().unwrap() }
}

impl World {
    pub fn new(seed: u64, mood: Mood, size: Size, is_printed: bool) -> Self {
        let folder = scratch();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (database, store, storage) = runtime.block_on(controllers::open(folder.path()));
        let mut world = Self {
            now: Duration::ZERO,
            start: Instant::now(),
            dice: StdRng::seed_from_u64(seed),
            mood,
            size,
            events: BinaryHeap::new(),
            order: 0,
            schedulers: Vec::new(),
            controllers: Vec::new(),
            agents: Vec::new(),
            agent_lines: Vec::new(),
            controller_lines: Vec::new(),
            cuts: BTreeMap::new(),
            ids: 0,
            trace: Trace::new(is_printed),
            book: Book::default(),
            wishes: Wishes::default(),
            is_healed: false,
            store,
            storage,
            runtime,
            _database: database,
            folder,
        };
        world.schedulers = (0..size.schedulers).map(|_| SimScheduler::default()).collect();
        world.controllers = (0..size.controllers).map(|_| SimController::new(&world.store, size)).collect();
        world.agents = (0..size.agents).map(|index| SimAgent::new(world.folder.path(), index)).collect();
        for scheduler in 0..size.schedulers {
            world.start_scheduler(scheduler);
        }
        for controller in 0..size.controllers {
            world.in_ms(1 + controller as u64, Event::ControllerStarts(controller));
        }
        for agent in 0..size.agents {
            world.in_ms(10 + agent as u64, Event::AgentStarts(agent));
        }
        world
    }

    /// Something happens so many milliseconds from now.
    pub fn in_ms(&mut self, ms: u64, event: Event) {
        self.at(self.now + Duration::from_millis(ms), event);
    }

    /// Something happens then, or at once where that is over.
    pub fn at(&mut self, moment: Duration, event: Event) {
        self.order += 1;
        self.events.push(Reverse((moment.max(self.now), self.order, event)));
    }

    pub fn id(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub fn instant(&self) -> Instant {
        self.start + self.now
    }

    pub fn note(&mut self, step: &str) {
        self.trace.add(self.now, step);
    }

    /// Plays on until then, or until nothing more is to happen.
    pub fn play_until(&mut self, end: Duration) {
        while self.events.peek().is_some_and(|Reverse((moment, _, _))| *moment <= end) {
            let Some(Reverse((moment, _, event))) = self.events.pop() else { break };
            self.now = moment;
            self.happen(event);
        }
        self.now = self.now.max(end);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive(line, way) => self.arrive(line, way),
            Event::Unanswered(line, way, party) => self.unanswered(line, way, party),
            Event::AgentSpeaks(agent, process) => self.agent_speaks(agent, process),
            Event::AgentConnects(agent, process) => self.agent_connects(agent, process),
            Event::AgentStarts(agent) => self.start_agent(agent),
            Event::NotAdmitted(agent, line) => self.not_admitted(agent, line),
            Event::EnrolArrives { agent, process, scheduler } => {
                self.enrol_arrives(agent, process, scheduler)
            }
            Event::EnrolAnswered { agent, process, is_enrolled } => {
                self.enrol_answered(agent, process, is_enrolled);
            }
            Event::Round(controller, process) => self.round(controller, process),
            Event::Tick(controller, process) => self.tick(controller, process),
            Event::ControllerStarts(controller) => self.start_controller(controller),
            Event::ControllerConnects(controller, scheduler, process) => {
                self.controller_connects(controller, scheduler, process);
            }
            Event::SchedulerDue(scheduler) => self.settle(scheduler),
            Event::SchedulerStarts(scheduler) => self.start_scheduler(scheduler),
            Event::Fault => self.fault(),
            Event::Wish => self.wish(),
            Event::Heal(cut) => self.heal(cut),
        }
    }

    // ---- lines

    pub fn is_cut(&self, from: Party, to: Party) -> bool {
        self.cuts.contains_key(&(from, to))
    }

    /// A message takes some milliseconds, and now and then much longer.
    fn latency_ms(&mut self) -> u64 {
        match self.dice.random_range(0..40) {
            0 => self.dice.random_range(50..1500),
            1..4 => self.dice.random_range(5..60),
            _ => self.dice.random_range(1..5),
        }
    }

    pub fn say_to_scheduler(&mut self, line: usize, messages: Vec<AgentMessage>) {
        self.agent_lines[line].up.packets.extend(messages.into_iter().map(Packet::Message));
        self.fetch(LineRef::Agent(line), Way::Up);
    }

    /// Has the next packet of a stream arrive, if there is one and nothing keeps it.
    pub fn fetch(&mut self, line: LineRef, way: Way) {
        let (is_idle, is_due, (from, to)) = match line {
            LineRef::Agent(index) => state_of(&self.agent_lines[index], way),
            LineRef::Controller(index) => state_of(&self.controller_lines[index], way),
        };
        if is_idle || is_due || self.is_cut(from, to) {
            return;
        }
        *self.is_due(line, way) = true;
        let ms = self.latency_ms();
        self.in_ms(ms, Event::Arrive(line, way));
    }

    fn is_due(&mut self, line: LineRef, way: Way) -> &mut bool {
        match (line, way) {
            (LineRef::Agent(index), Way::Up) => &mut self.agent_lines[index].up.is_due,
            (LineRef::Agent(index), Way::Down) => &mut self.agent_lines[index].down.is_due,
            (LineRef::Controller(index), Way::Up) => &mut self.controller_lines[index].up.is_due,
            (LineRef::Controller(index), Way::Down) => &mut self.controller_lines[index].down.is_due,
        }
    }

    /// What is at the head of a stream arrives; often with what is right behind it.
    fn arrive(&mut self, line: LineRef, way: Way) {
        *self.is_due(line, way) = false;
        let (_, _, (from, to)) = match line {
            LineRef::Agent(index) => state_of(&self.agent_lines[index], way),
            LineRef::Controller(index) => state_of(&self.controller_lines[index], way),
        };
        if self.is_cut(from, to) {
            return;
        }
        let together = self.dice.random_range(1..=6);
        for _ in 0..together {
            let has_arrived = match (line, way) {
                (LineRef::Agent(index), Way::Up) => {
                    let packet = self.agent_lines[index].up.packets.pop_front();
                    packet.map(|packet| self.scheduler_hears_agent(index, packet)).is_some()
                }
                (LineRef::Agent(index), Way::Down) => {
                    let packet = self.agent_lines[index].down.packets.pop_front();
                    packet.map(|packet| self.agent_hears(index, packet)).is_some()
                }
                (LineRef::Controller(index), Way::Up) => {
                    let packet = self.controller_lines[index].up.packets.pop_front();
                    packet.map(|packet| self.scheduler_hears_controller(index, packet)).is_some()
                }
                (LineRef::Controller(index), Way::Down) => {
                    let packet = self.controller_lines[index].down.packets.pop_front();
                    packet.map(|packet| self.controller_hears(index, packet)).is_some()
                }
            };
            if !has_arrived {
                break;
            }
        }
        self.fetch(line, way);
    }

    /// Cuts the way between two parties, in one direction or both; who has a line finds out by its keepalive.
    pub fn cut(&mut self, pairs: &[(Party, Party)], for_ms: u64) {
        let cut = self.id();
        for pair in pairs {
            self.cuts.insert(*pair, cut);
        }
        self.in_ms(for_ms, Event::Heal(cut));
        let concerned: BTreeSet<LineRef> = self
            .open_lines()
            .into_iter()
            .filter(|line| pairs.iter().any(|(one, other)| self.line_is_between(*line, *one, *other)))
            .collect();
        for line in concerned {
            for way in [Way::Up, Way::Down] {
                // Whoever is not answered finds out: a cut in one direction silences both.
                let (_, to) = self.ends(line, way);
                let ms = self.dice.random_range(2500..4500);
                self.in_ms(ms, Event::Unanswered(line, way, to));
            }
        }
    }

    fn heal(&mut self, cut: u64) {
        self.cuts.retain(|_, number| *number != cut);
        self.note(&format!("cut {cut} heals"));
        for line in self.open_lines() {
            self.fetch(line, Way::Up);
            self.fetch(line, Way::Down);
        }
    }

    fn open_lines(&self) -> Vec<LineRef> {
        let agents = (0..self.agent_lines.len()).map(LineRef::Agent);
        let controllers = (0..self.controller_lines.len()).map(LineRef::Controller);
        agents
            .chain(controllers)
            .filter(|line| self.listens(*line, Way::Up) || self.listens(*line, Way::Down))
            .collect()
    }

    pub fn listens(&self, line: LineRef, way: Way) -> bool {
        match line {
            LineRef::Agent(index) => self.agent_lines[index].listens(way),
            LineRef::Controller(index) => self.controller_lines[index].listens(way),
        }
    }

    fn ends(&self, line: LineRef, way: Way) -> (Party, Party) {
        match line {
            LineRef::Agent(index) => self.agent_lines[index].ends(way),
            LineRef::Controller(index) => self.controller_lines[index].ends(way),
        }
    }

    fn line_is_between(&self, line: LineRef, one: Party, other: Party) -> bool {
        match line {
            LineRef::Agent(index) => self.agent_lines[index].is_between(one, other),
            LineRef::Controller(index) => self.controller_lines[index].is_between(one, other),
        }
    }

    /// An end closes a line; what it said last may be lost.
    pub fn close(&mut self, line: LineRef, hears: Way, is_told: bool, why: &str) {
        let kept = if self.dice.random_bool(0.5) { usize::MAX } else { self.dice.random_range(0..4) };
        match line {
            LineRef::Agent(index) => self.agent_lines[index].close(hears, kept, is_told, why),
            LineRef::Controller(index) => self.controller_lines[index].close(hears, kept, is_told, why),
        }
        self.fetch(line, hears.other());
        if !is_told && self.listens(line, hears.other()) {
            let (_, to) = self.ends(line, hears.other());
            let ms = self.dice.random_range(2500..4500);
            self.in_ms(ms, Event::Unanswered(line, hears.other(), to));
        }
    }

    /// An end that was not answered for so long gives the line up, if it is cut still, or nobody has its other end.
    fn unanswered(&mut self, line: LineRef, way: Way, party: Party) {
        if !self.listens(line, way) {
            return;
        }
        let (from, to) = self.ends(line, way);
        let is_dead = self.is_cut(from, to) || self.is_cut(to, from) || !self.listens(line, way.other());
        if !is_dead {
            return;
        }
        let why = "not answered";
        match (line, party) {
            (LineRef::Agent(index), Party::Agent(_)) => self.agent_hears(index, Packet::Closed(why.into())),
            (LineRef::Agent(index), _) => self.scheduler_hears_agent(index, Packet::Closed(why.into())),
            (LineRef::Controller(index), Party::Controller(_)) => {
                self.controller_hears(index, Packet::Closed(why.into()));
            }
            (LineRef::Controller(index), _) => {
                self.scheduler_hears_controller(index, Packet::Closed(why.into()));
            }
        }
    }

    // ---- ends of parties

    /// Every line of a party that has died is closed; the machines at the other ends may or may not be told.
    pub fn close_all_of(&mut self, party: Party) {
        for line in self.open_lines() {
            let (caller, scheduler) = self.ends(line, Way::Up);
            let hears = match party {
                _ if party == caller => Way::Down,
                _ if party == scheduler => Way::Up,
                _ => continue,
            };
            if self.listens(line, hears) {
                let is_told = self.is_healed || self.dice.random_bool(0.8);
                self.close(line, hears, is_told, "gone");
            }
        }
    }

    /// Nothing goes wrong any more: cuts heal, and everybody is there again.
    pub fn heal_all(&mut self) {
        self.is_healed = true;
        let cuts: BTreeSet<u64> = self.cuts.values().copied().collect();
        cuts.into_iter().for_each(|cut| self.heal(cut));
        for controller in 0..self.controllers.len() {
            self.controllers[controller].edges.begin_again();
        }
        self.note("everything heals");
    }
}

fn state_of<U, D>(line: &Line<U, D>, way: Way) -> (bool, bool, (Party, Party)) {
    let (is_idle, is_due) = match way {
        Way::Up => (line.up.packets.is_empty(), line.up.is_due),
        Way::Down => (line.down.packets.is_empty(), line.down.is_due),
    };
    (is_idle, is_due, line.ends(way))
}
