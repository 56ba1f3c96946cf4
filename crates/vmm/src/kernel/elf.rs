//! Reads the vmlinux: a kernel as it was linked, which needs no unpacking and is where it was linked to be.

use vm_memory::GuestAddress;

use super::{KernelError, Loaded, Source};
use crate::memory::GuestMemory;

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
/// Linux has five.
const MAX_SEGMENTS: u16 = 64;

#[derive(Debug)]
pub struct Image {
    entry: u64,
    segments: Vec<Segment>,
}

/// What is loaded.
#[derive(Debug)]
struct Segment {
    offset: u64,
    file_bytes: u64,
    address: u64,
    end: u64,
}

impl Image {
    /// None where the file is not ELF.
    pub fn read(source: &Source) -> Result<Option<Self>, KernelError> {
        if source.read::<4>(0)? != Some(*b"\x7fELF") {
            return Ok(None);
        }
        let header = source.read::<HEADER_BYTES>(0)?.ok_or_else(|| source.damaged("its header is cut"))?;
        let machine = u16_at(&header, 18);
        if (header[4], header[5], machine) != (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) {
            return Err(KernelError::Foreign { path: source.path.clone(), architecture: name(machine) });
        }
        let (entry, table, count) = (u64_at(&header, 24), u64_at(&header, 32), u16_at(&header, 56));
        if usize::from(u16_at(&header, 54)) != SEGMENT_BYTES || count > MAX_SEGMENTS {
            return Err(source.damaged("its table of segments is odd"));
        }
        source.must_reach(table.saturating_add(u64::from(count) * SEGMENT_BYTES as u64))?;
        let mut segments = Vec::new();
        for index in 0..u64::from(count) {
            segments.extend(Segment::read(source, table + index * SEGMENT_BYTES as u64)?);
        }
        let is_within = |segment: &Segment| (segment.address..segment.end).contains(&entry);
        if !segments.iter().any(is_within) {
            return Err(source.damaged("it is entered where it has no code"));
        }
        Ok(Some(Self { entry, segments }))
    }

    pub fn load(&self, source: &mut Source, memory: &GuestMemory) -> Result<Loaded, KernelError> {
        let end = self.segments.iter().map(|segment| segment.end).max().unwrap_or(0);
        source.must_fit(memory, end)?;
        for segment in &self.segments {
            source.copy(memory, segment.offset, segment.file_bytes, GuestAddress(segment.address))?;
        }
        Ok(Loaded { entry: GuestAddress(self.entry), end, header: None })
    }
}

impl Segment {
    fn read(source: &Source, at: u64) -> Result<Option<Self>, KernelError> {
        let bytes = source.read::<SEGMENT_BYTES>(at)?.ok_or_else(|| source.damaged("a segment is cut"))?;
        if u32_at(&bytes, 0) != SEGMENT_LOAD {
            return Ok(None);
        }
        let (offset, address) = (u64_at(&bytes, 8), u64_at(&bytes, 24));
        let (file_bytes, memory_bytes) = (u64_at(&bytes, 32), u64_at(&bytes, 40));
        source.must_reach(offset.saturating_add(file_bytes))?;
        let end = address.checked_add(memory_bytes.max(file_bytes));
        // Below it lie the tables that the kernel is started with.
        let end = end.filter(|_| address >= 1 << 20);
        let end = end.ok_or_else(|| source.damaged("a segment lies where no kernel can be"))?;
        Ok(Some(Self { offset, file_bytes, address, end }))
    }
}

/// The machines of which distributions have kernels.
fn name(machine: u16) -> String {
    match machine {
        3 => "x86 with 32 bits".to_owned(),
        40 => "arm".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "riscv".to_owned(),
        _ => format!("another kind of machine (ELF's number {machine})"),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::super::Kernel;
    use super::super::tests::{complaint, file};
    use super::*;
    use crate::memory;

    const SEGMENT_AT: usize = HEADER_BYTES;

    /// One segment of four bytes, at 16 MiB, which takes 1 MiB of memory.
    fn image(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES + SEGMENT_BYTES];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = MACHINE_X86_64 as u8;
        bytes[24..32].copy_from_slice(&(16_u64 << 20).to_le_bytes());
        bytes[32] = SEGMENT_AT as u8;
        bytes[54] = SEGMENT_BYTES as u8;
        bytes[56] = 1;
        bytes[SEGMENT_AT] = SEGMENT_LOAD as u8;
        bytes[SEGMENT_AT + 8] = (HEADER_BYTES + SEGMENT_BYTES) as u8;
        bytes[SEGMENT_AT + 24..][..8].copy_from_slice(&(16_u64 << 20).to_le_bytes());
        bytes[SEGMENT_AT + 32] = 4;
        bytes[SEGMENT_AT + 40..][..8].copy_from_slice(&(1_u64 << 20).to_le_bytes());
        bytes.extend(b"code");
        change(&mut bytes);
        bytes
    }

    #[test]
    fn it_is_entered_where_it_was_linked() {
        let memory = memory::map(64).unwrap();
        let file = file(&image(|_| ()));
        let loaded = Kernel::open(file.path()).unwrap().load(&memory).unwrap();
        assert_eq!((loaded.entry, loaded.end), (GuestAddress(16 << 20), 17 << 20));
        assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(16 << 20)).unwrap(), *b"code");
    }

    #[test]
    fn what_it_says_is_checked() {
        let whole = image(|_| ());
        for length in 4..whole.len() {
            assert!(!complaint(&whole[..length]).contains("is no Linux kernel"), "{length}");
        }
        assert!(complaint(&whole[..whole.len() - 1]).contains("truncated"));
        assert!(complaint(&image(|bytes| bytes[18] = 183)).contains("is for aarch64"));
        assert!(complaint(&image(|bytes| bytes[4] = 1)).contains("is for"));
        assert!(complaint(&image(|bytes| bytes[31] = 0xff)).contains("entered where it has no code"));
        assert!(complaint(&image(|bytes| bytes[56] = 0xff)).contains("odd"));
        assert!(complaint(&image(|bytes| bytes[SEGMENT_AT] = 4)).contains("no code"));
        assert!(complaint(&image(|bytes| bytes[SEGMENT_AT + 27] = 0)).contains("no kernel can be"));
        assert!(complaint(&image(|bytes| bytes[SEGMENT_AT + 39] = 0xff)).contains("truncated"));
        let behind_all = image(|bytes| bytes[SEGMENT_AT + 40..][..8].fill(0xff));
        assert!(complaint(&behind_all).contains("no kernel can be"));
    }

    #[test]
    fn too_little_memory_is_said_to_be() {
        let memory = memory::map(64).unwrap();
        let file = file(&image(|bytes| bytes[SEGMENT_AT + 43] = 16));
        let error = Kernel::open(file.path()).unwrap().load(&memory).unwrap_err();
        assert!(error.to_string().contains("needs 273 MiB of memory"), "{error}");
    }
}
