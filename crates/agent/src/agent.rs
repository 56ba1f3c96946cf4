//! Holds attempts: takes them on, passes orders to them, lets them go. It knows nothing of streams.
//!
//! An attempt is held from the moment its claim id is spooled until nothing more is owed of it *and* nothing of its
//! action lives any more; that is what `Held` tells, and what capacity is counted by.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::Resources;
use sealci_proto::agent::{self, ActionSpec, ClaimGranted, HeldState};
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};

use crate::attempt::{AttemptTask, Ended, Orders, exclusive_lease};
use crate::executor::Lease;
use crate::identity::{new_claim_id, unix_ms};
use crate::offer::{Disk, Offering};
use crate::preparation::Means;
use crate::spool::{AttemptSpool, NewAttempt, Spool, SpoolError};

/// The log's bound where the controller names none.
const DEFAULT_LOG_QUOTA_BYTES: u64 = 1 << 30;

/// So long nothing new is taken after an attempt could not be spooled: else it would come back at once, again and again.
const AFTER_TROUBLE: Duration = Duration::from_secs(5);

/// One held attempt.
struct Held {
    spool: Arc<AttemptSpool>,
    orders: watch::Sender<Orders>,
    /// An exclusive action's lease.
    lease: Option<Duration>,
    /// Its task goes on, so something of its action may live.
    runs: bool,
    /// Nothing more is owed of it.
    settled: bool,
    /// What could not be taken down.
    remains: Option<String>,
}

/// How a task of the set ended.
type Joined = Result<(Id, Ended), JoinError>;

/// All that this agent holds, and what it holds it with.
pub struct Agent {
    pub spool: Spool,
    pub offering: Offering,
    disk: Disk,
    means: Arc<Means>,
    held: BTreeMap<AttemptId, Held>,
    pub tasks: JoinSet<Ended>,
    task_attempts: HashMap<Id, AttemptId>,
    /// Removes files, which can take long.
    pub removals: JoinSet<()>,
    pub draining: bool,
    /// Why an attempt could not be taken on lately: with it the agent waits a little before it takes the next.
    trouble: Option<(Instant, String)>,
}

impl Agent {
    /// Takes over what a former process left: results stand; what was granted and did not end is over; what was not
    /// granted yet has not started, and goes on under its claim id.
    pub fn new(
        spool: Spool,
        left: Vec<Arc<AttemptSpool>>,
        offering: Offering,
        disk: Disk,
        means: Arc<Means>,
    ) -> Self {
        let mut agent = Self {
            spool,
            offering,
            disk,
            means,
            held: BTreeMap::new(),
            tasks: JoinSet::new(),
            task_attempts: HashMap::new(),
            removals: JoinSet::new(),
            draining: false,
            trouble: None,
        };
        for attempt in left {
            let id = attempt.id();
            if attempt.is_finished() {
                tracing::info!(attempt.id = %id, "a spooled result is still to be delivered");
                agent.hold_finished(attempt);
            } else if attempt.token().is_some() {
                tracing::warn!(attempt.id = %id, "the attempt was interrupted by the agent's end");
                attempt.make_up_end(&interrupted(), unix_ms());
                agent.hold_finished(attempt);
            } else {
                let spec = ActionSpec::decode(attempt.spec().clone()).ok();
                agent.hold_running(attempt, spec);
            }
        }
        agent
    }

    fn hold_finished(&mut self, spool: Arc<AttemptSpool>) {
        let (orders, _) = watch::channel(Orders::default());
        let held =
            Held { spool: spool.clone(), orders, lease: None, runs: false, settled: false, remains: None };
        self.held.insert(spool.id(), held);
    }

    fn hold_running(&mut self, spool: Arc<AttemptSpool>, spec: Option<ActionSpec>) {
        let id = spool.id();
        let (orders, receiver) = watch::channel(Orders::default());
        let lease = spec.as_ref().and_then(exclusive_lease);
        let task = AttemptTask { spool: spool.clone(), spec, orders: receiver, means: self.means.clone() };
        let handle = self.tasks.spawn(task.run());
        self.task_attempts.insert(handle.id(), id);
        self.held.insert(id, Held { spool, orders, lease, runs: true, settled: false, remains: None });
    }

