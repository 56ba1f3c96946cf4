//! The store's files, and what makes them safe for several processes and for a death at any moment.
//!
//! ```text
//! blobs/HEX          manifests, indexes and configurations, checked whenever they are read
//! images/HEX.json    what a name meant last (HEX: digest of the name); its time of change is that of the last use
//! partial/HEX        a layer's blob as far as it has come; locked by who fetches it
//! staging/HEX.N      a layer that is being unpacked; locked by who unpacks it
//! layers/HEX/        a layer, named by its diff id; locked, shared, by all who use it
//!     fs/            its files
//!     layer.json     written before the folder got its name
//!     durable        it was on the disk when this was made
//! trash/HEX.N        what is being removed
//! ```
//! - Locks are flock(2): the kernel gives them back when their holder dies, however it dies. Nobody waits for
//!   another's work: a layer that another process is just fetching is fetched twice, and the second to finish takes the first's.
//! - A file or folder gets its name when it is whole (rename(2)). Against power loss: until `durable` is there, which is made after
//!   syncfs(2), a layer is believed only within the boot it was made in. So no pull waits for the disk.

use std::fs::{self, File};
use std::io::ErrorKind::{AlreadyExists, DirectoryNotEmpty};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::registry::Partial;

/// A partial download that nobody went on with for so long is given up.
const PARTIAL_LIFE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug)]
pub(super) struct Files {
    pub folder: PathBuf,
    /// Of this boot of the machine; none where the kernel does not say.
    boot: Option<String>,
}

/// `layer.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerFacts {
    pub archive_bytes: u64,
    pub disk_bytes: u64,
    pub entries: u64,
    pub notes: Vec<String>,
    boot: Option<String>,
}

/// `images/HEX.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub reference: String,
    /// What the name stood for: of an index or a manifest.
    pub digest: Digest,
    /// Files in `blobs` that it needs.
    pub blobs: Vec<Digest>,
    /// Layers, by diff id.
    pub layers: Vec<Digest>,
}

/// A layer on disk, locked.
#[derive(Debug)]
pub(super) struct LayerFolder {
    pub path: PathBuf,
    pub facts: LayerFacts,
    _lock: OwnedFd,
}

/// A folder for a layer to come. It is removed with this, unless it became one.
#[derive(Debug)]
pub(super) struct Staging {
    path: PathBuf,
    lock: Option<OwnedFd>,
}

impl Files {
    /// Makes the folders, and removes what died with its process.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let mut builder = fs::DirBuilder::new();
        // What others could reach in it is setuid at times.
        builder.recursive(true).mode(0o700).create(folder)?;
        for part in ["blobs", "images", "partial", "staging", "layers", "trash"] {
            builder.create(folder.join(part))?;
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let boot = boot.map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let files = Self { folder: folder.canonicalize()?, boot };
        files.sweep();
        Ok(files)
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs").join(digest.hex())
    }

