//! Unpacks the vmlinux out of a bzImage, so that no guest has to: it is then at the address where it was
//! linked (a kernel places itself at random only where it unpacks itself).
//!
//! ```text
//!   magic │ bytes of a block │ block, of which 8 MiB become │ … │ bytes of all of it, unpacked
//! ```
//! That is what `lz4 -l` writes, and the kernel's build behind it; the form in which Debian's kernels are packed.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::{Format, Kernel, KernelError, Source};

/// Each kind of packing by how it begins (scripts/extract-vmlinux of Linux).
const LZ4: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const OTHERS: [(&[u8], &str); 5] = [
    (&[0x1f, 0x8b], "gzip"),
    (&[0xfd, b'7', b'z'], "xz"),
    (&[0x28, 0xb5, 0x2f], "zstd"),
    (b"BZh", "bzip2"),
    (&[0x5d, 0, 0], "lzma"),
];
/// What a block becomes at most.
const BLOCK_BYTES: usize = 8 << 20;
/// What a block has at most: what cannot be packed grows a little.
const PACKED_BYTES: usize = BLOCK_BYTES + BLOCK_BYTES / 255 + 16;
/// Ten times what kernels have.
const MAX_BYTES: u64 = 512 << 20;

/// Why there is no vmlinux.
#[derive(Debug, Error)]
pub enum ExtractError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("the kernel {} is a vmlinux already: it is used as it is", path.display())]
    Unpacked { path: PathBuf },
    #[error("the kernel {} is packed with {with}, of which only lz4 is unpacked: it is used as it is", path.display())]
    Packing { path: PathBuf, with: &'static str },
    #[error("cannot write the unpacked kernel")]
    Write(#[source] io::Error),
}

/// Writes the vmlinux of a bzImage into a file. What it wrote before an error is of no use.
pub fn extract(path: &Path, to: &mut File) -> Result<(), ExtractError> {
    let kernel = Kernel::open(path)?;
    let Format::BzImage(image) = &kernel.format else {
        return Err(ExtractError::Unpacked { path: path.to_owned() });
    };
    let (begin, bytes) = image.payload(&kernel.source)?;
    let magic = kernel.source.read::<4>(begin)?.unwrap_or_default();
    if magic != LZ4 {
        let known = OTHERS.iter().find(|(beginning, _)| magic.starts_with(beginning));
        let with = known.map_or("something unknown", |(_, name)| *name);
        return Err(ExtractError::Packing { path: path.to_owned(), with });
    }
    // Behind the last block stands what all of them become.
    let end = begin + bytes - 4;
    let expected = u64::from(u32_at(&kernel.source, end)?);
    if bytes < 8 || expected > MAX_BYTES {
        return Err(kernel.source.damaged("what is packed in it has no length").into());
    }
    let written = unpack(&kernel.source, begin + 4, end, to)?;
    if written != expected {
        return Err(kernel.source.damaged("what is packed in it has another length than it says").into());
    }
    Ok(())
}

/// How many bytes came out.
fn unpack(source: &Source, mut at: u64, end: u64, to: &mut File) -> Result<u64, ExtractError> {
    let damaged = || source.damaged("what is packed in it cannot be unpacked");
    let (mut packed, mut unpacked) = (vec![0; PACKED_BYTES], vec![0; BLOCK_BYTES]);
    let mut written = 0;
    while at < end {
        let length = u32_at(source, at)? as usize;
        at += 4;
        if length > PACKED_BYTES || at + length as u64 > end || written > MAX_BYTES {
            return Err(damaged().into());
        }
        source.read_into(at, &mut packed[..length])?;
        at += length as u64;
        let count = lz4_flex::block::decompress_into(&packed[..length], &mut unpacked);
        let count = count.map_err(|_| damaged())?;
        to.write_all(&unpacked[..count]).map_err(ExtractError::Write)?;
        written += count as u64;
    }
    Ok(written)
}

fn u32_at(source: &Source, at: u64) -> Result<u32, KernelError> {
    let bytes = source.read::<4>(at)?.ok_or_else(|| source.damaged("what is packed in it is cut"))?;
    Ok(u32::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use linux_loader::loader::bootparam::setup_header;

    use super::super::bzimage::tests::image_with;
    use super::super::tests::file;
    use super::*;

    fn packed(blocks: &[&[u8]], length: u32) -> Vec<u8> {
        let mut payload = LZ4.to_vec();
        for block in blocks {
            let block = lz4_flex::block::compress(block);
            payload.extend((block.len() as u32).to_le_bytes());
            payload.extend(block);
        }
        payload.extend(length.to_le_bytes());
        payload
    }

    fn extracted(payload: &[u8], change: impl FnOnce(&mut setup_header)) -> Result<Vec<u8>, String> {
        let kernel = file(&image_with(payload, change));
        let mut to = tempfile::tempfile().unwrap();
        extract(kernel.path(), &mut to).map_err(|error| error.to_string())?;
        let mut bytes = Vec::new();
        to.rewind().unwrap();
        to.read_to_end(&mut bytes).unwrap();
        Ok(bytes)
    }

    #[test]
    fn all_blocks_come_out() {
        let (first, second) = (vec![7; BLOCK_BYTES], b"the rest".to_vec());
        let payload = packed(&[&first, &second], (BLOCK_BYTES + 8) as u32);
        assert!(extracted(&payload, |_| ()).unwrap() == [first, second].concat());
    }

    #[test]
    fn what_is_not_whole_is_refused() {
        let payload = packed(&[b"a kernel"], 8);
        assert_eq!(extracted(&payload, |_| ()).unwrap(), b"a kernel");
        assert!(extracted(&packed(&[b"a kernel"], 9), |_| ()).unwrap_err().contains("another length"));
        for length in 0..payload.len() as u32 {
            assert!(extracted(&payload, |header| header.payload_length = length).is_err(), "{length}");
        }
        for at in 4..8 {
            let mut wrong = payload.clone();
            wrong[at] ^= 0x80;
            assert!(extracted(&wrong, |_| ()).unwrap_err().contains("unpacked"), "{at}");
        }
        assert!(
            extracted(&payload, |header| header.payload_offset = u32::MAX).unwrap_err().contains("damaged")
        );
        assert!(
            extracted(&payload, |header| header.payload_length = u32::MAX).unwrap_err().contains("damaged")
        );
    }

    #[test]
    fn another_packing_is_named() {
        let error = extracted(&[0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0, 0], |_| ()).unwrap_err();
        assert!(error.contains("zstd"), "{error}");
    }
}
