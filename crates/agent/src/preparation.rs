//! Prepares what an attempt needs before it may begin: its folders, its workspace's content, and the environment it runs in.
//!
//! The workspace is filled and the environment made at the same time, and both while the claim is on its way. Nothing of
//! the action runs here.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, ExecutorKind, Resources, Service};
use sealci_proto::agent::{self, ActionSpec};
use sealci_proto::network_from_wire;
use serde::Deserialize;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::attempt::Orders;
use crate::causes::with_causes;
use crate::entry::Entries;
use crate::environment;
use crate::executor::{ExecutionRequest, Executor, ExecutorError, Neighbourhood, Notes, ShellKind, Standby};
use crate::identity::Identity;
use crate::room::Room;
use crate::services::{ServiceError, Services};
use crate::storage::{Access, HttpSource, KeySource, Luggage, Patience, Storage, StorageError, Wishes};
use crate::workspace::{Checkout, Folders, Source, WorkspaceError};

/// What all attempts of an agent share.
pub struct Means {
    pub identity: Arc<Identity>,
    pub executors: Vec<Arc<dyn Executor>>,
    pub checkout: Arc<dyn Checkout>,
    pub work: PathBuf,
    pub room: Arc<Room>,
    /// For the controller's storage.
    pub http: HttpSource,
    pub storage_patience: Patience,
    /// What runs, for those who may enter it.
    pub entries: Entries,
}

/// What waits for its beginning.
pub struct Ready {
    pub standby: Standby,
    pub executor: ExecutorKind,
    /// None where no files come and go.
    pub luggage: Option<Luggage>,
    /// None where nothing runs beside it.
    pub services: Option<Services>,
}

/// What is to be prepared.
struct Asked<'a> {
    executor: &'a dyn Executor,
    request: ExecutionRequest,
    wishes: Wishes,
    /// What runs the request's services.
    service_executor: &'a dyn Executor,
}

