//! Owns the truth: turns events and manifests into pipelines, and records what becomes of them.
//!
//! Rooms: `intake` makes a request into a plan, `dispatch` drives the pipelines (the only writer), `store` is the
//! database, `storage` what actions leave, `api` the REST doors. The core decides; nothing is answered before it is durable.

pub mod api;
pub mod dispatch;
pub mod intake;
mod replica;
pub mod repositories;
pub mod storage;
pub mod store;
mod ticket;
pub mod watchers;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sealci_git::{AllowedTransports, CredentialBook, Git, Mirrors, Options};
use sealci_service::auth::{Token, Tokens};
use sealci_service::database::{Database, DatabaseError, DatabaseUrl};
use sealci_service::listen::{self, Door, Limits};
use sealci_service::tls;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use api::Api;
use dispatch::{ActionLimits, Dispatch, Driver, LinkConfig};
use replica::Replica;
use repositories::GitRepositories;
use storage::{Storage, StorageConfig, StorageError};
use store::{Store, StoreError};
use watchers::Watchers;

/// A log is cut visibly past this length, where nobody says another.
pub const LOG_QUOTA_BYTES: u64 = 1 << 30;

/// How long an agent may take to come back with the rest of a log.
pub const CLOSE_LOGS_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a replica of the controller may be silent.
pub const LEASE: Duration = Duration::from_secs(10);

/// The controller's mirrors hold what manifests are read from.
const MIRRORS_BUDGET_BYTES: u64 = 10 << 30;

/// Everything a controller needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    pub database: DatabaseUrl,
    /// For mirrors, and what git needs.
    pub data: PathBuf,
    /// Who may call the REST API.
    pub tokens: Tokens,
    /// Lets agents enrol.
    pub enrolment_tokens: Vec<Token>,
    /// Where the schedulers are: `https://ci.example.org:8422`; plain `http://` on this machine.
    pub schedulers: Vec<String>,
    /// The authority of the schedulers' certificates, PEM; the system's if none.
    pub scheduler_ca_pem: Option<Vec<u8>>,
    /// What the schedulers let controllers in by.
    pub cluster_secret: Token,
    pub transports: AllowedTransports,
    /// What opens private repositories.
    pub credentials: Arc<CredentialBook>,
    /// Whether repositories may be on loopback and private addresses.
    pub allow_local_addresses: bool,
    /// Certificates to trust of repositories' servers, instead of the system's, PEM.
    pub git_ca: Option<PathBuf>,
    /// The only host keys to trust for `ssh`; each host's first one if none.
    pub git_known_hosts: Option<PathBuf>,
    /// Silence of this length makes an attempt lost.
    pub lost_after: Duration,
    /// A replica of the controller that is silent for so long is gone, and the others take over what it owned.
    pub lease: Duration,
    /// A log that nobody delivers to its end is closed so long after its attempt's. A day, but in tests.
    pub close_logs_after: Duration,
    /// TERM → so long → KILL.
    pub grace: Duration,
    /// A log is cut visibly past this length.
    pub log_quota_bytes: u64,
    /// Where and how long what actions leave is kept.
    pub storage: StorageConfig,
}

/// What ends a controller before it is told to stop.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("cannot use the data folder {path}")]
    Data { path: PathBuf, source: std::io::Error },
}

/// A controller with its database open, ready to serve.
pub struct Controller {
    config: Config,
    /// Keeps a SQLite file this process's own.
    database: Database,
    store: Store,
    storage: Storage,
    driver: Driver,
    dispatch: Dispatch,
    watchers: Watchers,
    repositories: Arc<GitRepositories>,
}

impl Controller {
    /// Opens the database and takes over what it holds.
    pub async fn open(config: Config) -> Result<Self, ServeError> {
        tls::choose_provider();
        let data = |source| ServeError::Data { path: config.data.clone(), source };
        std::fs::create_dir_all(&config.data).map_err(data)?;
        let database = Database::open(&config.database).await?;
        let store = Store::open(database.writer.clone(), database.readers.clone()).await?;
        let storage = Storage::open(store.clone(), config.storage.clone()).await?;
        let watchers = Watchers::default();
        let driver = dispatch::Config {
            lost_after: config.lost_after,
            lease: config.lease,
            close_logs_after: config.close_logs_after,
            limits: ActionLimits { grace: config.grace, log_quota_bytes: config.log_quota_bytes },
            credentials: Arc::clone(&config.credentials),
            enrolment_tokens: config
                .enrolment_tokens
                .iter()
                .map(|token| Sha256::digest(token.expose()).into())
                .collect(),
            storage: storage.door(),
        };
        let identity = if store.is_shared() {
            Replica::new(&config.data).map_err(data)?
        } else {
            (Replica::alone(), None)
        };
        let (driver, dispatch) = Driver::open(store.clone(), driver, watchers.clone(), identity).await?;
        let mut options = Options::new(config.data.join("git-home"));
        options.allow_local_addresses = config.allow_local_addresses;
        options.tls_ca = config.git_ca.clone();
        options.known_hosts = config.git_known_hosts.clone();
        let git = Git::new(options).map_err(data)?;
        let mirrors = Mirrors::new(git, config.data.join("mirrors"), MIRRORS_BUDGET_BYTES).map_err(data)?;
        let credentials = Arc::clone(&config.credentials);
        let repositories = Arc::new(GitRepositories::new(mirrors, config.transports, credentials));
        Ok(Self { config, database, store, storage, driver, dispatch, watchers, repositories })
    }

    /// The door for whoever has the controller in the same process. It answers while [`Controller::serve`] runs.
    pub fn dispatch(&self) -> &Dispatch {
        &self.dispatch
    }

    /// Serves until told to stop.
    pub async fn serve(self, door: Door, stop: CancellationToken) {
        let Self { config, database: _database, store, storage, driver, dispatch, watchers, repositories } =
            self;
        let api = Api {
            store: store.clone(),
            storage: storage.clone(),
            dispatch: dispatch.clone(),
            watchers,
            repositories,
            gate: api::Gate::default(),
            stop: stop.clone(),
        };
        let router = api::router(api, &config.tokens);
        let link = LinkConfig {
            endpoints: config.schedulers,
            ca_pem: config.scheduler_ca_pem,
            secret: config.cluster_secret.expose().to_owned(),
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(dispatch::keep_listening(store, driver.replica(), dispatch.clone(), stop.clone()));
        tasks.spawn(driver.run(stop.clone()));
        tasks.spawn(storage.clone().keep_swept(stop.clone()));
        // What is thrown away with its process need not move.
        if !matches!(config.database, DatabaseUrl::Scratch(_)) {
            tasks.spawn(storage.clone().keep_moving(stop.clone()));
        }
        tasks.spawn(dispatch::keep_links(link, dispatch, stop.clone()));
        let limits = Limits::default();
        let mut http = std::pin::pin!(listen::serve(door, router, &limits, &stop));
        tokio::select! {
            () = &mut http => {}
            // Without its driver or its lines the controller is none.
            _ = tasks.join_next() => {
                stop.cancel();
                http.await;
            }
        }
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        storage.close().await;
    }
}

/// Opens a controller, and serves until told to stop.
pub async fn serve(config: Config, door: Door, stop: CancellationToken) -> Result<(), ServeError> {
    Controller::open(config).await?.serve(door, stop).await;
    Ok(())
}
