//! Wakes those who follow something that changes. A wake-up says that there is something to read, not what.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use sealci_core::ids::{AttemptId, PipelineId};
use tokio::sync::watch;

/// Keys that nobody follows any more, and that never changed again, are forgotten once there are so many.
const PRUNE_ABOVE: usize = 1024;

/// Who follows which pipeline, and which log.
#[derive(Debug, Clone, Default)]
pub struct Watchers {
    /// Woken by every change of the pipeline, its actions or attempts.
    pub pipelines: Topics<PipelineId>,
    /// Woken when the log grew or is whole.
    pub logs: Topics<AttemptId>,
}

impl Watchers {
    /// Wakes everybody: something may have changed that nobody heard of.
    pub fn wake_all(&self) {
        self.pipelines.wake_all();
        self.logs.wake_all();
    }
}

/// One wake-up channel for each key that someone follows.
#[derive(Debug)]
pub struct Topics<K>(Arc<Mutex<HashMap<K, watch::Sender<()>>>>);

impl<K> Clone for Topics<K> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<K> Default for Topics<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K: Eq + Hash> Topics<K> {
    /// Follows a key. What changed before this call wakes nobody: subscribe first, then read.
    pub fn subscribe(&self, key: K) -> watch::Receiver<()> {
        let mut topics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if topics.len() >= PRUNE_ABOVE {
            topics.retain(|_, topic| topic.receiver_count() > 0);
        }
        topics.entry(key).or_insert_with(|| watch::channel(()).0).subscribe()
    }

    fn wake_all(&self) {
        let mut topics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        topics.retain(|_, topic| topic.send(()).is_ok());
    }

    /// Wakes the key's followers; forgets the key when it has none.
    pub fn wake(&self, key: &K) {
        let mut topics = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if topics.get(key).is_some_and(|topic| topic.send(()).is_err()) {
            topics.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wake_up_reaches_those_who_follow_and_no_others() {
        let topics = Topics::<u8>::default();
        let (mut one, two) = (topics.subscribe(1), topics.subscribe(2));
        topics.wake(&1);
        one.changed().await.unwrap();
        assert!(!two.has_changed().unwrap());
        drop(one);
        topics.wake(&1);
        assert!(!topics.0.lock().unwrap().contains_key(&1), "nobody follows it: it is forgotten");
    }
}
