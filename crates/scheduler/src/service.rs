//! Answers gRPC: checks who calls, and passes streams to the driver and back. It decides nothing else.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures_util::Stream;
use sealci_core::ids::AgentId;
use sealci_proto::agent::agent_service_server::AgentService;
use sealci_proto::scheduler::scheduler_service_server::SchedulerService;
use sealci_proto::{agent, scheduler};
use secrecy::ExposeSecret;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::config::Config;
use crate::driver::{Arrival, Inboxes, Mail, mailbox};
use crate::state::{ControllerId, Ended, EnrolId, EnrolRefused, Input, SessionId};

/// What both services are made of.
#[derive(Debug)]
pub(crate) struct Front {
    config: Config,
    inboxes: Inboxes,
    /// Sessions, controllers and requests are numbered together.
    ids: AtomicU64,
    secret_sha256: [u8; 32],
    /// Everyone who reads from a peer.
    readers: TaskTracker,
    stop: CancellationToken,
}

impl Front {
    pub fn new(config: Config, inboxes: Inboxes, readers: TaskTracker, stop: CancellationToken) -> Arc<Self> {
        let secret_sha256 = Sha256::digest(config.cluster_secret.expose_secret()).into();
        Arc::new(Self { config, inboxes, ids: AtomicU64::new(1), secret_sha256, readers, stop })
    }

    fn new_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    /// The first message of a stream.
    async fn first<M>(&self, messages: &mut Streaming<M>) -> Result<M, Status> {
        let timeout = self.config.hello_timeout;
        match tokio::time::timeout(timeout, messages.message()).await {
            Ok(message) => {
                message?.ok_or_else(|| Status::invalid_argument("the stream ended before `hello`"))
            }
            Err(_) => {
                let waited = timeout.as_millis();
                Err(Status::deadline_exceeded(format!("no `hello` came within {waited} ms")))
            }
        }
    }

    /// Passes on what a peer sends, until either side ends the stream; `gone` is said at the end.
    fn read<M, F>(
        &self,
        inbox: &mpsc::Sender<Arrival>,
        mut messages: Streaming<M>,
        ended: CancellationToken,
        each: F,
        gone: Input,
    ) where
        M: Send + 'static,
        F: Fn(M) -> Option<Input> + Send + Sync + 'static,
    {
        let inbox = inbox.clone();
        self.readers.spawn(async move {
            let pass_on = async {
                // An error is the end of the stream, like its end: the peer makes a new one.
                while let Ok(Some(message)) = messages.message().await {
                    let Some(input) = each(message) else { continue };
                    if inbox.send(Arrival::Input(input)).await.is_err() {
                        return;
                    }
                }
            };
            let _: Option<()> = ended.run_until_cancelled(pass_on).await;
            // The driver is gone only when there is nobody left to tell.
            let _ = inbox.send(Arrival::Input(gone)).await;
        });
    }
}

async fn post(inbox: &mpsc::Sender<Arrival>, arrival: Arrival) -> Result<(), Status> {
    inbox.send(arrival).await.map_err(|_| status(&Ended::ShuttingDown))
}

/// What an agent proves itself with.
fn agent_identity(metadata: &MetadataMap) -> Result<(AgentId, [u8; 32]), Status> {
    let agent = metadata
        .get("sealci-agent-id")
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| Status::unauthenticated("`sealci-agent-id` must be the agent's id, a UUID"))?;
    let credential = bearer(metadata).and_then(decode_hex).ok_or_else(|| {
        Status::unauthenticated("`authorization` must be `Bearer ` and the credential, 64 hexadecimal digits")
    })?;
    Ok((agent, Sha256::digest(credential).into()))
}

fn bearer(metadata: &MetadataMap) -> Option<&str> {
    let value = metadata.get("authorization")?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
}

fn decode_hex(text: &str) -> Option<[u8; 32]> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes: Option<Vec<u8>> =
        pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    bytes?.try_into().ok()
}

/// Agents' door.
#[derive(Debug, Clone)]
pub(crate) struct AgentDoor(pub Arc<Front>);

#[tonic::async_trait]
impl AgentService for AgentDoor {
    async fn enrol(
        &self,
        request: Request<agent::EnrolRequest>,
    ) -> Result<Response<agent::EnrolResponse>, Status> {
        let front = &self.0;
        let id = EnrolId(front.new_id());
        let (answer, answered) = oneshot::channel();
        let enrol = request.into_inner();
        post(&front.inboxes.agents, Arrival::Enrol(id, answer, Input::Enrol { request: id, enrol })).await?;
        match answered.await {
            Ok(Ok(())) => Ok(Response::new(agent::EnrolResponse {})),
            Ok(Err(refused)) => Err(enrol_status(&refused)),
            Err(_) => Err(status(&Ended::ShuttingDown)),
        }
    }

    type SessionStream = Outgoing<agent::scheduler_message::Body, agent::SchedulerMessage>;

    async fn session(
        &self,
        request: Request<Streaming<agent::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        use agent::agent_message::Body;
        let front = &self.0;
        let (agent, credential_sha256) = agent_identity(request.metadata())?;
        let mut messages = request.into_inner();
        let Some(Body::Hello(hello)) = front.first(&mut messages).await?.body else {
            return Err(Status::invalid_argument("the first message must be `hello`"));
        };
        let session = SessionId(front.new_id());
        let (mailbox, mail) = mailbox(front.config.agent_mailbox);
        let arrived = Input::AgentArrived { session, agent, credential_sha256, hello };
        post(&front.inboxes.agents, Arrival::Agent(session, mailbox, arrived)).await?;
        let (outgoing, ended) =
            Outgoing::admitted(mail, &front.stop, |body| agent::SchedulerMessage { body: Some(body) })
                .await?;
        let each = move |message: agent::AgentMessage| {
            message.body.map(|message| Input::FromAgent { session, message })
        };
        front.read(&front.inboxes.agents, messages, ended, each, Input::AgentGone { session });
        Ok(Response::new(outgoing))
    }
}

