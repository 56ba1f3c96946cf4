//! Gives a guest a disk that is a file of the host (virtio 1.2, section 5.2).
//!
//! A request ends with a status that says whether it worked: what lies outside of the disk, and whatever the host's file
//! refuses (no room left, an I/O error), is the guest's I/O error and nothing more. Bytes go between the file and the guest's
//! memory without a copy. The file is the caller's, opened as it may be used.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{Broken, Buffers, Cause, Chain, Device, Kind, Queues, Unlike, sys};

pub const SECTOR_BYTES: u64 = 512;
/// What the guest reads as the disk's serial number is cut to this.
pub const SERIAL_BYTES: usize = 20;

const QUEUE_SIZE: u16 = 256;
/// A request has a header and a status beside its data.
const MOST_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Of discards and zeros in one request, and of sectors in each: 2 GiB.
const MOST_RANGES: usize = 32;
const MOST_RANGE_SECTORS: u32 = 1 << 22;
const RANGE_BYTES: usize = 16;

const FEATURE_SEG_MAX: u64 = 1 << 2;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const SERIAL: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// What a guest may do with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// The device.
#[derive(Debug)]
pub struct Block {
    file: File,
    access: Access,
    file_bytes: u64,
    serial: [u8; SERIAL_BYTES],
    config: [u8; 60],
    /// The driver says when its writes have to be on the disk; for one that cannot, each is.
    flushes: bool,
}

/// Why a request did not work.
enum Refusal {
    Failed,
    Unsupported,
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

impl Block {
    /// A disk of the file's size; one that ends within a sector is filled up with zeros.
    pub fn new(mut file: File, access: Access, serial: &str) -> io::Result<Self> {
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self::with_bytes(file, bytes, access, serial))
    }

    fn with_bytes(file: File, file_bytes: u64, access: Access, serial: &str) -> Self {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &file_bytes.div_ceil(SECTOR_BYTES).to_le_bytes());
        put(12, &MOST_SEGMENTS.to_le_bytes());
        // Discards, then zeros: sectors in a range, ranges in a request; and what both are aligned to.
        put(36, &MOST_RANGE_SECTORS.to_le_bytes());
        put(40, &(MOST_RANGES as u32).to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &MOST_RANGE_SECTORS.to_le_bytes());
        put(52, &(MOST_RANGES as u32).to_le_bytes());
        put(56, &[1]);
        let mut name = [0; SERIAL_BYTES];
        let length = serial.len().min(SERIAL_BYTES);
        name[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Self { file, access, file_bytes, serial: name, config, flushes: false }
    }

    fn bytes(&self) -> u64 {
        self.file_bytes.next_multiple_of(SECTOR_BYTES)
    }

