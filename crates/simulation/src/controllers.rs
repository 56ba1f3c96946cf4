//! Plays the controllers: real drivers, each round of which is awaited to its end, over one SQLite file.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use rand::Rng;
use sealci_controller::dispatch::testing::{Now, SteppedDriver};
use sealci_controller::dispatch::{ActionLimits, Config, Dispatch};
use sealci_controller::storage::objects::{ObjectsConfig, ObjectsLocation};
use sealci_controller::storage::{Storage, StorageConfig};
use sealci_controller::store::{Edges, Store};
use sealci_core::ids::ReplicaId;
use sealci_proto::scheduler::{ControllerMessage, controller_message, scheduler_message as to_controller};
use sealci_service::database::{Database, DatabaseUrl};
use sha2::{Digest, Sha256};

use crate::agents::ENROLMENT_TOKEN;
use crate::line::{Packet, Party, Way};
use crate::world::{ControllerLine, Event, LineRef, Size, World};

/// What makes an attempt lost; a quarter of the usual.
pub const LOST_AFTER: Duration = Duration::from_secs(15);

/// What the wall clock says when a history begins.
pub const WALL_MS: i64 = 1_700_000_000_000;

const LEASE: Duration = Duration::from_secs(5);

/// One controller's place; its process may be dead.
pub struct SimController {
    pub driver: Option<SteppedDriver>,
    pub processes: u64,
    pub edges: Edges,
    store: Store,
    /// The replica that its last process was.
    former: Option<ReplicaId>,
    /// Its lines, by the scheduler.
    pub lines: BTreeMap<usize, usize>,
    is_round_due: bool,
}

/// The database that all controllers share, and what they keep files in.
pub async fn open(folder: &Path) -> (Database, Store, Storage) {
    let database = Database::open(&DatabaseUrl::Scratch(folder.join("controller.db"))).await.unwrap();
    let store = Store::open(database.writer.clone(), database.readers.clone()).await.unwrap();
    let storage = storage(store.clone(), folder).await;
    (database, store, storage)
}

async fn storage(store: Store, folder: &Path) -> Storage {
    let location = ObjectsLocation::Folder(folder.join("objects"));
    let objects = ObjectsConfig { location, aws: BTreeMap::new() };
    Storage::open(store, StorageConfig::new(objects)).await.unwrap()
}

impl SimController {
    pub fn new(store: &Store, size: Size) -> Self {
        let edges = Edges::default();
        let store = match size.controllers {
            1 => store.with_edges(edges.clone()),
            _ => store.of_replica(edges.clone()),
        };
        Self {
            driver: None,
            processes: 0,
            edges,
            store,
            former: None,
            lines: BTreeMap::new(),
            is_round_due: false,
        }
    }

    fn is_process(&self, number: u64) -> bool {
        self.driver.is_some() && self.processes == number
    }
}

impl World {
    fn moment(&self) -> Now {
        let wall_ms = WALL_MS + i64::try_from(self.now.as_millis()).unwrap();
        Now { instant: self.instant(), wall_ms }
    }

    fn driver_config(&self) -> Config {
        Config {
            lost_after: LOST_AFTER,
            lease: LEASE,
            close_logs_after: Duration::from_secs(24 * 3600),
            limits: ActionLimits { grace: Duration::from_millis(500), log_quota_bytes: 1 << 30 },
            credentials: Default::default(),
            enrolment_tokens: vec![Sha256::digest(ENROLMENT_TOKEN.as_bytes()).into()],
            storage: self.storage.door(),
        }
    }

