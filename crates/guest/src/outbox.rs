//! Holds what waits to be sent to the host, and moves the log into it with one copy.
//!
//! Invariant: log is taken in only while little is waiting ([`Outbox::takes_log`]), so a host that does not read stops the
//! commands' writing, not the init. Control frames always fit; there are a bounded number of them.

use std::fs::File;
use std::io::{self, Read, Write};

use sealci_guest::wire::{FromInit, HEADER_BYTES, WireError, output_header};

/// The most log in one frame.
const LOG_FRAME_BYTES: usize = 128 << 10;
/// Past so many waiting bytes no more log is taken in.
const ENOUGH_BYTES: usize = 64 << 10;
const CAPACITY_BYTES: usize = ENOUGH_BYTES + HEADER_BYTES + LOG_FRAME_BYTES;

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

    pub fn takes_log(&self) -> bool {
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
    pub fn take_log(&mut self, mut log: &File, limit: usize) -> io::Result<usize> {
        let limit = limit.min(LOG_FRAME_BYTES);
        self.make_room(HEADER_BYTES + limit);
        let payload = self.end + HEADER_BYTES;
        let count = match log.read(&mut self.bytes[payload..payload + limit]) {
            Ok(count) => count,
            Err(error) if is_transient(&error) => 0,
            Err(error) => return Err(error),
        };
        if count > 0 {
            self.bytes[self.end..payload].copy_from_slice(&output_header(count));
            self.end = payload + count;
        }
        Ok(count)
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
