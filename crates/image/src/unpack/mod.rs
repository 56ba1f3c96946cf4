//! Unpacks one layer into a folder of its own, whatever the layer holds.
//!
//! ```text
//! blob → hash (blob's digest) → gzip | zstd | tar → meter: hash (diff id), bounds → tar entries → tree
//! ```
//!
//! What holds, however hostile the layer:
//! - Nothing outside the folder is read, written, linked to or changed: each path is resolved by the kernel with the folder as its
//!   root (openat2(2), `RESOLVE_IN_ROOT`), its last part is never followed, and no mount is crossed.
//! - Memory, bytes on disk, entries, depth and lengths of names are bounded.
//! - `Ok` comes only after the whole blob was read and both digests were right.
//!
//! Decided: device nodes are left out, with a note. setuid and setgid bits stay, for images mean them and containers show them;
//! they give nothing, as layers lie below a folder of mode 0700 and are mounted `nosuid`. Of extended attributes `user.*` stays
//! (not `user.overlay.*`, which would be orders to overlayfs): file capabilities and labels would be the host's business. As
//! root, owners are the layer's, and ids above 65535 become 65534 (nobody), with a note, for no user namespace of ours maps
//! them. Without root, or as root of a namespace with fewer ids, everything is the user's, and folders keep `u+rwx`, so that they can be removed again.

mod compress;
mod names;
mod tape;
mod tree;

use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use compress::Meter;

use crate::digest::Digest;
use tape::{Kind, Tape};
use tree::Tree;

/// What one layer may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Of the unpacked archive, and of the files it makes.
    pub layer_bytes: u64,
    pub entries: u64,
    /// Folders within one another.
    pub depth: usize,
    /// How often a layer may hold what its blob holds.
    pub ratio: u64,
    /// Below this a layer may be all zeros.
    pub ratio_from_bytes: u64,
}

impl Default for UnpackLimits {
    fn default() -> Self {
        Self { layer_bytes: 20 << 30, entries: 2_000_000, depth: 200, ratio: 2000, ratio_from_bytes: 1 << 30 }
    }
}

/// Why a layer was not unpacked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UnpackError {
    #[error("{0}")]
    Malformed(String),
    #[error("entry `{entry}`: {why}")]
    Refused { entry: String, why: &'static str },
    #[error("{what}; the bound is {bound}")]
    TooLarge { what: &'static str, bound: u64 },
    #[error("it has the digest {found}, and should have {expected}")]
    WrongDigest { expected: Digest, found: Digest },
    #[error("unpacked it has the digest {found}; the image's configuration says {expected}")]
    WrongDiffId { expected: Digest, found: Digest },
    #[error("entry `{entry}` cannot be written")]
    Write {
        entry: String,
        #[source]
        source: Arc<io::Error>,
    },
    #[error("it cannot be read")]
    Read(#[source] Arc<io::Error>),
    #[error("nobody waits for it any more")]
    Cancelled,
}

impl UnpackError {
    pub(crate) fn malformed(why: impl Into<String>) -> Self {
        Self::Malformed(why.into())
    }
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unpacked {
    pub diff_id: Digest,
    /// Of the archive within the blob.
    pub archive_bytes: u64,
    /// What it takes on disk, about.
    pub disk_bytes: u64,
    pub entries: u64,
    /// What a user should know: what was left out.
    pub notes: Vec<String>,
}

/// What is expected of the layer that is unpacked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expected {
    /// Of the blob; none where it was checked already.
    pub digest: Option<Digest>,
    /// Of the archive within.
    pub diff_id: Option<Digest>,
}

/// Unpacks a blob into a folder that is empty. Blocks; `cancelled` is looked at every few hundred kilobytes.
pub(crate) fn unpack(
    blob: impl Read,
    expected: &Expected,
    into: &Path,
    limits: &UnpackLimits,
    cancelled: &AtomicBool,
) -> Result<Unpacked, UnpackError> {
    let read = |error| UnpackError::Read(Arc::new(error));
    let hashed = compress::Counted::new(blob, expected.digest.is_some());
    let read_bytes = hashed.counter();
    let decoder = compress::decoder(hashed).map_err(read)?;
    let meter = Meter::new(decoder, read_bytes, limits, cancelled);
    let mut tape = Tape::new(BufReader::with_capacity(128 << 10, meter));
    let result = entries(&mut tape, into, limits);
    let (mut reader, tree) = match (result, tape.into_inner()) {
        (Ok(tree), reader) => (reader, tree),
        (Err(error), reader) => return Err(reader.into_inner().verdict().unwrap_or(error)),
    };
    // What follows the archive's end belongs to its digest.
    let rest = io::copy(&mut reader, &mut io::sink());
    let mut meter = reader.into_inner();
    if let Some(verdict) = meter.verdict() {
        return Err(verdict);
    }
    rest.map_err(read)?;
    let (decoder, diff_id, archive_bytes) = meter.finish();
    let mut blob = decoder.into_inner();
    io::copy(&mut blob, &mut io::sink()).map_err(read)?;
    if let (Some(expected), Some(found)) = (&expected.digest, blob.finish())
        && *expected != found
    {
        return Err(UnpackError::WrongDigest { expected: expected.clone(), found });
    }
    if let Some(expected) = &expected.diff_id
        && *expected != diff_id
    {
        return Err(UnpackError::WrongDiffId { expected: expected.clone(), found: diff_id });
    }
    let Tree { disk_bytes, count, .. } = &tree;
    let (disk_bytes, entries) = (*disk_bytes, *count);
    Ok(Unpacked { diff_id, archive_bytes, disk_bytes, entries, notes: tree.finish()? })
}

fn entries<R: Read>(
    tape: &mut Tape<BufReader<R>>,
    into: &Path,
    limits: &UnpackLimits,
) -> Result<Tree, UnpackError> {
    let mut tree = Tree::open(into, *limits)?;
    while let Some(entry) = tape.next_entry()? {
        tree.put(&entry, tape)?;
    }
    Ok(tree)
}

/// What an archive that is only looked through holds.
pub(crate) enum ArchiveEntry<'a> {
    File { path: &'a [u8], offset: u64, bytes: u64 },
    Symlink { path: &'a [u8], target: &'a [u8] },
}

/// Looks through an archive that is not packed, without unpacking it.
pub(crate) fn walk(
    source: impl Read,
    mut seen: impl FnMut(ArchiveEntry<'_>) -> Result<(), UnpackError>,
) -> Result<(), UnpackError> {
    let counted = compress::Counted::new(source, false);
    let offset = counted.counter();
    let mut tape = Tape::new(counted);
    while let Some(entry) = tape.next_entry()? {
        let path = entry.path.strip_prefix(b"./").unwrap_or(&entry.path);
        match entry.kind {
            Kind::File if entry.pieces.is_none() => {
                seen(ArchiveEntry::File { path, offset: offset.get(), bytes: entry.size })?;
            }
            Kind::Symlink => seen(ArchiveEntry::Symlink { path, target: &entry.link })?,
            _ => {}
        }
    }
    Ok(())
}

/// An entry's name for people: no control characters, not too long.
pub(crate) fn shown(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    let mut shown: String =
        text.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(200).is_some() {
        shown.push('…');
    }
    shown
}

/// Whether the one who waits has gone.
pub(crate) fn is_cancelled(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
