//! Writes and reads the files of a log: segments, each a row of frames of bytes or gaps without a hole.
//!
//! ```text
//!   log-0000000000000000   [data 0..65536][data 65536..70000][gap 70000..90000 "spool full"]
//!   log-0000000000015f90   [data 90000..…
//! ```
//!
//! A segment's name is the offset at which it begins, so the log's position is known even where nothing is left of it
//! but one empty segment.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};

use super::frame::{self, Decoded, HEADER_BYTES};

/// One frame holds at most so many bytes of log, which is also what one message may carry.
pub const MAX_PIECE_BYTES: usize = sealci_proto::MAX_LOG_CHUNK_BYTES;

const DATA: u8 = 0;
const GAP: u8 = 1;
/// Kind and offset, in front of a frame's bytes.
const PREFIX_BYTES: usize = 9;

/// What a frame adds to the bytes it holds.
pub const FRAME_OVERHEAD_BYTES: u64 = (HEADER_BYTES + PREFIX_BYTES) as u64;

/// A stretch of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Data { offset: u64, bytes: Bytes },
    Gap { from: u64, to: u64, reason: String },
}

impl Piece {
    pub fn from(&self) -> u64 {
        match self {
            Self::Data { offset, .. } => *offset,
            Self::Gap { from, .. } => *from,
        }
    }

    pub fn to(&self) -> u64 {
        match self {
            Self::Data { offset, bytes } => offset + bytes.len() as u64,
            Self::Gap { to, .. } => *to,
        }
    }

    /// What of it lies before an offset that is behind its beginning.
    pub fn up_to(mut self, end: u64) -> Self {
        match &mut self {
            Self::Data { offset, bytes } => {
                bytes.truncate(usize::try_from(end.saturating_sub(*offset)).unwrap_or(usize::MAX));
            }
            Self::Gap { to, .. } => *to = end.min(*to),
        }
        self
    }
}

