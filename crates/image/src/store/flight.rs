//! Lets many wait for one piece of work.
//!
//! No task is spawned: whoever waits drives the work, and when one goes away the next who waits goes on with it. When nobody waits
//! any more it is dropped, and what it held is given back.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{Shared, WeakShared};
use tokio::sync::watch;

use super::Notes;
use crate::error::ImageError;

type Work<T> = Pin<Box<dyn Future<Output = Result<T, ImageError>> + Send>>;

/// What the work says while it goes on, for all who wait.
#[derive(Clone, Default)]
pub(super) struct Told(Arc<watch::Sender<Vec<Arc<str>>>>);

/// Of one piece of work; what is said beyond it is repetition.
const MOST_LINES: usize = 200;

impl Told {
    pub fn tell(&self, line: String) {
        self.0.send_modify(|lines| {
            if lines.len() < MOST_LINES {
                lines.push(line.into());
            }
        });
    }
}

/// Work that goes on for as long as somebody waits.
type UnderWay<T> = (WeakShared<Work<T>>, Told);

pub(super) struct Flights<T: Clone> {
    under_way: Mutex<HashMap<String, UnderWay<T>>>,
}

impl<T: Clone> Default for Flights<T> {
    fn default() -> Self {
        Self { under_way: Mutex::default() }
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// Waits for the work of this name, and starts it where nobody has.
    pub async fn join(
        &self,
        name: &str,
        notes: &dyn Notes,
        start: impl FnOnce(Told) -> Work<T>,
    ) -> Result<T, ImageError> {
        let (work, told) = self.board(name, start);
        let mut lines = told.0.subscribe();
        let mut heard = 0;
        tokio::pin!(work);
        loop {
            let fresh: Vec<_> = lines.borrow_and_update().get(heard..).unwrap_or_default().to_vec();
            heard += fresh.len();
            fresh.iter().for_each(|line| notes.note(line));
            tokio::select! {
                biased;
                result = &mut work => {
                    lines.borrow().get(heard..).unwrap_or_default().iter().for_each(|line| notes.note(line));
                    return result;
                }
                changed = lines.changed() => if changed.is_err() {
                    return work.await;
                },
            }
        }
    }

    fn board(&self, name: &str, start: impl FnOnce(Told) -> Work<T>) -> (Shared<Work<T>>, Told) {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((work, told)) = under_way.get(name)
            && let Some(work) = work.upgrade()
        {
            return (work, told.clone());
        }
        under_way.retain(|_, (work, _)| work.upgrade().is_some());
        let told = Told::default();
        let work = start(told.clone()).shared();
        if let Some(weak) = work.downgrade() {
            under_way.insert(name.to_owned(), (weak, told.clone()));
        }
        (work, told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::Notify;

    #[tokio::test]
    async fn one_does_the_work_for_all_and_the_next_goes_on_when_it_leaves() {
        let flights = Arc::new(Flights::<u32>::default());
        let (starts, go) = (Arc::new(AtomicU32::new(0)), Arc::new(Notify::new()));
        let join = |heard: Arc<Mutex<Vec<String>>>| {
            let (flights, starts, go) = (flights.clone(), starts.clone(), go.clone());
            async move {
                let notes = move |line: &str| heard.lock().unwrap().push(line.to_owned());
                let work = |told: Told| -> Work<u32> {
                    Box::pin(async move {
                        starts.fetch_add(1, Ordering::SeqCst);
                        told.tell("begun".to_owned());
                        go.notified().await;
                        told.tell("done".to_owned());
                        Ok(7)
                    })
                };
                flights.join("a", &notes, work).await.unwrap()
            }
        };
        let heard = Arc::new(Mutex::new(Vec::new()));
        let mut first = Box::pin(join(Arc::default()));
        let mut second = Box::pin(join(heard.clone()));
        assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
        drop(first);
        go.notify_one();
        assert_eq!(second.await, 7);
        assert_eq!(starts.load(Ordering::SeqCst), 1);
        assert_eq!(*heard.lock().unwrap(), ["begun", "done"]);
        // Nobody is left: the next one starts anew.
        go.notify_one();
        assert_eq!(join(Arc::default()).await, 7);
        assert_eq!(starts.load(Ordering::SeqCst), 2);
    }
}
