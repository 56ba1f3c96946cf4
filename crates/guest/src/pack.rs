//! Packs chosen files into a tar archive, as they are while it goes over them.
//!
//! Invariants: a symbolic link is packed as one and never followed; memory does not grow with the number of files or their
//! sizes; an entry is exactly as long as its header says, whatever becomes of its file meanwhile. The same files, unchanged,
//! give the same archive, as long as a folder's names can be sorted at once.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, ReadDir};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sealci_guest::wire::Take;
use tar::{EntryType, Header};

use crate::carrier::Progress;
use crate::choice::Choice;
use crate::places::Places;

const BUFFER_BYTES: usize = 128 << 10;
const BLOCK_BYTES: usize = 512;
/// Names that wait in memory, of all folders that are open; each folder may have a few in any case.
const WAITING_NAMES: usize = 32 << 10;
const FEWEST_NAMES: usize = 64;
/// Files with several names that are remembered; of more, each name gets the content.
const MOST_LINKS: usize = 32 << 10;
/// How many of the unreadable are named, and how long each may be.
const MOST_NAMED: usize = 16;
const LONGEST_NAME_BYTES: usize = 512;
const MODE_BITS: u32 = 0o777;
/// What an old header holds of a name, or of a link's target.
const SHORT_NAME_BYTES: usize = 100;

/// What was packed, and what was not: see [`sealci_guest::wire::Taken`].
#[derive(Debug, Default)]
pub struct Packed {
    pub files: u64,
    pub bytes: u64,
    pub missing: Vec<u32>,
    pub specials: u64,
    pub unreadable: u64,
    pub unreadable_names: Vec<String>,
}

/// Packs what `take` chooses into `out`. The error is for a person.
pub fn pack(take: &Take, places: &Places, out: impl Write, progress: &Progress) -> Result<Packed, String> {
    let mut choice = Choice::read(&take.paths, places)?;
    let base = places.resolve(&take.base);
    let base: PathBuf = base.components().collect();
    let mut packing = Packing {
        take,
        out,
        links: HashMap::new(),
        buffer: vec![0; BUFFER_BYTES],
        packed: Packed::default(),
        progress,
    };
    for start in choice.starts() {
        if leads_within(&start, &base)? {
            packing.walk(start, &base, &mut choice)?;
        }
    }
    packing.write(&[0; 2 * BLOCK_BYTES])?;
    let mut packed = packing.packed;
    packed.missing = choice.missing();
    Ok(packed)
}

/// Whether a path is there to be looked at. Its folder may be reached through links, but not out of the base.
fn leads_within(start: &Path, base: &Path) -> Result<bool, String> {
    if fs::symlink_metadata(start).is_err() {
        return Ok(false);
    }
    let folder = if start == base { start } else { start.parent().unwrap_or(start) };
    if !folder.starts_with(base) {
        // Nothing is followed below it, and what is chosen is held against the base by its name.
        return Ok(true);
    }
    match (fs::canonicalize(folder), fs::canonicalize(base)) {
        (Ok(folder), Ok(base)) if folder.starts_with(&base) => Ok(true),
        (Ok(_), Ok(_)) => Err(format!("{} leads out of {}", start.display(), base.display())),
        _ => Ok(false),
    }
}

struct Packing<'a, W> {
    take: &'a Take,
    out: W,
    /// Under which name a file with several names is packed, by its device and number.
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
    packed: Packed,
    progress: &'a Progress,
}

/// A folder on the way.
struct Folder {
    path: PathBuf,
    /// Chosen, with all that is in it.
    is_chosen: bool,
    /// The last comes first.
    names: Vec<OsString>,
    /// What has not been read of it yet.
    unread: Option<ReadDir>,
}

