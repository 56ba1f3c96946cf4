//! Decides what of an attempt is to be sent next on one stream, and when to send it again. Pure: the time comes in.
//!
//! ```text
//!        acked        next
//!   ───────┼────────────┼──────────────▶ sequence / offset
//!   recorded │ on its way │ to be sent
//! ```
//!
//! The cursor goes back to what is acknowledged when an acknowledgement says so, or when none has moved it for too long.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// When to send again.
#[derive(Debug, Clone, Copy)]
pub struct ResendRules {
    /// Without progress for so long, everything unacknowledged is sent again.
    pub without_progress: Duration,
    /// After an acknowledgement that moved nothing, and no progress for so long, likewise. Not at once: such
    /// acknowledgements come in bursts, one for each message that was too early.
    pub when_told: Duration,
}

impl Default for ResendRules {
    fn default() -> Self {
        Self { without_progress: Duration::from_secs(10), when_told: Duration::from_millis(500) }
    }
}

/// How far one attempt is sent on one stream.
#[derive(Debug)]
pub struct Cursor {
    acked_sequence: u64,
    acked_offset: u64,
    next_sequence: u64,
    next_offset: u64,
    /// Where the log messages on their way end. The other side records whole messages only.
    message_ends: VecDeque<u64>,
    /// When something was last acknowledged, or first put on its way.
    progressed_at: Instant,
    told_at: Option<Instant>,
}

impl Cursor {
    /// Begins a stream: everything unacknowledged is to be sent.
    pub fn new(acked: (u64, u64), now: Instant) -> Self {
        Self {
            acked_sequence: acked.0,
            acked_offset: acked.1,
            next_sequence: acked.0,
            next_offset: acked.1,
            message_ends: VecDeque::new(),
            progressed_at: now,
            told_at: None,
        }
    }

    /// The event to be sent next, once there is one with this sequence.
    pub fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Where the log message to be sent next begins.
    pub fn next_offset(&self) -> u64 {
        self.next_offset
    }

    fn is_outstanding(&self) -> bool {
        self.next_sequence > self.acked_sequence || self.next_offset > self.acked_offset
    }

    pub fn sent_event(&mut self, now: Instant) {
        self.begin_waiting(now);
        self.next_sequence += 1;
    }

    pub fn sent_log(&mut self, to: u64, now: Instant) {
        self.begin_waiting(now);
        self.next_offset = to;
        self.message_ends.push_back(to);
    }

    fn begin_waiting(&mut self, now: Instant) {
        if !self.is_outstanding() {
            self.progressed_at = now;
        }
    }

    /// Takes an acknowledgement in.
    pub fn acknowledged(&mut self, next_sequence: u64, next_offset: u64, now: Instant) {
        let moved = next_sequence > self.acked_sequence || next_offset > self.acked_offset;
        if next_sequence > self.acked_sequence {
            self.acked_sequence = next_sequence;
            self.next_sequence = self.next_sequence.max(next_sequence);
        }
        if next_offset > self.acked_offset {
            self.acked_offset = next_offset;
            self.realign(next_offset);
        }
        if moved {
            self.progressed_at = now;
            self.told_at = None;
        } else if self.is_outstanding() {
            self.told_at.get_or_insert(now);
        }
    }

    /// Recorded up to the middle of a message: by an earlier stream, in other pieces. That message is refused, and
    /// what follows it comes too early, so the cursor goes back there.
    fn realign(&mut self, recorded: u64) {
        let mut last = None;
        while let Some(end) = self.message_ends.pop_front_if(|end| *end <= recorded) {
            last = Some(end);
        }
        if self.next_offset < recorded || (last != Some(recorded) && !self.message_ends.is_empty()) {
            self.next_offset = recorded;
            self.message_ends.clear();
        }
    }

