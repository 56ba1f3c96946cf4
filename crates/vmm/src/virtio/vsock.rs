//! Connects a guest's programs to sockets of the host's (virtio 1.2, section 5.10): a guest that connects to a port of CID 2
//! gets what stands behind that port here, or is refused.
//!
//! ```text
//!   serve   take packets (tx) ─▶ connections ─▶ sockets       in turns, until neither side can go on
//!           give packets (rx) ◀─ those in line ◀─ ready ◀─ one epoll, edge-triggered, of all sockets
//! ```
//!
//! Invariants: there are at most [`MOST_CONNECTIONS`], each keeps at most [`WINDOW_BYTES`], and at most [`MOST_REFUSALS`]
//! refusals wait: then nothing is taken until the guest has taken these. Nothing is read from a socket that the guest has no
//! room for. No connection of the host's to the guest is ever begun. Nothing is ever said by the queue of events.

mod connection;
mod packet;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fmt, io};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use self::connection::{Connection, Word};
use self::packet::{HEADER_BYTES, HOST_CID, Header, Operation, STREAM};
use super::{Broken, Buffers, Cause, Device, Kind, Queues, Unlike};

pub use self::connection::WINDOW_BYTES;

/// The lowest that a guest may have: the others mean the hypervisor, this machine and the host.
pub const MIN_GUEST_CID: u32 = 3;
/// More are refused.
pub const MOST_CONNECTIONS: usize = 256;
/// How many refusals may wait for the guest to take them.
pub const MOST_REFUSALS: usize = 64;

const RX: usize = 0;
const TX: usize = 1;

/// How many packets go one way before the other way has its turn.
const TURN: usize = 32;
/// Of what epoll says at once.
const READY_AT_ONCE: usize = 64;

/// What stands behind a port.
pub enum HostEnd {
    /// A listening unix socket, connected to anew for each connection.
    Listener(PathBuf),
    /// A connected socket, for the first connection; more are refused.
    Connected(UnixStream),
    /// Nothing: this is called, and the guest gets no answer before it goes on from a snapshot. Then it is refused.
    Waiting(Box<dyn Fn() + Send>),
}

impl fmt::Debug for HostEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listener(path) => f.debug_tuple("Listener").field(path).finish(),
            Self::Connected(socket) => f.debug_tuple("Connected").field(socket).finish(),
            Self::Waiting(_) => f.write_str("Waiting"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    guest_port: u32,
    host_port: u32,
}

impl Key {
    fn to_bytes(self) -> [u8; 8] {
        (u64::from(self.host_port) << 32 | u64::from(self.guest_port)).to_le_bytes()
    }

    fn from_bytes(bytes: [u8; 8]) -> Self {
        let ports = u64::from_le_bytes(bytes);
        Self { guest_port: ports as u32, host_port: (ports >> 32) as u32 }
    }

    fn to_event(self) -> EventData {
        EventData::new_u64(u64::from(self.guest_port) << 32 | u64::from(self.host_port))
    }

    fn from_event(data: EventData) -> Self {
        Self { guest_port: (data.u64() >> 32) as u32, host_port: data.u64() as u32 }
    }
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    config: [u8; 8],
    ends: BTreeMap<u32, HostEnd>,
    epoll: Arc<OwnedFd>,
    connections: BTreeMap<Key, Connection>,
    /// Those with something to say, each once.
    line: VecDeque<Key>,
    refusals: VecDeque<Key>,
    /// Asked for, and answered by a snapshot only.
    waiting: BTreeSet<Key>,
}

