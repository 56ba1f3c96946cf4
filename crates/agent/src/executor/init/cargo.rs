//! Packs a host's folder for a machine, which sees no folder of the host's.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot};

use crate::executor::ExecutorError;
use crate::executor::door::{DoorError, PIECE_CAPACITY, Piece, Request, Stored};

/// A piece has about as much.
const PIECE_BYTES: usize = 64 << 10;

/// A folder on its way.
pub(super) struct Cargo {
    folder: PathBuf,
    stored: oneshot::Receiver<Result<Stored, DoorError>>,
    /// Told before the last piece is missed.
    trouble: oneshot::Receiver<io::Error>,
}

impl Cargo {
    /// Begins to pack a folder that becomes the working folder.
    pub fn load(folder: PathBuf) -> (Self, Request) {
        let (pieces, arriving) = mpsc::channel(PIECE_CAPACITY);
        let (answer, stored) = oneshot::channel();
        let (tell, trouble) = oneshot::channel();
        let from = folder.clone();
        // It ends with the last piece, or when nobody takes any more.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = pack(&from, &pieces) {
                let _ = tell.send(error);
            }
        });
        (Self { folder, stored, trouble }, Request::Put { root: String::new(), pieces: arriving, answer })
    }

    /// What has become of it, once its request is answered.
    pub fn arrived(mut self) -> Result<(), ExecutorError> {
        if let Ok(error) = self.trouble.try_recv() {
            return Err(ExecutorError::io(format_args!("pack {}", self.folder.display()))(error));
        }
        match self.stored.try_recv() {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => {
                Err(ExecutorError::io("put the workspace into the machine")(io::Error::other(error)))
            }
            Err(_) => {
                Err(ExecutorError::io("put the workspace into the machine")(io::ErrorKind::BrokenPipe.into()))
            }
        }
    }
}

fn pack(folder: &Path, pieces: &mpsc::Sender<Piece>) -> io::Result<()> {
    let mut archive = tar::Builder::new(Pieces { buffer: BytesMut::new(), pieces });
    archive.follow_symlinks(false);
    archive.append_dir_all("", folder)?;
    archive.into_inner()?.finish()
}

/// Cuts what is written into pieces.
struct Pieces<'a> {
    buffer: BytesMut,
    pieces: &'a mpsc::Sender<Piece>,
}

impl Pieces<'_> {
    fn finish(mut self) -> io::Result<()> {
        self.flush()?;
        self.send(Piece::End)
    }

    fn send(&self, piece: Piece) -> io::Result<()> {
        self.pieces.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pieces<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(PIECE_BYTES.saturating_sub(self.buffer.len()));
        self.buffer.put_slice(&bytes[..count]);
        if self.buffer.len() == PIECE_BYTES {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece: Bytes = self.buffer.split().freeze();
        self.send(Piece::Bytes(piece))
    }
}
