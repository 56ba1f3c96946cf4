//! Unpacks a tar archive below a folder, as the init itself and for it.
//!
//! The archive is another action's, and so hostile. Invariants: a name leads nowhere but below the folder (no absolute names,
//! no `..`, and no symbolic link is followed on the way); memory does not grow with the archive; an archive that breaks
//! off is told from a whole one, by the block of zeros at its end.

use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tar::{Archive, Entry, EntryType, PaxExtensions};

use crate::carrier::Progress;
use crate::sys;

/// What describes the next entry: its name, and little else.
const LONGEST_EXTENSION_BYTES: u64 = 64 << 10;
const BUFFER_BYTES: usize = 128 << 10;
/// A piece of zeros so long becomes a hole.
const HOLE_BYTES: usize = 4 << 10;
/// What is kept of a mode. Owners do not travel, so bits that lend them do not either.
const MODE_BITS: u32 = 0o777;

/// What was unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unpacked {
    /// Entries.
    pub files: u64,
    /// Of content.
    pub bytes: u64,
}

/// Unpacks below `root`, which is made where it is absent. What is there already is replaced, but for folders, which are
/// filled. The error is for a person.
pub fn unpack(archive: impl Read, root: &Path, progress: &Progress) -> Result<Unpacked, String> {
    fs::create_dir_all(root)
        .map_err(|error| format!("cannot make the folder {}: {error}", root.display()))?;
    let mut ends = false;
    let noticing = Noticing { inner: archive, ends: &mut ends };
    let mut archive = Archive::new(noticing);
    let mut unpacking = Unpacking {
        root,
        known: PathBuf::new(),
        open: Vec::new(),
        next: Extension::default(),
        buffer: vec![0; BUFFER_BYTES],
        unpacked: Unpacked::default(),
        progress,
    };
    let broken = |error: io::Error| format!("this is not a whole tar archive: {error}");
    for entry in archive.entries().map_err(broken)?.raw(true) {
        progress.step()?;
        unpacking.take(&mut entry.map_err(broken)?)?;
    }
    unpacking.close_down_to(None)?;
    let unpacked = unpacking.unpacked;
    let mut rest = archive.into_inner();
    if *rest.ends {
        return Err("this is not a whole tar archive: it breaks off".to_owned());
    }
    io::copy(&mut rest, &mut io::sink()).map_err(broken)?;
    Ok(unpacked)
}

/// Notices that the archive has ended.
struct Noticing<'a, R> {
    inner: R,
    ends: &'a mut bool,
}

impl<R: Read> Read for Noticing<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        *self.ends |= count == 0 && !buffer.is_empty();
        Ok(count)
    }
}

struct Unpacking<'a> {
    root: &'a Path,
    /// Below the root, a folder that is known to be there, and to be reached without a link.
    known: PathBuf,
    /// Folders that are being filled, each in the one before.
    open: Vec<Folder>,
    next: Extension,
    buffer: Vec<u8>,
    unpacked: Unpacked,
    progress: &'a Progress,
}

/// A folder whose mode and time are set when it is filled.
struct Folder {
    path: PathBuf,
    mode: u32,
    changed_at: SystemTime,
}

/// What stands in front of an entry, and is about it.
#[derive(Default)]
struct Extension {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    changed_at: Option<SystemTime>,
    size: Option<u64>,
}

/// One entry, understood.
struct Item<'a> {
    /// As it stands in the archive, for messages.
    shown: String,
    path: PathBuf,
    link: &'a [u8],
    mode: u32,
    changed_at: SystemTime,
    size: u64,
}