impl Vsock {
    /// A guest of this CID, and what it can connect to, by port.
    pub fn new(guest_cid: u32, ends: BTreeMap<u32, HostEnd>) -> io::Result<Self> {
        if guest_cid < MIN_GUEST_CID || guest_cid == u32::MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a guest's CID is at least 3"));
        }
        for end in ends.values() {
            if let HostEnd::Listener(path) = end {
                SocketAddrUnix::new(path)?;
            }
        }
        let guest_cid = u64::from(guest_cid);
        Ok(Self {
            guest_cid,
            config: guest_cid.to_le_bytes(),
            ends,
            epoll: Arc::new(epoll::create(CreateFlags::CLOEXEC)?),
            connections: BTreeMap::new(),
            line: VecDeque::new(),
            refusals: VecDeque::new(),
            waiting: BTreeSet::new(),
        })
    }

    /// Takes packets of the guest's; whether there were any.
    fn take_some(&mut self, queues: &mut Queues<'_>) -> Result<bool, Broken> {
        for taken in 0..TURN {
            if self.refusals.len() >= MOST_REFUSALS {
                return Ok(taken > 0);
            }
            let Some(mut chain) = queues.pop(TX)? else { return Ok(taken > 0) };
            let header = chain.readable.read_array().ok_or(Broken::Request)?;
            self.take(Header::decode(&header), chain.readable);
            queues.push(TX, chain.head, 0)?;
        }
        Ok(true)
    }

    fn take(&mut self, header: Header, mut data: Buffers<'_>) {
        // What is not this guest's, or not for the host, is for nobody.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { guest_port: header.src_port, host_port: header.dst_port };
        let operation = Operation::from_wire(header.operation);
        let is_whole = header.len as usize <= data.bytes();
        let Some(operation) = operation.filter(|_| header.kind == STREAM && is_whole) else {
            return self.refuse(key);
        };
        if operation == Operation::Reset {
            return self.forget(key);
        }
        if operation == Operation::Request {
            return self.open(key, &header);
        }
        let Some(connection) = self.connections.get_mut(&key).filter(|found| !found.is_orphan()) else {
            return self.refuse(key);
        };
        connection.note_credit(&header);
        match operation {
            Operation::Shutdown => connection.end(header.flags),
            Operation::CreditRequest => connection.owe_update(),
            Operation::CreditUpdate => {}
            Operation::Data => {
                if connection.take(data.split_front(header.len as usize)).is_err() {
                    return self.refuse(key);
                }
            }
            // Nothing was asked of the guest that it could answer.
            _ => return self.refuse(key),
        }
        self.stand_in_line(key);
    }

    /// The guest asks for a connection.
    fn open(&mut self, key: Key, request: &Header) {
        // One of the same ports that was left behind makes room; one that lives is asked for by mistake.
        let stands = self.remove(key).is_some_and(|found| !found.is_orphan());
        if stands || self.connections.len() + self.waiting.len() >= MOST_CONNECTIONS {
            return self.refuse(key);
        }
        if let Some(HostEnd::Waiting(called)) = self.ends.get(&key.host_port) {
            called();
            self.waiting.insert(key);
            return;
        }
        let Ok(socket) = self.reach(key) else { return self.refuse(key) };
        self.connections.insert(key, Connection::new(socket, request));
        self.stand_in_line(key);
    }

    /// A socket to what is behind a port, and watched.
    fn reach(&mut self, key: Key) -> io::Result<OwnedFd> {
        let socket = match self.ends.get(&key.host_port) {
            None | Some(HostEnd::Waiting(_)) => return Err(io::ErrorKind::ConnectionRefused.into()),
            Some(HostEnd::Listener(path)) => connect_to(path)?,
            Some(HostEnd::Connected(_)) => match self.ends.remove(&key.host_port) {
                Some(HostEnd::Connected(socket)) => socket.into(),
                _ => return Err(io::ErrorKind::ConnectionRefused.into()),
            },
        };
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &socket, key.to_event(), events)?;
        Ok(socket)
    }

    fn remove(&mut self, key: Key) -> Option<Connection> {
        let removed = self.connections.remove(&key)?;
        if removed.is_in_line {
            self.line.retain(|waiting| *waiting != key);
        }
        Some(removed)
    }

    /// The guest is told that there is no such connection, any more.
    fn refuse(&mut self, key: Key) {
        self.remove(key);
        self.refusals.push_back(key);
    }

    /// The guest says that there is no such connection, any more.
    fn forget(&mut self, key: Key) {
        self.waiting.remove(&key);
        if self.connections.get_mut(&key).is_some_and(Connection::orphan) {
            self.remove(key);
        }
    }

    fn stand_in_line(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if !connection.is_in_line && connection.word().is_some() {
            connection.is_in_line = true;
            self.line.push_back(key);
        }
    }

    /// Gives the guest packets; whether there were any that it had room for.
    fn give_some(&mut self, queues: &mut Queues<'_>) -> Result<bool, Broken> {
        let mut given = false;
        for _ in 0..TURN {
            if let Some(key) = self.refusals.front().copied() {
                if !self.give(queues, key, Operation::Reset, None)? {
                    return Ok(given);
                }
                self.refusals.pop_front();
            } else if let Some(key) = self.line.front().copied() {
                if !self.give_word(queues, key)? {
                    return Ok(given);
                }
                self.line.pop_front();
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.is_in_line = false;
                }
                self.stand_in_line(key);
            } else {
                return Ok(given);
            }
            given = true;
        }
        Ok(given)
    }

    /// Has a connection say what it has to say; false if the guest has no room.
    fn give_word(&mut self, queues: &mut Queues<'_>, key: Key) -> Result<bool, Broken> {
        let Some(connection) = self.connections.get_mut(&key) else { return Ok(true) };
        let Some(word) = connection.word() else { return Ok(true) };
        let operation = match word {
            Word::Response => Operation::Response,
            Word::Reset => Operation::Reset,
            Word::CreditUpdate => Operation::CreditUpdate,
            Word::Shutdown(_) => Operation::Shutdown,
            Word::Data => Operation::Data,
        };
        let has_room = self.give(queues, key, operation, Some(word))?;
        if has_room && word == Word::Reset {
            self.connections.remove(&key);
        }
        Ok(has_room)
    }

    /// One packet into the guest; false if it has no room. With data that turns out not to be there, nothing is given.
    fn give(
        &mut self,
        queues: &mut Queues<'_>,
        key: Key,
        operation: Operation,
        word: Option<Word>,
    ) -> Result<bool, Broken> {
        let Some(mut chain) = queues.pop(RX)? else { return Ok(false) };
        let mut front = chain.writable.split_front(HEADER_BYTES);
        if front.bytes() < HEADER_BYTES || word == Some(Word::Data) && chain.writable.bytes() == 0 {
            return Err(Broken::Request);
        }
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: STREAM,
            operation: operation as u16,
            ..Header::default()
        };
        if let (Some(word), Some(connection)) = (word, self.connections.get_mut(&key)) {
            if word == Word::Data {
                match connection.give(&mut chain.writable) {
                    Some(bytes) => header.len = bytes,
                    None => {
                        queues.put_back(RX);
                        return Ok(true);
                    }
                }
            }
            connection.say(word, &mut header);
        }
        front.write(&header.encode());
        queues.push(RX, chain.head, HEADER_BYTES as u32 + header.len)?;
        Ok(true)
    }
}

