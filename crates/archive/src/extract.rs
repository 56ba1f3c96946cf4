//! Takes one file's contents out of its frame, piece by piece.

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use crate::{Entry, MAX_WINDOW_LOG};

/// How far an extraction came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many bytes of the file were written.
    Wrote(usize),
    /// The next bytes of the frame are needed.
    NeedsInput,
    /// The file is whole.
    Done,
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    #[error("the archive is damaged")]
    Damaged(#[source] std::io::Error),
    #[error("the archive ends before the file does")]
    TooShort,
}

/// Reads one file out of the bytes of its frame. It never gives more than the index says the file has.
pub struct Extractor {
    decoder: Decoder<'static>,
    skip: u64,
    left: u64,
    input: Vec<u8>,
    used: usize,
    scratch: Vec<u8>,
    frame_ended: bool,
}

impl std::fmt::Debug for Extractor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Extractor").field("left", &self.left).finish_non_exhaustive()
    }
}

const SCRATCH_BYTES: usize = 64 << 10;

impl Extractor {
    pub fn new(entry: &Entry) -> Result<Self, ExtractError> {
        let mut decoder = Decoder::new().map_err(ExtractError::Damaged)?;
        let window = DParameter::WindowLogMax(MAX_WINDOW_LOG);
        decoder.set_parameter(window).map_err(ExtractError::Damaged)?;
        let (skip, left) = (entry.skip_bytes, entry.size_bytes);
        let (input, scratch) = (Vec::new(), vec![0; SCRATCH_BYTES]);
        Ok(Self { decoder, skip, left, input, used: 0, scratch, frame_ended: false })
    }

    /// Takes the frame's next bytes; only after [`Progress::NeedsInput`].
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.drain(..self.used);
        self.used = 0;
        self.input.extend_from_slice(bytes);
    }

    /// Says that the frame's bytes have ended: what is missing now never comes.
    pub fn input_ended(&self) -> Result<(), ExtractError> {
        if self.left == 0 { Ok(()) } else { Err(ExtractError::TooShort) }
    }

    /// Writes the file's next bytes to the front of `out`.
    pub fn read(&mut self, out: &mut [u8]) -> Result<Progress, ExtractError> {
        loop {
            if self.left == 0 {
                return Ok(Progress::Done);
            }
            if self.frame_ended {
                return Err(ExtractError::TooShort);
            }
            let is_skipping = self.skip > 0;
            let room = if is_skipping { self.skip } else { self.left };
            let target = if is_skipping { &mut self.scratch[..] } else { &mut *out };
            let room = target.len().min(usize::try_from(room).unwrap_or(usize::MAX));
            let mut input = InBuffer { src: &self.input, pos: self.used };
            let mut output = OutBuffer::around(&mut target[..room]);
            let hint = self.decoder.run(&mut input, &mut output).map_err(ExtractError::Damaged)?;
            let written = output.pos();
            let took = input.pos - self.used;
            self.used = input.pos;
            self.frame_ended = hint == 0;
            if is_skipping {
                self.skip -= written as u64;
            } else if written > 0 {
                self.left -= written as u64;
                return Ok(Progress::Wrote(written));
            }
            if written == 0 && took == 0 {
                return Ok(Progress::NeedsInput);
            }
        }
    }
}
