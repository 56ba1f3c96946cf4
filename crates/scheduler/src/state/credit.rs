//! Shares out how many bytes of log may be under way between agents and controllers at a time.
//!
//! Each session has a *window*: what it may still send, what it sent and a controller has not released yet, and what
//! was dropped because no controller was there. The windows of all sessions together stay within the pool, but that
//! every session has the minimum: a pool that is full slows all agents down and stops none.
//!
//! Invariants: a controller releases at most what is under way to it; a window changes its size only by grants from the
//! pool and by returns to it, never by sending.

use std::collections::{BTreeMap, BTreeSet};

use super::{ControllerId, SessionId};

/// The sizes of pool and windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreditLimits {
    /// Shared by all agents.
    pub pool_bytes: u64,
    /// Of one session, when the pool has enough.
    pub session_bytes: u64,
    /// Of one session, however short the pool is.
    pub minimum_bytes: u64,
}

impl Default for CreditLimits {
    fn default() -> Self {
        Self { pool_bytes: 64 << 20, session_bytes: 4 << 20, minimum_bytes: 64 << 10 }
    }
}

#[derive(Debug, Default)]
struct Window {
    credit: u64,
    under_way: BTreeMap<ControllerId, u64>,
    /// Dropped: given back once a controller is there, else the agent would send all of its spool to nobody.
    dropped: u64,
    /// To be given back with the next message.
    returned: u64,
}

impl Window {
    fn size(&self) -> u64 {
        self.credit + self.dropped + self.returned + self.under_way.values().sum::<u64>()
    }
}

#[derive(Debug)]
pub(super) struct CreditPool {
    limits: CreditLimits,
    /// The size of all windows, and of what ended sessions have under way.
    granted: u64,
    windows: BTreeMap<SessionId, Window>,
    /// What ended sessions have under way still.
    left_behind: BTreeMap<(ControllerId, SessionId), u64>,
    changed: BTreeSet<SessionId>,
}

impl CreditPool {
    pub fn new(limits: CreditLimits) -> Self {
        Self {
            limits,
            granted: 0,
            windows: BTreeMap::new(),
            left_behind: BTreeMap::new(),
            changed: BTreeSet::new(),
        }
    }

    pub fn open(&mut self, session: SessionId) {
        self.windows.insert(session, Window::default());
        self.changed.insert(session);
    }

    pub fn close(&mut self, session: SessionId) {
        let Some(window) = self.windows.remove(&session) else { return };
        self.changed.remove(&session);
        self.granted -= window.size();
        for (controller, bytes) in window.under_way {
            self.granted += bytes;
            self.left_behind.insert((controller, session), bytes);
        }
    }

    /// A session sent so many bytes to this controller; to none, they were dropped. An error says how many it had been
    /// allowed.
    pub fn spend(&mut self, session: SessionId, to: Option<ControllerId>, bytes: u64) -> Result<(), u64> {
        let Some(window) = self.windows.get_mut(&session) else { return Ok(()) };
        window.credit = window.credit.checked_sub(bytes).ok_or(window.credit)?;
        match to {
            Some(controller) => *window.under_way.entry(controller).or_default() += bytes,
            None => window.dropped += bytes,
        }
        Ok(())
    }

    /// A controller has so many bytes of the session no longer in its memory.
    pub fn release(&mut self, session: SessionId, controller: ControllerId, bytes: u64) {
        if let Some(window) = self.windows.get_mut(&session) {
            let Some(under_way) = window.under_way.get_mut(&controller) else { return };
            let bytes = bytes.min(*under_way);
            *under_way -= bytes;
            window.returned += bytes;
            self.changed.insert(session);
        } else if let Some(under_way) = self.left_behind.get_mut(&(controller, session)) {
            let bytes = bytes.min(*under_way);
            *under_way -= bytes;
            self.granted -= bytes;
            if *under_way == 0 {
                self.left_behind.remove(&(controller, session));
            }
        }
    }

    /// What was under way to a controller that is gone is as good as dropped.
    pub fn controller_gone(&mut self, controller: ControllerId) {
        for window in self.windows.values_mut() {
            window.dropped += window.under_way.remove(&controller).unwrap_or(0);
        }
        let granted = &mut self.granted;
        self.left_behind.retain(|(to, _), bytes| {
            if *to == controller {
                *granted -= *bytes;
            }
            *to != controller
        });
    }

