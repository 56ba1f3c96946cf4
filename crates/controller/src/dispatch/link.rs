//! Keeps a line to every scheduler: connects, reconnects, and carries messages. It decides nothing.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use sealci_proto::PROTOCOLS;
use sealci_proto::agent::LogChunk;
use sealci_proto::scheduler::scheduler_service_client::SchedulerServiceClient;
use sealci_proto::scheduler::{
    ControllerMessage, Hello, SchedulerMessage, controller_message, from_agent, scheduler_message,
};
use sealci_service::problem::chain;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use uuid::Uuid;

use super::lines::{Line, LineId};
use super::{Dispatch, Input};

/// The driver may be so many batches ahead of the line; more, and the line is given up and made anew.
const OUTGOING_BATCHES: usize = 1024;

/// Above every message the contract allows, well below what hurts.
const MAX_MESSAGE_BYTES: usize = 8 << 20;

/// Between tries to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Where the schedulers are, and how to be let in.
#[derive(Clone)]
pub struct LinkConfig {
    /// `https://ci.example.org:8422`; each gets a line.
    pub endpoints: Vec<String>,
    /// The authority of their certificates, PEM; the system's if none.
    pub ca_pem: Option<Vec<u8>>,
    /// The cluster's secret.
    pub secret: String,
}

/// What a line tells the driver.
#[derive(Debug)]
pub(super) enum FromLink {
    Up(Line),
    Message(Box<Incoming>),
    Down,
}

/// A message, with a log chunk's bytes already packed for the database.
#[derive(Debug)]
pub(super) struct Incoming {
    pub message: scheduler_message::Body,
    /// The chunk's bytes as one zstd frame; the message's own are left as they are, for their length.
    pub packed: Option<Vec<u8>>,
}

/// Keeps a line to every scheduler until told to stop.
pub async fn keep_links(config: LinkConfig, dispatch: Dispatch, stop: CancellationToken) {
    let config = Arc::new(config);
    let mut endpoints = config.endpoints.clone();
    endpoints.sort();
    endpoints.dedup();
    let mut links = JoinSet::new();
    for (scheduler, endpoint) in endpoints.into_iter().enumerate() {
        let link = Link { scheduler, endpoint, config: Arc::clone(&config), dispatch: dispatch.clone() };
        links.spawn(link.keep(stop.clone()));
    }
    // Each ends only when told to, or without a driver.
    while links.join_next().await.is_some() {}
}

/// What keeps the line to one scheduler.
struct Link {
    scheduler: usize,
    endpoint: String,
    config: Arc<LinkConfig>,
    dispatch: Dispatch,
}

/// What ends a line.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("cannot connect")]
    Connect(#[from] tonic::transport::Error),
    #[error("the secret has characters that no header may have")]
    Secret,
    #[error("{}: {}", .0.code(), .0.message())]
    Status(#[from] tonic::Status),
    #[error("the scheduler did not say `Welcome` first")]
    NoWelcome,
    #[error("the controller gave the line up, to make it anew")]
    GivenUp,
    #[error("the controller is shutting down")]
    DriverGone,
}

impl Link {
    async fn keep(self, stop: CancellationToken) {
        let mut pause = SHORTEST_PAUSE;
        for session in 1.. {
            let id = LineId { scheduler: self.scheduler, session };
            let mut was_up = false;
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.carry(id, &mut was_up) => match ended {
                    Ok(()) => "the scheduler ended the stream".to_owned(),
                    Err(error) => chain(&error),
                },
            };
            if was_up {
                pause = SHORTEST_PAUSE;
                if self.tell(id, FromLink::Down).await.is_err() {
                    return;
                }
            }
            let endpoint = &self.endpoint;
            tracing::warn!(scheduler.endpoint = endpoint, error = %ended, "no line to the scheduler; trying again");
            let jittered = pause.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(jittered) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn carry(&self, id: LineId, was_up: &mut bool) -> Result<(), LinkError> {
        let channel = connect(&self.endpoint, self.config.ca_pem.as_deref()).await?;
        let mut bearer: MetadataValue<Ascii> =
            format!("Bearer {}", self.config.secret).parse().map_err(|_| LinkError::Secret)?;
        bearer.set_sensitive(true);
        let mut client = SchedulerServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);

        let (outgoing, mut batches) = mpsc::channel::<Vec<ControllerMessage>>(OUTGOING_BATCHES);
        let hello = Hello {
            protocol_min: PROTOCOLS.min,
            protocol_max: PROTOCOLS.max,
            replica_id: Uuid::now_v7().to_string(),
        };
        let hello = ControllerMessage { body: Some(controller_message::Body::Hello(hello)) };
        let messages = async_stream(hello, move |context| batches.poll_recv(context));
        let mut request = tonic::Request::new(messages);
        request.metadata_mut().insert("authorization", bearer);
        let mut incoming = client.control(request).await?.into_inner();

        let welcome = incoming.next().await.ok_or(LinkError::NoWelcome)??;
        if !matches!(welcome.body, Some(scheduler_message::Body::Welcome(_))) {
            return Err(LinkError::NoWelcome);
        }
        let given_up = CancellationToken::new();
        let _given_up = given_up.clone().drop_guard();
        let line = Line { endpoint: self.endpoint.clone(), outgoing, _given_up };
        self.tell(id, FromLink::Up(line)).await?;
        *was_up = true;
        loop {
            let message = tokio::select! {
                () = given_up.cancelled() => return Err(LinkError::GivenUp),
                message = incoming.next() => message,
            };
            let Some(message) = message else { return Ok(()) };
            let SchedulerMessage { body: Some(message) } = message? else { continue };
            let packed = packed(&message);
            self.tell(id, FromLink::Message(Box::new(Incoming { message, packed }))).await?;
        }
    }

    async fn tell(&self, id: LineId, news: FromLink) -> Result<(), LinkError> {
        self.dispatch.inbox.send(Input::Link(id, news)).await.map_err(|_| LinkError::DriverGone)
    }
}

async fn connect(url: &str, ca_pem: Option<&[u8]>) -> Result<Channel, tonic::transport::Error> {
    let mut endpoint = Endpoint::from_shared(url.to_owned())?;
    if url.starts_with("https://") {
        let tls = ClientTlsConfig::new();
        endpoint = endpoint.tls_config(match ca_pem {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_native_roots(),
        })?;
    }
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .connect()
        .await
}

/// The hello, then every batch's messages one by one; ends when the driver drops its end.
fn async_stream(
    hello: ControllerMessage,
    mut poll_batch: impl FnMut(&mut std::task::Context<'_>) -> std::task::Poll<Option<Vec<ControllerMessage>>>
    + Send
    + 'static,
) -> impl futures_util::Stream<Item = ControllerMessage> + Send + 'static {
    let batches = futures_util::stream::poll_fn(move |context| poll_batch(context));
    futures_util::stream::iter([hello]).chain(batches.flat_map(futures_util::stream::iter))
}

/// Packs a log chunk here, beside the driver, which has the commits to do.
fn packed(message: &scheduler_message::Body) -> Option<Vec<u8>> {
    let scheduler_message::Body::FromAgent(from) = message else { return None };
    let Some(from_agent::Body::LogChunk(LogChunk { data, gap: None, .. })) = &from.body else { return None };
    zstd::bulk::compress(data, 1).ok()
}
