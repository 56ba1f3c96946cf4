//! Hears from the packet filter which packets it has judged (linux/netfilter/nfnetlink_log.h).
//!
//! The kernel drops what is not heard in time, and says so.

use std::io;
use std::net::Ipv4Addr;

use super::super::netlink::{Message, Socket};
use super::rules::{PASSED_GROUP, REFUSED_GROUP};
use crate::reached::Protocol;

const SUBSYSTEM: u16 = (libc::NFNL_SUBSYS_ULOG as u16) << 8;
const PACKET: u16 = SUBSYSTEM;
const CONFIGURE: u16 = SUBSYSTEM | 1;
const COMMAND: u16 = 1;
const MODE: u16 = 2;
const THRESHOLD: u16 = 5;
const BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
/// The longest IPv4 header, and the ports behind it.
const COPIED_BYTES: u32 = 64;
const PAYLOAD: u16 = 9;
/// struct nfgenmsg: family, version, and in network order the group.
const HEADER_BYTES: usize = 4;

/// A packet that was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub is_passed: bool,
    pub address: Ipv4Addr,
    pub protocol: Protocol,
    /// Where the protocol has ports.
    pub port: Option<u16>,
}

/// Listens in this process's network namespace; each packet is told of at once.
pub fn listen() -> io::Result<Socket> {
    let socket = Socket::netfilter()?;
    for group in [PASSED_GROUP, REFUSED_GROUP] {
        let [high, low] = group.to_be_bytes();
        let of_group =
            || Message::new(CONFIGURE, libc::NLM_F_ACK).raw(&[libc::AF_UNSPEC as u8, 0, high, low]);
        let [a, b, c, d] = COPIED_BYTES.to_be_bytes();
        socket.carry_out(vec![of_group().attribute(COMMAND, &[BIND])])?;
        let settings = of_group().attribute(MODE, &[a, b, c, d, COPY_PACKET, 0]).big_endian(THRESHOLD, 1);
        socket.carry_out(vec![settings])?;
    }
    Ok(socket)
}

/// Reads a message of the socket; none where it tells of no packet.
pub fn read(kind: u16, message: &[u8]) -> Option<Packet> {
    if kind != PACKET {
        return None;
    }
    let (head, mut rest) = message.split_first_chunk::<HEADER_BYTES>()?;
    let is_passed = u16::from_be_bytes([head[2], head[3]]) == PASSED_GROUP;
    while let Some((head, _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let value = rest.get(4..length)?;
        if u16::from_ne_bytes([head[2], head[3]]) == PAYLOAD {
            return read_packet(is_passed, value);
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn read_packet(is_passed: bool, packet: &[u8]) -> Option<Packet> {
    let first = packet.first()?;
    if first >> 4 != 4 {
        return None;
    }
    let protocol = match libc::c_int::from(*packet.get(9)?) {
        libc::IPPROTO_TCP => Protocol::Tcp,
        libc::IPPROTO_UDP => Protocol::Udp,
        libc::IPPROTO_ICMP => Protocol::Icmp,
        _ => Protocol::Other,
    };
    let address: [u8; 4] = *packet.get(16..)?.first_chunk()?;
    let header_bytes = usize::from(first & 0xf) * 4;
    let port = packet.get(header_bytes + 2..).and_then(|rest| rest.first_chunk()).copied();
    let has_ports = matches!(protocol, Protocol::Tcp | Protocol::Udp);
    let port = port.filter(|_| has_ports).map(u16::from_be_bytes);
    Some(Packet { is_passed, address: address.into(), protocol, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(group: u16, packet: &[u8]) -> Vec<u8> {
        let mut message = [&[2, 0][..], &group.to_be_bytes()].concat();
        // An attribute before it, of an odd length.
        message.extend([&5_u16.to_ne_bytes()[..], &10_u16.to_ne_bytes(), &[0, 0, 0, 0]].concat());
        let length = (4 + packet.len()) as u16;
        message.extend([&length.to_ne_bytes()[..], &PAYLOAD.to_ne_bytes(), packet].concat());
        message
    }

    #[test]
    fn packets_are_read_as_far_as_they_go() {
        let mut packet = vec![0_u8; 28];
        (packet[0], packet[9]) = (0x46, 6);
        packet[16..20].copy_from_slice(&[192, 0, 2, 7]);
        packet[26..28].copy_from_slice(&443_u16.to_be_bytes());
        let address = Ipv4Addr::new(192, 0, 2, 7);
        let passed = Packet { is_passed: true, address, protocol: Protocol::Tcp, port: Some(443) };
        assert_eq!(read(PACKET, &told(PASSED_GROUP, &packet)), Some(passed));
        packet[9] = 1;
        let refused = Packet { is_passed: false, address, protocol: Protocol::Icmp, port: None };
        assert_eq!(read(PACKET, &told(REFUSED_GROUP, &packet)), Some(refused));
        packet[0] = 0x60;
        assert_eq!(read(PACKET, &told(REFUSED_GROUP, &packet)), None);
        assert_eq!(read(CONFIGURE, &told(PASSED_GROUP, &packet)), None);
        packet[0] = 0x4f;
        packet[9] = 17;
        let without = read(PACKET, &told(PASSED_GROUP, &packet)).unwrap();
        assert_eq!((without.protocol, without.port), (Protocol::Udp, None));
        let whole = told(PASSED_GROUP, &packet);
        for end in 0..whole.len() {
            let _ = read(PACKET, &whole[..end]);
        }
        assert_eq!(read(PACKET, &whole[..30]), None);
    }
}