/// Does not wait for one that is slow to accept: that is refused, and the guest may ask again.
fn connect_to(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 16]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn watched(&self) -> Option<Arc<OwnedFd>> {
        Some(self.epoll.clone())
    }

    fn ready(&mut self) {
        let mut events = Vec::with_capacity(READY_AT_ONCE);
        // What is left, or comes meanwhile, keeps the epoll ready.
        for _ in 0..=MOST_CONNECTIONS / READY_AT_ONCE {
            let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let waited =
                epoll::wait(self.epoll.as_fd(), rustix::buffer::spare_capacity(&mut events), Some(&now));
            if waited.is_err() || events.is_empty() {
                return;
            }
            for event in events.drain(..) {
                let (key, flags) = (Key::from_event(event.data), event.flags);
                let Some(connection) = self.connections.get_mut(&key) else { continue };
                connection.note_ready(flags);
                match connection.is_over() {
                    true => drop(self.remove(key)),
                    false => self.stand_in_line(key),
                }
            }
        }
    }

    fn serve(&mut self, _: Cause, queues: &mut Queues<'_>) -> Result<(), Broken> {
        loop {
            let took = self.take_some(queues)?;
            let gave = self.give_some(queues)?;
            if !took && !gave {
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {
        self.connections.clear();
        self.line.clear();
        self.refusals.clear();
        self.waiting.clear();
    }

    /// Connections do not outlive a snapshot: it keeps which there were.
    fn state(&self) -> Vec<u8> {
        let all = self.connections.keys().chain(&self.refusals).chain(&self.waiting);
        all.flat_map(|key| key.to_bytes()).collect()
    }

    /// The guest is told of each that it is gone. The event by which a transport says that all are would also end what the guest
    /// begins before it has seen it.
    fn restore(&mut self, state: &[u8]) -> Result<(), Unlike> {
        let (keys, rest) = state.as_chunks::<8>();
        if !rest.is_empty() || keys.len() > MOST_CONNECTIONS + MOST_REFUSALS {
            return Err(Unlike("there cannot have been such connections"));
        }
        self.refusals = keys.iter().map(|key| Key::from_bytes(*key)).collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
