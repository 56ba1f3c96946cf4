//! Holds an environment to the places that it may reach, and writes down what it does.
//!
//! ```text
//! helper ── forks ──▶ gatekeeper, which stays in the host's network
//!   │ its network:       │ answers for names: those on the list it asks name servers for
//!   │ the rules, ──────▶ │ opens what they lead to, then answers
//!   │ the gate's sockets │ hears from the kernel what passed and what was refused: the record
//!   ▼                    ▼
//! the action             ends with the helper
//! ```
//!
//! A socket stays in the network in which it was made. So those at which names are asked for, and those that lead to the packet
//! filter, are made in the environment's network and handed over, while name servers are asked from the host's: the
//! environment itself reaches none, and with root and without it makes no difference where they are.
//!
//! Invariants: the rules stand before anything of the action runs, and nothing in it may change them; what is not allowed is
//! refused at once, and not only dropped; the host's own addresses, other sandboxes and metadata are refused whatever the list
//! says and wherever names lead; a gatekeeper that breaks off takes its environment along. Of privileges it has the one over
//! networks alone, which takes it no further than the sockets that it has, and it is nobody where root can make it so. There is no IPv6.

mod asking;
mod list;
mod message;
mod opened;
mod packets;
mod rules;
mod serve;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

use self::rules::Opener;
use self::serve::{Gate, Posts, Terms};
use super::firewall::NAME_PORT;
use super::netlink::Socket;
use super::relay::{self, RelayError};
use crate::reached::Record;
use crate::seccomp::{self, SeccompError};
use crate::spec::GateSpec;
use crate::sys;

/// Where a sandbox asks for names: on its own loopback.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// The sockets that are handed over.
const POSTS: usize = 4;

/// Why there is no gate.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("cannot find out what nobody may reach")]
    Forbidden(#[from] RelayError),
    #[error(
        "cannot set the packet filter's rules; they need nf_tables with log and reject: as root, modprobe nft_log nft_reject_inet nfnetlink_log"
    )]
    Rules(#[source] io::Error),
    #[error("cannot bind it to the system calls that it needs")]
    Seccomp(#[from] SeccompError),
    #[error("the gatekeeper broke off")]
    Broke,
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> GateError {
    move |source| GateError::Io { doing, source }
}

/// The process that keeps a gate.
#[derive(Debug)]
pub struct Gatekeeper {
    pid: libc::pid_t,
    control: UnixStream,
    forbidden: Vec<(Ipv4Addr, u32)>,
}

impl Gatekeeper {
    /// Starts it. To be called while this process is in the host's network, and has one thread.
    pub fn start(spec: &GateSpec, rootless: bool) -> Result<Self, GateError> {
        let forbidden = relay::forbidden()?;
        let (control, theirs) = UnixStream::pair().map_err(io_error("make a socket pair"))?;
        if let Some(pid) = sys::fork().map_err(io_error("start another process"))? {
            return Ok(Self { pid, control, forbidden });
        }
        drop(control);
        match keep(spec, theirs, forbidden, rootless) {
            Ok(()) => sys::exit_now(0),
            Err(error) => {
                eprintln!("the gate of the network: {}", crate::helper::chain(&error));
                sys::exit_now(1)
            }
        }
    }

    /// Closes this process's network, but for what the gate lets through; names are asked for at `address`, which is there.
    pub fn close_up(&mut self, spec: &GateSpec, address: Ipv4Addr) -> Result<(), GateError> {
        rules::install(&spec.networks, &self.forbidden).map_err(GateError::Rules)?;
        let packets = packets::listen().map_err(GateError::Rules)?;
        let opener = Socket::netfilter().map_err(GateError::Rules)?;
        let at_gate = io_error("listen for questions for names");
        let listen =
            || Ok((UdpSocket::bind((address, NAME_PORT))?, TcpListener::bind((address, NAME_PORT))?));
        let (datagrams, calls) = listen().map_err(at_gate)?;
        let posts = [datagrams.as_fd(), calls.as_fd(), packets.as_fd(), opener.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(POSTS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&posts));
        rustix::net::sendmsg(&self.control, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)
            .map_err(|error| io_error("hand the gate's sockets over")(error.into()))?;
        // Its word that it keeps the gate.
        match self.control.read(&mut [0]) {
            Ok(1..) => Ok(()),
            Ok(0) => Err(GateError::Broke),
            Err(error) => Err(io_error("hear from the gatekeeper")(error)),
        }
    }

    /// Waits for the end of this child; an error if the gatekeeper's comes first.
    pub fn wait_for(&self, child: libc::pid_t) -> Result<i32, GateError> {
        match sys::wait_for_either(child, self.pid).map_err(io_error("wait for sealci-init"))? {
            (pid, code) if pid == child => Ok(code),
            _ => Err(GateError::Broke),
        }
    }

    /// Has it write down what is left, and waits for its end.
    pub fn dismiss(mut self) -> Result<(), GateError> {
        self.control
            .write_all(&[0])
            .and_then(|()| sys::wait(self.pid))
            .map(drop)
            .map_err(io_error("wait for the gatekeeper"))
    }
}

/// Is the gatekeeper.
fn keep(
    spec: &GateSpec,
    mut control: UnixStream,
    forbidden: Vec<(Ipv4Addr, u32)>,
    rootless: bool,
) -> Result<(), GateError> {
    // The channel is the init's alone, so that its end is the channel's.
    let null = std::fs::File::open("/dev/null").map_err(io_error("open /dev/null"))?;
    sys::redirect(null.as_fd(), 0).map_err(io_error("let go of the channel"))?;
    let record = Record::create(&spec.record).map_err(io_error("make the record"))?;
    sys::keep_network_only(!rootless).map_err(io_error("let go of privileges"))?;
    sys::die_with_parent().map_err(io_error("bind this process to its parent"))?;
    // Without them there never was an environment.
    let Some(posts) = receive(&control).map_err(io_error("take the gate's sockets"))? else { return Ok(()) };
    let terms = Terms { names: spec.names.clone(), forbidden, resolvers: spec.resolvers.clone() };
    seccomp::bind_gatekeeper()?;
    let mut gate = Gate::new(posts, terms, record).map_err(io_error("keep the gate"))?;
    control.write_all(&[0]).map_err(io_error("say that the gate is kept"))?;
    gate.keep(control).map_err(io_error("keep it"))
}

/// None: nobody is there any more.
fn receive(control: &UnixStream) -> io::Result<Option<Posts>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(POSTS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0];
    let mut words = [IoSliceMut::new(&mut word)];
    rustix::net::recvmsg(control, &mut words, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut sockets: Vec<OwnedFd> = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(handed) = message {
            sockets.extend(handed);
        }
    }
    let Ok([datagrams, calls, packets, opener]) = <[OwnedFd; POSTS]>::try_from(sockets) else {
        return Ok(None);
    };
    Ok(Some(Posts {
        datagrams: datagrams.into(),
        calls: calls.into(),
        packets: packets.into(),
        opener: Opener::new(opener.into()),
    }))
}
