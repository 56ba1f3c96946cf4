//! Makes the disk that a machine writes to.
//!
//! It is made on the host, where e2fsprogs is never missing: an image need not have it. The file is sparse and holds no journal,
//! since nothing of it outlives its machine; so a large one costs no more time or room than a small one, at first.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What to install where the program is missing.
pub const PACKAGE: &str = "e2fsprogs";

/// A file system has no room for anything below this.
pub const LEAST_BYTES: u64 = 8 << 20;

/// Debian has it where only root's path leads.
const PLACES: &[&str] = &["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Why there is no scratch disk.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    #[error("a scratch disk of {bytes} bytes is too small: it takes {LEAST_BYTES} at least")]
    TooSmall { bytes: u64 },
    #[error("there is no mkfs.ext4 to make a machine's disk with; install the package {PACKAGE}")]
    NoProgram,
    #[error("cannot make the disk {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("mkfs.ext4 could not make the disk {}: {told}", path.display())]
    Refused { path: PathBuf, told: String },
}

/// Makes a new file at `path` with an empty ext4 file system of so many bytes. An error leaves nothing there. Blocks for a moment.
pub fn make(path: &Path, bytes: u64) -> Result<(), ScratchError> {
    if bytes < LEAST_BYTES {
        return Err(ScratchError::TooSmall { bytes });
    }
    let program = program().ok_or(ScratchError::NoProgram)?;
    let error = |source| ScratchError::Io { path: path.to_owned(), source };
    File::create_new(path).and_then(|file| file.set_len(bytes)).map_err(error)?;
    // Inode tables are zeroed by nobody: the file has nothing but holes there.
    let output = Command::new(program)
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"])
        .args(["-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .arg(path)
        .stdin(Stdio::null())
        .output();
    let told = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => Ok(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(source) => Err(source),
    };
    // What went wrong says more than that this fails as well.
    let _ = fs::remove_file(path);
    Err(match told {
        Ok(told) => ScratchError::Refused { path: path.to_owned(), told },
        Err(source) => error(source),
    })
}

/// Where the program is; none where it is not installed.
pub fn program() -> Option<PathBuf> {
    PLACES.iter().map(|folder| Path::new(folder).join("mkfs.ext4")).find(|file| file.is_file())
}