    /// Why it takes nothing new; none while it does.
    pub fn refusal(&self, superseded: Option<&str>) -> Option<String> {
        if self.draining {
            return Some("draining".into());
        }
        if let Some(reason) = superseded {
            return Some(format!("superseded: {reason}"));
        }
        if let Some(refusal) = self.disk.refusal() {
            return Some(refusal);
        }
        if !self.spool.has_room() {
            return Some("spool full".into());
        }
        self.trouble.as_ref().map(|(_, what)| what.clone())
    }

    /// Looks again whether what kept it from taking anything new is over.
    pub fn look_for_room(&mut self, now: Instant) {
        self.disk.look();
        self.trouble.take_if(|(since, _)| now.saturating_duration_since(*since) >= AFTER_TROUBLE);
    }

    /// Whether a new attempt would be taken on now.
    pub fn takes_new(&mut self, superseded: Option<&str>, now: Instant) -> bool {
        self.look_for_room(now);
        self.refusal(superseded).is_none()
    }

    /// Takes an attempt on: its claim id is spooled, and it prepares. If that fails it is not held, which the
    /// scheduler learns from the next `Held`.
    pub fn take_on(&mut self, id: AttemptId, run: &agent::Run, now: Instant) {
        if let Err(error) = self.try_to_take_on(id, run) {
            tracing::warn!(attempt.id = %id, %error, "cannot take the attempt on");
            self.trouble = Some((now, error.to_string()));
        }
    }

    fn try_to_take_on(&mut self, id: AttemptId, run: &agent::Run) -> Result<(), SpoolError> {
        let spec = ActionSpec::decode(run.spec.as_slice()).ok();
        let spool = self.spool.hold(NewAttempt {
            attempt: id,
            claim_id: new_claim_id(),
            reserved: run.reserved.map_or_else(Resources::default, Resources::from),
            spec: Bytes::copy_from_slice(&run.spec),
            commands: spec.as_ref().map_or(0, |spec| spec.commands.len()),
            log_quota_bytes: spec
                .as_ref()
                .map(|spec| spec.log_quota_bytes)
                .filter(|quota| *quota > 0)
                .unwrap_or(DEFAULT_LOG_QUOTA_BYTES),
        })?;
        tracing::info!(attempt.id = %id, claim.id = %spool.claim_id(), "attempt taken on");
        self.hold_running(spool, spec);
        Ok(())
    }

    /// Passes the grant on.
    pub fn grant(&self, id: AttemptId, granted: ClaimGranted) {
        self.order(id, |orders| {
            if orders.granted.is_none() {
                orders.granted = Some(granted.token);
                orders.sealed_credentials = granted.sealed_credentials;
                orders.sealed_storage = granted.sealed_storage;
            }
        });
    }

    /// The length of the leases without which the attempt may not run; none where it needs none.
    pub fn lease(&self, id: AttemptId) -> Option<Duration> {
        let held = self.held.get(&id).filter(|held| held.runs && held.spool.token().is_some())?;
        held.lease
    }

    /// An exclusive attempt may run until then.
    pub fn renew(&self, id: AttemptId, lease: Lease) {
        self.order(id, |orders| orders.lease = orders.lease.max(Some(lease)));
    }

    /// Ends an attempt properly.
    pub fn cancel(&self, id: AttemptId, grace: Duration) {
        self.order(id, |orders| {
            orders.cancel = Some(orders.cancel.map_or(grace, |before| before.min(grace)));
        });
    }

    /// The attempt lost its action: ends it at once, and delivers what it told.
    pub fn fence(&self, id: AttemptId) {
        self.order(id, |orders| orders.kill = true);
    }

    /// Ends an attempt at once, if it runs; nothing more is told of it.
    pub fn forget(&mut self, id: AttemptId) {
        self.order(id, |orders| orders.forget = true);
        self.settle(id);
    }

