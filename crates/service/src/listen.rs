//! Opens doors to the network and serves HTTP through them, so that no client can hold a service up.
//!
//! Invariants:
//! - without TLS, only this machine can connect;
//! - every connection counts against a limit, and one that sends no request head in time is closed;
//! - when asked to end, no new connection is taken, requests under way finish, and after a deadline they are cut.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What protects a listener. TLS (rustls) will be a second variant; it is what an address other machines reach needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Security {
    /// No encryption; for the loopback only.
    PlainLoopback,
}

/// Why an address could not be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "{address} can be reached from other machines, which needs TLS: listen on 127.0.0.1 or [::1], behind a proxy if need be"
    )]
    NeedsTls { address: SocketAddr },
    #[error("cannot listen on {address}; is something else running there?")]
    Bind { address: SocketAddr, source: io::Error },
}

/// Listens on the address; port 0 takes a free one. The bound address is in the result.
pub async fn bind(address: SocketAddr, security: Security) -> Result<(TcpListener, SocketAddr), ListenError> {
    match security {
        Security::PlainLoopback if !address.ip().is_loopback() => {
            return Err(ListenError::NeedsTls { address });
        }
        Security::PlainLoopback => {}
    }
    let fail = |source| ListenError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    Ok((listener, bound))
}

/// What connections may take.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_connections: usize,
    /// Time for a request's head, and for an idle HTTP/1 connection's next one.
    pub header_timeout: Duration,
    /// Time that requests under way have when the service ends.
    pub drain_deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 2048,
            header_timeout: Duration::from_secs(20),
            drain_deadline: Duration::from_secs(10),
        }
    }
}

/// Serves the router (HTTP/1 and HTTP/2) until `shutdown` is cancelled and the connections are done, or the deadline is
/// over. Streams that never end by themselves must watch the same token.
pub async fn serve(listener: TcpListener, router: Router, limits: &Limits, shutdown: &CancellationToken) {
    let permits = Arc::new(Semaphore::new(limits.max_connections));
    let mut connections = JoinSet::new();
    loop {
        // The permit comes first: connections over the limit wait in the kernel's queue, and cost nothing here.
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let serving = serve_connection(stream, router.clone(), limits.clone(), shutdown.clone());
                connections.spawn(async move {
                    serving.await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of file descriptors, mostly. It passes when connections end; until then, do not spin.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
    drop(listener);
    let draining = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.drain_deadline, draining).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections were cut at the deadline");
        connections.shutdown().await;
    }
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
}

async fn serve_connection(stream: TcpStream, router: Router, limits: Limits, shutdown: CancellationToken) {
    // Logs and events are small writes that somebody waits for.
    let _ = stream.set_nodelay(true);
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.header_timeout);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(100)
        .keep_alive_interval(limits.header_timeout)
        .keep_alive_timeout(limits.header_timeout);
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended badly");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LOOPBACK: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

    fn limits() -> Limits {
        Limits {
            max_connections: 2,
            header_timeout: Duration::from_millis(300),
            drain_deadline: Duration::from_millis(500),
        }
    }

    async fn served(router: Router) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let (listener, address) = bind(LOOPBACK.into(), Security::PlainLoopback).await.unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { serve(listener, router, &limits(), &shutdown).await }
        });
        (address, shutdown, task)
    }

    async fn request(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn other_machines_need_tls() {
        for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
            let refused = bind(address.parse().unwrap(), Security::PlainLoopback).await.unwrap_err();
            assert!(matches!(refused, ListenError::NeedsTls { .. }), "{refused}");
        }
    }

    #[tokio::test]
    async fn idle_connections_are_closed_and_let_others_in() {
        let (address, shutdown, task) = served(Router::new().route("/", get(|| async { "hello" }))).await;
        let mut idle =
            [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        idle[0].write_all(b"GET / HT").await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(10), request(address)).await.unwrap();
        assert!(answer.ends_with("hello"), "{answer}");
        shutdown.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn the_end_waits_for_requests_under_way_but_not_for_ever() {
        let arrived = Arc::new(tokio::sync::Notify::new());
        let go = Arc::new(tokio::sync::Notify::new());
        let router = Router::new().route("/", {
            let (arrived, go) = (arrived.clone(), go.clone());
            get(async move || {
                arrived.notify_one();
                go.notified().await;
                "done"
            })
        });
        let (address, shutdown, task) = served(router.clone()).await;
        let client = tokio::spawn(request(address));
        arrived.notified().await;
        shutdown.cancel();
        go.notify_one();
        assert!(client.await.unwrap().ends_with("done"));
        task.await.unwrap();

        let (address, shutdown, task) = served(router).await;
        let client = tokio::spawn(request(address));
        arrived.notified().await;
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
        assert_eq!(client.await.unwrap(), "");
    }
}
