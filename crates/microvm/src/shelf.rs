//! Keeps files that are made once and used by many, for several processes and for a death at any moment.
//!
//! ```text
//! NAME.partial       being made; locked by who makes it
//! NAME.EXTENSION     whole, and on the disk; locked, shared, by all who use it. Its time of change is that of the last use
//! ```
//! Locks are flock(2), which the kernel gives back when their holder dies, however it dies. Who lives gives them back by word:
//! a child that another thread is starting has the descriptor, too, until it executes. A file gets its name when it is
//! whole and was synchronised, so what has a name is believed.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};

#[derive(Debug, Clone)]
pub(crate) struct Shelf {
    folder: PathBuf,
    extension: &'static str,
}

/// A file of a shelf's, which stays there while this lives.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    /// Holds the lock.
    file: File,
}

impl Drop for Kept {
    fn drop(&mut self) {
        // It goes with the descriptor otherwise.
        let _ = lock(&self.file, FlockOperation::Unlock);
    }
}

impl Kept {
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn file(&self) -> &File {
        &self.file
    }
}

/// What a collection did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    pub removed: u64,
    pub freed_bytes: u64,
    pub kept_bytes: u64,
}

impl Shelf {
    /// Makes the folder if need be, and removes what nobody will finish.
    pub fn open(folder: &Path, extension: &'static str) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let shelf = Self { folder: folder.canonicalize()?, extension };
        for path in shelf.files("partial")? {
            remove_unused(&path)?;
        }
        Ok(shelf)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Finds a file, or has it made, or waits for who makes it. `make` returns its length; what is behind that is cut off.
    pub fn obtain<E>(
        &self,
        name: &str,
        make: impl FnOnce(&File) -> Result<u64, E>,
        storage: impl Fn(io::Error) -> E,
    ) -> Result<Kept, E> {
        let path = self.folder.join(format!("{name}.{}", self.extension));
        let partial = self.folder.join(format!("{name}.partial"));
        loop {
            if let Some(kept) = find(&path).map_err(&storage)? {
                return Ok(kept);
            }
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&partial);
            let file = file.map_err(&storage)?;
            if !try_lock(&file).map_err(&storage)? {
                // Whoever makes it is waited for here. Then it has its name, or was given up.
                lock(&file, FlockOperation::LockShared).map_err(&storage)?;
            } else if is_at(&file, &partial).map_err(&storage)? {
                if !path.exists() {
                    return self.make(&path, &partial, file, make, &storage);
                }
                // It was finished between the look for it and the lock.
                fs::remove_file(&partial).map_err(&storage)?;
            }
        }
    }

    fn make<E>(
        &self,
        path: &Path,
        partial: &Path,
        file: File,
        make: impl FnOnce(&File) -> Result<u64, E>,
        storage: &impl Fn(io::Error) -> E,
    ) -> Result<Kept, E> {
        let made = file.set_len(0).map_err(storage).and_then(|()| make(&file)).and_then(|bytes| {
            let finish = || {
                file.set_len(bytes)?;
                file.sync_all()?;
                // Before it has its name: nobody may take it away between that and the shared lock.
                lock(&file, FlockOperation::LockShared)?;
                fs::rename(partial, path)?;
                File::open(&self.folder)?.sync_all()
            };
            finish().map_err(storage)
        });
        if let Err(error) = made {
            // While it is still locked: whoever waits finds that it is gone.
            let _ = fs::remove_file(partial);
            return Err(error);
        }
        let file = File::open(path).map_err(storage).and_then(|read_only| {
            lock(&read_only, FlockOperation::LockShared).map_err(storage)?;
            lock(&file, FlockOperation::Unlock).map_err(storage)?;
            Ok(read_only)
        })?;
        Ok(Kept { path: path.to_owned(), file })
    }

    pub fn collect(&self, budget_bytes: u64) -> io::Result<Collected> {
        let mut files = Vec::new();
        for path in self.files(self.extension)? {
            // Another process may collect as well.
            let Ok(metadata) = fs::metadata(&path) else { continue };
            files.push((metadata.modified()?, metadata.blocks() * 512, path));
        }
        files.sort();
        let kept_bytes = files.iter().map(|(_, bytes, _)| bytes).sum();
        let mut collected = Collected { kept_bytes, ..Collected::default() };
        for (_, bytes, path) in files {
            if collected.kept_bytes <= budget_bytes {
                break;
            }
            if remove_unused(&path)? {
                collected.removed += 1;
                collected.freed_bytes += bytes;
                collected.kept_bytes -= bytes;
            }
        }
        Ok(collected)
    }

    fn files(&self, extension: &str) -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.folder)?.filter_map(|entry| Some(entry.ok()?.path()));
        Ok(entries.filter(|path| path.extension().is_some_and(|found| found == extension)).collect())
    }
}

/// Opens and locks a whole file, and notes that it was used.
fn find(path: &Path) -> io::Result<Option<Kept>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    // Held exclusively for as long as a file takes to be removed.
    lock(&file, FlockOperation::LockShared)?;
    if !is_at(&file, path)? {
        return Ok(None);
    }
    file.set_modified(SystemTime::now())?;
    Ok(Some(Kept { path: path.to_owned(), file }))
}

/// False if somebody uses it, or it is gone.
fn remove_unused(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        file => file?,
    };
    if !try_lock(&file)? || !is_at(&file, path)? {
        return Ok(false);
    }
    fs::remove_file(path)?;
    Ok(true)
}

fn lock(file: &File, operation: FlockOperation) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| flock(file, operation))?)
}

/// For oneself alone; false where somebody has it.
fn try_lock(file: &File) -> io::Result<bool> {
    match lock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        locked => locked.map(|()| true),
    }
}

/// Whether the file still has this name.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A child has every descriptor of this process's between its start and what it executes.
    #[test]
    fn what_is_let_go_is_free_though_a_child_has_its_descriptors_for_a_moment() {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(folder.path(), "kept").unwrap();
        let mut childs = Vec::new();
        let make = |mut file: &File| {
            childs.push(file.try_clone()?);
            file.write_all(b"text").map(|()| 4)
        };
        let kept = shelf.obtain("one", make, |error| error).unwrap();
        childs.push(kept.file().try_clone().unwrap());
        assert_eq!(shelf.collect(0).unwrap().removed, 0, "it is in use");
        drop(kept);
        assert_eq!(shelf.collect(0).unwrap().removed, 1);
    }
}
