//! Keeps the mirrors of many repositories within a disk budget.
//!
//! ```text
//!   <root>/<sha-256 of the repository's identity>/{repository.git, scratch, used}
//!   <root>/locks/<the same>.{use,fetch}        never removed: a lock file that goes away locks nothing
//! ```

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use sealci_core::repository::RepositoryIdentity;
use sha2::{Digest, Sha256};

use crate::command::Git;
use crate::mirror::{Mirror, Shared, open_lock};
use crate::tree_size;

/// A folder of mirrors. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Mirrors {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    git: Git,
    root: PathBuf,
    budget_bytes: u64,
    open: Mutex<HashMap<String, Weak<Shared>>>,
}

/// What an eviction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    pub mirrors: usize,
    /// What the mirrors hold now. It can be over the budget while those in use are.
    pub remaining_bytes: u64,
}

impl Mirrors {
    pub fn new(git: Git, root: impl Into<PathBuf>, budget_bytes: u64) -> io::Result<Self> {
        let root = std::path::absolute(root.into())?;
        std::fs::create_dir_all(root.join("locks"))?;
        let inner = Inner { git, root, budget_bytes, open: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub fn git(&self) -> &Git {
        &self.inner.git
    }

    /// The repository's mirror, made when first fetched into. It is not evicted while the value lives.
    pub async fn open(&self, identity: &RepositoryIdentity) -> io::Result<Mirror> {
        let key = key_of(identity);
        if let Some(shared) = self.already_open(&key) {
            shared.touch()?;
            return Ok(Mirror { shared });
        }
        let inner = Arc::clone(&self.inner);
        let opening = tokio::task::spawn_blocking(move || inner.open(key));
        let shared = opening.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)))?;
        Ok(Mirror { shared })
    }

    fn already_open(&self, key: &str) -> Option<Arc<Shared>> {
        self.inner.lock_open().get(key).and_then(Weak::upgrade)
    }

    /// Removes the mirrors used longest ago until the rest fits the budget; never one in use, by any process.
    pub async fn evict(&self) -> io::Result<Evicted> {
        let inner = Arc::clone(&self.inner);
        let evicting = tokio::task::spawn_blocking(move || inner.evict());
        evicting.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)))
    }
}

impl Inner {
    fn lock_open(&self) -> std::sync::MutexGuard<'_, HashMap<String, Weak<Shared>>> {
        // The map is whole between any two statements, so a panic elsewhere spoils nothing.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, key: String) -> io::Result<Arc<Shared>> {
        let mut open = self.lock_open();
        if let Some(shared) = open.get(&key).and_then(Weak::upgrade) {
            return Ok(shared);
        }
        open.retain(|_, shared| shared.strong_count() > 0);
        let locks = self.root.join("locks");
        let shared = Arc::new(Shared::open(self.git.clone(), self.root.join(&key), &locks, &key)?);
        shared.touch()?;
        open.insert(key, Arc::downgrade(&shared));
        Ok(shared)
    }

    fn evict(&self) -> io::Result<Evicted> {
        let mut mirrors = Vec::new();
        for entry in std::fs::read_dir(&self.root)? {
            let entry = entry?;
            let Some(key) = entry.file_name().to_str().filter(|name| is_key(name)).map(str::to_owned) else {
                continue;
            };
            let used = std::fs::metadata(entry.path().join("used")).and_then(|file| file.modified());
            mirrors.push((used.unwrap_or(SystemTime::UNIX_EPOCH), key, tree_size::of(&entry.path())));
        }
        mirrors.sort();
        let total = mirrors.iter().fold(0_u64, |sum, (_, _, size)| sum.saturating_add(*size));
        let mut evicted = Evicted { mirrors: 0, remaining_bytes: total };
        for (_, key, size) in mirrors {
            if evicted.remaining_bytes <= self.budget_bytes {
                break;
            }
            if self.remove_unless_used(&key)? {
                evicted.mirrors += 1;
                evicted.remaining_bytes = evicted.remaining_bytes.saturating_sub(size);
            }
        }
        Ok(evicted)
    }

    fn remove_unless_used(&self, key: &str) -> io::Result<bool> {
        let open = self.lock_open();
        if open.get(key).is_some_and(|shared| shared.strong_count() > 0) {
            return Ok(false);
        }
        let lock = open_lock(&self.root.join("locks").join(format!("{key}.use")))?;
        if lock.try_lock().is_err() {
            return Ok(false);
        }
        // Moved away under the locks, deleted after: whoever opens the mirror next finds none, not half of one.
        let grave = tempfile::Builder::new().prefix("removed-").tempdir_in(&self.root)?;
        std::fs::rename(self.root.join(key), grave.path().join("x"))?;
        drop((open, lock));
        grave.close()?;
        Ok(true)
    }
}

fn key_of(identity: &RepositoryIdentity) -> String {
    Sha256::digest(identity.as_str()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_key(name: &str) -> bool {
    name.len() == 64
        && Path::new(name).components().count() == 1
        && name.bytes().all(|b| b.is_ascii_hexdigit())
}