impl<W: Write> Packing<'_, W> {
    /// Goes over what a path is, and what is below it.
    fn walk(&mut self, start: PathBuf, base: &Path, choice: &mut Choice) -> Result<(), String> {
        let mut folders = Vec::new();
        let mut waiting_names = 0;
        let mut next = Some((start, false));
        loop {
            if let Some((path, is_chosen)) = next.take()
                && let Some(folder) = self.visit(path, is_chosen, base, choice)?
            {
                folders.push(folder);
            }
            let Some(folder) = folders.last_mut() else { return Ok(()) };
            if folder.names.is_empty() {
                let most = WAITING_NAMES.saturating_sub(waiting_names).max(FEWEST_NAMES);
                if let Err(error) = folder.read_names(most) {
                    self.packed.unread(&folder.path, &error);
                }
                waiting_names += folder.names.len();
            }
            match folder.names.pop() {
                Some(name) => {
                    waiting_names -= 1;
                    next = Some((folder.path.join(name), folder.is_chosen));
                }
                None => drop(folders.pop()),
            }
        }
    }

    /// Packs a path if it is chosen; returns it as a folder if there may be something in it.
    fn visit(
        &mut self,
        path: PathBuf,
        in_chosen: bool,
        base: &Path,
        choice: &mut Choice,
    ) -> Result<Option<Folder>, String> {
        self.progress.step()?;
        if choice.leaves_out(&path) {
            return Ok(None);
        }
        let is_chosen =
            if in_chosen && choice.is_satisfied() { true } else { choice.chooses(&path) | in_chosen };
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            // Gone since its folder was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                self.packed.unread(&path, &error);
                return Ok(None);
            }
        };
        if is_chosen {
            self.pack(&path, &metadata, base)?;
        }
        if !metadata.is_dir() || !(is_chosen || choice.reaches_into(&path)) {
            return Ok(None);
        }
        match fs::read_dir(&path) {
            Ok(unread) => Ok(Some(Folder { path, is_chosen, names: Vec::new(), unread: Some(unread) })),
            Err(error) => {
                self.packed.unread(&path, &error);
                Ok(None)
            }
        }
    }

    fn pack(&mut self, path: &Path, metadata: &Metadata, base: &Path) -> Result<(), String> {
        let name = path
            .strip_prefix(base)
            .map_err(|_| format!("{} is chosen, but not in {}", path.display(), base.display()))?;
        let name = name.as_os_str().as_bytes();
        // The base itself has no name in it.
        if name.is_empty() {
            return Ok(());
        }
        let kind = metadata.file_type();
        if kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
            self.packed.specials += 1;
            return Ok(());
        }
        if self.packed.files >= self.take.max_files {
            return Err(format!("there are more than {} files", self.take.max_files));
        }
        if kind.is_dir() {
            let name = [name, b"/"].concat();
            self.write_header(&name, EntryType::Directory, metadata, 0, b"")?;
        } else if kind.is_symlink() {
            match fs::read_link(path) {
                Ok(target) => {
                    let target = target.as_os_str().as_bytes();
                    self.write_header(name, EntryType::Symlink, metadata, 0, target)?;
                }
                Err(error) => {
                    self.packed.unread(path, &error);
                    return Ok(());
                }
            }
        } else if !self.pack_file(path, name)? {
            return Ok(());
        }
        self.packed.files += 1;
        Ok(())
    }

    /// Packs a file; false: there is none that can be read.
    fn pack_file(&mut self, path: &Path, name: &[u8]) -> Result<bool, String> {
        // Whatever has taken its place meanwhile is neither followed nor waited for.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let (mut file, metadata) = match opened.and_then(|file| Ok((file.metadata()?, file))) {
            Ok((metadata, file)) if metadata.is_file() => (file, metadata),
            Ok(_) => {
                self.packed.specials += 1;
                return Ok(false);
            }
            Err(error) => {
                self.packed.unread(path, &error);
                return Ok(false);
            }
        };
        if metadata.nlink() > 1 {
            let file_id = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&file_id).cloned() {
                self.write_header(name, EntryType::Link, &metadata, 0, &first)?;
                return Ok(true);
            }
            if self.links.len() < MOST_LINKS {
                self.links.insert(file_id, name.to_owned());
            }
        }
        let size = metadata.len();
        if self.packed.bytes.saturating_add(size) > self.take.max_bytes {
            return Err(format!(
                "with {} the files hold more than {} bytes",
                path.display(),
                self.take.max_bytes
            ));
        }
        self.write_header(name, EntryType::Regular, &metadata, size, b"")?;
        if let Err(error) = self.copy(&mut file, size)? {
            self.packed.unread(path, &error);
        }
        self.packed.bytes += size;
        Ok(true)
    }

    /// Writes exactly `size` bytes, with zeros for what the file no longer has; and the rest of the last block. The inner
    /// error is the file's.
    fn copy(&mut self, file: &mut File, size: u64) -> Result<io::Result<()>, String> {
        let mut result = Ok(());
        let mut left = size;
        let mut is_readable = true;
        while left > 0 {
            self.progress.step()?;
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(BUFFER_BYTES);
            let read = if is_readable { file.read(&mut self.buffer[..most]) } else { Ok(0) };
            let count = match read {
                Ok(0) => {
                    is_readable = false;
                    self.buffer[..most].fill(0);
                    most
                }
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    result = Err(error);
                    is_readable = false;
                    continue;
                }
            };
            self.out.write_all(&self.buffer[..count]).map_err(cannot_write)?;
            left -= count as u64;
        }
        let rest = usize::try_from(size % BLOCK_BYTES as u64).unwrap_or(0);
        if rest > 0 {
            self.write(&[0; BLOCK_BYTES][rest..])?;
        }
        Ok(result)
    }

    fn write_header(
        &mut self,
        name: &[u8],
        kind: EntryType,
        metadata: &Metadata,
        size: u64,
        link: &[u8],
    ) -> Result<(), String> {
        let records = extension(name, link, metadata);
        let mut blocks = Vec::with_capacity(3 * BLOCK_BYTES);
        if !records.is_empty() {
            let mut header = Header::new_ustar();
            header.set_entry_type(EntryType::XHeader);
            header.set_size(records.len() as u64);
            header.set_mode(0o644);
            set_name(&mut header, b"extension", b"");
            blocks.extend_from_slice(header.as_bytes());
            blocks.extend_from_slice(&records);
            blocks.resize(blocks.len().next_multiple_of(BLOCK_BYTES), 0);
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(metadata.mode() & MODE_BITS);
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        set_name(&mut header, name, link);
        blocks.extend_from_slice(header.as_bytes());
        self.write(&blocks)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.out.write_all(bytes).map_err(cannot_write)
    }
}

