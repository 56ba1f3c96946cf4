//! Frames records in a file, so that a reader can tell a whole record from one whose writing was cut short.
//!
//! ```text
//!   ┌────────────┬────────────┬──────────────┐
//!   │ length u32 │ CRC-32 u32 │ payload      │   little-endian; the CRC is over length and payload
//!   └────────────┴────────────┴──────────────┘
//! ```
//!
//! A file of frames is only ever appended to, so after a crash all that can be wrong with it is its end: a torn or
//! damaged frame ends what is read, and the owner cuts the file there.

/// The bytes in front of each payload.
pub const HEADER_BYTES: usize = 8;

/// No payload is longer: a message of gRPC is at most 4 MiB. A damaged length must not make a reader allocate without
/// bound.
pub const MAX_PAYLOAD_BYTES: usize = (4 << 20) + 64;

/// What stands at a place in a file of frames.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<'a> {
    /// A whole frame; the next one begins `HEADER_BYTES + payload.len()` further on.
    Frame(&'a [u8]),
    /// Too few bytes to tell: the end of the file, or of what was read of it. This many are needed, at least.
    Short { needed: usize },
    /// Not a frame: everything from here on is lost.
    Damaged,
}

/// Makes the header for a payload given in parts, which the caller writes right behind it.
pub fn header(parts: &[&[u8]]) -> [u8; HEADER_BYTES] {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    debug_assert!(length <= MAX_PAYLOAD_BYTES, "a payload of {length} bytes");
    let length = (length as u32).to_le_bytes();
    let mut crc = crc32fast::Hasher::new();
    crc.update(&length);
    for part in parts {
        crc.update(part);
    }
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&length);
    header[4..].copy_from_slice(&crc.finalize().to_le_bytes());
    header
}

/// The whole frame in one piece, for small records.
pub fn encode(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&header(&[payload]));
    frame.extend_from_slice(payload);
    frame
}

/// Reads the payload's length from a header, before the payload itself is there. None: no frame has that length.
pub fn payload_length(header: &[u8; HEADER_BYTES]) -> Option<usize> {
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    (length <= MAX_PAYLOAD_BYTES).then_some(length)
}

/// Reads the frame at the beginning of `bytes`.
pub fn decode(bytes: &[u8]) -> Decoded<'_> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Decoded::Short { needed: HEADER_BYTES };
    };
    let Some(length) = payload_length(header) else { return Decoded::Damaged };
    let Some(payload) = bytes.get(HEADER_BYTES..HEADER_BYTES + length) else {
        return Decoded::Short { needed: HEADER_BYTES + length };
    };
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..4]);
    crc.update(payload);
    if crc.finalize().to_le_bytes() == header[4..] { Decoded::Frame(payload) } else { Decoded::Damaged }
}

/// Reads frames from the beginning of `bytes` for as long as they are whole; says how many bytes those take.
pub fn decode_all(bytes: &[u8]) -> (Vec<&[u8]>, usize) {
    let mut frames = Vec::new();
    let mut at = 0;
    while let Decoded::Frame(payload) = decode(&bytes[at..]) {
        at += HEADER_BYTES + payload.len();
        frames.push(payload);
    }
    (frames, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn zeroes_are_no_frames() {
        // A file that a crash of the machine left longer than what was written reads as zeroes; the CRC covers the
        // length, so an empty payload's frame is not all zeroes.
        assert_eq!(decode_all(&[0; 64]), (vec![], 0));
    }

    #[test]
    fn a_length_beyond_the_bound_is_damage_not_an_allocation() {
        assert_eq!(decode(&[0xff; 16]), Decoded::Damaged);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_up_to_the_torn_tail(
            payloads in vec(vec(any::<u8>(), 0..200), 0..8),
            torn in vec(any::<u8>(), 0..200),
            keep in any::<prop::sample::Index>(),
        ) {
            let mut file: Vec<u8> = payloads.iter().flat_map(|payload| encode(payload)).collect();
            let whole = file.len();
            let tail = encode(&torn);
            file.extend_from_slice(&tail[..keep.index(tail.len())]);
            let (frames, end) = decode_all(&file);
            prop_assert_eq!(frames, payloads.iter().map(Vec::as_slice).collect::<Vec<_>>());
            prop_assert_eq!(end, whole);
        }

        #[test]
        fn a_flipped_bit_is_noticed(
            payload in vec(any::<u8>(), 0..200),
            bit in any::<prop::sample::Index>(),
        ) {
            let mut frame = encode(&payload);
            let bit = bit.index(frame.len() * 8);
            frame[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!matches!(decode(&frame), Decoded::Frame(_)));
        }

        #[test]
        fn garbage_never_panics(bytes in vec(any::<u8>(), 0..4096)) {
            let (_, end) = decode_all(&bytes);
            prop_assert!(end <= bytes.len());
        }
    }
}
