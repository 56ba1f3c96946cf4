//! Turns a tar stream into an archive while it flows by.
//!
//! ```text
//!   header ──▶ body (of a file, or of what prepares the next header: pax, GNU long names) ──▶ header … ──▶ ended
//! ```

use std::io::{self, Write};

use sha2::{Digest, Sha256};
use tar::{EntryType, Header};
use zstd::stream::raw::{CParameter, Encoder, InBuffer, Operation, OutBuffer};

use crate::index::{Entry, EntryKind, Frame, Index};
use crate::{
    MAX_ENTRIES, MAX_INDEX_BYTES, OWN_FRAME_BYTES, SKIPPABLE_MAGIC, TRAILER_BYTES, TRAILER_MAGIC,
    relative_name,
};

const BLOCK: usize = 512;
/// A pax header or a long name is at most so large.
const MAX_PREFIX_BYTES: u64 = 1 << 20;
const OUT_BYTES: usize = 128 << 10;
/// What most entries take in the index besides their names.
const ENTRY_BYTES: usize = 72;
/// zstd's own default: fast, and good enough for what is mostly compressed once and read a few times.
const LEVEL: i32 = 3;

/// Why a tar stream makes no archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("cannot write the archive")]
    Write(#[source] io::Error),
    #[error("cannot compress")]
    Compress(#[source] io::Error),
    #[error("this is no tar stream: {0}")]
    Malformed(&'static str),
    #[error("the tar stream ends in the middle")]
    Truncated,
    #[error("`{0}` leads out of the folder that is packed")]
    Name(String),
    #[error("`{name}` is {kind}, which is not kept; leave it out")]
    Kind { name: String, kind: &'static str },
    #[error(
        "there are more than {MAX_ENTRIES} files and folders; pack them into one file first, or keep fewer"
    )]
    TooMany,
    #[error("the names of the files take more than {} MiB; pack them into one file first, or keep fewer", MAX_INDEX_BYTES >> 20)]
    NamesTooLong,
}

/// What an archive became.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// SHA-256 of the archive.
    pub sha256: [u8; 32],
    /// Of the archive.
    pub size_bytes: u64,
    /// Of the files' contents.
    pub unpacked_bytes: u64,
    pub index: Index,
}

impl Summary {
    /// As the API has it: `sha256:` and hexadecimal digits.
    pub fn digest(&self) -> String {
        self.sha256.iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"))
    }
}

/// Takes a tar stream by [`ArchiveWriter::push`] (or [`Write`]) and writes the archive to `out`.
pub struct ArchiveWriter<W> {
    out: Output<W>,
    encoder: Encoder<'static>,
    frame: OpenFrame,
    state: State,
    /// What the headers before the next entry's own say of it.
    said: Said,
    index: Index,
    names_bytes: usize,
}

impl<W> std::fmt::Debug for ArchiveWriter<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArchiveWriter").field("entries", &self.index.files.len()).finish_non_exhaustive()
    }
}

/// The frame that is being written.
#[derive(Debug, Default)]
struct OpenFrame {
    offset: u64,
    /// Unpacked, so far.
    bytes: u64,
    /// The entries from here on are in it.
    first_entry: usize,
}

enum State {
    Header { block: Box<[u8; BLOCK]>, filled: usize },
    Body { left: u64, collects: Option<(Prefix, Vec<u8>)> },
    Ended,
}

#[derive(Debug, Clone, Copy)]
enum Prefix {
    LongName,
    LongLink,
    Pax,
    GlobalPax,
}

#[derive(Debug, Default)]
struct Said {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
}

struct Output<W> {
    out: W,
    hash: Sha256,
    written: u64,
    buffer: Vec<u8>,
}

impl<W: Write> Output<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.hash.update(bytes);
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).map_err(ArchiveError::Write)
    }
}

fn first_state() -> State {
    State::Header { block: Box::new([0; BLOCK]), filled: 0 }
}

impl<W: Write> ArchiveWriter<W> {
    pub fn new(out: W) -> Result<Self, ArchiveError> {
        let mut encoder = Encoder::new(LEVEL).map_err(ArchiveError::Compress)?;
        encoder.set_parameter(CParameter::ChecksumFlag(true)).map_err(ArchiveError::Compress)?;
        Ok(Self {
            out: Output { out, hash: Sha256::new(), written: 0, buffer: vec![0; OUT_BYTES] },
            encoder,
            frame: OpenFrame::default(),
            state: first_state(),
            said: Said::default(),
            index: Index::default(),
            names_bytes: 0,
        })
    }

