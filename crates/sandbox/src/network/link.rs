//! Makes a sandbox's link to the host: a pair of virtual Ethernet interfaces, one end in each network namespace.
//!
//! Numbers and layouts are rtnetlink(7)'s and linux/if_link.h's.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};

use super::netlink::{Message, Socket};

/// The name inside.
pub(super) const INSIDE: &str = "eth0";
/// Two addresses, and nothing else (RFC 3021).
pub(super) const PREFIX_BITS: u8 = 31;
const VETH_INFO_PEER: u16 = 1;
const CREATE: libc::c_int = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;

/// The host's side of the link to come, taken before the namespaces part.
pub struct Link {
    host: Socket,
    host_namespace: fs::File,
}

impl Link {
    /// To be called while this process is in the host's network namespace.
    pub fn prepare() -> io::Result<Self> {
        Ok(Self { host: Socket::route()?, host_namespace: fs::File::open("/proc/self/ns/net")? })
    }

    /// Makes the link between the host's and this process's network namespace.
    pub fn make(self, host_interface: &str, host_address: Ipv4Addr, address: Ipv4Addr) -> io::Result<()> {
        let inside = Socket::route()?;
        let create = || inside.carry_out(vec![self.pair(host_interface)]);
        match create() {
            // The sandbox that had the name before is dead, and its namespace still being taken down.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let gone = Message::new(libc::RTM_DELLINK, libc::NLM_F_ACK)
                    .raw(&interface(0, 0))
                    .text(libc::IFLA_IFNAME, host_interface);
                match self.host.carry_out(vec![gone]) {
                    Err(error) if error.raw_os_error() != Some(libc::ENODEV) => return Err(error),
                    _ => create()?,
                }
            }
            result => result?,
        }
        // What is not there cannot be disabled, and need not be.
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{INSIDE}/disable_ipv6"), "1");
        raise(&self.host, host_interface, host_address)?;
        let index = raise(&inside, INSIDE, address)?;
        inside.carry_out(vec![default_route(index, host_address)])
    }

    fn pair(&self, host_interface: &str) -> Message {
        // Descriptors are not negative.
        let host_namespace = self.host_namespace.as_fd().as_raw_fd() as u32;
        Message::new(libc::RTM_NEWLINK, CREATE).raw(&interface(0, 0)).text(libc::IFLA_IFNAME, INSIDE).nested(
            libc::IFLA_LINKINFO,
            |info| {
                info.text(libc::IFLA_INFO_KIND, "veth").nested(libc::IFLA_INFO_DATA, |data| {
                    data.nested(VETH_INFO_PEER, |peer| {
                        peer.raw(&interface(0, 0))
                            .text(libc::IFLA_IFNAME, host_interface)
                            .attribute(libc::IFLA_NET_NS_FD, &host_namespace.to_ne_bytes())
                    })
                })
            },
        )
    }
}

/// Gives an interface its address and brings it up; returns its index.
pub(super) fn raise(socket: &Socket, name: &str, address: Ipv4Addr) -> io::Result<u32> {
    let question = Message::new(libc::RTM_GETLINK, 0).raw(&interface(0, 0)).text(libc::IFLA_IFNAME, name);
    let answer = socket.ask(question)?;
    // struct ifinfomsg: family, padding, type (4 bytes together), index.
    let index =
        answer.get(4..8).and_then(|bytes| bytes.first_chunk()).map(|bytes| u32::from_ne_bytes(*bytes));
    let index = index.ok_or(io::ErrorKind::InvalidData)?;
    // struct ifaddrmsg: family, prefix length, flags, scope, index.
    let family = libc::AF_INET as u8;
    let header = [&[family, PREFIX_BITS, 0, 0][..], &index.to_ne_bytes()].concat();
    let assign = Message::new(libc::RTM_NEWADDR, CREATE)
        .raw(&header)
        .attribute(libc::IFA_LOCAL, &address.octets())
        .attribute(libc::IFA_ADDRESS, &address.octets());
    let raise = Message::new(libc::RTM_NEWLINK, libc::NLM_F_ACK).raw(&interface(index, libc::IFF_UP as u32));
    socket.carry_out(vec![assign])?;
    socket.carry_out(vec![raise])?;
    Ok(index)
}

/// struct ifinfomsg: family, padding, type, index, flags, mask of the flags to change.
fn interface(index: u32, flags: u32) -> Vec<u8> {
    [[0; 4], index.to_ne_bytes(), flags.to_ne_bytes(), flags.to_ne_bytes()].concat()
}

/// struct rtmsg: family, lengths of destination and source, service, table, protocol, scope, type, flags.
fn default_route(index: u32, gateway: Ipv4Addr) -> Message {
    let (family, table) = (libc::AF_INET as u8, libc::RT_TABLE_MAIN);
    let header =
        [family, 0, 0, 0, table, libc::RTPROT_BOOT, libc::RT_SCOPE_UNIVERSE, libc::RTN_UNICAST, 0, 0, 0, 0];
    Message::new(libc::RTM_NEWROUTE, CREATE)
        .raw(&header)
        .attribute(libc::RTA_GATEWAY, &gateway.octets())
        .attribute(libc::RTA_OIF, &index.to_ne_bytes())
}
