//! Prepares what an attempt needs before it may begin: its folders, its workspace's content, and the environment it runs in.
//!
//! The workspace is filled and the environment made at the same time, and both while the claim is on its way. Nothing of
//! the action runs here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, ExecutorKind, Network, Resources};
use sealci_proto::agent::{self, ActionSpec};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::attempt::Orders;
use crate::environment;
use crate::executor::{ExecutionRequest, Executor, ExecutorError, Notes, ShellKind, Standby};
use crate::identity::Identity;
use crate::room::Room;
use crate::workspace::{Checkout, Folders, Source, WorkspaceError};

/// What all attempts of an agent share.
pub struct Means {
    pub identity: Arc<Identity>,
    pub executors: Vec<Arc<dyn Executor>>,
    pub checkout: Arc<dyn Checkout>,
    pub work: PathBuf,
    pub room: Arc<Room>,
}

/// How it came out.
pub enum Prepared {
    Ready(Standby, ExecutorKind),
    /// Nothing of it is left, but what remains.
    Failed {
        outcome: Outcome,
        remains: Option<String>,
    },
}

impl Prepared {
    /// Takes it down; returns what could not be taken down.
    pub async fn abandon(self) -> Option<String> {
        match self {
            Self::Ready(standby, _) => standby.abandon().await,
            Self::Failed { remains, .. } => remains,
        }
    }
}

/// One attempt's preparation.
pub struct Preparation<'a> {
    pub attempt: AttemptId,
    /// None: it could not be read.
    pub spec: Option<&'a ActionSpec>,
    pub means: &'a Means,
    pub folders: &'a Folders,
    pub orders: watch::Receiver<Orders>,
    /// Takes what there is to say meanwhile.
    pub notes: Notes,
    /// Ends it early, and properly.
    pub stop: CancellationToken,
}

