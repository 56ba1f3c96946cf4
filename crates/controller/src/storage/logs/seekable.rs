//! Packs a log so that it can be read from any offset: zstd frames of its bytes, and a table of them at the end.
//!
//! ```text
//! object   frame* table
//! frame    one zstd frame of at most 1 MiB of the log, with a checksum
//! table    a zstd skippable frame: magic 0x184D2A5E, length (u32), then
//!            entry*    length of a frame (u32), its length unpacked (u32)
//!            footer    number of entries (u32), 0 (u8), magic 0x8F92EAB1
//! ```
//!
//! Numbers are little-endian. It is zstd's own seekable format (`contrib/seekable_format`): `zstd -d` reads the whole, and
//! libraries for that format read parts. Nothing here does I/O; memory is bounded by a frame and by the table, which takes
//! 8 bytes for each MiB.

use std::ops::Range;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

/// So much of a log is packed together. A reader unpacks so much for any byte of it.
pub const FRAME_BYTES: usize = 1 << 20;

/// As for the chunks: a log waits for nobody, and most of it is text.
const LEVEL: i32 = 3;

const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;
const SEEKABLE_MAGIC: u32 = 0x8F92_EAB1;
const HEADER_BYTES: usize = 8;
const ENTRY_BYTES: usize = 8;
const FOOTER_BYTES: usize = 9;

/// The table is in the last so many bytes of all objects but those of logs of more than 8 GiB.
pub const TAIL_BYTES: u64 = 64 << 10;

/// Why bytes are no packed log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is no packed log")]
pub struct NotPacked;

/// What an object may take at most, for a log of so many bytes.
pub fn at_most(log_bytes: u64) -> u64 {
    // zstd adds less than 1/256 and 86 bytes to what it cannot pack; the rest is for the table.
    let frames = log_bytes.div_ceil(FRAME_BYTES as u64);
    log_bytes + log_bytes / 256 + frames * (86 + ENTRY_BYTES as u64) + (HEADER_BYTES + FOOTER_BYTES) as u64
}

/// Packs a log that comes in pieces.
pub struct Packer {
    compressor: Compressor<'static>,
    pending: Vec<u8>,
    entries: Vec<u8>,
    size_bytes: u64,
}

impl Packer {
    pub fn new() -> std::io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Self { compressor, pending: Vec::new(), entries: Vec::new(), size_bytes: 0 })
    }

    /// Takes the next bytes; the frames that they fill, packed.
    pub fn push(&mut self, mut bytes: &[u8]) -> std::io::Result<Vec<u8>> {
        let mut packed = Vec::new();
        while !bytes.is_empty() {
            let taken = bytes.len().min(FRAME_BYTES - self.pending.len());
            self.pending.extend_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            if self.pending.len() == FRAME_BYTES {
                self.end_frame(&mut packed)?;
            }
        }
        Ok(packed)
    }

    fn end_frame(&mut self, packed: &mut Vec<u8>) -> std::io::Result<()> {
        let frame = self.compressor.compress(&self.pending)?;
        // Both are far below 4 GiB.
        for length in [frame.len(), self.pending.len()] {
            self.entries.extend_from_slice(&(length as u32).to_le_bytes());
        }
        self.size_bytes += frame.len() as u64;
        self.pending.clear();
        packed.extend_from_slice(&frame);
        Ok(())
    }

    /// The rest of the object, and how long it is as a whole.
    pub fn finish(mut self) -> std::io::Result<(Vec<u8>, u64)> {
        let mut packed = Vec::new();
        if !self.pending.is_empty() {
            self.end_frame(&mut packed)?;
        }
        let content = self.entries.len() + FOOTER_BYTES;
        packed.extend_from_slice(&SKIPPABLE_MAGIC.to_le_bytes());
        packed.extend_from_slice(&(content as u32).to_le_bytes());
        packed.extend_from_slice(&self.entries);
        packed.extend_from_slice(&((self.entries.len() / ENTRY_BYTES) as u32).to_le_bytes());
        packed.push(0);
        packed.extend_from_slice(&SEEKABLE_MAGIC.to_le_bytes());
        Ok((packed, self.size_bytes + (HEADER_BYTES + content) as u64))
    }
}

/// One frame: where it is in the object, and what of the log it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub packed: Range<u64>,
    pub log: Range<u64>,
}

/// The table of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// For each frame its ends, in the object and in the log.
    ends: Vec<(u64, u64)>,
}

/// What a tail holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Tail {
    Table(Table),
    /// The tail has to be so long.
    Needs(u64),
}