    /// Takes the next bytes of the tar stream.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), ArchiveError> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Ended => return Ok(()), // padding
                State::Header { block, filled } => {
                    let taken = bytes.len().min(BLOCK - *filled);
                    block[*filled..*filled + taken].copy_from_slice(&bytes[..taken]);
                    *filled += taken;
                    bytes = &bytes[taken..];
                    if *filled == BLOCK {
                        let block = block.clone();
                        self.header(&block)?;
                    }
                }
                State::Body { left, collects } => {
                    let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                    let (piece, rest) = bytes.split_at(taken);
                    *left -= taken as u64;
                    if let Some((_, collected)) = collects {
                        collected.extend_from_slice(piece);
                    }
                    let is_over = *left == 0;
                    self.compress(piece)?;
                    bytes = rest;
                    if is_over {
                        self.body_ended()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Ends the archive; the tar stream must have ended.
    pub fn finish(mut self) -> Result<(W, Summary), ArchiveError> {
        if !matches!(self.state, State::Ended) {
            return Err(ArchiveError::Truncated);
        }
        self.compress(&[0; 2 * BLOCK])?;
        self.end_frame()?;
        let json = serde_json::to_vec(&self.index).map_err(|error| ArchiveError::Compress(error.into()))?;
        if json.len() > MAX_INDEX_BYTES {
            return Err(ArchiveError::NamesTooLong);
        }
        let packed = zstd::bulk::compress(&json, LEVEL).map_err(ArchiveError::Compress)?;
        // Neither is above the bound checked just now, which is far below 2³².
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
        self.out.write(&SKIPPABLE_MAGIC.to_le_bytes())?;
        self.out.write(&length(packed.len() + TRAILER_BYTES))?;
        self.out.write(&packed)?;
        self.out.write(&length(packed.len()))?;
        self.out.write(&length(json.len()))?;
        self.out.write(TRAILER_MAGIC)?;
        self.out.out.flush().map_err(ArchiveError::Write)?;
        let summary = Summary {
            sha256: self.out.hash.finalize().into(),
            size_bytes: self.out.written,
            unpacked_bytes: self.index.unpacked_bytes(),
            index: self.index,
        };
        Ok((self.out.out, summary))
    }

    fn header(&mut self, block: &[u8; BLOCK]) -> Result<(), ArchiveError> {
        if block.iter().all(|byte| *byte == 0) {
            self.state = State::Ended;
            return Ok(());
        }
        let header = Header::from_byte_slice(block);
        let sum: u32 = block
            .iter()
            .enumerate()
            .fold(0, |sum, (at, byte)| sum + u32::from(if (148..156).contains(&at) { b' ' } else { *byte }));
        if header.cksum().ok() != Some(sum) {
            return Err(ArchiveError::Malformed("a header's sum is wrong"));
        }
        let size = header.entry_size().map_err(|_| ArchiveError::Malformed("a size is no number"))?;
        let prefix = match header.entry_type() {
            EntryType::GNULongName => Some(Prefix::LongName),
            EntryType::GNULongLink => Some(Prefix::LongLink),
            EntryType::XHeader => Some(Prefix::Pax),
            EntryType::XGlobalHeader => Some(Prefix::GlobalPax),
            _ => None,
        };
        let size = match prefix {
            Some(_) if size > MAX_PREFIX_BYTES => {
                return Err(ArchiveError::Malformed("a header is too large"));
            }
            Some(_) => {
                self.make_room(0)?;
                self.compress(block)?;
                size
            }
            None => self.entry(header, block, size)?,
        };
        let padded = size.checked_next_multiple_of(BLOCK as u64);
        let left = padded.ok_or(ArchiveError::Malformed("a size is too large"))?;
        let collects = prefix.map(|prefix| (prefix, Vec::new()));
        self.state = State::Body { left, collects };
        if left == 0 { self.body_ended() } else { Ok(()) }
    }

    /// Notes an entry, and says how long its body is.
    fn entry(&mut self, header: &Header, block: &[u8; BLOCK], size: u64) -> Result<u64, ArchiveError> {
        let said = std::mem::take(&mut self.said);
        let path = said.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let shown = String::from_utf8_lossy(&path).into_owned();
        let Some(path) = relative_name(&shown) else { return Err(ArchiveError::Name(shown)) };
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => EntryKind::File,
            EntryType::Directory => EntryKind::Folder,
            EntryType::Symlink => EntryKind::Symlink,
            EntryType::Link => EntryKind::Hardlink,
            EntryType::Char | EntryType::Block => {
                return Err(ArchiveError::Kind { name: shown, kind: "a device" });
            }
            EntryType::Fifo => return Err(ArchiveError::Kind { name: shown, kind: "a named pipe" }),
            EntryType::GNUSparse => {
                return Err(ArchiveError::Kind { name: shown, kind: "stored with holes" });
            }
            _ => return Err(ArchiveError::Kind { name: shown, kind: "of an unknown kind" }),
        };
        let size = if kind == EntryKind::File { said.size.unwrap_or(size) } else { 0 };
        let is_link = matches!(kind, EntryKind::Symlink | EntryKind::Hardlink);
        let target = said.target.or_else(|| header.link_name_bytes().map(|name| name.into_owned()));
        let target = target.filter(|_| is_link).map(|name| String::from_utf8_lossy(&name).into_owned());
        if is_link && target.is_none() {
            return Err(ArchiveError::Malformed("a link has no target"));
        }
        if let (EntryKind::Hardlink, Some(target)) = (kind, &target)
            && relative_name(target).is_none_or(|target| target.is_empty())
        {
            return Err(ArchiveError::Name(target.clone()));
        }
        self.make_room(size)?;
        self.compress(block)?;
        if !path.is_empty() {
            self.names_bytes += ENTRY_BYTES + path.len() + target.as_ref().map_or(0, String::len);
            if self.names_bytes > MAX_INDEX_BYTES {
                return Err(ArchiveError::NamesTooLong);
            }
            if self.index.files.len() == MAX_ENTRIES {
                return Err(ArchiveError::TooMany);
            }
            let mode = header.mode().unwrap_or(0) & 0o7777;
            let frame = Frame { offset: self.frame.offset, length: 0 };
            let skip_bytes = self.frame.bytes;
            self.index.files.push(Entry { path, kind, size_bytes: size, mode, target, frame, skip_bytes });
        }
        Ok(size)
    }

    /// Begins the next frame where the one that is open has enough, or the next file is large.
    fn make_room(&mut self, next_file_bytes: u64) -> Result<(), ArchiveError> {
        if self.frame.bytes >= OWN_FRAME_BYTES || (self.frame.bytes > 0 && next_file_bytes >= OWN_FRAME_BYTES)
        {
            self.end_frame()?;
        }
        Ok(())
    }

    fn body_ended(&mut self) -> Result<(), ArchiveError> {
        let ended = std::mem::replace(&mut self.state, first_state());
        let State::Body { collects: Some((prefix, bytes)), .. } = ended else { return Ok(()) };
        let text = || bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        match prefix {
            Prefix::LongName => self.said.path = Some(text()),
            Prefix::LongLink => self.said.target = Some(text()),
            Prefix::GlobalPax => {}
            Prefix::Pax => self.pax(&bytes)?,
        }
        Ok(())
    }

    /// Reads pax records: `length key=value\n`, the length in decimal and of the whole record.
    fn pax(&mut self, mut bytes: &[u8]) -> Result<(), ArchiveError> {
        let malformed = || ArchiveError::Malformed("a pax record is none");
        while bytes.first().is_some_and(|byte| *byte != 0) {
            let space = bytes.iter().position(|byte| *byte == b' ').ok_or_else(malformed)?;
            let length =
                std::str::from_utf8(&bytes[..space]).ok().and_then(|text| text.parse::<usize>().ok());
            let length = length.filter(|length| *length > space + 1 && *length <= bytes.len());
            let (record, rest) = bytes.split_at(length.ok_or_else(malformed)?);
            let record = record[space + 1..].strip_suffix(b"\n").ok_or_else(malformed)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(malformed)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.said.path = Some(value.to_vec()),
                b"linkpath" => self.said.target = Some(value.to_vec()),
                b"size" => {
                    let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                    self.said.size = Some(size.ok_or_else(malformed)?);
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(ArchiveError::Malformed("a file is stored with holes"));
                }
                _ => {}
            }
            bytes = rest;
        }
        Ok(())
    }

