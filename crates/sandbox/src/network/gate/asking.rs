//! Asks name servers, one after the other, each with its time: by a datagram, and by TCP where that has no room for the answer.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::super::firewall::NAME_PORT;
use super::message::{Answer, Code, Question};

/// How long one is waited for, and how often one is asked for a name: together less than programs wait for theirs.
const PATIENCE: Duration = Duration::from_secs(1);
const TRIES: usize = 3;
/// Of an answer by a datagram, and of one by TCP with its length.
const MAX_DATAGRAM_BYTES: usize = 4096;
const MAX_STREAM_BYTES: usize = 2 + 65_535;

/// Whom to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asker {
    Datagram(SocketAddr),
    /// One who has called, by number.
    Caller(u64),
}

/// A question on its way.
#[derive(Debug)]
pub struct Asked {
    pub question: Question,
    pub asker: Asker,
    /// Opened where the name leads to.
    pub ports: Vec<u16>,
    /// Of the message now on its way.
    id: u16,
    tries: usize,
    way: Way,
    pub deadline: Instant,
}

#[derive(Debug)]
enum Way {
    Datagram(UdpSocket),
    Calling { stream: TcpStream },
    Called { stream: TcpStream, heard: Vec<u8> },
}

/// What is known now.
#[derive(Debug, PartialEq, Eq)]
pub enum News {
    /// Nothing yet.
    None,
    Answered(Answer),
    /// Nobody can tell.
    Unanswered,
}

impl Asked {
    /// Asks the first; none where nobody can be asked.
    pub fn ask(
        question: Question,
        asker: Asker,
        ports: Vec<u16>,
        resolvers: &[Ipv4Addr],
        now: Instant,
    ) -> Option<Self> {
        let (id, way) = (1..=TRIES)
            .find_map(|tries| Some((tries, datagram(&question, resolvers, tries)?)))
            .map(|(tries, (id, way))| ((id, tries), way))?;
        let (id, tries) = id;
        Some(Self { question, asker, ports, id, tries, way, deadline: now + PATIENCE })
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        match &self.way {
            Way::Datagram(socket) => socket.as_fd(),
            Way::Calling { stream } | Way::Called { stream, .. } => stream.as_fd(),
        }
    }

    /// What to wait for at the socket.
    pub fn interest(&self) -> PollFlags {
        match &self.way {
            Way::Calling { .. } => PollFlags::OUT,
            Way::Datagram(_) | Way::Called { .. } => PollFlags::IN,
        }
    }

    /// Takes what there is at the socket.
    pub fn go_on(&mut self, resolvers: &[Ipv4Addr], now: Instant) -> News {
        match self.hear() {
            Ok(None) => News::None,
            Ok(Some(answer)) if answer.is_truncated => match self.call(resolvers) {
                Ok(()) => {
                    self.deadline = now + PATIENCE;
                    News::None
                }
                Err(_) => self.try_next(resolvers, now),
            },
            Ok(Some(answer)) if answer.code != Code::Failed => News::Answered(answer),
            Ok(Some(_)) | Err(_) => self.try_next(resolvers, now),
        }
    }

    /// Asks the next one.
    pub fn try_next(&mut self, resolvers: &[Ipv4Addr], now: Instant) -> News {
        while self.tries < TRIES {
            self.tries += 1;
            if let Some((id, way)) = datagram(&self.question, resolvers, self.tries) {
                (self.id, self.way, self.deadline) = (id, way, now + PATIENCE);
                return News::None;
            }
        }
        News::Unanswered
    }

    /// None: nothing of concern was heard. An error: this one will not tell.
    fn hear(&mut self) -> io::Result<Option<Answer>> {
        match &mut self.way {
            Way::Datagram(socket) => {
                let mut bytes = [0; MAX_DATAGRAM_BYTES];
                match socket.recv(&mut bytes) {
                    // What is no answer to this may be a stranger's.
                    Ok(count) => Ok(self.question.read_answer(self.id, &bytes[..count])),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                    Err(error) => Err(error),
                }
            }
            Way::Calling { stream } => {
                let message = self.question.ask(self.id);
                // A question is shorter than 300 bytes, and goes into an empty buffer whole.
                stream.write_all(&framed(&message))?;
                let stream = stream.try_clone()?;
                self.way = Way::Called { stream, heard: Vec::new() };
                Ok(None)
            }
            Way::Called { stream, heard } => {
                let mut bytes = [0; MAX_DATAGRAM_BYTES];
                match stream.read(&mut bytes) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(count) => heard.extend(&bytes[..count]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                match first_message(heard, MAX_STREAM_BYTES) {
                    Frame::Unfinished => Ok(None),
                    Frame::TooLong => Err(io::ErrorKind::InvalidData.into()),
                    Frame::Whole(message) => {
                        let answer = self.question.read_answer(self.id, message);
                        // Nobody else speaks on it, and it goes on by no other way.
                        let answer = answer.filter(|answer| !answer.is_truncated);
                        answer.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
                    }
                }
            }
        }
    }

    /// Asks the same one by TCP.
    fn call(&mut self, resolvers: &[Ipv4Addr]) -> io::Result<()> {
        let resolver = resolver(resolvers, self.tries).ok_or(io::ErrorKind::NotFound)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &resolver) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        self.way = Way::Calling { stream: socket.into() };
        Ok(())
    }
}

fn resolver(resolvers: &[Ipv4Addr], tries: usize) -> Option<SocketAddrV4> {
    let turn = tries.saturating_sub(1).checked_rem(resolvers.len())?;
    resolvers.get(turn).map(|address| SocketAddrV4::new(*address, NAME_PORT))
}

/// Sends the question from a port that nobody can guess, under such a number.
fn datagram(question: &Question, resolvers: &[Ipv4Addr], tries: usize) -> Option<(u16, Way)> {
    let mut id = [0; 2];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty()).ok()?;
    let id = u16::from_ne_bytes(id);
    let resolver = resolver(resolvers, tries)?;
    let send = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(resolver)?;
        socket.set_nonblocking(true)?;
        socket.send(&question.ask(id))?;
        Ok::<_, io::Error>(socket)
    };
    send().ok().map(|socket| (id, Way::Datagram(socket)))
}

/// What stands at the beginning of a stream.
pub enum Frame<'a> {
    Unfinished,
    Whole(&'a [u8]),
    TooLong,
}

/// The first message of a stream, behind its length (RFC 1035, 4.2.2).
pub fn first_message(bytes: &[u8], most_bytes: usize) -> Frame<'_> {
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return Frame::Unfinished };
    let length = usize::from(u16::from_be_bytes(*length));
    if length + 2 > most_bytes {
        return Frame::TooLong;
    }
    rest.get(..length).map_or(Frame::Unfinished, Frame::Whole)
}

/// A message as it stands in a stream.
pub fn framed(message: &[u8]) -> Vec<u8> {
    // None is written that is longer.
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
}
