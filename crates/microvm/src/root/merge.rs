//! Lays an image's layers over one another, as overlayfs would show them.
//!
//! Invariants: entries come in the order of their paths, a folder before what is in it; nothing is held but the names of the
//! folders on the way down. No link is followed: a layer is a stranger's, and its links lead wherever they like.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Whom files belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owners {
    /// Whoever the disk says.
    AsOnDisk,
    /// Root: an ordinary user's store can give files to nobody else.
    Root,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Absolute, in the image; `/` for the root itself.
    pub path: PathBuf,
    pub what: What,
    /// Permissions, with setuid, setgid and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970; what does not fit is 0.
    pub mtime: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    Folder,
    /// With the file that has its bytes.
    File(PathBuf),
    /// With what it leads to.
    Link(PathBuf),
    Fifo,
}

/// What could not be read.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub path: PathBuf,
    pub source: io::Error,
}

/// Shows every entry of `layers`, the lowest first, to `visit`, which may end it with an error of its own.
pub(super) fn merge<E: From<Unreadable>>(
    layers: &[PathBuf],
    owners: Owners,
    visit: &mut dyn FnMut(Entry) -> Result<(), E>,
) -> Result<(), E> {
    let mut root: Option<Found> = None;
    for layer in layers.iter().rev() {
        let metadata = fs::symlink_metadata(layer).map_err(|source| unreadable(layer, source))?;
        match &mut root {
            None => root = Some(Found::new(layer.clone(), metadata)?),
            Some(found) => found.lie_over(layer.clone(), &metadata)?,
        }
    }
    match root {
        Some(found) => Merge { owners, visit }.show(PathBuf::from("/"), found),
        None => Ok(()),
    }
}

/// A name's highest bearer, and the folders below it that it shows as well.
struct Found {
    metadata: Metadata,
    /// Where it is: the highest first, more than one of a folder only.
    places: Vec<PathBuf>,
    /// Whether what lies lower is seen through it.
    is_open: bool,
}

impl Found {
    fn new(place: PathBuf, metadata: Metadata) -> Result<Self, Unreadable> {
        let is_open = metadata.is_dir() && !is_opaque(&place)?;
        Ok(Self { metadata, places: vec![place], is_open })
    }

    fn lie_over(&mut self, place: PathBuf, metadata: &Metadata) -> Result<(), Unreadable> {
        if self.is_open {
            self.is_open = metadata.is_dir() && !is_opaque(&place)?;
            if metadata.is_dir() {
                self.places.push(place);
            }
        }
        Ok(())
    }
}

struct Merge<'a, E> {
    owners: Owners,
    visit: &'a mut dyn FnMut(Entry) -> Result<(), E>,
}

impl<E: From<Unreadable>> Merge<'_, E> {
    /// Shows what was found, with all in it. Its depth is bounded where layers are unpacked.
    fn show(&mut self, path: PathBuf, found: Found) -> Result<(), E> {
        let kind = found.metadata.file_type();
        let [place, ..] = &found.places[..] else { return Ok(()) };
        let what = if kind.is_dir() {
            What::Folder
        } else if kind.is_file() {
            What::File(place.clone())
        } else if kind.is_symlink() {
            What::Link(fs::read_link(place).map_err(|source| unreadable(place, source))?)
        } else if kind.is_fifo() {
            What::Fifo
        } else {
            // A whiteout. No layer has another device or a socket: the machine makes its own.
            return Ok(());
        };
        let is_folder = what == What::Folder;
        let entry = self.entry(path.clone(), what, &found.metadata);
        (self.visit)(entry)?;
        if is_folder { self.show_folder(&path, &found.places) } else { Ok(()) }
    }

    fn show_folder(&mut self, path: &Path, places: &[PathBuf]) -> Result<(), E> {
        let mut names: BTreeMap<OsString, Found> = BTreeMap::new();
        for folder in places {
            for entry in fs::read_dir(folder).map_err(|source| unreadable(folder, source))? {
                let entry = entry.map_err(|source| unreadable(folder, source))?;
                let place = entry.path();
                let metadata = entry.metadata().map_err(|source| unreadable(&place, source))?;
                match names.get_mut(&entry.file_name()) {
                    Some(found) => found.lie_over(place, &metadata)?,
                    None => {
                        names.insert(entry.file_name(), Found::new(place, metadata)?);
                    }
                }
            }
        }
        names.into_iter().try_for_each(|(name, found)| self.show(path.join(name), found))
    }

    fn entry(&self, path: PathBuf, what: What, metadata: &Metadata) -> Entry {
        let (uid, gid) = match self.owners {
            Owners::AsOnDisk => (metadata.uid(), metadata.gid()),
            Owners::Root => (0, 0),
        };
        let mode = (metadata.mode() & 0o7777) as u16;
        Entry { path, what, mode, uid, gid, mtime: u32::try_from(metadata.mtime()).unwrap_or(0) }
    }
}

/// Whether overlayfs would show nothing of what lies below this folder.
fn is_opaque(folder: &Path) -> Result<bool, Unreadable> {
    let mut value = [0; 1];
    match rustix::fs::lgetxattr(folder, "user.overlay.opaque", &mut value) {
        Ok(count) => Ok(count == 1 && value == *b"y"),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::RANGE) => Ok(false),
        Err(errno) => Err(unreadable(folder, errno.into())),
    }
}

fn unreadable(path: &Path, source: io::Error) -> Unreadable {
    Unreadable { path: path.to_owned(), source }
}
