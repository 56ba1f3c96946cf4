//! Runs actions on this machine for an installation of SealCI: dials out to a scheduler, takes attempts on, executes them, and
//! owes their results until they are acknowledged.
//!
//! ```text
//!   session ── stream ──▶ scheduler          what is said and heard, and when it is said again
//!      │         ▲
//!   agent ───────┤ orders, states            what is held
//!      │         │
//!   attempt ──▶ spool                        one task for each; all it learns is spooled
//!      ├── workspace
//!      └── executor
//! ```
//!
//! - No command runs before its claim is granted and the grant is spooled.
//! - What was spooled is delivered, whatever dies meanwhile; a broken stream ends nothing that runs.
//! - Memory is bounded, whatever an action prints and however slow the line is.

mod agent;
mod attempt;
mod backoff;
mod capacity;
mod causes;
mod connect;
mod delivery;
pub mod entry;
mod environment;
pub mod executor;
mod identity;
mod lease;
pub mod mirror;
mod offer;
mod preparation;
mod private;
mod reconcile;
mod room;
mod services;
mod session;
mod spool;
mod storage;
mod stream;
#[cfg(feature = "testing")]
pub mod testing;
pub mod workspace;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sealci_core::plan::Resources;
use secrecy::SecretString;

use crate::agent::Agent;
use crate::backoff::Backoff;
use crate::connect::{ConnectError, ConnectTimes, InvalidAddress, Schedulers};
use crate::delivery::ResendRules;
use crate::entry::Entries;
use crate::executor::Executor;
use crate::identity::{Identity, IdentityError};
use crate::offer::{Disk, Offering};
use crate::preparation::Means;
use crate::room::Room;
use crate::session::{Session, SessionTimes};
use crate::spool::{AttemptSpool, Spool, SpoolError};
use crate::storage::{HttpSource, Patience};
use crate::stream::Rhythm;
use crate::workspace::Checkout;

pub use crate::capacity::detected as machine_capacity;
pub use crate::offer::{DiskProbe, machine_labels};
pub use crate::private::Persistence;
pub use crate::room::RoomLimits;
pub use crate::session::Shutdown;
pub use crate::spool::SpoolLimits;

/// What an agent is told about itself.
pub struct Config {
    /// What people see; 1 to 128 bytes.
    pub name: String,
    /// Holds the identity, the spool and the workspaces. One agent at a time.
    pub data_folder: PathBuf,
    /// Whether that folder outlives this process.
    pub persistence: Persistence,
    /// `https://host:port` of one or more schedulers; they are tried in turn.
    pub schedulers: Vec<String>,
    /// Whom to trust for `https`, besides the public authorities.
    pub scheduler_ca_pem: Option<Vec<u8>>,
    /// Needed until the installation knows this agent.
    pub enrolment_token: Option<SecretString>,
    /// The release, as `sealci --version` prints it.
    pub version: String,
    /// None: what the machine has.
    pub capacity: Option<Resources>,
    /// Besides `arch` and `os`.
    pub labels: BTreeMap<String, String>,
    /// What runs actions. The first is the default.
    pub executors: Vec<Arc<dyn Executor>>,
    /// What fills workspaces.
    pub checkout: Arc<dyn Checkout>,
    /// At most so many attempts at a time.
    pub slots: u32,
    pub spool: SpoolLimits,
    /// With less free on the data folder's disk, nothing new is taken.
    pub min_free_disk_bytes: u64,
    /// Asks the file system.
    pub disk_probe: DiskProbe,
    /// What actions that run may take of it.
    pub room: RoomLimits,
    pub periods: Periods,
}

impl Config {
    /// The usual agent: everything the machine has, 1 GiB of spool, 1 GiB of the disk kept free.
    pub fn new(
        name: String,
        data_folder: PathBuf,
        schedulers: Vec<String>,
        executors: Vec<Arc<dyn Executor>>,
        checkout: Arc<dyn Checkout>,
    ) -> Self {
        Self {
            name,
            data_folder,
            persistence: Persistence::Durable,
            schedulers,
            scheduler_ca_pem: None,
            enrolment_token: None,
            version: env!("CARGO_PKG_VERSION").into(),
            capacity: None,
            labels: BTreeMap::new(),
            executors,
            checkout,
            slots: 64,
            spool: SpoolLimits::default(),
            min_free_disk_bytes: 1 << 30,
            disk_probe: Box::new(workspace::free_disk_bytes),
            room: RoomLimits::default(),
            periods: Periods::default(),
        }
    }
}

