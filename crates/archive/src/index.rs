//! Says what is in an archive, and where.

use std::io::Read;

use serde::{Deserialize, Serialize};

use crate::{
    MAX_ENTRIES, MAX_INDEX_BYTES, MAX_SKIP_BYTES, MAX_WINDOW_LOG, SKIPPABLE_HEADER_BYTES, SKIPPABLE_MAGIC,
    TRAILER_BYTES, TRAILER_MAGIC, relative_name,
};

/// What is in an archive, in the tar's order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Index {
    pub files: Vec<Entry>,
}

/// One entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    // The names in JSON are short: there may be very many of them.
    /// Relative, without `.` and `..`. Bytes that are not UTF-8 are shown as U+FFFD; the tar has them as they are.
    #[serde(rename = "p")]
    pub path: String,
    #[serde(rename = "k")]
    pub kind: EntryKind,
    /// Of its contents; 0 for all but files.
    #[serde(rename = "s")]
    pub size_bytes: u64,
    /// The permission bits.
    #[serde(rename = "m")]
    pub mode: u32,
    /// Of a link: as it was written, for a hard link another entry's path.
    #[serde(rename = "t", default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The frame that holds it.
    #[serde(rename = "f")]
    pub frame: Frame,
    /// Where its contents begin in the unpacked frame.
    #[serde(rename = "o")]
    pub skip_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    File,
    Folder,
    Symlink,
    Hardlink,
}

impl EntryKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Folder => "folder",
            Self::Symlink => "symlink",
            Self::Hardlink => "hardlink",
        }
    }
}

/// A range of the archive's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Frame {
    pub offset: u64,
    pub length: u64,
}

impl From<(u64, u64)> for Frame {
    fn from((offset, length): (u64, u64)) -> Self {
        Self { offset, length }
    }
}

impl From<Frame> for (u64, u64) {
    fn from(frame: Frame) -> Self {
        (frame.offset, frame.length)
    }
}

/// Why an index cannot be believed.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    #[error("this is no archive: it does not end with an index")]
    NotThere,
    #[error("the archive's index is damaged: {0}")]
    Damaged(&'static str),
    #[error("the archive's index cannot be unpacked")]
    Unpack(#[source] std::io::Error),
    #[error("the archive's index cannot be read")]
    Read(#[source] serde_json::Error),
    #[error("the archive has more than {MAX_ENTRIES} entries")]
    TooMany,
    #[error("the archive's entry {entry} says what cannot be: {what}")]
    Entry { entry: usize, what: &'static str },
}

/// What the end of an archive told.
#[derive(Debug)]
pub enum Tail {
    Index(Index),
    /// The index is longer: come again with this many bytes of the archive's end.
    Needs(u64),
}

/// Reads the index from the last bytes of an archive of `archive_bytes`. 64 KiB are enough for most.
pub fn read_index(tail: &[u8], archive_bytes: u64) -> Result<Tail, IndexError> {
    let Some(at) = tail.len().checked_sub(TRAILER_BYTES) else { return Err(IndexError::NotThere) };
    let trailer = &tail[at..];
    if &trailer[8..] != TRAILER_MAGIC {
        return Err(IndexError::NotThere);
    }
    let packed_bytes = u32_at(trailer, 0) as usize;
    let unpacked_bytes = u32_at(trailer, 4) as usize;
    if unpacked_bytes > MAX_INDEX_BYTES || packed_bytes > MAX_INDEX_BYTES + (1 << 20) {
        return Err(IndexError::Damaged("it is too large"));
    }
    let whole = SKIPPABLE_HEADER_BYTES + packed_bytes + TRAILER_BYTES;
    if whole as u64 > archive_bytes {
        return Err(IndexError::Damaged("it is longer than the archive"));
    }
    let Some(start) = tail.len().checked_sub(whole) else { return Ok(Tail::Needs(whole as u64)) };
    let frame = &tail[start..];
    if u32_at(frame, 0) != SKIPPABLE_MAGIC || u32_at(frame, 4) as usize != packed_bytes + TRAILER_BYTES {
        return Err(IndexError::Damaged("its bounds do not agree"));
    }
    let packed = &frame[SKIPPABLE_HEADER_BYTES..SKIPPABLE_HEADER_BYTES + packed_bytes];
    let json = unpack(packed, unpacked_bytes).map_err(IndexError::Unpack)?;
    let index: Index = serde_json::from_slice(&json).map_err(IndexError::Read)?;
    index.check(archive_bytes - whole as u64)?;
    Ok(Tail::Index(index))
}

fn unpack(packed: &[u8], unpacked_bytes: usize) -> std::io::Result<Vec<u8>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(packed)?;
    decoder.window_log_max(MAX_WINDOW_LOG + 2)?;
    let mut json = Vec::new();
    decoder.take(unpacked_bytes as u64 + 1).read_to_end(&mut json)?;
    if json.len() != unpacked_bytes {
        return Err(std::io::Error::other("it is not as long as it says"));
    }
    Ok(json)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(four)
}

impl Index {
    /// The entry with a name.
    pub fn entry(&self, path: &str) -> Option<&Entry> {
        self.files.iter().find(|entry| entry.path == path)
    }

    /// The bytes of all files' contents together.
    pub fn unpacked_bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, entry| sum.saturating_add(entry.size_bytes))
    }

    /// Whether everything it says can be, in an archive with frames up to `frames_end`.
    fn check(&self, frames_end: u64) -> Result<(), IndexError> {
        if self.files.len() > MAX_ENTRIES {
            return Err(IndexError::TooMany);
        }
        for (number, entry) in self.files.iter().enumerate() {
            if let Some(what) = entry.impossible(frames_end) {
                return Err(IndexError::Entry { entry: number, what });
            }
        }
        Ok(())
    }
}

impl Entry {
    fn impossible(&self, frames_end: u64) -> Option<&'static str> {
        let end = self.frame.offset.checked_add(self.frame.length);
        if self.path.is_empty() || relative_name(&self.path).as_deref() != Some(&self.path) {
            return Some("its name leads elsewhere");
        }
        if self.frame.length == 0 || end.is_none_or(|end| end > frames_end) {
            return Some("it lies outside of the archive");
        }
        if self.skip_bytes > MAX_SKIP_BYTES {
            return Some("too much stands before it");
        }
        let is_link = matches!(self.kind, EntryKind::Symlink | EntryKind::Hardlink);
        if is_link != self.target.is_some() {
            return Some("a link has a target, and nothing else has");
        }
        if self.kind != EntryKind::File && self.size_bytes != 0 {
            return Some("only files have contents");
        }
        if self.size_bytes > i64::MAX as u64 || self.mode > 0o7777 {
            return Some("its size or its mode is none");
        }
        None
    }
}
