//! Measures folders, without following links and without ever running away.

use std::path::{Path, PathBuf};

/// More entries than this count as over any bound: a tree can be hostile by number as well as by size.
const MAX_ENTRIES: u64 = 2_000_000;
/// What an entry costs beside its bytes, so that a million empty files do not count as nothing.
const BYTES_PER_ENTRY: u64 = 256;

/// Tells whether the folder holds more than `max_bytes`; stops looking as soon as it knows.
pub(crate) fn exceeds(folder: &Path, max_bytes: u64) -> bool {
    measure(folder, max_bytes) > max_bytes
}

/// The bytes below a folder. What disappears meanwhile counts as gone.
pub(crate) fn of(folder: &Path) -> u64 {
    measure(folder, u64::MAX)
}

fn measure(folder: &Path, enough: u64) -> u64 {
    let (mut bytes, mut entries) = (0_u64, 0_u64);
    let mut folders: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(listing) = std::fs::read_dir(&folder) else { continue };
        for entry in listing.flatten() {
            entries += 1;
            // `DirEntry::metadata` does not follow symbolic links.
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                folders.push(entry.path());
            } else {
                bytes = bytes.saturating_add(metadata.len());
            }
            bytes = bytes.saturating_add(BYTES_PER_ENTRY);
            if bytes > enough || entries > MAX_ENTRIES {
                return u64::MAX;
            }
        }
    }
    bytes
}
