//! Reads any bytes as a manifest: there is a plan that can be run, or errors that lie inside the text.
#![no_main]

#[path = "../../crates/core/tests/sound/mod.rs"]
mod sound;

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::within;

fuzz_target!(|data: &[u8]| {
    within((8 << 20) + 2000 * data.len(), || sound::assert_sound(data));
});
