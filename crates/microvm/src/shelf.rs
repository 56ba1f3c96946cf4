//! Keeps files, and folders of some, that are made once and used by many, for several processes and for a death at any moment.
//!
//! ```text
//! NAME.partial       being made, or a folder that is being removed; locked by who is at it
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

/// A file or folder of a shelf's, which stays there while this lives.
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

    /// Finds what is there already, and is whole.
    pub fn find(&self, name: &str) -> io::Result<Option<Kept>> {
        find(&self.path(name))
    }

    /// Finds a file, or has it made, or waits for who makes it. `make` returns its length; what is behind that is cut off.
    pub fn obtain<E>(
        &self,
        name: &str,
        make: impl FnOnce(&File) -> Result<u64, E>,
        storage: impl Fn(io::Error) -> E,
    ) -> Result<Kept, E> {
        let (path, partial) = (self.path(name), self.partial(name));
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
            file.set_len(bytes).and_then(|()| self.finish(&file, partial, path)).map_err(storage)
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

    /// Has a folder made; none where somebody else is at it, or was. `make` fills it, and brings what it puts there to the disk.
    pub fn make_folder<E>(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<(), E>,
        storage: impl Fn(io::Error) -> E,
    ) -> Result<Option<Kept>, E> {
        let (path, partial) = (self.path(name), self.partial(name));
        let Some(folder) = begin_folder(&partial).map_err(&storage)? else { return Ok(None) };
        let made = if path.exists() {
            Ok(false)
        } else {
            make(&partial)
                .and_then(|()| self.finish(&folder, &partial, &path).map_err(&storage))
                .map(|()| true)
        };
        if !matches!(made, Ok(true)) {
            let _ = fs::remove_dir_all(&partial);
        }
        Ok(made?.then_some(Kept { path, file: folder }))
    }

    /// Gives what is whole its name. Whoever has made it has it locked, and shares it from here on.
    fn finish(&self, file: &File, partial: &Path, path: &Path) -> io::Result<()> {
        file.sync_all()?;
        // Before it has its name: nobody may take it away between that and the shared lock.
        lock(file, FlockOperation::LockShared)?;
        fs::rename(partial, path)?;
        File::open(&self.folder)?.sync_all()
    }

    /// Removes what is of no use, whoever uses it: those have it open.
    pub fn discard(&self, kept: &Kept) -> io::Result<()> {
        if is_at(&kept.file, &kept.path)? { remove(&kept.path) } else { Ok(()) }
    }

    /// Removes what nobody uses and that has another name.
    pub fn retain(&self, is_kept: impl Fn(&str) -> bool) -> io::Result<()> {
        for path in self.files(self.extension)? {
            if !path.file_stem().is_some_and(|name| is_kept(&name.to_string_lossy())) {
                remove_unused(&path)?;
            }
        }
        Ok(())
    }

    pub fn collect(&self, budget_bytes: u64) -> io::Result<Collected> {
        let mut files = Vec::new();
        for path in self.files(self.extension)? {
            // Another process may collect as well.
            let (Ok(metadata), Ok(bytes)) = (fs::metadata(&path), room_of(&path)) else { continue };
            files.push((metadata.modified()?, bytes, path));
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.{}", self.extension))
    }

    fn partial(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.partial"))
    }

    fn files(&self, extension: &str) -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.folder)?.filter_map(|entry| Some(entry.ok()?.path()));
        Ok(entries.filter(|path| path.extension().is_some_and(|found| found == extension)).collect())
    }
}

/// Makes an empty folder, locked; none where somebody else has it.
fn begin_folder(partial: &Path) -> io::Result<Option<File>> {
    remove_unused(partial)?;
    match DirBuilder::new().mode(0o700).create(partial) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
        made => made?,
    }
    let folder = File::open(partial)?;
    // Until it is locked, it is what a dead process would have left.
    Ok((try_lock(&folder)? && is_at(&folder, partial)?).then_some(folder))
}

/// Opens and locks what is whole, and notes that it was used.
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
    remove(path)?;
    Ok(true)
}

fn remove(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return fs::remove_file(path);
    }
    // A part of it must not be taken for the whole.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::rename(path, &partial)?;
    fs::remove_dir_all(&partial)
}

/// What it takes of the disk, in bytes.
fn room_of(path: &Path) -> io::Result<u64> {
    let metadata = fs::symlink_metadata(path)?;
    let mut bytes = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            bytes += room_of(&entry?.path())?;
        }
    }
    Ok(bytes)
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

    #[test]
    fn a_folder_is_whole_or_not_there() {
        let place = tempfile::tempdir().unwrap();
        let names = || {
            let entries = fs::read_dir(place.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let same = |error| error;
        let shelf = Shelf::open(place.path(), "kept").unwrap();
        assert!(shelf.find("one").unwrap().is_none());
        let refused = shelf.make_folder(
            "one",
            |folder| fs::write(folder.join("part"), "half").and(Err(io::Error::other("no"))),
            same,
        );
        assert_eq!(refused.unwrap_err().to_string(), "no");
        assert!(names().is_empty());

        // Of a process that died over it.
        fs::create_dir(place.path().join("one.partial")).unwrap();
        fs::write(place.path().join("one.partial/other"), "half").unwrap();
        let fill = |folder: &Path| {
            assert_eq!(fs::read_dir(folder).unwrap().count(), 0);
            // Whoever comes meanwhile does not wait, and a shelf that is opened leaves it alone.
            assert!(shelf.make_folder("one", |_| panic!("two make it"), same)?.is_none());
            Shelf::open(place.path(), "kept")?;
            fs::write(folder.join("file"), vec![1; 100_000])
        };
        let kept = shelf.make_folder("one", fill, same).unwrap().unwrap();
        assert!(shelf.make_folder("one", |_| panic!("it is there"), same).unwrap().is_none());
        assert_eq!(names(), ["one.kept"]);
        let found = shelf.find("one").unwrap().unwrap();
        assert_eq!(fs::read(found.path().join("file")).unwrap().len(), 100_000);

        let collected = shelf.collect(0).unwrap();
        assert!(collected.removed == 0 && collected.kept_bytes >= 100_000, "{collected:?}");
        drop((kept, found));
        assert!(shelf.collect(0).unwrap().freed_bytes >= 100_000);
        assert!(names().is_empty());
    }

    #[test]
    fn what_is_of_no_use_goes_though_it_is_used() {
        let place = tempfile::tempdir().unwrap();
        let shelf = Shelf::open(place.path(), "kept").unwrap();
        let make = |name: &str| {
            let fill = |folder: &Path| fs::write(folder.join("file"), name);
            shelf.make_folder(name, fill, |error| error).unwrap().unwrap()
        };
        let (damaged, former, present) = (make("a-1"), make("b-1"), make("a-2"));
        let mut open = File::open(damaged.path().join("file")).unwrap();
        shelf.discard(&damaged).unwrap();
        shelf.discard(&damaged).unwrap();
        assert!(!damaged.path().exists());
        let mut text = String::new();
        io::Read::read_to_string(&mut open, &mut text).unwrap();
        assert_eq!(text, "a-1");

        shelf.retain(|name| name.starts_with("a-")).unwrap();
        assert!(former.path().exists(), "it is in use");
        drop(former);
        shelf.retain(|name| name.starts_with("a-")).unwrap();
        assert!(shelf.find("b-1").unwrap().is_none() && present.path().exists());
    }
}
