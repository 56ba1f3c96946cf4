//! Keeps a machine in a folder, and goes on from it as often as wanted.
//!
//! ```text
//!   FOLDER/state    what is in no memory: a header, and the fields of `state`
//!   FOLDER/memory   the guest's memory, as long as that and with holes; mapped by whoever goes on, never read as a whole
//! ```
//!
//! The folder gets its name when it is whole and on the disk. A state is added up, so that one damaged byte of it is found; the
//! memory is not, since that would have every start read all of it: of that only the length is told. Disks are not in it, but
//! brought along: those that are only read have to be the same, which what the machine was made of says; on one that is
//! written the guest must not have relied on anything yet. Nor are connections: whoever had one in the guest hears that it is gone.
//!
//! Invariant: a machine is saved at most once and then does not go on, so that nothing of it exists twice.

pub mod fields;
mod memory;
mod state;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::memory::GuestMemory;

pub use state::{DecodeError, State};

const STATE: &str = "state";
const MEMORY: &str = "memory";
/// 64 virtual CPUs have half a megabyte.
const MOST_STATE_BYTES: u64 = 4 << 20;

/// Why a machine is not saved.
#[derive(Debug, Error)]
pub enum WriteError {
    #[error("cannot save the machine in {}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Why there is nothing to go on from.
#[derive(Debug, Error)]
pub enum ReadError {
    #[error("cannot read the snapshot's file {}: take the snapshot anew", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the snapshot's file {} cannot be used: take the snapshot anew", path.display())]
    State { path: PathBuf, source: DecodeError },
    #[error(
        "the snapshot's file {} has {actual} bytes of the guest's {expected}: take the snapshot anew", path.display()
    )]
    Memory { path: PathBuf, expected: u64, actual: u64 },
}

/// A snapshot that was read: the memory is there to be mapped.
#[derive(Debug)]
pub struct Snapshot {
    pub state: State,
    pub memory: File,
}

impl Snapshot {
    pub fn read(folder: &Path) -> Result<Self, ReadError> {
        let path = folder.join(STATE);
        let bytes = read_state(&path).map_err(|source| ReadError::Io { path: path.clone(), source })?;
        let state = State::decode(&bytes).map_err(|source| ReadError::State { path, source })?;
        let path = folder.join(MEMORY);
        let open = || {
            let file = File::open(&path)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        let (memory, actual) = open().map_err(|source| ReadError::Io { path: path.clone(), source })?;
        // A size that no machine has is refused by whoever maps it.
        let expected = state.memory_mebibytes.saturating_mul(1 << 20);
        if actual != expected {
            return Err(ReadError::Memory { path, expected, actual });
        }
        Ok(Self { state, memory })
    }
}

/// Saves a machine whose guest does not go on; leaves nothing where that does not work.
pub fn write(state: &State, memory: &GuestMemory, folder: &Path) -> Result<(), WriteError> {
    let mut partial = folder.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let written = write_all(state, memory, &partial).and_then(|()| fs::rename(&partial, folder));
    written.map_err(|source| {
        // It may never have been made.
        let _ = fs::remove_dir_all(&partial);
        WriteError::Io { path: folder.to_owned(), source }
    })
}

fn write_all(state: &State, memory: &GuestMemory, folder: &Path) -> io::Result<()> {
    fs::create_dir(folder)?;
    let kept = File::create_new(folder.join(MEMORY))?;
    memory::write(memory, &kept)?;
    kept.sync_all()?;
    let mut file = File::create_new(folder.join(STATE))?;
    file.write_all(&state.encode())?;
    file.sync_all()?;
    File::open(folder)?.sync_all()
}

fn read_state(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_STATE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}
