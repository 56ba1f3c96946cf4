//! Keeps what actions leave: artifacts, caches, reports and finished logs. The bytes are in the object store ([`objects`]), what
//! they are in the database.
//!
//! Invariants:
//! - a blob's row appears after its object is whole, and goes before its object does: nothing refers to what is not there;
//! - an object that somebody else removed is said to be gone, ends the cache entries that refer to it, and comes back with the next
//!   upload of its bytes;
//! - every object's name is its own, and stands in the database before the object is begun: whatever is killed at whatever
//!   moment, what it leaves is found by [`sweep`](Storage::sweep) and deleted a day later;
//! - a log is where its row says: in the database until its object is whole ([`logs`]), and said to be deleted once it is;
//! - a digest opens nothing: who refers to a blob has brought its bytes ([`Visitor::owner`]), and who reads one was told of it.

pub mod logs;
pub mod objects;
mod read;
mod sweep;
mod upload;
mod visitor;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sealci_archive::{ExtractError, IndexError};
use sealci_core::ids::{AttemptId, FencingToken};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::store::{Store, StoreError};
use crate::ticket::{KEY_BYTES, TicketKey};
use logs::WholeLogs;
use objects::{Objects, ObjectsConfig, ObjectsError};

pub use logs::LogReader;
pub use read::Contents;
pub use sweep::{Sweep, Swept};
pub use upload::{BlobDigest, Brought, InvalidDigest};
pub use visitor::{NotAdmitted, Visitor};

/// Each upload has at most one part in memory; so many at once, the others wait.
const UPLOADS_AT_ONCE: usize = 16;
/// An index that is read may take some 100 MiB for a moment.
const INDEXES_AT_ONCE: usize = 4;
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Where and how long things are kept.
#[derive(Debug, Clone)]
pub struct StorageConfig {
    pub objects: ObjectsConfig,
    /// Where agents reach this controller's REST interface.
    pub agents_url: Option<String>,
    /// One upload has at most so many bytes.
    pub max_upload_bytes: u64,
    /// How long an artifact is kept whose manifest does not say.
    pub keep_artifacts: Duration,
    /// How long a cache's entry is kept that nobody uses.
    pub keep_caches: Duration,
    /// All entries of all caches together; the longest unused go first.
    pub cache_budget_bytes: u64,
    /// A finished log leaves the database so long after its end.
    pub move_logs_after: Duration,
    /// How long a finished log is kept.
    pub keep_logs: Duration,
    /// All finished logs together, packed; those that finished first go first.
    pub logs_budget_bytes: u64,
    /// What nothing refers to is deleted so long after it was last touched. A day, but in tests.
    pub delete_after: Duration,
}

impl StorageConfig {
    /// What is usual, for this place.
    pub fn new(objects: ObjectsConfig) -> Self {
        Self {
            objects,
            agents_url: None,
            max_upload_bytes: 16 << 30,
            keep_artifacts: 30 * DAY,
            keep_caches: 30 * DAY,
            cache_budget_bytes: 20 << 30,
            move_logs_after: MOVE_LOGS_AFTER,
            keep_logs: 90 * DAY,
            logs_budget_bytes: 10 << 30,
            delete_after: DAY,
        }
    }
}

/// When a finished log leaves the database, where nobody says otherwise.
pub const MOVE_LOGS_AFTER: Duration = Duration::from_secs(30);