impl Unpacking<'_> {
    fn take<R: Read>(&mut self, entry: &mut Entry<'_, R>) -> Result<(), String> {
        let kind = entry.header().entry_type();
        match kind {
            EntryType::GNULongName => self.next.name = Some(extension(entry)?),
            EntryType::GNULongLink => self.next.link = Some(extension(entry)?),
            EntryType::XHeader => read_pax(&extension(entry)?, &mut self.next)?,
            // Said of the whole archive: nothing that matters here.
            EntryType::XGlobalHeader => {}
            _ => return self.place(kind, entry),
        }
        Ok(())
    }

    fn place<R: Read>(&mut self, kind: EntryType, entry: &mut Entry<'_, R>) -> Result<(), String> {
        let extension = std::mem::take(&mut self.next);
        let header = entry.header().clone();
        let name = extension.name.unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = String::from_utf8_lossy(&name).into_owned();
        let broken = |error: io::Error| format!("`{shown}` has a broken header: {error}");
        let link = extension.link.or_else(|| header.link_name_bytes().map(Into::into)).unwrap_or_default();
        let header_time = UNIX_EPOCH.checked_add(Duration::from_secs(header.mtime().map_err(broken)?));
        let item = Item {
            path: below(&name).ok_or_else(|| format!("the name `{shown}` leads out of its folder"))?,
            link: &link,
            mode: header.mode().map_err(broken)? & MODE_BITS,
            changed_at: extension.changed_at.or(header_time).unwrap_or(UNIX_EPOCH),
            size: entry.size(),
            shown: shown.clone(),
        };
        if extension.size.is_some_and(|size| size != item.size) {
            return Err(format!("`{shown}` has two sizes"));
        }
        if item.path.as_os_str().is_empty() {
            // The folder itself; it is somebody else's.
            return Ok(());
        }
        self.close_down_to(Some(&item.path))?;
        let placed = self.parent_of(&item.path).and_then(|()| {
            let path = self.root.join(&item.path);
            match kind {
                EntryType::Directory => self.make_folder(&path, &item),
                // What old archives have for a folder.
                EntryType::Regular if name.ends_with(b"/") => self.make_folder(&path, &item),
                EntryType::Regular | EntryType::Continuous => self.write_file(&path, &item, entry),
                EntryType::Symlink => make_link(&path, &item),
                EntryType::Link => self.link_file(&path, &item),
                _ => Err(refused("it is neither file, folder nor link")),
            }
        });
        self.unpacked.files += 1;
        placed.map_err(|error| format!("cannot unpack `{}`: {error}", item.shown))
    }

    /// Sees to it that the folder of a path is there, and reached without a link.
    fn parent_of(&mut self, path: &Path) -> io::Result<()> {
        let parent = path.parent().unwrap_or(Path::new(""));
        if parent == self.known {
            return Ok(());
        }
        let mut reached = self.root.to_owned();
        for component in parent.components() {
            reached.push(component);
            match fs::symlink_metadata(&reached) {
                Ok(found) if found.is_dir() => {}
                Ok(_) => return Err(refused(format!("{} is not a folder", reached.display()))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(&reached)?,
                Err(error) => return Err(error),
            }
        }
        self.known = parent.to_owned();
        Ok(())
    }

    fn make_folder(&mut self, path: &Path, item: &Item<'_>) -> io::Result<()> {
        if !fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
            remove_file(path)?;
            fs::create_dir(path)?;
        }
        // Until it is filled.
        fs::set_permissions(path, fs::Permissions::from_mode(item.mode | 0o700))?;
        let folder = Folder { path: item.path.clone(), mode: item.mode, changed_at: item.changed_at };
        self.open.push(folder);
        Ok(())
    }

    /// Finishes the folders that the next path is not in.
    fn close_down_to(&mut self, path: Option<&Path>) -> Result<(), String> {
        let is_in = |folder: &Folder| path.is_some_and(|path| path.starts_with(&folder.path));
        while let Some(folder) = self.open.pop_if(|folder| !is_in(folder)) {
            let path = self.root.join(&folder.path);
            let finish = || {
                File::open(&path)?.set_times(FileTimes::new().set_modified(folder.changed_at))?;
                fs::set_permissions(&path, fs::Permissions::from_mode(folder.mode))
            };
            finish().map_err(|error| format!("cannot finish the folder {}: {error}", path.display()))?;
        }
        Ok(())
    }

    fn write_file(&mut self, path: &Path, item: &Item<'_>, content: &mut impl Read) -> io::Result<()> {
        remove_file(path)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let mut left = item.size;
        while left > 0 {
            self.progress.step().map_err(io::Error::other)?;
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER_BYTES);
            let count = fill(content, &mut self.buffer[..most])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            write_sparsely(&mut file, &self.buffer[..count])?;
            left -= count as u64;
            self.unpacked.bytes += count as u64;
        }
        // A hole at the end is no content yet.
        file.set_len(item.size)?;
        file.set_permissions(fs::Permissions::from_mode(item.mode))?;
        file.set_times(FileTimes::new().set_modified(item.changed_at))
    }

    fn link_file(&mut self, path: &Path, item: &Item<'_>) -> io::Result<()> {
        let shown = String::from_utf8_lossy(item.link);
        let target = below(item.link)
            .filter(|target| !target.as_os_str().is_empty())
            .ok_or_else(|| refused(format!("its target `{shown}` leads out of its folder")))?;
        self.parent_of(&target)?;
        let target = self.root.join(target);
        if !fs::symlink_metadata(&target)?.is_file() {
            return Err(refused(format!("its target `{shown}` is not a file")));
        }
        if target == path {
            return Ok(());
        }
        remove_file(path)?;
        self.parent_of(&item.path)?;
        fs::hard_link(target, path)
    }
}

