//! Reads any bytes as what a snapshot keeps of a machine: what is understood is written the same, and devices go on from it or refuse.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{Guest, Input, within};
use sealci_vmm::snapshot::State;
use sealci_vmm::virtio::balloon::Balloon;
use sealci_vmm::virtio::entropy::Entropy;
use sealci_vmm::virtio::vsock::Vsock;
use sealci_vmm::virtio::{Device, Kind};

/// What comes before the devices, of a machine with one virtual CPU.
fn skeleton() -> Vec<u8> {
    const VERSION: &str = env!("CARGO_PKG_VERSION");
    // KVM's structures: an interrupt controller behind its number; registers up to those by number, and events behind these.
    const CHIP_BYTES: usize = 516;
    const REGISTERS_BYTES: usize = 6100;
    const EVENTS_BYTES: usize = 64;
    let mut fields = (VERSION.len() as u32).to_le_bytes().to_vec();
    fields.extend(VERSION.bytes());
    // Made of nothing, with 64 MiB and no serial line; it tells nothing of itself, its clock and its frequency are 0.
    fields.extend([0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0]);
    fields.extend([0; 16]);
    fields.extend(3_u32.to_le_bytes());
    for chip in 0..3_u32 {
        fields.extend(chip.to_le_bytes());
        fields.extend([0; CHIP_BYTES]);
    }
    fields.extend(1_u32.to_le_bytes());
    fields.extend([0; REGISTERS_BYTES + 4 + EVENTS_BYTES]);
    fields
}

/// Some bytes of what comes first are others, and the devices are the fuzzer's.
fn fields(input: &mut Input<'_>) -> Vec<u8> {
    let mut fields = skeleton();
    if input.is_empty() {
        fields.extend([0; 4]);
        assert!(State::decode_fields(&fields).is_ok(), "the skeleton is none any more");
        return fields;
    }
    for _ in 0..input.byte() % 4 {
        let at = input.number() as usize % fields.len();
        fields[at] = input.byte();
    }
    fields.extend(input.rest());
    fields
}

fn device(kind: Kind) -> Option<Box<dyn Device>> {
    match kind {
        Kind::Entropy => Some(Box::new(Entropy)),
        Kind::Balloon => Some(Box::new(Balloon::default())),
        Kind::Vsock => Some(Box::new(Vsock::new(3, [].into()).expect("a device"))),
        Kind::Net | Kind::Block => None,
    }
}

fuzz_target!(|data: &[u8]| {
    assert!(State::decode(data).is_err(), "a sum that is right by chance");
    let fields = fields(&mut Input(data));
    // Lists grow by doubling, and a device of a few bytes takes some hundred.
    let enough = 16 * fields.len() + (1 << 16);
    let Ok(state) = within(enough, || State::decode_fields(&fields)) else { return };
    let file = state.encode();
    assert!(file.ends_with(&fields), "two ways to say one thing");
    let again = State::decode(&file).expect("what was written can be read");
    assert_eq!(again.encode(), file);
    for state in &state.devices {
        if let Some(device) = device(state.kind) {
            Guest::new(device).go_on(state);
        }
    }
});