    /// Where so many bytes from a sector on begin, if they are whole sectors of the disk.
    fn offset(&self, sector: u64, bytes: u64) -> Result<u64, Refusal> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Failed)?;
        let end = offset.checked_add(bytes).ok_or(Refusal::Failed)?;
        let fits = end <= self.bytes() && bytes.is_multiple_of(SECTOR_BYTES);
        if fits { Ok(offset) } else { Err(Refusal::Failed) }
    }

    /// Answers one request; how many bytes were written into it.
    fn answer(&self, chain: &mut Chain<'_>) -> Result<u32, Broken> {
        let mut status = chain.writable.split_back(1);
        let header: [u8; 16] = chain.readable.read_array().ok_or(Broken::Request)?;
        if status.bytes() == 0 {
            return Err(Broken::Request);
        }
        let room = chain.writable.bytes();
        let done = self.perform(header, chain);
        let code = match done {
            Ok(()) => 0,
            Err(Refusal::Failed) => 1,
            Err(Refusal::Unsupported) => 2,
        };
        status.write(&[code]);
        // A chain has at most 4 GiB, and its header was none of these.
        Ok((room - chain.writable.bytes()) as u32 + 1)
    }

    fn perform(&self, header: [u8; 16], chain: &mut Chain<'_>) -> Result<(), Refusal> {
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = header;
        let [_, _, _, _, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes(kind) {
            READ => self.read(sector, &mut chain.writable),
            SERIAL if chain.writable.bytes() >= SERIAL_BYTES => {
                chain.writable.write(&self.serial);
                Ok(())
            }
            SERIAL => Err(Refusal::Failed),
            WRITE | FLUSH if self.access == Access::ReadOnly => Err(Refusal::Failed),
            DISCARD | WRITE_ZEROES if self.access == Access::ReadOnly => Err(Refusal::Unsupported),
            WRITE => self.write(sector, &mut chain.readable),
            FLUSH => Ok(self.file.sync_data()?),
            kind @ (DISCARD | WRITE_ZEROES) => self.clear(kind, &mut chain.readable),
            _ => Err(Refusal::Unsupported),
        }
    }

    fn read(&self, sector: u64, into: &mut Buffers<'_>) -> Result<(), Refusal> {
        let mut offset = self.offset(sector, into.bytes() as u64)?;
        while into.bytes() > 0 {
            match sys::read_at(self.file.as_fd(), offset, into)? {
                0 if offset >= self.file_bytes => into.write_zeros(),
                // The file has become shorter.
                0 => return Err(Refusal::Failed),
                bytes => {
                    into.split_front(bytes);
                    offset += bytes as u64;
                }
            }
        }
        Ok(())
    }

    fn write(&self, sector: u64, from: &mut Buffers<'_>) -> Result<(), Refusal> {
        let mut offset = self.offset(sector, from.bytes() as u64)?;
        while from.bytes() > 0 {
            let bytes = sys::write_at(self.file.as_fd(), offset, from)?;
            if bytes == 0 {
                return Err(Refusal::Failed);
            }
            from.split_front(bytes);
            offset += bytes as u64;
        }
        self.settle()
    }

    /// Discards ranges, or has them read as zeros.
    fn clear(&self, kind: u32, from: &mut Buffers<'_>) -> Result<(), Refusal> {
        let count = from.bytes() / RANGE_BYTES;
        if count == 0 || count > MOST_RANGES || !from.bytes().is_multiple_of(RANGE_BYTES) {
            return Err(Refusal::Failed);
        }
        while let Some(range) = from.read_array::<RANGE_BYTES>() {
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            // Zeros may say that their room is to be given up; nothing else is known.
            let gives_up = kind == DISCARD || flags == 1;
            if flags > 1 || kind == DISCARD && flags != 0 {
                return Err(Refusal::Unsupported);
            }
            let bytes = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.offset(sector, bytes)?;
            if sectors > MOST_RANGE_SECTORS {
                return Err(Refusal::Failed);
            }
            if bytes > 0 {
                self.clear_range(offset, bytes, gives_up)?;
            }
        }
        self.settle()
    }

    fn clear_range(&self, offset: u64, bytes: u64, gives_up: bool) -> Result<(), Refusal> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zeros = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let how = if gives_up { hole } else { zeros };
        let done = match fallocate(&self.file, how, offset, bytes) {
            // A hole reads as zeros, too, and more file systems have them.
            Err(Errno::OPNOTSUPP) if !gives_up => fallocate(&self.file, hole, offset, bytes),
            done => done,
        };
        match done {
            Err(Errno::OPNOTSUPP) => Err(Refusal::Unsupported),
            done => done.map_err(|_| Refusal::Failed),
        }
    }

    fn settle(&self) -> Result<(), Refusal> {
        if self.flushes { Ok(()) } else { Ok(self.file.sync_data()?) }
    }
}

impl Device for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        FEATURE_SEG_MAX
            | match self.access {
                Access::ReadOnly => FEATURE_READ_ONLY,
                Access::ReadWrite => FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES,
            }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, features: u64) {
        self.flushes = features & FEATURE_FLUSH != 0;
    }

    fn serve(&mut self, _: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while let Some(mut chain) = queues.pop(0)? {
            let written = self.answer(&mut chain)?;
            queues.push(0, chain.head, written)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.flushes = false;
    }

    /// Which file it is does not matter to the driver, but its size does.
    fn state(&self) -> Vec<u8> {
        self.bytes().to_le_bytes().to_vec()
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Unlike> {
        let same = state == self.bytes().to_le_bytes();
        if same { Ok(()) } else { Err(Unlike("the disk has another size than the one that the guest had")) }
    }
}

#[cfg(test)]
mod tests;
