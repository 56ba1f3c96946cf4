//! Drives one held attempt from its claim to its end; everything it learns goes to the spool, nothing to the network.
//!
//! ```text
//!   fill the workspace ───┐
//!   make the environment ─┤
//!   wait for the grant ───┴─▶ spool the token ─▶ bring files ─▶ begin ─▶ events and output
//!                                     terminal event ◀─ clean up ◀─ keep files ◀─┘
//! ```
//!
//! - No command starts before the grant is spooled, and none of an exclusive action without a lease that is still good.
//! - An attempt that is forgotten reports nothing; one that was granted ends with exactly one terminal event.
//! - The task ends when nothing of the action lives any more and its folders are gone.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::ExecutorKind;
use sealci_proto::agent::{self, ActionSpec, event};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::entry::Entry;
use crate::executor::door::Door;
use crate::executor::{Execution, ExecutionEvent, Lease, NoteReader, notes};
use crate::identity::unix_ms;
use crate::lease;
use crate::preparation::{Means, Preparation, Prepared, Ready, changed};
use crate::room::{Occupancy, Stop};
use crate::services::Services;
use crate::spool::{AttemptSpool, SpoolError};
use crate::storage::{self, Luggage};
use crate::workspace::Folders;

/// What the session wants of an attempt. It is only ever added to.
#[derive(Debug, Clone, Default)]
pub struct Orders {
    /// The fencing token.
    pub granted: Option<u64>,
    /// What came with the grant, sealed to the agent's key.
    pub sealed_credentials: Vec<u8>,
    pub sealed_storage: Vec<u8>,
    /// An exclusive action may run until then.
    pub lease: Option<Lease>,
    /// End it properly, with so much time between TERM and KILL.
    pub cancel: Option<Duration>,
    /// It lost its action: end it at once, deliver what it told.
    pub kill: bool,
    /// End it at once, deliver nothing.
    pub forget: bool,
}

/// The length of an exclusive action's leases.
pub fn exclusive_lease(spec: &ActionSpec) -> Option<Duration> {
    (spec.exclusive_lease_ms > 0).then(|| Duration::from_millis(spec.exclusive_lease_ms))
}

/// How an attempt's task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// With a terminal event in the spool.
    Told,
    /// Nothing is to be told of it.
    Forgotten,
    /// Told or forgotten, but something of the action could not be taken down; what it reserved is not free.
    Remains(String),
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
    Nothing { remains: Option<String> },
}

impl Told {
    fn outcome(outcome: Outcome) -> Self {
        Self::Outcome { outcome, remains: None }
    }
}

/// What runs, and what belongs to it.
struct Begun {
    execution: Execution,
    executor: ExecutorKind,
    luggage: Option<Luggage>,
    services: Option<Services>,
    /// What is said in the log beside the commands.
    said: NoteReader,
}

/// Keeps what the action leaves, while its environment stays, and ends what runs beside it.
async fn wind_up(
    luggage: Option<&Luggage>,
    services: Option<Services>,
    door: &Door,
    outcome: Outcome,
) -> Result<(), storage::Failure> {
    let kept = match luggage {
        Some(luggage) => luggage.keep(door, outcome).await,
        None => Ok(()),
    };
    if let Some(services) = services {
        let logs = services.stop().await;
        if let Some(luggage) = luggage {
            luggage.keep_service_logs(&logs).await;
        }
    }
    kept
}

/// Files being taken out and kept.
type Keeping<'a> = Pin<Box<dyn Future<Output = Result<(), storage::Failure>> + Send + 'a>>;

/// Never comes back while nothing is being kept.
async fn kept(keeping: &mut Option<Keeping<'_>>) -> Result<(), storage::Failure> {
    match keeping {
        Some(keeping) => keeping.await,
        None => std::future::pending().await,
    }
}

impl AttemptTask {
    /// Runs the attempt to its end. Dropping the future kills the action.
    pub async fn run(mut self) -> Ended {
        let folders = Folders::of(&self.means.work, self.spool.id());
        // Until the folders are gone.
        let mut place = self.means.room.enter(self.spool.id(), folders.root());
        let told = self.perform(&folders, &mut place).await;
        let (ended, remains) = match told {
            Told::Nothing { remains } => (Ended::Forgotten, remains),
            Told::Outcome { outcome, remains } => {
                tracing::info!(attempt.id = %self.spool.id(), outcome = outcome.kind(), "attempt finished");
                self.spool.finish(&outcome, unix_ms());
                (Ended::Told, remains)
            }
        };
        let ended = remains.map_or(ended, Ended::Remains);
        folders.remove().await;
        ended
    }

    async fn perform(&mut self, folders: &Folders, place: &mut Occupancy) -> Told {
        match self.prepare_and_claim(folders).await {
            Ok(begun) => self.follow(begun, place).await,
            Err(told) => told,
        }
    }

