//! Lets people of this machine run programs in the actions and services that run here, over a unix socket in the agent's folder.
//!
//! Who may enter is who may do so anyway: the agent's own user and root, by the file's mode and by the peer's credentials. There is no
//! way in from elsewhere. A program ends with its action, or with whoever started it; what it is told and says goes by no log.

mod door;
pub mod wire;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sealci_core::ids::AttemptId;

use crate::executor::door::Door;
pub(crate) use door::serve;

/// The socket's name in an agent's data folder.
pub const SOCKET_NAME: &str = "sealci-exec.sock";

/// Where the agent with this data folder is entered.
pub fn socket_of(data_folder: &Path) -> PathBuf {
    data_folder.join(SOCKET_NAME)
}

/// The actions that run here and can be entered. Its clones are the same.
#[derive(Debug, Clone, Default)]
pub(crate) struct Entries(Arc<Mutex<BTreeMap<AttemptId, Entry>>>);

/// One action.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub action: String,
    pub pipeline: String,
    pub door: Door,
    /// By their names.
    pub services: Vec<(String, Door)>,
}

/// An action that can be entered while this lives.
#[derive(Debug)]
pub(crate) struct Entered {
    entries: Entries,
    attempt: AttemptId,
}

impl Entries {
    pub fn add(&self, attempt: AttemptId, entry: Entry) -> Entered {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(attempt, entry);
        Entered { entries: self.clone(), attempt }
    }

    fn all(&self) -> Vec<(AttemptId, Entry)> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.iter().map(|(attempt, entry)| (*attempt, entry.clone())).collect()
    }

    fn find(&self, attempt: &str) -> Option<Entry> {
        self.all().into_iter().find(|(id, _)| id.to_string() == attempt).map(|(_, entry)| entry)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.entries.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.attempt);
    }
}
