//! Ends an agent at one of the writes of its spool: what stood on disk at that moment is what its next process finds.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use sealci_agent::testing::{Told, tell_of_writes};
use sealci_core::ids::AttemptId;

/// The writes of a spool, counted, and the one at which its agent dies.
pub struct SpoolEnding {
    state: Arc<Mutex<State>>,
    _told: Told,
}

struct State {
    spool: PathBuf,
    copy: PathBuf,
    count: u64,
    last: u64,
    begun: Arc<Mutex<Vec<AttemptId>>>,
    /// How many attempts had begun then.
    begun_then: Option<usize>,
}

/// What an agent has left.
pub struct Left {
    copy: PathBuf,
    begun: usize,
}

impl SpoolEnding {
    /// `last`: counted from 1, before and after each write; 0: none.
    pub fn new(data: &Path, begun: Arc<Mutex<Vec<AttemptId>>>, last: u64) -> Self {
        let (spool, copy) = (data.join("spool"), data.join("left"));
        let state = State { spool: spool.clone(), copy, count: 0, last, begun, begun_then: None };
        let state = Arc::new(Mutex::new(state));
        let noting = state.clone();
        let told = tell_of_writes(&spool, move || noting.lock().unwrap().note());
        Self { state, _told: told }
    }

    pub fn count(&self) -> u64 {
        self.state.lock().unwrap().count
    }

    /// What is left, once the last write was reached.
    pub fn left(&self) -> Option<Left> {
        let state = self.state.lock().unwrap();
        Some(Left { copy: state.copy.clone(), begun: state.begun_then? })
    }
}

impl State {
    fn note(&mut self) {
        self.count += 1;
        if self.count == self.last {
            copy(&self.spool, &self.copy);
            self.begun_then = Some(self.begun.lock().unwrap().len());
        }
    }
}

impl Left {
    /// Puts the spool back as it stood.
    pub fn restore(self, data: &Path, begun: &Mutex<Vec<AttemptId>>) {
        let spool = data.join("spool");
        std::fs::remove_dir_all(&spool).unwrap();
        std::fs::rename(self.copy, spool).unwrap();
        begun.lock().unwrap().truncate(self.begun);
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}