/// Controllers' door.
#[derive(Debug, Clone)]
pub(crate) struct ControllerDoor(pub Arc<Front>);

#[tonic::async_trait]
impl SchedulerService for ControllerDoor {
    type ControlStream = Outgoing<scheduler::scheduler_message::Body, scheduler::SchedulerMessage>;

    async fn control(
        &self,
        request: Request<Streaming<scheduler::ControllerMessage>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        use scheduler::controller_message::Body;
        let front = &self.0;
        let given: [u8; 32] = Sha256::digest(bearer(request.metadata()).unwrap_or_default()).into();
        if !bool::from(given.ct_eq(&front.secret_sha256)) {
            return Err(Status::unauthenticated("the cluster's secret is another one"));
        }
        let mut messages = request.into_inner();
        let Some(Body::Hello(hello)) = front.first(&mut messages).await?.body else {
            return Err(Status::invalid_argument("the first message must be `hello`"));
        };
        let controller = ControllerId(front.new_id());
        let (mailbox, mail) = mailbox(front.config.controller_mailbox);
        let arrived = Input::ControllerArrived { controller, hello };
        post(&front.inboxes.controllers, Arrival::Controller(controller, mailbox, arrived)).await?;
        let (outgoing, ended) =
            Outgoing::admitted(mail, &front.stop, |body| scheduler::SchedulerMessage { body: Some(body) })
                .await?;
        let each = move |message: scheduler::ControllerMessage| {
            message.body.map(|message| Input::FromController { controller, message })
        };
        front.read(&front.inboxes.controllers, messages, ended, each, Input::ControllerGone { controller });
        Ok(Response::new(outgoing))
    }
}

/// What is sent to a peer: its mail, and at the end why it ends. Dropping it ends the reading from the peer, too.
pub(crate) struct Outgoing<B, M> {
    first: Option<B>,
    mail: Mail<B>,
    wrap: fn(B) -> M,
    is_over: bool,
    _ended: DropGuard,
}

impl<B, M> Outgoing<B, M> {
    /// Waits for the first message, which means that the peer is admitted.
    async fn admitted(
        mut mail: Mail<B>,
        stop: &CancellationToken,
        wrap: fn(B) -> M,
    ) -> Result<(Self, CancellationToken), Status> {
        let first = tokio::select! {
            biased;
            ended = &mut mail.ended => {
                return Err(status(&ended.unwrap_or(Ended::ShuttingDown)));
            }
            first = mail.messages.recv() => first,
        };
        let ended = stop.child_token();
        let guard = ended.clone().drop_guard();
        Ok((Self { first, mail, wrap, is_over: false, _ended: guard }, ended))
    }
}

impl<B: Unpin, M> Stream for Outgoing<B, M> {
    type Item = Result<M, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok((self.wrap)(first))));
        }
        if let Poll::Ready(ended) = Pin::new(&mut self.mail.ended).poll(cx) {
            self.is_over = true;
            // Without a word: the peer ended the stream itself.
            return Poll::Ready(ended.ok().map(|ended| Err(status(&ended))));
        }
        match self.mail.messages.poll_recv(cx) {
            Poll::Ready(Some(body)) => Poll::Ready(Some(Ok((self.wrap)(body)))),
            // The reason, if any, has come before or will wake this again.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

/// What a peer is told of the end of its stream.
fn status(ended: &Ended) -> Status {
    let text = ended.to_string();
    match ended {
        Ended::Protocol { .. } => Status::failed_precondition(text),
        Ended::Unauthenticated { .. } | Ended::Removed { .. } => Status::unauthenticated(text),
        Ended::Overspent { .. } | Ended::TooManyWaiting { .. } => Status::resource_exhausted(text),
        Ended::Malformed(_) => Status::invalid_argument(text),
        Ended::Replaced => Status::aborted(text),
        Ended::NoDirectory { .. }
        | Ended::Deserted { .. }
        | Ended::Silent { .. }
        | Ended::Unread
        | Ended::ShuttingDown => Status::unavailable(text),
    }
}

fn enrol_status(refused: &EnrolRefused) -> Status {
    let text = refused.to_string();
    match refused {
        EnrolRefused::NoController | EnrolRefused::TimedOut { .. } => Status::unavailable(text),
        EnrolRefused::TooMany { .. } => Status::resource_exhausted(text),
        EnrolRefused::Unauthenticated(_) => Status::unauthenticated(text),
        EnrolRefused::AlreadyExists(_) => Status::already_exists(text),
        EnrolRefused::Invalid(_) => Status::invalid_argument(text),
        EnrolRefused::Other(_) => Status::internal(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_is_read_and_nothing_else() {
        assert_eq!(
            decode_hex(&"0aF".repeat(22)[..64]).map(|bytes| bytes[..3].to_vec()),
            Some(vec![0x0a, 0xf0, 0xaf])
        );
        for text in ["", "00", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(decode_hex(text), None, "{text}");
        }
    }
}
