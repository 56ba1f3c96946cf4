//! Keeps an attempt's log until it is acknowledged: what its action wrote, in segments on disk, the newest of it in
//! memory as well.
//!
//! ```text
//!    acked            written                end
//!      │  segments …     │  gap that may grow  │
//!   ───┴─────────────────┴─────────────────────┴──▶ offset
//!      └── may be sent ──┘
//! ```
//!
//! - What is appended is on disk before it may be sent: a crash of the process loses nothing. Nothing is synced, so a
//!   crash of the machine may lose the attempt, which is then run again.
//! - Offsets have no hole: what is not kept, because the spool or the log's quota is full, is one gap that grows until
//!   something is kept again. Only then may it be sent.
//! - There is one writer, the attempt's task; one reader, the session; both may be at work at the same time.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use super::failpoint;
use super::room::Room;
use super::segment::{
    self, FRAME_OVERHEAD_BYTES, Found, MAX_PIECE_BYTES, Piece, SegmentReader, SegmentWriter,
};

/// Why a gap is there, as people read it.
pub const SPOOL_FULL: &str = "spool full";
pub const QUOTA_REACHED: &str = "log quota reached";
pub const SPOOL_DAMAGED: &str = "the agent's spool could not be read";
pub const SPOOL_LOST: &str = "lost by the agent";

/// Below this size a segment is not worth replacing, even if all of it is acknowledged.
const SMALL_SEGMENT_BYTES: u64 = 64 << 10;
/// Outputs smaller than this are copied into the window, so that they do not keep a large buffer alive.
const SMALL_OUTPUT_BYTES: usize = 16 << 10;
/// What an entry of the window costs besides its bytes.
const WINDOW_ENTRY_BYTES: u64 = 64;

/// The bounds that all logs of a spool share.
#[derive(Debug)]
pub struct Bounds {
    /// Bytes on disk.
    pub disk: Room,
    /// Bytes in memory that are on disk as well and wait to be sent.
    pub window: Room,
    pub segment_bytes: u64,
}

/// One attempt's log.
#[derive(Debug)]
pub struct Log {
    folder: PathBuf,
    bounds: Arc<Bounds>,
    quota_bytes: u64,
    writer: Mutex<Option<SegmentWriter>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    segments: VecDeque<Segment>,
    acked: u64,
    /// Everything below is on disk as it will stay.
    written: u64,
    /// As long is the log, an open gap included.
    end: u64,
    gap: Option<OpenGap>,
    /// Nothing is appended any more: the open gap, if there is one, grows no further.
    sealed: bool,
    window: VecDeque<(u64, Bytes)>,
}

#[derive(Debug)]
struct OpenGap {
    from: u64,
    reason: &'static str,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    base: u64,
    /// The file's bytes that will not change any more.
    file_bytes: u64,
}

/// Where a reader stands; kept between reads to go on without seeking.
#[derive(Debug, Default)]
pub struct ReadPlace(Option<SegmentReader>);

impl Log {
    pub fn create(folder: PathBuf, bounds: Arc<Bounds>, quota_bytes: u64) -> Self {
        Self { folder, bounds, quota_bytes, writer: Mutex::default(), state: Mutex::default() }
    }

    /// Finds out what a former process left. A log that is recovered is not appended to any more.
    pub fn recover(folder: PathBuf, bounds: Arc<Bounds>) -> io::Result<Self> {
        let mut bases = Vec::new();
        for entry in std::fs::read_dir(&folder)? {
            bases.extend(entry?.file_name().to_str().and_then(segment::base_of));
        }
        bases.sort_unstable();
        let mut state = State { sealed: true, ..State::default() };
        for base in &bases {
            let file_bytes = std::fs::metadata(segment::path(&folder, *base))?.len();
            state.segments.push_back(Segment { base: *base, file_bytes });
        }
        if let Some(last) = state.segments.back_mut() {
            let (writer, end) = SegmentWriter::recover(&folder, last.base)?;
            last.file_bytes = writer.file_bytes;
            (state.written, state.end) = (end, end);
        }
        state.acked = bases.first().copied().unwrap_or(0);
        bounds.disk.take(state.segments.iter().map(|segment| segment.file_bytes).sum());
        Ok(Self { folder, bounds, quota_bytes: 0, writer: Mutex::default(), state: Mutex::new(state) })
    }

