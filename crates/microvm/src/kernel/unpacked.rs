//! Keeps kernels as they are without their packing: a guest that need not unpack its kernel starts sooner.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sealci_image::Digest;

use crate::shelf::{Kept, Shelf};

/// Why there is no unpacked kernel.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    #[error("cannot keep an unpacked kernel in {}", folder.display())]
    Storage {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot unpack {}", image.display())]
    Refused {
        image: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A kernel that is not packed, an ELF file. It stays there while this lives.
#[derive(Debug)]
pub struct Unpacked {
    kept: Kept,
}

impl Unpacked {
    pub fn path(&self) -> &Path {
        self.kept.path()
    }
}

/// Unpacked kernels in one folder, by the digests of what they came from; several processes may have it open.
#[derive(Debug, Clone)]
pub struct KernelStore {
    shelf: Shelf,
}

impl KernelStore {
    /// Opens a folder, which is made if need be, and removes what died with its process.
    pub fn open(folder: &Path) -> Result<Self, UnpackError> {
        let shelf = Shelf::open(folder, "vmlinux").map_err(|source| storage(folder, source))?;
        Ok(Self { shelf })
    }

    /// Finds what is in the image, or has `unpack` write it to a file. Blocks.
    pub fn obtain(
        &self,
        image: &Path,
        unpack: impl FnOnce(&File) -> io::Result<()>,
    ) -> Result<Unpacked, UnpackError> {
        let refused = |source| UnpackError::Refused { image: image.to_owned(), source };
        let name = Digest::of(&fs::read(image).map_err(refused)?);
        let make = |file: &File| {
            unpack(file).map_err(refused)?;
            file.metadata()
                .map(|metadata| metadata.len())
                .map_err(|source| storage(self.shelf.folder(), source))
        };
        let kept = self.shelf.obtain(name.hex(), make, |source| storage(self.shelf.folder(), source))?;
        Ok(Unpacked { kept })
    }

    /// Removes all but what is in use: former kernels', of which each takes tens of MiB.
    pub fn clear(&self) -> Result<(), UnpackError> {
        self.shelf.collect(0).map(drop).map_err(|source| storage(self.shelf.folder(), source))
    }
}

fn storage(folder: &Path, source: io::Error) -> UnpackError {
    UnpackError::Storage { folder: folder.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn each_image_is_unpacked_once_and_one_that_is_refused_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("vmlinuz");
        fs::write(&image, "packed").unwrap();
        let store = KernelStore::open(&folder.path().join("kernels")).unwrap();
        let refusal = store.obtain(&image, |_| Err(io::Error::other("packed in a way of its own")));
        assert!(matches!(refusal, Err(UnpackError::Refused { .. })), "{refusal:?}");
        let write = |text: &'static str| move |mut file: &File| file.write_all(text.as_bytes());
        let first = store.obtain(&image, write("what is in it")).unwrap();
        assert_eq!(fs::read_to_string(first.path()).unwrap(), "what is in it");
        let again = store.obtain(&image, |_| panic!("it is there")).unwrap();
        assert_eq!(again.path(), first.path());
        fs::write(&image, "another").unwrap();
        let other = store.obtain(&image, write("it is new")).unwrap();
        assert_eq!(fs::read_to_string(other.path()).unwrap(), "it is new");
        let count = || fs::read_dir(folder.path().join("kernels")).unwrap().count();
        assert_eq!(count(), 2);
        drop((first, again));
        store.clear().unwrap();
        assert!(other.path().exists());
        assert_eq!(count(), 1);
    }
}
