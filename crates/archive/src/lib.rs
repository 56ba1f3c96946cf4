//! Packs files so that one of them can be read without the others: a tar, compressed in pieces, with an index at its end.
//!
//! ```text
//! archive   frame* index
//! frame     one zstd frame: some whole entries of the tar, or one large one; the last one ends the tar
//! index     a zstd skippable frame: magic 0x184D2A5E, length (u32), then
//!             files     JSON, one zstd frame
//!             trailer   length of `files` (u32), its length unpacked (u32), "SEALCIX1"
//! ```
//!
//! Numbers are little-endian. Whoever knows zstd and tar only reads it all the same: `zstd -dc x.tar.zst | tar x`.
//! Small files share a frame, since one alone hardly compresses; a file of [`OWN_FRAME_BYTES`] or more begins its own. One file
//! costs a range of the archive and at most [`MAX_SKIP_BYTES`] of decompression too many.
//!
//! Invariants: memory is bounded, whatever goes in; names are relative and never lead upwards, in what is written and in
//! what is read; what an index says is checked before it is believed. Nothing here opens a file or a socket.

mod extract;
mod index;
mod name;
mod writer;

pub use extract::{ExtractError, Extractor, Progress};
pub use index::{Entry, EntryKind, Frame, Index, IndexError, Tail, read_index};
pub use name::relative_name;
pub use writer::{ArchiveError, ArchiveWriter, Summary};

/// A file so large begins a frame of its own.
pub const OWN_FRAME_BYTES: u64 = 256 << 10;

/// What stands before a file in its frame: small files, and the headers of all of them.
pub const MAX_SKIP_BYTES: u64 = 4 << 20;

/// An archive has at most so many entries.
pub const MAX_ENTRIES: usize = 200_000;

/// The index, unpacked, is at most so large.
pub const MAX_INDEX_BYTES: usize = 32 << 20;

/// Of the windows that zstd may ask for: 8 MiB. What is written here asks for less.
const MAX_WINDOW_LOG: u32 = 23;

const SKIPPABLE_MAGIC: u32 = 0x184D_2A5E;
const TRAILER_MAGIC: &[u8; 8] = b"SEALCIX1";
const TRAILER_BYTES: usize = 16;
/// Of a skippable frame: its magic and its length.
const SKIPPABLE_HEADER_BYTES: usize = 8;
