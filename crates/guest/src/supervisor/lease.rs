//! Keeps the deadline of an exclusive action.
//!
//! Whatever has happened to the host, nothing of the action runs past the end of the last lease that was heard of. The
//! kernel's timer counts it, so it also holds for time in which the machine was suspended.

use std::io;
use std::time::Duration;

use sealci_guest::wire::{Ending, Lease};

use super::{Phase, Supervisor};
use crate::sys;

/// How much two readings of one clock may seem apart: both are of the same kernel, so nothing but rounding.
const TOLERANCE: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Moves the deadline to a lease's end.
    pub(super) fn renew(&mut self, lease: Lease) {
        let renewed = self
            .set_lease(lease)
            .unwrap_or_else(|error| Err(format!("cannot set the lease's timer: {error}")));
        if let Err(why) = renewed {
            self.cut_by_kill(Ending::Error(why));
        }
    }

    fn set_lease(&mut self, lease: Lease) -> io::Result<Result<(), String>> {
        let Some(until) = self.in_own_clock(Duration::from_millis(lease.until_boot_ms)) else {
            return Ok(Err(
                "nothing has told this machine the host's clock; an exclusive action cannot run".into()
            ));
        };
        let longest = Duration::from_millis(lease.longest_ms);
        if until > sys::boot_time()?.saturating_add(longest).saturating_add(TOLERANCE) {
            return Ok(Err(
                "the agent's boot-time clock is not this kernel's; an exclusive action cannot run here"
                    .into(),
            ));
        }
        let alarm = match self.lease.take() {
            Some(alarm) => alarm,
            None => sys::boot_alarm()?,
        };
        sys::set_alarm(&alarm, until)?;
        self.lease = Some(alarm);
        Ok(Ok(()))
    }

    /// What this kernel's clock reads when the agent's reads `at`.
    fn in_own_clock(&self, at: Duration) -> Option<Duration> {
        match &self.machine {
            None => Some(at),
            Some(machine) => machine.in_own_clock(at),
        }
    }

    /// Whether there is still something that the lease's end would end.
    pub(super) fn lease_counts(&self) -> bool {
        matches!(self.phase, Phase::Waiting | Phase::Running | Phase::Terminating { .. })
    }

    pub(super) fn lease_ended(&mut self) {
        self.cut_by_kill(Ending::Expired);
    }
}
