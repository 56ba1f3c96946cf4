//! Holds what waits to be sent to the host, and moves the log, and archives, into it with one copy.
//!
//! Invariant: of those, a piece is taken in only while little is waiting ([`Outbox::takes_more`]), so a host that does not read stops the
//! commands' writing, not the init. Control frames always fit; there are a bounded number of them.

use std::fs::File;
use std::io::{self, Read, Write};

use sealci_guest::wire::{FromInit, HEADER_BYTES, WireError, output_header, take_data_header};

/// The most log, or archive, in one frame.
const PIECE_BYTES: usize = 128 << 10;
/// Past so many waiting bytes no more is taken in.
const ENOUGH_BYTES: usize = 64 << 10;
const CAPACITY_BYTES: usize = ENOUGH_BYTES + HEADER_BYTES + PIECE_BYTES;

/// Frames, complete but for what is already sent of the first.
pub struct Outbox {
    /// Allocated once, so that reading needs no clearing. Waiting: `start..end`.
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Outbox {
    pub fn new() -> Self {
        Self { bytes: vec![0; CAPACITY_BYTES], start: 0, end: 0 }
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    pub fn takes_more(&self) -> bool {
        self.end - self.start <= ENOUGH_BYTES
    }

    /// Appends a control frame.
    pub fn push(&mut self, message: &FromInit<'_>) -> Result<(), WireError> {
        let mut frame = Vec::with_capacity(64);
        message.encode(&mut frame)?;
        self.make_room(frame.len());
        self.bytes[self.end..self.end + frame.len()].copy_from_slice(&frame);
        self.end += frame.len();
        Ok(())
    }

    /// Reads at most `limit` bytes of log into a frame. 0: there is nothing to read now.
    pub fn take_log(&mut self, log: &File, limit: usize) -> io::Result<usize> {
        self.take_piece(log, limit, output_header).map(|count| count.unwrap_or(0))
    }

    /// Reads a piece of an archive into a frame. 0: it has ended; none: there is nothing to read now.
    pub fn take_archive(&mut self, archive: impl Read) -> io::Result<Option<usize>> {
        self.take_piece(archive, usize::MAX, take_data_header)
    }

    fn take_piece(
        &mut self,
        mut source: impl Read,
        limit: usize,
        header: fn(usize) -> [u8; HEADER_BYTES],
    ) -> io::Result<Option<usize>> {
        let limit = limit.min(PIECE_BYTES);
        self.make_room(HEADER_BYTES + limit);
        let payload = self.end + HEADER_BYTES;
        let count = match source.read(&mut self.bytes[payload..payload + limit]) {
            Ok(count) => count,
            Err(error) if is_transient(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        if count > 0 {
            self.bytes[self.end..payload].copy_from_slice(&header(count));
            self.end = payload + count;
        }
        Ok(Some(count))
    }

    /// Sends what the channel takes without waiting.
    pub fn flush(&mut self, mut channel: &File) -> io::Result<()> {
        while self.start < self.end {
            match channel.write(&self.bytes[self.start..self.end]) {
                Ok(count) => self.start += count,
                Err(error) if is_transient(&error) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        self.start = 0;
        self.end = 0;
        Ok(())
    }

    fn make_room(&mut self, count: usize) {
        if self.end + count > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        if self.end + count > self.bytes.len() {
            self.bytes.resize(self.end + count, 0);
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