/// All periods of an agent. Tests make them shorter.
#[derive(Debug, Clone, Copy)]
pub struct Periods {
    pub connect_timeout: Duration,
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
    pub backoff_shortest: Duration,
    pub backoff_longest: Duration,
    /// Between tries while the installation refuses this agent.
    pub backoff_refused: Duration,
    /// So long a scheduler may take to admit the agent while there are others to try.
    pub admission: Duration,
    /// What is not acknowledged for so long is sent again.
    pub resend: Duration,
    /// `Held` is said at least so often, until the scheduler says how often.
    pub held_interval: Duration,
    /// So long the controller's storage may be away before what needs it is given up.
    pub storage_patience: Duration,
    /// How often the disk is looked at and overdue things are looked for.
    pub tick: Duration,
}

impl Default for Periods {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(10),
            backoff_shortest: Duration::from_millis(100),
            backoff_longest: Duration::from_secs(10),
            backoff_refused: Duration::from_secs(30),
            admission: Duration::from_secs(30),
            resend: Duration::from_secs(10),
            held_interval: Duration::from_secs(10),
            storage_patience: Duration::from_secs(10 * 60),
            tick: Duration::from_millis(250),
        }
    }
}

impl Periods {
    /// A part of each, where others are waited for.
    pub fn hurried(self, factor: u32) -> Self {
        Self {
            connect_timeout: self.connect_timeout / factor,
            keepalive_interval: self.keepalive_interval / factor,
            keepalive_timeout: self.keepalive_timeout / factor,
            backoff_longest: self.backoff_longest / factor,
            backoff_refused: self.backoff_refused / factor,
            admission: self.admission / factor,
            resend: self.resend / factor,
            held_interval: self.held_interval / factor,
            ..self
        }
    }

    fn storage(&self) -> Patience {
        let (shortest_wait, longest_wait) = (self.backoff_shortest, self.backoff_longest);
        Patience { most: self.storage_patience, shortest_wait, longest_wait }
    }

    fn session(&self) -> SessionTimes {
        let rhythm = Rhythm {
            resend: ResendRules { without_progress: self.resend, when_told: self.resend / 20 },
            claim_again: self.resend / 5,
            held_interval: self.held_interval * 9 / 10,
        };
        SessionTimes {
            rhythm,
            tick: self.tick,
            backoff_shortest: self.backoff_shortest,
            backoff_longest: self.backoff_longest,
            backoff_refused: self.backoff_refused,
            admission: self.admission,
        }
    }
}

/// So long the end of what was killed is waited for.
const CLOSING: Duration = Duration::from_secs(10);

/// Why an agent cannot begin. Once it has begun nothing but its shutdown ends it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Spool(#[from] SpoolError),
    #[error(transparent)]
    Address(#[from] InvalidAddress),
    #[error("the agent's configuration is incomplete: {0}")]
    Config(&'static str),
    #[error("cannot make the folder {path} for workspaces: {source}")]
    Work { path: PathBuf, source: std::io::Error },
    #[error(
        "cannot set up HTTP for the controller's storage; check the certificates of the scheduler's authority"
    )]
    Http(#[from] reqwest::Error),
    #[error("this agent is not enrolled yet; start it with an enrolment token")]
    NotEnrolled,
    #[error(
        "the agent cannot be enrolled; make a new enrolment token, or give this machine a new data folder"
    )]
    Enrol(#[source] ConnectError),
}

/// Runs an agent until it has drained or is stopped.
pub async fn run(config: Config, shutdown: Shutdown) -> Result<(), AgentError> {
    Opened::open(config).await?.run(shutdown).await
}

/// An agent that has its data folder to itself, knows who it is and has cleaned up after a former process, but has not
/// dialled yet.
pub struct Opened {
    config: Config,
    schedulers: Schedulers,
    spool: Spool,
    left: Vec<Arc<AttemptSpool>>,
    identity: Identity,
    work: PathBuf,
    capacity: Resources,
}