    /// Goes back to what is acknowledged, if it is time to. Says whether it did.
    pub fn rewind_if_due(&mut self, rules: &ResendRules, now: Instant) -> bool {
        let waited = now.saturating_duration_since(self.progressed_at);
        let due = waited >= rules.without_progress
            || self.told_at.is_some_and(|told| now.saturating_duration_since(told) >= rules.when_told);
        if !due || !self.is_outstanding() {
            return false;
        }
        self.next_sequence = self.acked_sequence;
        self.next_offset = self.acked_offset;
        self.message_ends.clear();
        self.progressed_at = now;
        self.told_at = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn rules() -> ResendRules {
        ResendRules::default()
    }

    #[test]
    fn what_is_not_acknowledged_for_ten_seconds_is_sent_again() {
        let start = Instant::now();
        let mut cursor = Cursor::new((0, 0), start);
        let idle = start + Duration::from_secs(60);
        assert!(!cursor.rewind_if_due(&rules(), idle), "nothing is outstanding");
        cursor.sent_event(idle);
        cursor.sent_log(100, idle);
        assert!(!cursor.rewind_if_due(&rules(), idle + Duration::from_secs(9)));
        cursor.acknowledged(1, 0, idle + Duration::from_secs(9));
        assert!(!cursor.rewind_if_due(&rules(), idle + Duration::from_secs(11)));
        assert!(cursor.rewind_if_due(&rules(), idle + Duration::from_secs(19)));
        assert_eq!((cursor.next_sequence(), cursor.next_offset()), (1, 0));
    }

    #[test]
    fn an_acknowledgement_that_moves_nothing_brings_it_forward_once() {
        let start = Instant::now();
        let mut cursor = Cursor::new((3, 50), start);
        cursor.sent_event(start);
        for _ in 0..10 {
            cursor.acknowledged(3, 50, start);
        }
        assert!(!cursor.rewind_if_due(&rules(), start));
        let later = start + Duration::from_millis(500);
        assert!(cursor.rewind_if_due(&rules(), later));
        assert_eq!(cursor.next_sequence(), 3);
        assert!(!cursor.rewind_if_due(&rules(), later + Duration::from_millis(500)));
    }

    #[test]
    fn a_record_that_ends_within_a_message_is_gone_on_from_there() {
        let start = Instant::now();
        let mut cursor = Cursor::new((0, 0), start);
        cursor.sent_log(100, start);
        cursor.sent_log(200, start);
        cursor.acknowledged(0, 150, start);
        assert_eq!(cursor.next_offset(), 150);
    }

    #[test]
    fn what_a_former_stream_delivered_is_not_sent() {
        let start = Instant::now();
        let mut cursor = Cursor::new((0, 0), start);
        cursor.acknowledged(4, 1000, start);
        assert_eq!((cursor.next_sequence(), cursor.next_offset()), (4, 1000));
    }

    proptest! {
        /// The other side records only what continues its record, message by message, as `Attempt::record_log` does;
        /// messages and acknowledgements get lost. In the end it has everything.
        #[test]
        fn a_log_arrives_whole_whatever_gets_lost(
            sizes in vec(1_u64..100, 1..30),
            arrives in vec(any::<bool>(), 200),
            recorded in 0_u64..200,
        ) {
            let length = 1000;
            let (mut recorded, mut now) = (recorded, Instant::now());
            let mut cursor = Cursor::new((0, 0), now);
            let mut sizes = sizes.into_iter().cycle();
            let mut arrives = arrives.into_iter().chain(std::iter::repeat(true));
            let mut steps = 0;
            while recorded < length {
                steps += 1;
                prop_assert!(steps < 10_000, "no end, recorded {recorded}");
                now += Duration::from_millis(100);
                if cursor.next_offset() < length {
                    let from = cursor.next_offset();
                    let to = (from + sizes.next().unwrap_or(1)).min(length);
                    cursor.sent_log(to, now);
                    if arrives.next() == Some(true) {
                        if from == recorded {
                            recorded = to;
                        }
                        if arrives.next() == Some(true) {
                            cursor.acknowledged(0, recorded, now);
                        }
                    }
                }
                cursor.rewind_if_due(&rules(), now);
            }
        }
    }
}
