//! Chooses agents for attempts: the scheduler service.
//!
//! ```text
//!   agents ──gRPC──▶ service ──▶ driver ──▶ state ──▶ placement ──▶ queue, pool
//!                       ▲          │          (pure from here on: no clock, no network)
//!   controllers ──gRPC──┘          └──▶ mailboxes ──▶ agents, controllers
//! ```
//!
//! It keeps nothing on disk. What is wanted it knows from the controllers, what is held from the agents; both say all of
//! it whenever they connect. What agents and controllers say to each other it passes on unread. A test that wants no
//! network drives [`state::Scheduler`] itself.

pub mod config;
mod driver;
pub mod placement;
pub mod pool;
pub mod queue;
pub mod requirements;
mod service;
pub mod state;
mod why;

use sealci_proto::agent::agent_service_server::AgentServiceServer;
use sealci_proto::scheduler::scheduler_service_server::SchedulerServiceServer;
use secrecy::ExposeSecret;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tracing::{info, warn};

pub use config::{Config, Tls};
use driver::Driver;
use service::{AgentDoor, ControllerDoor, Front};
use state::Scheduler;

/// What each stream, and all streams of a connection together, may have under way towards us.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;

/// Why serving ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("the scheduler's gRPC server failed")]
    Server(#[from] tonic::transport::Error),
    #[error("the scheduler's driver failed; this is a bug, please report it")]
    Driver(#[source] tokio::task::JoinError),
}

/// Serves agents and controllers on `listener` until `shutdown`; then every stream is ended, and this returns once they
/// have closed or the time for it is over.
pub async fn serve(
    config: Config,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let stop = shutdown.child_token();
    // Whatever ends this function, also its being dropped, ends what it started.
    let _guard = stop.clone().drop_guard();
    let (inboxes, arrivals) = driver::inboxes(config.inbox);
    let scheduler = Scheduler::new(config.settings.clone(), rand::random());
    let readers = TaskTracker::new();
    let mut driver = JoinSet::new();
    driver.spawn(Driver::new(scheduler, arrivals).run(stop.clone()));

    let front = Front::new(config.clone(), inboxes, readers.clone(), stop.clone());
    let server = serve_streams(&config, listener, front, stop.clone());
    tokio::pin!(server);
    let result = tokio::select! {
        served = &mut server => served.map_err(ServeError::from),
        // It ends every stream before it ends, so the server has little left to wait for.
        Some(ended) = driver.join_next() => {
            stop.cancel();
            let served = tokio::time::timeout(config.shutdown_timeout, server).await;
            if served.is_err() {
                warn!("connections were still open when the time for shutting down was over");
            }
            match ended {
                Err(error) => Err(ServeError::Driver(error)),
                Ok(()) => served.unwrap_or(Ok(())).map_err(ServeError::from),
            }
        }
    };
    stop.cancel();
    while driver.join_next().await.is_some() {}
    readers.close();
    readers.wait().await;
    result
}

async fn serve_streams(
    config: &Config,
    listener: TcpListener,
    front: std::sync::Arc<Front>,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let agents = AgentServiceServer::new(AgentDoor(front.clone()))
        .max_decoding_message_size(config.max_agent_message_bytes);
    let controllers = SchedulerServiceServer::new(ControllerDoor(front))
        .max_decoding_message_size(config.max_controller_message_bytes);
    if let Ok(address) = listener.local_addr() {
        info!(address = %address, "the scheduler listens");
    }
    let mut server = Server::builder();
    if let Some(tls) = &config.tls {
        // Each handshake is a task of its own: one that is slow or fails holds up no other.
        let identity = Identity::from_pem(&tls.certificates_pem, tls.key_pem.expose_secret());
        server =
            server.tls_config(ServerTlsConfig::new().identity(identity).timeout(config.handshake_timeout))?;
    }
    server
        .http2_keepalive_interval(Some(config.keepalive_interval))
        .http2_keepalive_timeout(Some(config.keepalive_timeout))
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .add_service(agents)
        .add_service(controllers)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop.cancelled())
        .await
}
