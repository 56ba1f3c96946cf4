//! Writes entries below one folder, and nowhere else.
//!
//! Each parent folder is opened by openat2(2) with `RESOLVE_IN_ROOT`: to the kernel the layer's folder is `/`, so an absolute
//! symlink or `..` within a link stays inside, as it would for a program in the container. Everything is then done to one name
//! in that folder, and that name is never followed.
//!
//! Whiteouts (image-spec, layer.md) become overlayfs's own: `.wh.NAME` a character device 0:0, which needs no privilege since
//! Linux 5.8; `.wh..wh..opq` the attribute `user.overlay.opaque`. They speak of the layers below only, so they take nothing away
//! that this layer brings, whatever the order in the archive.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use super::names::{NAME_BYTES, PATH_BYTES, Place, Whiteout, clean, refused, split, whiteout};
use super::tape::{Entry, Kind, Tape};
use super::{UnpackError, UnpackLimits, shown};

/// Of all folders' paths together: they are kept until the end.
const FOLDER_BYTES: usize = 32 << 20;
/// The last id of a range that a user namespace has.
const MOST_ID: u64 = 65_535;
const NOBODY: u32 = 65_534;
const WRITE_BYTES: usize = 128 << 10;

/// Set once nothing more comes into the folder.
#[derive(Debug, Clone, Copy)]
struct FolderMeta {
    mode: u32,
    uid: u32,
    gid: u32,
    /// None where the archive has no entry for it.
    mtime: Option<(i64, u32)>,
}

/// What had to be left out or changed.
#[derive(Debug, Default)]
struct Oddities {
    devices: u64,
    first_device: String,
    attributes: u64,
    ids: u64,
}

pub(super) struct Tree {
    root: OwnedFd,
    /// Where the last entry went; most of its successors go there too.
    parent: Option<(Vec<u8>, OwnedFd)>,
    folders: BTreeMap<Vec<u8>, FolderMeta>,
    folder_bytes: usize,
    limits: UnpackLimits,
    as_root: bool,
    buffer: Vec<u8>,
    file_bytes: u64,
    pub disk_bytes: u64,
    pub count: u64,
    oddities: Oddities,
}

