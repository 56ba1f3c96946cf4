//! Moves archives between an environment and files on this machine, with bounded memory: packed on the way out, unpacked
//! on the way in.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use sealci_archive::{ArchiveError, ArchiveWriter, Summary};
use tokio::io::{AsyncWriteExt, DuplexStream};
use tokio_util::io::SyncIoBridge;

use crate::causes::is_disk_full;
use crate::executor::door::{Door, DoorError, Stored, TakeLimits, Taken};

/// On its way between the environment and the thread that compresses.
const PIPE_BYTES: usize = 512 << 10;
const COPY_BYTES: usize = 128 << 10;
/// Of the windows that a stranger's archive may ask memory for: 8 MiB.
const MAX_WINDOW_LOG: u32 = 23;

/// Why files did not go in or come out.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error(transparent)]
    Door(#[from] DoorError),
    #[error("cannot pack the files")]
    Pack(#[source] ArchiveError),
    #[error("cannot unpack the files")]
    Unpack(#[source] io::Error),
    #[error("the files were not moved: their task broke")]
    Broken,
}

impl FilesError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self, Self::Pack(ArchiveError::Write(error)) | Self::Unpack(error) if is_disk_full(error))
    }
}

/// Packs what `paths` choose into the file `into`.
pub async fn take(
    door: &Door,
    paths: &[String],
    base: &str,
    limits: TakeLimits,
    into: &Path,
) -> Result<(Taken, Summary), FilesError> {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let path = into.to_owned();
    let packing = tokio::task::spawn_blocking(move || pack(SyncIoBridge::new(far), &path));
    let taking = async {
        let mut near = near;
        let taken = door.take(paths, base, limits, &mut near).await;
        // Its end is the archive's.
        let _ = near.shutdown().await;
        taken
    };
    let (taken, packed) = tokio::join!(taking, packing);
    let packed = packed.map_err(|_| FilesError::Broken)?;
    match (taken, packed) {
        (Ok(taken), Ok(summary)) => Ok((taken, summary)),
        // It reads no further, so the other side could not write.
        (Err(DoorError::Sink(_)) | Ok(_), Err(error)) => Err(FilesError::Pack(error)),
        (Err(error), _) => Err(error.into()),
    }
}

fn pack(mut tar: impl Read, into: &Path) -> Result<Summary, ArchiveError> {
    let file = File::create(into).map_err(ArchiveError::Write)?;
    let mut writer = ArchiveWriter::new(file)?;
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match tar.read(&mut buffer).map_err(ArchiveError::Write)? {
            0 => break,
            count => writer.push(&buffer[..count])?,
        }
    }
    let (mut file, summary) = writer.finish()?;
    file.flush().map_err(ArchiveError::Write)?;
    Ok(summary)
}

/// Packs one file of this machine as `name`; none where it is empty or not there.
pub async fn pack_file(from: &Path, name: &str, into: &Path) -> Result<Option<Summary>, FilesError> {
    let (from, name, into) = (from.to_owned(), name.to_owned(), into.to_owned());
    let packing = tokio::task::spawn_blocking(move || {
        let file = match File::open(&from) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(ArchiveError::Write)?,
        };
        let size = file.metadata().map_err(ArchiveError::Write)?.len();
        if size == 0 {
            return Ok(None);
        }
        let mut header = tar::Header::new_ustar();
        header.set_size(size);
        header.set_mode(0o644);
        let writer = ArchiveWriter::new(File::create(into).map_err(ArchiveError::Write)?)?;
        let mut tar = tar::Builder::new(writer);
        tar.append_data(&mut header, name, file).map_err(ArchiveError::Write)?;
        let (_, summary) = tar.into_inner().map_err(ArchiveError::Write)?.finish()?;
        Ok(Some(summary))
    });
    packing.await.map_err(|_| FilesError::Broken)?.map_err(FilesError::Pack)
}

/// Unpacks the archive `from` below `root`.
pub async fn put(door: &Door, root: &str, from: &Path) -> Result<Stored, FilesError> {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let path = from.to_owned();
    let unpacking = tokio::task::spawn_blocking(move || unpack(&path, far));
    let (stored, unpacked) = tokio::join!(door.put(root, near), unpacking);
    match (stored, unpacked.map_err(|_| FilesError::Broken)?) {
        (stored, Ok(())) => Ok(stored?),
        // Its reader is gone: that one knows why.
        (Err(error), Err(unpacked)) if unpacked.kind() == io::ErrorKind::BrokenPipe => Err(error.into()),
        (_, Err(error)) => Err(FilesError::Unpack(error)),
    }
}

fn unpack(from: &Path, into: DuplexStream) -> io::Result<()> {
    let mut into = SyncIoBridge::new(into);
    let mut decoder = zstd::Decoder::new(BufReader::with_capacity(COPY_BYTES, File::open(from)?))?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    io::copy(&mut decoder, &mut into)?;
    into.shutdown()
}
