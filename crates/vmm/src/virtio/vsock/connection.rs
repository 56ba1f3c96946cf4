//! Keeps one connection between a port of the guest's and a socket of the host's.
//!
//! ```text
//!   guest ── Data ──▶ pending (at most WINDOW_BYTES) ──▶ socket      the guest may send what pending has room for
//!   guest ◀── Data ── the guest's own buffers  ◀──────── socket      read only when the guest has room
//! ```
//!
//! What the host has sent is never kept here, and what the guest has sent is kept only while the socket takes no more. Either
//! side may end its half: the guest's reaches the socket once all before it did, the host's reaches the guest once it has
//! read all. A guest that forgets a connection it has ended leaves it to be emptied.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::super::{Buffers, sys};
use super::packet::{Header, NO_MORE_SENT, NO_MORE_TAKEN};

/// How much of what the guest sends is kept for a connection whose socket takes no more.
pub const WINDOW_BYTES: usize = 128 << 10;

/// The most data of one packet to the guest.
const PACKET_BYTES: usize = 64 << 10;

/// What a connection has to say to the guest next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    Response,
    Reset,
    CreditUpdate,
    Shutdown(u32),
    /// What the socket has, if it has anything.
    Data,
}

/// The guest broke the protocol: the connection is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation;

/// How much the other side takes. All counts wrap, as they do on the wire.
#[derive(Debug, Default)]
struct Credit {
    alloc: u32,
    forwarded: u32,
    sent: u32,
}

impl Credit {
    fn left(&self) -> usize {
        // A guest that says it has passed on more than it was sent gets nothing.
        self.alloc.saturating_sub(self.sent.wrapping_sub(self.forwarded)) as usize
    }
}

#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    readable: bool,
    writable: bool,
    /// Of the guest's, for the socket.
    pending: VecDeque<u8>,
    /// How much of the guest's the socket took, and as of when the guest knows.
    forwarded: u32,
    told_forwarded: u32,
    credit: Credit,
    owes_response: bool,
    owes_update: bool,
    /// The guest's halves that have ended, then the host's, and what the guest was told of these.
    guest_ended: u32,
    host_ended: u32,
    told_ended: u32,
    half_closed: bool,
    /// The guest knows nothing of it any more: what is pending goes to the socket, then it ends.
    is_orphan: bool,
    /// It stands in the line of those with something to say.
    pub is_in_line: bool,
}

impl Connection {
    /// One that the guest has asked for; the socket is connected, and everything about it has still to be reported.
    pub fn new(socket: OwnedFd, request: &Header) -> Self {
        let mut connection = Self {
            socket,
            readable: false,
            writable: false,
            pending: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            credit: Credit::default(),
            owes_response: true,
            owes_update: false,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
            half_closed: false,
            is_orphan: false,
            is_in_line: false,
        };
        connection.note_credit(request);
        connection
    }

    /// Every packet of the guest's says how much it takes.
    pub fn note_credit(&mut self, header: &Header) {
        self.credit.alloc = header.buf_alloc;
        self.credit.forwarded = header.fwd_cnt;
    }

    pub fn owe_update(&mut self) {
        self.owes_update = true;
    }

    /// What epoll has said of the socket.
    pub fn note_ready(&mut self, events: EventFlags) {
        let gone = EventFlags::HUP | EventFlags::ERR;
        self.readable |= events.intersects(EventFlags::IN | EventFlags::RDHUP | gone);
        self.writable |= events.intersects(EventFlags::OUT | gone);
        if events.intersects(gone) {
            self.drop_pending();
        }
        self.flush();
    }

    /// The guest has sent this.
    pub fn take(&mut self, mut data: Buffers<'_>) -> Result<(), Violation> {
        if self.pending.len() + data.bytes() > WINDOW_BYTES || self.guest_ended & NO_MORE_SENT != 0 {
            return Err(Violation);
        }
        if self.host_ended & NO_MORE_TAKEN != 0 {
            self.forwarded = self.forwarded.wrapping_add(data.bytes() as u32);
            return Ok(());
        }
        while self.pending.is_empty() && self.writable && data.bytes() > 0 {
            let sent = sys::send(self.socket.as_fd(), &data);
            let bytes = self.note_sent(sent);
            data.split_front(bytes);
        }
        if self.host_ended & NO_MORE_TAKEN != 0 {
            self.forwarded = self.forwarded.wrapping_add(data.bytes() as u32);
            return Ok(());
        }
        let mut piece = [0; 4096];
        while data.bytes() > 0 {
            let bytes = data.read(&mut piece);
            self.pending.extend(&piece[..bytes]);
        }
        Ok(())
    }