    fn order(&self, id: AttemptId, change: impl FnOnce(&mut Orders)) {
        if let Some(held) = self.held.get(&id) {
            held.orders.send_modify(change);
        }
    }

    /// Nothing more is owed of the attempt. It goes as soon as nothing of it runs.
    pub fn settle(&mut self, id: AttemptId) {
        if let Some(held) = self.held.get_mut(&id) {
            held.settled = true;
        }
        self.let_go_if_over(id);
    }

    fn let_go_if_over(&mut self, id: AttemptId) {
        let over = |held: &Held| held.settled && !held.runs && held.remains.is_none();
        if self.held.get(&id).is_some_and(over)
            && let Some(held) = self.held.remove(&id)
        {
            let leftover = held.spool.forget();
            self.removals.spawn_blocking(move || leftover.remove());
        }
    }

    /// Takes note that an attempt's task ended. Returns which one.
    pub fn joined(&mut self, joined: Joined) -> Option<AttemptId> {
        let (task, ended) = match joined {
            Ok((task, ended)) => (task, Ok(ended)),
            Err(error) => (error.id(), Err(error)),
        };
        let id = self.task_attempts.remove(&task)?;
        let held = self.held.get_mut(&id)?;
        held.runs = false;
        match ended {
            Ok(Ended::Told) => {}
            Ok(Ended::Forgotten) => held.settled = true,
            Ok(Ended::Remains(what)) => {
                tracing::error!(attempt.id = %id, remains = what, "what the attempt reserved is not free again");
                held.settled |= !held.spool.is_finished();
                held.remains = Some(what);
            }
            Err(error) => {
                tracing::error!(attempt.id = %id, %error, "the attempt's task broke");
                if held.spool.token().is_none() {
                    held.settled = true;
                } else if !held.spool.is_finished() {
                    let message = "the agent had an internal error; its own log tells more".to_owned();
                    held.spool.finish(&Outcome::Errored { cause: Cause::Executor, message }, unix_ms());
                }
            }
        }
        self.let_go_if_over(id);
        Some(id)
    }

    /// Takes note of all tasks that have ended so far.
    pub fn join_ended(&mut self) {
        while let Some(joined) = self.tasks.try_join_next_with_id() {
            self.joined(joined);
        }
    }

    /// Whether nothing runs and nothing is owed. What could not be taken down is nobody's to wait for.
    pub fn is_done(&self) -> bool {
        self.held.values().all(|held| held.settled && !held.runs)
    }

    pub fn ids(&self) -> Vec<AttemptId> {
        self.held.keys().copied().collect()
    }

    pub fn attempt(&self, id: AttemptId) -> Option<&Arc<AttemptSpool>> {
        self.held.get(&id).map(|held| &held.spool)
    }

    /// Whether nothing more is owed of it.
    pub fn is_settled(&self, id: AttemptId) -> bool {
        self.held.get(&id).is_some_and(|held| held.settled)
    }

    pub fn state(&self, id: AttemptId) -> Option<HeldState> {
        self.held.get(&id).map(|held| held.spool.held_state())
    }

    /// All that is held, as it is told.
    pub fn held(&self) -> Vec<agent::HeldAttempt> {
        let tell = |held: &Held| agent::HeldAttempt {
            attempt: Some(held.spool.id().into()),
            state: held.spool.held_state().into(),
            claim_id: held.spool.claim_id().to_string(),
            token: held.spool.token().unwrap_or_default(),
            reserved: Some(held.spool.reserved().into()),
        };
        self.held.values().map(tell).collect()
    }

    /// Ends everything at once. What was not told is told after the next start.
    pub async fn stop(&mut self) {
        self.tasks.shutdown().await;
        while self.removals.join_next().await.is_some() {}
    }
}

fn interrupted() -> Outcome {
    let message = "the agent ended while the action ran (restarted, killed or out of memory); what it had written \
                   until then is in the log";
    Outcome::Errored { cause: Cause::AgentRestarted, message: message.into() }
}
