//! Lays out and maps the guest's memory.
//!
//! ```text
//!   0                  3 GiB               4 GiB
//!   ├── memory ────────┤  hole: devices    ├── what memory is left ───▶
//! ```
//!
//! Invariant: what is mapped is aligned to 2 MiB in the host's addresses as in the guest's, so that either kernel can use
//! huge pages for it: a guest boots a quarter sooner then.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

/// The guest's memory, as all parts of the machine know it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Where the hole below 4 GiB begins, and where it ends.
pub const HOLE_BEGIN: u64 = 3 << 30;
pub const HOLE_END: u64 = 4 << 30;

/// The least in which a distribution's kernel starts.
pub const MIN_MEBIBYTES: u64 = 64;
/// More than any host has, and far below what page tables and addresses allow.
pub const MAX_MEBIBYTES: u64 = 1 << 20;

const HUGE_PAGE: usize = 2 << 20;

/// Why there is no memory for the guest.
#[derive(Debug, Error)]
pub enum MemoryError {
    #[error("a guest needs at least {MIN_MEBIBYTES} MiB of memory, and {mebibytes} MiB were asked for")]
    TooLittle { mebibytes: u64 },
    #[error("a guest has at most {MAX_MEBIBYTES} MiB of memory, and {mebibytes} MiB were asked for")]
    TooMuch { mebibytes: u64 },
    #[error("{mebibytes} MiB of memory are not a multiple of 2 MiB")]
    Odd { mebibytes: u64 },
    #[error("the host has no {bytes} bytes of memory for the guest: give it less, or the host more")]
    Map { bytes: usize, source: io::Error },
    #[error("the guest's memory cannot be put together")]
    Assemble(#[source] vm_memory::GuestRegionCollectionError),
    #[error("the guest's memory cannot be put together")]
    Region(#[source] vm_memory::mmap::MmapRegionError),
}

/// Where the memory of a guest lies in its addresses: begin and length in bytes.
pub fn layout(mebibytes: u64) -> Result<Vec<(GuestAddress, usize)>, MemoryError> {
    match mebibytes {
        ..MIN_MEBIBYTES => return Err(MemoryError::TooLittle { mebibytes }),
        MIN_MEBIBYTES..=MAX_MEBIBYTES => {}
        _ => return Err(MemoryError::TooMuch { mebibytes }),
    }
    if !mebibytes.is_multiple_of(2) {
        return Err(MemoryError::Odd { mebibytes });
    }
    let bytes = mebibytes << 20;
    let below = bytes.min(HOLE_BEGIN);
    let mut ranges = vec![(GuestAddress(0), below as usize)];
    if bytes > below {
        ranges.push((GuestAddress(HOLE_END), (bytes - below) as usize));
    }
    Ok(ranges)
}

/// Maps so much memory for a guest; the host gives pages as they are used.
pub fn map(mebibytes: u64) -> Result<GuestMemory, MemoryError> {
    map_all(mebibytes, |bytes, _| reserve(bytes))
}

/// Maps what a file has of so much memory. The guest's changes are its own: the file, and who else has mapped it, see none.
pub fn map_copy(mebibytes: u64, file: &File) -> Result<GuestMemory, MemoryError> {
    map_all(mebibytes, |bytes, offset| {
        let address = reserve(bytes)?;
        lay_over(address, bytes, file, offset)?;
        Ok(address)
    })
}

/// `place` makes room for so many bytes, which are those from an offset of all on.
fn map_all(
    mebibytes: u64,
    place: impl Fn(usize, usize) -> io::Result<*mut u8>,
) -> Result<GuestMemory, MemoryError> {
    let (mut regions, mut offset) = (Vec::new(), 0);
    for (begin, bytes) in layout(mebibytes)? {
        let address = place(bytes, offset).map_err(|source| MemoryError::Map { bytes, source })?;
        regions.push(region(begin, bytes, address)?);
        offset += bytes;
    }
    GuestMemory::from_regions(regions).map_err(MemoryError::Assemble)
}

/// How many bytes of it lie below the hole, from address 0 on.
pub fn low_bytes(memory: &GuestMemory) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len)
}

/// `address` is what [`reserve`] has returned for so many bytes.
fn region(begin: GuestAddress, bytes: usize, address: *mut u8) -> Result<GuestRegionMmap<()>, MemoryError> {
    let builder = MmapRegionBuilder::new(bytes)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE);
    // SAFETY: so many bytes are mapped there, and nothing ever unmaps them.
    let mapping = unsafe { builder.with_raw_mmap_pointer(address) }.build();
    let mapping = mapping.map_err(MemoryError::Region)?;
    // `layout` keeps far from the end of the addresses.
    GuestRegionMmap::new(mapping, begin).ok_or(MemoryError::TooMuch { mebibytes: bytes as u64 >> 20 })
}

/// Maps private memory at an address that is a multiple of 2 MiB. It stays until the process ends, as the guest does.
fn reserve(bytes: usize) -> io::Result<*mut u8> {
    let with_room = bytes + HUGE_PAGE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nobody's memory.
    let mapped = unsafe {
        libc::mmap(
            ptr::null_mut(),
            with_room,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_PRIVATE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let head = mapped.addr().next_multiple_of(HUGE_PAGE) - mapped.addr();
    let tail = HUGE_PAGE - head;
    let aligned = mapped.wrapping_byte_add(head);
    // SAFETY: both ends belong to the mapping made above, and nobody knows of them yet.
    unsafe {
        if head > 0 {
            libc::munmap(mapped, head);
        }
        if tail > 0 {
            libc::munmap(aligned.wrapping_byte_add(bytes), tail);
        }
    }
    Ok(aligned.cast())
}

/// Has a file's bytes be what is found at an address that [`reserve`] has returned for so many.
fn lay_over(address: *mut u8, bytes: usize, file: &File, offset: usize) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: it replaces a mapping of ours of the same size, of which nobody knows yet.
    let mapped = unsafe {
        libc::mmap(address.cast(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, file.as_raw_fd(), offset)
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_goes_round_the_hole() {
        let ranges = |mebibytes| -> Vec<_> {
            layout(mebibytes).unwrap().iter().map(|(begin, bytes)| (begin.0 >> 20, bytes >> 20)).collect()
        };
        assert_eq!(ranges(128), [(0, 128)]);
        assert_eq!(ranges(3072), [(0, 3072)]);
        assert_eq!(ranges(3074), [(0, 3072), (4096, 2)]);
        assert_eq!(ranges(6144), [(0, 3072), (4096, 3072)]);
    }

    #[test]
    fn a_size_that_cannot_be_is_refused() {
        let complaint = |mebibytes| layout(mebibytes).unwrap_err().to_string();
        assert!(complaint(62).contains("at least 64 MiB"));
        assert!(complaint(u64::MAX).contains("at most"));
        assert!(complaint(129).contains("multiple of 2 MiB"));
    }

    #[test]
    fn what_is_mapped_is_aligned_and_can_be_written_to_its_last_byte() {
        let memory = map(3074).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr().addr() % HUGE_PAGE, 0);
            let last = GuestAddress(region.start_addr().0 + region.len() - 1);
            memory.write_obj(7_u8, last).unwrap();
            assert_eq!(memory.read_obj::<u8>(last).unwrap(), 7);
        }
        assert!(memory.write_obj(7_u8, GuestAddress(HOLE_BEGIN)).is_err());
    }
}
