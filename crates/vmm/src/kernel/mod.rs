//! Reads a kernel from a file, and puts it in the guest's memory.
//!
//! It takes what distributions install (a bzImage) and what is built before it is packed (a vmlinux, which is ELF).
//! A file is checked against its own headers before anything of it is used; nothing of it is kept in the host's memory.

mod bzimage;
mod elf;
mod extract;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::GuestMemory;

pub use extract::{ExtractError, extract};

/// Why a file is no kernel that can be started.
#[derive(Debug, Error)]
pub enum KernelError {
    #[error(
        "cannot open the kernel {}: give the path of a bzImage or vmlinux, such as /boot/vmlinuz-… \
         (Debian and Ubuntu: apt-get install linux-image-cloud-amd64)", path.display()
    )]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot read the kernel {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{} is no Linux kernel: a bzImage (as in /boot/vmlinuz-…) or a vmlinux is needed", path.display()
    )]
    Unknown { path: PathBuf },
    #[error("the kernel {} is for {architecture}: one for x86-64 is needed", path.display())]
    Foreign { path: PathBuf, architecture: String },
    #[error(
        "the kernel {} is truncated: it says that it has {expected} bytes, and has {actual}; \
         install its package anew", path.display()
    )]
    Truncated { path: PathBuf, expected: u64, actual: u64 },
    #[error("the kernel {} is damaged: {what}; install its package anew", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    #[error("the kernel {} needs {needed_mebibytes} MiB of memory, and the guest has {mebibytes} MiB", path.display())]
    TooLittleMemory { path: PathBuf, needed_mebibytes: u64, mebibytes: u64 },
    #[error("cannot put the kernel {} in the guest's memory", path.display())]
    Load { path: PathBuf, source: GuestMemoryError },
}

/// A kernel's file that has been checked.
#[derive(Debug)]
pub struct Kernel {
    source: Source,
    format: Format,
}

#[derive(Debug)]
enum Format {
    BzImage(bzimage::Image),
    Elf(elf::Image),
}

/// A kernel in the guest's memory.
#[derive(Debug, Clone, Copy)]
pub struct Loaded {
    /// Where it is entered, in 64-bit mode.
    pub entry: GuestAddress,
    /// Behind it and all that it unpacks and uses before it knows the memory.
    pub end: u64,
    /// What a bzImage says of itself.
    pub header: Option<setup_header>,
}

impl Kernel {
    /// Opens and checks a file.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let source = Source::open(path)?;
        let format = match bzimage::Image::read(&source)? {
            Some(image) => Format::BzImage(image),
            None => match elf::Image::read(&source)? {
                Some(image) => Format::Elf(image),
                None => return Err(source.foreign_or_unknown()?),
            },
        };
        Ok(Self { source, format })
    }

    /// Puts it where it belongs.
    pub fn load(&mut self, memory: &GuestMemory) -> Result<Loaded, KernelError> {
        match &self.format {
            Format::BzImage(image) => image.load(&mut self.source, memory),
            Format::Elf(image) => image.load(&mut self.source, memory),
        }
    }
}

/// The file, and its name for complaints.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Source {
    fn open(path: &Path) -> Result<Self, KernelError> {
        let open = || {
            let file = File::open(path)?;
            let about = file.metadata()?;
            if about.is_file() { Ok((file, about.len())) } else { Err(io::ErrorKind::InvalidInput.into()) }
        };
        let (file, bytes) = open().map_err(|source| KernelError::Open { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), file, bytes })
    }

    /// So many bytes at an offset; none where the file ends before.
    fn read<const N: usize>(&self, offset: u64) -> Result<Option<[u8; N]>, KernelError> {
        if offset.checked_add(N as u64).is_none_or(|end| end > self.bytes) {
            return Ok(None);
        }
        let mut bytes = [0; N];
        self.read_into(offset, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// What the file is known to have.
    fn read_into(&self, offset: u64, bytes: &mut [u8]) -> Result<(), KernelError> {
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|source| KernelError::Read { path: self.path.clone(), source })
    }

    fn foreign_or_unknown(&self) -> Result<KernelError, KernelError> {
        let path = self.path.clone();
        // Documentation/arch/arm64/booting.rst and Documentation/arch/riscv/boot-image-header.rst of Linux.
        let foreign = match self.read::<16>(0x30)? {
            Some(bytes) if &bytes[8..12] == b"ARM\x64" => "aarch64",
            Some(bytes) if &bytes[8..12] == b"RSC\x05" => "riscv64",
            _ => return Ok(KernelError::Unknown { path }),
        };
        Ok(KernelError::Foreign { path, architecture: foreign.to_owned() })
    }

    fn damaged(&self, what: &'static str) -> KernelError {
        KernelError::Damaged { path: self.path.clone(), what }
    }

    /// Fails unless the file reaches so far.
    fn must_reach(&self, expected: u64) -> Result<(), KernelError> {
        if self.bytes >= expected {
            return Ok(());
        }
        Err(KernelError::Truncated { path: self.path.clone(), expected, actual: self.bytes })
    }

    /// Fails unless the guest's memory below the hole reaches so far.
    fn must_fit(&self, memory: &GuestMemory, end: u64) -> Result<(), KernelError> {
        let low = crate::memory::low_bytes(memory);
        if end <= low {
            return Ok(());
        }
        Err(KernelError::TooLittleMemory {
            path: self.path.clone(),
            needed_mebibytes: end.div_ceil(1 << 20),
            mebibytes: low >> 20,
        })
    }

    /// Copies a part of the file.
    fn copy(
        &mut self,
        memory: &GuestMemory,
        offset: u64,
        bytes: u64,
        to: GuestAddress,
    ) -> Result<(), KernelError> {
        use std::io::{Seek, SeekFrom};
        let path = || self.path.clone();
        self.file
            .seek(SeekFrom::Start(offset))
            .map_err(|source| KernelError::Read { path: path(), source })?;
        memory
            .read_exact_volatile_from(to, &mut self.file, bytes as usize)
            .map_err(|source| KernelError::Load { path: path(), source })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    pub fn file(bytes: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    pub fn complaint(bytes: &[u8]) -> String {
        Kernel::open(file(bytes).path()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let missing = Kernel::open(Path::new("/does/not/exist")).unwrap_err().to_string();
        assert!(missing.contains("/does/not/exist") && missing.contains("linux-image"), "{missing}");
        assert!(Kernel::open(Path::new("/")).is_err());
        for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096], &[0xff; 70_000]] {
            assert!(complaint(bytes).contains("is no Linux kernel"));
        }
    }

    #[test]
    fn another_machines_kernel_is_named() {
        let mut image = vec![0; 4096];
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert!(complaint(&image).contains("is for aarch64"));
        image[0x38..0x3c].copy_from_slice(b"RSC\x05");
        assert!(complaint(&image).contains("is for riscv64"));
    }
}
