//! Packs the initial RAM disk: the init, the modules it loads, and the order in which it does.
//!
//! ```text
//! /dev/null           for the moment before there is a /dev: a program that starts without any file open takes it
//! /init               the init, which is the machine's first process
//! /modules/NAME.ko
//! /modules/order      names of modules, one in each line, in load order
//! ```
//! The archive is cpio's `newc`, not compressed: unpacking would take longer than reading does. Equal input gives equal bytes.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use sealci_image::Digest;

use crate::kernel::Module;
use crate::shelf::{Kept, Shelf};

const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const DATA: u32 = 0o100_644;
const DEVICE: u32 = 0o020_666;

/// Why there is no initial RAM disk.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    #[error("cannot keep an initial RAM disk in {}", folder.display())]
    Storage {
        folder: std::path::PathBuf,
        #[source]
        source: io::Error,
    },
    /// A file of 4 GiB or more.
    #[error("`{0}` is too large for an initial RAM disk")]
    TooLarge(String),
}

/// An initial RAM disk. It stays there while this lives.
#[derive(Debug)]
pub struct Initramfs {
    kept: Kept,
}

impl Initramfs {
    pub fn path(&self) -> &Path {
        self.kept.path()
    }

    /// Opened to read.
    pub fn file(&self) -> &File {
        self.kept.file()
    }
}

/// Initial RAM disks in one folder, which several processes may have open.
#[derive(Debug, Clone)]
pub struct InitramfsStore {
    shelf: Shelf,
}

impl InitramfsStore {
    /// Opens a folder, which is made if need be, and removes what died with its process.
    pub fn open(folder: &Path) -> Result<Self, InitramfsError> {
        let shelf = Shelf::open(folder, "cpio").map_err(|source| storage(folder, source))?;
        Ok(Self { shelf })
    }

    /// Finds it, or writes it. Blocks for a moment.
    pub fn obtain(&self, init: &[u8], modules: &[Module]) -> Result<Initramfs, InitramfsError> {
        let archive = archive(init, modules)?;
        let make = |mut file: &File| {
            file.write_all(&archive).map_err(|source| storage(self.shelf.folder(), source))?;
            Ok(archive.len() as u64)
        };
        let name = Digest::of(&archive);
        let kept = self.shelf.obtain(name.hex(), make, |source| storage(self.shelf.folder(), source))?;
        Ok(Initramfs { kept })
    }

    /// Removes all but what is in use: each is made again in a moment.
    pub fn clear(&self) -> Result<(), InitramfsError> {
        self.shelf.collect(0).map(drop).map_err(|source| storage(self.shelf.folder(), source))
    }
}

fn storage(folder: &Path, source: io::Error) -> InitramfsError {
    InitramfsError::Storage { folder: folder.to_owned(), source }
}

/// The bytes of the initial RAM disk.
pub fn archive(init: &[u8], modules: &[Module]) -> Result<Vec<u8>, InitramfsError> {
    let mut cpio = Cpio { bytes: Vec::new(), inode: 0 };
    cpio.put("dev", FOLDER, b"")?;
    cpio.put_entry("dev/null", DEVICE, (1, 3), b"")?;
    cpio.put("init", PROGRAM, init)?;
    cpio.put("modules", FOLDER, b"")?;
    let mut order = String::new();
    for module in modules {
        cpio.put(&format!("modules/{}.ko", module.name), DATA, &module.bytes)?;
        order.push_str(&module.name);
        order.push('\n');
    }
    cpio.put("modules/order", DATA, order.as_bytes())?;
    cpio.inode = 0;
    cpio.put("TRAILER!!!", 0, b"")?;
    Ok(cpio.bytes)
}

/// An archive as the kernel unpacks it (Documentation/driver-api/early-userspace/buffer-format.rst).
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn put(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), InitramfsError> {
        self.put_entry(name, mode, (0, 0), content)
    }

    fn put_entry(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), InitramfsError> {
        let length = u32::try_from(content.len()).map_err(|_| InitramfsError::TooLarge(name.to_owned()))?;
        let links = if mode == FOLDER { 2 } else { 1 };
        // magic | ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, length, 0, 0, major, minor, name.len() as u32 + 1, 0];
        self.inode += 1;
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
