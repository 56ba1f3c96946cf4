//! Deletes what has had its time: first the rows, then the blobs that nothing refers to, and the objects of all of it.
//!
//! Several replicas may sweep at once: every step is one conditional statement, or may be done twice. A dry run asks the same
//! questions and deletes nothing.

use std::time::Duration;

use sealci_service::problem::chain;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::upload::now_ms;
use super::{Inner, Storage, StorageError};
use crate::store::entity::storage::finished_logs;
use crate::store::{CacheCursor, Due};

const EVERY: Duration = Duration::from_secs(60 * 60);
const ROWS_AT_ONCE: u64 = 500;
/// What is deleted of logs in one commit.
const LOGS_AT_ONCE: u64 = 200;

/// What a sweep deleted, or would delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swept {
    pub artifacts: u64,
    pub cache_entries: u64,
    pub logs: u64,
    pub blobs: u64,
    /// In the object store; those of the logs and blobs among them.
    pub objects: u64,
    /// What the objects took.
    pub freed_bytes: u64,
}

/// Whether a sweep deletes, or only says what it would delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    Delete,
    Dry,
}

impl Storage {
    /// Sweeps every hour, and looks at a budget whenever what it is for has grown, until told to stop.
    pub async fn keep_swept(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let swept = tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {
                    // A replica that is gone may have left some.
                    self.0.whole_logs.look();
                    stop.run_until_cancelled(self.sweep(now_ms(), Sweep::Delete)).await
                }
                () = self.0.grown.notified() => stop.run_until_cancelled(self.fit_caches()).await,
                () = self.0.logs_grown.notified() => {
                    let mut swept = Swept::default();
                    let fitting = self.0.sweep_logs(now_ms(), Sweep::Delete, &mut swept);
                    stop.run_until_cancelled(fitting).await.map(|done| done.map(|()| swept))
                }
            };
            match swept {
                None => return,
                Some(Ok(swept)) if swept == Swept::default() => {}
                Some(Ok(swept)) => tracing::info!(
                    artifacts = swept.artifacts,
                    cache.entries = swept.cache_entries,
                    logs = swept.logs,
                    blobs = swept.blobs,
                    objects = swept.objects,
                    freed.bytes = swept.freed_bytes,
                    "what had expired is deleted"
                ),
                // What is left is found again the next time.
                Some(Err(error)) => {
                    tracing::warn!(error = %chain(&error), "not all that has expired is deleted")
                }
            }
        }
    }

    /// Deletes all that has had its time by `now_ms`; of a dry run, says what that is.
    pub async fn sweep(&self, now_ms: i64, sweep: Sweep) -> Result<Swept, StorageError> {
        let inner = &self.0;
        let due = inner.due(now_ms).await?;
        let (artifacts, cache_entries) = match sweep {
            Sweep::Delete => inner.store.delete_due(&due).await?,
            Sweep::Dry => inner.store.count_due(&due).await?,
        };
        let mut swept = Swept { artifacts, cache_entries, ..Swept::default() };
        inner.sweep_logs(now_ms, sweep, &mut swept).await?;
        inner.sweep_blobs(&due, sweep, &mut swept).await?;
        inner.sweep_objects(&due, sweep, &mut swept).await?;
        Ok(swept)
    }

    /// Deletes the longest unused entries of caches, until the others fit into the budget.
    async fn fit_caches(&self) -> Result<Swept, StorageError> {
        let due = Due { artifacts_until_ms: i64::MIN, ..self.0.due(now_ms()).await? };
        let (_, cache_entries) = self.0.store.delete_due(&due).await?;
        Ok(Swept { cache_entries, ..Swept::default() })
    }
}

impl Inner {
    async fn due(&self, now_ms: i64) -> Result<Due, StorageError> {
        Ok(Due {
            artifacts_until_ms: now_ms,
            caches_before_ms: before(now_ms, self.config.keep_caches),
            caches_from: self.first_cache_over_budget().await?,
            loose_before_ms: before(now_ms, self.config.delete_after),
        })
    }

    /// The last used entry of those that do not fit into the budget any more.
    async fn first_cache_over_budget(&self) -> Result<Option<CacheCursor>, StorageError> {
        let (mut taken, mut below) = (0_u64, None);
        loop {
            let page = self.store.list_caches(None, below, ROWS_AT_ONCE).await?;
            for row in &page {
                taken = taken.saturating_add(row.size_bytes.unsigned_abs());
                if taken > self.config.cache_budget_bytes {
                    return Ok(Some((row.last_used_at, row.id)));
                }
            }
            match page.last() {
                Some(last) if page.len() as u64 == ROWS_AT_ONCE => below = Some((last.last_used_at, last.id)),
                _ => return Ok(None),
            }
        }
    }

