//! Opens doors to the network and serves HTTP through them, so that no client can hold a service up.
//!
//! Invariants:
//! - without TLS, only this machine can connect;
//! - a TLS handshake happens in its connection's own task and has a bounded time: garbage and slowness hurt nobody else;
//! - every connection counts against a limit, and one that sends no request head in time is closed;
//! - when asked to end, no new connection is taken, requests under way finish, and after a deadline they are cut.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// What protects a listener.
#[derive(Debug, Clone)]
pub enum Security {
    /// No encryption; for the loopback only.
    PlainLoopback,
    /// For any address; needed by those that other machines reach.
    Tls(Arc<ServerConfig>),
}

/// An open listener, with what protects it.
pub struct Door {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Door {
    /// For a server that makes the handshakes itself.
    pub fn into_listener(self) -> TcpListener {
        self.listener
    }
}

/// Why an address could not be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(
        "{address} can be reached from other machines, which needs TLS: give a certificate and its key, or listen on 127.0.0.1 or [::1]"
    )]
    NeedsTls { address: SocketAddr },
    #[error("cannot listen on {address}; is something else running there?")]
    Bind { address: SocketAddr, source: io::Error },
}

/// Listens on the address; port 0 takes a free one. The bound address is in the result.
pub async fn bind(address: SocketAddr, security: Security) -> Result<(Door, SocketAddr), ListenError> {
    let tls = match security {
        Security::PlainLoopback if !address.ip().is_loopback() => {
            return Err(ListenError::NeedsTls { address });
        }
        Security::PlainLoopback => None,
        Security::Tls(config) => Some(TlsAcceptor::from(config)),
    };
    let fail = |source| ListenError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let bound = listener.local_addr().map_err(fail)?;
    Ok((Door { listener, tls }, bound))
}

/// What connections may take.
#[derive(Debug, Clone)]
pub struct Limits {
    pub max_connections: usize,
    /// Time for a TLS handshake.
    pub handshake_timeout: Duration,
    /// Time for a request's head, and for an idle HTTP/1 connection's next one.
    pub header_timeout: Duration,
    /// Time that requests under way have when the service ends.
    pub drain_deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 2048,
            handshake_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(20),
            drain_deadline: Duration::from_secs(10),
        }
    }
}

/// Serves the router (HTTP/1 and HTTP/2) until `shutdown` is cancelled and the connections are done, or the deadline is
/// over. Streams that never end by themselves must watch the same token.
pub async fn serve(door: Door, router: Router, limits: &Limits, shutdown: &CancellationToken) {
    let Door { listener, tls } = door;
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
                let serving =
                    serve_stream(stream, tls.clone(), router.clone(), limits.clone(), shutdown.clone());
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

/// Serves a connection, behind its handshake where there is one.
async fn serve_stream(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    // Logs and events are small writes that somebody waits for.
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return serve_connection(stream, router, limits, shutdown).await };
    let handshake = tokio::time::timeout(limits.handshake_timeout, tls.accept(stream));
    match shutdown.run_until_cancelled(handshake).await {
        Some(Ok(Ok(stream))) => serve_connection(stream, router, limits, shutdown).await,
        Some(Ok(Err(error))) => tracing::debug!(%error, "a TLS handshake failed"),
        Some(Err(_)) => tracing::debug!("a TLS handshake took too long"),
        None => {}
    }
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
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
            handshake_timeout: Duration::from_millis(300),
            header_timeout: Duration::from_millis(300),
            drain_deadline: Duration::from_millis(500),
        }
    }

    async fn served(router: Router) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        served_with(Security::PlainLoopback, router).await
    }

    async fn served_with(
        security: Security,
        router: Router,
    ) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let (door, address) = bind(LOOPBACK.into(), security).await.unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { serve(door, router, &limits(), &shutdown).await }
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
            let refused = bind(address.parse().unwrap(), Security::PlainLoopback).await.err();
            assert!(matches!(refused, Some(ListenError::NeedsTls { .. })), "{refused:?}");
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

    /// An authority of its own, a service's identity signed by it, and the authority's PEM.
    fn identity() -> (crate::tls::Identity, String) {
        let authority_key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = parameters.self_signed(&authority_key).unwrap();
        let issuer = rcgen::Issuer::new(parameters, authority_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (certificate_file, key_file) = (folder.path().join("crt"), folder.path().join("key"));
        std::fs::write(&certificate_file, leaf.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        (crate::tls::Identity::from_files(&certificate_file, &key_file).unwrap(), authority.pem())
    }

    fn client(authority: &str) -> reqwest::Client {
        crate::tls::choose_provider();
        let authority = reqwest::Certificate::from_pem(authority.as_bytes()).unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([authority]).build().unwrap()
    }

    #[tokio::test]
    async fn behind_tls_only_who_trusts_the_authority_is_served() {
        let (identity, authority) = identity();
        let router = Router::new().route("/", get(|| async { "hello" }));
        let (address, shutdown, task) = served_with(Security::Tls(identity.server_config()), router).await;
        let url = format!("https://{address}/");
        let answer = client(&authority).get(&url).send().await.unwrap();
        assert_eq!(answer.text().await.unwrap(), "hello");

        let (_, stranger) = self::identity();
        let error = client(&stranger).get(&url).send().await.unwrap_err();
        let text = crate::problem::chain(&error);
        assert!(text.contains("certificate"), "{text}");
        let error = client(&authority).get(format!("http://{address}/")).send().await;
        assert!(error.is_err(), "a plain request is not answered");
        shutdown.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn garbage_and_slow_handshakes_hurt_nobody_else() {
        let (identity, authority) = identity();
        let router = Router::new().route("/", get(|| async { "hello" }));
        let (address, shutdown, task) = served_with(Security::Tls(identity.server_config()), router).await;
        // As many as may be connected at all: one says nothing, one stops in the middle of a record.
        let silent = TcpStream::connect(address).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]).await.unwrap();
        let url = format!("https://{address}/");
        let request = client(&authority).get(&url).send();
        let answer = tokio::time::timeout(Duration::from_secs(10), request).await.unwrap().unwrap();
        assert_eq!(answer.text().await.unwrap(), "hello");
        drop(silent);

        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 100], &[0xff; 5000]] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(garbage).await.unwrap();
            let mut said = Vec::new();
            // Whatever it says of it, it closes the connection.
            let closed = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut said)).await;
            assert!(closed.is_ok());
        }
        assert!(client(&authority).get(&url).send().await.is_ok());
        shutdown.cancel();
        task.await.unwrap();
    }
}