    pub fn start_controller(&mut self, index: usize) {
        if self.controllers[index].driver.is_some() {
            return;
        }
        self.note(&format!("controller {index} starts"));
        let (config, now) = (self.driver_config(), self.moment());
        let this = &mut self.controllers[index];
        this.processes += 1;
        let number = this.processes;
        this.is_round_due = false;
        let former = if this.former.is_some() && self.dice.random_bool(0.7) { this.former } else { None };
        let (store, edges) = (this.store.clone(), this.edges.clone());
        let opened = self.runtime.block_on(async {
            tokio::select! {
                biased;
                opened = SteppedDriver::open(store, config, former, now) => Some(opened.unwrap()),
                () = edges.over() => None,
            }
        });
        let Some(driver) = opened else {
            self.note(&format!("controller {index} dies at an edge, in its start"));
            return self.controller_is_dead(index, 300);
        };
        let this = &mut self.controllers[index];
        this.former = Some(driver.replica());
        this.driver = Some(driver);
        for scheduler in 0..self.size.schedulers {
            let ms = self.dice.random_range(1..20);
            self.in_ms(ms, Event::ControllerConnects(index, scheduler, number));
        }
        self.in_ms(5, Event::Tick(index, number));
    }

    pub fn kill_controller(&mut self, index: usize, for_ms: u64) {
        if self.controllers[index].driver.is_none() {
            return;
        }
        self.note(&format!("controller {index} dies"));
        self.controller_is_dead(index, for_ms);
    }

    fn controller_is_dead(&mut self, index: usize, for_ms: u64) {
        let this = &mut self.controllers[index];
        if let Some(driver) = this.driver.take() {
            this.former = Some(driver.replica());
            // What its connections had begun is rolled back in its runtime.
            let _entered = self.runtime.enter();
            drop(driver);
        }
        self.controllers[index].edges.begin_again();
        self.controllers[index].lines.clear();
        self.close_all_of(Party::Controller(index));
        self.in_ms(for_ms, Event::ControllerStarts(index));
    }

    /// It died at an edge of a commit.
    fn died_at_edge(&mut self, index: usize) {
        let edge = self.controllers[index].edges.count();
        self.note(&format!("controller {index} dies at edge {edge}"));
        // What it said before that is on its way, were it ever so wrong to say it.
        self.controller_says(index);
        let ms = self.down_ms();
        self.controller_is_dead(index, ms);
    }

    pub fn controller_connects(&mut self, index: usize, scheduler: usize, number: u64) {
        let this = &self.controllers[index];
        if !this.is_process(number) || this.lines.contains_key(&scheduler) {
            return;
        }
        let (us, them) = (Party::Controller(index), Party::Scheduler(scheduler));
        if self.schedulers[scheduler].process.is_none() || self.is_cut(us, them) || self.is_cut(them, us) {
            let ms = self.dice.random_range(100..700);
            return self.in_ms(ms, Event::ControllerConnects(index, scheduler, number));
        }
        let line = self.controller_lines.len();
        self.controller_lines.push(ControllerLine::new(us, them));
        self.note(&format!("controller {index} connects to scheduler {scheduler}"));
        self.controllers[index].lines.insert(scheduler, line);
        let hello = ControllerMessage { body: Some(controller_message::Body::Hello(SteppedDriver::hello())) };
        self.controller_lines[line].up.packets.push_back(Packet::Message(hello));
        self.fetch(LineRef::Controller(line), Way::Up);
    }

    pub fn controller_hears(&mut self, line: usize, packet: Packet<to_controller::Body>) {
        let (Party::Controller(index), Party::Scheduler(scheduler)) =
            (self.controller_lines[line].caller, self.controller_lines[line].scheduler)
        else {
            return;
        };
        if self.controllers[index].lines.get(&scheduler) != Some(&line) {
            return;
        }
        let is_welcomed = self.controller_lines[line].is_welcomed;
        match packet {
            Packet::Closed(_) => return self.controller_loses(index, scheduler, line),
            Packet::Message(to_controller::Body::Welcome(_)) if !is_welcomed => {
                self.controller_lines[line].is_welcomed = true;
                let Some(driver) = &mut self.controllers[index].driver else { return };
                self.runtime.block_on(driver.line_is_up(scheduler));
            }
            Packet::Message(message) => {
                self.note_heard(index, &message);
                let Some(driver) = &mut self.controllers[index].driver else { return };
                self.runtime.block_on(driver.hear(scheduler, message));
            }
        }
        self.round_is_due(index);
    }

