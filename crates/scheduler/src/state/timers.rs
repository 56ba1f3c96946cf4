//! Remembers what is to be looked at again, and when. Times are monotonic, since any fixed moment.

use std::collections::BTreeSet;
use std::time::Duration;

use sealci_core::ids::AttemptId;

use super::{EnrolId, SessionId};

/// What a time was set for. Whether it still matters is asked when it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// A session waited for a directory.
    Directory(SessionId),
    /// A session may have been silent for too long.
    Silence(SessionId),
    /// A session is of an instance that did not become the current one.
    Supersede(SessionId),
    /// A controller was asked.
    Enrol(EnrolId),
    /// An attempt that agents keep letting go of may be placed again.
    Retry(AttemptId),
    /// No controller may have been there for too long.
    Deserted,
    /// Placement waits no longer for those who came back after a start.
    Settled,
}

#[derive(Debug, Default)]
pub(super) struct Timers(BTreeSet<(Duration, Timer)>);

impl Timers {
    pub fn set(&mut self, at: Duration, timer: Timer) {
        self.0.insert((at, timer));
    }

    pub fn next(&self) -> Option<Duration> {
        self.0.first().map(|(at, _)| *at)
    }

    /// The next one whose time has come.
    pub fn pop_due(&mut self, now: Duration) -> Option<Timer> {
        self.0.first().filter(|(at, _)| *at <= now)?;
        self.0.pop_first().map(|(_, timer)| timer)
    }
}
