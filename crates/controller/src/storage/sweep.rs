//! Deletes what has had its time: first the rows, then the blobs that nothing refers to, then the objects.
//!
//! Several replicas may sweep at once: every step is one conditional statement, or may be done twice.

use std::time::Duration;

use sealci_service::problem::chain;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::upload::now_ms;
use super::{Storage, StorageError};

const EVERY: Duration = Duration::from_secs(60 * 60);
const ROWS_AT_ONCE: u64 = 500;

/// What a sweep deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    pub artifacts: u64,
    pub cache_entries: u64,
    pub blobs: u64,
    pub objects: u64,
}

impl Storage {
    /// Sweeps every hour, and looks at the caches' budget whenever one has grown, until told to stop.
    pub async fn keep_swept(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let swept = tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => stop.run_until_cancelled(self.sweep(now_ms())).await,
                () = self.0.grown.notified() => {
                    let fitting = self.fit_caches();
                    let fitted = stop.run_until_cancelled(fitting).await;
                    fitted.map(|done| done.map(|cache_entries| Swept { cache_entries, ..Swept::default() }))
                }
            };
            match swept {
                None => return,
                Some(Ok(swept)) if swept == Swept::default() => {}
                Some(Ok(swept)) => tracing::info!(
                    artifacts = swept.artifacts,
                    cache.entries = swept.cache_entries,
                    blobs = swept.blobs,
                    objects = swept.objects,
                    "what had expired is deleted"
                ),
                // What is left is found again the next time.
                Some(Err(error)) => {
                    tracing::warn!(error = %chain(&error), "not all that has expired is deleted")
                }
            }
        }
    }

    /// Deletes all that has had its time by `now_ms`.
    pub async fn sweep(&self, now_ms: i64) -> Result<Swept, StorageError> {
        let inner = &self.0;
        let before =
            |age: Duration| now_ms.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let (artifacts, mut cache_entries) =
            inner.store.delete_expired(now_ms, before(inner.config.keep_caches)).await?;
        cache_entries += self.fit_caches().await?;
        let mut swept = Swept { artifacts, cache_entries, ..Swept::default() };
        let before = before(inner.config.delete_after);
        loop {
            let unreferenced = inner.store.unreferenced_blobs(before, ROWS_AT_ONCE).await?;
            let mut released = 0;
            for digest in &unreferenced {
                released += u64::from(inner.store.release_blob(digest, before).await?);
            }
            swept.blobs += released;
            if released == 0 || (unreferenced.len() as u64) < ROWS_AT_ONCE {
                break;
            }
        }
        loop {
            let loose = inner.store.loose_objects(before, ROWS_AT_ONCE).await?;
            for row in &loose {
                inner.objects.delete(&row.object, row.multipart.as_deref()).await?;
                inner.store.drop_loose(&row.object).await?;
                swept.objects += 1;
            }
            if (loose.len() as u64) < ROWS_AT_ONCE {
                return Ok(swept);
            }
        }
    }

    /// Deletes the longest unused entries of caches, until the others fit into the budget; how many.
    async fn fit_caches(&self) -> Result<u64, StorageError> {
        let (mut taken, mut deleted, mut below) = (0_u64, 0, None);
        loop {
            let page = self.0.store.list_caches(None, below, ROWS_AT_ONCE).await?;
            for row in &page {
                taken = taken.saturating_add(row.size_bytes.unsigned_abs());
                if taken > self.0.config.cache_budget_bytes {
                    deleted += u64::from(self.0.store.delete_cache(row.id).await?);
                }
            }
            match page.last() {
                Some(last) if page.len() as u64 == ROWS_AT_ONCE => below = Some((last.last_used_at, last.id)),
                _ => return Ok(deleted),
            }
        }
    }
}
