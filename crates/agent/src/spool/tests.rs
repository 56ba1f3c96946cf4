//! Plays random lives of a spool: writes, acknowledgements, crashes at any byte, restarts.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use sealci_core::ids::ActionId;
use sealci_core::outcome::{Cause, Outcome};
use sealci_proto::agent::{self, HeldState, event};

use super::log::{QUOTA_REACHED, SPOOL_FULL, SPOOL_LOST};
use super::*;

fn id(number: u32) -> AttemptId {
    AttemptId { action: ActionId::from_parts(1, &[1; 10]), number }
}

fn claim_id() -> ClaimId {
    ClaimId::from_parts(1, &[2; 10])
}

fn instance_id() -> InstanceId {
    InstanceId::from_parts(1, &[3; 10])
}

fn open(folder: &Path, disk_bytes: u64) -> (Spool, Vec<Arc<AttemptSpool>>) {
    let limits = SpoolLimits { disk_bytes, window_bytes: 4 << 10 };
    Spool::open(folder, limits, Persistence::Scratch, instance_id).unwrap()
}

fn new_attempt(number: u32, log_quota_bytes: u64) -> NewAttempt {
    let (claim_id, spec) = (claim_id(), Bytes::from_static(b"spec"));
    let reserved = Resources::DEFAULT;
    NewAttempt { attempt: id(number), claim_id, reserved, spec, commands: 1, log_quota_bytes }
}

fn hold(spool: &Spool, number: u32, log_quota_bytes: u64) -> Arc<AttemptSpool> {
    let attempt = spool.hold(new_attempt(number, log_quota_bytes)).unwrap();
    attempt.grant(7).unwrap();
    attempt
}

fn running() -> event::Body {
    event::Body::Running(agent::Running { executor: "fake".into() })
}

/// Reads all that may be sent from `offset` on, from memory where it is there.
fn read_all(attempt: &AttemptSpool, mut offset: u64, max_bytes: usize) -> Vec<Piece> {
    let mut place = ReadPlace::default();
    let mut pieces = Vec::new();
    loop {
        let piece = attempt
            .log
            .read_window(offset, max_bytes)
            .or_else(|| attempt.log.read_disk(&mut place, offset, max_bytes));
        let Some(piece) = piece else { return pieces };
        assert_eq!(piece.from(), offset, "a hole before {piece:?}");
        offset = piece.to();
        pieces.push(piece);
    }
}

/// Lays pieces out; gaps are filled with `None`.
fn laid_out(pieces: &[Piece]) -> Vec<Option<u8>> {
    let mut log = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Data { bytes, .. } => log.extend(bytes.iter().copied().map(Some)),
            Piece::Gap { from, to, .. } => log.extend((*from..*to).map(|_| None)),
        }
    }
    log
}

fn gaps(pieces: &[Piece]) -> Vec<(u64, u64, &str)> {
    pieces
        .iter()
        .filter_map(|piece| match piece {
            Piece::Gap { from, to, reason } => Some((*from, *to, reason.as_str())),
            Piece::Data { .. } => None,
        })
        .collect()
}

#[test]
fn a_spool_is_used_by_one_agent_and_keeps_its_instance() {
    let folder = tempfile::tempdir().unwrap();
    let (first, _) = open(folder.path(), 1 << 20);
    let error =
        Spool::open(folder.path(), SpoolLimits::default(), Persistence::Durable, instance_id).unwrap_err();
    assert!(error.to_string().contains(&format!("process id {}", std::process::id())), "{error}");
    drop(first);
    let other = || InstanceId::from_parts(2, &[9; 10]);
    let (again, _) = Spool::open(folder.path(), SpoolLimits::default(), Persistence::Durable, other).unwrap();
    assert_eq!(again.instance(), instance_id());
}

