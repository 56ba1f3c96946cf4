//! Cuts the channel's bytes into frames, and holds what waits to be written to it.

use std::io;

use bytes::{Bytes, BytesMut};
use sealci_guest::wire::{
    self, HEADER_BYTES, Header, OUTPUT_KIND, TAKE_DATA_KIND, ToInit, WireError, put_data_header,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// The largest frame and a header fit.
const READ_BUFFER_BYTES: usize = 128 << 10;
/// Past so much that waits no piece of an archive is added.
const ENOUGH_BYTES: usize = 128 << 10;

/// Both directions of one channel.
pub(super) fn split(channel: UnixStream) -> (Incoming, Outgoing) {
    let (reader, writer) = channel.into_split();
    let incoming = Incoming { reader, buffer: BytesMut::with_capacity(READ_BUFFER_BYTES) };
    (incoming, Outgoing { writer, waiting: BytesMut::new(), is_deaf: false })
}

pub(super) enum Frame {
    Output(Bytes),
    Archive(Bytes),
    Control(u8, Bytes),
}

pub(super) enum Unreadable {
    Garbled(WireError),
    Io,
}

/// What comes from an init.
pub(super) struct Incoming {
    reader: OwnedReadHalf,
    buffer: BytesMut,
}

impl Incoming {
    /// The next frame; none at the channel's end. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<Frame>, Unreadable> {
        loop {
            if let Some(frame) = self.take_frame().map_err(Unreadable::Garbled)? {
                return Ok(Some(frame));
            }
            // While the events still hold the old memory this takes new.
            self.buffer.reserve(READ_BUFFER_BYTES / 2);
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Unreadable::Io),
            }
        }
    }

    fn take_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let Some((head, rest)) = self.buffer.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let Header { kind, payload_bytes } = Header::parse(*head, wire::MAX_FROM_INIT_BYTES)?;
        if rest.len() < payload_bytes {
            self.buffer.reserve(HEADER_BYTES + payload_bytes - self.buffer.len());
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(HEADER_BYTES + payload_bytes);
        let payload = frame.split_off(HEADER_BYTES).freeze();
        Ok(Some(match kind {
            OUTPUT_KIND => Frame::Output(payload),
            TAKE_DATA_KIND => Frame::Archive(payload),
            _ => Frame::Control(kind, payload),
        }))
    }
}

/// What goes to an init. Frames are posted without waiting, and written as the init reads.
pub(super) struct Outgoing {
    writer: OwnedWriteHalf,
    waiting: BytesMut,
    /// Nobody reads any more. That shows on the other side, after what may still have been said.
    is_deaf: bool,
}

impl Outgoing {
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub fn takes_more(&self) -> bool {
        self.waiting.len() < ENOUGH_BYTES
    }

    pub fn post(&mut self, message: &ToInit) -> Result<(), WireError> {
        let mut frame = Vec::new();
        message.encode(&mut frame)?;
        self.post_frame(&frame);
        Ok(())
    }

    /// Posts what is encoded already.
    pub fn post_frame(&mut self, frame: &[u8]) {
        if !self.is_deaf {
            self.waiting.extend_from_slice(frame);
        }
    }

    /// Posts a piece of an archive, at most [`wire::MAX_PUT_DATA_BYTES`].
    pub fn post_piece(&mut self, piece: &[u8]) {
        self.post_frame(&put_data_header(piece.len()));
        self.post_frame(piece);
    }

    /// Writes some of what waits. Dropping the future loses nothing.
    pub async fn write(&mut self) {
        if self.writer.write_buf(&mut self.waiting).await.is_err() {
            self.close();
        }
    }

    /// Writes what the init takes at once; whether that is everything.
    pub fn write_now(&mut self) -> bool {
        while !self.waiting.is_empty() {
            match self.writer.try_write(&self.waiting) {
                Ok(count) => drop(self.waiting.split_to(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(_) => {
                    self.close();
                    return false;
                }
            }
        }
        !self.is_deaf
    }

    fn close(&mut self) {
        self.is_deaf = true;
        self.waiting.clear();
    }
}
