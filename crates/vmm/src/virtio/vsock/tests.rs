use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::super::driver::{DATA, Driver, Part, QUEUE_SIZE};
use super::packet::{NO_MORE_SENT, NO_MORE_TAKEN};
use super::*;
use Operation::*;

const CID: u32 = 3;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 77;
const BUFFER_BYTES: u32 = 4096;
const ALLOC: u32 = 64 << 10;

/// A guest's side: what it sends, and the buffers it has for what comes.
struct Guest {
    driver: Driver,
    /// Buffers by the chain they are in.
    buffers: BTreeMap<u16, u64>,
    free: Vec<u64>,
    alloc: u32,
    forwarded: u32,
}

impl Guest {
    fn over(ends: impl IntoIterator<Item = (u32, HostEnd)>) -> Self {
        let device = Vsock::new(CID, ends.into_iter().collect()).unwrap();
        let free = (0..u64::from(QUEUE_SIZE)).map(|index| DATA + index * 0x2000).collect();
        let driver = Driver::started(device, 0);
        let mut guest = Self { driver, buffers: BTreeMap::new(), free, alloc: ALLOC, forwarded: 0 };
        guest.refill(usize::from(QUEUE_SIZE));
        guest
    }

    /// Connected, with the host's end of the connection.
    fn connected() -> (Self, UnixStream) {
        let (host, end) = UnixStream::pair().unwrap();
        host.set_nonblocking(true).unwrap();
        let mut guest = Self::over([(PORT, HostEnd::Connected(end))]);
        guest.send(Request, b"");
        assert_eq!(guest.operations(), [Response]);
        guest.ready();
        (guest, host)
    }

    fn refill(&mut self, most: usize) {
        for _ in 0..most {
            let Some(buffer) = self.free.pop() else { break };
            let chain = self.driver.offer(RX, &[Part::Write(buffer, BUFFER_BYTES)]);
            self.buffers.insert(chain, buffer);
        }
        self.driver.notify(RX);
    }

    fn header(&self, operation: Operation, data: &[u8]) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: PORT,
            len: data.len() as u32,
            kind: STREAM,
            operation: operation as u16,
            flags: 0,
            buf_alloc: self.alloc,
            fwd_cnt: self.forwarded,
        }
    }

    fn send(&mut self, operation: Operation, data: &[u8]) {
        self.send_header(self.header(operation, data), data);
    }

    fn end(&mut self, flags: u32) {
        self.send_header(Header { flags, ..self.header(Operation::Shutdown, b"") }, b"");
    }

    fn send_header(&mut self, header: Header, data: &[u8]) {
        // Data in pieces, as newer kernels send it.
        let (first, second) = data.split_at(data.len() / 2);
        let header = header.encode();
        self.driver.offer(TX, &[Part::Read(&header), Part::Read(first), Part::Read(second)]);
        self.driver.notify(TX);
        assert!(self.driver.used(TX).is_some(), "{:?}", self.driver.transport.broken());
    }

    fn ready(&self) {
        while self.driver.transport.run(Cause::Ready) {}
    }

    /// What has come; its buffers are free.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some((chain, written)) = self.driver.used(RX) {
            let buffer = self.buffers.remove(&chain).expect("a buffer that was offered");
            self.free.push(buffer);
            let mut header = [0; HEADER_BYTES];
            self.driver.memory.read_slice(&mut header, GuestAddress(buffer)).unwrap();
            let header = Header::decode(&header);
            assert_eq!(written, HEADER_BYTES as u32 + header.len);
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID.into(), STREAM));
            let data = self.driver.bytes(buffer + HEADER_BYTES as u64, header.len as usize);
            all.push((header, data));
        }
        self.refill(usize::from(QUEUE_SIZE));
        all
    }

    fn operations(&mut self) -> Vec<Operation> {
        let received = self.received();
        received.iter().map(|(header, _)| Operation::from_wire(header.operation).unwrap()).collect()
    }
}

fn read_all(host: &mut impl io::Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match host.read_to_end(&mut bytes) {
        Ok(_) => bytes.push(b'$'),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
    }
    bytes
}

