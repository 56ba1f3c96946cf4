use super::*;
use crate::snapshot::fields::Fields;

fn queue(number: u16) -> QueueState {
    QueueState {
        max_size: 256,
        next_avail: number,
        next_used: number + 1,
        event_idx_enabled: true,
        size: 128,
        ready: true,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 1 << 40,
    }
}

/// Two virtual CPUs' worth of zeros, but for what tells fields apart.
fn processors() -> ProcessorsState {
    let mut fields = Writer::default();
    fields.count(0);
    fields.u32(2_000_000);
    fields.u64(77);
    fields.count(3);
    for chip in 0..3 {
        fields.u32(chip);
        fields.0.extend([chip as u8; 516]);
    }
    fields.count(2);
    let numbers = [(0x10, 5_u64), (0x6e0, 6)];
    for vcpu in 1..=2 {
        let before = [4, 144, 312, 4096, 392, 128, 1024];
        before.iter().for_each(|bytes| fields.0.extend(vec![vcpu; *bytes]));
        fields.count(numbers.len());
        for (index, data) in numbers {
            fields.u32(index);
            fields.u32(0);
            fields.u64(data);
        }
        fields.0.extend([vcpu; 64]);
    }
    let mut fields = Fields::of(&fields.0);
    let state = ProcessorsState::decode(&mut fields).unwrap();
    fields.end().unwrap();
    state
}

fn sample() -> State {
    let device = |kind, queues: u16| TransportState {
        kind,
        status: 15,
        interrupt_status: 1,
        device_features_select: 2,
        driver_features_select: 3,
        driver_features: 1 << 32,
        queue_select: 4,
        generation: 5,
        queues: (0..queues).map(queue).collect(),
        own: vec![9; usize::from(queues)],
    };
    State {
        made_of: "kernel, root".to_owned(),
        memory_mebibytes: 128,
        serial: Some(SerialState { scratch: 8, in_buffer: vec![1, 2], ..SerialState::default() }),
        processors: processors(),
        devices: vec![device(Kind::Block, 1), device(Kind::Vsock, 3)],
    }
}

/// The file with its fields changed, and a sum that says nothing of it.
fn with_fields(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let file = sample().encode();
    let mut fields = file[HEADER_BYTES..].to_vec();
    change(&mut fields);
    let mut file = Writer(MAGIC.to_vec());
    file.u32(FORMAT);
    file.count(fields.len());
    file.u32(crc32fast::hash(&fields));
    file.0.extend(fields);
    file.0
}

fn refused(file: &[u8]) -> DecodeError {
    State::decode(file).expect_err("it cannot be gone on from")
}

#[test]
fn what_was_written_is_read() {
    let file = sample().encode();
    let state = State::decode(&file).unwrap();
    assert_eq!((state.made_of.as_str(), state.memory_mebibytes), ("kernel, root", 128));
    assert_eq!(state.processors.vcpu_count(), 2);
    assert_eq!(state.devices, sample().devices);
    assert_eq!(state.encode(), file, "something was not kept");
    let without = State { serial: None, devices: Vec::new(), ..sample() }.encode();
    assert_eq!(State::decode(&without).unwrap().encode(), without);
}

#[test]
fn no_byte_can_be_missing_or_another() {
    let file = sample().encode();
    for bytes in 0..file.len() {
        refused(&file[..bytes]);
    }
    refused(&[&file[..], &[0]].concat());
    for index in 0..file.len() {
        let mut damaged = file.clone();
        damaged[index] ^= 0x10;
        refused(&damaged);
    }
    assert_eq!(refused(b"hello"), DecodeError::Foreign);
    assert!(matches!(refused(&file[..file.len() - 1]), DecodeError::Truncated { .. }));
}

#[test]
fn other_versions_are_refused_by_name() {
    let mut file = sample().encode();
    file[MAGIC.len()] = 2;
    assert_eq!(refused(&file).to_string(), "its format is 2, and this sealci-vmm reads 1");
    let other = with_fields(|fields| fields[4] = b'9');
    let error = refused(&other).to_string();
    assert!(error.starts_with("it is of sealci-vmm 9") && error.contains(MONITOR), "{error}");
}

/// A sum that is right does not make a field right.
#[test]
fn every_field_is_checked_by_itself() {
    let fields = sample().encode()[HEADER_BYTES..].to_vec();
    for bytes in 0..fields.len() {
        let cut = with_fields(|fields| fields.truncate(bytes));
        assert!(matches!(refused(&cut), DecodeError::Malformed(_) | DecodeError::Monitor { .. }), "{bytes}");
    }
    assert_eq!(
        refused(&with_fields(|fields| fields.push(0))),
        DecodeError::Malformed(Malformed { field: "end" })
    );
    let text = 4 + MONITOR.len() + 4;
    let damages: [(&str, usize, u8); 4] = [
        ("what it is made of", text, 0xff),
        ("serial line", text + "kernel, root".len() + 8, 2),
        ("interrupt controllers", text + "kernel, root".len() + 9 + 9 + 6 + 4 + 12 + 4, 7),
        ("virtual CPUs", text + "kernel, root".len() + 9 + 9 + 6 + 4 + 12 + 4 + 3 * 520, 65),
    ];
    for (field, at, value) in damages {
        let error = refused(&with_fields(|fields| fields[at] = value));
        assert_eq!(error, DecodeError::Malformed(Malformed { field }));
    }
}

#[test]
fn lengths_that_lie_make_no_room() {
    // Each length in turn says that there is more than there can be; none is believed before the bytes are there.
    let fields = sample().encode()[HEADER_BYTES..].to_vec();
    for at in 0..fields.len() - 4 {
        let file = with_fields(|fields| fields[at..at + 4].fill(0xff));
        if let Ok(state) = State::decode(&file) {
            assert_eq!(state.encode(), file);
        }
    }
}
