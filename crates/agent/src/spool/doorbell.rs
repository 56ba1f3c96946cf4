//! Tells the session which attempts have something new to say, without ever making an attempt wait for it.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use sealci_core::ids::AttemptId;
use tokio::sync::Notify;

/// A set of attempts, and a bell. It is level-triggered: ringing twice is ringing once, and what rang while nobody
/// listened is heard later.
#[derive(Debug, Default)]
pub struct Doorbell {
    rung: Mutex<BTreeSet<AttemptId>>,
    bell: Notify,
}

impl Doorbell {
    pub fn ring(&self, attempt: AttemptId) {
        if self.rung.lock().unwrap_or_else(PoisonError::into_inner).insert(attempt) {
            self.bell.notify_one();
        }
    }

    /// Takes all that have rung so far.
    pub fn rung(&self) -> BTreeSet<AttemptId> {
        std::mem::take(&mut *self.rung.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until an attempt has rung; takes all that have. Cancel-safe: what is not returned stays rung.
    pub async fn answered(&self) -> BTreeSet<AttemptId> {
        loop {
            let rung = self.rung();
            if !rung.is_empty() {
                return rung;
            }
            self.bell.notified().await;
        }
    }
}
