//! Writes files that only their owner can read, whole or not at all.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Whether what is written matters to another process than this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// It is on the disk before anything is done that builds on it.
    Durable,
    /// It goes with this process, and so waits for no disk.
    Scratch,
}

/// Writes a file that only its owner can read, whole or not at all.
pub(crate) fn write_private(path: &Path, bytes: &[u8], persistence: Persistence) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    if persistence == Persistence::Durable {
        file.sync_all()?;
    }
    fs::rename(&beside, path)?;
    match path.parent() {
        Some(folder) if persistence == Persistence::Durable => fs::File::open(folder)?.sync_all(),
        _ => Ok(()),
    }
}
