//! Reports memory to be free as a hostile guest may; where it leaves its queues alone, nothing changes but whole pages of what it
//! reported, which read as zeros.
#![no_main]

use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{DATA, Guest, Input};
use sealci_vmm::virtio::Cause;
use sealci_vmm::virtio::balloon::Balloon;
use vm_memory::{Bytes as _, GuestAddress};

const REPORTS: usize = 2;
const PAGE: u64 = 0x1000;

fn report(guest: &mut Guest, input: &mut Input<'_>) -> Range<u64> {
    let begin = 2 * PAGE + input.number() % (3 * PAGE);
    let end = begin + input.number() % (3 * PAGE);
    guest.chain(REPORTS, &[(begin, (end - begin) as u32, true)]);
    guest.run(Cause::Queue(REPORTS));
    begin..end
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut guest = Guest::new(Box::new(Balloon::default()));
    let choice = input.byte();
    guest.start(u64::from(choice) << 24 | 1 << 5);
    if choice & 1 == 0 {
        return guest.play(&mut input, |guest, input| {
            report(guest, input);
        });
    }
    guest.play_only(&mut input, |guest, input| {
        let marks: Vec<_> = (DATA..8 * PAGE).step_by(0x400).collect();
        for mark in &marks {
            guest.fill(*mark, &[7]);
        }
        let reported = report(guest, input);
        for mark in marks {
            let page = mark & !(PAGE - 1);
            let is_whole = reported.start <= page && page + PAGE <= reported.end;
            let found: u8 = guest.memory.read_obj(GuestAddress(mark)).expect("memory");
            assert!(found == 7 || found == 0 && is_whole, "{mark:#x} of {reported:x?}");
        }
    });
});
