//! Unpacks hostile layers of images: nothing outside of the folder is touched, all bounds hold, and the same bytes are the same
//! layer.
//!
//! The unpacking is a private part of a crate that also speaks to registries; it is taken by its files.
#![no_main]
#![allow(dead_code, unused_imports)]

#[path = "../../crates/image/src/digest.rs"]
mod digest;
#[path = "../../crates/image/src/unpack/mod.rs"]
mod unpack;

use std::io::Write as _;
use std::sync::atomic::AtomicBool;

use digest::Digest;
use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{Input, Place, become_nobody, tape, within};
use unpack::{Expected, UnpackLimits, unpack};

const LIMITS: UnpackLimits =
    UnpackLimits { layer_bytes: 1 << 20, entries: 100, depth: 8, ratio: 50, ratio_from_bytes: 64 << 10 };

fn packed(how: u8, archive: Vec<u8>) -> Vec<u8> {
    match how % 4 {
        0 => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&archive).and_then(|()| gzip.finish()).expect("memory takes everything")
        }
        1 => zstd::bulk::compress(&archive, 1).expect("memory takes everything"),
        _ => archive,
    }
}

fuzz_target!(init: become_nobody(), |data: &[u8]| {
    let mut input = Input(data);
    let how = input.byte();
    let (at, with) = (input.number() as usize, input.byte());
    let blob = if how & 4 == 0 { packed(how, tape(&mut input)) } else { input.rest().to_vec() };
    let mut blob = blob;
    if how & 8 != 0 && !blob.is_empty() {
        let at = at % blob.len();
        blob[at] ^= with;
    }
    let place = Place::new();
    let (root, cancelled) = (place.inside(), AtomicBool::new(false));
    let expected = Expected { digest: Some(Digest::of(&blob)), diff_id: None };
    let unpacked = within(4 << 20, || unpack(&blob[..], &expected, &root, &LIMITS, &cancelled));
    place.check();
    let Ok(unpacked) = unpacked else { return };
    assert!(unpacked.archive_bytes <= LIMITS.layer_bytes && unpacked.entries <= LIMITS.entries);
    let again = Place::new();
    let expected = Expected { diff_id: Some(unpacked.diff_id.clone()), ..expected };
    let same = unpack(&blob[..], &expected, &again.inside(), &LIMITS, &cancelled);
    assert_eq!(same.expect("the same bytes"), unpacked);
    again.check();
});
