//! Recovers a spool of any files: what was whole is there again, what stands behind it is cut, and the log has no hole.
//!
//! The spool is a module of the agent, which is large; it is taken by its files.
#![no_main]
#![allow(dead_code)]
// The agent's feature `testing` is none of this crate's.
#![allow(unexpected_cfgs)]

#[path = "../../crates/agent/src/causes.rs"]
mod causes;
#[path = "../../crates/agent/src/private.rs"]
mod private;
#[path = "../../crates/agent/src/spool/mod.rs"]
mod spool;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use prost::Message as _;
use sealci_core::ids::{ActionId, AttemptId, InstanceId};
use sealci_fuzz::{Input, Place, within};
use sealci_proto::agent::{self, HeldState, event};

use private::Persistence;
use spool::{AttemptSpool, Piece, ReadPlace, Spool, SpoolLimits, frame};

const CLAIM: u8 = 1;
const TOKEN: u8 = 2;
const EVENT: u8 = 3;

/// What a whole journal says.
#[derive(Debug, Default, PartialEq)]
struct Told {
    spec: Option<Bytes>,
    token: Option<u64>,
    sequences: Vec<u64>,
    /// By the first end that is told.
    log_length: Option<u64>,
}

fn id() -> AttemptId {
    AttemptId { action: ActionId::from_parts(1, &[1; 10]), number: 1 }
}

/// A journal: whole frames with a right checksum, of which the first that means nothing ends what counts, and anything behind.
fn journal(input: &mut Input<'_>) -> (Vec<u8>, Told) {
    let (mut file, mut told, mut is_whole) = (Vec::new(), Told::default(), true);
    loop {
        let mut payload = Vec::new();
        let understood = match input.byte() % 8 {
            0 => break,
            1 | 2 if told.spec.is_none() => {
                let spec = input.piece();
                payload.extend_from_slice(&[[CLAIM].as_slice(), &[9; 16], &[0; 24], spec].concat());
                if is_whole {
                    told.spec = Some(Bytes::copy_from_slice(spec));
                }
                true
            }
            3 => {
                let token = input.number();
                payload.extend_from_slice(&[[TOKEN].as_slice(), &token.to_le_bytes()].concat());
                if is_whole {
                    told.token = Some(token);
                }
                true
            }
            4..6 => {
                let event = event(input, told.sequences.len() as u64);
                payload.push(EVENT);
                payload.extend_from_slice(&event.encode_to_vec());
                if is_whole {
                    told.sequences.push(event.sequence);
                    if let Some(event::Body::Finished(finished)) = event.body {
                        told.log_length.get_or_insert(finished.log_length);
                    }
                }
                true
            }
            // No record of this version has this kind.
            _ => {
                payload.push(input.byte().max(EVENT + 1));
                payload.extend_from_slice(input.piece());
                false
            }
        };
        is_whole &= understood && (told.spec.is_some() || !is_whole);
        file.extend_from_slice(&frame::encode(&payload));
    }
    file.extend_from_slice(input.piece());
    (file, told)
}

fn event(input: &mut Input<'_>, sequence: u64) -> agent::Event {
    let body = match input.byte() % 3 {
        0 => event::Body::Running(agent::Running { executor: "fake".into() }),
        1 => event::Body::CommandStarted(agent::CommandStarted { index: 0, log_offset: input.number() }),
        // A log is not longer than what a database's column holds.
        _ => event::Body::Finished(agent::Finished { outcome: None, log_length: input.number() >> 1 }),
    };
    agent::Event { sequence, body: Some(body), ..Default::default() }
}