    /// Logs that are too old, and the oldest of the others until the rest fits into the budget.
    async fn sweep_logs(&self, now_ms: i64, sweep: Sweep, swept: &mut Swept) -> Result<(), StorageError> {
        let oldest_ms = before(now_ms, self.config.keep_logs);
        let too_old = format!("logs are kept for {} here (--keep-logs)", in_words(self.config.keep_logs));
        let too_much =
            "all logs together were over this installation's budget (--logs-budget), and the oldest go first";
        let size = self.store.logs_size().await?;
        let mut over = size.saturating_sub(self.config.logs_budget_bytes);
        let mut after = None;
        loop {
            let page = self.store.oldest_logs(after, LOGS_AT_ONCE).await?;
            let (mut old, mut many) = (Vec::new(), Vec::new());
            for row in &page {
                let is_old = row.moved_at < oldest_ms;
                if !is_old && over == 0 {
                    break;
                }
                over = over.saturating_sub(row.size_bytes.unsigned_abs());
                if is_old { &mut old } else { &mut many }.push(row.clone());
            }
            let going = old.len() + many.len();
            for (logs, why) in [(old, too_old.as_str()), (many, too_much)] {
                self.go(logs, why, now_ms, sweep, swept).await?;
            }
            match page.last() {
                Some(last) if going as u64 == LOGS_AT_ONCE => {
                    after = Some((last.moved_at, last.action_id, last.number));
                }
                _ => return Ok(()),
            }
        }
    }

    /// Deletes some logs.
    async fn go(
        &self,
        logs: Vec<finished_logs::Model>,
        why: &str,
        now_ms: i64,
        sweep: Sweep,
        swept: &mut Swept,
    ) -> Result<(), StorageError> {
        let gone = match sweep {
            _ if logs.is_empty() => return Ok(()),
            Sweep::Delete => self.store.delete_logs(&logs, why, now_ms).await?,
            Sweep::Dry => logs,
        };
        for row in gone {
            if sweep == Sweep::Delete {
                self.store.drop_chunks(&row).await?;
                self.delete_loose(&row.object, None).await?;
            }
            swept.logs += 1;
            swept.objects += 1;
            swept.freed_bytes += row.size_bytes.unsigned_abs();
        }
        Ok(())
    }

    async fn sweep_blobs(&self, due: &Due, sweep: Sweep, swept: &mut Swept) -> Result<(), StorageError> {
        let mut after: Option<String> = None;
        loop {
            let page = self.store.due_blobs(due, after.as_deref(), ROWS_AT_ONCE).await?;
            for blob in &page {
                if sweep == Sweep::Delete {
                    if !self.store.release_blob(blob, due.loose_before_ms).await? {
                        continue;
                    }
                    self.delete_loose(&blob.object, None).await?;
                }
                swept.blobs += 1;
                swept.objects += 1;
                swept.freed_bytes += blob.size_bytes.unsigned_abs();
            }
            match page.last() {
                Some(last) if page.len() as u64 == ROWS_AT_ONCE => after = Some(last.digest.clone()),
                _ => return Ok(()),
            }
        }
    }

    /// What was never finished, and what could not be deleted when its row was.
    async fn sweep_objects(&self, due: &Due, sweep: Sweep, swept: &mut Swept) -> Result<(), StorageError> {
        let mut after: Option<String> = None;
        loop {
            let page = self.store.due_objects(due, after.as_deref(), ROWS_AT_ONCE).await?;
            for row in &page {
                let size_bytes = self.objects.size(&row.object).await?;
                if sweep == Sweep::Delete {
                    self.delete_loose(&row.object, row.multipart.as_deref()).await?;
                }
                swept.objects += 1;
                swept.freed_bytes += size_bytes.unwrap_or(0);
            }
            match page.last() {
                Some(last) if page.len() as u64 == ROWS_AT_ONCE => after = Some(last.object.clone()),
                _ => return Ok(()),
            }
        }
    }

    /// Deletes an object that nothing stands for.
    async fn delete_loose(&self, object: &str, multipart: Option<&str>) -> Result<(), StorageError> {
        self.objects.delete(object, multipart).await?;
        Ok(self.store.drop_loose(object).await?)
    }
}

fn before(now_ms: i64, age: Duration) -> i64 {
    now_ms.saturating_sub(i64::try_from(age.as_millis()).unwrap_or(i64::MAX))
}

/// A time as the command line takes it.
fn in_words(time: Duration) -> String {
    let seconds = time.as_secs();
    let units = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
    let fitting = units.iter().find(|(length, _)| seconds > 0 && seconds.is_multiple_of(*length));
    fitting.map_or_else(|| "0s".to_owned(), |(length, unit)| format!("{}{unit}", seconds / length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_they_were_given() {
        for (seconds, words) in
            [(90 * 86_400, "90d"), (36 * 3600, "36h"), (1800, "30m"), (7, "7s"), (0, "0s")]
        {
            assert_eq!(in_words(Duration::from_secs(seconds)), words);
        }
    }
}