    fn controller_loses(&mut self, index: usize, scheduler: usize, line: usize) {
        self.note(&format!("controller {index} has no line to scheduler {scheduler}"));
        self.controllers[index].lines.remove(&scheduler);
        self.close(LineRef::Controller(line), Way::Down, true, "gone");
        if self.controller_lines[line].is_welcomed
            && let Some(driver) = &mut self.controllers[index].driver
        {
            self.runtime.block_on(driver.line_is_down(scheduler));
        }
        self.round_is_due(index);
        let number = self.controllers[index].processes;
        let ms = self.dice.random_range(20..600);
        self.in_ms(ms, Event::ControllerConnects(index, scheduler, number));
    }

    /// What arrives within some milliseconds is taken in one round.
    fn round_is_due(&mut self, index: usize) {
        if !std::mem::replace(&mut self.controllers[index].is_round_due, true) {
            let ms = self.dice.random_range(1..12);
            let number = self.controllers[index].processes;
            self.in_ms(ms, Event::Round(index, number));
        }
    }

    pub fn round(&mut self, index: usize, number: u64) {
        if !self.controllers[index].is_process(number) {
            return;
        }
        self.controllers[index].is_round_due = false;
        self.step(index, false);
    }

    pub fn tick(&mut self, index: usize, number: u64) {
        if !self.controllers[index].is_process(number) {
            return;
        }
        self.in_ms(1000, Event::Tick(index, number));
        self.step(index, true);
    }

    fn step(&mut self, index: usize, is_tick: bool) {
        let now = self.moment();
        let this = &mut self.controllers[index];
        let Some(driver) = &mut this.driver else { return };
        let edges = this.edges.clone();
        let has_lived = self.runtime.block_on(async {
            let stepping = async {
                if is_tick {
                    driver.tick(now).await;
                } else {
                    driver.round(now).await;
                }
            };
            tokio::select! {
                biased;
                () = stepping => true,
                () = edges.over() => false,
            }
        });
        if has_lived { self.controller_says(index) } else { self.died_at_edge(index) }
    }

    /// Hands out what a round has to say.
    fn controller_says(&mut self, index: usize) {
        let lines: Vec<(usize, usize)> =
            self.controllers[index].lines.iter().map(|(scheduler, line)| (*scheduler, *line)).collect();
        for (scheduler, line) in lines {
            if !self.controller_lines[line].is_welcomed {
                continue;
            }
            let Some(driver) = &mut self.controllers[index].driver else { return };
            let Some(said) = driver.said(scheduler) else {
                self.note(&format!("controller {index} gives up its line to scheduler {scheduler}"));
                self.controller_loses(index, scheduler, line);
                continue;
            };
            self.note_said(index, &said);
            self.controller_lines[line].up.packets.extend(said.into_iter().map(Packet::Message));
            self.fetch(LineRef::Controller(line), Way::Up);
        }
    }

    /// Moves what is whole of the logs, by the storage of a controller's process. Where it dies of that its successor goes on.
    pub fn move_logs_by(&mut self, index: usize) {
        let (store, edges) = (self.controllers[index].store.clone(), self.controllers[index].edges.clone());
        let folder = self.folder.path().to_owned();
        let has_lived = self.runtime.block_on(async {
            let moving = async { storage(store, &folder).await.move_once().await.unwrap() };
            tokio::select! {
                biased;
                () = moving => true,
                () = edges.over() => false,
            }
        });
        if !has_lived {
            self.died_at_edge(index);
            self.move_logs_by(index);
        }
    }

    /// Has a wish answered by a controller; none if that one is dead, or dies of it.
    pub fn ask<T>(&mut self, index: usize, wish: impl AsyncFnOnce(Dispatch) -> T) -> Option<T> {
        let now = self.moment();
        let this = &mut self.controllers[index];
        let driver = this.driver.as_mut()?;
        let (edges, dispatch) = (this.edges.clone(), driver.dispatch());
        let answer = self.runtime.block_on(async {
            let answering = async { tokio::join!(wish(dispatch), driver.round(now)).0 };
            tokio::select! {
                biased;
                answer = answering => Some(answer),
                () = edges.over() => None,
            }
        });
        match answer {
            Some(_) => self.controller_says(index),
            None => self.died_at_edge(index),
        }
        answer
    }
}
