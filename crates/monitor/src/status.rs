//! Keeps how the last polls and deliveries went, for those who ask. In memory: after a restart everything is tried
//! again at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sealci_core::ids::ConfigurationId;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// A poll that has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LastPoll {
    pub at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What became of an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastDelivery {
    pub at: String,
    pub r#ref: String,
    pub revision: String,
    pub outcome: DeliveryOutcome,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pipeline_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryOutcome {
    Accepted,
    Refused,
    Failing,
}

/// What is known of one configuration's tasks.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub last_poll: Option<LastPoll>,
    /// Set while deliveries fail; what was delivered is in the database.
    pub failing: Option<LastDelivery>,
    /// Asks for a poll at once. Kept over restarts of the task, so that no wish is lost.
    pub poke: Arc<Notify>,
}

/// The status of every configuration that was ever started.
#[derive(Debug, Default)]
pub struct StatusBoard {
    entries: Mutex<HashMap<ConfigurationId, Status>>,
}

impl StatusBoard {
    pub fn of(&self, id: ConfigurationId) -> Status {
        self.lock().entry(id).or_default().clone()
    }

    pub fn note_poll(&self, id: ConfigurationId, poll: LastPoll) {
        self.lock().entry(id).or_default().last_poll = Some(poll);
    }

    pub fn note_failing(&self, id: ConfigurationId, failing: Option<LastDelivery>) {
        self.lock().entry(id).or_default().failing = failing;
    }

    pub fn forget(&self, id: ConfigurationId) {
        self.lock().remove(&id);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ConfigurationId, Status>> {
        // Every change is one assignment, so a panic elsewhere leaves nothing half done.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time, as the API shows it.
pub fn now() -> String {
    jiff::Timestamp::now().to_string()
}
