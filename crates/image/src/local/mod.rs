//! Images that lie on this machine as files: OCI layout folders, and archives made by `docker save`.
//!
//! Everything is opened beneath the images folder, by the kernel's own rule (openat2(2), `RESOLVE_BENEATH`): no link in it leads
//! out. All of this blocks.

mod archive;
mod layout;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rustix::fs::{self, FileType, Mode, OFlags, ResolveFlags};

pub(crate) use archive::resolve as resolve_archive;
pub(crate) use layout::resolve as resolve_layout;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::Configuration;

/// A part of a file beneath the images folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Section {
    pub path: PathBuf,
    pub offset: u64,
    pub bytes: u64,
    /// None where only the digest of what is in it is known.
    pub digest: Option<Digest>,
}

/// An image whose layers are known.
#[derive(Debug, Clone)]
pub(crate) struct LocalImage {
    pub digest: Digest,
    pub configuration: Configuration,
    pub layers: Vec<Section>,
}

/// The images folder.
#[derive(Debug, Clone)]
pub(crate) struct Images {
    pub folder: PathBuf,
}

impl Images {
    /// A regular file.
    pub fn open(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = fs::open(&self.folder, flags, Mode::empty())?;
        // Without NONBLOCK a fifo would be waited for.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = loop {
            match fs::openat2(&folder, path, flags, Mode::empty(), resolve) {
                Err(rustix::io::Errno::AGAIN) => {}
                other => break other?,
            }
        };
        if FileType::from_raw_mode(fs::fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        Ok(file.into())
    }

    pub fn section(&self, section: &Section) -> io::Result<io::Take<File>> {
        let mut file = self.open(&section.path)?;
        file.seek(SeekFrom::Start(section.offset))?;
        Ok(file.take(section.bytes))
    }

    /// A whole small file.
    fn read(&self, path: &Path, bound: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open(path)?.take(bound + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > bound {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("it has more than {bound} bytes"),
            ));
        }
        Ok(bytes)
    }

    fn error(&self, image: &str, path: &Path, error: io::Error) -> ImageError {
        let path = self.folder.join(path);
        if error.kind() == io::ErrorKind::NotFound {
            return ImageError::NotFound { image: image.to_owned(), place: path.display().to_string() };
        }
        ImageError::disk(&path, error)
    }
}
