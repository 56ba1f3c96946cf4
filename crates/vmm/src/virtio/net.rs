//! Connects a guest to a network by a tap of the host's, which is made and named by whoever starts the machine
//! (virtio 1.2, section 5.1).
//!
//! One frame is one read or write of the tap, straight from or into the guest's memory. Nothing is computed for the guest: no
//! checksums and no segments, so the header before each frame says nothing. A frame that there is no room for is lost, as on
//! any network, and one in more than 64 pieces is cut. The tap has no header of its own (`IFF_NO_PI`, no `IFF_VNET_HDR`) and does not block.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

use super::{Broken, Cause, Device, Kind, Queues, sys};

const FEATURE_MAC: u64 = 1 << 5;

const RX: usize = 0;
const TX: usize = 1;

/// Before each frame; of what comes in, its last field says that the frame lies in one chain.
const HEADER_BYTES: usize = 12;
const RECEIVED: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: OwnedFd,
    mac: [u8; 6],
    /// Edge-triggered: a tap whose frames the guest has no room for keeps nobody awake.
    epoll: Arc<OwnedFd>,
    readable: bool,
}

impl Net {
    /// A card of this address, on the tap of this name in this process's network namespace.
    pub fn open(tap: &str, mac: [u8; 6]) -> io::Result<Self> {
        Self::new(sys::open_tap(tap)?, mac)
    }

    /// A card of this address, on a tap that does not block.
    pub fn new(tap: OwnedFd, mac: [u8; 6]) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &tap, EventData::new_u64(0), EventFlags::IN | EventFlags::ET)?;
        Ok(Self { tap, mac, epoll: Arc::new(epoll), readable: true })
    }

    /// Sends what the guest has to send.
    fn take(&self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while let Some(mut chain) = queues.pop(TX)? {
            if chain.readable.split_front(HEADER_BYTES).bytes() < HEADER_BYTES {
                return Err(Broken::Request);
            }
            // What the tap does not take is lost.
            let _ = sys::write(self.tap.as_fd(), &chain.readable);
            queues.push(TX, chain.head, 0)?;
        }
        Ok(())
    }

    /// Receives as many frames as the guest has room for.
    fn give(&mut self, queues: &mut Queues<'_>) -> Result<(), Broken> {
        while self.readable {
            let Some(mut chain) = queues.pop(RX)? else { return Ok(()) };
            let mut header = chain.writable.split_front(HEADER_BYTES);
            if header.bytes() < HEADER_BYTES || chain.writable.bytes() == 0 {
                return Err(Broken::Request);
            }
            match sys::read(self.tap.as_fd(), &chain.writable) {
                Ok(bytes) if bytes > 0 => {
                    header.write(&RECEIVED);
                    queues.push(RX, chain.head, (HEADER_BYTES + bytes) as u32)?;
                }
                // Nothing now, or nobody any more.
                _ => {
                    self.readable = false;
                    queues.put_back(RX);
                }
            }
        }
        Ok(())
    }
}

impl Device for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        FEATURE_MAC
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    fn config(&self) -> &[u8] {
        &self.mac
    }

    fn watched(&self) -> Option<Arc<OwnedFd>> {
        Some(self.epoll.clone())
    }

    fn ready(&mut self) {
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 1];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It fails by a signal only, and is asked again then.
        let _ = epoll::wait(&self.epoll, &mut events, Some(&now));
        self.readable = true;
    }

    fn serve(&mut self, _: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        self.take(queues)?;
        self.give(queues)
    }

    fn reset(&mut self) {
        self.readable = true;
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    use super::super::driver::{DATA, Driver, Part, QUEUE_SIZE};
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    /// A pair of sockets that keep frames apart stands for a tap and what is behind it.
    fn card() -> (Driver, OwnedFd) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (Driver::started(Net::new(tap, MAC).unwrap(), FEATURE_MAC), wire)
    }

    fn ready(driver: &Driver) {
        while driver.transport.run(Cause::Ready) {}
    }

    fn frame(wire: &OwnedFd) -> Option<Vec<u8>> {
        let mut frame = [0; 2048];
        let bytes = rustix::io::read(wire, &mut frame).ok()?;
        Some(frame[..bytes].to_vec())
    }

    #[test]
    fn a_frame_goes_out_without_its_header() {
        let (mut driver, wire) = card();
        assert_eq!(driver.config(0, 6), MAC);
        // Whatever the header says, nothing is done about it.
        let head = [&[0xff; HEADER_BYTES][..], b"fra"].concat();
        let chain = driver.offer(TX, &[Part::Read(&head[..5]), Part::Read(&head[5..]), Part::Read(b"me")]);
        driver.notify(TX);
        assert_eq!(driver.used(TX), Some((chain, 0)));
        assert_eq!(frame(&wire).unwrap(), b"frame");
        assert_eq!(frame(&wire), None);
    }

    #[test]
    fn a_tap_that_is_not_there_is_not_made() {
        let error = Net::open("sealci-none", MAC).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn frames_wait_until_the_guest_has_room() {
        let (mut driver, wire) = card();
        for text in [b"one", b"two"] {
            send(&wire, text, SendFlags::empty()).unwrap();
        }
        ready(&driver);
        assert_eq!(driver.used(RX), None);
        for (buffer, text) in [(DATA, b"one"), (DATA + 0x1000, b"two")] {
            let chain = driver.offer(RX, &[Part::Write(buffer, 1526)]);
            driver.notify(RX);
            assert_eq!(driver.used(RX), Some((chain, 15)));
            assert_eq!(driver.bytes(buffer, 12), RECEIVED);
            assert_eq!(driver.bytes(buffer + 12, 3), text);
        }
        driver.offer(RX, &[Part::Write(DATA, 1526)]);
        driver.notify(RX);
        assert_eq!(driver.used(RX), None);
        send(&wire, b"three", SendFlags::empty()).unwrap();
        ready(&driver);
        assert_eq!(driver.used(RX).map(|(_, written)| written), Some(17));
    }

    #[test]
    fn what_the_tap_does_not_take_is_lost_and_nothing_more() {
        let (mut driver, wire) = card();
        drop(wire);
        for _ in 0..2 * QUEUE_SIZE {
            let chain = driver.offer(TX, &[Part::Read(&[0; HEADER_BYTES]), Part::Read(b"frame")]);
            driver.notify(TX);
            assert_eq!(driver.used(TX), Some((chain, 0)));
        }
        driver.offer(RX, &[Part::Write(DATA, 1526)]);
        driver.notify(RX);
        assert_eq!((driver.used(RX), driver.transport.broken()), (None, None));
    }

    #[test]
    fn chains_without_room_for_a_header_break_the_device() {
        let (mut driver, wire) = card();
        driver.offer(TX, &[Part::Read(&[0; HEADER_BYTES - 1])]);
        driver.notify(TX);
        assert_eq!(driver.transport.broken(), Some(Broken::Request));
        driver = card().0;
        driver.offer(RX, &[Part::Write(DATA, HEADER_BYTES as u32)]);
        driver.notify(RX);
        assert_eq!(driver.transport.broken(), Some(Broken::Request));
        drop(wire);
    }
}
