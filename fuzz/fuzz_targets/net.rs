//! Sends and receives frames as a hostile guest may, while frames of any size come from outside.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use sealci_fuzz::{DATA, Guest, Input, address};
use sealci_vmm::virtio::Cause;
use sealci_vmm::virtio::net::Net;

const HEADER_BYTES: u32 = 12;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    // Sockets that keep frames apart stand for a tap.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (tap, wire) = pair.expect("sockets");
    let mut guest = Guest::new(Box::new(Net::new(tap, [2, 0, 0, 0, 0, 1]).expect("a device")));
    guest.start(u64::from(input.byte()) << 24);
    guest.play(&mut input, |guest, input| match input.byte() % 8 {
        0..2 => {
            let (at, bytes) = (address(input), input.number() as u32 % 2048);
            guest.chain(0, &[(at, HEADER_BYTES, true), (DATA, bytes, true)]);
            guest.run(Cause::Queue(0));
        }
        2..4 => {
            let (at, bytes) = (address(input), input.number() as u32);
            guest.chain(1, &[(DATA, HEADER_BYTES, false), (at, bytes, false)]);
            guest.run(Cause::Queue(1));
        }
        4..6 => {
            let bytes = input.number() as usize % 4096;
            let _ = send(&wire, &[0x55; 4096][..bytes], SendFlags::empty());
            guest.run(Cause::Ready);
        }
        _ => drop(recv(&wire, &mut [0; 4096][..], RecvFlags::DONTWAIT)),
    });
});
