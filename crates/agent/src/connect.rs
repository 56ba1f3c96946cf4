//! Reaches a scheduler: channels to the configured addresses one after the other, enrolment, the request for a stream.

use std::time::Duration;

use sealci_proto::agent::agent_service_client::AgentServiceClient;
use sealci_proto::agent::{AgentMessage, EnrolRequest, SchedulerMessage};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use crate::causes::with_causes;
use crate::identity::Identity;

/// Why there is no connection, or no longer one.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot reach the scheduler {url}: {}", with_causes(.source))]
    Transport { url: String, source: tonic::transport::Error },
    #[error("the scheduler {url} refuses: {} ({})", .status.message(), name_of(.status.code()))]
    Refused { url: String, status: Box<Status> },
}

impl ConnectError {
    /// Whether trying again soon is pointless: something has to be put right first.
    pub fn is_final_for_now(&self) -> bool {
        let final_for_now = [Code::Unauthenticated, Code::PermissionDenied, Code::FailedPrecondition];
        matches!(self, Self::Refused { status, .. } if final_for_now.contains(&status.code()))
    }

    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { status, .. } => Some(status.code()),
            Self::Transport { .. } => None,
        }
    }
}

fn name_of(code: Code) -> String {
    format!("{code:?}").to_uppercase()
}

/// A scheduler address that is none.
#[derive(Debug, thiserror::Error)]
#[error("`{url}` is no address of a scheduler ({source}); write `https://host:port`")]
pub struct InvalidAddress {
    url: String,
    source: tonic::transport::Error,
}

/// How long a connection may stay silent, and how long a new one may take.
#[derive(Debug, Clone, Copy)]
pub struct ConnectTimes {
    pub connect: Duration,
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
}

/// The schedulers, tried in order, beginning with the one that answered last.
#[derive(Debug)]
pub struct Schedulers {
    endpoints: Vec<Endpoint>,
    current: usize,
    /// A connection to the current one that has answered, and that nobody uses.
    idle: Option<Channel>,
}

impl Schedulers {
    pub fn new(urls: &[String], ca_pem: Option<&[u8]>, times: ConnectTimes) -> Result<Self, InvalidAddress> {
        let endpoints: Result<_, _> = urls.iter().map(|url| endpoint(url, ca_pem, times)).collect();
        Ok(Self { endpoints: endpoints?, current: 0, idle: None })
    }

    /// The one to be tried now.
    fn current(&self) -> (Endpoint, String) {
        let endpoint = self.endpoints[self.current % self.endpoints.len()].clone();
        let url = endpoint.uri().to_string();
        (endpoint, url)
    }

    pub fn is_empty(&self) -> bool {
        self.endpoints.is_empty()
    }

    pub fn count(&self) -> usize {
        self.endpoints.len()
    }

    pub fn are_several(&self) -> bool {
        self.endpoints.len() > 1
    }

    /// The current one failed: the next one's turn.
    pub fn try_next(&mut self) {
        self.idle = None;
        self.current = (self.current + 1) % self.endpoints.len().max(1);
    }

    async fn connect(&mut self) -> Result<(Channel, String), ConnectError> {
        let (endpoint, url) = self.current();
        if let Some(channel) = self.idle.take() {
            return Ok((channel, url));
        }
        match endpoint.connect().await {
            Ok(channel) => Ok((channel, url)),
            Err(source) => Err(ConnectError::Transport { url, source }),
        }
    }

    /// Makes the agent known. Repeatable. The next session goes over the same connection.
    pub async fn enrol(
        &mut self,
        identity: &Identity,
        name: &str,
        token: &SecretString,
    ) -> Result<(), ConnectError> {
        let (channel, url) = self.connect().await?;
        let request = enrol_request(identity, name, token);
        match AgentServiceClient::new(channel.clone()).enrol(request).await {
            Ok(_) => {
                self.idle = Some(channel);
                Ok(())
            }
            Err(status) => Err(ConnectError::Refused { url, status: Box::new(status) }),
        }
    }

    /// Opens the stream. `outbound` must already hold what the scheduler waits for before it answers.
    pub async fn session(
        &mut self,
        identity: &Identity,
        outbound: mpsc::Receiver<AgentMessage>,
    ) -> Result<(Streaming<SchedulerMessage>, String), ConnectError> {
        let (channel, url) = self.connect().await?;
        let mut request = Request::new(ReceiverStream::new(outbound));
        let metadata = request.metadata_mut();
        metadata.insert("authorization", header(&format!("Bearer {}", identity.credential.bearer())));
        metadata.insert("sealci-agent-id", header(&identity.agent.to_string()));
        match AgentServiceClient::new(channel).session(request).await {
            Ok(response) => Ok((response.into_inner(), url)),
            Err(status) => Err(ConnectError::Refused { url, status: Box::new(status) }),
        }
    }
}

/// Asks to be made known.
pub fn enrol_request(identity: &Identity, name: &str, token: &SecretString) -> EnrolRequest {
    EnrolRequest {
        token: token.expose_secret().to_owned(),
        agent_id: identity.agent.to_string(),
        name: name.to_owned(),
        credential: identity.credential.bytes().to_vec(),
        public_key: identity.public_key().to_vec(),
    }
}

fn endpoint(url: &str, ca_pem: Option<&[u8]>, times: ConnectTimes) -> Result<Endpoint, InvalidAddress> {
    let invalid = |source| InvalidAddress { url: url.to_owned(), source };
    let mut endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(invalid)?
        .connect_timeout(times.connect)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(times.keepalive_interval)
        .keep_alive_timeout(times.keepalive_timeout)
        .keep_alive_while_idle(true);
    if url.starts_with("https://") {
        let tls = ClientTlsConfig::new();
        let tls = match ca_pem {
            // It alone: who runs an authority of their own wants no other to speak for their scheduler.
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_native_roots(),
        };
        endpoint = endpoint.tls_config(tls).map_err(invalid)?;
    }
    Ok(endpoint)
}

/// Hexadecimal digits and UUIDs are valid header values.
fn header(text: &str) -> MetadataValue<Ascii> {
    let mut value = MetadataValue::try_from(text).unwrap_or_else(|_| MetadataValue::from_static("invalid"));
    value.set_sensitive(true);
    value
}
