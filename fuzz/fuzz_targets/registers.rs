//! Writes anything into the registers of virtio devices: no order of accesses does more than make one need a reset.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{Guest, Input};
use sealci_vmm::virtio::balloon::Balloon;
use sealci_vmm::virtio::block::{Access, Block};
use sealci_vmm::virtio::entropy::Entropy;
use sealci_vmm::virtio::vsock::Vsock;
use sealci_vmm::virtio::{Cause, Device};

/// A device, made from the fuzzer's choice.
fn device(chosen: u8) -> Box<dyn Device> {
    let nothing = || std::fs::File::open("/dev/null").expect("it is always there");
    match chosen % 4 {
        0 => Box::new(Entropy),
        1 => Box::new(Balloon::default()),
        2 => Box::new(
            Block::new(nothing(), Access::ReadOnly, "a serial number that is too long").expect("a disk"),
        ),
        _ => Box::new(Vsock::new(3, [].into()).expect("a device")),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut guest = Guest::new(device(input.byte()));
    // Nothing but registers for most of the steps: their values are small numbers, so that the right ones are met.
    guest.play(&mut input, |guest, input| match input.byte() {
        0..200 => guest.advance(input.byte()),
        _ => guest.run(Cause::Ready),
    });
});