    /// A small blob; none if it is not there, or not what its name says (a crash can do that).
    pub fn read_blob(&self, digest: &Digest, bound: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.blob(digest)).ok()?.take(bound + 1).read_to_end(&mut bytes).ok()?;
        (Digest::of(&bytes) == *digest).then_some(bytes)
    }

    pub fn write_blob(&self, digest: &Digest, bytes: &[u8]) -> io::Result<()> {
        self.write(&self.blob(digest), bytes)
    }

    fn record_path(&self, reference: &str) -> PathBuf {
        let name = Digest::of(reference.as_bytes());
        self.folder.join("images").join(format!("{}.json", name.hex()))
    }

    /// What a name stood for last.
    pub fn record(&self, reference: &str) -> Option<Record> {
        let record: Record = serde_json::from_slice(&fs::read(self.record_path(reference)).ok()?).ok()?;
        (record.reference == reference).then_some(record)
    }

    /// Writes it, or only that it was used now.
    pub fn keep_record(&self, record: &Record) -> io::Result<()> {
        let path = self.record_path(&record.reference);
        if self.record(&record.reference).as_ref() == Some(record) {
            match File::open(&path).and_then(|file| file.set_modified(SystemTime::now())) {
                // Given up by another process a moment ago.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                touched => return touched,
            }
        }
        self.write(&path, &serde_json::to_vec(record)?)
    }

    /// All of them that can be read, with their last use.
    pub fn records(&self) -> Vec<(PathBuf, SystemTime, Record)> {
        let read = |path: PathBuf| {
            let used = fs::metadata(&path).ok()?.modified().ok()?;
            Some((path.clone(), used, serde_json::from_slice(&fs::read(&path).ok()?).ok()?))
        };
        let is_ours = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "json");
        entries(&self.folder.join("images")).filter(is_ours).filter_map(read).collect()
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        for _ in 0..10 {
            let temporary = self.folder.join("staging").join(format!("file.{:016x}", rand::random::<u64>()));
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
            // Somebody who sweeps may have come between.
            if !lock(&file, FlockOperation::NonBlockingLockShared) || !is_at(&file, &temporary)? {
                continue;
            }
            let written = file.write_all(bytes).and_then(|()| fs::rename(&temporary, path));
            return written.inspect_err(|_| drop(fs::remove_file(&temporary)));
        }
        Err(swept())
    }

    /// The file for a blob to come, locked. Where another process is at it, one of our own.
    pub fn partial(&self, digest: &Digest) -> io::Result<Partial> {
        let shared = self.folder.join("partial").join(digest.hex());
        let own =
            self.folder.join("partial").join(format!("{}.{:016x}", digest.hex(), rand::random::<u64>()));
        for (path, is_shared) in [(&shared, true), (&shared, true), (&own, false)] {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
            if lock(&file, FlockOperation::NonBlockingLockExclusive) && is_at(&file, path)? {
                return Ok(Partial { file, path: path.clone(), is_shared });
            }
        }
        Err(swept())
    }

    pub fn layer_path(&self, diff_id: &Digest) -> PathBuf {
        self.folder.join("layers").join(diff_id.hex())
    }

    /// A layer that is whole, locked against removal. One that is not to be believed is removed.
    pub fn layer(&self, diff_id: &Digest) -> io::Result<Option<LayerFolder>> {
        self.layer_locked(diff_id, FlockOperation::NonBlockingLockShared)
    }

    fn layer_locked(&self, diff_id: &Digest, operation: FlockOperation) -> io::Result<Option<LayerFolder>> {
        let path = self.layer_path(diff_id);
        let Some(lock) = locked_folder(&path, operation)? else { return Ok(None) };
        match self.facts(&path) {
            Some(facts) => Ok(Some(LayerFolder { path: path.join("fs"), facts, _lock: lock })),
            None => {
                drop(lock);
                self.remove_layer(&path)?;
                Ok(None)
            }
        }
    }

    /// None if the layer is not to be believed.
    pub fn facts(&self, layer: &Path) -> Option<LayerFacts> {
        let facts: LayerFacts = serde_json::from_slice(&fs::read(layer.join("layer.json")).ok()?).ok()?;
        let of_this_boot = facts.boot.is_some() && facts.boot == self.boot;
        (of_this_boot || layer.join("durable").exists()).then_some(facts)
    }

    /// Removes a layer that nobody uses. False if somebody does, or it is gone.
    pub fn remove_layer(&self, path: &Path) -> io::Result<bool> {
        let Some(lock) = locked_folder(path, FlockOperation::NonBlockingLockExclusive)? else {
            return Ok(false);
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let trash = self.folder.join("trash").join(format!("{name}.{:016x}", rand::random::<u64>()));
        fs::rename(path, &trash)?;
        drop(lock);
        // Somebody who sweeps may be at it as well.
        while let Err(error) = fs::remove_dir_all(&trash) {
            if error.kind() != io::ErrorKind::NotFound {
                return Err(error);
            }
            if !trash.exists() {
                break;
            }
        }
        Ok(true)
    }

    pub fn staging(&self, diff_id: &Digest) -> io::Result<Staging> {
        for _ in 0..10 {
            let name = format!("{}.{:016x}", diff_id.hex(), rand::random::<u64>());
            let path = self.folder.join("staging").join(name);
            fs::DirBuilder::new().mode(0o700).create(&path)?;
            // Somebody who sweeps may have come between.
            let Some(lock) = locked_folder(&path, FlockOperation::NonBlockingLockShared)? else { continue };
            fs::DirBuilder::new().mode(0o700).create(path.join("fs"))?;
            return Ok(Staging { path, lock: Some(lock) });
        }
        Err(swept())
    }

    /// Makes an unpacked layer one of the store's. If another process was faster, theirs is taken. None if somebody removes it
    /// again and again.
    pub fn finish(
        &self,
        mut staging: Staging,
        diff_id: &Digest,
        unpacked: crate::unpack::Unpacked,
    ) -> io::Result<Option<LayerFolder>> {
        let facts = LayerFacts {
            archive_bytes: unpacked.archive_bytes,
            disk_bytes: unpacked.disk_bytes,
            entries: unpacked.entries,
            notes: unpacked.notes,
            boot: self.boot.clone(),
        };
        fs::write(staging.path.join("layer.json"), serde_json::to_vec(&facts)?)?;
        if self.boot.is_none() {
            sync(&staging.path)?;
            File::create(staging.path.join("durable"))?;
        }
        let path = self.layer_path(diff_id);
        for _ in 0..10 {
            match fs::rename(&staging.path, &path) {
                Ok(()) => {
                    let lock = staging.lock.take();
                    return Ok(lock.map(|lock| LayerFolder { path: path.join("fs"), facts, _lock: lock }));
                }
                Err(error) if matches!(error.kind(), DirectoryNotEmpty | AlreadyExists) => {
                    // Theirs may be about to be removed: its lock is waited for, which is held for one rename.
                    if let Some(theirs) = self.layer_locked(diff_id, FlockOperation::LockShared)? {
                        return Ok(Some(theirs));
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Waits until all layers made so far are on the disk, and marks them so.
    pub fn settle(&self) -> io::Result<()> {
        let fresh: Vec<_> = self
            .layers()
            .into_iter()
            .filter(|path| !path.join("durable").exists() && self.facts(path).is_some())
            .collect();
        if fresh.is_empty() {
            return Ok(());
        }
        sync(&self.folder)?;
        for layer in fresh {
            match File::create(layer.join("durable")) {
                // Removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// Only what is named like one.
    pub fn layers(&self) -> Vec<PathBuf> {
        entries(&self.folder.join("layers")).filter(|path| named_digest(path).is_some()).collect()
    }

    /// Removes what nobody will go on with: half-unpacked layers, half-removed ones, old downloads. What cannot be removed now is
    /// tried again the next time.
    pub fn sweep(&self) {
        for path in entries(&self.folder.join("trash")) {
            let _ = fs::remove_dir_all(path);
        }
        for path in entries(&self.folder.join("staging")) {
            if path.is_dir() {
                if let Ok(Some(_lock)) = locked_folder(&path, FlockOperation::NonBlockingLockExclusive) {
                    let _ = fs::remove_dir_all(&path);
                }
            } else {
                remove_unlocked(&path);
            }
        }
        let is_ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            Digest::from_hex(name.split('.').next().unwrap_or_default()).is_ok()
        };
        for path in entries(&self.folder.join("partial")).filter(is_ours) {
            // One with a number can only be gone on with by who made it.
            let is_numbered = path.extension().is_some();
            if is_numbered || is_older(&path, PARTIAL_LIFE) {
                remove_unlocked(&path);
            }
        }
    }

    /// Removes small blobs that no image needs and that are not from just now.
    pub fn sweep_blobs(&self, needed: &std::collections::HashSet<Digest>) {
        for path in entries(&self.folder.join("blobs")) {
            let is_needed = named_digest(&path).is_none_or(|digest| needed.contains(&digest));
            if !is_needed && is_older(&path, PARTIAL_LIFE) {
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl Staging {
    /// Where the files go.
    pub fn fs(&self) -> PathBuf {
        self.path.join("fs")
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The digest a file or folder is named by; none for what is not ours.
pub(super) fn named_digest(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.file_name()?.to_str()?).ok()
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
}

fn is_older(path: &Path, age: Duration) -> bool {
    let changed = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|elapsed| elapsed > age))
}

/// What was just made was gone before it could be locked, again and again.
fn swept() -> io::Error {
    io::Error::other("somebody removes the files of the image store as they are made")
}

fn lock(file: impl std::os::fd::AsFd, operation: FlockOperation) -> bool {
    rustix::fs::flock(file, operation).is_ok()
}

/// Removes a file that nobody is at. Locked until it is gone: whoever makes one locks it before he relies on it.
fn remove_unlocked(path: &Path) {
    if let Ok(file) = File::open(path)
        && lock(&file, FlockOperation::NonBlockingLockExclusive)
        && is_at(&file, path).unwrap_or(false)
    {
        let _ = fs::remove_file(path);
        drop(file);
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

/// None if it is not there, or locked otherwise.
fn locked_folder(path: &Path, operation: FlockOperation) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if !lock(&folder, operation) {
        return Ok(None);
    }
    let folder = File::from(folder);
    Ok(is_at(&folder, path)?.then(|| folder.into()))
}

fn sync(path: &Path) -> io::Result<()> {
    let folder = File::open(path)?;
    Ok(rustix::fs::syncfs(&folder)?)
}