    fn note_sent(&mut self, sent: io::Result<usize>) -> usize {
        match sent {
            Ok(bytes) if bytes > 0 => {
                self.forwarded = self.forwarded.wrapping_add(bytes as u32);
                return bytes;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
            _ => self.drop_pending(),
        }
        0
    }

    /// The host takes no more. What is under way to it is lost, as it would be a moment later.
    fn drop_pending(&mut self) {
        self.host_ended |= NO_MORE_TAKEN;
        self.writable = false;
        self.forwarded = self.forwarded.wrapping_add(self.pending.len() as u32);
        self.pending = VecDeque::new();
    }

    fn flush(&mut self) {
        while self.writable && !self.pending.is_empty() {
            let sent =
                send(&self.socket, self.pending.as_slices().0, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            let bytes = self.note_sent(sent.map_err(Into::into));
            self.pending.drain(..bytes.min(self.pending.len()));
        }
        if self.pending.is_empty() {
            // Most connections never need it again.
            self.pending = VecDeque::new();
            self.pass_end_on();
        }
    }

    /// The guest has ended its halves.
    pub fn end(&mut self, halves: u32) {
        self.guest_ended |= halves & (NO_MORE_SENT | NO_MORE_TAKEN);
        if halves & NO_MORE_TAKEN != 0 {
            // It fails only where nobody is there any more.
            let _ = shutdown(&self.socket, Shutdown::Read);
            self.discard();
        }
        self.flush();
    }

    /// Reads what nobody will have: a socket that is closed with something in it looks broken at its other end.
    fn discard(&mut self) {
        let mut piece = [0; 4096];
        while recv(&self.socket, &mut piece, RecvFlags::DONTWAIT).is_ok_and(|(_, bytes)| bytes > 0) {}
    }

    fn pass_end_on(&mut self) {
        if self.guest_ended & NO_MORE_SENT != 0 && !self.half_closed {
            self.half_closed = true;
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// The guest has forgotten the connection. True if it can be forgotten here, too.
    pub fn orphan(&mut self) -> bool {
        self.end(NO_MORE_SENT | NO_MORE_TAKEN);
        self.is_orphan = true;
        self.is_over()
    }

    /// An orphan with nothing left to do.
    pub fn is_over(&self) -> bool {
        self.is_orphan && self.pending.is_empty()
    }

    pub fn is_orphan(&self) -> bool {
        self.is_orphan
    }

    /// What there is to say now, if anything.
    pub fn word(&self) -> Option<Word> {
        let untold = self.host_ended & !self.told_ended;
        let unreported = self.forwarded.wrapping_sub(self.told_forwarded) as usize;
        if self.is_orphan {
            None
        } else if self.owes_response {
            Some(Word::Response)
        } else if self.guest_ended == NO_MORE_SENT | NO_MORE_TAKEN {
            self.pending.is_empty().then_some(Word::Reset)
        } else if self.owes_update || unreported >= WINDOW_BYTES / 2 {
            Some(Word::CreditUpdate)
        } else if untold != 0 && !self.can_read_later() {
            Some(Word::Shutdown(self.host_ended))
        } else if self.readable && self.can_read_later() && self.credit.left() > 0 {
            Some(Word::Data)
        } else {
            None
        }
    }

    /// Whether anything may still come from the host to the guest.
    fn can_read_later(&self) -> bool {
        (self.host_ended & NO_MORE_SENT | self.guest_ended & NO_MORE_TAKEN) == 0
    }

    /// Reads from the socket into the guest; none if there is nothing, or no more.
    pub fn give(&mut self, into: &mut Buffers<'_>) -> Option<u32> {
        let room = into.split_front(PACKET_BYTES.min(self.credit.left()));
        match sys::receive(self.socket.as_fd(), &room) {
            Ok(bytes) if bytes > 0 => {
                self.credit.sent = self.credit.sent.wrapping_add(bytes as u32);
                return Some(bytes as u32);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Ok(_) => self.host_ended |= NO_MORE_SENT,
            Err(_) => {
                self.host_ended |= NO_MORE_SENT;
                self.drop_pending();
            }
        }
        None
    }

    /// The word goes out: fills in what every packet says.
    pub fn say(&mut self, word: Word, header: &mut Header) {
        match word {
            Word::Response => self.owes_response = false,
            Word::Shutdown(halves) => {
                self.told_ended = halves;
                header.flags = halves;
            }
            Word::Reset | Word::CreditUpdate | Word::Data => {}
        }
        self.owes_update &= word != Word::CreditUpdate;
        self.told_forwarded = self.forwarded;
        header.buf_alloc = WINDOW_BYTES as u32;
        header.fwd_cnt = self.forwarded;
    }
}
