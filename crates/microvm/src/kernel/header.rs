//! Reads what a kernel's file says of itself (Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The boot sector and all that its setup code can hold: the release's text is in it.
const HEAD_BYTES: u64 = 64 << 10;

/// Longer ones there are none.
const LONGEST_RELEASE_BYTES: usize = 128;

/// Why a file is not taken for a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAKernel {
    #[error("it is neither a bzImage nor an ELF file; it may be damaged")]
    Unknown,
    #[error("it is for another architecture than x86-64")]
    Architecture,
    #[error("it ends in the middle of its header; it is damaged")]
    Truncated,
    #[error("it does not say its release; name the folder with its modules as well")]
    Nameless,
}

pub(super) fn read(image: &Path) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    File::open(image)?.take(HEAD_BYTES).read_to_end(&mut head)?;
    Ok(head)
}

/// The release that a kernel with this beginning is of; none of an ELF file.
pub(super) fn release(head: &[u8]) -> Result<Option<String>, NotAKernel> {
    if head.starts_with(b"\x7fELF") {
        // 64 bits, and EM_X86_64 (elf(5)).
        let is_ours = head.get(4) == Some(&2) && head.get(18..20) == Some(&[62, 0]);
        return if is_ours { Ok(None) } else { Err(NotAKernel::Architecture) };
    }
    if head.get(0x38..0x3c) == Some(b"ARM\x64") || head.get(0x38..0x3c) == Some(b"RSC\x05") {
        return Err(NotAKernel::Architecture);
    }
    if head.get(0x202..0x206) != Some(b"HdrS") {
        return Err(NotAKernel::Unknown);
    }
    let two_bytes = |at: usize| {
        let bytes = head.get(at..at + 2).and_then(<[u8]>::first_chunk).ok_or(NotAKernel::Truncated)?;
        Ok(u16::from_le_bytes(*bytes))
    };
    // XLF_KERNEL_64, of protocol 2.12 on.
    if two_bytes(0x206)? < 0x020c || two_bytes(0x236)? & 1 == 0 {
        return Err(NotAKernel::Architecture);
    }
    let at = match two_bytes(0x20e)? {
        0 => return Ok(None),
        offset => usize::from(offset) + 0x200,
    };
    let text = head.get(at..).ok_or(NotAKernel::Truncated)?;
    let text = text.split(|byte| *byte == 0 || *byte == b' ').next().unwrap_or_default();
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._+~".contains(byte);
    // It becomes part of a path.
    let is_sound = !text.is_empty()
        && text.len() <= LONGEST_RELEASE_BYTES
        && text.iter().all(is_name)
        && !text.starts_with(b".");
    if is_sound { Ok(Some(String::from_utf8_lossy(text).into_owned())) } else { Err(NotAKernel::Truncated) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bz_image(release: &[u8]) -> Vec<u8> {
        let mut head = vec![0; 0x400];
        head[0x202..0x206].copy_from_slice(b"HdrS");
        head[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        head[0x236] = 1;
        head[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        head[0x300..0x300 + release.len()].copy_from_slice(release);
        head
    }

    #[test]
    fn a_release_is_the_first_word() {
        let head = bz_image(b"6.1.0-48-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP");
        assert_eq!(release(&head), Ok(Some("6.1.0-48-cloud-amd64".to_owned())));
    }

    #[test]
    fn what_is_no_kernel_says_why() {
        let mut of_32_bits = bz_image(b"6.1.0-686");
        of_32_bits[0x236] = 0;
        let mut arm = vec![0; 64];
        arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
        let mut aarch64 = b"\x7fELF\x02".to_vec();
        aarch64.resize(64, 0);
        aarch64[18] = 183;
        for (head, why) in [
            (&b""[..], NotAKernel::Unknown),
            (b"#!/bin/sh", NotAKernel::Unknown),
            (&of_32_bits, NotAKernel::Architecture),
            (&arm, NotAKernel::Architecture),
            (&aarch64, NotAKernel::Architecture),
            (&bz_image(b"6.1")[..0x208], NotAKernel::Truncated),
            (&bz_image(b"6.1")[..0x300], NotAKernel::Truncated),
            (&bz_image(b"../../etc"), NotAKernel::Truncated),
        ] {
            assert_eq!(release(head), Err(why), "{head:?}");
        }
    }
}
