//! Makes the disk that a machine writes to.
//!
//! It is made on the host, where e2fsprogs is never missing: an image need not have it. The file is sparse and holds no journal,
//! since nothing of it outlives its machine; so a large one costs no more time or room than a small one, at first. One is made
//! ahead, and each machine gets a copy: no machine waits for a program to run.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{SeekFrom, seek};

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

/// An empty disk, to be copied.
#[derive(Debug)]
pub struct Blank {
    path: PathBuf,
    bytes: u64,
}

impl Blank {
    /// Makes it anew in this folder, which is one process's: what is there may be half of one. Blocks for a moment.
    pub fn make(folder: &Path, bytes: u64) -> Result<Self, ScratchError> {
        let path = folder.join("blank");
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(ScratchError::Io { path, source });
            }
            _ => {}
        }
        make(&path, bytes)?;
        Ok(Self { path, bytes })
    }

    /// The size of the disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes a new file at `path` that is the same. An error may leave a part of it. Blocks for a moment.
    pub fn copy(&self, path: &Path) -> Result<(), ScratchError> {
        let copy = || {
            let mut options = File::options();
            let to = options.write(true).create_new(true).mode(0o600).open(path)?;
            to.set_len(self.bytes)?;
            copy_data(&File::open(&self.path)?, &to)
        };
        copy().map_err(|source| ScratchError::Io { path: path.to_owned(), source })
    }
}

/// Copies what is no hole: of an empty file system some hundred KiB, however large it is.
fn copy_data(from: &File, to: &File) -> io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    let mut at = 0;
    loop {
        at = match seek(from, SeekFrom::Data(at)) {
            Err(rustix::io::Errno::NXIO) => return Ok(()),
            data => data?,
        };
        let end = seek(from, SeekFrom::Hole(at))?;
        while at < end {
            let length = (end - at).min(piece.len() as u64) as usize;
            from.read_exact_at(&mut piece[..length], at)?;
            to.write_all_at(&piece[..length], at)?;
            at += length as u64;
        }
    }
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