impl Tree {
    pub fn open(folder: &Path, limits: UnpackLimits) -> Result<Self, UnpackError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(folder, flags, Mode::empty()).map_err(|errno| write_error(b"/", errno.into()))?;
        let whole = FolderMeta { mode: 0o755, uid: 0, gid: 0, mtime: None };
        Ok(Self {
            root,
            parent: None,
            folders: BTreeMap::from([(Vec::new(), whole)]),
            folder_bytes: 0,
            limits,
            as_root: rustix::process::geteuid().is_root() && has_all_ids(),
            buffer: vec![0; WRITE_BYTES],
            file_bytes: 0,
            disk_bytes: 4096,
            count: 0,
            oddities: Oddities::default(),
        })
    }

    /// Writes one entry; the data is read from the tape.
    pub fn put<R: io::Read>(&mut self, entry: &Entry, tape: &mut Tape<R>) -> Result<(), UnpackError> {
        self.count += 1;
        if self.count > self.limits.entries {
            return Err(UnpackError::TooLarge {
                what: "it has too many entries",
                bound: self.limits.entries,
            });
        }
        let path = clean(&entry.path, self.limits.depth)?;
        let place = split(&path);
        if let Some(whiteout) = whiteout(&path, &place)? {
            return self.put_whiteout(whiteout, &place);
        }
        if place.name.is_empty() {
            return match entry.kind {
                Kind::Folder => self.remember(&path, entry),
                _ => Err(refused(&entry.path, "only a folder can be the root")),
            };
        }
        match entry.kind {
            Kind::Folder => self.put_folder(&path, &place, entry),
            Kind::File => self.put_file(&place, entry, tape),
            Kind::HardLink => self.put_hard_link(&place, entry),
            Kind::Symlink => self.put_symlink(&place, entry),
            Kind::Fifo => self.put_fifo(&place, entry),
            Kind::Device => {
                if self.oddities.devices == 0 {
                    self.oddities.first_device = shown(&path);
                }
                self.oddities.devices += 1;
                Ok(())
            }
        }
    }

    /// Gives the folders their modes, owners and times. Returns what a user should know.
    pub fn finish(mut self) -> Result<Vec<String>, UnpackError> {
        for (path, meta) in std::mem::take(&mut self.folders) {
            let folder = match self.beneath(&path) {
                Ok(folder) => folder,
                // Something else took its place since.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => return Err(write_error(&path, errno.into())),
            };
            self.apply(&folder, meta).map_err(|errno| write_error(&path, errno.into()))?;
        }
        let Oddities { devices, first_device, attributes, ids } = self.oddities;
        let mut notes = Vec::new();
        if devices > 0 {
            notes.push(format!("device nodes are left out: {devices}, the first is {first_device}"));
        }
        if attributes > 0 {
            notes.push(format!("extended attributes are left out (file capabilities, labels): {attributes}"));
        }
        if ids > 0 {
            notes.push(format!("owners above {MOST_ID} are {NOBODY} (nobody): {ids}"));
        }
        Ok(notes)
    }

    fn apply(&self, folder: &OwnedFd, meta: FolderMeta) -> Result<(), Errno> {
        if self.as_root && (meta.uid, meta.gid) != (0, 0) {
            fs::fchown(folder, Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)))?;
        }
        // Its owner has to be able to remove it again.
        let mode = if self.as_root { meta.mode } else { meta.mode | 0o700 };
        fs::fchmod(folder, Mode::from_raw_mode(mode))?;
        match meta.mtime {
            Some(mtime) => fs::futimens(folder, &times(mtime)),
            None => Ok(()),
        }
    }

    /// Opens a folder of the layer, as a program with the layer as its root would.
    fn beneath(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        loop {
            match fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                // Something was renamed on this machine meanwhile, and the kernel could not be sure (openat2(2)).
                Err(Errno::AGAIN) => {}
                other => return other,
            }
        }
    }

    /// Makes the folder that an entry goes to the current one, and the folder itself where the archive has not said it.
    fn enter(&mut self, folder: &[u8]) -> Result<(), UnpackError> {
        if self.parent.as_ref().is_some_and(|(path, _)| path == folder) {
            return Ok(());
        }
        let opened = match self.beneath(folder) {
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_folders(folder)?,
            other => other.map_err(|errno| write_error(folder, errno.into()))?,
        };
        self.parent = Some((folder.to_vec(), opened));
        Ok(())
    }

    fn make_folders(&mut self, path: &[u8]) -> Result<OwnedFd, UnpackError> {
        let mut folder = self.beneath(b"").map_err(|errno| write_error(path, errno.into()))?;
        let ends = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(index, _)| index);
        for end in ends.chain([path.len()]) {
            let prefix = &path[..end];
            match self.beneath(prefix) {
                Ok(opened) => folder = opened,
                Err(Errno::NOENT | Errno::NOTDIR) => {
                    let name = split(prefix).name;
                    let hides = is_whiteout(&folder, name);
                    if hides {
                        fs::unlinkat(&folder, name, AtFlags::empty())
                            .map_err(|errno| write_error(prefix, errno.into()))?;
                    }
                    fs::mkdirat(&folder, name, Mode::RWXU).map_err(|errno| match errno {
                        Errno::EXIST => refused(path, "its folder is a file, or a link that leads nowhere"),
                        errno => write_error(prefix, errno.into()),
                    })?;
                    folder = self.beneath(prefix).map_err(|errno| write_error(prefix, errno.into()))?;
                    if hides {
                        set_opaque(&folder, prefix)?;
                    }
                    let implied = FolderMeta { mode: 0o755, uid: 0, gid: 0, mtime: None };
                    self.remember_meta(prefix, implied)?;
                }
                Err(errno) => return Err(write_error(prefix, errno.into())),
            }
        }
        Ok(folder)
    }

    /// The folder entered last.
    fn parent(&self) -> &OwnedFd {
        self.parent.as_ref().map_or(&self.root, |(_, folder)| folder)
    }

    /// Does what makes `name` in the current folder. Where something is there already, it goes first.
    fn make<T>(
        &mut self,
        place: &Place<'_>,
        make: impl Fn(&OwnedFd) -> Result<T, Errno>,
    ) -> Result<T, UnpackError> {
        self.enter(place.folder)?;
        let error = |errno: Errno| write_error(&place.path(), errno.into());
        match make(self.parent()) {
            Err(Errno::EXIST) => {
                if remove(self.parent(), place.name).map_err(error)? {
                    self.forget(&place.path());
                }
                // What went may have been a link on the way to this very folder: the next entry looks it up anew.
                if let Some((path, _)) = &mut self.parent {
                    *path = vec![0];
                }
                make(self.parent()).map_err(error)
            }
            other => other.map_err(error),
        }
    }

    fn put_folder(&mut self, path: &[u8], place: &Place<'_>, entry: &Entry) -> Result<(), UnpackError> {
        self.enter(place.folder)?;
        let error = |errno: Errno| write_error(path, errno.into());
        let there = fs::statat(self.parent(), place.name, AtFlags::SYMLINK_NOFOLLOW);
        let is_folder = there.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if !is_folder {
            let hides = is_whiteout(self.parent(), place.name);
            self.make(place, |folder| fs::mkdirat(folder, place.name, Mode::RWXU))?;
            self.disk_bytes += 4096;
            if hides {
                set_opaque(&open_folder(self.parent(), place.name).map_err(error)?, path)?;
            }
        }
        if !entry.attributes.is_empty() {
            let folder = open_folder(self.parent(), place.name).map_err(error)?;
            self.set_attributes(&folder, entry);
        }
        self.remember(path, entry)
    }

    fn put_file<R: io::Read>(
        &mut self,
        place: &Place<'_>,
        entry: &Entry,
        tape: &mut Tape<R>,
    ) -> Result<(), UnpackError> {
        self.file_bytes = self.file_bytes.saturating_add(entry.size);
        if self.file_bytes > self.limits.layer_bytes {
            let bound = self.limits.layer_bytes;
            return Err(UnpackError::TooLarge { what: "its files have too many bytes", bound });
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            self.make(place, |folder| fs::openat(folder, place.name, flags, Mode::RUSR | Mode::WUSR))?;
        let mut file = File::from(file);
        let mut buffer = std::mem::take(&mut self.buffer);
        let written = write_data(&mut file, entry, tape, &mut buffer);
        self.buffer = buffer;
        written.map_err(|error| error.of(&entry.path))?;
        let data: u64 = match &entry.pieces {
            None => entry.size,
            Some(pieces) => pieces.iter().map(|piece| piece.1).sum(),
        };
        self.disk_bytes += data.next_multiple_of(4096);
        let file = OwnedFd::from(file);
        let (uid, gid) = self.owner(entry);
        let set = || {
            if self.as_root && (uid, gid) != (0, 0) {
                fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
            }
            // After chown, which takes setuid away.
            fs::fchmod(&file, Mode::from_raw_mode(entry.mode))
        };
        set().map_err(|errno| write_error(&entry.path, errno.into()))?;
        self.set_attributes(&file, entry);
        fs::futimens(&file, &times(entry.mtime)).map_err(|errno| write_error(&entry.path, errno.into()))
    }

    fn put_hard_link(&mut self, place: &Place<'_>, entry: &Entry) -> Result<(), UnpackError> {
        let target = clean(&entry.link, self.limits.depth)?;
        let to = split(&target);
        let missing = || refused(&entry.path, "it is a hard link to what this layer does not have");
        if to.name.is_empty() {
            return Err(missing());
        }
        let folder = self.beneath(to.folder).map_err(|_| missing())?;
        let stat = fs::statat(&folder, to.name, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| missing())?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => return Err(refused(&entry.path, "it is a hard link to a folder")),
            FileType::CharacterDevice => return Err(missing()),
            _ => {}
        }
        self.enter(place.folder)?;
        if let Ok(there) = fs::statat(self.parent(), place.name, AtFlags::SYMLINK_NOFOLLOW)
            && (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino)
        {
            return Ok(());
        }
        self.make(place, |parent| fs::linkat(&folder, to.name, parent, place.name, AtFlags::empty()))
    }

    fn put_symlink(&mut self, place: &Place<'_>, entry: &Entry) -> Result<(), UnpackError> {
        if entry.link.is_empty() || entry.link.len() > PATH_BYTES || entry.link.contains(&0) {
            return Err(refused(&entry.path, "what the link leads to is no path"));
        }
        self.make(place, |folder| fs::symlinkat(&entry.link[..], folder, place.name))?;
        self.set_unopened(place, entry, false)
    }

    fn put_fifo(&mut self, place: &Place<'_>, entry: &Entry) -> Result<(), UnpackError> {
        self.make(place, |folder| fs::mkfifoat(folder, place.name, Mode::RUSR | Mode::WUSR))?;
        self.set_unopened(place, entry, true)
    }

    /// Owner, mode and time of what is not opened: a fifo would wait, a link would lead away.
    fn set_unopened(&mut self, place: &Place<'_>, entry: &Entry, has_mode: bool) -> Result<(), UnpackError> {
        let (uid, gid) = self.owner(entry);
        let folder = self.parent();
        let set = || {
            if self.as_root && (uid, gid) != (0, 0) {
                let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                fs::chownat(folder, place.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            if has_mode {
                // Nobody else is in this folder, and what was made a moment ago is no link.
                fs::chmodat(folder, place.name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
            }
            fs::utimensat(folder, place.name, &times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)
        };
        set().map_err(|errno| write_error(&entry.path, errno.into()))
    }

    fn put_whiteout(&mut self, whiteout: Whiteout<'_>, place: &Place<'_>) -> Result<(), UnpackError> {
        let name = match whiteout {
            Whiteout::Ignored => return Ok(()),
            Whiteout::Opaque => {
                self.enter(place.folder)?;
                return set_opaque(self.parent(), place.folder);
            }
            Whiteout::Of(name) => name,
        };
        self.enter(place.folder)?;
        let folder = self.parent();
        let error = |errno: Errno| write_error(&place.path(), errno.into());
        match fs::mknodat(folder, name, FileType::CharacterDevice, Mode::empty(), 0) {
            Err(Errno::EXIST) => {
                let stat = fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).map_err(error)?;
                if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                    set_opaque(&open_folder(folder, name).map_err(error)?, name)?;
                }
                Ok(())
            }
            other => other.map_err(error),
        }
    }

    /// `user.*` only. What the file system does not take is left out as well: an image runs without it.
    fn set_attributes(&mut self, file: &OwnedFd, entry: &Entry) {
        for (name, value) in &entry.attributes {
            let wanted = name.starts_with(b"user.") && !name.starts_with(b"user.overlay.");
            let fits = wanted && name.len() <= NAME_BYTES && !name.contains(&0) && value.len() <= 64 << 10;
            if !fits || fs::fsetxattr(file, &name[..], value, XattrFlags::empty()).is_err() {
                self.oddities.attributes += 1;
            }
        }
    }

    fn owner(&mut self, entry: &Entry) -> (u32, u32) {
        if self.as_root && (entry.uid > MOST_ID || entry.gid > MOST_ID) {
            self.oddities.ids += 1;
        }
        (clamped(entry.uid), clamped(entry.gid))
    }

    fn remember(&mut self, path: &[u8], entry: &Entry) -> Result<(), UnpackError> {
        let (uid, gid) = self.owner(entry);
        self.remember_meta(path, FolderMeta { mode: entry.mode, uid, gid, mtime: Some(entry.mtime) })
    }

    fn remember_meta(&mut self, path: &[u8], meta: FolderMeta) -> Result<(), UnpackError> {
        if self.folders.insert(path.to_vec(), meta).is_none() {
            self.folder_bytes += path.len() + std::mem::size_of::<FolderMeta>();
        }
        if self.folder_bytes > FOLDER_BYTES {
            let bound = FOLDER_BYTES as u64;
            return Err(UnpackError::TooLarge { what: "its folders' names take too many bytes", bound });
        }
        Ok(())
    }

    /// A folder is gone, with all in it.
    fn forget(&mut self, path: &[u8]) {
        let mut below = path.to_vec();
        below.push(b'/');
        let gone: Vec<_> = self
            .folders
            .range(below.clone()..)
            .map(|(path, _)| path)
            .take_while(|path| path.starts_with(&below))
            .cloned()
            .collect();
        for path in gone {
            self.folders.remove(&path);
        }
        self.folders.remove(path);
    }
}

