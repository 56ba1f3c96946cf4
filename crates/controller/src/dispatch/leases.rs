//! Watches the other replicas' leases, and takes over what those that ran out owned.
//!
//! ```text
//!   counter moves ──▶ alive ──the same for a whole period, seen all that time──▶ dead ──▶ taken over (epoch + 1)
//!                       ▲                                                          ▲
//!                       └── we were away ourselves: begun anew                     └── it has no lease (any more)
//! ```
//!
//! [`LeaseWatch`] is pure: the time comes in as an [`Instant`], this process's own. A database that one process has alone
//! (SQLite) has no leases: everything in it is that process's.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sealci_core::ids::{PipelineId, ReplicaId};

use super::TICK;
use super::commit::Transaction;
use super::driver::Driver;
use crate::replica::Replica;
use crate::store::{Ownership, StoreError};

/// There are so many looks in a lease's period.
const LOOKS: u32 = 5;
/// The agents are read again every so many looks, should the news of a change have been lost.
const LOOKS_PER_READING: u32 = 5;

/// What was seen of the leases.
#[derive(Debug)]
pub(super) struct LeaseWatch {
    period: Duration,
    last_look: Option<Instant>,
    seen: HashMap<ReplicaId, Seen>,
    has_others: bool,
    looks: u32,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    counter: i64,
    since: Instant,
}

/// A replica that is gone, and the counter that its lease was left with; none if it has no lease.
pub(super) type Dead = (ReplicaId, Option<i64>);

impl LeaseWatch {
    pub fn new(period: Duration) -> Self {
        Self { period, last_look: None, seen: HashMap::new(), has_others: false, looks: 0 }
    }

    /// How often something is looked at.
    pub fn tick(&self) -> Duration {
        TICK.min(self.period / LOOKS)
    }

    fn is_due(&self, now: Instant) -> bool {
        self.last_look.is_none_or(|last| now.saturating_duration_since(last) >= self.period / LOOKS)
    }

    /// Whether other replicas had a lease at the last look.
    pub fn has_others(&self) -> bool {
        self.has_others
    }

    /// Takes a look: the owners of what is unfinished that are dead. Of the others only time that we saw ourselves counts.
    fn look(
        &mut self,
        now: Instant,
        own: ReplicaId,
        leases: &HashMap<ReplicaId, i64>,
        owners: &[ReplicaId],
    ) -> Vec<Dead> {
        let was_away = self
            .last_look
            .replace(now)
            .is_none_or(|last| now.saturating_duration_since(last) > self.period / 2);
        self.has_others = leases.keys().any(|replica| *replica != own);
        self.looks = self.looks.wrapping_add(1);
        let before = std::mem::take(&mut self.seen);
        self.seen = leases
            .iter()
            .map(|(replica, counter)| {
                let kept = before.get(replica).filter(|seen| seen.counter == *counter && !was_away);
                // Who owns nothing does not raise its counter.
                let kept = kept.filter(|_| owners.contains(replica));
                (*replica, kept.copied().unwrap_or(Seen { counter: *counter, since: now }))
            })
            .collect();
        let others = owners.iter().filter(|owner| **owner != own);
        let dead: Vec<Dead> = others
            .filter_map(|owner| match self.seen.get(owner) {
                None => Some((*owner, None)),
                Some(seen) if now.saturating_duration_since(seen.since) >= self.period => {
                    Some((*owner, Some(seen.counter)))
                }
                Some(_) => None,
            })
            .collect();
        for (replica, _) in &dead {
            self.seen.remove(replica);
        }
        dead
    }

    /// Nothing was seen: what is seen next is seen for the first time.
    fn is_blind(&mut self) {
        self.last_look = None;
    }
}

impl Driver {
    /// Renews the own lease and looks at the others', if it is time to.
    pub(super) async fn keep_lease(&mut self, now: Instant, transaction: &mut Transaction) {
        if !self.store.is_shared() || !self.leases.is_due(now) {
            return;
        }
        if let Err(error) = self.look_at_leases(now, transaction).await {
            tracing::error!(error = %sealci_service::problem::chain(&error), "the replicas' leases cannot be looked at");
            self.leases.is_blind();
        }
    }

    async fn look_at_leases(
        &mut self,
        now: Instant,
        transaction: &mut Transaction,
    ) -> Result<(), StoreError> {
        let owns_something = self.live.values().any(|live| live.pipeline.state != "finished");
        if self.has_lost_lease || (owns_something && !self.store.renew_lease(self.replica.id()).await?) {
            self.begin_anew().await?;
        }
        let mut leases = self.store.leases().await?;
        if !leases.contains_key(&self.replica.id()) {
            self.begin_anew().await?;
            leases = self.store.leases().await?;
        }
        let owners = self.store.owners().await?;
        let dead = self.leases.look(now, self.replica.id(), &leases, &owners);
        let anyone_died = !dead.is_empty();
        for (former, counter) in dead {
            if self.store.take_over_from(former, counter, self.replica.id()).await? {
                tracing::warn!(replica.id = %former, "a replica is gone; its pipelines go on here");
            }
        }
        if anyone_died {
            self.take_up_what_is_owned().await?;
        }
        let forget_after = 3 * self.leases.period;
        self.elsewhere.retain(|_, first_at| now.saturating_duration_since(*first_at) < forget_after);
        if self.leases.has_others() {
            // Whose news was lost looks for itself.
            self.watchers.wake_all();
            if self.leases.looks.is_multiple_of(LOOKS_PER_READING) {
                self.read_agents(transaction).await?;
            }
        }
        Ok(())
    }

