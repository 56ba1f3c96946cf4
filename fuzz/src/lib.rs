//! Holds what the fuzz targets share: how values are read out of a fuzzer's bytes, a bound on memory, a place for files, and a
//! hostile guest.

mod guest;
mod memory;
mod place;
mod tape;

pub use guest::{DATA, Guest, address};
pub use memory::within;
pub use place::{Place, become_nobody};
pub use tape::tape;

/// A fuzzer's bytes, taken as values. What is not there any more is zero, so any bytes mean something.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// Small numbers are one byte; the others are there, too.
    pub fn number(&mut self) -> u64 {
        let take =
            |input: &mut Self, bytes: u32| (0..bytes).fold(0, |sum, _| sum << 8 | u64::from(input.byte()));
        match self.byte() {
            255 => u64::MAX - u64::from(self.byte()),
            254 => take(self, 8),
            253 => take(self, 4),
            252 => take(self, 2),
            small => u64::from(small),
        }
    }

    /// Up to 251 bytes, or many.
    pub fn piece(&mut self) -> &'a [u8] {
        let length = usize::try_from(self.number()).unwrap_or(usize::MAX).min(self.0.len());
        let (piece, rest) = self.0.split_at(length);
        self.0 = rest;
        piece
    }

    /// One of these.
    pub fn choice<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::from(self.byte()) % of.len()]
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}
