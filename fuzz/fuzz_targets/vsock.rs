//! Talks to the host's sockets as a hostile guest may, while their other ends come, go and stop reading: memory stays bounded,
//! and the device comes to an end with whatever there is to do.
#![no_main]

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use sealci_fuzz::{DATA, Guest, Input, address};
use sealci_vmm::virtio::Cause;
use sealci_vmm::virtio::vsock::{HostEnd, Vsock};

const PORTS: u32 = 3;
const HEADER_BYTES: u32 = 44;

/// The host's ends.
struct Host {
    ends: Vec<Option<UnixStream>>,
}

impl Host {
    fn act(&mut self, input: &mut Input<'_>) {
        let port = usize::from(input.byte()) % self.ends.len();
        let Some(end) = &mut self.ends[port] else { return };
        match input.byte() % 6 {
            0 => self.ends[port] = None,
            1 => {
                let _ = end.shutdown(input.choice(&[Shutdown::Read, Shutdown::Write, Shutdown::Both]));
            }
            2 | 3 => {
                let mut piece = [0; 8192];
                if let Err(error) = end.read(&mut piece) {
                    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionReset));
                }
            }
            _ => {
                let length = input.number() as usize % 9000;
                let _ = end.write(&[0x11; 9000][..length]);
            }
        }
    }
}

fn packet(guest: &mut Guest, input: &mut Input<'_>) {
    let operation = u16::from(input.choice(&[1u8, 5, 5, 5, 4, 6, 3, 7, 2, 0]));
    let flags = u32::from(input.byte());
    let (guest_port, host_port) = (u32::from(input.byte() % 4), u32::from(input.byte()) % (PORTS + 1));
    let length = input.number() as u32;
    let (alloc, forwarded) = (input.number() as u32, input.number() as u32);
    let kind = if flags & 0x80 == 0 { 1u16 } else { 2 };
    let header = [
        &3u64.to_le_bytes()[..],
        &2u64.to_le_bytes(),
        &guest_port.to_le_bytes(),
        &host_port.to_le_bytes(),
        &length.to_le_bytes(),
        &kind.to_le_bytes(),
        &operation.to_le_bytes(),
        &flags.to_le_bytes(),
        &alloc.to_le_bytes(),
        &forwarded.to_le_bytes(),
    ];
    guest.fill(DATA, &header.concat());
    guest.chain(1, &[(DATA, HEADER_BYTES, false), (DATA + 0x100, length.min(0x4000), false)]);
    guest.run(Cause::Queue(1));
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let (mut ends, mut host) = (BTreeMap::new(), Host { ends: Vec::new() });
    for port in 1..=PORTS {
        let (outer, inner) = UnixStream::pair().expect("sockets");
        outer.set_nonblocking(true).expect("a socket");
        ends.insert(port, HostEnd::Connected(inner));
        host.ends.push(Some(outer));
    }
    let mut guest = Guest::new(Box::new(Vsock::new(3, ends).expect("a device")));
    guest.start(input.number() << 24);
    guest.play(&mut input, |guest, input| match input.byte() % 8 {
        0..4 => packet(guest, input),
        4 => host.act(input),
        5 => {
            host.act(input);
            guest.run(Cause::Ready);
        }
        _ => {
            let (at, bytes) = (address(input), 44 + input.number() as u32 % 4096);
            guest.chain(0, &[(at, bytes, true)]);
            guest.run(Cause::Queue(0));
        }
    });
});
