//! Serves HTTP with limits: how long one may take to say what is wanted, how many may come at once, how long the last
//! ones may take when the service stops.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Answers that are under way when the service stops get so long.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Why a listener could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address}: is another service there? Choose another with --listen")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error(
        "will not listen on {address} without TLS: anyone on the way could read tokens. Use a loopback address, or give a certificate"
    )]
    NotLoopback { address: SocketAddr },
}

/// Listens on a loopback address. Elsewhere TLS is needed, which has its own door.
pub async fn bind_loopback(address: SocketAddr) -> Result<TcpListener, ListenError> {
    if !address.ip().is_loopback() {
        return Err(ListenError::NotLoopback { address });
    }
    TcpListener::bind(address).await.map_err(|source| ListenError::Bind { address, source })
}

/// Serves until told to stop, then gives what is under way some time.
pub async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) -> std::io::Result<()> {
    let stopping = stop.clone();
    let server =
        axum::serve(listener, router).with_graceful_shutdown(async move { stopping.cancelled().await });
    let deadline = async {
        stop.cancelled().await;
        tokio::time::sleep(LAST_ANSWERS).await;
    };
    tokio::select! {
        served = server => served,
        () = deadline => Ok(()),
    }
}
