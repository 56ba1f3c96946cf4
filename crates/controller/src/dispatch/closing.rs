//! Closes the logs that nobody delivers to their end, so that nobody follows them for ever.
//!
//! A log is closed once its attempt has been finished for long (a day), and once this process has been there for a while and
//! heard nothing of it. The first alone would trust a wall clock, an agent's among them; the second alone would begin anew
//! with every restart.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sealci_core::ids::AttemptId;
use sealci_service::problem::chain;

use super::commit::Transaction;
use super::driver::Driver;
use super::live::id_of_row;
use super::places::Take;
use crate::store::StoreError;
use crate::store::entity::{attempts, log_chunks};

/// There are so many looks at what is open in the time after which a log is closed.
const LOOKS: u32 = 24;

/// One look takes so many logs; the oldest first, and the rest once these are closed.
const LOGS_PER_LOOK: u64 = 100;

/// What people read where a log has no end.
const REASON: &str = "the agent that has it did not deliver it";

/// Which logs were open at the last look, and how far they were.
#[derive(Debug)]
pub(super) struct Closing {
    after: Duration,
    last_look: Option<Instant>,
    seen: HashMap<AttemptId, Extent>,
}

/// How far an attempt's journal and log were.
type Extent = (i64, i64);

impl Closing {
    pub fn new(after: Duration) -> Self {
        Self { after, last_look: None, seen: HashMap::new() }
    }

    /// Nothing can be heard from here on: the last look counts for nothing.
    pub fn is_deaf(&mut self) {
        self.seen.clear();
    }

    fn is_due(&self, now: Instant) -> bool {
        self.last_look.is_none_or(|last| now.saturating_duration_since(last) >= self.after / LOOKS)
    }

    /// Those of the open logs that are as they were at the last look.
    fn silent(&mut self, open: &[attempts::Model], now: Instant) -> Vec<AttemptId> {
        self.last_look = Some(now);
        let extents = open.iter().map(|row| (id_of_row(row), (row.next_sequence, row.log_end))).collect();
        let before = std::mem::replace(&mut self.seen, extents);
        let is_silent = |id: &AttemptId| before.get(id).is_some_and(|extent| self.seen[id] == *extent);
        open.iter().map(id_of_row).filter(is_silent).collect()
    }
}

impl Driver {
    /// Closes what is to be closed, if it is time to look.
    pub(super) async fn close_silent_logs(&mut self, now: Instant, transaction: &mut Transaction) {
        if self.lines.is_empty() || !self.closing.is_due(now) {
            return;
        }
        if let Err(error) = self.look_for_silent_logs(now, transaction).await {
            tracing::error!(error = %chain(&error), "open logs cannot be looked for");
        }
    }

    async fn look_for_silent_logs(
        &mut self,
        now: Instant,
        transaction: &mut Transaction,
    ) -> Result<(), StoreError> {
        let after_ms = i64::try_from(self.closing.after.as_millis()).unwrap_or(i64::MAX);
        let finished_before_ms = transaction.now_ms.saturating_sub(after_ms);
        let open = self.store.unfinished_logs(finished_before_ms, LOGS_PER_LOOK).await?;
        for id in self.closing.silent(&open, now) {
            let Some(live) = self.place_of_attempt(id, Take::IfDue).await?.here() else { continue };
            let gap = match live.stale.get_mut(&id) {
                Some(stale) => stale.close_log(),
                None => live.state.close_log(id.action, id.number),
            };
            let Some(gap) = gap else { continue };
            tracing::warn!(attempt.id = %id, missing_bytes = gap.end - gap.start, "a log is closed without its end");
            transaction.touch_attempt(live.id(), id);
            transaction.log_grew(id);
            transaction.batch.log_chunks.push(log_chunks::Model {
                action_id: id.action.as_uuid(),
                number: i32::try_from(id.number).unwrap_or(i32::MAX),
                start: i64::try_from(gap.start).unwrap_or(i64::MAX),
                end: i64::try_from(gap.end).unwrap_or(i64::MAX),
                data: None,
                gap: Some(REASON.to_owned()),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::attempt::{Attempt, Claimant};
    use sealci_core::ids::{ActionId, AgentId, ClaimId, FencingToken, InstanceId};

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn open(log_end: i64) -> attempts::Model {
        let claimant = Claimant {
            claim: ClaimId::from_parts(1, &[1; 10]),
            agent: AgentId::from_parts(1, &[2; 10]),
            instance: InstanceId::from_parts(1, &[3; 10]),
        };
        let attempt = Attempt::claimed(1, 1, claimant, FencingToken(1));
        let action = ActionId::from_parts(1, &[4; 10]).as_uuid();
        attempts::Model { log_end, ..super::super::live::row_of_new_attempt(action, &attempt, 0) }
    }

    #[test]
    fn a_log_is_silent_when_two_looks_find_it_the_same() {
        let start = Instant::now();
        let mut closing = Closing::new(DAY);
        assert!(closing.is_due(start));
        assert!(closing.silent(&[open(3)], start).is_empty(), "it was never looked at");
        assert!(!closing.is_due(start + Duration::from_secs(3599)));
        assert!(closing.is_due(start + Duration::from_secs(3600)));
        assert!(closing.silent(&[open(4)], start).is_empty(), "it grew");
        closing.is_deaf();
        assert!(closing.silent(&[open(4)], start).is_empty(), "nothing could be heard");
        assert_eq!(closing.silent(&[open(4)], start), [id_of_row(&open(4))]);
    }
}