#[test]
fn an_attempt_says_how_far_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 1 << 20);
    let attempt = spool.hold(new_attempt(1, u64::MAX)).unwrap();
    assert_eq!(attempt.held_state(), HeldState::Assigned);
    attempt.grant(7).unwrap();
    assert_eq!(attempt.held_state(), HeldState::Claimed);
    attempt.record(running(), 1).unwrap();
    assert_eq!(attempt.held_state(), HeldState::Running);
    attempt.append_log(Bytes::from_static(b"hello"));
    attempt.finish(&Outcome::Succeeded, 2);
    assert_eq!(attempt.held_state(), HeldState::Finished);
    let Some(event::Body::Finished(finished)) = attempt.event(1).unwrap().body else { panic!() };
    assert_eq!(finished.log_length, 5);
    assert_eq!(attempt.event(0).unwrap().token, 7);
    assert_eq!(attempt.event(2), None);
}

#[test]
fn a_forgotten_attempt_is_gone_at_once_and_its_room_is_free_again() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 1 << 20);
    let before = spool.bounds.disk.free_bytes();
    let attempt = hold(&spool, 1, u64::MAX);
    attempt.append_log(Bytes::from(vec![1; 10_000]));
    let leftover = attempt.forget();
    drop(attempt);
    assert_eq!(spool.bounds.disk.free_bytes(), before);
    assert_eq!(spool.bounds.window.free_bytes(), spool.bounds.window.limit_bytes());
    // The same attempt may come again before its files are removed.
    drop(hold(&spool, 1, u64::MAX));
    leftover.remove();
    drop(spool);
    let (_, attempts) = open(folder.path(), 1 << 20);
    assert_eq!(attempts.len(), 1);
}

#[test]
fn a_full_spool_cuts_the_log_once_and_takes_no_attempt() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 256 << 10);
    let attempt = hold(&spool, 1, u64::MAX);
    let mut whole = Vec::new();
    for round in 0..100_u8 {
        let output = vec![round; 10_000];
        whole.extend_from_slice(&output);
        attempt.append_log(output.into());
    }
    assert!(!spool.has_room());
    let full = spool.hold(new_attempt(2, 1)).unwrap_err();
    assert!(full.is_out_of_room(), "{full}");
    // What is acknowledged makes room, and the log goes on.
    let kept = attempt.log.sendable_end();
    let before = read_all(&attempt, 0, 1 << 20);
    assert_eq!(laid_out(&before).len() as u64, kept);
    for path in attempt.acknowledge(0, kept) {
        fs::remove_file(path).unwrap();
    }
    whole.extend_from_slice(b"and on");
    attempt.append_log(Bytes::from_static(b"and on"));
    attempt.finish(&Outcome::Succeeded, 1);
    let after = read_all(&attempt, kept, 1 << 20);
    let cut_to = whole.len() as u64 - 6;
    assert_eq!(gaps(&before), []);
    assert_eq!(gaps(&after), [(kept, cut_to, SPOOL_FULL)]);
    let log: Vec<_> = laid_out(&before).into_iter().chain(laid_out(&after)).collect();
    assert_eq!(log.len(), whole.len());
    assert!(log.iter().zip(&whole).all(|(read, written)| read.is_none_or(|read| read == *written)));
}

#[test]
fn a_log_is_cut_at_its_quota() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 1 << 20);
    let attempt = hold(&spool, 1, 10);
    attempt.append_log(Bytes::from_static(b"0123456"));
    attempt.append_log(Bytes::from_static(b"789abc"));
    attempt.append_log(Bytes::from_static(b"def"));
    assert_eq!(attempt.log.sendable_end(), 10);
    attempt.finish(&Outcome::Succeeded, 1);
    let pieces = read_all(&attempt, 0, 100);
    assert_eq!(gaps(&pieces), [(10, 16, QUOTA_REACHED)]);
    // The open gap was on disk all the time.
    drop((attempt, spool));
    let (_, attempts) = open(folder.path(), 1 << 20);
    assert_eq!(gaps(&read_all(&attempts[0], 0, 100)), [(10, 16, QUOTA_REACHED)]);
}

#[test]
fn what_a_result_told_of_and_the_disk_lost_is_a_gap() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 1 << 20);
    let attempt = hold(&spool, 1, u64::MAX);
    attempt.append_log(Bytes::from_static(b"hello"));
    attempt.finish(&Outcome::Succeeded, 1);
    drop((attempt, spool));
    fs::remove_file(folder.path().join(id(1).to_string()).join("log-0000000000000000")).unwrap();
    let (_, attempts) = open(folder.path(), 1 << 20);
    assert_eq!(gaps(&read_all(&attempts[0], 0, 100)), [(0, 5, SPOOL_LOST)]);
}

