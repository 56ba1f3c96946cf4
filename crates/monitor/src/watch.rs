//! Keeps one task running for every configuration that is enabled, and none for any other.
//!
//! The database says what should run; [`run`] compares that with what does, whenever something changed and every now and
//! then, so a wish that got lost on its way is found a little later.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sealci_core::ids::ConfigurationId;
use sealci_git::Git;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::configuration::Settings;
use crate::sink::EventSink;
use crate::status::StatusBoard;
use crate::store::{Store, StoreError, Stored};
use crate::{deliver, poll};

/// How often the tasks are compared with the database although nothing is known to have changed.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(20);

/// What all tasks and the API share.
pub struct Watch {
    pub config: Config,
    pub store: Store,
    pub git: Git,
    pub sink: Arc<dyn EventSink>,
    pub board: StatusBoard,
    /// How many repositories may be asked at the same time.
    pub polls: Semaphore,
    changed: Notify,
}

impl Watch {
    pub fn new(config: Config, store: Store, git: Git, sink: Arc<dyn EventSink>) -> Self {
        let polls = Semaphore::new(config.max_concurrent_polls.max(1));
        Self { config, store, git, sink, board: StatusBoard::default(), polls, changed: Notify::new() }
    }

    /// Tells [`run`] that the database says something new.
    pub fn configurations_changed(&self) {
        self.changed.notify_one();
    }

    /// Has a repository looked at now.
    pub fn poke(&self, id: ConfigurationId) {
        self.board.of(id).poke.notify_one();
    }
}

/// A configuration's task.
struct Running {
    settings: Settings,
    stop: CancellationToken,
}

/// Runs until `shutdown` is cancelled; every task has ended when this returns.
pub async fn run(watch: Arc<Watch>, shutdown: &CancellationToken) {
    let mut running: HashMap<ConfigurationId, Running> = HashMap::new();
    let mut tasks: JoinSet<ConfigurationId> = JoinSet::new();
    let mut owners: HashMap<tokio::task::Id, ConfigurationId> = HashMap::new();
    while !shutdown.is_cancelled() {
        match watch.store.all().await {
            Ok(wanted) => {
                for stored in reconcile(&watch, &mut running, wanted) {
                    let stop = shutdown.child_token();
                    let id = stored.id;
                    running.insert(id, Running { settings: stored.settings.clone(), stop: stop.clone() });
                    let task = tasks.spawn(watch_one(Arc::clone(&watch), stored, stop));
                    owners.insert(task.id(), id);
                }
            }
            Err(error) => {
                tracing::error!(error = &error as &dyn std::error::Error, "cannot read what to watch")
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = watch.changed.notified() => {}
            () = tokio::time::sleep(RECONCILE_INTERVAL) => {}
            Some(ended) = tasks.join_next_with_id() => {
                let task = match &ended {
                    Ok((task, _)) => *task,
                    Err(error) => error.id(),
                };
                if let Some(id) = owners.remove(&task) {
                    running.remove(&id);
                    if let Err(error) = ended {
                        tracing::error!(configuration.id = %id, %error, "the task of a configuration broke down");
                        // A breakdown that repeats must not spin.
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
        }
    }
    while tasks.join_next().await.is_some() {}
}

/// Stops what should not run as it does, and returns what should be started. What was stopped is started again once it
/// has ended: a configuration never has two tasks.
fn reconcile(
    watch: &Watch,
    running: &mut HashMap<ConfigurationId, Running>,
    wanted: Vec<Stored>,
) -> Vec<Stored> {
    let wanted: HashMap<ConfigurationId, Stored> =
        wanted.into_iter().map(|stored| (stored.id, stored)).collect();
    for (id, task) in running.iter() {
        let stays =
            wanted.get(id).is_some_and(|stored| stored.settings == task.settings && stored.settings.enabled);
        if !stays {
            task.stop.cancel();
        }
        if !wanted.contains_key(id) {
            watch.board.forget(*id);
        }
    }
    wanted
        .into_values()
        .filter(|stored| stored.settings.enabled && !running.contains_key(&stored.id))
        .collect()
}

/// Polls and delivers for one configuration until told to stop.
async fn watch_one(watch: Arc<Watch>, stored: Stored, stop: CancellationToken) -> ConfigurationId {
    let id = stored.id;
    let found = Notify::new();
    let work = async {
        tokio::join!(poll::repeatedly(&watch, &stored, &found), deliver::repeatedly(&watch, &stored, &found));
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
    id
}

/// Whether the configuration was changed under a task, which is then about to be stopped.
pub fn is_superseded(error: &StoreError) -> bool {
    matches!(error, StoreError::Superseded)
}
