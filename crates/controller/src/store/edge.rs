//! Marks the edges of every commit that the truth depends on, where a test ends the process to see what comes of it. Without the
//! feature `testing` there is nothing at them.

use super::Store;

impl Store {
    /// Writes, by a statement of its own or a transaction's commit. Dropped at the edge before it, nothing is written; at the
    /// one after it, nobody knows that something is.
    pub(super) async fn write<T, E>(&self, write: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        #[cfg(feature = "testing")]
        self.edges.reached().await;
        let written = write.await?;
        #[cfg(feature = "testing")]
        self.edges.reached().await;
        Ok(written)
    }
}

#[cfg(feature = "testing")]
pub use testing::Edges;

#[cfg(feature = "testing")]
mod testing {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use tokio::sync::Notify;

    /// The edges that a process has come to, and the one that it does not come past. Cheap to clone.
    #[derive(Debug, Clone, Default)]
    pub struct Edges(Arc<Inner>);

    #[derive(Debug, Default)]
    struct Inner {
        /// Two for each commit: before it and after it.
        reached: AtomicU64,
        /// Counted from 1; 0: none.
        last: AtomicU64,
        is_over: AtomicBool,
        over: Notify,
    }

    impl Edges {
        /// How many were reached so far.
        pub fn count(&self) -> u64 {
            self.0.reached.load(Ordering::SeqCst)
        }

        /// The process ends at the edge with this number, counted from 1.
        pub fn end_at(&self, edge: u64) {
            self.0.last.store(edge, Ordering::SeqCst);
        }

        /// Waits until that edge is reached.
        pub async fn over(&self) {
            while !self.0.is_over.load(Ordering::SeqCst) {
                self.0.over.notified().await;
            }
        }

        /// What ended is begun again: nothing ends any more.
        pub fn begin_again(&self) {
            self.0.last.store(0, Ordering::SeqCst);
            self.0.is_over.store(false, Ordering::SeqCst);
        }

        pub(in crate::store) async fn reached(&self) {
            let edge = self.0.reached.fetch_add(1, Ordering::SeqCst) + 1;
            if edge == self.0.last.load(Ordering::SeqCst) {
                self.0.is_over.store(true, Ordering::SeqCst);
                self.0.over.notify_one();
            }
            if self.0.is_over.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
        }
    }
}
