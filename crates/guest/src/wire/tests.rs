//! Round trips, and what a hostile peer may send.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;

fn header_of(frame: &[u8], limit: usize) -> (Header, &[u8]) {
    let (head, payload) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
    let header = Header::parse(*head, limit).unwrap();
    assert_eq!(header.payload_bytes, payload.len());
    (header, payload)
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(any::<String>(), 0..5)
}

fn pairs() -> impl Strategy<Value = Vec<(String, String)>> {
    prop::collection::vec(any::<(String, String)>(), 0..5)
}

fn start() -> impl Strategy<Value = Start> {
    let what = (texts(), texts(), texts(), any::<String>(), pairs());
    let how = (any::<Option<u64>>(), any::<u64>(), 1u8..=64, any::<Option<(u32, u32)>>(), any::<bool>());
    (what, any::<[Vec<u8>; 2]>(), how).prop_map(|(what, [workdir, scratch], how)| {
        let (commands, program, wrapper, shell, env) = what;
        let (timeout_ms, grace_ms, stop_signal, user, stays) = how;
        let user = user.map(|(uid, gid)| User { uid, gid });
        Start {
            commands,
            program,
            wrapper,
            shell,
            env,
            workdir,
            scratch,
            timeout_ms,
            grace_ms,
            stop_signal,
            user,
            stays,
        }
    })
}

fn wake() -> impl Strategy<Value = Wake> {
    let entropy = prop::collection::vec(any::<u8>(), 0..=MAX_ENTROPY_BYTES);
    let network = prop::option::of(network());
    let services = prop::collection::vec(any::<String>(), 0..=machine::MOST_SERVICES);
    (any::<[u64; 2]>(), entropy, any::<[String; 2]>(), texts(), network, services).prop_map(
        |(clocks, entropy, [host_name, user], names, network, services)| {
            let [unix_time_us, host_boot_ms] = clocks;
            Wake { unix_time_us, host_boot_ms, entropy, host_name, names, network, user, services }
        },
    )
}

fn network() -> impl Strategy<Value = Network> {
    let resolvers = prop::collection::vec(any::<Ipv4Addr>(), 0..4);
    (any::<Ipv4Addr>(), 0..=32_u8, any::<Ipv4Addr>(), resolvers).prop_map(
        |(address, prefix_bits, gateway, resolvers)| Network { address, prefix_bits, gateway, resolvers },
    )
}

fn to_init() -> impl Strategy<Value = ToInit> {
    prop_oneof![
        any::<u16>().prop_map(|version| ToInit::Hello { version }),
        wake().prop_map(ToInit::Wake),
        start().prop_map(ToInit::Start),
        any::<u8>().prop_map(|number| ToInit::Signal { number }),
        any::<u64>().prop_map(|grace_ms| ToInit::Cancel { grace_ms }),
        Just(ToInit::Kill),
        any::<(u64, u64)>()
            .prop_map(|(until_boot_ms, longest_ms)| ToInit::Lease(Lease { until_boot_ms, longest_ms })),
        any::<(u32, Vec<u8>, Vec<u8>, Option<Vec<u8>>)>()
            .prop_map(|(id, root, workdir, home)| ToInit::Put(Put { id, root, workdir, home })),
        Just(ToInit::PutEnd),
        (any::<(u32, Vec<u8>, u64, u64)>(), texts()).prop_map(|((id, base, max_bytes, max_files), paths)| {
            ToInit::Take(Take { id, paths, base, max_bytes, max_files })
        }),
        (any::<(u32, u64, bool)>(), texts(), pairs()).prop_map(
            |((id, timeout_ms, streams), program, env)| ToInit::Exec(Exec {
                id,
                program,
                env,
                timeout_ms,
                streams
            })
        ),
        any::<(u32, Vec<u8>)>().prop_map(|(id, bytes)| ToInit::ExecInput { id, bytes }),
        any::<u32>().prop_map(|id| ToInit::ExecTaken { id }),
        any::<u32>().prop_map(|id| ToInit::Stop { id }),
        Just(ToInit::Leave),
    ]
}

