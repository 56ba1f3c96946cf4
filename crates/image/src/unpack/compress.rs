//! Between a blob's bytes and the archive within: decompression, chosen by the first bytes (media types are wrong at times),
//! and the meter that bounds and hashes what comes out.

use std::cell::Cell;
use std::io::{self, BufReader, Read};
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use flate2::bufread::MultiGzDecoder;

use super::{UnpackError, UnpackLimits, is_cancelled};
use crate::digest::{Digest, Hasher};

/// Memory that a zstd frame may ask for: 32 MiB, which all levels but the two `--ultra` ones above 20 keep to.
const ZSTD_WINDOW_LOG: u32 = 25;

/// Counts, and hashes where asked, the blob's own bytes.
pub(super) struct Counted<R> {
    inner: R,
    hasher: Option<Hasher>,
    bytes: Rc<Cell<u64>>,
}

impl<R: Read> Counted<R> {
    pub fn new(inner: R, hash: bool) -> Self {
        Self { inner, hasher: hash.then(Hasher::new), bytes: Rc::default() }
    }

    pub fn counter(&self) -> Rc<Cell<u64>> {
        self.bytes.clone()
    }

    pub fn finish(self) -> Option<Digest> {
        self.hasher.map(Hasher::finish)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        self.bytes.set(self.bytes.get() + count as u64);
        Ok(count)
    }
}

/// Bytes looked at already, then the rest.
type Rewound<R> = io::Chain<io::Cursor<Vec<u8>>, Counted<R>>;

pub(super) enum Decoder<R: Read> {
    Plain(Rewound<R>),
    Gzip(Box<MultiGzDecoder<BufReader<Rewound<R>>>>),
    Zstd(zstd::stream::read::Decoder<'static, BufReader<Rewound<R>>>),
}

/// Looks at the first bytes.
pub(super) fn decoder<R: Read>(mut blob: Counted<R>) -> io::Result<Decoder<R>> {
    let mut first = Vec::with_capacity(6);
    blob.by_ref().take(6).read_to_end(&mut first)?;
    let magic: [u8; 6] = std::array::from_fn(|index| first.get(index).copied().unwrap_or_default());
    let unsupported = |what| Err(io::Error::new(io::ErrorKind::Unsupported, what));
    let rewound = |blob| io::Cursor::new(first).chain(blob);
    let buffered = |blob| BufReader::with_capacity(128 << 10, blob);
    match magic {
        [0x1f, 0x8b, ..] => Ok(Decoder::Gzip(Box::new(MultiGzDecoder::new(buffered(rewound(blob)))))),
        // A frame, or one to be skipped before it (RFC 8878).
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered(rewound(blob)))?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Ok(Decoder::Zstd(decoder))
        }
        [0xfd, b'7', b'z', b'X', b'Z', ..] => unsupported("layers packed with xz are not supported"),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => unsupported("layers packed with bzip2 are not supported"),
        _ => Ok(Decoder::Plain(rewound(blob))),
    }
}

impl<R: Read> Decoder<R> {
    pub fn into_inner(self) -> Counted<R> {
        match self {
            Self::Plain(inner) => inner.into_inner().1,
            Self::Gzip(inner) => inner.into_inner().into_inner().into_inner().1,
            Self::Zstd(inner) => inner.finish().into_inner().into_inner().1,
        }
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(inner) => inner.read(buffer),
            Self::Gzip(inner) => inner.read(buffer),
            Self::Zstd(inner) => inner.read(buffer),
        }
    }
}

/// Bounds and hashes the archive within a blob. What it stopped for is in [`Meter::verdict`]: an [`io::Error`] could not say it.
pub(crate) struct Meter<'a, R> {
    inner: R,
    hasher: Hasher,
    bytes: u64,
    read_bytes: Rc<Cell<u64>>,
    limits: &'a UnpackLimits,
    cancelled: &'a AtomicBool,
    verdict: Option<UnpackError>,
}

impl<'a, R: Read> Meter<'a, R> {
    pub fn new(
        inner: R,
        read_bytes: Rc<Cell<u64>>,
        limits: &'a UnpackLimits,
        cancelled: &'a AtomicBool,
    ) -> Self {
        Self { inner, hasher: Hasher::new(), bytes: 0, read_bytes, limits, cancelled, verdict: None }
    }

    pub fn verdict(&mut self) -> Option<UnpackError> {
        self.verdict.take()
    }

    pub fn finish(self) -> (R, Digest, u64) {
        (self.inner, self.hasher.finish(), self.bytes)
    }

    fn judge(&self) -> Option<UnpackError> {
        let UnpackLimits { layer_bytes, ratio, ratio_from_bytes, .. } = *self.limits;
        if is_cancelled(self.cancelled) {
            Some(UnpackError::Cancelled)
        } else if self.bytes > layer_bytes {
            Some(UnpackError::TooLarge { what: "it unpacks to too many bytes", bound: layer_bytes })
        } else if self.bytes > ratio_from_bytes && self.bytes / ratio.max(1) > self.read_bytes.get().max(1) {
            Some(UnpackError::TooLarge { what: "it unpacks to too many times its size", bound: ratio })
        } else {
            None
        }
    }
}

impl<R: Read> Read for Meter<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // In portions, so that the bounds are looked at even when a large file is read at once.
        let end = buffer.len().min(1 << 20);
        let count = self.inner.read(&mut buffer[..end])?;
        self.hasher.update(&buffer[..count]);
        self.bytes += count as u64;
        match self.judge() {
            None => Ok(count),
            Some(verdict) => {
                self.verdict = Some(verdict);
                Err(io::Error::other("stopped"))
            }
        }
    }
}