    /// Gives back what was dropped: there is a controller to send it to again.
    pub fn return_dropped(&mut self) {
        for (session, window) in &mut self.windows {
            if window.dropped > 0 {
                window.returned += std::mem::take(&mut window.dropped);
                self.changed.insert(*session);
            }
        }
    }

    /// What the sessions may send more, since this was last asked.
    pub fn grants(&mut self) -> Vec<(SessionId, u64)> {
        std::mem::take(&mut self.changed)
            .into_iter()
            .filter_map(|session| Some((session, self.grant(session)?)))
            .collect()
    }

    fn grant(&mut self, session: SessionId) -> Option<u64> {
        let CreditLimits { pool_bytes, session_bytes, minimum_bytes } = self.limits;
        let window = self.windows.get_mut(&session)?;
        let size = window.size();
        // A quarter of what is left, so that the last to come still finds something.
        let share = pool_bytes.saturating_sub(self.granted) / 4;
        let target = share.saturating_add(size).clamp(minimum_bytes, session_bytes.max(minimum_bytes));
        if target > size {
            window.returned += target - size;
            self.granted += target - size;
        }
        let overdrawn = self.granted.saturating_sub(pool_bytes);
        let back = overdrawn.min(window.returned).min(window.size().saturating_sub(minimum_bytes));
        window.returned -= back;
        self.granted -= back;
        let bytes = std::mem::take(&mut window.returned);
        window.credit += bytes;
        (bytes > 0).then_some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: CreditLimits = CreditLimits { pool_bytes: 1000, session_bytes: 200, minimum_bytes: 10 };

    #[test]
    fn sending_spends_and_releasing_returns() {
        let mut pool = CreditPool::new(LIMITS);
        let (session, controller) = (SessionId(1), ControllerId(1));
        pool.open(session);
        assert_eq!(pool.grants(), [(session, 200)]);
        assert_eq!(pool.spend(session, Some(controller), 150), Ok(()));
        assert_eq!(pool.spend(session, Some(controller), 51), Err(50));
        pool.release(session, controller, 500);
        assert_eq!(pool.grants(), [(session, 150)], "no more than was under way");
        assert_eq!(pool.grants(), []);
    }

    #[test]
    fn what_was_dropped_is_given_back_when_a_controller_is_there() {
        let mut pool = CreditPool::new(LIMITS);
        let (session, controller) = (SessionId(1), ControllerId(1));
        pool.open(session);
        pool.grants();
        assert_eq!(pool.spend(session, Some(controller), 60), Ok(()));
        pool.controller_gone(controller);
        assert_eq!(pool.spend(session, None, 40), Ok(()));
        assert_eq!(pool.grants(), []);
        pool.return_dropped();
        assert_eq!(pool.grants(), [(session, 100)]);
    }

    #[test]
    fn what_an_ended_session_has_under_way_counts_until_released() {
        let mut pool = CreditPool::new(LIMITS);
        pool.open(SessionId(1));
        pool.grants();
        assert_eq!(pool.spend(SessionId(1), Some(ControllerId(1)), 60), Ok(()));
        pool.close(SessionId(1));
        assert_eq!(pool.granted, 60);
        pool.release(SessionId(1), ControllerId(1), 20);
        assert_eq!(pool.granted, 40);
        pool.controller_gone(ControllerId(1));
        assert_eq!(pool.granted, 0);
    }

    proptest! {
        #[test]
        fn the_pool_is_exceeded_by_minimums_only(steps in prop::collection::vec((0..5_u8, 0..40_u64, 0..3_u64, 0..300_u64), 1..200)) {
            let mut pool = CreditPool::new(LIMITS);
            for (what, session, controller, bytes) in steps {
                let (session, controller) = (SessionId(session), ControllerId(controller));
                match what {
                    0 if !pool.windows.contains_key(&session) => pool.open(session),
                    1 => pool.close(session),
                    2 => { let _ = pool.spend(session, Some(controller).filter(|to| to.0 > 0), bytes); }
                    3 => pool.release(session, controller, bytes),
                    4 => pool.controller_gone(controller),
                    _ => pool.return_dropped(),
                }
                pool.grants();
                let windows: u64 = pool.windows.values().map(Window::size).sum();
                prop_assert_eq!(pool.granted, windows + pool.left_behind.values().sum::<u64>());
                let bound = LIMITS.pool_bytes + LIMITS.minimum_bytes * pool.windows.len() as u64;
                prop_assert!(pool.granted <= bound);
                prop_assert!(pool.windows.values().all(|window| window.size() >= LIMITS.minimum_bytes));
            }
        }
    }
}
