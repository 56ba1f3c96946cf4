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
    // Somebody else may be at it.
    fs::create_dir(&partial).map_err(|source| WriteError::Io { path: partial.clone(), source })?;
    let written = write_files(state, memory, &partial).and_then(|()| fs::rename(&partial, folder));
    written.map_err(|source| {
        let _ = fs::remove_dir_all(&partial);
        WriteError::Io { path: folder.to_owned(), source }
    })
}

fn write_files(state: &State, memory: &GuestMemory, folder: &Path) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::x86_64::state::ProcessorsState;

    #[test]
    fn what_is_there_already_is_left_as_it_is() {
        let state = State {
            made_of: String::new(),
            memory_mebibytes: 64,
            serial: None,
            processors: ProcessorsState::default(),
            devices: Vec::new(),
        };
        let memory = memory::map(64).unwrap();
        let place = tempfile::tempdir().unwrap();
        let (folder, partial) = (place.path().join("saved"), place.path().join("saved.partial"));
        write(&state, &memory, &folder).unwrap();
        assert_eq!(fs::read(folder.join(STATE)).unwrap(), state.encode());
        assert_eq!(fs::metadata(folder.join(MEMORY)).unwrap().len(), 64 << 20);
        write(&state, &memory, &folder).unwrap_err();
        assert!(folder.join(STATE).exists() && !partial.exists());

        fs::rename(&folder, &partial).unwrap();
        let error = write(&state, &memory, &folder).unwrap_err();
        assert!(error.to_string().contains("saved.partial"), "{error}");
        assert!(partial.join(STATE).exists() && !folder.exists());
    }
}