/// How it came out.
pub enum Prepared {
    Ready(Box<Ready>),
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
            Self::Ready(ready) => ready.standby.abandon().await.1,
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
        let asked = match self.read() {
            Ok(asked) => asked,
            Err(failure) => return failed(failure),
        };
        let (executor, request) = (asked.executor, asked.request.clone());
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
            let source = if executor.uses_workspace() { self.source() } else { None };
            let filled = stop.run_until_cancelled(self.fill(source)).await;
            if filled.as_ref().is_some_and(Result::is_err) {
                stop.cancel();
            }
            filled
        };
        let (filled, stood) = tokio::join!(filling, standing);
        match (filled, stood) {
            (Some(Ok(())), Ok(standby)) => self.furnish(standby, asked).await,
            // What came first is what is wrong.
            (Some(Err(failure)), Err(ExecutorError::Stopped)) => failed(failure),
            (_, Err(ExecutorError::Stopped)) => {
                Prepared::Failed { outcome: Outcome::Cancelled, remains: None }
            }
            (_, Err(error)) => failed(error.into()),
            (filled, Ok(standby)) => give_up(standby, filled.and_then(Result::err)).await,
        }
    }

    /// Brings the files that come from elsewhere, and starts what runs beside the action: both need the grant.
    async fn furnish(&self, standby: Standby, asked: Asked<'_>) -> Prepared {
        let executor = asked.executor.kind();
        if asked.wishes.is_empty() && asked.request.services.is_empty() {
            return Prepared::Ready(Box::new(Ready { standby, executor, luggage: None, services: None }));
        }
        match self.stop.run_until_cancelled(self.supply(&standby, asked)).await {
            Some(Ok((luggage, services))) => {
                Prepared::Ready(Box::new(Ready { standby, executor, luggage, services }))
            }
            supplied => give_up(standby, supplied.and_then(Result::err)).await,
        }
    }

    async fn supply(
        &self,
        standby: &Standby,
        asked: Asked<'_>,
    ) -> Result<(Option<Luggage>, Option<Services>), Failure> {
        let Asked { request, wishes, service_executor, .. } = asked;
        let sealed = granted(self.orders.clone(), |orders| orders.sealed_storage.clone()).await;
        let storage = match self.storage(&sealed).await {
            Ok(storage) => Some(storage),
            Err(failure) if !wishes.is_empty() => return Err(Failure::storage(failure)),
            Err(failure) => {
                self.notes.say(format_args!("what services say will not be kept: {failure}"));
                None
            }
        };
        let folder = self.folders.archives().await?;
        let luggage = storage.map(|storage| Luggage::new(wishes, storage, folder, self.notes.clone()));
        let bringing = self.bring(standby, luggage);
        if request.services.is_empty() {
            return Ok((bringing.await?, None));
        }
        let scratch = self.folders.scratch();
        let starting = async {
            let started = Services::start(service_executor, &request, &scratch).await;
            started.map_err(Failure::from)
        };
        let (luggage, services) = tokio::try_join!(bringing, starting)?;
        Ok((luggage, Some(services)))
    }

    async fn bring(&self, standby: &Standby, luggage: Option<Luggage>) -> Result<Option<Luggage>, Failure> {
        let Some(mut luggage) = luggage else { return Ok(None) };
        let source = self.source().cloned().unwrap_or_default();
        let keys =
            KeySource { workspace: self.folders.workspace(), r#ref: source.r#ref, revision: source.revision };
        luggage.bring(&standby.door(), keys).await.map_err(|error| Failure::from(error.into_outcome()))?;
        Ok(Some(luggage))
    }

    /// The error is for a person.
    async fn storage(&self, sealed: &[u8]) -> Result<Storage, String> {
        let access = self.storage_access(sealed)?;
        let message = |error: StorageError| error.message();
        let http = self.means.http.client(&access.url).await.map_err(message)?;
        Storage::new(http, &access, self.attempt, self.means.storage_patience).map_err(message)
    }

    /// The error is for a person, and repeats nothing of what was sealed.
    fn storage_access(&self, sealed: &[u8]) -> Result<Access, String> {
        if sealed.is_empty() {
            return Err("the controller gives this attempt no storage".to_owned());
        }
        let opened = self.means.identity.open(sealed).map_err(|error| {
            format!("the way to the storage cannot be opened: {error}; if this agent was set up anew, enrol it anew as well")
        })?;
        match serde_json::from_slice(&opened) {
            Ok(SealedStorage::Access(access)) => Ok(access),
            Ok(SealedStorage::Refused { refused }) => Err(refused),
            Err(_) => Err("the way to the storage is of no known form".to_owned()),
        }
    }

    fn source(&self) -> Option<&agent::Source> {
        self.spec.and_then(|spec| spec.source.as_ref())
    }

    /// Who shall run what, which files come and go, and what runs beside it.
    fn read(&self) -> Result<Asked<'_>, Failure> {
        let spec = self.spec.ok_or_else(|| {
            let text =
                "what to do cannot be read; the controller and this agent may be of different releases";
            Failure::unsupported(text.into())
        })?;
        let executor = self.means.executor(&spec.executor)?;
        if spec.source.is_none() {
            return Err(Failure::unsupported("the action has no source".into()));
        }
        let wishes = Wishes::read(spec).map_err(|error| Failure::unsupported(error.to_string()))?;
        if !wishes.is_empty() && !executor.uses_workspace() {
            let kind = executor.kind().as_str();
            let text = format!(
                "the executor `{kind}` has no files; leave out caches, artifacts, `uses` and reports"
            );
            return Err(Failure::unsupported(text));
        }
        let services = spec.services.iter().map(Service::try_from).collect::<Result<Vec<_>, _>>();
        let services = services.map_err(|error| Failure::unsupported(error.to_string()))?;
        let service_executor =
            if services.is_empty() { executor } else { self.means.service_executor(executor.kind())? };
        let stays = wishes.keeps_anything() || !services.is_empty();
        let neighbourhood = (!services.is_empty()).then(Neighbourhood::default);
        let names = services.iter().map(|service| service.name.clone()).collect();
        let request = ExecutionRequest { stays, neighbourhood, services, names, ..self.request(spec)? };
        Ok(Asked { executor, request, wishes, service_executor })
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
        let network = network_from_wire(spec).map_err(|error| Failure::unsupported(error.to_string()))?;
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
            network,
            neighbourhood: None,
            service: None,
            services: Vec::new(),
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
            granted(self.orders.clone(), |orders| orders.sealed_credentials.clone()).await
        } else {
            Vec::new()
        };
        let source = Source::read(source, &sealed_credentials, &self.means.identity)?;
        Ok(self.means.checkout.prepare(&source, &self.folders.workspace()).await?)
    }
}