#[test]
fn a_guest_talks_with_a_listener() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut guest = Guest::over([(PORT, HostEnd::Listener(path))]);
    assert_eq!(guest.driver.config(0, 8), 3u64.to_le_bytes());
    guest.send(Request, b"");
    let (header, _) = guest.received().remove(0);
    assert_eq!((header.operation, header.src_port, header.dst_port), (Response as u16, PORT, GUEST_PORT));
    assert_eq!(header.buf_alloc, WINDOW_BYTES as u32);
    let mut host = listener.accept().unwrap().0;
    host.set_nonblocking(true).unwrap();
    guest.send(Data, b"from the guest");
    guest.ready();
    assert_eq!(read_all(&mut host), b"from the guest");
    host.write_all(b"from the host").unwrap();
    guest.ready();
    let (header, data) = guest.received().remove(0);
    assert_eq!((header.operation, header.fwd_cnt, data.as_slice()), (Data as u16, 14, &b"from the host"[..]));
    assert_eq!(guest.operations(), []);
}

#[test]
fn what_nothing_stands_behind_is_refused() {
    let mut guest = Guest::over([(PORT, HostEnd::Listener("/nowhere/socket".into()))]);
    guest.send(Request, b"");
    assert_eq!(guest.operations(), [Reset]);
    let (_host, end) = UnixStream::pair().unwrap();
    let mut guest = Guest::over([(PORT, HostEnd::Connected(end))]);
    guest.send_header(Header { dst_port: 1, ..guest.header(Request, b"") }, b"");
    assert_eq!(guest.operations(), [Reset]);
    guest.send(Request, b"");
    assert_eq!(guest.operations(), [Response]);
    guest.send_header(Header { src_port: 1, ..guest.header(Request, b"") }, b"");
    assert_eq!(guest.operations(), [Reset], "a connected socket is one connection's");
}

#[test]
fn a_listener_that_does_not_accept_holds_nobody_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut guest = Guest::over([(PORT, HostEnd::Listener(path))]);
    let mut answers = Vec::new();
    for port in 0..2 * MOST_CONNECTIONS as u32 {
        guest.send_header(Header { src_port: port, ..guest.header(Request, b"") }, b"");
        answers.extend(guest.operations());
    }
    let accepted = answers.iter().filter(|answer| **answer == Response).count();
    assert!((1..=MOST_CONNECTIONS).contains(&accepted), "{accepted}");
    assert_eq!(answers.len(), 2 * MOST_CONNECTIONS);
    assert!(answers.ends_with(&[Reset; 10]));
}

#[test]
fn packets_that_cannot_be_are_refused() {
    type Damage = fn(&mut Header);
    let refused: &[Damage] = &[
        |header| header.kind = 2,
        |header| header.operation = 0,
        |header| header.operation = 99,
        |header| header.operation = Response as u16,
        |header| header.len = 5,
        |header| header.len = u32::MAX,
        |header| header.src_port = 1,
        |header| header.operation = Request as u16,
    ];
    for (index, damage) in refused.iter().enumerate() {
        let (mut guest, _host) = Guest::connected();
        let mut header = guest.header(Data, b"abcd");
        damage(&mut header);
        guest.send_header(header, b"abcd");
        assert_eq!(guest.operations(), [Reset], "damage {index}");
    }
    let ignored: &[Damage] = &[
        |header| header.src_cid = 4,
        |header| header.src_cid = 2,
        |header| header.dst_cid = 1,
        |header| header.dst_cid = 3,
        |header| header.operation = Reset as u16,
    ];
    for (index, damage) in ignored.iter().enumerate() {
        let (mut guest, mut host) = Guest::connected();
        let mut header = guest.header(Data, b"abcd");
        damage(&mut header);
        guest.send_header(header, b"abcd");
        assert_eq!(guest.operations(), [], "damage {index}");
        assert!([&b""[..], b"$"].contains(&read_all(&mut host).as_slice()), "damage {index}");
    }
}

