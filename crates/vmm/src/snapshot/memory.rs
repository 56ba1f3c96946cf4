//! Keeps a guest's memory in a file: where the guest's pages are zeros or were never used, the file has holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::GuestMemory;

const PAGE: usize = 4096;
/// Pages that are looked at together.
const PIECE_PAGES: usize = 512;
const PIECE: usize = PIECE_PAGES * PAGE;
/// Of a page in /proc/self/pagemap: it is in memory, or swapped out (Documentation/admin-guide/mm/pagemap.rst).
const USED: u64 = 3 << 62;
const ENTRY: usize = 8;

/// Writes memory that was mapped for a guest, and that no guest changes any more.
pub fn write(memory: &GuestMemory, to: &File) -> io::Result<()> {
    let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    to.set_len(bytes)?;
    let pages = File::open("/proc/self/pagemap")?;
    let (mut piece, mut entries) = (vec![0; PIECE], vec![0; PIECE_PAGES * ENTRY]);
    let mut offset = 0;
    for region in memory.iter() {
        // Regions are multiples of 2 MiB, which a piece is.
        for at in (0..region.len()).step_by(PIECE) {
            let page = (region.as_ptr().addr() as u64 + at) / PAGE as u64;
            pages.read_exact_at(&mut entries, page * ENTRY as u64)?;
            if entries.as_chunks().0.iter().any(|entry| u64::from_ne_bytes(*entry) & USED != 0) {
                let address = GuestAddress(region.start_addr().0 + at);
                memory.read_slice(&mut piece, address).map_err(io::Error::other)?;
                write_piece(&piece, to, offset + at)?;
            }
        }
        offset += region.len();
    }
    Ok(())
}

fn write_piece(piece: &[u8], to: &File, offset: u64) -> io::Result<()> {
    runs(piece)
        .into_iter()
        .try_for_each(|(begin, end)| to.write_all_at(&piece[begin..end], offset + begin as u64))
}

/// Where pages that are not zeros begin and end.
fn runs(piece: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (index, page) in piece.chunks(PAGE).enumerate() {
        if page == [0; PAGE] {
            continue;
        }
        let begin = index * PAGE;
        match runs.last_mut() {
            Some(last) if last.1 == begin => last.1 = begin + PAGE,
            _ => runs.push((begin, begin + PAGE)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory;

    #[test]
    fn what_was_written_is_there_again_and_the_rest_takes_no_room() {
        let first = memory::map(3074).unwrap();
        let above = memory::HOLE_END + 5;
        for (address, value) in [(0, 1_u8), (4095, 2), (3 * 4096, 3), ((3 << 30) - 1, 4), (above, 5)] {
            first.write_obj(value, GuestAddress(address)).unwrap();
        }
        // Used, and zeros all the same.
        first.write_slice(&[0; 3 << 20], GuestAddress(64 << 20)).unwrap();
        let file = tempfile::tempfile().unwrap();
        write(&first, &file).unwrap();
        let about = file.metadata().unwrap();
        assert_eq!(about.len(), 3074 << 20);
        assert!(about.blocks() * 512 <= 64 << 10, "{} blocks", about.blocks());

        let (one, other) = (memory::map_copy(3074, &file).unwrap(), memory::map_copy(3074, &file).unwrap());
        let read = |memory: &GuestMemory, address| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        for (address, value) in
            [(0, 1), (1, 0), (4095, 2), (3 * 4096, 3), (64 << 20, 0), ((3 << 30) - 1, 4), (above, 5)]
        {
            assert_eq!(read(&one, address), value, "{address:#x}");
        }
        for region in one.iter() {
            assert_eq!(region.as_ptr().addr() % (2 << 20), 0);
        }
        // Neither the other nor the file is touched.
        one.write_obj(9_u8, GuestAddress(4095)).unwrap();
        assert_eq!((read(&one, 4095), read(&other, 4095)), (9, 2));
        assert_eq!(read(&memory::map_copy(3074, &file).unwrap(), 4095), 2);
    }

    #[test]
    fn pages_are_written_together() {
        let mut piece = vec![0; 8 * PAGE];
        for page in [0, 2, 3, 7] {
            piece[page * PAGE + page] = 1;
        }
        assert_eq!(runs(&piece), [(0, PAGE), (2 * PAGE, 4 * PAGE), (7 * PAGE, 8 * PAGE)]);
        assert_eq!(runs(&vec![0; PIECE]), []);
    }
}