/// What came with the grant; waits for it.
async fn granted(mut orders: watch::Receiver<Orders>, sealed: fn(&Orders) -> Vec<u8>) -> Vec<u8> {
    loop {
        {
            let orders = orders.borrow_and_update();
            if orders.granted.is_some() {
                return sealed(&orders);
            }
        }
        changed(&mut orders).await;
    }
}

/// Takes down what stands, because of a failure, or because it is not wanted any more.
async fn give_up(standby: Standby, failure: Option<Failure>) -> Prepared {
    let (ended, remains) = standby.abandon().await;
    let outcome = match (ended, failure) {
        (_, None) => Outcome::Cancelled,
        // That is what was wrong: the failure is of something that needed it.
        (ended @ Outcome::Errored { .. }, Some(_)) => ended,
        (_, Some(failure)) => failure.into_outcome(),
    };
    Prepared::Failed { outcome, remains }
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

impl Means {
    /// What runs services beside an action of this executor.
    fn service_executor(&self, kind: ExecutorKind) -> Result<&dyn Executor, Failure> {
        let wanted = match kind {
            ExecutorKind::Sandbox | ExecutorKind::Container => ExecutorKind::Container,
            other => other,
        };
        let found = self.executors.iter().find(|executor| executor.kind() == wanted);
        found.map(AsRef::as_ref).ok_or_else(|| {
            let text = "this agent runs no images, and so no services beside an action; `sealci doctor` says what it lacks";
            Failure::unsupported(text.to_owned())
        })
    }
}

/// What comes sealed with a grant about the storage.
#[derive(Deserialize)]
#[serde(untagged)]
enum SealedStorage {
    Access(Access),
    /// For a person.
    Refused {
        refused: String,
    },
}

/// Why an attempt ends as errored.
struct Failure(Outcome);

impl Failure {
    fn of(cause: Cause, message: String) -> Self {
        Self(Outcome::Errored { cause, message })
    }

    fn unsupported(message: String) -> Self {
        Self::of(Cause::Unsupported, message)
    }

    fn storage(message: String) -> Self {
        Self::of(Cause::Storage, message)
    }

    fn into_outcome(self) -> Outcome {
        self.0
    }
}

impl From<Outcome> for Failure {
    fn from(outcome: Outcome) -> Self {
        Self(outcome)
    }
}

impl From<ServiceError> for Failure {
    fn from(error: ServiceError) -> Self {
        let message = with_causes(&error);
        match error {
            ServiceError::Start { source, .. } => Self::of(source.cause(), message),
            ServiceError::Ended { .. } | ServiceError::NotReady { .. } => Self::of(Cause::Service, message),
        }
    }
}

impl From<WorkspaceError> for Failure {
    fn from(error: WorkspaceError) -> Self {
        Self::of(error.cause(), error.to_string())
    }
}

impl From<ExecutorError> for Failure {
    fn from(error: ExecutorError) -> Self {
        Self::of(error.cause(), error.message())
    }
}

/// Waits until the orders change. Their owner being gone is no order: it takes this task with it.
pub async fn changed(orders: &mut watch::Receiver<Orders>) {
    if orders.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
