//! Reads tar archives entry by entry: ustar, GNU and pax (POSIX.1-2017, pax; GNU tar manual, "Basic Tar Format").
//!
//! The crate `tar` reads the header blocks; the walk over them is ours, because what stands before an entry (long names, pax
//! records) has to be bounded in memory, and because a size must mean the same to us as to the tools that made the layer: a
//! pax `size` wins over the header's, and entries that are only a header (links, folders, devices) have no data (as in Go's
//! archive/tar).

use std::io::Read;
use std::sync::Arc;

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::UnpackError;

const BLOCK: usize = 512;

/// Of a long name or of all pax records before one entry.
const EXTENSION_BYTES: u64 = 1 << 20;

/// Pieces of a sparse file.
const SPARSE_PIECES: usize = 100_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    Folder,
    Fifo,
    Device,
}

#[derive(Debug)]
pub(super) struct Entry {
    /// As written; not checked.
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Of the file; for a sparse one with its holes.
    pub size: u64,
    /// Where the data lies in the file: (offset, length); none if it is all of it.
    pub pieces: Option<Vec<(u64, u64)>>,
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What precedes an entry and changes it.
#[derive(Debug, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// Together, of those since the last entry.
    bytes: u64,
}

pub(super) struct Tape<R> {
    source: R,
    /// Of the entry read last.
    data_left: u64,
    padding: u64,
}

impl<R: Read> Tape<R> {
    pub fn new(source: R) -> Self {
        Self { source, data_left: 0, padding: 0 }
    }

    pub fn into_inner(self) -> R {
        self.source
    }