    /// Reads what became this replica's. What is in memory since an earlier time that it was is the past.
    async fn take_up_what_is_owned(&mut self) -> Result<(), StoreError> {
        let epochs = self.store.epochs().await?;
        for id in self.store.unfinished(self.replica.id()).await? {
            if self.live.get(&id).is_none_or(|live| epochs.get(&id) != Some(&live.epoch())) {
                self.taken(id);
                self.forgotten.insert(id);
            }
        }
        Ok(())
    }

    /// Leaves what this replica owns to the others, or to its successor, at once.
    pub(super) async fn give_lease_back(&self) {
        if self.store.is_shared()
            && let Err(error) = self.store.end_lease(self.replica.id()).await
        {
            tracing::warn!(error = %sealci_service::problem::chain(&error), "the lease is not given back; it will run out");
        }
    }

    /// The lease is found lost by a commit that needed it.
    pub(super) async fn lease_is_lost(&mut self) {
        self.has_lost_lease = true;
        // Should that fail, the next look tries again, soon.
        self.leases.is_blind();
        if let Err(error) = self.begin_anew().await {
            tracing::error!(error = %sealci_service::problem::chain(&error), "no new lease can be begun");
        }
    }

    /// Others have taken over what this replica owned: it is a new one, that owns nothing yet.
    async fn begin_anew(&mut self) -> Result<(), StoreError> {
        tracing::warn!(replica.id = %self.replica.id(), "this replica was silent for too long and lost its lease; it begins anew");
        let next = Replica::fresh();
        self.store.begin_lease(next).await?;
        self.replica.become_another(next);
        self.has_lost_lease = false;
        let ids: Vec<PipelineId> = self.live.keys().copied().collect();
        if !ids.is_empty() {
            self.give_lines_up();
        }
        ids.into_iter().for_each(|id| self.taken(id));
        self.forgotten.clear();
        Ok(())
    }

    /// Whether a pipeline of another replica may be taken over for a report about it: its owner is done with it, or does not
    /// come by what is sent here instead. One whose owner is gone is taken over without a report.
    pub(super) fn may_take_over(&mut self, id: PipelineId, ownership: Ownership, now: Instant) -> bool {
        if ownership.is_finished {
            return true;
        }
        let first_at = *self.elsewhere.entry(id).or_insert(now);
        now.saturating_duration_since(first_at) >= self.leases.period / 2
    }

    /// Somebody else owns a pipeline now.
    pub(super) fn taken(&mut self, id: PipelineId) {
        self.drop_live(id);
        self.forgotten.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERIOD: Duration = Duration::from_secs(10);

    fn replica(n: u64) -> ReplicaId {
        ReplicaId::from_parts(n, &[0; 10])
    }

    /// Looks every two seconds from `from` to `to`, at one other's lease with this counter; what the last look found.
    fn look(
        watch: &mut LeaseWatch,
        start: Instant,
        (from, to): (u64, u64),
        counter: Option<i64>,
    ) -> Vec<Dead> {
        let leases = counter.map(|counter| (replica(2), counter)).into_iter().collect();
        let owners = [replica(1), replica(2)];
        let looks = (from..=to).step_by(2);
        looks.fold(Vec::new(), |_, second| {
            watch.look(start + Duration::from_secs(second), replica(1), &leases, &owners)
        })
    }

    #[test]
    fn a_counter_that_stands_still_for_the_whole_period_is_a_death() {
        let start = Instant::now();
        let mut watch = LeaseWatch::new(PERIOD);
        assert!(look(&mut watch, start, (0, 8), Some(3)).is_empty());
        assert!(look(&mut watch, start, (10, 18), Some(4)).is_empty(), "it moved");
        assert_eq!(look(&mut watch, start, (20, 20), Some(4)), [(replica(2), Some(4))]);
    }

    #[test]
    fn who_has_no_lease_is_dead_at_once() {
        let mut watch = LeaseWatch::new(PERIOD);
        assert_eq!(look(&mut watch, Instant::now(), (0, 0), None), [(replica(2), None)]);
    }

    #[test]
    fn time_in_which_we_did_not_look_does_not_count() {
        let start = Instant::now();
        let mut watch = LeaseWatch::new(PERIOD);
        look(&mut watch, start, (0, 4), Some(3));
        assert!(look(&mut watch, start, (64, 72), Some(3)).is_empty(), "we were stopped for a minute");
        assert_eq!(look(&mut watch, start, (74, 74), Some(3)), [(replica(2), Some(3))]);
        look(&mut watch, start, (76, 80), Some(5));
        watch.is_blind();
        assert!(look(&mut watch, start, (82, 90), Some(5)).is_empty(), "the database was away");
    }

    #[test]
    fn who_owned_nothing_has_the_whole_period_to_show_itself() {
        let start = Instant::now();
        let mut watch = LeaseWatch::new(PERIOD);
        let leases = [(replica(2), 3)].into();
        for second in (0..60).step_by(2) {
            watch.look(start + Duration::from_secs(second), replica(1), &leases, &[]);
        }
        assert!(look(&mut watch, start, (60, 66), Some(3)).is_empty());
        assert!(watch.has_others());
    }
}