fn ending() -> impl Strategy<Value = Ending> {
    prop_oneof![
        Just(Ending::Succeeded),
        any::<i32>().prop_map(|exit_code| Ending::Failed { exit_code }),
        Just(Ending::TimedOut),
        Just(Ending::Cancelled),
        any::<String>().prop_map(Ending::Error),
        Just(Ending::Expired),
    ]
}

fn exec_end() -> impl Strategy<Value = ExecEnd> {
    prop_oneof![
        any::<i32>().prop_map(|exit_code| ExecEnd::Exited { exit_code }),
        Just(ExecEnd::TimedOut),
        Just(ExecEnd::Stopped),
        any::<String>().prop_map(|why| ExecEnd::Refused { why }),
    ]
}

fn taken() -> impl Strategy<Value = Taken> {
    let counts = any::<(u32, u64, u64, u64, u64)>();
    (counts, any::<Vec<u32>>(), texts()).prop_map(|(counts, missing, unreadable_names)| {
        let (id, files, bytes, specials, unreadable) = counts;
        Taken { id, files, bytes, missing, specials, unreadable, unreadable_names }
    })
}

proptest! {
    #[test]
    fn what_is_said_to_the_init_is_what_it_hears(message in to_init()) {
        let mut frame = vec![9];
        message.encode(&mut frame).unwrap();
        let (header, payload) = header_of(&frame[1..], MAX_TO_INIT_BYTES);
        prop_assert_eq!(ToInit::decode(header.kind, payload), Ok(message));
    }

    #[test]
    fn what_the_init_says_is_what_is_heard(
        index: u32, exit_code: i32, numbers: [u64; 7], output: Vec<u8>, ending in ending(), survivors: u32,
        end in exec_end(), taken in taken(), why: String,
    ) {
        let [duration_us, log_offset, cpu_user_us, cpu_system_us, memory_peak_bytes, read_bytes, write_bytes] =
            numbers;
        let usage = Usage { cpu_user_us, cpu_system_us, memory_peak_bytes, read_bytes, write_bytes };
        for message in [
            FromInit::Hello { version: 3 },
            FromInit::Ready,
            FromInit::OutOfMemory,
            FromInit::CommandStarted { index, log_offset },
            FromInit::Output(&output),
            FromInit::CommandFinished { index, exit_code, duration_us, log_offset, usage },
            FromInit::Ended { ending: ending.clone(), survivors },
            FromInit::Finished { ending: ending.clone(), survivors },
            FromInit::PutRoom { bytes: index },
            FromInit::Stored { id: index, files: duration_us, bytes: log_offset },
            FromInit::Refused { id: index, why: why.clone() },
            FromInit::TakeData(&output),
            FromInit::Taken(taken.clone()),
            FromInit::ExecOutput { id: index, is_error: exit_code < 0, bytes: output.clone() },
            FromInit::ExecTaken { id: index },
            FromInit::ExecEnded { id: index, end: end.clone(), output: output.clone() },
        ] {
            let mut frame = Vec::new();
            message.encode(&mut frame).unwrap();
            let (header, payload) = header_of(&frame, MAX_FROM_INIT_BYTES);
            prop_assert_eq!(FromInit::decode(header.kind, payload), Ok(message));
        }
    }

    #[test]
    fn garbage_is_refused_or_read_but_never_panics(kind: u8, payload: Vec<u8>) {
        let _ = ToInit::decode(kind, &payload);
        let _ = FromInit::decode(kind, &payload);
    }

    #[test]
    fn a_cut_or_lengthened_frame_is_refused(message in to_init(), cut: prop::sample::Index) {
        let mut frame = Vec::new();
        message.encode(&mut frame).unwrap();
        let (header, payload) = header_of(&frame, MAX_TO_INIT_BYTES);
        if !payload.is_empty() {
            let shorter = &payload[..cut.index(payload.len())];
            prop_assert!(ToInit::decode(header.kind, shorter).is_err());
        }
        let longer = [payload, &[0]].concat();
        prop_assert_eq!(ToInit::decode(header.kind, &longer), Err(WireError::TrailingBytes));
    }
}

