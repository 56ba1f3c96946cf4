//! Keeps the agent in touch with a scheduler: connects, speaks, listens, and begins again when the line breaks.
//!
//! ```text
//!   connect ──▶ Hello, Held ──▶ Welcome ──▶ speak and listen ──broken──▶ wait a little ──▶ connect
//! ```
//!
//! A broken stream ends nothing: what runs goes on, what it says is spooled and told on the next stream. Only the
//! drain's end and a stop end the session (I7).

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng;
use sealci_proto::agent::{AgentMessage, SchedulerMessage};
use secrecy::SecretString;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming};

use crate::agent::Agent;
use crate::backoff::Backoff;
use crate::connect::{ConnectError, Schedulers};
use crate::identity::Identity;
use crate::stream::{Rhythm, Stream};

/// Messages that are given to the transport and not yet written. With the largest log message this bounds memory.
const OUTBOUND_MESSAGES: usize = 8;

/// So many refusals that differ are said.
const MOST_REFUSALS_TOLD: usize = 64;

/// How the agent is told to end.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Take nothing new, finish what runs however long it takes, deliver everything, leave.
    pub drain: CancellationToken,
    /// Leave now. What runs is killed; what is not delivered stays in the spool.
    pub stop: CancellationToken,
}

/// When the session does what.
#[derive(Debug, Clone, Copy)]
pub struct SessionTimes {
    pub rhythm: Rhythm,
    /// How often time-driven things are looked at.
    pub tick: Duration,
    pub backoff_shortest: Duration,
    pub backoff_longest: Duration,
    /// Between tries while the scheduler does not know this agent.
    pub backoff_refused: Duration,
    /// So long a scheduler may take to admit the agent while there are others to try.
    pub admission: Duration,
}

/// The session with whichever scheduler answers.
pub struct Session {
    pub schedulers: Schedulers,
    pub identity: Arc<Identity>,
    pub name: String,
    pub enrolment_token: Option<SecretString>,
    pub version: String,
    pub times: SessionTimes,
    pub shutdown: Shutdown,
}

/// Why a stream is over.
enum Over {
    /// Everything is done and delivered, and the agent was told to leave.
    Drained,
    Stopped,
    Broken {
        why: String,
        was_welcomed: bool,
    },
}

/// What schedulers refused since one of them last welcomed the agent.
#[derive(Default)]
struct Refusals {
    in_a_row: usize,
    told: BTreeSet<String>,
}

impl Refusals {
    /// Whether it was not said before. The same words every half minute would only hide others.
    fn is_news(&mut self, error: &ConnectError) -> bool {
        self.told.len() < MOST_REFUSALS_TOLD && self.told.insert(error.to_string())
    }
}

