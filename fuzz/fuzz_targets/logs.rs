//! Reads packed logs that were changed: what a reader gets is what was packed, or nothing.
//!
//! The packing is a module of the controller, which is large; it is taken by its file.
#![no_main]
#![allow(dead_code)]

#[path = "../../crates/controller/src/storage/logs/seekable.rs"]
mod seekable;

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{Input, within};
use seekable::{FRAME_BYTES, Packer, Table, Tail, at_most, unpack};

fn packed(log: &[u8], piece: usize) -> Vec<u8> {
    let mut packer = Packer::new().expect("a packer");
    let mut object = Vec::new();
    for piece in log.chunks(piece) {
        object.extend(packer.push(piece).expect("a frame"));
    }
    let (rest, size) = packer.finish().expect("a table");
    object.extend(rest);
    assert_eq!(object.len() as u64, size);
    assert!(size <= at_most(log.len() as u64));
    object
}

/// Reads from some byte to the end; none where something is no packed log.
fn read(object: &[u8], size_bytes: u64, log_bytes: u64, from: u64, tail_bytes: usize) -> Option<Vec<u8>> {
    let tail_of = |bytes: usize| &object[object.len().saturating_sub(bytes)..];
    let table = match Table::read(tail_of(tail_bytes), size_bytes, log_bytes).ok()? {
        Tail::Table(table) => table,
        Tail::Needs(bytes) => {
            assert!(bytes <= size_bytes && bytes > tail_bytes.min(object.len()) as u64);
            match Table::read(tail_of(usize::try_from(bytes).ok()?), size_bytes, log_bytes).ok()? {
                Tail::Table(table) => table,
                // The object is shorter than it should be.
                Tail::Needs(_) => return None,
            }
        }
    };
    let (mut log, mut at) = (Vec::new(), from);
    while let Some(frame) = table.frame_at(at) {
        assert!(frame.log.contains(&at) && frame.packed.end <= size_bytes);
        assert!(frame.log.end - frame.log.start <= FRAME_BYTES as u64 && frame.log.end <= log_bytes);
        let packed = object.get(frame.packed.start as usize..frame.packed.end as usize)?;
        let bytes = unpack(packed, &frame).ok()?;
        log.extend_from_slice(&bytes[(at - frame.log.start) as usize..]);
        at = frame.log.end;
    }
    assert_eq!(at.max(from), log_bytes.max(from));
    Some(log)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    if input.byte() % 4 == 0 {
        // Whatever it is, nothing is reserved on its word.
        let (size, log) = (input.number(), input.number());
        let tail = input.rest();
        within(data.len() + (4 << 20), || read(tail, size, log, 0, 100));
        return;
    }
    // A log with a pattern, so that a few bytes are a long one.
    let (times, piece) = (input.number() as usize % 5000 + 1, input.number() as usize % 70_000 + 1);
    let from = input.number();
    let log = input.piece().repeat(times);
    let log = &log[..log.len().min(FRAME_BYTES * 2 + 5)];
    let mut object = packed(log, piece);
    let (size, length) = (object.len() as u64, log.len() as u64);
    let expected = log.get(usize::try_from(from).unwrap_or(usize::MAX)..).unwrap_or_default();
    assert_eq!(read(&object, size, length, from, 100).as_deref(), Some(expected));
    while !input.is_empty() {
        let at = input.number() as usize % object.len();
        object[at] ^= input.byte();
    }
    if let Some(log) = read(&object, size, length, from, 9) {
        assert_eq!(log, expected, "other bytes than were packed");
    }
});