#[test]
fn bounds_hold_on_both_ends() {
    let huge = ToInit::Start(Start { commands: vec!["x".repeat(MAX_TO_INIT_BYTES)], ..Start::default() });
    let mut frame = vec![1, 2];
    assert!(matches!(huge.encode(&mut frame), Err(WireError::TooLong { .. })));
    assert_eq!(frame, [1, 2]);
    let header = Header { kind: 2, payload_bytes: MAX_TO_INIT_BYTES + 1 }.to_bytes();
    assert!(matches!(Header::parse(header, MAX_TO_INIT_BYTES), Err(WireError::TooLong { .. })));
    assert!(Header::parse(output_header(MAX_FROM_INIT_BYTES), MAX_FROM_INIT_BYTES).is_ok());
}

#[test]
fn a_count_that_lies_reserves_nothing() {
    let mut payload = u32::MAX.to_le_bytes().to_vec();
    payload.extend([0; 64]);
    assert_eq!(ToInit::decode(kind::START, &payload), Err(WireError::Invalid("count")));
}

#[test]
fn every_count_that_lies_reserves_nothing() {
    for (kind, before) in [(kind::TAKE, 4), (kind::EXEC, 4)] {
        let mut payload = vec![0; before];
        payload.extend(u32::MAX.to_le_bytes());
        payload.extend([0; 64]);
        assert_eq!(ToInit::decode(kind, &payload), Err(WireError::Invalid("count")));
        // A count within its bound, with nothing behind it.
        payload.truncate(before);
        payload.extend((16u32 << 10).to_le_bytes());
        assert_eq!(ToInit::decode(kind, &payload), Err(WireError::Truncated));
    }
    let mut payload = vec![0; 20];
    payload.extend((16u32 << 10).to_le_bytes());
    assert_eq!(FromInit::decode(kind::TAKEN, &payload), Err(WireError::Truncated));
}

#[test]
fn pieces_of_an_archive_are_no_messages() {
    assert_eq!(ToInit::decode(PUT_DATA_KIND, b"x"), Err(WireError::Invalid("kind")));
    let header = Header::parse(put_data_header(MAX_PUT_DATA_BYTES), MAX_TO_INIT_BYTES).unwrap();
    assert_eq!(header, Header { kind: PUT_DATA_KIND, payload_bytes: MAX_PUT_DATA_BYTES });
    assert_eq!(FromInit::decode(TAKE_DATA_KIND, b"x"), Ok(FromInit::TakeData(b"x")));
}

#[test]
fn more_than_a_machine_takes_is_refused() {
    let entropy = Wake { entropy: vec![0; MAX_ENTROPY_BYTES + 1], ..Wake::default() };
    let services = Wake { services: vec![String::new(); machine::MOST_SERVICES + 1], ..Wake::default() };
    for (wake, what) in [(entropy, "entropy"), (services, "services")] {
        let mut frame = Vec::new();
        ToInit::Wake(wake).encode(&mut frame).unwrap();
        let (header, payload) = header_of(&frame, MAX_TO_INIT_BYTES);
        assert_eq!(ToInit::decode(header.kind, payload), Err(WireError::Invalid(what)));
    }
}

#[test]
fn every_service_has_a_port_and_a_disk_of_its_own() {
    let last = machine::MOST_SERVICES - 1;
    assert_eq!((machine::service_port(1024, 0), machine::service_disk(0)), (1280, "/dev/vdc".to_owned()));
    assert_eq!(
        (machine::service_port(1024, last), machine::service_disk(last)),
        (1292, "/dev/vdo".to_owned())
    );
}

#[test]
fn what_wakes_a_machine_is_not_shown() {
    let wake = Wake { entropy: vec![171; 4], host_name: "m1".to_owned(), ..Wake::default() };
    let shown = format!("{wake:?}");
    assert!(shown.contains("m1") && !shown.contains("171"), "{shown}");
}

#[test]
fn a_signal_that_is_none_is_refused() {
    let mut frame = Vec::new();
    ToInit::Start(Start { stop_signal: 0, ..Start::default() }).encode(&mut frame).unwrap();
    let (header, payload) = header_of(&frame, MAX_TO_INIT_BYTES);
    assert_eq!(ToInit::decode(header.kind, payload), Err(WireError::Invalid("stop signal")));
}