    /// Prepares while the claim is on its way; comes back when both are done, or as soon as the attempt is to end and
    /// what was prepared is taken down.
    async fn prepare_and_claim(&mut self, folders: &Folders) -> Result<Begun, Told> {
        let (means, spec) = (self.means.clone(), self.spec.clone());
        let (notes, mut said) = notes();
        let stop = CancellationToken::new();
        let preparation = Preparation {
            attempt: self.spool.id(),
            spec: spec.as_ref(),
            means: &means,
            folders,
            orders: self.orders.clone(),
            notes,
            stop: stop.clone(),
        };
        let preparing = preparation.run();
        tokio::pin!(preparing);
        let mut prepared = None;
        let mut granted = false;
        loop {
            let orders = self.orders.borrow_and_update().clone();
            let mut may_start = !orders.forget;
            if let Some(token) = orders.granted.filter(|_| may_start && !granted) {
                // Without the token on disk nothing may start; unreported, the attempt counts as lost and runs again.
                match self.spool.grant(token) {
                    Ok(()) => granted = true,
                    Err(error) => {
                        tracing::error!(attempt.id = %self.spool.id(), %error, "cannot start the attempt");
                        may_start = false;
                    }
                }
            }
            if orders.cancel.is_some() {
                stop.cancel();
            }
            // What is cancelled has its claim granted, which may not have been heard yet; then its end is to be told.
            if !may_start || orders.kill || (granted && orders.cancel.is_some()) {
                stop.cancel();
                let prepared = match prepared.take() {
                    Some(prepared) => prepared,
                    None => preparing.await,
                };
                let remains = prepared.abandon().await;
                let is_told = may_start && granted;
                return Err(match is_told {
                    true => Told::Outcome { outcome: Outcome::Cancelled, remains },
                    false => Told::Nothing { remains },
                });
            }
            let may_begin = granted && self.has_lease(&orders);
            if may_begin && let Some(prepared) = prepared.take() {
                for line in said.rest() {
                    self.take_output(line).await;
                }
                return match prepared {
                    Prepared::Ready(ready) => {
                        let Ready { standby, executor, luggage, services } = *ready;
                        if let Some(lease) = orders.lease {
                            standby.handle().hold_until(lease);
                        }
                        Ok(Begun { execution: standby.begin(), executor, luggage, services, said })
                    }
                    Prepared::Failed { outcome, remains } => Err(Told::Outcome { outcome, remains }),
                };
            }
            tokio::select! {
                // Orders are few, and count before whatever comes at the same time.
                biased;
                () = changed(&mut self.orders) => {}
                result = &mut preparing, if prepared.is_none() => prepared = Some(result),
                // Before the grant there is no log; what is said waits where it is.
                Some(line) = said.next(), if granted => self.take_output(line).await,
            }
        }
    }

    fn has_lease(&self, orders: &Orders) -> bool {
        let needs_one = self.spec.as_ref().and_then(exclusive_lease).is_some();
        !needs_one || orders.lease.is_some_and(lease::is_valid)
    }

    /// Takes down what an execution tells, until nothing of it lives any more.
    async fn follow(&mut self, begun: Begun, place: &mut Occupancy) -> Told {
        let Begun { mut execution, executor: kind, luggage, mut services, mut said } = begun;
        let handle = execution.handle();
        let door = execution.door();
        let beside = services.as_ref().map(Services::handles).unwrap_or_default();
        let services_doors = services.as_ref().map(Services::doors).unwrap_or_default();
        let _entered = self.spec.as_ref().map(|spec| {
            let (action, pipeline) = (spec.action_name.clone(), spec.pipeline_name.clone());
            let entry = Entry { action, pipeline, door: door.clone(), services: services_doors };
            self.means.entries.add(self.spool.id(), entry)
        });
        let mut broken: Option<Outcome> = None;
        let mut stopped: Option<Stop> = None;
        let mut keeping: Option<Keeping<'_>> = None;
        self.orders.mark_changed();
        loop {
            let event = tokio::select! {
                // As above; what the action prints without end comes last.
                biased;
                () = changed(&mut self.orders) => {
                    let orders = self.orders.borrow_and_update();
                    if let Some(lease) = orders.lease {
                        beside.iter().chain([&handle]).for_each(|handle| handle.hold_until(lease));
                    }
                    if orders.kill || orders.forget {
                        handle.kill();
                    } else if let Some(grace) = orders.cancel {
                        handle.cancel(grace);
                    }
                    continue;
                }
                Some(line) = said.next() => {
                    self.take_output(line).await;
                    continue;
                }
                kept = kept(&mut keeping) => {
                    keeping = None;
                    // Commands that failed have failed all the same.
                    if let Err(failure) = kept && broken.is_none() {
                        broken = Some(failure.into_outcome());
                    }
                    execution.leave();
                    continue;
                }
                stop = place.must_stop() => {
                    stopped = Some(stop);
                    handle.kill();
                    continue;
                }
                event = execution.next() => event,
            };
            let forgotten = self.orders.borrow().forget;
            match event {
                Some(ExecutionEvent::Finished { remains, .. }) if forgotten => {
                    return Told::Nothing { remains };
                }
                None if forgotten => return Told::Nothing { remains: None },
                Some(_) if forgotten => {}
                Some(ExecutionEvent::Over { outcome }) => {
                    let winding_up = wind_up(luggage.as_ref(), services.take(), &door, outcome);
                    keeping = Some(Box::pin(winding_up));
                }
                Some(ExecutionEvent::Finished { mut outcome, remains }) => {
                    for line in said.rest() {
                        self.take_output(line).await;
                    }
                    if keeping.take().is_some() {
                        // What was to be kept is not.
                        outcome = if handle.is_ended() { Outcome::Cancelled } else { broke_off() };
                    }
                    if matches!(outcome, Outcome::Failed { limit: None, .. }) {
                        outcome = place.full_disk().unwrap_or(outcome);
                    }
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
                        read_bytes: resource_use.read_bytes,
                        write_bytes: resource_use.write_bytes,
                    }),
                })
            }
            ExecutionEvent::Output(output) => {
                self.take_output(output).await;
                return Ok(());
            }
            ExecutionEvent::Over { .. } | ExecutionEvent::Finished { .. } => return Ok(()),
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
