//! Unpacks hostile archives as `sealci-init` does: nothing outside of the folder is touched, and no more is written than came.
//!
//! The init is a binary; its modules are taken by their files.
#![no_main]
#![allow(dead_code)]

/// What `unpack` shows of its work; nobody looks at it here.
mod carrier {
    pub struct Progress;

    impl Progress {
        pub fn step(&self) -> Result<(), String> {
            Ok(())
        }
    }
}
#[path = "../../crates/guest/src/sys.rs"]
mod sys;
#[path = "../../crates/guest/src/unpack.rs"]
mod unpack;

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{Input, Place, become_nobody, tape, within};

fuzz_target!(init: become_nobody(), |data: &[u8]| {
    let mut input = Input(data);
    let is_raw = input.byte() % 8 == 0;
    let archive = if is_raw { input.rest().to_vec() } else { tape(&mut input) };
    let place = Place::new();
    let root = place.inside();
    // Its own buffer, one long name, and little else.
    let unpacked = within((1 << 20) + 8 * archive.len(), || unpack::unpack(&archive[..], &root, &carrier::Progress));
    place.check();
    if let Ok(unpacked) = unpacked {
        assert!(unpacked.bytes <= archive.len() as u64 && unpacked.files <= archive.len() as u64 / 512);
    }
    // Once more, over what is there: it may fail on what it made itself, and stays where it is.
    let _ = unpack::unpack(&archive[..], &root, &carrier::Progress);
    place.check();
});