    /// Skips what was not read of the last one. None at the archive's end.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, UnpackError> {
        let mut extensions = Extensions::default();
        loop {
            self.skip_data()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let flag = header.as_old().linkflag[0];
            let size = header.entry_size().map_err(|_| UnpackError::malformed("a size is no number"))?;
            match flag {
                b'x' => {
                    let records = self.extension(size, &mut extensions)?;
                    extensions.read_pax(&records)?;
                }
                // Defaults for all that follows; nothing in images uses them but a comment.
                b'g' => drop(self.extension(size, &mut extensions)?),
                b'L' => extensions.path = Some(until_nul(self.extension(size, &mut extensions)?)),
                b'K' => extensions.link = Some(until_nul(self.extension(size, &mut extensions)?)),
                _ => return self.entry(&header, flag, size, extensions).map(Some),
            }
        }
    }

    /// Of the data that is left of the entry read last.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        let most = usize::try_from(self.data_left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(ends_early());
        }
        self.data_left -= count as u64;
        Ok(count)
    }

    fn entry(
        &mut self,
        header: &Header,
        flag: u8,
        size: u64,
        extensions: Extensions,
    ) -> Result<Entry, UnpackError> {
        let path = extensions.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let kind = match flag {
            // Before POSIX a folder was a file with a slash at its end.
            0 | b'0' | b'7' if path.ends_with(b"/") => Kind::Folder,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' | b'4' => Kind::Device,
            b'5' => Kind::Folder,
            b'6' => Kind::Fifo,
            _ => {
                let flag = char::from(flag).escape_default();
                return Err(UnpackError::malformed(format!("an entry is of the unknown kind `{flag}`")));
            }
        };
        let old = header.as_old();
        let number = |number: std::io::Result<u64>, field: &[u8], what: &str| match number {
            Ok(number) => Ok(number),
            // Some tools leave out what they do not know.
            Err(_) if field.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
            Err(_) => Err(UnpackError::malformed(format!("the {what} of an entry is no number"))),
        };
        let mut size = if kind == Kind::File { extensions.size.unwrap_or(size) } else { 0 };
        if size > i64::MAX as u64 {
            return Err(UnpackError::malformed("a file is larger than any file can be"));
        }
        self.data_left = size;
        self.padding = padding(size);
        let pieces = if flag == b'S' {
            let (pieces, real) = self.sparse(header)?;
            if pieces.iter().map(|piece| piece.1).sum::<u64>() != size {
                return Err(UnpackError::malformed("the pieces of a sparse file do not add up"));
            }
            size = real;
            Some(pieces)
        } else {
            None
        };
        let mtime = || {
            let seconds = number(header.mtime(), &old.mtime, "time")?;
            Ok((i64::try_from(seconds).unwrap_or_default(), 0))
        };
        Ok(Entry {
            link: extensions
                .link
                .or_else(|| header.link_name_bytes().map(|name| name.into_owned()))
                .unwrap_or_default(),
            path,
            kind,
            mode: number(header.mode().map(u64::from), &old.mode, "mode")? as u32 & 0o7777,
            uid: extensions.uid.map_or_else(|| number(header.uid(), &old.uid, "owner"), Ok)?,
            gid: extensions.gid.map_or_else(|| number(header.gid(), &old.gid, "group"), Ok)?,
            mtime: extensions.mtime.map_or_else(mtime, Ok)?,
            size,
            pieces,
            attributes: extensions.attributes,
        })
    }

    /// The pieces of an old GNU sparse file, and its whole size.
    fn sparse(&mut self, header: &Header) -> Result<(Vec<(u64, u64)>, u64), UnpackError> {
        let gnu = header.as_gnu().ok_or_else(|| UnpackError::malformed("a sparse file has no GNU header"))?;
        let bad = |_| UnpackError::malformed("a sparse file's map is no list of numbers");
        let real = gnu.real_size().map_err(bad)?;
        let mut pieces = Vec::new();
        let mut end = 0_u64;
        let mut add = |from: &[GnuSparseHeader]| -> Result<(), UnpackError> {
            for piece in from.iter().filter(|piece| !piece.is_empty()) {
                let (offset, length) = (piece.offset().map_err(bad)?, piece.length().map_err(bad)?);
                let piece_end = offset.checked_add(length).filter(|piece_end| *piece_end <= real);
                end =
                    piece_end.filter(|_| offset >= end && pieces.len() < SPARSE_PIECES).ok_or_else(|| {
                        UnpackError::malformed("a sparse file's pieces overlap or are too many")
                    })?;
                pieces.push((offset, length));
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut block = GnuExtSparseHeader::new();
            self.read_exact(block.as_mut_bytes())?;
            add(&block.sparse)?;
            more = block.is_extended();
        }
        Ok((pieces, real))
    }

    /// None at the end: two blocks of zeros, or simply nothing more.
    fn header(&mut self) -> Result<Option<Header>, UnpackError> {
        let mut header = Header::new_old();
        for _ in 0..2 {
            if !self.read_block(header.as_mut_bytes())? {
                return Ok(None);
            }
            if header.as_bytes().iter().any(|byte| *byte != 0) {
                return if is_sound(&header) {
                    Ok(Some(header))
                } else {
                    Err(UnpackError::malformed("it is no tar archive, or a header's checksum is wrong"))
                };
            }
        }
        Ok(None)
    }

    fn extension(&mut self, size: u64, extensions: &mut Extensions) -> Result<Vec<u8>, UnpackError> {
        extensions.bytes = extensions.bytes.saturating_add(size);
        if extensions.bytes > EXTENSION_BYTES {
            let what = "names and attributes of an entry take too many bytes";
            return Err(UnpackError::TooLarge { what, bound: EXTENSION_BYTES });
        }
        let mut bytes = vec![0; size as usize];
        self.read_exact(&mut bytes)?;
        self.padding = padding(size);
        Ok(bytes)
    }

    fn skip_data(&mut self) -> Result<(), UnpackError> {
        let mut left = self.data_left + self.padding;
        let mut buffer = [0; 8192];
        while left > 0 {
            let most = left.min(buffer.len() as u64) as usize;
            self.read_exact(&mut buffer[..most])?;
            left -= most as u64;
        }
        (self.data_left, self.padding) = (0, 0);
        Ok(())
    }

    /// False where nothing at all is left.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, UnpackError> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(ends_early()),
                count => filled += count,
            }
        }
        Ok(true)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), UnpackError> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read(&mut buffer[filled..])? {
                0 => return Err(ends_early()),
                count => filled += count,
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        loop {
            match self.source.read(buffer) {
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // What a decoder says of its input.
                Err(error) if matches!(error.kind(), std::io::ErrorKind::UnexpectedEof) => {
                    return Err(ends_early());
                }
                Err(error) => return Err(UnpackError::Read(Arc::new(error))),
            }
        }
    }
}