impl Session {
    /// Goes on until the agent has drained or is stopped.
    pub async fn run(mut self, agent: &mut Agent) {
        let mut backoff = Backoff::new(self.times.backoff_shortest, self.times.backoff_longest);
        let mut refusals = Refusals::default();
        loop {
            agent.join_ended();
            agent.draining |= self.shutdown.drain.is_cancelled();
            if agent.draining && agent.is_done() {
                return;
            }
            let mut wait = None;
            match self.stream(agent).await {
                Ok(Over::Drained | Over::Stopped) => return,
                Ok(Over::Broken { why, was_welcomed }) => {
                    tracing::warn!(why, "the stream to the scheduler broke");
                    if was_welcomed {
                        backoff.reset();
                        refusals = Refusals::default();
                    }
                }
                Err(error) if error.is_final_for_now() => {
                    if refusals.is_news(&error) {
                        tracing::warn!(%error, "refused by a scheduler; asking again now and then");
                    }
                    self.refused(&error, &mut refusals).await;
                    // Another one may take it: a release, or an installation, further on.
                    if refusals.in_a_row >= self.schedulers.count() {
                        wait = Some(self.times.backoff_refused.mul_f64(rand::rng().random_range(0.5..1.0)));
                    }
                }
                Err(error) => {
                    refusals.in_a_row = 0;
                    tracing::warn!(%error, "no session with a scheduler");
                }
            }
            self.schedulers.try_next();
            let wait = wait.unwrap_or_else(|| backoff.wait(rand::rng().random()));
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.shutdown.stop.cancelled() => return,
                () = self.shutdown.drain.cancelled(), if !agent.draining => {}
            }
        }
    }

    /// The installation does not know this agent (any more). With a token it can be made known again.
    async fn refused(&mut self, error: &ConnectError, refusals: &mut Refusals) {
        refusals.in_a_row += 1;
        if error.code() != Some(Code::Unauthenticated) {
            return;
        }
        let Some(token) = &self.enrolment_token else {
            if refusals.in_a_row == 1 {
                tracing::error!(
                    agent.id = %self.identity.agent,
                    "this agent is not known to the installation, or was removed from it; to add it again, start it once with an enrolment token"
                );
            }
            return;
        };
        let enrolling = self.schedulers.enrol(&self.identity, &self.name, token);
        tokio::select! {
            enrolled = enrolling => match enrolled {
                Ok(()) => tracing::info!(agent.id = %self.identity.agent, "enrolled again"),
                Err(error) => tracing::error!(
                    agent.id = %self.identity.agent,
                    %error,
                    "the installation does not know this agent, and its enrolment token is not taken"
                ),
            },
            () = self.shutdown.stop.cancelled() => {}
        }
    }

    /// Opens one stream and keeps to it until it is over.
    async fn stream(&mut self, agent: &mut Agent) -> Result<Over, ConnectError> {
        let (stream, first) = Stream::open(agent, self.times.rhythm, &self.version, Instant::now());
        let (outbound, receiver) = mpsc::channel(OUTBOUND_MESSAGES);
        // They are there before the request is made, and the channel has room for more than these two.
        for message in first {
            let _ = outbound.try_send(message);
        }
        let are_several = self.schedulers.are_several();
        let opening = self.schedulers.session(&self.identity, receiver);
        let (inbound, url) = tokio::select! {
            opened = opening => opened?,
            () = self.shutdown.stop.cancelled() => return Ok(Over::Stopped),
            () = drained(&self.shutdown, agent) => return Ok(Over::Drained),
            () = tokio::time::sleep(self.times.admission), if are_several => {
                let why = "it is connected to no controller that knows this agent".into();
                return Ok(Over::Broken { why, was_welcomed: false });
            }
        };
        tracing::info!(scheduler.url = url, "connected to a scheduler");
        self.converse(agent, stream, outbound, inbound, url).await
    }

    async fn converse(
        &self,
        agent: &mut Agent,
        mut stream: Stream,
        outbound: mpsc::Sender<AgentMessage>,
        mut inbound: Streaming<SchedulerMessage>,
        url: String,
    ) -> Result<Over, ConnectError> {
        let doorbell = agent.spool.doorbell().clone();
        let mut tick = tokio::time::interval(self.times.tick);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut next = None;
        for id in agent.ids() {
            stream.noticed(agent, id, Instant::now());
        }
        loop {
            if agent.draining && agent.is_done() {
                return Ok(Over::Drained);
            }
            next = next.or_else(|| stream.next_message(agent, Instant::now()));
            tokio::select! {
                permit = outbound.reserve(), if next.is_some() => match (permit, next.take()) {
                    (Ok(permit), Some(message)) => permit.send(message),
                    // The transport has gone; the inbound side says why.
                    _ => return self.broken(&mut inbound, url, &stream).await,
                },
                message = inbound.message() => match message {
                    Ok(Some(message)) => {
                        if let Err(error) = stream.heard(agent, message, Instant::now()) {
                            tracing::warn!(%error, "a message of the scheduler cannot be understood");
                        }
                    }
                    ended => return over(ended, url, &stream),
                },
                rung = doorbell.answered() => {
                    for id in rung {
                        stream.noticed(agent, id, Instant::now());
                    }
                }
                Some(joined) = agent.tasks.join_next_with_id() => {
                    if let Some(id) = agent.joined(joined) {
                        stream.noticed(agent, id, Instant::now());
                    }
                }
                Some(_) = agent.removals.join_next() => {}
                () = stream.read() => {}
                _ = tick.tick() => stream.ticked(agent, Instant::now()),
                () = self.shutdown.drain.cancelled(), if !agent.draining => {
                    tracing::info!("draining: nothing new is taken, what runs is finished");
                    agent.draining = true;
                }
                () = self.shutdown.stop.cancelled() => return Ok(Over::Stopped),
            }
        }
    }

    async fn broken(
        &self,
        inbound: &mut Streaming<SchedulerMessage>,
        url: String,
        stream: &Stream,
    ) -> Result<Over, ConnectError> {
        let ended = tokio::time::timeout(self.times.tick, inbound.message()).await;
        over(ended.unwrap_or(Ok(None)), url, stream)
    }
}

fn over(
    ended: Result<Option<SchedulerMessage>, tonic::Status>,
    url: String,
    stream: &Stream,
) -> Result<Over, ConnectError> {
    let was_welcomed = stream.is_welcomed();
    match ended {
        Err(status) if !was_welcomed => Err(ConnectError::Refused { url, status: Box::new(status) }),
        Err(status) => Ok(Over::Broken { why: status.to_string(), was_welcomed }),
        Ok(_) => Ok(Over::Broken { why: "the scheduler ended it".into(), was_welcomed }),
    }
}

/// Waits until the agent is to leave and owes nothing. What it owes only changes on a stream.
async fn drained(shutdown: &Shutdown, agent: &Agent) {
    shutdown.drain.cancelled().await;
    if !agent.is_done() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: Code, message: &str) -> ConnectError {
        ConnectError::Refused {
            url: "http://one".into(),
            status: Box::new(tonic::Status::new(code, message)),
        }
    }

    #[test]
    fn a_refusal_is_said_once() {
        let mut refusals = Refusals::default();
        let versions = refused(Code::FailedPrecondition, "you speak version 1, this scheduler speaks 3 to 4");
        assert!(versions.is_final_for_now());
        assert!(refusals.is_news(&versions));
        assert!((0..1000).all(|_| !refusals.is_news(&versions)));
        assert!(refusals.is_news(&refused(Code::Unauthenticated, "unknown")), "another one is said");
    }
}
