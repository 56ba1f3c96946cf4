//! Carries files in and out beside the loop: a thread packs or unpacks, and a pair of sockets moves the archive.
//!
//! ```text
//!   channel ──▶ Incoming.waiting ──▶ socket ──▶ thread: unpack        thread: pack ──▶ socket ──▶ outbox ──▶ channel
//! ```
//!
//! The thread alone waits for disks. It has ended, or is about to, when its socket is closed; then its result is taken.
//! Invariants: what waits in here is never more than the window; a thread that is stopped ends at its next entry or piece.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sealci_guest::wire::{PUT_WINDOW_BYTES, Put, Take, WireError};

use crate::pack::{self, Packed};
use crate::places::Places;
use crate::unpack::{self, Unpacked};

/// How often a sign of life is given at most, while nothing else is said.
const SIGN_INTERVAL: Duration = Duration::from_secs(5);
/// So much room is told of at once.
const ROOM_STEP_BYTES: usize = PUT_WINDOW_BYTES / 4;

/// What a thread shows of its work, and hears of it.
#[derive(Debug, Default)]
pub struct Progress {
    steps: AtomicU64,
    stop: AtomicBool,
}

impl Progress {
    /// One more entry, or piece of one. An error: it is to stop.
    pub fn step(&self) -> Result<(), String> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        if self.stop.load(Ordering::Relaxed) { Err("it was stopped".to_owned()) } else { Ok(()) }
    }
}

/// What is under way.
pub struct Carrier {
    pub id: u32,
    pub stream: UnixStream,
    pub work: Work,
    progress: Arc<Progress>,
    steps_told: u64,
    sign_at: Instant,
}

pub enum Work {
    In(Incoming),
    Out(JoinHandle<Result<Packed, String>>),
}

/// What comes in.
pub struct Incoming {
    thread: JoinHandle<Result<Unpacked, String>>,
    /// Received and not yet passed on: `start..`.
    waiting: Vec<u8>,
    start: usize,
    is_whole: bool,
    /// Passed on, and not yet told to the host as room.
    freed_bytes: usize,
}

impl Carrier {
    pub fn put(put: Put, places: Places) -> Result<Self, String> {
        let root = places.resolve(&put.root);
        let (stream, theirs, progress) = open()?;
        let of_thread = Arc::clone(&progress);
        let thread = spawn(move || unpack::unpack(theirs, &root, &of_thread))?;
        let incoming = Incoming { thread, waiting: Vec::new(), start: 0, is_whole: false, freed_bytes: 0 };
        Ok(Self::new(put.id, stream, Work::In(incoming), progress))
    }

    pub fn take(take: Take, places: Places) -> Result<Self, String> {
        let (stream, theirs, progress) = open()?;
        let (id, of_thread) = (take.id, Arc::clone(&progress));
        let thread = spawn(move || pack::pack(&take, &places, theirs, &of_thread))?;
        Ok(Self::new(id, stream, Work::Out(thread), progress))
    }

    fn new(id: u32, stream: UnixStream, work: Work, progress: Arc<Progress>) -> Self {
        Self { id, stream, work, progress, steps_told: 0, sign_at: Instant::now() + SIGN_INTERVAL }
    }

    /// Whether there is something to write to the socket.
    pub fn has_waiting(&self) -> bool {
        matches!(&self.work, Work::In(incoming) if incoming.start < incoming.waiting.len())
    }

    /// Takes a piece of the archive from the host.
    pub fn receive(&mut self, piece: &[u8]) -> Result<(), WireError> {
        let Work::In(incoming) = &mut self.work else { return Err(WireError::Invalid("kind")) };
        let unsaid = incoming.waiting.len() - incoming.start + incoming.freed_bytes;
        if unsaid + piece.len() > PUT_WINDOW_BYTES {
            return Err(WireError::TooLong { bytes: unsaid + piece.len(), limit: PUT_WINDOW_BYTES });
        }
        incoming.waiting.extend_from_slice(piece);
        self.pass_on();
        Ok(())
    }

    /// The host has sent everything.
    pub fn end(&mut self) -> Result<(), WireError> {
        let Work::In(incoming) = &mut self.work else { return Err(WireError::Invalid("kind")) };
        incoming.is_whole = true;
        self.pass_on();
        Ok(())
    }

    /// Ends the thread, whatever it has come to.
    pub fn stop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
        // An error means that the thread is gone already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Moves what the socket takes without waiting.
    pub fn pass_on(&mut self) {
        let Work::In(incoming) = &mut self.work else { return };
        while incoming.start < incoming.waiting.len() {
            match self.stream.write(&incoming.waiting[incoming.start..]) {
                Ok(count) => incoming.freed(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return incoming.compact(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The thread has given up; its result says why.
                Err(_) => incoming.freed(incoming.waiting.len() - incoming.start),
            }
        }
        incoming.waiting.clear();
        incoming.start = 0;
        if incoming.is_whole {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// How much room the host is to be told of now.
    pub fn room(&mut self) -> Option<u32> {
        let Work::In(incoming) = &mut self.work else { return None };
        (incoming.freed_bytes >= ROOM_STEP_BYTES).then(|| {
            self.sign_at = Instant::now() + SIGN_INTERVAL;
            u32::try_from(std::mem::take(&mut incoming.freed_bytes)).unwrap_or(0)
        })
    }

    /// When a sign of life may be due.
    pub fn sign_at(&self) -> Instant {
        self.sign_at
    }

    /// Whether the thread has moved since the last sign, and it is time for the next.
    pub fn must_sign(&mut self, now: Instant) -> bool {
        if now < self.sign_at {
            return false;
        }
        self.sign_at = now + SIGN_INTERVAL;
        let steps = self.progress.steps.load(Ordering::Relaxed);
        std::mem::replace(&mut self.steps_told, steps) != steps
    }

    /// Whether the thread of a `Put` has closed its end.
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0; 16]) {
            Ok(count) => count == 0,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }
}

impl Incoming {
    fn freed(&mut self, count: usize) {
        self.start += count;
        self.freed_bytes += count;
    }

    fn compact(&mut self) {
        if self.start >= PUT_WINDOW_BYTES {
            self.waiting.drain(..self.start);
            self.start = 0;
        }
    }

    /// What came of it, once the socket is closed.
    pub fn result(self) -> Result<Unpacked, String> {
        joined(self.thread)
    }
}

/// What came of a thread that has closed its socket, and so waits for nothing.
pub fn joined<T>(thread: JoinHandle<Result<T, String>>) -> Result<T, String> {
    thread.join().unwrap_or_else(|_| Err("it broke off".to_owned()))
}

fn open() -> Result<(UnixStream, UnixStream, Arc<Progress>), String> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| format!("cannot make a socket pair: {error}"))?;
    ours.set_nonblocking(true).map_err(|error| format!("cannot set up a socket: {error}"))?;
    Ok((ours, theirs, Arc::default()))
}

fn spawn<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<JoinHandle<Result<T, String>>, String> {
    std::thread::Builder::new().spawn(work).map_err(|error| format!("cannot start a thread: {error}"))
}
