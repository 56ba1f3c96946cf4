//! Keeps a gate: answers for names, opens what they lead to, and writes down what goes through.
//!
//! ```text
//! environment's network            this process           host's network
//!   datagram, call ──────────────▶ on the list? ───────▶ name servers
//!   answer ◀── opened ◀── allowed addresses ◀─────────── answer
//!   packets of new connections ──▶ record
//! ```
//!
//! One thread, which waits for nothing but in `poll`. Invariants: what an answer leads to is open before the answer is given;
//! whatever is asked, by whomever, holds a bounded amount of memory and of sockets for a bounded time.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::netlink::Socket;
use super::asking::{Asked, Asker, Frame, News, first_message, framed};
use super::list::ports_of;
use super::message::{self, Answer, Code, Question};
use super::opened::Opened;
use super::packets;
use super::rules::Opener;
use crate::reached::{Destination, Record, Verdict};
use crate::spec::AllowedName;

/// Questions that wait for name servers.
const MAX_ASKED: usize = 64;
const MAX_CALLERS: usize = 16;
/// How long one may be silent who has called.
const CALLER_PATIENCE: Duration = Duration::from_secs(10);
/// Without the extension that lets it be more (RFC 1035, 4.2.1).
const MAX_DATAGRAM_BYTES: usize = 512;
const MAX_CALL_BYTES: usize = 1024;
const MAX_ANSWER_BYTES: usize = 65_535;
/// Addresses of one answer; the rest is left out.
const MAX_ADDRESSES: usize = 128;
/// What is taken of one thing before the others have their turn.
const TURN: usize = 64;

/// What is made in the environment's network, and works there wherever this process is.
#[derive(Debug)]
pub struct Posts {
    pub datagrams: UdpSocket,
    pub calls: TcpListener,
    pub packets: Socket,
    pub opener: Opener,
}

/// What is decided by.
#[derive(Debug)]
pub struct Terms {
    pub names: Vec<AllowedName>,
    pub forbidden: Vec<(Ipv4Addr, u32)>,
    /// In the network that this process is in.
    pub resolvers: Vec<Ipv4Addr>,
}

/// A gate that is kept.
#[derive(Debug)]
pub struct Gate {
    posts: Posts,
    terms: Terms,
    record: Record,
    opened: Opened,
    asked: BTreeMap<u64, Asked>,
    callers: BTreeMap<u64, Caller>,
    next_number: u64,
}

/// One who asks by TCP.
#[derive(Debug)]
struct Caller {
    stream: TcpStream,
    heard: Vec<u8>,
    /// A question is on its way.
    waits: bool,
    deadline: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Control,
    Packets,
    Datagrams,
    Calls,
    Caller(u64),
    Asked(u64),
}