#[test]
fn a_packet_without_a_header_breaks_the_device() {
    let (mut guest, mut host) = Guest::connected();
    guest.driver.offer(TX, &[Part::Read(&[0; 43])]);
    guest.driver.notify(TX);
    assert_eq!(guest.driver.transport.broken(), Some(Broken::Request));
    assert_eq!(read_all(&mut host), b"$", "its connections are gone");
    guest.ready();
    let device = Vsock::new(CID, BTreeMap::new()).unwrap();
    let mut driver = Driver::started(device, 0);
    driver.offer(RX, &[Part::Write(DATA, 43)]);
    let header = guest.header(Data, b"").encode();
    driver.offer(TX, &[Part::Read(&header)]);
    driver.notify(TX);
    assert_eq!(driver.transport.broken(), Some(Broken::Request), "no room for a header");
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_reset() {
    let (mut guest, _host) = Guest::connected();
    let piece = vec![7; 32 << 10];
    let mut sent = 0;
    let mut answers = Vec::new();
    while answers.is_empty() {
        guest.send(Data, &piece);
        sent += piece.len();
        answers = guest.operations();
        answers.retain(|answer| *answer != CreditUpdate);
        assert!(sent < 10 << 20);
    }
    assert_eq!(answers, [Reset]);
}

#[test]
fn what_the_host_does_not_read_is_kept_and_what_it_reads_is_told() {
    let (mut guest, mut host) = Guest::connected();
    let bytes: Vec<u8> = (0..1u32 << 20).map(|index| (index % 251) as u8).collect();
    let (mut sent, mut read, mut told, mut updates) = (0usize, Vec::new(), 0u32, 0);
    while read.len() < bytes.len() {
        let may = WINDOW_BYTES - (sent - told as usize);
        let next = may.min(20_000).min(bytes.len() - sent);
        if next > 0 {
            guest.send(Data, &bytes[sent..sent + next]);
            sent += next;
        } else {
            let mut piece = [0; 100_000];
            let got = host.read(&mut piece).unwrap();
            read.extend_from_slice(&piece[..got]);
            guest.ready();
        }
        for (header, _) in guest.received() {
            assert_eq!(header.operation, CreditUpdate as u16);
            told = header.fwd_cnt;
            updates += 1;
        }
    }
    assert_eq!(read, bytes);
    assert!((4..40).contains(&updates), "{updates} updates");
}

#[test]
fn the_host_is_read_only_as_far_as_the_guest_takes_it() {
    let (mut guest, mut host) = Guest::connected();
    let sent = vec![9; 100_000];
    let written = host.write(&sent).unwrap();
    guest.alloc = 10_000;
    guest.send(CreditUpdate, b"");
    let mut got = 0;
    for round in 1..=3 {
        guest.ready();
        loop {
            let received = guest.received();
            if received.is_empty() {
                break;
            }
            got += received.iter().map(|(_, data)| data.len()).sum::<usize>();
        }
        assert_eq!(got, (10_000 * round).min(written));
        guest.forwarded = got as u32;
        guest.send(CreditUpdate, b"");
    }
    // One that says it has passed on what it was never sent gets nothing.
    guest.received();
    guest.forwarded = u32::MAX / 2;
    guest.send(CreditUpdate, b"");
    guest.received();
    assert_eq!(guest.operations(), []);
}

#[test]
fn a_question_for_credit_is_answered() {
    let (mut guest, _host) = Guest::connected();
    guest.send(CreditRequest, b"");
    assert_eq!(guest.operations(), [CreditUpdate]);
}

#[test]
fn the_guest_ends_its_half_and_then_the_other() {
    let (mut guest, mut host) = Guest::connected();
    guest.send(Data, b"the last");
    guest.end(NO_MORE_SENT);
    assert_eq!(read_all(&mut host), b"the last$");
    host.write_all(b"an answer").unwrap();
    guest.ready();
    assert_eq!(guest.received()[0].1, b"an answer");
    guest.end(NO_MORE_SENT | NO_MORE_TAKEN);
    assert_eq!(guest.operations(), [Reset]);
    assert!(host.write(b"too late").is_err());
    guest.send(Data, b"gone");
    assert_eq!(guest.operations(), [Reset]);
}

#[test]
fn data_after_the_end_of_its_half_is_refused() {
    let (mut guest, _host) = Guest::connected();
    guest.end(NO_MORE_SENT);
    guest.send(Data, b"more");
    assert_eq!(guest.operations(), [Reset]);
}

#[test]
fn the_host_ends_its_half_and_then_the_other() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"the last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.ready();
    let received = guest.received();
    assert_eq!((received[0].1.as_slice(), received.len()), (&b"the last"[..], 2));
    assert_eq!((received[1].0.operation, received[1].0.flags), (Operation::Shutdown as u16, NO_MORE_SENT));
    guest.send(Data, b"an answer");
    assert_eq!(read_all(&mut host), b"an answer");
    drop(host);
    guest.ready();
    let received = guest.received();
    assert_eq!((received[0].0.flags, received.len()), (NO_MORE_SENT | NO_MORE_TAKEN, 1));
    guest.send(Reset, b"");
    assert_eq!(guest.operations(), []);
}

