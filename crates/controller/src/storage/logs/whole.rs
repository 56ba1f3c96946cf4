//! Tells which logs have become whole, from who commits them to who moves them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use sealci_core::ids::AttemptId;
use tokio::sync::Notify;

/// So many are remembered; where there are more, the database is looked through for them.
const REMEMBERED: usize = 4096;

/// The logs that became whole and have not been taken yet. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct WholeLogs(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    known: Mutex<Known>,
    news: Notify,
}

#[derive(Debug, Default)]
struct Known {
    logs: VecDeque<AttemptId>,
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
    /// One has become whole.
    pub fn add(&self, log: AttemptId) {
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.logs.len() < REMEMBERED {
            known.logs.push_back(log);
        } else {
            known.others = true;
        }
        drop(known);
        self.0.news.notify_one();
    }

    /// There may be some that nobody told of.
    pub fn look(&self) {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner).others = true;
        self.0.news.notify_one();
    }

    /// Takes at most `limit`.
    pub fn take(&self, limit: usize) -> Wanted {
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut known.others) {
            known.logs.clear();
            return Wanted::All;
        }
        let count = known.logs.len().min(limit);
        match count {
            0 => Wanted::Nothing,
            _ => Wanted::These(known.logs.drain(..count).collect()),
        }
    }

    /// Waits until there is something to take.
    pub async fn news(&self) {
        self.0.news.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;

    #[test]
    fn what_is_too_much_to_remember_is_looked_for() {
        let log = |number| AttemptId { action: ActionId::from_parts(1, &[1; 10]), number };
        let whole = WholeLogs::default();
        assert_eq!(whole.take(2), Wanted::Nothing);
        (1..=3).for_each(|number| whole.add(log(number)));
        assert_eq!(whole.take(2), Wanted::These(vec![log(1), log(2)]));
        assert_eq!(whole.take(2), Wanted::These(vec![log(3)]));
        (0..=4096).for_each(|number| whole.add(log(number)));
        assert_eq!(whole.take(2), Wanted::All);
        assert_eq!(whole.take(2), Wanted::Nothing);
    }
}
