//! Asks for random bytes as a hostile guest may; where it leaves its queue alone, nothing but the buffers it gives is written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{DATA, Guest, Input};
use sealci_vmm::virtio::Cause;
use sealci_vmm::virtio::entropy::Entropy;
use vm_memory::{Bytes as _, GuestAddress};

const BESIDE: [u8; 6] = *b"beside";

fn ask(guest: &mut Guest, input: &mut Input<'_>) -> GuestAddress {
    let bytes = input.number() % 0x5000;
    let beside = GuestAddress(DATA + bytes);
    guest.fill(beside.0, &BESIDE);
    guest.chain(0, &[(DATA, bytes as u32, true)]);
    guest.run(Cause::Queue(0));
    beside
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut guest = Guest::new(Box::new(Entropy));
    let choice = input.byte();
    guest.start(u64::from(choice) << 24);
    if choice & 1 == 0 {
        return guest.play(&mut input, |guest, input| {
            ask(guest, input);
        });
    }
    guest.play_only(&mut input, |guest, input| {
        let beside = ask(guest, input);
        assert_eq!(guest.memory.read_obj::<[u8; 6]>(beside).expect("memory"), BESIDE);
    });
});