#[test]
fn what_a_host_sent_before_it_left_is_read_to_its_end() {
    let (mut guest, mut host) = Guest::connected();
    guest.alloc = 3;
    guest.send(CreditUpdate, b"");
    host.write_all(b"abcdef").unwrap();
    drop(host);
    guest.ready();
    guest.send(Data, b"into the void");
    let received = guest.received();
    assert_eq!((received[0].1.as_slice(), received.len()), (&b"abc"[..], 1));
    guest.forwarded = 3;
    guest.send(CreditUpdate, b"");
    let received = guest.received();
    assert_eq!((received[0].1.as_slice(), received.len()), (&b"def"[..], 1));
    guest.forwarded = 6;
    guest.send(CreditUpdate, b"");
    let received = guest.received();
    assert_eq!((received[0].0.flags, received.len()), (NO_MORE_SENT | NO_MORE_TAKEN, 1));
}

#[test]
fn what_a_guest_sent_before_it_left_reaches_the_host() {
    let (mut guest, mut host) = Guest::connected();
    host.write_all(b"never read").unwrap();
    let mut told = 0;
    let mut sent = 0usize;
    // Until the socket and what is kept for it are full.
    while WINDOW_BYTES - (sent - told) >= 4096 {
        guest.send(Data, &[5; 4096]);
        sent += 4096;
        for (header, _) in guest.received() {
            told = header.fwd_cnt as usize;
        }
    }
    guest.end(NO_MORE_SENT | NO_MORE_TAKEN);
    guest.send(Reset, b"");
    assert!(!guest.operations().contains(&Reset), "it is not answered: the guest has forgotten it");
    let mut read = 0;
    let mut piece = [0; 50_000];
    loop {
        match host.read(&mut piece) {
            Ok(0) => break,
            Ok(bytes) => read += bytes,
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
        guest.ready();
    }
    assert_eq!(read, sent);
}

#[test]
fn refusals_wait_for_the_guest_and_are_bounded() {
    let mut guest = Guest::over([]);
    // Takes the buffers away.
    for port in 0..u32::from(QUEUE_SIZE) {
        guest.send_header(Header { src_port: port, ..guest.header(Data, b"") }, b"");
    }
    let header = guest.header(Data, b"").encode();
    let mut taken = 0;
    for _ in 0..2 * MOST_REFUSALS {
        guest.driver.offer(TX, &[Part::Read(&header)]);
        guest.driver.notify(TX);
        if guest.driver.used(TX).is_none() {
            break;
        }
        taken += 1;
    }
    assert_eq!(taken, MOST_REFUSALS);
    // Room for them has it go on with what the guest has sent.
    let mut answers = 0;
    loop {
        let received = guest.operations();
        if received.is_empty() {
            break;
        }
        assert!(received.iter().all(|operation| *operation == Reset));
        answers += received.len();
    }
    assert_eq!(answers, usize::from(QUEUE_SIZE) + MOST_REFUSALS + 1);
    assert!(guest.driver.used(TX).is_some());
}

#[test]
fn connections_that_come_and_go_leave_nothing_in_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut device = Vsock::new(CID, BTreeMap::from([(PORT, HostEnd::Listener(path))])).unwrap();
    let header = |operation: Operation| Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        dst_port: PORT,
        kind: STREAM,
        operation: operation as u16,
        ..Header::default()
    };
    for _ in 0..1000 {
        device.take(header(Request), Buffers::default());
        assert_eq!((device.connections.len(), device.line.len()), (1, 1));
        device.take(header(Reset), Buffers::default());
        assert_eq!((device.connections.len(), device.line.len(), device.refusals.len()), (0, 0, 0));
        drop(listener.accept());
    }
}

/// Goes on with a new device from what was saved of this one.
fn go_on(guest: &mut Guest, ends: impl IntoIterator<Item = (u32, HostEnd)>) {
    let state = guest.driver.transport.state();
    let device = Vsock::new(CID, ends.into_iter().collect()).unwrap();
    let interrupt = Arc::new(super::super::driver::Count::default());
    let again = super::super::mmio::Transport::new(Box::new(device), guest.driver.memory.clone(), interrupt);
    again.restore(&state).unwrap();
    guest.driver.transport = again;
    guest.ready();
}

#[test]
fn a_guest_that_goes_on_is_told_that_its_connections_are_gone() {
    let (mut guest, _host) = Guest::connected();
    let (host, end) = UnixStream::pair().unwrap();
    go_on(&mut guest, [(PORT, HostEnd::Connected(end))]);
    assert_eq!(guest.operations(), [Reset]);
    guest.send(Data, b"old");
    assert_eq!(guest.operations(), [Reset]);
    // What it begins then stays.
    guest.send(Request, b"");
    assert_eq!(guest.operations(), [Response]);
    guest.ready();
    guest.send(Data, b"new");
    host.set_nonblocking(true).unwrap();
    assert_eq!(read_all(&mut &host), b"new");
}

