//! Keeps one repository's objects on disk, so that its revisions are fetched once and checked out often.
//!
//! ```text
//!   checkout ── absent ──► ensure ── fetch: the exact commit, else its ref, else all refs ──► checkout
//!      └── broken ──► delete the mirror, fetch again ──► checkout
//! ```
//!
//! Invariants:
//! - one fetch at a time, over all processes; callers that wait for the same revision share its result, good or bad;
//! - a mirror that somebody holds is not removed, by this process or another;
//! - a fetch that ends early leaves nothing that disturbs the next one.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sealci_core::event::{RefName, Revision};
use tokio::sync::{Mutex, RwLock, RwLockReadGuard};

use crate::command::{Call, Git};
use crate::process::RunError;
use crate::remote::{Remote, RemoteError};

/// Why a revision could not be brought into a mirror.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(
        "{url}: has no commit {revision}, on {searched} or elsewhere: was it pushed, and not replaced since?"
    )]
    Absent { url: String, revision: Revision, searched: String },
    #[error("{url}: git refuses what the repository contains: {message}")]
    Refused { url: String, message: String },
    #[error("cannot use the mirror's folder {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot make a mirror in {}", path.display())]
    Create { path: PathBuf, source: RunError },
    #[error("the mirror in {} is broken, and another process is using it, so it cannot be made anew", path.display())]
    BrokenInUse { path: PathBuf },
}

/// A repository's mirror, in use for as long as a clone of this value lives.
#[derive(Debug, Clone)]
pub struct Mirror {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) git: Git,
    /// Holds `repository.git`, `scratch` and `used`.
    pub(crate) folder: PathBuf,
    /// Locked shared while anyone in this process uses the mirror.
    use_lock: File,
    fetch_lock_path: PathBuf,
    /// Read by whoever reads the mirror, written by whoever replaces it.
    standing: RwLock<()>,
    fetching: Mutex<Option<Failure>>,
    /// How many fetches have ended.
    ended: AtomicU64,
}

/// The last fetch, if it failed.
#[derive(Debug)]
struct Failure {
    number: u64,
    revision: Revision,
    error: Arc<MirrorError>,
}

impl Shared {
    /// Opens the lock files; blocks while another process is removing the mirror.
    pub(crate) fn open(git: Git, folder: PathBuf, locks: &Path, key: &str) -> io::Result<Self> {
        let lock_file = |kind: &str| locks.join(format!("{key}.{kind}"));
        std::fs::create_dir_all(locks)?;
        let use_lock = open_lock(&lock_file("use"))?;
        use_lock.lock_shared()?;
        std::fs::create_dir_all(folder.join("scratch"))?;
        Ok(Self {
            git,
            folder,
            use_lock,
            fetch_lock_path: lock_file("fetch"),
            standing: RwLock::new(()),
            fetching: Mutex::new(None),
            ended: AtomicU64::new(0),
        })
    }

    /// Notes the time of use, by which mirrors are evicted.
    pub(crate) fn touch(&self) -> io::Result<()> {
        let path = self.folder.join("used");
        File::create(&path)?.set_modified(std::time::SystemTime::now())
    }
}

pub(crate) fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).open(path)
}

impl Mirror {
    pub(crate) fn git(&self) -> &Git {
        &self.shared.git
    }

    pub(crate) fn repository(&self) -> PathBuf {
        self.shared.folder.join("repository.git")
    }

    pub(crate) fn scratch(&self) -> PathBuf {
        self.shared.folder.join("scratch")
    }

    /// A call about this mirror's repository.
    pub(crate) fn call(&self) -> Call<'_> {
        self.git().local().git_dir(&self.repository())
    }

    /// Keeps the mirror from being replaced while it is read.
    pub(crate) async fn reading(&self) -> RwLockReadGuard<'_, ()> {
        self.shared.standing.read().await
    }

    /// Whether there is a repository at all.
    pub(crate) fn exists(&self) -> bool {
        self.repository().join("HEAD").exists()
    }

    /// Tells whether the commit is here.
    pub async fn has(&self, revision: &Revision) -> bool {
        if !self.exists() {
            return false;
        }
        let _reading = self.reading().await;
        let call = self.call().args(["cat-file", "-e", &format!("{revision}^{{commit}}")]);
        let bounds = call.query_bounds(1 << 10);
        call.run(b"", &bounds).await.is_ok()
    }

    /// Brings the commit here, unless it is here already. `ref` is where it was seen: the place to look for it on
    /// servers that do not give out commits by their id.
    pub async fn ensure(
        &self,
        remote: &Remote,
        revision: &Revision,
        r#ref: Option<&RefName>,
    ) -> Result<(), Arc<MirrorError>> {
        if self.has(revision).await {
            return Ok(());
        }
        let seen = self.shared.ended.load(Ordering::Acquire);
        let mut last = self.shared.fetching.lock().await;
        if let Some(failure) = &*last
            && failure.number > seen
            && failure.revision == *revision
        {
            return Err(Arc::clone(&failure.error));
        }
        let _lock = self.lock_for_fetching().await?;
        // It may have come with another's fetch while this caller waited.
        if self.has(revision).await {
            return Ok(());
        }
        let fetched = self.fetch(remote, revision, r#ref).await;
        let number = self.shared.ended.fetch_add(1, Ordering::AcqRel) + 1;
        match fetched {
            Ok(()) => {
                *last = None;
                Ok(())
            }
            Err(error) => {
                let error = Arc::new(error);
                *last = Some(Failure { number, revision: revision.clone(), error: Arc::clone(&error) });
                Err(error)
            }
        }
    }

    /// Keeps other processes from fetching into this mirror until dropped.
    async fn lock_for_fetching(&self) -> Result<File, MirrorError> {
        let path = self.shared.fetch_lock_path.clone();
        let locking = tokio::task::spawn_blocking({
            let path = path.clone();
            move || {
                let file = open_lock(&path)?;
                file.lock()?;
                Ok(file)
            }
        });
        let locked = locking.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
        locked.map_err(|source| MirrorError::Folder { path, source })
    }

    /// Deletes the repository, so that the next fetch starts from nothing.
    pub(crate) async fn discard(&self) -> Result<(), MirrorError> {
        let _alone_here = self.shared.standing.write().await;
        let repository = self.repository();
        // Trading the shared lock for an exclusive one fails when another process holds the mirror too.
        let alone = self.shared.use_lock.try_lock().is_ok();
        let removed = if alone { remove_folder(&repository, &self.scratch()).await } else { Ok(()) };
        // The trade can drop the lock, so it is taken again in either case; nobody keeps it exclusively for long.
        let relocked = self.shared.use_lock.lock_shared();
        removed.and(relocked).map_err(|source| MirrorError::Folder { path: repository.clone(), source })?;
        if alone { Ok(()) } else { Err(MirrorError::BrokenInUse { path: repository }) }
    }
}

/// Removes a folder in one step for those who look, and piece by piece behind their backs.
pub(crate) async fn remove_folder(folder: &Path, aside: &Path) -> io::Result<()> {
    let (folder, aside) = (folder.to_owned(), aside.to_owned());
    let removing = tokio::task::spawn_blocking(move || {
        if !folder.exists() {
            return Ok(());
        }
        std::fs::create_dir_all(&aside)?;
        let grave = tempfile::Builder::new().prefix("removed-").tempdir_in(&aside)?;
        std::fs::rename(&folder, grave.path().join("x"))?;
        grave.close()
    });
    removing.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)))
}