#[test]
fn a_segment_that_reaches_into_the_next_is_read_up_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 1 << 20);
    let attempt = hold(&spool, 1, u64::MAX);
    attempt.append_log(Bytes::from_static(b"hello, you"));
    drop((attempt, spool));
    let segment = |base: u64, kind: u8, rest: &[u8]| {
        let payload = [&[kind], &base.to_le_bytes()[..], rest].concat();
        let path = folder.path().join(id(1).to_string()).join(format!("log-{base:016x}"));
        fs::write(path, frame::encode(&payload)).unwrap();
    };
    // A gap to 9, and two bytes at 6.
    segment(4, 1, &[&9_u64.to_le_bytes()[..], b"x"].concat());
    segment(6, 0, b"!!");
    let (_, attempts) = open(folder.path(), 1 << 20);
    for max_bytes in [1, 1 << 20] {
        let pieces = read_all(&attempts[0], 0, max_bytes);
        let expected = b"hell".iter().copied().map(Some).chain([None, None]).chain([Some(b'!'); 2]);
        assert_eq!(laid_out(&pieces), expected.collect::<Vec<_>>());
        assert_eq!(pieces.last().map(Piece::to), Some(attempts[0].log.end()));
    }
}

#[test]
fn a_made_up_end_goes_behind_what_the_controller_knows() {
    let folder = tempfile::tempdir().unwrap();
    let (spool, _) = open(folder.path(), 1 << 20);
    let attempt = hold(&spool, 1, u64::MAX);
    let restarted = Outcome::Errored { cause: Cause::AgentRestarted, message: "x".into() };
    attempt.make_up_end(&restarted, 1);
    assert!(attempt.event(0).is_some());
    // The machine crashed: two events and nine bytes were recorded that the spool has lost.
    assert!(attempt.acknowledge(2, 9).is_empty());
    assert_eq!(attempt.event(0), None);
    let Some(event::Body::Finished(finished)) = attempt.event(2).unwrap().body else { panic!() };
    assert_eq!(finished.log_length, 9);
    assert_eq!((attempt.next_sequence(), attempt.acked()), (3, (2, 9)));
}

/// One step in a spool's life.
#[derive(Debug, Clone)]
enum Step {
    Event,
    Output {
        length: usize,
    },
    /// The reader sends all there is, in pieces of up to so many bytes; so much of it is acknowledged.
    Acknowledge {
        max_bytes: usize,
        share: f64,
    },
    /// The process dies; so much of the last frame of each file is not written.
    Crash {
        torn: Vec<u8>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Event),
        5 => (1_usize..40_000).prop_map(|length| Step::Output { length }),
        3 => (1_usize..100_000, 0.0..=1.0).prop_map(|(max_bytes, share)| Step::Acknowledge { max_bytes, share }),
        1 => vec(any::<u8>(), 0..40).prop_map(|torn| Step::Crash { torn }),
    ]
}

/// What should be in the spool.
#[derive(Default)]
struct Model {
    log: Vec<u8>,
    events: u64,
    acked: u64,
}

fn pattern(from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| (at % 251) as u8 ^ (at / 251) as u8).collect()
}

