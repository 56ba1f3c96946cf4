//! Drives the pipelines: one task takes every input in turn, lets the core decide, commits, and only then answers.
//!
//! ```text
//!   REST ───┐                                            ┌──▶ answers (REST, claims, acknowledgements)
//!   links ──┼──▶ inbox ──▶ decide (core) ──▶ commit ─────┼──▶ wants to the schedulers
//!   ticks ──┘      many inputs, one commit (group commit)└──▶ wake-ups for those who follow
//! ```
//!
//! Invariants: nothing is answered before it is durable; a failed commit leaves no trace in memory (what it touched is
//! read again from the database); the driver never waits for a peer.

mod agents;
mod closing;
mod commit;
mod driver;
mod leases;
mod lines;
mod link;
mod live;
mod places;
mod presence;
mod reports;
mod sealing;
mod wants;
mod why;
mod wishes;

use std::time::Duration;

use sealci_core::event::{EventKind, RefName, Revision};
use sealci_core::ids::{ActionId, AgentId, PipelineId, ReplicaId};
use sealci_core::pipeline::{RerunRefusal, RerunScope};
use sealci_core::plan::Plan;
use sealci_service::problem::chain;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

pub use driver::{Config, Driver};
pub use link::{LinkConfig, keep_links};
pub use wants::ActionLimits;

use crate::store::entity::agents as agent_rows;
use crate::store::{News, Store};
use lines::LineId;
use link::FromLink;

/// The inbox holds so many inputs; who sends more waits.
const INBOX: usize = 4096;

/// A pipeline to be made.
#[derive(Debug, Clone)]
pub struct NewPipeline {
    /// What makes two creates the same (I4).
    pub identity: String,
    pub repository: String,
    pub repository_url: String,
    pub event: EventKind,
    pub r#ref: Option<RefName>,
    pub revision: Revision,
    pub manifest_path: Option<String>,
    pub manifest: String,
    pub plan: Plan,
}

/// Whether a pipeline was made, or stood already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    Now(PipelineId),
    Before(PipelineId),
}

/// Why a wish was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    #[error("there is no such pipeline")]
    UnknownPipeline,
    #[error("there is no such action")]
    UnknownAction,
    #[error("there is no such agent")]
    UnknownAgent,
    #[error(transparent)]
    Rerun(#[from] RerunRefusal),
    /// Nothing has changed; the same request may succeed later.
    #[error("it could not be recorded: the database refused the write. Try again")]
    NotRecorded,
    #[error("the controller is shutting down")]
    ShuttingDown,
}

/// An agent as it is known now.
#[derive(Debug, Clone)]
pub struct AgentView {
    pub row: agent_rows::Model,
    /// What the scheduler said of it last; none if it was never there since this process started.
    pub state: Option<sealci_proto::scheduler::AgentState>,
}

type Answer<T> = oneshot::Sender<Result<T, Refusal>>;

/// What the driver is told.
#[derive(Debug)]
enum Input {
    Create(Box<NewPipeline>, Answer<Created>),
    Cancel(PipelineId, Answer<PipelineId>),
    Rerun {
        id: PipelineId,
        scope: RerunScope,
        request: String,
        answer: Answer<PipelineId>,
    },
    Why(ActionId, Answer<Vec<String>>),
    Agents(Answer<Vec<AgentView>>),
    Drain {
        agent: AgentId,
        drained: bool,
        answer: Answer<AgentView>,
    },
    /// Other replicas have changed something.
    Heard(Vec<News>),
    Link(LineId, FromLink),
}

/// What tells the driver of wishes: cheap to clone.
#[derive(Debug, Clone)]
pub struct Dispatch {
    inbox: mpsc::Sender<Input>,
    /// Whether a scheduler is connected.
    linked: tokio::sync::watch::Receiver<bool>,
}

impl Dispatch {
    /// Makes a pipeline, or finds the one that this event made before.
    pub async fn create(&self, new: NewPipeline) -> Result<Created, Refusal> {
        self.ask(|answer| Input::Create(Box::new(new), answer)).await
    }

    /// Wishes a pipeline's round ended.
    pub async fn cancel(&self, id: PipelineId) -> Result<PipelineId, Refusal> {
        self.ask(|answer| Input::Cancel(id, answer)).await
    }

    /// Opens the next round; a repeated request id answers like the first.
    pub async fn rerun(
        &self,
        id: PipelineId,
        scope: RerunScope,
        request: String,
    ) -> Result<PipelineId, Refusal> {
        self.ask(|answer| Input::Rerun { id, scope, request, answer }).await
    }

    /// Why is an action where it is? The reasons, never empty.
    pub async fn why(&self, action: ActionId) -> Result<Vec<String>, Refusal> {
        self.ask(|answer| Input::Why(action, answer)).await
    }

    /// All agents, by name.
    pub async fn agents(&self) -> Result<Vec<AgentView>, Refusal> {
        self.ask(Input::Agents).await
    }

    /// Gives an agent no new work, or gives it work again.
    pub async fn drain(&self, agent: AgentId, drained: bool) -> Result<AgentView, Refusal> {
        self.ask(|answer| Input::Drain { agent, drained, answer }).await
    }

    /// Whether a scheduler is connected.
    pub fn is_linked(&self) -> bool {
        *self.linked.borrow()
    }

    /// Waits until a scheduler is connected.
    pub async fn linked(&self) -> Result<(), Refusal> {
        self.linked.clone().wait_for(|linked| *linked).await.map_err(|_| Refusal::ShuttingDown).map(drop)
    }

    async fn ask<T>(&self, input: impl FnOnce(Answer<T>) -> Input) -> Result<T, Refusal> {
        let (answer, answered) = oneshot::channel();
        self.inbox.send(input(answer)).await.map_err(|_| Refusal::ShuttingDown)?;
        answered.await.map_err(|_| Refusal::ShuttingDown)?
    }
}

/// Passes on what other replicas tell, until told to stop. What is lost with a connection is found without it, later.
pub async fn keep_listening(store: Store, replica: ReplicaId, dispatch: Dispatch, stop: CancellationToken) {
    if !store.is_shared() {
        return stop.cancelled().await;
    }
    let listening = async {
        loop {
            match store.listen(replica).await {
                Ok(mut listener) => {
                    while let Some(news) = listener.next().await {
                        if !news.is_empty() && dispatch.inbox.send(Input::Heard(news)).await.is_err() {
                            return;
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "other replicas are not heard; trying again")
                }
            }
            tokio::time::sleep(LISTEN_AGAIN.mul_f64(rand::random_range(0.5..1.0))).await;
        }
    };
    let _: Option<()> = stop.run_until_cancelled(listening).await;
}

/// After a connection that heard other replicas is lost.
const LISTEN_AGAIN: Duration = Duration::from_secs(2);

/// How often silence is looked for.
const TICK: Duration = Duration::from_secs(1);
