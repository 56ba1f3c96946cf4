//! Reads any bytes as frames between an agent and `sealci-init`: what is understood means the same when it is said again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::within;
use sealci_guest::wire::{
    FromInit, HEADER_BYTES, Header, MAX_FROM_INIT_BYTES, MAX_TO_INIT_BYTES, ToInit, WireError,
};

/// Splits bytes into frames and hands out each; stops where a reader would hang up.
fn frames(mut bytes: &[u8], limit: usize, mut each: impl FnMut(u8, &[u8]) -> bool) {
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
        let Ok(header) = Header::parse(*head, limit) else { return };
        assert!(header.payload_bytes <= limit);
        // The last one may be short; it is tried all the same.
        let (payload, rest) = rest.split_at(header.payload_bytes.min(rest.len()));
        if !each(header.kind, payload) {
            return;
        }
        bytes = rest;
    }
}

/// The one frame in these bytes.
fn again(frame: &[u8], limit: usize) -> (u8, &[u8]) {
    let (head, payload) = frame.split_first_chunk::<HEADER_BYTES>().expect("a header");
    let header = Header::parse(*head, limit).expect("a header");
    assert_eq!(header.payload_bytes, payload.len());
    (header.kind, payload)
}

fuzz_target!(|data: &[u8]| {
    // An empty text takes 4 bytes on the wire and 24 in memory, in a list that grows by doubling.
    let enough = 48 * data.len() + 4096;
    frames(data, MAX_TO_INIT_BYTES, |kind, payload| {
        let Ok(message) = within(enough, || ToInit::decode(kind, payload)) else { return false };
        let mut frame = Vec::new();
        message.encode(&mut frame).expect("what was read can be written");
        let (kind, same) = again(&frame, MAX_TO_INIT_BYTES);
        assert_eq!(ToInit::decode(kind, same), Ok(message));
        assert_eq!(same, payload, "two ways to say one thing");
        true
    });
    frames(data, MAX_FROM_INIT_BYTES, |kind, payload| {
        let Ok(message) = within(enough, || FromInit::decode(kind, payload)) else { return false };
        let mut frame = Vec::new();
        match message.encode(&mut frame) {
            Ok(()) => {
                let (kind, same) = again(&frame, MAX_FROM_INIT_BYTES);
                assert_eq!(FromInit::decode(kind, same), Ok(message));
            }
            Err(error) => assert!(matches!(error, WireError::TooLong { .. }) && frame.is_empty()),
        }
        true
    });
});