/// Why something was not kept or read.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Objects(#[from] ObjectsError),
    #[error("the upload has {length} bytes; this installation takes at most {max} at once (--max-upload)")]
    TooLarge { length: u64, max: u64 },
    #[error("the upload broke off: {0}")]
    BrokenOff(String),
    #[error("the bytes have the digest {found}, not the one that the path says; pack and upload them again")]
    WrongDigest { found: String },
    #[error(
        "this repository has not uploaded {digest}, or it has been deleted since: upload it, then try again"
    )]
    NotUploaded { digest: String },
    #[error("the attempt keeps another archive under this kind and name")]
    KeptBefore,
    #[error("what was said of the archive is not so: {0}")]
    NotAsSaid(String),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Extract(#[from] ExtractError),
    #[error("there is no such file in the artifact")]
    NoSuchFile,
    #[error("`{path}` is a {kind}, which has no contents")]
    NoContents { path: String, kind: &'static str },
    #[error(
        "its bytes are {how} {place}, where this installation keeps files (object {object}): somebody changed them, or the place is not the \
         one it was; put them back, or run what made them again (`sealci rerun`)"
    )]
    Lost { how: &'static str, object: String, place: objects::ObjectsLocation },
    #[error("this log was deleted on {day}: {why}")]
    LogDeleted { day: String, why: String },
    #[error("the log is finished and kept in {place} (object {object}), which cannot be read now")]
    LogAway { place: objects::ObjectsLocation, object: String, source: ObjectsError },
    #[error("the controller is shutting down")]
    ShuttingDown,
}

/// What the driver has of the storage: what lets an attempt reach it, handed over with its claim, and whom it tells of whole
/// logs.
#[derive(Debug, Clone)]
pub struct StorageDoor {
    key: TicketKey,
    url: Option<String>,
    whole_logs: WholeLogs,
}

impl StorageDoor {
    /// As `ClaimGranted.sealed_storage` has it, unsealed.
    pub fn open_for(&self, attempt: AttemptId, token: FencingToken) -> serde_json::Value {
        match &self.url {
            Some(url) => serde_json::json!({"url": url, "ticket": self.key.ticket(attempt, token)}),
            None => {
                serde_json::json!({"refused": "the controller does not know at which address agents reach its REST \
                interface, which artifacts, caches and reports need: start it with --agents-url"})
            }
        }
    }

    /// It is committed that an attempt's log is whole: it moves after a while.
    pub fn log_is_whole(&self, log: AttemptId, now: Instant) {
        self.whole_logs.add(log, now);
    }
}

/// The storage. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Storage(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    objects: Objects,
    config: StorageConfig,
    key: TicketKey,
    uploads: Arc<Semaphore>,
    indexes: Semaphore,
    /// Uploads under way. They end by themselves, also when nobody waits for them any more, and clean up.
    tasks: TaskTracker,
    /// Ends them at once; what they leave is found later.
    stop: CancellationToken,
    /// A cache has grown.
    grown: Notify,
    whole_logs: WholeLogs,
    /// Finished logs have grown by much.
    logs_grown: Notify,
    log_places: Semaphore,
}

impl Storage {
    pub async fn open(store: Store, config: StorageConfig) -> Result<Self, StorageError> {
        let objects = Objects::open(&config.objects)?;
        let fresh: [u8; KEY_BYTES] = rand::random();
        let key = store.shared_key("ticket", fresh.to_vec()).await?;
        let key: [u8; KEY_BYTES] = key
            .try_into()
            .map_err(|_| crate::store::Malformed::new("shared_keys", "ticket", "its length"))
            .map_err(StoreError::from)?;
        Ok(Self(Arc::new(Inner {
            store,
            objects,
            whole_logs: WholeLogs::new(config.move_logs_after),
            config,
            key: TicketKey::new(key),
            uploads: Arc::new(Semaphore::new(UPLOADS_AT_ONCE)),
            indexes: Semaphore::new(INDEXES_AT_ONCE),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
            grown: Notify::new(),
            logs_grown: Notify::new(),
            log_places: Semaphore::new(logs::WRITES_AT_ONCE),
        })))
    }

    /// What the driver hands to agents.
    pub fn door(&self) -> StorageDoor {
        StorageDoor {
            key: self.0.key.clone(),
            url: self.0.config.agents_url.clone(),
            whole_logs: self.0.whole_logs.clone(),
        }
    }

    /// Ends the uploads under way, whose connections have ended.
    pub async fn close(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// How long an artifact is kept, if it says nothing itself.
    pub fn keep_artifacts(&self) -> Duration {
        self.0.config.keep_artifacts
    }

    /// A cache has grown: whether it fits is looked at soon.
    pub fn cache_grew(&self) {
        self.0.grown.notify_one();
    }
}