/// One frame's content, borrowed from where it was read.
enum Entry<'a> {
    Data { offset: u64, bytes: &'a [u8] },
    Gap { from: u64, to: u64, reason: &'a str },
}

impl<'a> Entry<'a> {
    fn decode(payload: &'a [u8]) -> Option<Self> {
        let (kind, rest) = payload.split_first()?;
        let (offset, rest) = rest.split_first_chunk::<8>()?;
        let offset = u64::from_le_bytes(*offset);
        match *kind {
            DATA => {
                offset.checked_add(rest.len() as u64)?;
                Some(Self::Data { offset, bytes: rest })
            }
            GAP => {
                let (to, reason) = rest.split_first_chunk::<8>()?;
                let to = u64::from_le_bytes(*to);
                let reason = std::str::from_utf8(reason).ok()?;
                (to > offset).then_some(Self::Gap { from: offset, to, reason })
            }
            _ => None,
        }
    }

    fn range(&self) -> (u64, u64) {
        match self {
            Self::Data { offset, bytes } => (*offset, offset + bytes.len() as u64),
            Self::Gap { from, to, .. } => (*from, *to),
        }
    }
}

/// The path of the segment that begins at `base`.
pub fn path(folder: &Path, base: u64) -> PathBuf {
    folder.join(format!("log-{base:016x}"))
}

/// Reads [`path`]'s file name.
pub fn base_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("log-").filter(|digits| digits.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

/// The segment that is being written.
#[derive(Debug)]
pub struct SegmentWriter {
    file: File,
    /// The file's length up to its last whole frame.
    pub file_bytes: u64,
    /// Where a gap frame stands that may still grow: the last frame of the file.
    growing_gap: Option<u64>,
}

impl SegmentWriter {
    pub fn create(folder: &Path, base: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path(folder, base))?;
        Ok(Self { file, file_bytes: 0, growing_gap: None })
    }

    /// Opens a segment after a restart: cuts what is not whole off its end. Returns where the log ends, too.
    pub fn recover(folder: &Path, base: u64) -> io::Result<(Self, u64)> {
        let mut file = OpenOptions::new().read(true).write(true).open(path(folder, base))?;
        let (file_bytes, end) = whole_end(&mut file, base)?;
        file.set_len(file_bytes)?;
        file.seek(SeekFrom::Start(file_bytes))?;
        Ok((Self { file, file_bytes, growing_gap: None }, end))
    }

    /// Appends log bytes. An append that fails leaves the file as it was.
    pub fn append(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.growing_gap = None;
        let mut prefix = [DATA; PREFIX_BYTES];
        prefix[1..].copy_from_slice(&offset.to_le_bytes());
        let header = frame::header(&[&prefix, bytes]);
        let mut head = [0; HEADER_BYTES + PREFIX_BYTES];
        head[..HEADER_BYTES].copy_from_slice(&header);
        head[HEADER_BYTES..].copy_from_slice(&prefix);
        self.guarded(|file| write_both(file, &head, bytes))?;
        self.file_bytes += (head.len() + bytes.len()) as u64;
        Ok(())
    }

    /// Appends a gap, or makes the last one reach further.
    pub fn append_gap(&mut self, from: u64, to: u64, reason: &str) -> io::Result<()> {
        let mut payload = vec![GAP];
        payload.extend_from_slice(&from.to_le_bytes());
        payload.extend_from_slice(&to.to_le_bytes());
        payload.extend_from_slice(reason.as_bytes());
        let bytes = frame::encode(&payload);
        if let Some(at) = self.growing_gap {
            return self.file.write_all_at(&bytes, at);
        }
        let at = self.file_bytes;
        self.guarded(|file| file.write_all(&bytes))?;
        self.file_bytes += bytes.len() as u64;
        self.growing_gap = Some(at);
        Ok(())
    }

    fn guarded(&mut self, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        write(&mut self.file).or_else(|error| {
            self.file.set_len(self.file_bytes)?;
            self.file.seek(SeekFrom::Start(self.file_bytes))?;
            Err(error)
        })
    }
}

/// Writes both slices, in one system call where the kernel takes them whole.
fn write_both(file: &mut File, head: &[u8], body: &[u8]) -> io::Result<()> {
    let written = loop {
        match file.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]) {
            Ok(written) => break written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    if written < head.len() {
        file.write_all(&head[written..])?;
        file.write_all(body)
    } else {
        file.write_all(&body[written - head.len()..])
    }
}

/// The file's length up to its last whole frame that continues the log, and where the log ends with it.
fn whole_end(file: &mut File, base: u64) -> io::Result<(u64, u64)> {
    let mut reader = FrameReader::new(file)?;
    let mut file_bytes = 0;
    let mut end = base;
    while let Some(payload) = reader.peek()? {
        let length = payload.len();
        match Entry::decode(payload).map(|entry| entry.range()) {
            Some((from, to)) if from == end => end = to,
            _ => break,
        }
        file_bytes += (HEADER_BYTES + length) as u64;
        reader.advance();
    }
    Ok((file_bytes, end))
}

/// Reads a segment forwards from an offset; keeps its place between calls.
#[derive(Debug)]
pub struct SegmentReader {
    frames: FrameReader<File>,
    pub base: u64,
    /// The log offset of the frame that comes next.
    next: u64,
}

/// What a reader found at an offset.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    Piece(Piece),
    /// The segment ends before the offset.
    End,
    /// What stands there is no frame of this log.
    Damaged,
}

impl SegmentReader {
    pub fn open(folder: &Path, base: u64) -> io::Result<Self> {
        Ok(Self { frames: FrameReader::new(File::open(path(folder, base))?)?, base, next: base })
    }

    /// Whether `offset` can be read without going back.
    pub fn reaches(&self, offset: u64) -> bool {
        self.next <= offset
    }