/// A file's data, and what went wrong: on the tape or on disk.
enum DataError {
    Tape(UnpackError),
    Disk(io::Error),
}

impl DataError {
    fn of(self, path: &[u8]) -> UnpackError {
        match self {
            Self::Tape(error) => error,
            Self::Disk(error) => write_error(path, error),
        }
    }
}

fn write_data<R: io::Read>(
    file: &mut File,
    entry: &Entry,
    tape: &mut Tape<R>,
    buffer: &mut [u8],
) -> Result<(), DataError> {
    let whole = [(0, entry.size)];
    let pieces = entry.pieces.as_deref().unwrap_or(&whole);
    for (offset, length) in pieces {
        if entry.pieces.is_some() {
            file.seek(SeekFrom::Start(*offset)).map_err(DataError::Disk)?;
        }
        let mut left = *length;
        while left > 0 {
            let most = left.min(buffer.len() as u64) as usize;
            let count = tape.read_data(&mut buffer[..most]).map_err(DataError::Tape)?;
            file.write_all(&buffer[..count]).map_err(DataError::Disk)?;
            left -= count as u64;
        }
    }
    if entry.pieces.is_some() {
        file.set_len(entry.size).map_err(DataError::Disk)?;
    }
    Ok(())
}

fn write_error(path: &[u8], source: io::Error) -> UnpackError {
    UnpackError::Write { entry: shown(path), source: Arc::new(source) }
}

