//! Drives one held attempt from its claim to its end; everything it learns goes to the spool, nothing to the network.
//!
//! ```text
//!   prepare the workspace ─┐
//!   wait for the grant ────┴─▶ spool the token ─▶ start ─▶ events and output ─▶ terminal event ─▶ clean up
//! ```
//!
//! - No command starts before the grant is spooled.
//! - An attempt that is forgotten reports nothing; one that was granted ends with exactly one terminal event.
//! - The task ends when nothing of the action lives any more and its folders are gone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{ExecutorKind, Network, Resources};
use sealci_proto::agent::{self, ActionSpec, event};
use tokio::sync::watch;

use crate::environment;
use crate::executor::{Execution, ExecutionEvent, ExecutionRequest, Executor, ShellKind};
use crate::identity::{Identity, unix_ms};
use crate::room::{Occupancy, Room, Stop};
use crate::spool::{AttemptSpool, SpoolError};
use crate::workspace::{Checkout, Folders, Source, WorkspaceError};

/// What the session wants of an attempt. It is only ever added to.
#[derive(Debug, Clone, Default)]
pub struct Orders {
    /// The fencing token.
    pub granted: Option<u64>,
    /// What came with the grant, sealed to the agent's key.
    pub sealed_credentials: Vec<u8>,
    /// End it properly, with so much time between TERM and KILL.
    pub cancel: Option<Duration>,
    /// It lost its action: end it at once, deliver what it told.
    pub kill: bool,
    /// End it at once, deliver nothing.
    pub forget: bool,
}

impl Orders {
    fn ends(&self) -> bool {
        self.cancel.is_some() || self.kill || self.forget
    }
}

/// How an attempt's task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// With a terminal event in the spool.
    Told,
    /// Nothing is to be told of it.
    Forgotten,
    /// Like `Told`, but something of the action could not be taken down; what it reserved is not free.
    Remains(String),
}

/// What all attempts of an agent share.
pub struct Means {
    pub identity: Arc<Identity>,
    pub executors: Vec<Arc<dyn Executor>>,
    pub checkout: Arc<dyn Checkout>,
    pub work: PathBuf,
    pub room: Arc<Room>,
}