    /// How long the log is.
    pub fn end(&self) -> u64 {
        self.state().end
    }

    /// Up to where the log may be sent.
    pub fn sendable_end(&self) -> u64 {
        let state = self.state();
        if state.sealed { state.end } else { state.written }
    }

    pub fn acked(&self) -> u64 {
        self.state().acked
    }

    /// Appends output. Blocks on the disk. What cannot be kept becomes a gap; that is not an error, the action goes on.
    pub fn append(&self, mut output: Bytes) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        while !output.is_empty() {
            let end = self.state().end;
            let in_quota = self.quota_bytes.saturating_sub(end);
            if in_quota == 0 {
                self.cut(&mut writer, output.len() as u64, QUOTA_REACHED);
                return;
            }
            let length = output.len().min(MAX_PIECE_BYTES).min(in_quota.min(usize::MAX as u64) as usize);
            let piece = output.split_to(length);
            self.append_piece(&mut writer, piece);
        }
    }

    fn append_piece(&self, writer: &mut Option<SegmentWriter>, piece: Bytes) {
        let frame_bytes = piece.len() as u64 + FRAME_OVERHEAD_BYTES;
        let length = piece.len() as u64;
        if self.state().gap.is_some() && !(self.has_room_again() && self.close_gap(writer)) {
            return self.cut(writer, length, SPOOL_FULL);
        }
        if !self.bounds.disk.try_take(frame_bytes) {
            return self.cut(writer, length, SPOOL_FULL);
        }
        match self.write(writer, &piece) {
            Ok(()) => self.keep(piece, frame_bytes),
            Err(error) => {
                self.bounds.disk.give_back(frame_bytes);
                tracing::warn!(folder = %self.folder.display(), %error, "cannot write to the spool; the log is cut");
                self.cut(writer, length, SPOOL_FULL);
            }
        }
    }

    /// A little room is not enough to go on after a gap: the log would be bytes and gaps by turns.
    fn has_room_again(&self) -> bool {
        let disk = &self.bounds.disk;
        disk.free_bytes() >= (disk.limit_bytes() / 8).min(2 * self.bounds.segment_bytes)
    }

    fn write(&self, writer: &mut Option<SegmentWriter>, piece: &Bytes) -> io::Result<()> {
        let offset = self.state().end;
        failpoint::reached(&self.folder);
        self.segment(writer)?.append(offset, piece)?;
        failpoint::reached(&self.folder);
        Ok(())
    }

    /// The segment to write to: a new one where there is none, or the last is full or done with.
    fn segment<'a>(&self, writer: &'a mut Option<SegmentWriter>) -> io::Result<&'a mut SegmentWriter> {
        let (end, acked) = {
            let state = self.state();
            (state.end, state.acked)
        };
        let full = writer.as_ref().is_some_and(|segment| {
            segment.file_bytes >= self.bounds.segment_bytes
                || (acked == end && segment.file_bytes >= SMALL_SEGMENT_BYTES)
        });
        if full {
            *writer = None;
        }
        if writer.is_none() {
            let segment = SegmentWriter::create(&self.folder, end)?;
            failpoint::reached(&self.folder);
            self.state().segments.push_back(Segment { base: end, file_bytes: 0 });
            *writer = Some(segment);
        }
        writer.as_mut().ok_or_else(|| io::Error::other("no segment"))
    }

    /// Notes that a piece is on disk; keeps it in memory too, while there is room.
    fn keep(&self, piece: Bytes, frame_bytes: u64) {
        let mut state = self.state();
        let offset = state.end;
        state.end += piece.len() as u64;
        state.written = state.end;
        if let Some(segment) = state.segments.back_mut() {
            segment.file_bytes += frame_bytes;
        }
        if self.bounds.window.try_take(piece.len() as u64 + WINDOW_ENTRY_BYTES) {
            let piece = if piece.len() < SMALL_OUTPUT_BYTES { Bytes::copy_from_slice(&piece) } else { piece };
            state.window.push_back((offset, piece));
        }
    }

    /// Lets `length` bytes go: opens a gap, or makes the open one longer. A gap is on disk as soon as it is there, so
    /// that it survives a crash; where even that cannot be written, it is in memory alone.
    fn cut(&self, writer: &mut Option<SegmentWriter>, length: u64, reason: &'static str) {
        let (from, to, reason) = {
            let mut state = self.state();
            let from = state.end;
            let gap = state.gap.get_or_insert(OpenGap { from, reason });
            let (from, reason) = (gap.from, gap.reason);
            state.end += length;
            (from, state.end, reason)
        };
        if let Err(error) = self.write_gap(writer, from, to, reason) {
            tracing::debug!(folder = %self.folder.display(), %error, "a gap is kept in memory only");
        }
    }

    fn write_gap(
        &self,
        writer: &mut Option<SegmentWriter>,
        from: u64,
        to: u64,
        reason: &str,
    ) -> io::Result<()> {
        if writer.is_none() {
            let segment = SegmentWriter::create(&self.folder, from)?;
            self.state().segments.push_back(Segment { base: from, file_bytes: 0 });
            *writer = Some(segment);
        }
        failpoint::reached(&self.folder);
        if let Some(segment) = writer {
            segment.append_gap(from, to, reason)?;
        }
        failpoint::reached(&self.folder);
        Ok(())
    }

    /// Ends the open gap, if it can be written; from then on it may be sent.
    fn close_gap(&self, writer: &mut Option<SegmentWriter>) -> bool {
        let Some((from, to, reason)) = ({
            let state = self.state();
            state.gap.as_ref().map(|gap| (gap.from, state.end, gap.reason))
        }) else {
            return true;
        };
        if self.write_gap(writer, from, to, reason).is_err() {
            return false;
        }
        let mut state = self.state();
        state.gap = None;
        state.written = to;
        if let (Some(segment), Some(writer)) = (state.segments.back_mut(), writer.as_ref()) {
            let grown = writer.file_bytes - segment.file_bytes;
            segment.file_bytes = writer.file_bytes;
            // A gap takes a few bytes past the bound rather than hide.
            self.bounds.disk.take(grown);
        }
        true
    }

    /// Says that nothing more comes. What then follows is only what a terminal event told to be longer.
    pub fn seal(&self) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.close_gap(&mut writer);
        *writer = None;
        self.state().sealed = true;
    }

    /// Makes the log at least so long: the bytes that a former process told of and did not leave are a gap.
    pub fn lengthen(&self, length: u64) {
        let mut state = self.state();
        if state.end < length {
            let from = state.end;
            state.gap.get_or_insert(OpenGap { from, reason: SPOOL_LOST });
            state.end = length;
        }
    }

    /// Reads what comes at `offset` from memory, if it is there. Small outputs become one piece of up to `max_bytes`.
    pub fn read_window(&self, offset: u64, max_bytes: usize) -> Option<Piece> {
        let mut state = self.state();
        self.drop_window_below(&mut state, offset);
        let (from, first) = state.window.front()?;
        if *from > offset {
            return None;
        }
        let first = first.slice((offset - from) as usize..);
        if first.len() >= max_bytes {
            return Some(Piece::Data { offset, bytes: first.slice(..max_bytes) });
        }
        let mut to = offset + first.len() as u64;
        let mut parts = vec![first];
        for (from, bytes) in state.window.iter().skip(1) {
            let length = parts.iter().map(Bytes::len).sum::<usize>();
            if *from != to || length + bytes.len() > max_bytes.min(SMALL_OUTPUT_BYTES * 4) {
                break;
            }
            to += bytes.len() as u64;
            parts.push(bytes.clone());
        }
        drop(state);
        let bytes = match parts.len() {
            1 => parts.swap_remove(0),
            _ => parts.into_iter().flatten().collect::<BytesMut>().freeze(),
        };
        Some(Piece::Data { offset, bytes })
    }

    fn drop_window_below(&self, state: &mut State, offset: u64) {
        while let Some((from, bytes)) = state.window.front()
            && from + bytes.len() as u64 <= offset
        {
            self.bounds.window.give_back(bytes.len() as u64 + WINDOW_ENTRY_BYTES);
            state.window.pop_front();
        }
    }

    /// Reads what comes at `offset` from disk. Blocks. None: nothing may be sent from there yet.
    pub fn read_disk(&self, place: &mut ReadPlace, offset: u64, max_bytes: usize) -> Option<Piece> {
        let (segment, segment_end) = {
            let state = self.state();
            let sendable = if state.sealed { state.end } else { state.written };
            if offset >= sendable {
                return None;
            }
            if let Some(gap) = state.gap.as_ref().filter(|gap| offset >= gap.from) {
                return Some(Piece::Gap { from: offset, to: state.end, reason: gap.reason.to_owned() });
            }
            let index = state.segments.partition_point(|segment| segment.base <= offset);
            let next = state.segments.get(index).map_or(state.written, |segment| segment.base);
            match index.checked_sub(1).and_then(|index| state.segments.get(index)) {
                Some(segment) => (*segment, next),
                None => return Some(damaged(offset, next)),
            }
        };
        let found = read_segment(&self.folder, place, segment, offset, max_bytes);
        match found {
            // A damaged segment may reach into its successor, or past the log's end.
            Ok(Found::Piece(piece)) => Some(piece.up_to(segment_end)),
            Ok(Found::End | Found::Damaged) => Some(damaged(offset, segment_end)),
            Err(error) => {
                tracing::error!(folder = %self.folder.display(), %error, log.offset = offset, "cannot read the spool");
                Some(damaged(offset, segment_end))
            }
        }
    }

    /// Takes note that everything below `offset` is recorded. Returns the files that are not needed any more.
    #[must_use = "the files are to be removed"]
    pub fn acknowledge(&self, offset: u64) -> Vec<PathBuf> {
        let mut state = self.state();
        state.acked = state.acked.max(offset.min(state.end));
        let acked = state.acked;
        self.drop_window_below(&mut state, acked);
        let mut done = Vec::new();
        // The last segment stays: its name says where the log is.
        while state.segments.len() > 1 && state.segments[1].base <= acked {
            if let Some(segment) = state.segments.pop_front() {
                self.bounds.disk.give_back(segment.file_bytes);
                done.push(segment::path(&self.folder, segment.base));
            }
        }
        done
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let mut state = self.state();
        self.drop_window_below(&mut state, u64::MAX);
        self.bounds.disk.give_back(state.segments.iter().map(|segment| segment.file_bytes).sum());
    }
}

fn damaged(from: u64, to: u64) -> Piece {
    Piece::Gap { from, to, reason: SPOOL_DAMAGED.to_owned() }
}

fn read_segment(
    folder: &std::path::Path,
    place: &mut ReadPlace,
    segment: Segment,
    offset: u64,
    max_bytes: usize,
) -> io::Result<Found> {
    let mut reader = match place.0.take() {
        Some(reader) if reader.base == segment.base && reader.reaches(offset) => reader,
        _ => SegmentReader::open(folder, segment.base)?,
    };
    let found = reader.read(offset, segment.file_bytes, max_bytes)?;
    place.0 = Some(reader);
    Ok(found)
}