fn times((tv_sec, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec { tv_sec, tv_nsec: nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Whether files can be given to any id of a layer. Root of a user namespace may have a few only, and is no better off than others.
fn has_all_ids() -> bool {
    let covers = |path| {
        let Ok(map) = std::fs::read_to_string(path) else { return true };
        map.lines().any(|line| {
            let mut numbers = line.split_whitespace().map(str::parse::<u64>);
            let (first, _, count) = (numbers.next(), numbers.next(), numbers.next());
            matches!((first, count), (Some(Ok(0)), Some(Ok(count))) if count > MOST_ID)
        })
    };
    covers("/proc/self/uid_map") && covers("/proc/self/gid_map")
}

fn clamped(id: u64) -> u32 {
    u32::try_from(id).ok().filter(|_| id <= MOST_ID).unwrap_or(NOBODY)
}

fn is_whiteout(folder: &OwnedFd, name: &[u8]) -> bool {
    fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
    })
}

fn open_folder(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(parent, name, flags, Mode::empty())
}

fn set_opaque(folder: &OwnedFd, path: &[u8]) -> Result<(), UnpackError> {
    fs::fsetxattr(folder, "user.overlay.opaque", b"y", XattrFlags::empty())
        .map_err(|errno| write_error(path, errno.into()))
}

/// Whatever it is, with all that is in it. True if it was a folder.
fn remove(parent: &OwnedFd, name: &[u8]) -> Result<bool, Errno> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other.map(|()| false),
    }
    // Depth is bounded by that of entries.
    let folder = open_folder(parent, name)?;
    for entry in fs::Dir::read_from(&folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if !matches!(name, b"." | b"..") {
            remove(&folder, name)?;
        }
    }
    fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}