    /// Reads the piece that begins at `offset`: neighbouring frames become one, up to `max_bytes`. Nothing past
    /// `file_bytes` of the file is looked at: it may still change.
    pub fn read(&mut self, offset: u64, file_bytes: u64, max_bytes: usize) -> io::Result<Found> {
        self.frames.limit_bytes = file_bytes;
        let mut collected = BytesMut::new();
        while collected.len() < max_bytes {
            let at = offset + collected.len() as u64;
            let Some(payload) = self.frames.peek()? else {
                if collected.is_empty() {
                    return Ok(if self.frames.at_end()? { Found::End } else { Found::Damaged });
                }
                break;
            };
            let Some(entry) = Entry::decode(payload).filter(|entry| entry.range().0 == self.next) else {
                if collected.is_empty() {
                    return Ok(Found::Damaged);
                }
                break;
            };
            let (_, to) = entry.range();
            match entry {
                _ if to <= at => {}
                Entry::Data { offset: from, bytes } => {
                    let wanted = &bytes[(at - from) as usize..];
                    let taken = &wanted[..wanted.len().min(max_bytes - collected.len())];
                    collected.extend_from_slice(taken);
                    if taken.len() < wanted.len() {
                        break;
                    }
                }
                Entry::Gap { from, to, reason } => {
                    if collected.is_empty() {
                        let reason = reason.to_owned();
                        return Ok(Found::Piece(Piece::Gap { from: from.max(at), to, reason }));
                    }
                    break;
                }
            }
            self.next = to;
            self.frames.advance();
        }
        if collected.is_empty() {
            return Ok(Found::End);
        }
        Ok(Found::Piece(Piece::Data { offset, bytes: collected.freeze() }))
    }
}

/// Reads frames one after the other, holding at most one frame and a read-ahead in memory.
#[derive(Debug)]
struct FrameReader<F> {
    file: F,
    /// Nothing past this many bytes of the file is read.
    limit_bytes: u64,
    read_bytes: u64,
    buffer: Vec<u8>,
    /// Where in the buffer the next frame begins.
    at: usize,
    /// The length of the frame that was peeked at.
    peeked_bytes: usize,
}

const READ_AHEAD_BYTES: usize = 256 << 10;

impl<F: Read + Seek> FrameReader<F> {
    fn new(mut file: F) -> io::Result<Self> {
        file.rewind()?;
        Ok(Self { file, limit_bytes: u64::MAX, read_bytes: 0, buffer: Vec::new(), at: 0, peeked_bytes: 0 })
    }