impl Table {
    /// Reads the table of an object of so many bytes from its tail, and holds it against the object's size and that of the log.
    pub fn read(tail: &[u8], size_bytes: u64, log_bytes: u64) -> Result<Tail, NotPacked> {
        let footer = tail.len().checked_sub(FOOTER_BYTES).ok_or(NotPacked)?;
        let count = u32_at(tail, footer)? as usize;
        if u32_at(tail, footer + 5)? != SEEKABLE_MAGIC || tail[footer + 4] != 0 {
            return Err(NotPacked);
        }
        let content = count * ENTRY_BYTES + FOOTER_BYTES;
        let whole = HEADER_BYTES + content;
        if whole as u64 > size_bytes {
            return Err(NotPacked);
        }
        let Some(start) = tail.len().checked_sub(whole) else { return Ok(Tail::Needs(whole as u64)) };
        if u32_at(tail, start)? != SKIPPABLE_MAGIC || u32_at(tail, start + 4)? as usize != content {
            return Err(NotPacked);
        }
        let (mut ends, mut packed, mut log) = (Vec::with_capacity(count), 0_u64, 0_u64);
        for entry in tail[start + HEADER_BYTES..footer].chunks_exact(ENTRY_BYTES) {
            let (length, unpacked) = (u32_at(entry, 0)?, u32_at(entry, 4)?);
            if unpacked == 0 || unpacked as usize > FRAME_BYTES {
                return Err(NotPacked);
            }
            packed += u64::from(length);
            log += u64::from(unpacked);
            ends.push((packed, log));
        }
        if packed + whole as u64 != size_bytes || log != log_bytes {
            return Err(NotPacked);
        }
        Ok(Tail::Table(Self { ends }))
    }

    /// The frame with this byte of the log; none behind the end.
    pub fn frame_at(&self, byte: u64) -> Option<Frame> {
        let index = self.ends.partition_point(|(_, log_end)| *log_end <= byte);
        let (packed_end, log_end) = *self.ends.get(index)?;
        let (packed_start, log_start) = index.checked_sub(1).map_or((0, 0), |before| self.ends[before]);
        Some(Frame { packed: packed_start..packed_end, log: log_start..log_end })
    }
}

/// Unpacks a frame. Its checksum is checked.
pub fn unpack(packed: &[u8], frame: &Frame) -> Result<Vec<u8>, NotPacked> {
    let length = usize::try_from(frame.log.end - frame.log.start).map_err(|_| NotPacked)?;
    let unpacked = Decompressor::new().and_then(|mut all| all.decompress(packed, length));
    unpacked.ok().filter(|bytes| bytes.len() == length).ok_or(NotPacked)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, NotPacked> {
    let four = bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).ok_or(NotPacked)?;
    Ok(u32::from_le_bytes(four))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packed(log: &[u8], piece: usize) -> Vec<u8> {
        let mut packer = Packer::new().unwrap();
        let mut object = Vec::new();
        for piece in log.chunks(piece) {
            object.extend(packer.push(piece).unwrap());
        }
        let (rest, size) = packer.finish().unwrap();
        object.extend(rest);
        assert_eq!(object.len() as u64, size);
        object
    }

    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(length)
        .collect()
    }

    #[test]
    fn any_byte_is_found_and_zstd_reads_the_whole() {
        let log = noise(FRAME_BYTES * 2 + 12_345, 7);
        let object = packed(&log, 70_001);
        assert!(object.len() as u64 <= at_most(log.len() as u64));
        assert_eq!(zstd::decode_all(&object[..]).unwrap(), log);
        let (size, length) = (object.len() as u64, log.len() as u64);
        assert_eq!(Table::read(&object[object.len() - 9..], size, length), Ok(Tail::Needs(8 + 3 * 8 + 9)));
        let Ok(Tail::Table(table)) = Table::read(&object, size, length) else { panic!() };
        for at in [0, 1, FRAME_BYTES - 1, FRAME_BYTES, log.len() - 1] {
            let frame = table.frame_at(at as u64).unwrap();
            let bytes =
                unpack(&object[frame.packed.start as usize..frame.packed.end as usize], &frame).unwrap();
            assert_eq!(bytes[at - frame.log.start as usize], log[at]);
        }
        assert_eq!(table.frame_at(length), None);
    }

    #[test]
    fn a_frame_that_was_changed_is_noticed() {
        let log = noise(5000, 3);
        let object = packed(&log, 5000);
        let Ok(Tail::Table(table)) = Table::read(&object, object.len() as u64, 5000) else { panic!() };
        let frame = table.frame_at(0).unwrap();
        let mut bytes = object[..frame.packed.end as usize].to_vec();
        assert_eq!(unpack(&bytes, &frame).unwrap(), log);
        bytes[2000] ^= 1;
        assert_eq!(unpack(&bytes, &frame), Err(NotPacked));
    }

    proptest! {
        #[test]
        fn what_no_packer_wrote_is_refused_and_never_panics(
            tail in proptest::collection::vec(any::<u8>(), 0..200), size in 0..1000_u64, count in any::<u32>(),
        ) {
            let mut tail = tail;
            let _ = Table::read(&tail, size, 1);
            tail.extend(count.to_le_bytes());
            tail.push(0);
            tail.extend(SEEKABLE_MAGIC.to_le_bytes());
            if let Ok(Tail::Needs(bytes)) = Table::read(&tail, size, 1) {
                prop_assert!(bytes <= size && bytes > tail.len() as u64);
            }
        }

        #[test]
        fn pieces_of_any_size_make_the_same_object(length in 0..3000_usize, piece in 1..4000_usize) {
            let log = noise(length, length as u64);
            prop_assert_eq!(packed(&log, piece), packed(&log, length.max(1)));
        }
    }
}
