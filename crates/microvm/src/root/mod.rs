//! Keeps the root file systems of images: each one squashfs, which a machine gets as a disk that it can only read.
//!
//! A root is made once for an image's digest, however many ask for it; what is asked for next finds it on disk. [`RootStore::collect`]
//! takes those away that were used longest ago and that nobody uses now.

mod merge;
mod squash;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use sealci_image::{Digest, Image};

pub use crate::shelf::Collected;
use crate::shelf::{Kept, Shelf};
use merge::{Owners, Unreadable};

/// Changes with what is made of the same layers: older roots are not taken for it.
const FORMAT: &str = "squashfs zstd 1";

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("cannot read {} of the image's layers", path.display())]
    Layer {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the disk with the microVMs' root file systems is full; make room, or lower their budget")]
    DiskFull {
        #[source]
        source: io::Error,
    },
    #[error("cannot keep a root file system in {}", folder.display())]
    Storage {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the image's layers cannot be packed as a squashfs")]
    Squash(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Whoever wanted it does not any more.
    #[error("it was stopped")]
    Stopped,
}

impl From<Unreadable> for RootError {
    fn from(Unreadable { path, source }: Unreadable) -> Self {
        Self::Layer { path, source }
    }
}

/// A root file system on disk. It stays there while this lives.
#[derive(Debug)]
pub struct Root {
    kept: Kept,
}

impl Root {
    pub fn path(&self) -> &Path {
        self.kept.path()
    }

    /// Opened to read.
    pub fn file(&self) -> &File {
        self.kept.file()
    }
}

/// Root file systems in one folder, which several processes may have open.
#[derive(Debug, Clone)]
pub struct RootStore {
    shelf: Shelf,
}

impl RootStore {
    /// Opens a folder, which is made if need be, and removes what died with its process.
    pub fn open(folder: &Path) -> Result<Self, RootError> {
        let shelf = Shelf::open(folder, "squashfs").map_err(|source| storage(folder, source))?;
        Ok(Self { shelf })
    }

    /// Finds an image's root, or makes it, or waits for who makes it. Blocks: for seconds where it is made. `stop` ends the making.
    pub fn obtain(&self, image: &Image, stop: &AtomicBool) -> Result<Root, RootError> {
        // An ordinary user's layers and root's are not the same on disk.
        let owners = if rustix::process::geteuid().is_root() { Owners::AsOnDisk } else { Owners::Root };
        let name = Digest::of(format!("{FORMAT} {owners:?} {}", image.digest).as_bytes());
        let make = |file: &File| squash::pack(&image.layers, owners, file, stop);
        let kept = self.shelf.obtain(name.hex(), make, |source| storage(self.shelf.folder(), source))?;
        Ok(Root { kept })
    }

    /// Removes those that were used longest ago until no more than `budget_bytes` are taken; what is in use stays.
    pub fn collect(&self, budget_bytes: u64) -> Result<Collected, RootError> {
        self.shelf.collect(budget_bytes).map_err(|source| storage(self.shelf.folder(), source))
    }
}

fn storage(folder: &Path, source: io::Error) -> RootError {
    if source.kind() == io::ErrorKind::StorageFull {
        RootError::DiskFull { source }
    } else {
        RootError::Storage { folder: folder.to_owned(), source }
    }
}