fn make_link(path: &Path, item: &Item<'_>) -> io::Result<()> {
    remove_file(path)?;
    std::os::unix::fs::symlink(OsStr::from_bytes(item.link), path)?;
    let since = item.changed_at.duration_since(UNIX_EPOCH).unwrap_or_default();
    sys::set_link_time(path, since.as_secs(), since.subsec_nanos())
}

/// A name as a path below the folder; none where it leads elsewhere.
fn below(name: &[u8]) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(path)
}

/// Makes room for something else; a folder stays, and is an error.
fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Reads until the buffer is full or nothing is left.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Writes, but leaves holes for zeros.
fn write_sparsely(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    let is_hole = |piece: &[u8]| piece == &[0; HOLE_BYTES][..piece.len()];
    while let Some(first) = bytes.chunks(HOLE_BYTES).next() {
        let is_hole_first = is_hole(first);
        let alike = bytes.chunks(HOLE_BYTES).take_while(|piece| is_hole(piece) == is_hole_first);
        let (run, rest) = bytes.split_at(alike.map(<[u8]>::len).sum());
        if is_hole_first {
            file.seek(SeekFrom::Current(i64::try_from(run.len()).unwrap_or(i64::MAX)))?;
        } else {
            file.write_all(run)?;
        }
        bytes = rest;
    }
    Ok(())
}

fn extension<R: Read>(entry: &mut Entry<'_, R>) -> Result<Vec<u8>, String> {
    if entry.size() > LONGEST_EXTENSION_BYTES {
        return Err(format!("a name or header of {} bytes is too long", entry.size()));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(|error| format!("this is not a whole tar archive: {error}"))?;
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    Ok(bytes)
}

fn read_pax(records: &[u8], extension: &mut Extension) -> Result<(), String> {
    for record in PaxExtensions::new(records) {
        let record = record.map_err(|error| format!("a header's extension is broken: {error}"))?;
        let value = record.value_bytes();
        match record.key_bytes() {
            b"path" => extension.name = Some(value.to_vec()),
            b"linkpath" => extension.link = Some(value.to_vec()),
            b"mtime" => extension.changed_at = time(value),
            b"size" => extension.size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()),
            _ => {}
        }
    }
    Ok(())
}

/// Seconds since 1970, with a fraction or without; see pax(1).
fn time(text: &[u8]) -> Option<SystemTime> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    UNIX_EPOCH.checked_add(Duration::new(seconds.parse().ok()?, digits.parse().ok()?))
}

fn refused(why: impl Into<String>) -> io::Error {
    io::Error::other(why.into())
}