    fn compress(&mut self, bytes: &[u8]) -> Result<(), ArchiveError> {
        self.frame.bytes += bytes.len() as u64;
        let mut input = InBuffer::around(bytes);
        while input.pos < bytes.len() {
            let mut buffer = std::mem::take(&mut self.out.buffer);
            let mut output = OutBuffer::around(&mut buffer[..]);
            let ran = self.encoder.run(&mut input, &mut output).map_err(ArchiveError::Compress);
            let written = output.pos();
            let done = ran.and_then(|_| self.out.write(&buffer[..written]));
            self.out.buffer = buffer;
            done?;
        }
        Ok(())
    }

    fn end_frame(&mut self) -> Result<(), ArchiveError> {
        loop {
            let mut buffer = std::mem::take(&mut self.out.buffer);
            let mut output = OutBuffer::around(&mut buffer[..]);
            let ran = self.encoder.finish(&mut output, true).map_err(ArchiveError::Compress);
            let written = output.pos();
            let left = ran.and_then(|left| self.out.write(&buffer[..written]).map(|()| left));
            self.out.buffer = buffer;
            if left? == 0 {
                break;
            }
        }
        self.encoder.reinit().map_err(ArchiveError::Compress)?;
        let length = self.out.written - self.frame.offset;
        for entry in &mut self.index.files[self.frame.first_entry..] {
            entry.frame.length = length;
        }
        let first_entry = self.index.files.len();
        self.frame = OpenFrame { offset: self.out.written, bytes: 0, first_entry };
        Ok(())
    }
}

impl<W: Write> Write for ArchiveWriter<W> {
    /// What is wrong comes as an [`io::Error`] that holds the [`ArchiveError`].
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.push(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