impl Folder {
    /// Reads on; sorted, as far as they are read at once.
    fn read_names(&mut self, most: usize) -> io::Result<()> {
        let Some(mut unread) = self.unread.take() else { return Ok(()) };
        for entry in unread.by_ref().take(most) {
            self.names.push(entry?.file_name());
        }
        // The descriptor is kept only where there is more: folders may be nested deeper than files may be open.
        if self.names.len() == most {
            self.unread = Some(unread);
        }
        self.names.sort_unstable_by(|a, b| b.cmp(a));
        Ok(())
    }
}

impl Packed {
    fn unread(&mut self, path: &Path, error: &io::Error) {
        self.unreadable += 1;
        if self.unreadable_names.len() < MOST_NAMED {
            let mut text = format!("{}: {error}", path.display());
            text.truncate(text.floor_char_boundary(LONGEST_NAME_BYTES));
            self.unreadable_names.push(text);
        }
    }
}

fn cannot_write(error: io::Error) -> String {
    format!("the archive could not be passed on: {error}")
}

/// Puts names into a header, as far as there is room, and completes it.
fn set_name(header: &mut Header, name: &[u8], link: &[u8]) {
    let fields = header.as_old_mut();
    for (field, bytes) in [(&mut fields.name, name), (&mut fields.linkname, link)] {
        let count = bytes.len().min(SHORT_NAME_BYTES);
        field[..count].copy_from_slice(&bytes[..count]);
    }
    header.set_cksum();
}

/// What a header has no room for, as records of pax(1).
fn extension(name: &[u8], link: &[u8], metadata: &Metadata) -> Vec<u8> {
    let mut records = Vec::new();
    for (key, value) in [("path", name), ("linkpath", link)] {
        if value.len() > SHORT_NAME_BYTES {
            put_record(&mut records, key, value);
        }
    }
    if metadata.mtime_nsec() != 0 && metadata.mtime() >= 0 {
        let time = format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec());
        put_record(&mut records, "mtime", time.as_bytes());
    }
    records
}

/// `<length> <key>=<value>\n`, where the length counts its own digits.
fn put_record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut digits = 1;
    while (rest + digits).to_string().len() > digits {
        digits += 1;
    }
    records.extend_from_slice(format!("{} {key}=", rest + digits).as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_itself() {
        for length in [1, 80, 85, 86, 87, 88, 89, 90, 91, 92, 986, 987, 988, 989, 990, 991, 992, 5000] {
            let value = vec![b'v'; length];
            let mut records = Vec::new();
            put_record(&mut records, "path", &value);
            let count: usize =
                std::str::from_utf8(&records).unwrap().split(' ').next().unwrap().parse().unwrap();
            assert_eq!(count, records.len(), "{length}");
            let read = tar::PaxExtensions::new(&records).next().unwrap().unwrap();
            assert_eq!((read.key_bytes(), read.value_bytes()), (&b"path"[..], &value[..]));
        }
    }
}