#[test]
fn who_waits_for_a_snapshot_is_answered_by_it() {
    let (calls, called) = std::sync::mpsc::channel();
    let end = HostEnd::Waiting(Box::new(move || calls.send(()).unwrap()));
    let mut guest = Guest::over([(PORT, end)]);
    guest.send(Request, b"");
    called.try_recv().unwrap();
    guest.ready();
    assert_eq!(guest.operations(), [], "it waits");
    go_on(&mut guest, []);
    assert_eq!(guest.operations(), [Reset]);
    go_on(&mut guest, []);
    assert_eq!(guest.operations(), [], "it was told");
}

#[test]
fn who_gave_up_waiting_is_forgotten() {
    let mut guest = Guest::over([(PORT, HostEnd::Waiting(Box::new(|| ())))]);
    guest.send(Request, b"");
    guest.send(Reset, b"");
    go_on(&mut guest, []);
    assert_eq!(guest.operations(), []);
}

#[test]
fn connections_that_cannot_have_been_are_refused() {
    let (guest, _host) = Guest::connected();
    let good = guest.driver.transport.state();
    assert_eq!(good.own, [77, 0, 0, 0, 0, 4, 0, 0]);
    let most = MOST_CONNECTIONS + MOST_REFUSALS;
    for (bytes, is_good) in [(0, true), (8 * most, true), (8 * most + 8, false), (7, false)] {
        let mut state = good.clone();
        state.own = vec![0; bytes];
        assert_eq!(guest.driver.transport.restore(&state).is_ok(), is_good, "{bytes}");
    }
}

/// A step of a random conversation.
#[derive(Debug, Clone, Copy)]
enum Step {
    GuestSends(usize),
    GuestReads,
    HostSends(usize),
    HostReads(usize),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever the order and the pieces, each side reads what the other has sent, and the guest's credit is never passed.
    #[test]
    fn both_ways_keep_every_byte(
        steps in prop::collection::vec(
            prop_oneof![
                (1..30_000usize).prop_map(Step::GuestSends),
                Just(Step::GuestReads),
                (1..30_000usize).prop_map(Step::HostSends),
                (1..60_000usize).prop_map(Step::HostReads),
            ],
            1..60,
        ),
        alloc in 1..60_000u32,
    ) {
        let (mut guest, mut host) = Guest::connected();
        guest.alloc = alloc;
        guest.send(CreditUpdate, b"");
        let (mut from_guest, mut at_host, mut from_host, mut at_guest) = (vec![], vec![], vec![], vec![]);
        let mut told = 0u32;
        let ends = [Step::HostReads(60_000), Step::GuestReads].repeat(100);
        for (number, step) in steps.into_iter().chain(ends).enumerate() {
            match step {
                Step::GuestSends(bytes) => {
                    let may = WINDOW_BYTES - (from_guest.len() - told as usize);
                    let data = vec![number as u8; bytes.min(may)];
                    guest.send(Data, &data);
                    from_guest.extend(data);
                }
                Step::GuestReads => {
                    guest.ready();
                    for (header, data) in guest.received() {
                        told = header.fwd_cnt;
                        at_guest.extend(data);
                    }
                    prop_assert!(at_guest.len() as u32 - guest.forwarded <= alloc);
                    guest.forwarded = at_guest.len() as u32;
                    guest.send(CreditUpdate, b"");
                }
                Step::HostSends(bytes) => {
                    let data = vec![number as u8; bytes];
                    let written = host.write(&data).unwrap_or(0);
                    from_host.extend_from_slice(&data[..written]);
                }
                Step::HostReads(bytes) => {
                    let mut piece = vec![0; bytes];
                    let read = host.read(&mut piece).unwrap_or(0);
                    at_host.extend_from_slice(&piece[..read]);
                    guest.ready();
                }
            }
        }
        prop_assert_eq!(&at_host, &from_guest);
        prop_assert!(from_host.starts_with(&at_guest));
        // With little room it takes many rounds; all that there was room for has come.
        prop_assert!(at_guest.len() == from_host.len() || at_guest.len() >= 100 * (alloc as usize).min(4052));
    }
}
