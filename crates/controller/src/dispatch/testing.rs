//! Steps a driver: what reaches it is handed in, what it says handed out, and the time comes in with each round. Not for
//! production.

use std::collections::BTreeMap;
use std::time::Instant;

use sealci_core::ids::ReplicaId;
use sealci_proto::PROTOCOLS;
use sealci_proto::scheduler::{ControllerMessage, Hello, scheduler_message};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::lines::{Line, LineId};
use super::link::{FromLink, Incoming, packed};
use super::{Config, Dispatch, Driver, Input};
use crate::replica::Replica;
use crate::store::{News, Store, StoreError};
use crate::watchers::Watchers;

/// So many batches wait to be taken from a line.
const BATCHES: usize = 1024;

/// A moment: in monotonic time, and on the wall clock, in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub instant: Instant,
    pub wall_ms: i64,
}

/// The harness's end of a line.
#[derive(Debug)]
struct FarEnd {
    id: LineId,
    batches: mpsc::Receiver<Vec<ControllerMessage>>,
    given_up: CancellationToken,
}

/// A driver without a task of its own.
#[derive(Debug)]
pub struct SteppedDriver {
    driver: Driver,
    dispatch: Dispatch,
    /// By the scheduler's place in the list.
    lines: BTreeMap<usize, FarEnd>,
    sessions: u64,
}

impl SteppedDriver {
    /// Opens a driver on a store, following the replica that the process before it was.
    pub async fn open(
        store: Store,
        config: Config,
        former: Option<ReplicaId>,
        now: Now,
    ) -> Result<Self, StoreError> {
        let identity = (Replica::alone(), former);
        let (driver, dispatch) =
            Driver::open(store, config, Watchers::default(), identity, now.instant).await?;
        Ok(Self { driver, dispatch, lines: BTreeMap::new(), sessions: 0 })
    }

    pub fn replica(&self) -> ReplicaId {
        self.driver.replica()
    }

    /// The door for wishes, which are answered by the next round.
    pub fn dispatch(&self) -> Dispatch {
        self.dispatch.clone()
    }

    /// What a controller says first on a line.
    pub fn hello() -> Hello {
        let replica_id = Uuid::now_v7().to_string();
        Hello { protocol_min: PROTOCOLS.min, protocol_max: PROTOCOLS.max, replica_id }
    }

    /// A scheduler has said `Welcome` on a line.
    pub async fn line_is_up(&mut self, scheduler: usize) {
        self.sessions += 1;
        let id = LineId { scheduler, session: self.sessions };
        let (outgoing, batches) = mpsc::channel(BATCHES);
        let given_up = CancellationToken::new();
        let line = Line {
            endpoint: format!("scheduler {scheduler}"),
            outgoing,
            _given_up: given_up.clone().drop_guard(),
        };
        self.lines.insert(scheduler, FarEnd { id, batches, given_up });
        self.tell(Input::Link(id, FromLink::Up(line))).await;
    }

    /// A line has broken.
    pub async fn line_is_down(&mut self, scheduler: usize) {
        if let Some(end) = self.lines.remove(&scheduler) {
            self.tell(Input::Link(end.id, FromLink::Down)).await;
        }
    }

    /// A scheduler says something.
    pub async fn hear(&mut self, scheduler: usize, message: scheduler_message::Body) {
        if let Some(end) = self.lines.get(&scheduler) {
            let packed = packed(&message);
            let incoming = Box::new(Incoming { message, packed });
            self.tell(Input::Link(end.id, FromLink::Message(incoming))).await;
        }
    }

    /// Another replica tells something.
    pub async fn hear_news(&mut self, news: Vec<News>) {
        self.tell(Input::Heard(news)).await;
    }

    async fn tell(&self, input: Input) {
        // The driver is there, and takes everything in each round.
        let _ = self.dispatch.inbox.send(input).await;
    }

    /// Takes what was handed in, commits, and answers.
    pub async fn round(&mut self, now: Now) {
        if let Ok(first) = self.driver.inbox.try_recv() {
            self.driver.round(Some(first), now.instant, now.wall_ms).await;
        }
    }

    /// Looks for what is due.
    pub async fn tick(&mut self, now: Now) {
        self.driver.round(None, now.instant, now.wall_ms).await;
    }

    /// What it has to say to a scheduler; none where it has given the line up.
    pub fn said(&mut self, scheduler: usize) -> Option<Vec<ControllerMessage>> {
        let Some(end) = self.lines.get_mut(&scheduler) else { return Some(Vec::new()) };
        let said = std::iter::from_fn(|| end.batches.try_recv().ok()).flatten().collect();
        (!end.given_up.is_cancelled()).then_some(said)
    }
}
