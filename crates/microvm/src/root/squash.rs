//! Packs merged layers as a squashfs.
//!
//! Of a tree only names and attributes are held, of its files' bytes a block at a time. Equal layers give equal bytes. What
//! `backhand` cannot say is left out: hard links (each name becomes a file of its own, whose bytes are there once) and
//! extended attributes.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use backhand::compression::{CompressionAction, Compressor};
use backhand::kind::{Kind, LE_V4_0};
use backhand::{BackhandError, FilesystemCompressor, FilesystemWriter, NodeHeader, SuperBlock};

use super::RootError;
use super::merge::{Entry, Owners, What, merge};

/// Above it files are packed slower, and hardly smaller.
const ZSTD_LEVEL: i32 = 3;

/// The kernel reads and unpacks as much at once.
const BLOCK_BYTES: u32 = 128 << 10;

/// Writes the whole file system; returns its length.
pub(super) fn pack(
    layers: &[PathBuf],
    owners: Owners,
    file: &File,
    stop: &AtomicBool,
) -> Result<u64, RootError> {
    let mut writer = FilesystemWriter::default();
    writer.set_kind(Kind::new_v4_with_const(&Zstd, LE_V4_0));
    writer.set_compressor(FilesystemCompressor::new(Compressor::Zstd, None).map_err(squash)?);
    writer.set_block_size(BLOCK_BYTES);
    merge(layers, owners, &mut |entry| {
        if stop.load(Ordering::Relaxed) {
            return Err(RootError::Stopped);
        }
        push(&mut writer, entry).map_err(squash)
    })?;
    let out = BufWriter::with_capacity(1 << 20, Stoppable { file, stop });
    match writer.write(out) {
        Ok((_, bytes)) => Ok(bytes),
        Err(_) if stop.load(Ordering::Relaxed) => Err(RootError::Stopped),
        Err(error) => Err(squash(error)),
    }
}

fn push(writer: &mut FilesystemWriter<'_, '_, '_>, entry: Entry) -> Result<(), BackhandError> {
    let Entry { path, what, mode: permissions, uid, gid, mtime } = entry;
    let header = NodeHeader { permissions, uid, gid, mtime };
    if path.as_os_str() == "/" {
        writer.set_root_mode(permissions);
        writer.set_root_uid(uid);
        writer.set_root_gid(gid);
        return Ok(());
    }
    match what {
        What::Folder => writer.push_dir(path, header),
        What::File(source) => writer.push_file_from_path(source, path, header),
        What::Link(target) => writer.push_symlink(target, path, header),
        What::Fifo => writer.push_fifo(path, header),
    }
}

fn squash(error: BackhandError) -> RootError {
    match error {
        BackhandError::StdIo(source) if source.raw_os_error() == Some(ENOSPC) => {
            RootError::DiskFull { source }
        }
        error => RootError::Squash(Box::new(error)),
    }
}

const ENOSPC: i32 = rustix::io::Errno::NOSPC.raw_os_error();

/// A file that is not written any more once nobody waits for it.
struct Stoppable<'a> {
    file: &'a File,
    stop: &'a AtomicBool,
}

impl Write for Stoppable<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            Err(io::Error::other("stopped"))
        } else {
            self.file.write(bytes)
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Stoppable<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Packs with the workspace's own zstd.
struct Zstd;

/// Made once: it is as large as what it packs.
static PACKER: Mutex<Option<zstd::bulk::Compressor<'static>>> = Mutex::new(None);

impl CompressionAction for Zstd {
    type Error = BackhandError;
    type Compressor = Compressor;
    type FilesystemCompressor = FilesystemCompressor;
    type SuperBlock = SuperBlock;

    fn decompress(&self, _: &[u8], _: &mut Vec<u8>, compressor: Compressor) -> Result<(), BackhandError> {
        // Nothing is read here.
        Err(BackhandError::UnsupportedCompression(format!("{compressor:?}")))
    }

    fn compress(&self, bytes: &[u8], _: FilesystemCompressor, _: u32) -> Result<Vec<u8>, BackhandError> {
        let mut packer = PACKER.lock().unwrap_or_else(PoisonError::into_inner);
        let packer = match &mut *packer {
            Some(packer) => packer,
            none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL)?),
        };
        Ok(packer.compress(bytes)?)
    }
}