fn ends_early() -> UnpackError {
    UnpackError::malformed("it ends in the middle of an entry")
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// Whether its checksum is right; old tars summed signed bytes.
fn is_sound(header: &Header) -> bool {
    let Ok(stated) = header.cksum() else { return false };
    let (mut unsigned, mut signed) = (0_u32, 0_i64);
    for (index, byte) in header.as_bytes().iter().enumerate() {
        let byte = if (148..156).contains(&index) { b' ' } else { *byte };
        unsigned += u32::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    stated == unsigned || i64::from(stated) == signed
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

impl Extensions {
    /// `LENGTH KEYWORD=VALUE\n`, many.
    fn read_pax(&mut self, mut records: &[u8]) -> Result<(), UnpackError> {
        let bad = || UnpackError::malformed("a pax record is not `LENGTH KEYWORD=VALUE`");
        while !records.is_empty() {
            let space = records.iter().take(20).position(|byte| *byte == b' ').ok_or_else(bad)?;
            let length: usize = text(&records[..space]).and_then(|text| text.parse().ok()).ok_or_else(bad)?;
            if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
                return Err(bad());
            }
            let record = &records[space + 1..length - 1];
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
            self.set(&record[..equals], &record[equals + 1..])?;
            records = &records[length..];
        }
        Ok(())
    }

    fn set(&mut self, keyword: &[u8], value: &[u8]) -> Result<(), UnpackError> {
        let number = || {
            let number = text(value).and_then(|text| text.parse::<u64>().ok());
            number.ok_or_else(|| UnpackError::malformed("a pax record has no number where one belongs"))
        };
        match keyword {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = time(value),
            _ if keyword.starts_with(b"GNU.sparse.") => {
                return Err(UnpackError::malformed(
                    "sparse files in pax form are not supported; make the layer without `--sparse`",
                ));
            }
            _ => {
                if let Some(name) = keyword.strip_prefix(b"SCHILY.xattr.") {
                    self.attributes.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// `1700000000.123456789`, also before 1970; none if it is anything else.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (whole, fraction) = text(value)?.split_once('.').unwrap_or((text(value)?, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().take(9).collect();
    let nanos: u32 = if digits.is_empty() { 0 } else { format!("{digits:0<9}").parse().ok()? };
    Some(match (whole.starts_with('-'), nanos) {
        (true, 1..) => (seconds.checked_sub(1)?, 1_000_000_000 - nanos),
        _ => (seconds, nanos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(time(b"1700000000"), Some((1_700_000_000, 0)));
        assert_eq!(time(b"1.25"), Some((1, 250_000_000)));
        assert_eq!(time(b"-1.25"), Some((-2, 750_000_000)));
        assert_eq!(time(b"soon"), None);
        assert_eq!(time(b"-9223372036854775808.5"), None);
    }

    #[test]
    fn pax_records_are_checked() {
        let mut extensions = Extensions::default();
        extensions.read_pax(b"11 path=abc\n12 uid=70000\n").unwrap_err();
        extensions.read_pax(b"12 path=abc\n13 uid=70000\n").unwrap();
        assert_eq!((extensions.path.unwrap(), extensions.uid), (b"abc".to_vec(), Some(70_000)));
        for bad in [&b"path=x\n"[..], b"99 path=x\n", b"0 path=x\n", b"9 path=x1", b"10 uid=x12\n", b"3 =\n"]
        {
            assert!(Extensions::default().read_pax(bad).is_err(), "{bad:?}");
        }
    }

    proptest::proptest! {
        /// Whatever the bytes are, reading ends without a panic.
        #[test]
        fn any_bytes_are_read_to_an_end(mut bytes in proptest::collection::vec(0_u8.., 0..4096), sound: bool) {
            if sound && bytes.len() >= BLOCK {
                let mut header = Header::from_byte_slice(&bytes[..BLOCK]).clone();
                header.set_cksum();
                bytes[..BLOCK].copy_from_slice(header.as_bytes());
            }
            let mut tape = Tape::new(&bytes[..]);
            let mut buffer = [0; 100];
            while let Ok(Some(_)) = tape.next_entry() {
                while tape.read_data(&mut buffer).is_ok_and(|count| count > 0) {}
            }
        }
    }
}