impl Preparation<'_> {
    /// Prepares. To end it early, cancel `stop` and go on waiting: dropping the future leaves the taking down to the
    /// executor.
    pub async fn run(self) -> Prepared {
        let failed = |failure: Failure| Prepared::Failed { outcome: failure.into_outcome(), remains: None };
        let (executor, request, source) = match self.read() {
            Ok(read) => read,
            Err(failure) => return failed(failure),
        };
        if let Err(error) = self.folders.make().await {
            return failed(error.into());
        }
        let stop = self.stop.clone();
        let standing = async {
            let stood = executor.prepare(request).await;
            if stood.is_err() {
                stop.cancel();
            }
            stood
        };
        let filling = async {
            let source = executor.uses_workspace().then_some(source);
            let filled = stop.run_until_cancelled(self.fill(source)).await;
            if filled.as_ref().is_some_and(Result::is_err) {
                stop.cancel();
            }
            filled
        };
        let (filled, stood) = tokio::join!(filling, standing);
        match (filled, stood) {
            (Some(Ok(())), Ok(standby)) => Prepared::Ready(standby, executor.kind()),
            // What came first is what is wrong.
            (Some(Err(failure)), Err(ExecutorError::Stopped)) => failed(failure),
            (_, Err(ExecutorError::Stopped)) => {
                Prepared::Failed { outcome: Outcome::Cancelled, remains: None }
            }
            (_, Err(error)) => failed(error.into()),
            (filled, Ok(standby)) => {
                let remains = standby.abandon().await;
                let outcome = match filled {
                    Some(Err(failure)) => failure.into_outcome(),
                    _ => Outcome::Cancelled,
                };
                Prepared::Failed { outcome, remains }
            }
        }
    }

    /// Who shall run what, on which source.
    fn read(&self) -> Result<(&dyn Executor, ExecutionRequest, &agent::Source), Failure> {
        let spec = self.spec.ok_or_else(|| {
            let text =
                "what to do cannot be read; the controller and this agent may be of different releases";
            Failure::unsupported(text.into())
        })?;
        let executor = self.means.executor(&spec.executor)?;
        let source =
            spec.source.as_ref().ok_or_else(|| Failure::unsupported("the action has no source".into()))?;
        let has_files = !spec.caches.is_empty() || !spec.uses.is_empty() || !spec.junit.is_empty();
        if has_files || spec.artifacts.is_some() || !spec.services.is_empty() {
            let text = "this agent's release has no services, caches, artifacts and reports; leave them out of the action";
            return Err(Failure::unsupported(text.into()));
        }
        Ok((executor, self.request(spec)?, source))
    }

    /// What the executor is asked to do.
    fn request(&self, spec: &ActionSpec) -> Result<ExecutionRequest, Failure> {
        let shell = match spec.shell.as_str() {
            "" => ShellKind::default(),
            name => ShellKind::parse(name)
                .ok_or_else(|| Failure::unsupported(format!("this agent knows no shell `{name}`")))?,
        };
        if spec.commands.is_empty() {
            return Err(Failure::unsupported("the action has no commands".into()));
        }
        let container = spec.container.as_ref().map(Container::try_from).transpose();
        let container = container.map_err(|error| Failure::unsupported(error.to_string()))?;
        Ok(ExecutionRequest {
            attempt: self.attempt,
            commands: spec.commands.clone(),
            shell,
            env: environment::variables(spec),
            workspace: self.folders.workspace(),
            scratch: self.folders.scratch(),
            container,
            notes: self.notes.clone(),
            stop: self.stop.clone(),
            resources: spec.resources.map_or(Resources::DEFAULT, Resources::from),
            network: Network::from(spec.network()),
            neighbourhood: None,
            names: Vec::new(),
            timeout: Duration::from_millis(spec.timeout_ms),
            grace: Duration::from_millis(spec.grace_ms),
            stays: false,
        })
    }

    /// Fills the workspace; from a private repository once the grant has brought what opens it.
    async fn fill(&self, source: Option<&agent::Source>) -> Result<(), Failure> {
        let Some(source) = source else { return Ok(()) };
        let sealed_credentials = if source.needs_credentials {
            granted_credentials(self.orders.clone()).await
        } else {
            Vec::new()
        };
        let source = Source::read(source, &sealed_credentials, &self.means.identity)?;
        Ok(self.means.checkout.prepare(&source, &self.folders.workspace()).await?)
    }
}

async fn granted_credentials(mut orders: watch::Receiver<Orders>) -> Vec<u8> {
    loop {
        {
            let orders = orders.borrow_and_update();
            if orders.granted.is_some() {
                return orders.sealed_credentials.clone();
            }
        }
        changed(&mut orders).await;
    }
}

impl Means {
    /// The executor with this name; the first for none.
    fn executor(&self, name: &str) -> Result<&dyn Executor, Failure> {
        let found = match name {
            "" => self.executors.first(),
            name => self.executors.iter().find(|executor| Some(executor.kind()) == ExecutorKind::parse(name)),
        };
        found.map(AsRef::as_ref).ok_or_else(|| {
            let offered: Vec<_> = self.executors.iter().map(|executor| executor.kind().as_str()).collect();
            Failure::unsupported(format!(
                "this agent has no executor `{name}` (it offers {}); name another one, or have it allowed in the agent's configuration",
                offered.join(", ")
            ))
        })
    }
}

/// Why an attempt ends as errored.
struct Failure {
    cause: Cause,
    message: String,
}

impl Failure {
    fn unsupported(message: String) -> Self {
        Self { cause: Cause::Unsupported, message }
    }

    fn into_outcome(self) -> Outcome {
        Outcome::Errored { cause: self.cause, message: self.message }
    }
}

impl From<WorkspaceError> for Failure {
    fn from(error: WorkspaceError) -> Self {
        Self { cause: error.cause(), message: error.to_string() }
    }
}

impl From<ExecutorError> for Failure {
    fn from(error: ExecutorError) -> Self {
        Self { cause: error.cause(), message: error.message() }
    }
}

/// Waits until the orders change. Their owner being gone is no order: it takes this task with it.
pub async fn changed(orders: &mut watch::Receiver<Orders>) {
    if orders.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
