//! Asks on one stream whether exclusive attempts may go on, and works out from the answers until when. Pure: the times come in.
//!
//! A lease counts from when its question was *sent*, by the boot-time clock: whatever happens between there and the answer is
//! time in which the action has run already. Who keeps it is the action's init.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use sealci_core::ids::AttemptId;

use crate::executor::Lease;

/// So often it is asked within one lease: a few questions may get lost.
const QUESTIONS_PER_LEASE: u32 = 8;

/// So many questions without an answer are remembered.
const MOST_OPEN: usize = 32;

/// The questions of one stream.
#[derive(Debug, Default)]
pub struct Leases {
    attempts: BTreeMap<AttemptId, Asking>,
}

#[derive(Debug)]
struct Asking {
    length: Duration,
    next_at: Instant,
    last_number: u64,
    /// Number and boot time of the questions without an answer, the oldest first.
    open: VecDeque<(u64, Duration)>,
}

impl Leases {
    /// The attempt needs one of this length. Repeatable.
    pub fn keep(&mut self, id: AttemptId, length: Duration, now: Instant) {
        let asking = || Asking { length, next_at: now, last_number: 0, open: VecDeque::new() };
        self.attempts.entry(id).or_insert_with(asking);
    }

    /// The attempt needs none any more.
    pub fn forget(&mut self, id: AttemptId) {
        self.attempts.remove(&id);
    }

    /// The next question that is due: whose, and its number.
    pub fn next_question(&mut self, now: Instant, boot_time: Duration) -> Option<(AttemptId, u64)> {
        let (id, asking) = self.attempts.iter_mut().find(|(_, asking)| asking.next_at <= now)?;
        asking.next_at = now + asking.length / QUESTIONS_PER_LEASE;
        asking.last_number += 1;
        asking.open.push_back((asking.last_number, boot_time));
        if asking.open.len() > MOST_OPEN {
            asking.open.pop_front();
        }
        Some((*id, asking.last_number))
    }

    /// The lease that an answer gives; none where nothing of the kind was asked.
    pub fn answered(&mut self, id: AttemptId, number: u64) -> Option<Lease> {
        let asking = self.attempts.get_mut(&id)?;
        let position = asking.open.iter().position(|(asked, _)| *asked == number)?;
        let (_, sent_at) = asking.open.drain(..=position).next_back()?;
        let (until, longest_ms) = (sent_at + asking.length, millis(asking.length));
        Some(Lease { until_boot_ms: millis(until), longest_ms })
    }
}

/// The boot-time clock's reading: of the kernel, which all of this machine's processes share.
pub fn boot_time() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    // Every Linux since 2.6.39 has it. Without it no lease is ever long enough for anything to start.
    now.map_or(Duration::ZERO, Duration::from)
}

/// Whether anything of it is left.
pub fn is_valid(lease: Lease) -> bool {
    millis(boot_time()) < lease.until_boot_ms
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;

    const LENGTH: Duration = Duration::from_secs(40);

    fn attempt() -> AttemptId {
        AttemptId { action: ActionId::from_parts(1, &[1; 10]), number: 1 }
    }

    #[test]
    fn a_lease_counts_from_the_question_and_not_from_the_answer() {
        let (start, boot) = (Instant::now(), Duration::from_secs(1000));
        let mut leases = Leases::default();
        leases.keep(attempt(), LENGTH, start);
        assert_eq!(leases.next_question(start, boot), Some((attempt(), 1)));
        assert_eq!(leases.next_question(start, boot), None, "the next one is not due");
        let later = start + Duration::from_secs(5);
        assert_eq!(leases.next_question(later, boot + Duration::from_secs(5)), Some((attempt(), 2)));
        // However late the answers come.
        let lease = leases.answered(attempt(), 1).unwrap();
        assert_eq!(lease, Lease { until_boot_ms: 1_040_000, longest_ms: 40_000 });
        assert_eq!(leases.answered(attempt(), 2).unwrap().until_boot_ms, 1_045_000);
        assert_eq!(leases.answered(attempt(), 2), None, "an answer counts once");
    }

    #[test]
    fn an_answer_to_what_was_not_asked_gives_nothing() {
        let (start, boot) = (Instant::now(), Duration::from_secs(1000));
        let mut leases = Leases::default();
        leases.keep(attempt(), LENGTH, start);
        leases.next_question(start, boot);
        assert_eq!(leases.answered(attempt(), 2), None);
        leases.forget(attempt());
        assert_eq!(leases.answered(attempt(), 1), None);
    }

    #[test]
    fn questions_without_answers_are_bounded() {
        let (mut now, boot) = (Instant::now(), Duration::from_secs(1000));
        let mut leases = Leases::default();
        leases.keep(attempt(), LENGTH, now);
        for _ in 0..1000 {
            leases.next_question(now, boot);
            now += LENGTH;
        }
        assert_eq!(leases.attempts[&attempt()].open.len(), MOST_OPEN);
    }
}
