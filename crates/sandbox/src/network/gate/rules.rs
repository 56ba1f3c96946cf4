//! Sets the packet filter's rules of a gate, in the network namespace that it is for, as nft(8) would write them:
//!
//! ```text
//! table inet sealci-gate {
//!   set open        { type ipv4_addr . inet_service }      # what names led to, and their ports
//!   chain output    { type filter hook output priority -1;  oifname { "lo", "machine" } accept; goto judge }
//!   chain forward   { type filter hook forward priority -1; oifname "machine" ct state established,related accept; goto judge }
//!   chain judge     { ct state established,related accept
//!                     ip daddr { forbidden } goto refuse
//!                     ip daddr NETWORK meta l4proto PROTOCOL th dport PORT log group 1 accept    # for each on the list
//!                     meta l4proto { tcp, udp } ip daddr . th dport @open log group 1 accept
//!                     goto refuse }
//!   chain refuse    { log group 2; meta l4proto tcp reject with tcp reset; reject with icmpx admin-prohibited }
//! }
//! ```
//!
//! It is asked before the tables of `firewall`, which would only be silent about what they drop.

use std::io;
use std::net::Ipv4Addr;

use super::super::firewall::{ANSWERS, LIST_ELEMENT, Rule, attribute, batch_edge, chain, message};
use super::super::machine;
use super::super::netlink::{Message, Socket};
use crate::spec::AllowedNetwork;

const TABLE: &str = "sealci-gate";
const OPEN: &str = "open";
const JUDGE: &str = "judge";
const REFUSE: &str = "refuse";
const PRIORITY: libc::c_int = libc::NF_IP_PRI_FILTER - 1;
const DESTINATION_OFFSET: u32 = 16;
const PROTOCOLS: [libc::c_int; 2] = [libc::IPPROTO_TCP, libc::IPPROTO_UDP];
/// An address and a port, each padded to four bytes.
const KEY_BYTES: usize = 8;

/// Who hears of what is let through, and of what is not.
pub const PASSED_GROUP: u16 = 1;
pub const REFUSED_GROUP: u16 = 2;

/// How many addresses with a port are open at a time.
pub const MAX_OPEN: usize = 8192;
/// In one message, which is to stay below 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 1024;

/// Closes this process's network namespace but for these networks. Lasts as long as that.
pub fn install(networks: &[AllowedNetwork], forbidden: &[(Ipv4Addr, u32)]) -> io::Result<()> {
    let socket = Socket::netfilter()?;
    let set = message(libc::NFT_MSG_NEWSET)
        .text(1, TABLE)
        .text(2, OPEN)
        .big_endian(3, 0)
        .big_endian(5, KEY_BYTES as u32)
        .nested(9, |description| description.big_endian(1, MAX_OPEN as u32))
        .big_endian(10, 1);
    let plain = |name: &str| {
        message(libc::NFT_MSG_NEWCHAIN).text(attribute::CHAIN_TABLE, TABLE).text(attribute::CHAIN_NAME, name)
    };
    let places = vec![
        batch_edge(libc::NFNL_MSG_BATCH_BEGIN),
        message(libc::NFT_MSG_NEWTABLE).text(attribute::TABLE_NAME, TABLE),
        set,
        plain(JUDGE),
        plain(REFUSE),
        chain(TABLE, "output", "filter", libc::NF_INET_LOCAL_OUT, PRIORITY),
        chain(TABLE, "forward", "filter", libc::NF_INET_FORWARD, PRIORITY),
        batch_edge(libc::NFNL_MSG_BATCH_END),
    ];
    socket.carry_out(places)?;

    let to = |interface: &str| {
        let name = format!("{interface}\0");
        Rule::default().interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, &name)
    };
    let answers = to(machine::TAP).state(ANSWERS).verdict(libc::NF_ACCEPT);
    let rules = [
        ("output", to("lo").verdict(libc::NF_ACCEPT)),
        ("output", to(machine::TAP).verdict(libc::NF_ACCEPT)),
        ("output", Rule::default().go_to(JUDGE)),
        ("forward", answers),
        ("forward", Rule::default().go_to(JUDGE)),
        (REFUSE, Rule::default().tell(REFUSED_GROUP)),
        (REFUSE, Rule::default().protocol(libc::IPPROTO_TCP).reset()),
        (REFUSE, Rule::default().prohibit()),
    ];
    let rules = rules.into_iter().chain(judgement(networks, forbidden).into_iter().map(|rule| (JUDGE, rule)));
    let mut batch = vec![batch_edge(libc::NFNL_MSG_BATCH_BEGIN)];
    batch.extend(rules.map(|(chain, rule)| rule.into_message(TABLE, chain)));
    batch.push(batch_edge(libc::NFNL_MSG_BATCH_END));
    socket.carry_out(batch)
}

fn judgement(networks: &[AllowedNetwork], forbidden: &[(Ipv4Addr, u32)]) -> Vec<Rule> {
    let to =
        |address, bits| Rule::default().family(libc::NFPROTO_IPV4).address(DESTINATION_OFFSET, address, bits);
    let mut rules = vec![Rule::default().state(ANSWERS).verdict(libc::NF_ACCEPT)];
    rules.extend(forbidden.iter().map(|(address, bits)| to(*address, *bits).go_to(REFUSE)));
    let pass = |rule: Rule| rule.tell(PASSED_GROUP).verdict(libc::NF_ACCEPT);
    for protocol in PROTOCOLS {
        for AllowedNetwork { address, prefix_bits, ports } in networks {
            let of_port = |port: &u16| pass(to(*address, u32::from(*prefix_bits)).port(protocol, *port));
            rules.extend(ports.iter().map(of_port));
        }
        rules.push(pass(Rule::default().family(libc::NFPROTO_IPV4).destination_in(protocol, OPEN)));
    }
    rules.push(Rule::default().go_to(REFUSE));
    rules
}

/// An address and the port that is open there.
pub type Destination = (Ipv4Addr, u16);

/// Changes what is open in the network namespace that its socket is of.
#[derive(Debug)]
pub struct Opener(Socket);

impl Opener {
    /// `socket` was made in that namespace.
    pub fn new(socket: Socket) -> Self {
        Self(socket)
    }

    pub fn open(&self, destinations: &[Destination]) -> io::Result<()> {
        self.change(libc::NFT_MSG_NEWSETELEM, destinations)
    }

    pub fn close(&self, destinations: &[Destination]) -> io::Result<()> {
        self.change(libc::NFT_MSG_DELSETELEM, destinations)
    }

    fn change(&self, kind: libc::c_int, destinations: &[Destination]) -> io::Result<()> {
        for some in destinations.chunks(ELEMENTS_PER_MESSAGE) {
            let batch = vec![
                batch_edge(libc::NFNL_MSG_BATCH_BEGIN),
                elements(kind, some),
                batch_edge(libc::NFNL_MSG_BATCH_END),
            ];
            self.0.carry_out(batch)?;
        }
        Ok(())
    }
}

fn elements(kind: libc::c_int, destinations: &[Destination]) -> Message {
    let key = |(address, port): &Destination| {
        let mut key = [0; KEY_BYTES];
        key[..4].copy_from_slice(&address.octets());
        key[4..6].copy_from_slice(&port.to_be_bytes());
        key
    };
    message(kind).text(1, TABLE).text(2, OPEN).nested(3, |list| {
        destinations.iter().fold(list, |list, destination| {
            list.nested(LIST_ELEMENT, |element| {
                element.nested(1, |nest| nest.attribute(attribute::DATA_VALUE, &key(destination)))
            })
        })
    })
}