impl Opened {
    /// Does what an agent can do before anybody has to be there for it.
    pub async fn open(config: Config) -> Result<Self, AgentError> {
        let times = ConnectTimes {
            connect: config.periods.connect_timeout,
            keepalive_interval: config.periods.keepalive_interval,
            keepalive_timeout: config.periods.keepalive_timeout,
        };
        let schedulers = Schedulers::new(&config.schedulers, config.scheduler_ca_pem.as_deref(), times)?;
        if schedulers.is_empty() {
            return Err(AgentError::Config("it names no scheduler"));
        }
        if config.executors.is_empty() {
            return Err(AgentError::Config("it allows no executor"));
        }
        // The spool's lock comes first: it keeps two first starts from making two identities.
        let folder = config.data_folder.join("spool");
        let (spool, left) =
            Spool::open(&folder, config.spool, config.persistence, identity::new_instance_id)?;
        let identity = Identity::load_or_make(&config.data_folder, config.persistence)?;
        let work = config.data_folder.join("work");
        for executor in &config.executors {
            // What was left may hold the folders that are removed next.
            if let Err(error) = executor.sweep().await {
                let kind = executor.kind().as_str();
                tracing::error!(
                    executor = kind,
                    error = error.message(),
                    "cannot clean up after a former process"
                );
            }
        }
        workspace::clear(&work).map_err(|source| AgentError::Work { path: work.clone(), source })?;
        let capacity = config.capacity.unwrap_or_else(capacity::detected);
        Ok(Self { config, schedulers, spool, left, identity, work, capacity })
    }

    /// Runs it until it has drained or is stopped.
    pub async fn run(mut self, shutdown: Shutdown) -> Result<(), AgentError> {
        let is_known = self.identity.is_enrolled()
            || enrol(&self.config, &mut self.identity, &mut self.schedulers, &shutdown).await?;
        if !is_known {
            return Ok(());
        }
        let data_folder = self.config.data_folder.clone();
        let executors = self.config.executors.clone();
        let Parts { mut agent, session, room, entries } = self.assemble(shutdown);
        tokio::select! {
            () = session.run(&mut agent) => {}
            never = room.watch() => match never {},
            never = entry::serve(&data_folder, entries) => match never {},
        }
        agent.stop().await;
        for executor in executors {
            // What does not die is found by the next start's sweep.
            if tokio::time::timeout(CLOSING, executor.close()).await.is_err() {
                tracing::error!(executor = executor.kind().as_str(), "something of an action is still there");
            }
        }
        Ok(())
    }

    fn assemble(self, shutdown: Shutdown) -> Parts {
        let Self { config, schedulers, spool, left, identity, work, capacity } = self;
        let times = config.periods.session();
        let identity = Arc::new(identity);
        let names = config.executors.iter().map(|executor| executor.kind().as_str().to_owned()).collect();
        let offering = Offering::new(capacity, config.labels, names, config.slots);
        let disk = Disk::new(work.clone(), config.min_free_disk_bytes, config.disk_probe);
        let room = Arc::new(Room::new(work.clone(), config.room));
        let entries = Entries::default();
        let means = Means {
            identity: identity.clone(),
            executors: config.executors,
            checkout: config.checkout,
            work,
            room: room.clone(),
            http: HttpSource::new(config.scheduler_ca_pem),
            storage_patience: config.periods.storage(),
            entries: entries.clone(),
        };
        let agent = Agent::new(spool, left, offering, disk, Arc::new(means));
        let session = Session {
            schedulers,
            identity,
            name: config.name,
            enrolment_token: config.enrolment_token,
            version: config.version,
            times,
            shutdown,
        };
        Parts { agent, session, room, entries }
    }
}

/// What an agent consists of, once it is known who it is.
struct Parts {
    agent: Agent,
    session: Session,
    room: Arc<Room>,
    entries: Entries,
}

/// Makes the agent known, however long it takes to reach someone who can; false if it is told to leave before.
async fn enrol(
    config: &Config,
    identity: &mut Identity,
    schedulers: &mut Schedulers,
    shutdown: &Shutdown,
) -> Result<bool, AgentError> {
    use tonic::Code;
    let token = config.enrolment_token.as_ref().ok_or(AgentError::NotEnrolled)?;
    let mut backoff = Backoff::new(config.periods.backoff_shortest, config.periods.backoff_longest);
    loop {
        let leave = async {
            tokio::select! {
                () = shutdown.stop.cancelled() => {}
                () = shutdown.drain.cancelled() => {}
            }
        };
        let trying = async {
            let error = match schedulers.enrol(identity, &config.name, token).await {
                Ok(()) => return Ok(true),
                Err(error) => error,
            };
            let refused = [Code::Unauthenticated, Code::AlreadyExists, Code::InvalidArgument];
            if error.code().is_some_and(|code| refused.contains(&code)) {
                return Err(AgentError::Enrol(error));
            }
            tracing::warn!(%error, "not enrolled yet; trying again");
            schedulers.try_next();
            tokio::time::sleep(backoff.wait(rand::random())).await;
            Ok(false)
        };
        let enrolled = tokio::select! {
            tried = trying => tried?,
            () = leave => return Ok(false),
        };
        if enrolled {
            identity.enrolled()?;
            tracing::info!(agent.id = %identity.agent, "enrolled");
            return Ok(true);
        }
    }
}
