//! Tells which logs have become whole, from who commits them to who moves them, a while later: a log is mostly read soon after its
//! end, and nothing that can wait is done beside what people wait for.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sealci_core::ids::AttemptId;
use tokio::sync::Notify;

/// So many are remembered, in 3 MiB; where there are more, the database is looked through for them.
const REMEMBERED: usize = 1 << 16;

/// The logs that became whole and have not been taken yet. Cheap to clone.
#[derive(Debug, Clone)]
pub struct WholeLogs(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// A log is moved so long after it became whole.
    after: Duration,
    known: Mutex<Known>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// With when each is to be moved, the first first.
    logs: VecDeque<(Instant, AttemptId)>,
    /// The database holds some that are not remembered here.
    others: bool,
}

/// What is to be moved.
#[derive(Debug, PartialEq, Eq)]
pub enum Wanted {
    These(Vec<AttemptId>),
    /// All that the database holds.
    All,
    Nothing,
}

impl WholeLogs {
    /// None yet; each is to be moved so long after it became whole.
    pub fn new(after: Duration) -> Self {
        Self(Arc::new(Inner { after, known: Mutex::default(), news: Notify::new() }))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One has become whole now.
    pub fn add(&self, log: AttemptId, now: Instant) {
        let mut known = self.known();
        if known.logs.len() < REMEMBERED {
            known.logs.push_back((now + self.0.after, log));
        } else {
            known.others = true;
        }
        let is_news = known.others || known.logs.len() == 1;
        drop(known);
        if is_news {
            self.0.news.notify_one();
        }
    }

    /// There may be some that nobody told of.
    pub fn look(&self) {
        self.known().others = true;
        self.0.news.notify_one();
    }

    /// Takes at most `limit` of those that are to be moved now.
    pub fn take(&self, limit: usize, now: Instant) -> Wanted {
        let mut known = self.known();
        if std::mem::take(&mut known.others) {
            known.logs.clear();
            return Wanted::All;
        }
        let due = known.logs.iter().take(limit).take_while(|(at, _)| *at <= now).count();
        match due {
            0 => Wanted::Nothing,
            _ => Wanted::These(known.logs.drain(..due).map(|(_, log)| log).collect()),
        }
    }

    /// Waits until there may be something to take.
    pub async fn news(&self) {
        let first = {
            let known = self.known();
            if known.others {
                return;
            }
            known.logs.front().map(|(at, _)| *at)
        };
        match first {
            None => self.0.news.notified().await,
            Some(at) => tokio::select! {
                () = tokio::time::sleep_until(at.into()) => {}
                () = self.0.news.notified() => {}
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;

    #[test]
    fn what_is_too_much_to_remember_is_looked_for() {
        let log = |number| AttemptId { action: ActionId::from_parts(1, &[1; 10]), number };
        let now = Instant::now();
        let whole = WholeLogs::new(Duration::ZERO);
        assert_eq!(whole.take(2, now), Wanted::Nothing);
        (1..=3).for_each(|number| whole.add(log(number), now));
        assert_eq!(whole.take(2, now), Wanted::These(vec![log(1), log(2)]));
        assert_eq!(whole.take(2, now), Wanted::These(vec![log(3)]));
        (0..=1 << 16).for_each(|number| whole.add(log(number), now));
        assert_eq!(whole.take(2, now), Wanted::All);
        assert_eq!(whole.take(2, now), Wanted::Nothing);
    }

    #[test]
    fn a_log_waits_its_while() {
        let log = |number| AttemptId { action: ActionId::from_parts(1, &[1; 10]), number };
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let whole = WholeLogs::new(30 * second);
        whole.add(log(1), start);
        whole.add(log(2), start + 10 * second);
        assert_eq!(whole.take(2, start + 29 * second), Wanted::Nothing);
        assert_eq!(whole.take(2, start + 30 * second), Wanted::These(vec![log(1)]));
        assert_eq!(whole.take(2, start + 40 * second), Wanted::These(vec![log(2)]));
    }
}
