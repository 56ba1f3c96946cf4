//! Watches Git repositories and hands the controller an event for every change that a configuration asks for.
//!
//! ```text
//!   poll: git ls-remote ──► changes (pure) ──► one transaction: cursors + outbox ──► deliver: the controller
//!                                                                      ▲                    │ 2xx: row deleted
//!   API: configurations ──────────────────────────► store ◄────────────┴────────────────────┘
//! ```
//!
//! Invariants:
//! - a cursor moves in the transaction that records its events, so over any restart nothing is missed;
//! - an event goes out until the controller has answered for it, with the same identity every time, so nothing is doubled;
//! - a configuration's polls and deliveries are its own tasks: one that hangs delays no other.
//!
//! The monitor knows nothing of pipelines, and reads no manifest.

mod api;
mod changes;
mod config;
mod configuration;
mod deliver;
mod filter;
mod poll;
mod sink;
mod status;
mod store;
mod watch;

use std::io;
use std::sync::Arc;

use sealci_git::Git;
use sealci_service::database::DatabaseError;
use sealci_service::listen::Door;
use sealci_service::{listen, tls};
use tokio_util::sync::CancellationToken;

pub use api::route_table;
pub use config::{Backoff, Config, ControllerAddress};
pub use configuration::WatchedKind;
pub use sink::{ControllerSink, Delivered, EventSink, OutboundEvent, SinkError, WhichManifest};

/// Why the monitor could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("cannot bring the monitor's database to this version")]
    Migrate(#[source] sea_orm::DbErr),
    #[error("cannot use git's home folder {}", path.display())]
    GitHome { path: std::path::PathBuf, source: io::Error },
    #[error("cannot make a client for the controller at `{url}`: {why}")]
    Controller { url: String, why: String },
}

/// Serves the API on the listener and watches what is configured, until `shutdown` is cancelled.
pub async fn serve(config: Config, door: Door, shutdown: CancellationToken) -> Result<(), ServeError> {
    tls::choose_provider();
    let sink = Arc::new(ControllerSink::new(&config.controller)?);
    let store = store::Store::open(&config.database).await?;
    let home = config.git.home.clone();
    let git = Git::new(config.git.clone()).map_err(|source| ServeError::GitHome { path: home, source })?;
    let http_limits = config.http.clone();
    let watch = Arc::new(watch::Watch::new(config, store.clone(), git, sink));
    let router = api::router(Arc::clone(&watch));
    tokio::join!(
        listen::serve(door, router, &http_limits, &shutdown),
        watch::run(Arc::clone(&watch), &shutdown),
    );
    if let Err(error) = store.close().await {
        tracing::warn!(%error, "the database did not close properly");
    }
    Ok(())
}