impl Gate {
    pub fn new(posts: Posts, terms: Terms, record: Record) -> io::Result<Self> {
        posts.datagrams.set_nonblocking(true)?;
        posts.calls.set_nonblocking(true)?;
        rustix::io::ioctl_fionbio(&posts.packets, true)?;
        let opened = Opened::default();
        let (asked, callers) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { posts, terms, record, opened, asked, callers, next_number: 0 })
    }

    /// Keeps it until `control` says that the environment is over. A control that is closed says nothing.
    pub fn keep(&mut self, mut control: UnixStream) -> io::Result<()> {
        let mut is_controlled = true;
        loop {
            let now = Instant::now();
            self.look_at_clock(now)?;
            for place in self.wait(is_controlled.then_some(&control), now)? {
                match place {
                    Place::Control if control.read(&mut [0])? > 0 => return self.finish(),
                    Place::Control => is_controlled = false,
                    Place::Packets => self.take_packets(TURN).map(drop)?,
                    Place::Datagrams => self.take_datagrams(now)?,
                    Place::Calls => self.take_calls(now),
                    Place::Caller(number) => self.hear_caller(number, now)?,
                    Place::Asked(number) => {
                        let news = match self.asked.get_mut(&number) {
                            Some(asked) => asked.go_on(&self.terms.resolvers, now),
                            None => News::None,
                        };
                        self.settle(number, news, now)?;
                    }
                }
            }
        }
    }

    /// Waits until something can be done.
    fn wait(&self, control: Option<&UnixStream>, now: Instant) -> io::Result<Vec<Place>> {
        let mut places = vec![Place::Packets, Place::Datagrams];
        let readable = |socket| PollFd::from_borrowed_fd(socket, PollFlags::IN);
        let mut sockets = vec![readable(self.posts.packets.as_fd()), readable(self.posts.datagrams.as_fd())];
        if let Some(control) = control {
            places.push(Place::Control);
            sockets.push(readable(control.as_fd()));
        }
        if self.callers.len() < MAX_CALLERS {
            places.push(Place::Calls);
            sockets.push(readable(self.posts.calls.as_fd()));
        }
        for (number, caller) in self.callers.iter().filter(|(_, caller)| !caller.waits) {
            places.push(Place::Caller(*number));
            sockets.push(readable(caller.stream.as_fd()));
        }
        for (number, asked) in &self.asked {
            places.push(Place::Asked(*number));
            sockets.push(PollFd::from_borrowed_fd(asked.socket(), asked.interest()));
        }
        let deadlines = self.asked.values().map(|asked| asked.deadline);
        let deadlines = deadlines.chain(self.callers.values().map(|caller| caller.deadline));
        let first = deadlines.chain(self.opened.first_end()).min();
        let patience = first.map(|first| first.saturating_duration_since(now));
        let patience = patience.and_then(|patience| Timespec::try_from(patience).ok());
        match poll(&mut sockets, patience.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = places.into_iter().zip(&sockets).filter(|(_, socket)| !socket.revents().is_empty());
        Ok(ready.map(|(place, _)| place).collect())
    }

    /// Lets go of what has had its time.
    fn look_at_clock(&mut self, now: Instant) -> io::Result<()> {
        self.posts.opener.close(&self.opened.take_ended(now))?;
        self.callers.retain(|_, caller| caller.deadline > now);
        let late = self.asked.iter().filter(|(_, asked)| asked.deadline <= now).map(|(number, _)| *number);
        for number in late.collect::<Vec<_>>() {
            if let Some(asked) = self.asked.get_mut(&number) {
                let news = asked.try_next(&self.terms.resolvers, now);
                self.settle(number, news, now)?;
            }
        }
        Ok(())
    }

    /// Writes down what the environment has left to be heard.
    fn finish(&mut self) -> io::Result<()> {
        while self.take_packets(TURN)? {}
        Ok(())
    }

    // ---- packets ----

    /// False: there are no more.
    fn take_packets(&mut self, most: usize) -> io::Result<bool> {
        for _ in 0..most {
            let mut heard = Vec::new();
            let read = self.posts.packets.each_answer(|kind, message| {
                heard.extend(packets::read(kind, message));
                Ok(())
            });
            match read {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.record.add(Destination::of(Verdict::Missed))?;
                }
                Err(error) => return Err(error),
            }
            for packet in heard {
                let verdict = if packet.is_passed { Verdict::Reached } else { Verdict::Refused };
                let name = packet.port.and_then(|port| self.opened.name(packet.address, port));
                self.record.add(Destination {
                    name: name.filter(|_| packet.is_passed).map(str::to_owned),
                    address: Some(packet.address),
                    port: packet.port,
                    protocol: Some(packet.protocol),
                    ..Destination::of(verdict)
                })?;
            }
        }
        Ok(true)
    }

    // ---- questions ----

    fn take_datagrams(&mut self, now: Instant) -> io::Result<()> {
        for _ in 0..TURN {
            let mut bytes = [0; MAX_CALL_BYTES];
            match self.posts.datagrams.recv_from(&mut bytes) {
                Ok((count, from)) => {
                    if let Some(question) = message::read_question(&bytes[..count]) {
                        self.consider(question, Asker::Datagram(from), now)?;
                    }
                }
                // Of one whose asker is gone the kernel tells here.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => return Ok(()),
            }
        }
        Ok(())
    }

    fn take_calls(&mut self, now: Instant) {
        // Who hung up meanwhile, and what there is no descriptor for, comes to nothing.
        let Ok((stream, _)) = self.posts.calls.accept() else { return };
        if stream.set_nonblocking(true).is_ok() {
            let number = self.number();
            let deadline = now + CALLER_PATIENCE;
            self.callers.insert(number, Caller { stream, heard: Vec::new(), waits: false, deadline });
        }
    }

    fn hear_caller(&mut self, number: u64, now: Instant) -> io::Result<()> {
        let Some(caller) = self.callers.get_mut(&number) else { return Ok(()) };
        let mut bytes = [0; MAX_CALL_BYTES];
        match caller.stream.read(&mut bytes) {
            Ok(count @ 1..) => caller.heard.extend(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => {
                self.callers.remove(&number);
                return Ok(());
            }
        }
        self.attend_to(number, now)
    }

    /// Takes the next question of one who has called.
    fn attend_to(&mut self, number: u64, now: Instant) -> io::Result<()> {
        let Some(caller) = self.callers.get_mut(&number) else { return Ok(()) };
        let question = match first_message(&caller.heard, MAX_CALL_BYTES) {
            Frame::Unfinished => return Ok(()),
            Frame::Whole(bytes) => {
                let question = message::read_question(bytes);
                caller.heard.drain(..2 + bytes.len());
                question
            }
            Frame::TooLong => None,
        };
        match question {
            Some(question) => {
                caller.waits = true;
                caller.deadline = now + CALLER_PATIENCE;
                self.consider(question, Asker::Caller(number), now)
            }
            None => {
                self.callers.remove(&number);
                Ok(())
            }
        }
    }

    fn consider(&mut self, question: Question, asker: Asker, now: Instant) -> io::Result<()> {
        let ports = ports_of(&self.terms.names, &question.name);
        if ports.is_empty() {
            self.note(Verdict::Refused, &question, None)?;
            // So programs hear that there is no such name, and give up at once.
            return self.reply(&question, asker, Code::NoName, &[], 0, now);
        }
        if (question.kind, question.class) != (message::ADDRESS, message::INTERNET) {
            return self.reply(&question, asker, Code::Answered, &[], 0, now);
        }
        if self.asked.len() >= MAX_ASKED {
            return self.reply(&question, asker, Code::Failed, &[], 0, now);
        }
        match Asked::ask(question.clone(), asker, ports, &self.terms.resolvers, now) {
            Some(asked) => {
                let number = self.number();
                self.asked.insert(number, asked);
                Ok(())
            }
            None => {
                self.note(Verdict::Unanswered, &question, None)?;
                self.reply(&question, asker, Code::Failed, &[], 0, now)
            }
        }
    }

    /// Tells who asked, once there is something to tell.
    fn settle(&mut self, number: u64, news: News, now: Instant) -> io::Result<()> {
        if news == News::None {
            return Ok(());
        }
        let Some(asked) = self.asked.remove(&number) else { return Ok(()) };
        match news {
            News::Answered(answer) => self.pass_on(&asked, answer, now),
            News::None | News::Unanswered => {
                self.note(Verdict::Unanswered, &asked.question, None)?;
                self.reply(&asked.question, asked.asker, Code::Failed, &[], 0, now)
            }
        }
    }

    /// Opens what the name leads to, and then says so.
    fn pass_on(&mut self, asked: &Asked, answer: Answer, now: Instant) -> io::Result<()> {
        let Asked { question, asker, ports, .. } = asked;
        let is_forbidden = |address: &Ipv4Addr| {
            let within = |(network, bits): &(Ipv4Addr, u32)| {
                let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
                u32::from(*address) & mask == u32::from(*network)
            };
            self.terms.forbidden.iter().any(within)
        };
        let (misled, mut addresses): (Vec<_>, Vec<_>) = answer.addresses.into_iter().partition(is_forbidden);
        for address in misled.into_iter().take(MAX_ADDRESSES) {
            self.note(Verdict::Misled, question, Some(address))?;
        }
        addresses.truncate(MAX_ADDRESSES);
        let Some(new) = self.opened.add(&question.name, &addresses, ports, answer.ttl_s, now) else {
            self.record.add(Destination::of(Verdict::LeftOut))?;
            return self.reply(question, *asker, Code::Failed, &[], 0, now);
        };
        self.posts.opener.open(&new)?;
        self.reply(question, *asker, answer.code, &addresses, answer.ttl_s, now)
    }

    fn note(&mut self, verdict: Verdict, question: &Question, address: Option<Ipv4Addr>) -> io::Result<()> {
        let name = Some(question.name.clone());
        self.record.add(Destination { name, address, ..Destination::of(verdict) })
    }

    fn reply(
        &mut self,
        question: &Question,
        asker: Asker,
        code: Code,
        addresses: &[Ipv4Addr],
        ttl_s: u32,
        now: Instant,
    ) -> io::Result<()> {
        match asker {
            Asker::Datagram(to) => {
                let message = question.answer(code, addresses, ttl_s, MAX_DATAGRAM_BYTES);
                // Who does not take it asks again.
                let _ = self.posts.datagrams.send_to(&message, to);
                Ok(())
            }
            Asker::Caller(number) => {
                let Some(caller) = self.callers.get_mut(&number) else { return Ok(()) };
                let message = question.answer(code, addresses, ttl_s, MAX_ANSWER_BYTES);
                caller.waits = false;
                if caller.stream.write_all(&framed(&message)).is_err() {
                    self.callers.remove(&number);
                    return Ok(());
                }
                self.attend_to(number, now)
            }
        }
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}