fn check(attempt: &AttemptSpool, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(attempt.log.end(), model.log.len() as u64);
    let pieces = read_all(attempt, model.acked, 1 << 20);
    let read: Option<Vec<u8>> = laid_out(&pieces).into_iter().collect();
    prop_assert!(read.as_deref() == Some(&model.log[model.acked as usize..]), "the bytes differ");
    for sequence in 0..model.events {
        prop_assert_eq!(attempt.event(sequence).map(|event| event.sequence), Some(sequence));
    }
    prop_assert_eq!(attempt.next_sequence(), model.events);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_all_that_is_unacknowledged_is_there(steps in vec(step(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let (mut spool, _) = open(folder.path(), 16 << 20);
        let mut live: BTreeMap<u32, (Arc<AttemptSpool>, Model)> = BTreeMap::new();
        live.insert(1, (hold(&spool, 1, u64::MAX), Model::default()));
        let mut number = 1;
        for step in steps {
            let (attempt, model) = live.get_mut(&number).unwrap();
            match step {
                Step::Event => {
                    attempt.record(running(), 1).unwrap();
                    model.events += 1;
                }
                Step::Output { length } => {
                    let output = pattern(model.log.len(), length);
                    model.log.extend_from_slice(&output);
                    attempt.append_log(output.into());
                }
                Step::Acknowledge { max_bytes, share } => {
                    let sent = read_all(attempt, model.acked, max_bytes);
                    let acked = sent.get(..(sent.len() as f64 * share) as usize).unwrap_or(&[]);
                    model.acked = acked.last().map_or(model.acked, Piece::to);
                    for path in attempt.acknowledge(0, model.acked) {
                        fs::remove_file(path).unwrap();
                    }
                }
                Step::Crash { torn } => {
                    let models: Vec<_> = std::mem::take(&mut live)
                        .into_iter().map(|(number, (_, model))| (number, model)).collect();
                    drop(spool);
                    for (number, _) in &models {
                        for entry in fs::read_dir(folder.path().join(id(*number).to_string())).unwrap() {
                            let mut file = File::options().append(true).open(entry.unwrap().path()).unwrap();
                            file.write_all(&torn).unwrap();
                        }
                    }
                    let (reopened, attempts) = open(folder.path(), 16 << 20);
                    spool = reopened;
                    prop_assert_eq!(attempts.len(), models.len());
                    for (attempt, (number, model)) in attempts.into_iter().zip(models) {
                        prop_assert_eq!(attempt.id(), id(number));
                        check(&attempt, &model)?;
                        live.insert(number, (attempt, model));
                    }
                    number += 1;
                    live.insert(number, (hold(&spool, number, u64::MAX), Model::default()));
                }
            }
        }
        for (attempt, model) in live.values() {
            check(attempt, model)?;
        }
        drop(live);
        prop_assert_eq!(spool.bounds.disk.free_bytes(), spool.bounds.disk.limit_bytes());
        prop_assert_eq!(spool.bounds.window.free_bytes(), spool.bounds.window.limit_bytes());
    }

    #[test]
    fn a_log_cut_at_any_byte_keeps_its_beginning(
        outputs in vec(1_usize..3000, 1..20),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (spool, _) = open(folder.path(), 16 << 20);
        let attempt = hold(&spool, 1, u64::MAX);
        let mut whole = Vec::new();
        for length in outputs {
            let output = pattern(whole.len(), length);
            whole.extend_from_slice(&output);
            attempt.append_log(output.into());
        }
        drop((attempt, spool));
        let path = folder.path().join(id(1).to_string()).join("log-0000000000000000");
        let length = fs::metadata(&path).unwrap().len();
        File::options().write(true).open(&path).unwrap().set_len(cut.index(length as usize) as u64).unwrap();
        let (_, attempts) = open(folder.path(), 16 << 20);
        let read: Option<Vec<u8>> = laid_out(&read_all(&attempts[0], 0, 4096)).into_iter().collect();
        let read = read.unwrap();
        prop_assert_eq!(attempts[0].log.end(), read.len() as u64);
        prop_assert!(whole.starts_with(&read));
    }

    #[test]
    fn garbage_in_a_spool_never_panics(
        journal in vec(any::<u8>(), 0..200),
        log in vec(any::<u8>(), 0..200),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let (spool, _) = open(folder.path(), 1 << 20);
        drop(hold(&spool, 1, u64::MAX));
        drop(spool);
        let attempt = folder.path().join(id(1).to_string());
        let mut journalled = fs::read(attempt.join("journal")).unwrap();
        journalled.extend_from_slice(&journal);
        fs::write(attempt.join("journal"), journalled).unwrap();
        fs::write(attempt.join("log-0000000000000000"), log).unwrap();
        fs::create_dir(folder.path().join(id(2).to_string())).unwrap();
        fs::write(folder.path().join(id(2).to_string()).join("journal"), journal).unwrap();
        let (_, attempts) = open(folder.path(), 1 << 20);
        prop_assert!(!attempts.is_empty());
    }
}