/// A segment: data and gaps with right checksums, at places that need not fit, and anything behind.
fn segment(input: &mut Input<'_>, base: u64) -> Vec<u8> {
    let (mut file, mut at) = (Vec::new(), base);
    loop {
        let kind = input.byte();
        let from = if kind & 1 == 0 { at } else { input.number() };
        let mut payload = vec![u8::from(kind & 6 == 6)];
        payload.extend_from_slice(&from.to_le_bytes());
        match kind & 6 {
            0 => break,
            6 => {
                let to = from.saturating_add(input.number());
                payload.extend_from_slice(&to.to_le_bytes());
                payload.extend_from_slice(input.piece());
                at = to;
            }
            _ => {
                let bytes = input.piece();
                payload.extend_from_slice(bytes);
                at = from.saturating_add(bytes.len() as u64);
            }
        }
        file.extend_from_slice(&frame::encode(&payload));
    }
    file.extend_from_slice(input.piece());
    file
}

fn open(folder: &Path) -> (Spool, Vec<Arc<AttemptSpool>>) {
    let limits = SpoolLimits { disk_bytes: 1 << 20, window_bytes: 4 << 10 };
    let instance = || InstanceId::from_parts(1, &[3; 10]);
    Spool::open(folder, limits, Persistence::Scratch, instance).expect("a spool opens, whatever is in it")
}

/// Reads the log to its end, as it would be sent.
fn log(attempt: &AttemptSpool, max_bytes: usize) -> Vec<Piece> {
    let (mut place, mut offset, mut pieces) = (ReadPlace::default(), attempt.log.acked(), Vec::new());
    while let Some(piece) = attempt.log.read_disk(&mut place, offset, max_bytes) {
        assert_eq!(piece.from(), offset, "a hole before {piece:?}");
        assert!(piece.to() > offset, "{piece:?} leads nowhere");
        if let Piece::Data { bytes, .. } = &piece {
            assert!(bytes.len() <= max_bytes);
        }
        offset = piece.to();
        pieces.push(piece);
    }
    assert!(
        offset >= attempt.log.sendable_end(),
        "the log ends at {offset}, before {}",
        attempt.log.sendable_end()
    );
    pieces
}

/// Pieces of any size say the same.
fn joined(pieces: &[Piece]) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Data { bytes: before, .. }), Piece::Data { bytes, .. }) => {
                *before = [&before[..], bytes].concat().into();
            }
            _ => joined.push(piece.clone()),
        }
    }
    joined
}

fn is_told(attempt: &AttemptSpool, told: &Told) {
    assert_eq!(Some(attempt.spec()), told.spec.as_ref());
    for sequence in &told.sequences {
        assert_eq!(attempt.event(*sequence).map(|event| event.sequence), Some(*sequence));
    }
    assert!(attempt.log.end() >= told.log_length.unwrap_or_default());
    if told.token.is_some() {
        assert_ne!(attempt.held_state(), HeldState::Assigned);
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let place = Place::new();
    let attempt = place.inside().join(id().to_string());
    fs::create_dir(&attempt).expect("a folder");
    let (bytes, told) = journal(&mut input);
    fs::write(attempt.join("journal"), bytes).expect("a file");
    while !input.is_empty() {
        let base = input.number();
        let bytes = segment(&mut input, base);
        fs::write(attempt.join(format!("log-{base:016x}")), bytes).expect("a file");
    }
    // What is read ahead, and a journal as it stands on disk; nothing that a file's figures could ask for.
    let first = within((4 << 20) + 16 * data.len(), || {
        let (spool, attempts) = open(&place.inside());
        let first = attempts.first().map(|attempt| {
            is_told(attempt, &told);
            (attempt.next_sequence(), attempt.token(), attempt.is_finished(), joined(&log(attempt, 7)))
        });
        assert!(told.spec.is_none() || first.is_some(), "an attempt is lost");
        drop(attempts);
        drop(spool);
        first
    });
    // The second time everything is whole, and says the same.
    let (_spool, attempts) = open(&place.inside());
    let second = attempts.first().map(|attempt| {
        (attempt.next_sequence(), attempt.token(), attempt.is_finished(), joined(&log(attempt, 1 << 20)))
    });
    assert_eq!(second, first);
});
