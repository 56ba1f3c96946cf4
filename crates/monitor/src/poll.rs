//! Looks at one repository, again and again, and records what changed.

use std::time::{Duration, Instant};

use rand::Rng as _;
use sealci_git::{InvalidRemoteUrl, Remote, RemoteError, RemoteUrl};
use sealci_service::problem::chain;
use tokio::sync::Notify;

use crate::changes::{Changes, Cursors};
use crate::status::{LastPoll, now};
use crate::store::{StoreError, Stored};
use crate::watch::{Watch, is_superseded};

/// A repository that keeps failing is looked at this seldom, or as seldom as its interval says.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// Why a look at a repository gave nothing.
#[derive(Debug, thiserror::Error)]
enum PollError {
    #[error(transparent)]
    Url(#[from] InvalidRemoteUrl),
    #[error("the service's configuration has no credentials named `{name}` any more")]
    NoCredentials { name: String },
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error("what was seen could not be recorded")]
    Store(#[from] StoreError),
}

/// Never ends by itself. Rings `found` when there is something to deliver.
pub async fn repeatedly(watch: &Watch, stored: &Stored, found: &Notify) {
    let interval = stored.settings.poll_interval.unwrap_or(watch.config.poll_interval);
    let poke = watch.board.of(stored.id).poke;
    let mut memory = Memory::Unread;
    let mut failures = 0_u32;
    loop {
        let started = Instant::now();
        let polled = once(watch, stored, &mut memory, found).await;
        let error = polled.err();
        if let Some(error) = &error {
            if let PollError::Store(error) = error
                && is_superseded(error)
            {
                // Whoever changed the configuration has this task stopped.
                return std::future::pending().await;
            }
            tracing::warn!(configuration.id = %stored.id, error = chain(error), "a poll failed");
        }
        failures = if error.is_some() { failures.saturating_add(1) } else { 0 };
        watch.board.note_poll(stored.id, LastPoll { at: now(), error: error.map(|error| chain(&error)) });
        let wait = wait_after(interval, failures, rand::rng().random_range(0.9..=1.0));
        tokio::select! {
            () = tokio::time::sleep(wait.saturating_sub(started.elapsed())) => {}
            () = poke.notified() => {}
        }
    }
}

/// From the start of one poll to the start of the next: the interval at most, so that a change is seen within it, and
/// shortened at random, so that many configurations do not march in step.
fn wait_after(interval: Duration, failures: u32, jitter: f64) -> Duration {
    let factor = 1_u32 << failures.min(16);
    interval.saturating_mul(factor).min(LONGEST_WAIT.max(interval)).mul_f64(jitter)
}

/// What the task remembers of the cursors, of which nobody else moves any.
enum Memory {
    /// To be read from the database: at the start, and when a write failed and may or may not have happened.
    Unread,
    Read(Option<Cursors>),
}

async fn once(watch: &Watch, stored: &Stored, memory: &mut Memory, found: &Notify) -> Result<(), PollError> {
    let settings = &stored.settings;
    let url = RemoteUrl::parse(&settings.repository_url, &watch.config.transports)?;
    let credentials = match &settings.credentials {
        None => watch.config.repositories.of(&settings.repository_url),
        Some(name) => watch
            .config
            .credentials
            .get(name)
            .cloned()
            .ok_or_else(|| PollError::NoCredentials { name: name.clone() })?,
    };
    let refs = {
        // The semaphore is never closed; if it were, polling without it would do no harm.
        let _place = watch.polls.acquire().await.ok();
        watch.git.ls_remote(&Remote::new(url, credentials)).await?
    };
    let before = match std::mem::replace(memory, Memory::Unread) {
        Memory::Unread => watch.store.cursors(stored.number).await?,
        Memory::Read(cursors) => cursors,
    };
    let changes = Changes::between(before.as_ref(), &refs, settings);
    if before.is_none() || !changes.is_empty() {
        watch.store.record(stored.number, &settings.repository_url, &changes).await?;
    }
    let mut cursors = before.unwrap_or_default();
    changes.apply(&mut cursors);
    *memory = Memory::Read(Some(cursors));
    if !changes.events.is_empty() {
        tracing::info!(configuration.id = %stored.id, events = changes.events.len(), "found what changed");
        found.notify_one();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_repository_is_left_alone_ever_longer() {
        let seconds = |interval, failures| wait_after(Duration::from_secs(interval), failures, 1.0).as_secs();
        assert_eq!([0, 1, 2, 3, 60].map(|failures| seconds(10, failures)), [10, 20, 40, 80, 300]);
        assert_eq!([0, 1, 60].map(|failures| seconds(3600, failures)), [3600, 3600, 3600]);
    }
}