impl Means {
    /// The executor with this name; the first for none.
    fn executor(&self, name: &str) -> Result<&Arc<dyn Executor>, Failure> {
        let found = match name {
            "" => self.executors.first(),
            name => self.executors.iter().find(|executor| Some(executor.kind()) == ExecutorKind::parse(name)),
        };
        found.ok_or_else(|| {
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

/// One attempt on its way.
pub struct AttemptTask {
    pub spool: Arc<AttemptSpool>,
    /// None: it could not be read.
    pub spec: Option<ActionSpec>,
    pub orders: watch::Receiver<Orders>,
    pub means: Arc<Means>,
}

/// How the part that tells something ended.
enum Told {
    Outcome { outcome: Outcome, remains: Option<String> },
    Nothing,
}

impl Told {
    fn outcome(outcome: Outcome) -> Self {
        Self::Outcome { outcome, remains: None }
    }
}

impl AttemptTask {
    /// Runs the attempt to its end. Dropping the future kills the action.
    pub async fn run(mut self) -> Ended {
        let folders = Folders::of(&self.means.work, self.spool.id());
        // Until the folders are gone.
        let mut place = self.means.room.enter(self.spool.id(), folders.root());
        let told = self.perform(&folders, &mut place).await;
        let ended = match told {
            Told::Nothing => Ended::Forgotten,
            Told::Outcome { outcome, remains } => {
                tracing::info!(attempt.id = %self.spool.id(), outcome = outcome.kind(), "attempt finished");
                self.spool.finish(&outcome, unix_ms());
                remains.map_or(Ended::Told, Ended::Remains)
            }
        };
        folders.remove().await;
        ended
    }

    async fn perform(&mut self, folders: &Folders, place: &mut Occupancy) -> Told {
        let prepared = match self.prepare_and_claim(folders).await {
            Ok(prepared) => prepared,
            Err(told) => return told,
        };
        let request = match prepared.and_then(|()| self.request(folders)) {
            Ok(request) => request,
            Err(failure) => return Told::outcome(failure.into_outcome()),
        };
        self.execute(request, place).await
    }

    /// Prepares the workspace while the claim is on its way; comes back when both are done, or as soon as the attempt is
    /// to end.
    async fn prepare_and_claim(&mut self, folders: &Folders) -> Result<Result<(), Failure>, Told> {
        let (means, spec) = (self.means.clone(), self.spec.clone());
        let preparing = prepare(&means, spec.as_ref(), folders, self.orders.clone());
        tokio::pin!(preparing);
        let mut prepared = None;
        let mut granted = false;
        loop {
            let orders = self.orders.borrow_and_update().clone();
            if orders.forget || (orders.ends() && orders.granted.is_none()) {
                return Err(Told::Nothing);
            }
            if let Some(token) = orders.granted.filter(|_| !granted) {
                // Without the token on disk nothing may start; unreported, the attempt counts as lost and runs again.
                if let Err(error) = self.spool.grant(token) {
                    tracing::error!(attempt.id = %self.spool.id(), %error, "cannot start the attempt");
                    return Err(Told::Nothing);
                }
                granted = true;
            }
            if orders.ends() {
                return Err(Told::outcome(Outcome::Cancelled));
            }
            match prepared.take() {
                Some(result) if granted => return Ok(result),
                result => prepared = result,
            }
            tokio::select! {
                result = &mut preparing, if prepared.is_none() => prepared = Some(result),
                () = changed(&mut self.orders) => {}
            }
        }
    }

    /// What the executor is asked to do.
    fn request(&self, folders: &Folders) -> Result<ExecutionRequest, Failure> {
        let spec = self.spec.as_ref().ok_or_else(unreadable)?;
        let shell = match spec.shell.as_str() {
            "" => ShellKind::default(),
            name => ShellKind::parse(name)
                .ok_or_else(|| Failure::unsupported(format!("this agent knows no shell `{name}`")))?,
        };
        if spec.commands.is_empty() {
            return Err(Failure::unsupported("the action has no commands".into()));
        }
        Ok(ExecutionRequest {
            attempt: self.spool.id(),
            commands: spec.commands.clone(),
            shell,
            env: environment::variables(spec),
            workspace: folders.workspace(),
            scratch: folders.scratch(),
            resources: spec.resources.map_or(Resources::DEFAULT, Resources::from),
            network: Network::from(spec.network()),
            timeout: Duration::from_millis(spec.timeout_ms),
            grace: Duration::from_millis(spec.grace_ms),
        })
    }

    async fn execute(&mut self, request: ExecutionRequest, place: &mut Occupancy) -> Told {
        let name = self.spec.as_ref().map_or("", |spec| spec.executor.as_str());
        let means = self.means.clone();
        let executor = match means.executor(name) {
            Ok(executor) => executor,
            Err(failure) => return Told::outcome(failure.into_outcome()),
        };
        let mut execution = match executor.start(request).await {
            Ok(execution) => execution,
            Err(error) => {
                let outcome = Outcome::Errored { cause: error.cause(), message: error.message() };
                return Told::outcome(outcome);
            }
        };
        self.follow(&mut execution, executor.kind(), place).await
    }

    /// Takes down what an execution tells, until nothing of it lives any more.
    async fn follow(&mut self, execution: &mut Execution, kind: ExecutorKind, place: &mut Occupancy) -> Told {
        let handle = execution.handle();
        let mut broken: Option<Outcome> = None;
        let mut stopped: Option<Stop> = None;
        self.orders.mark_changed();
        loop {
            let event = tokio::select! {
                event = execution.next() => event,
                stop = place.must_stop() => {
                    stopped = Some(stop);
                    handle.kill();
                    continue;
                }
                () = changed(&mut self.orders) => {
                    let orders = self.orders.borrow_and_update();
                    if orders.kill || orders.forget {
                        handle.kill();
                    } else if let Some(grace) = orders.cancel {
                        handle.cancel(grace);
                    }
                    continue;
                }
            };
            let forgotten = self.orders.borrow().forget;
            match event {
                Some(ExecutionEvent::Finished { .. }) | None if forgotten => return Told::Nothing,
                Some(_) if forgotten => {}
                Some(ExecutionEvent::Finished { mut outcome, remains }) => {
                    // An end that came first stands.
                    if let Some(stop) = stopped.filter(|_| outcome == Outcome::Cancelled) {
                        self.take_output(format!("sealci: {stop}\n").into()).await;
                        outcome = stop.outcome();
                    }
                    return Told::Outcome { outcome: broken.unwrap_or(outcome), remains };
                }
                Some(event) => {
                    if let Err(error) = self.take_down(event, kind).await
                        && broken.is_none()
                    {
                        broken = Some(spool_broke(&error));
                        handle.kill();
                    }
                }
                None => return Told::outcome(broken.unwrap_or_else(broke_off)),
            }
        }
    }

    async fn take_down(&self, event: ExecutionEvent, kind: ExecutorKind) -> Result<(), SpoolError> {
        let body = match event {
            ExecutionEvent::Started => {
                event::Body::Running(agent::Running { executor: kind.as_str().to_owned() })
            }
            ExecutionEvent::CommandStarted { index, .. } => {
                event::Body::CommandStarted(agent::CommandStarted { index, log_offset: self.spool.log.end() })
            }
            ExecutionEvent::CommandFinished { index, exit_code, duration, resource_use, .. } => {
                event::Body::CommandFinished(agent::CommandFinished {
                    index,
                    exit_code,
                    duration_us: micros(duration),
                    log_offset: self.spool.log.end(),
                    resource_use: Some(agent::ResourceUse {
                        cpu_user_us: micros(resource_use.cpu_user),
                        cpu_system_us: micros(resource_use.cpu_system),
                        memory_peak_bytes: resource_use.memory_peak_bytes,
                    }),
                })
            }
            ExecutionEvent::Output(output) => {
                self.take_output(output).await;
                return Ok(());
            }
            ExecutionEvent::Finished { .. } => return Ok(()),
        };
        self.spool.record(body, unix_ms())
    }

    /// The one way of output into the log. Secrets are to be masked here, before anything is stored: offsets count masked
    /// bytes, which is why events take theirs from the spool and not from the executor.
    async fn take_output(&self, output: Bytes) {
        let spool = self.spool.clone();
        // The disk may be slow; the threads that keep the session alive must not be.
        let appended = tokio::task::spawn_blocking(move || spool.append_log(output)).await;
        if let Err(error) = appended {
            tracing::error!(attempt.id = %self.spool.id(), %error, "output was not taken down");
        }
    }
}

/// Makes the folders and fills the workspace; from a private repository once the grant has brought what opens it.
async fn prepare(
    means: &Means,
    spec: Option<&ActionSpec>,
    folders: &Folders,
    mut orders: watch::Receiver<Orders>,
) -> Result<(), Failure> {
    let spec = spec.ok_or_else(unreadable)?;
    let source =
        spec.source.as_ref().ok_or_else(|| Failure::unsupported("the action has no source".into()))?;
    let sealed_credentials = if source.needs_credentials {
        loop {
            let given = {
                let orders = orders.borrow_and_update();
                orders.granted.map(|_| orders.sealed_credentials.clone())
            };
            match given {
                Some(sealed) => break sealed,
                None => changed(&mut orders).await,
            }
        }
    } else {
        Vec::new()
    };
    let source = Source::read(source, &sealed_credentials, &means.identity)?;
    folders.make().await?;
    means.checkout.prepare(&source, &folders.workspace()).await?;
    Ok(())
}

fn unreadable() -> Failure {
    Failure::unsupported(
        "what to do cannot be read; the controller and this agent may be of different releases".into(),
    )
}

fn spool_broke(error: &SpoolError) -> Outcome {
    let cause = if error.is_out_of_room() { Cause::DiskFull } else { Cause::Executor };
    Outcome::Errored { cause, message: error.to_string() }
}

fn broke_off() -> Outcome {
    let message = "the executor ended without saying how the action ended".to_owned();
    Outcome::Errored { cause: Cause::Executor, message }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Waits until the orders change. Their owner being gone is no order: it takes this task with it.
async fn changed(orders: &mut watch::Receiver<Orders>) {
    if orders.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