    /// The next frame's payload; none at the end and at damage.
    fn peek(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            match frame::decode(&self.buffer[self.at..]) {
                Decoded::Frame(payload) => {
                    let length = payload.len();
                    self.peeked_bytes = HEADER_BYTES + length;
                    let start = self.at + HEADER_BYTES;
                    return Ok(Some(&self.buffer[start..start + length]));
                }
                Decoded::Damaged => return Ok(None),
                Decoded::Short { needed } => {
                    if !self.fill(needed)? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// Goes past the frame that was peeked at.
    fn advance(&mut self) {
        self.at += std::mem::take(&mut self.peeked_bytes);
    }

    /// Whether what comes next is the end of the file rather than damage.
    fn at_end(&mut self) -> io::Result<bool> {
        Ok(self.at == self.buffer.len() && !self.fill(1)?)
    }

    /// Reads until `needed` bytes stand behind `at`; false where the file ends before.
    fn fill(&mut self, needed: usize) -> io::Result<bool> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let missing = needed.max(READ_AHEAD_BYTES).saturating_sub(self.buffer.len()) as u64;
        let allowed = missing.min(self.limit_bytes.saturating_sub(self.read_bytes));
        self.read_bytes += (&mut self.file).take(allowed).read_to_end(&mut self.buffer)? as u64;
        Ok(self.buffer.len() >= needed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn a_gap_grows_in_place_until_bytes_follow_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = SegmentWriter::create(folder.path(), 0).unwrap();
        writer.append(0, b"one").unwrap();
        writer.append_gap(3, 10, "spool full").unwrap();
        let before = writer.file_bytes;
        writer.append_gap(3, 20, "spool full").unwrap();
        assert_eq!(writer.file_bytes, before);
        writer.append(20, b"two").unwrap();
        let mut reader = SegmentReader::open(folder.path(), 0).unwrap();
        let gap = Piece::Gap { from: 3, to: 20, reason: "spool full".into() };
        let data = |offset, bytes| Found::Piece(Piece::Data { offset, bytes: Bytes::from_static(bytes) });
        assert_eq!(reader.read(0, u64::MAX, 100).unwrap(), data(0, b"one"));
        assert_eq!(reader.read(3, u64::MAX, 100).unwrap(), Found::Piece(gap));
        assert_eq!(reader.read(20, u64::MAX, 100).unwrap(), data(20, b"two"));
        assert_eq!(reader.read(23, u64::MAX, 100).unwrap(), Found::End);
    }

    #[test]
    fn damage_in_the_middle_is_told_from_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = SegmentWriter::create(folder.path(), 7).unwrap();
        writer.append(7, b"one").unwrap();
        let first = writer.file_bytes as usize;
        writer.append(10, b"two").unwrap();
        let path = path(folder.path(), 7);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[first + 12] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let mut reader = SegmentReader::open(folder.path(), 7).unwrap();
        assert!(matches!(
            reader.read(7, u64::MAX, 100).unwrap(),
            Found::Piece(Piece::Data { offset: 7, .. })
        ));
        assert_eq!(reader.read(10, u64::MAX, 100).unwrap(), Found::Damaged);
    }

    /// Offsets that now and then continue one another, and those at the end of all numbers.
    fn offset() -> impl Strategy<Value = u64> {
        prop_oneof![8 => 4_u64..30, 1 => (u64::MAX - 20)..=u64::MAX, 1 => any::<u64>()]
    }

    #[test]
    fn names_carry_the_offset() {
        let path = path(Path::new("/x"), 90_000);
        assert_eq!(base_of(path.file_name().unwrap().to_str().unwrap()), Some(90_000));
        assert_eq!(base_of("journal"), None);
        assert_eq!(base_of("log-xyz"), None);
    }

    proptest! {
        #[test]
        fn any_stretch_of_a_segment_reads_back_byte_exact(
            writes in vec(vec(any::<u8>(), 1..300), 1..20),
            start in any::<prop::sample::Index>(),
            max_bytes in 1_usize..1000,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = SegmentWriter::create(folder.path(), 0).unwrap();
            let mut whole = Vec::new();
            for write in &writes {
                writer.append(whole.len() as u64, write).unwrap();
                whole.extend_from_slice(write);
            }
            let start = start.index(whole.len());
            let mut reader = SegmentReader::open(folder.path(), 0).unwrap();
            let mut at = start;
            while at < whole.len() {
                let found = reader.read(at as u64, u64::MAX, max_bytes).unwrap();
                let Found::Piece(Piece::Data { offset, bytes }) = found else {
                    return Err(TestCaseError::fail(format!("{found:?} at {at}")));
                };
                prop_assert_eq!(offset, at as u64);
                prop_assert!(!bytes.is_empty() && bytes.len() <= max_bytes);
                prop_assert_eq!(&whole[at..at + bytes.len()], &bytes[..]);
                at += bytes.len();
            }
        }

        /// A checksum only says that a frame is as it was written, not that it fits.
        #[test]
        fn whole_frames_that_lie_are_cut_and_what_stands_before_them_is_read(
            frames in vec((0_u8..3, offset(), offset(), vec(any::<u8>(), 0..20)), 0..12),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut file = Vec::new();
            for (kind, from, to, rest) in frames {
                let mut payload = vec![kind];
                payload.extend_from_slice(&from.to_le_bytes());
                if kind == GAP {
                    payload.extend_from_slice(&to.to_le_bytes());
                }
                payload.extend_from_slice(&rest);
                file.extend_from_slice(&frame::encode(&payload));
            }
            std::fs::write(path(folder.path(), 5), file).unwrap();
            let (writer, end) = SegmentWriter::recover(folder.path(), 5).unwrap();
            let (again, same) = SegmentWriter::recover(folder.path(), 5).unwrap();
            prop_assert_eq!((again.file_bytes, same), (writer.file_bytes, end));
            let mut reader = SegmentReader::open(folder.path(), 5).unwrap();
            let mut at = 5;
            while at < end {
                let Found::Piece(piece) = reader.read(at, writer.file_bytes, 7).unwrap() else {
                    return Err(TestCaseError::fail(format!("nothing at {at}, the end is {end}")));
                };
                prop_assert!(piece.from() == at && piece.to() > at, "{piece:?} at {at}");
                at = piece.to();
            }
            prop_assert_eq!(at, end);
        }

        #[test]
        fn a_garbage_segment_is_cut_and_never_panics(bytes in vec(any::<u8>(), 0..2000)) {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(path(folder.path(), 5), bytes).unwrap();
            let (writer, end) = SegmentWriter::recover(folder.path(), 5).unwrap();
            prop_assert!(end >= 5);
            prop_assert_eq!(
                std::fs::metadata(path(folder.path(), 5)).unwrap().len(),
                writer.file_bytes
            );
        }
    }
}
