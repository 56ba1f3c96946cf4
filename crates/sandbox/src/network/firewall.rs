//! Sets the packet filter's rules for one block of sandboxes, as nft(8) would write them:
//!
//! ```text
//! table inet sealci-07 {
//!   chain input       { type filter hook input;        iifname "sealci07-*" drop }
//!   chain forward     { type filter hook forward;
//!                       oifname "sealci07-*" ct state established,related accept
//!                       oifname "sealci*" iifname "sealci07-*" drop
//!                       oifname "sealci07-*" drop
//!                       iifname "sealci07-*" meta nfproto ipv6 drop
//!                       iifname "sealci07-*" ip daddr { metadata } drop }
//!   chain postrouting { type nat hook postrouting;     ip saddr 10.213.56.0/21 oifname != "sealci*" masquerade }
//! }
//! ```
//!
//! and, in the network namespace of a sandbox whose traffic is relayed:
//!
//! ```text
//! table inet sealci {
//!   chain output { type filter hook output; oifname { "lo", "machine" } accept; meta nfproto ipv6 drop; ip daddr { forbidden } drop }
//! }
//! ```
//!
//! Routes could not do the latter: a socket that is bound to an interface does not ask them. In the network namespace of a
//! machine's tap:
//!
//! ```text
//! table inet sealci-machine {
//!   chain input       { type filter hook input;
//!                       iifname "machine" ip saddr guest meta l4proto { tcp, udp } th dport 53 accept   # where a gate answers
//!                       iifname "machine" drop }
//!   chain forward     { type filter hook forward;
//!                       oifname "machine" ct state established,related accept
//!                       oifname "machine" drop
//!                       meta nfproto ipv6 drop
//!                       ip saddr != guest drop
//!                       ct state invalid drop          # it would not be translated
//!                       ip daddr { forbidden } drop }
//!   chain postrouting { type nat hook postrouting;     oifname != "machine" masquerade }
//! }
//! ```
//!
//! Numbers are those of linux/netfilter/nf_tables.h.

use std::io;
use std::net::Ipv4Addr;

use super::netlink::{Message, Socket};
use super::{BLOCK_PREFIX_BITS, Block, INTERFACE_PREFIX, machine};

/// Where clouds tell a machine about itself, secrets included: link-local for most, and what the others took.
pub(super) const METADATA: [(Ipv4Addr, u32); 4] = [
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(100, 100, 100, 200), 32),
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(192, 0, 0, 192), 32),
];

const SUBSYSTEM: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8;
pub(super) const LIST_ELEMENT: u16 = 1;
const REGISTER: u32 = libc::NFT_REG_1 as u32;
/// Where names are asked for.
pub(super) const NAME_PORT: u16 = 53;
/// `NFT_REJECT_TCP_RST`, `NFT_REJECT_ICMPX_UNREACH`, and of that `NFT_REJECT_ICMPX_ADMIN_PROHIBITED`.
const REJECT_RESET: u32 = 1;
const REJECT_UNREACHABLE: u32 = 2;
const REJECT_PROHIBITED: u8 = 3;
/// `NFT_TABLE_F_OWNER`: the table is the socket's and ends with it; Linux 5.12.
const TABLE_OWNED: u32 = 2;

pub(super) mod attribute {
    pub const TABLE_NAME: u16 = 1;
    pub const TABLE_FLAGS: u16 = 2;
    pub const CHAIN_TABLE: u16 = 1;
    pub const CHAIN_NAME: u16 = 3;
    pub const CHAIN_HOOK: u16 = 4;
    pub const CHAIN_TYPE: u16 = 7;
    pub const HOOK_NUMBER: u16 = 1;
    pub const HOOK_PRIORITY: u16 = 2;
    pub const RULE_TABLE: u16 = 1;
    pub const RULE_CHAIN: u16 = 2;
    pub const RULE_EXPRESSIONS: u16 = 4;
    pub const EXPRESSION_NAME: u16 = 1;
    pub const EXPRESSION_DATA: u16 = 2;
    pub const DATA_VALUE: u16 = 1;
    pub const DATA_VERDICT: u16 = 2;
    pub const VERDICT_CODE: u16 = 1;
    pub const VERDICT_CHAIN: u16 = 2;
}

/// Installs the rules; they last as long as the socket.
pub fn install(block: &Block) -> io::Result<Socket> {
    let socket = Socket::netfilter()?;
    let table = format!("sealci-{:02}", block.number);
    let ours = block.interface_prefix();
    let mut batch = vec![
        batch_edge(libc::NFNL_MSG_BATCH_BEGIN),
        message(libc::NFT_MSG_NEWTABLE)
            .text(attribute::TABLE_NAME, &table)
            .big_endian(attribute::TABLE_FLAGS, TABLE_OWNED),
        chain(&table, "input", "filter", libc::NF_INET_LOCAL_IN, libc::NF_IP_PRI_FILTER),
        chain(&table, "forward", "filter", libc::NF_INET_FORWARD, libc::NF_IP_PRI_FILTER),
        chain(&table, "postrouting", "nat", libc::NF_INET_POST_ROUTING, libc::NF_IP_PRI_NAT_SRC),
    ];
    let from = || Rule::default().interface(libc::NFT_META_IIFNAME, libc::NFT_CMP_EQ, &ours);
    let to = || Rule::default().interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, &ours);
    batch.push(from().verdict(libc::NF_DROP).into_message(&table, "input"));
    let mut forward = vec![
        to().state(ANSWERS).verdict(libc::NF_ACCEPT),
        from().interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, INTERFACE_PREFIX).verdict(libc::NF_DROP),
        to().verdict(libc::NF_DROP),
        from().family(libc::NFPROTO_IPV6).verdict(libc::NF_DROP),
    ];
    forward.extend(METADATA.map(|(network, bits)| {
        from().family(libc::NFPROTO_IPV4).address(DESTINATION_OFFSET, network, bits).verdict(libc::NF_DROP)
    }));
    batch.extend(forward.into_iter().map(|rule| rule.into_message(&table, "forward")));
    let masquerade = Rule::default()
        .family(libc::NFPROTO_IPV4)
        .address(SOURCE_OFFSET, Ipv4Addr::from(block.first()), BLOCK_PREFIX_BITS)
        .interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_NEQ, INTERFACE_PREFIX)
        .expression("masq", |data| data);
    batch.push(masquerade.into_message(&table, "postrouting"));
    batch.push(batch_edge(libc::NFNL_MSG_BATCH_END));
    socket.carry_out(batch)?;
    Ok(socket)
}

/// Forbids these networks, and IPv6, to everyone in this process's network namespace but over its loopback. Lasts as long as
/// the namespace.
pub fn confine(forbidden: &[(Ipv4Addr, u32)]) -> io::Result<()> {
    let (table, chain_name) = ("sealci", "output");
    let mut batch = vec![
        batch_edge(libc::NFNL_MSG_BATCH_BEGIN),
        message(libc::NFT_MSG_NEWTABLE).text(attribute::TABLE_NAME, table),
        chain(table, chain_name, "filter", libc::NF_INET_LOCAL_OUT, libc::NF_IP_PRI_FILTER),
    ];
    let mut rules = vec![
        // The whole name: its NUL is compared, too.
        Rule::default().interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, "lo\0").verdict(libc::NF_ACCEPT),
        // What a machine is answered; nobody else's link has that name.
        Rule::default()
            .interface(libc::NFT_META_OIFNAME, libc::NFT_CMP_EQ, &format!("{}\0", machine::TAP))
            .verdict(libc::NF_ACCEPT),
        Rule::default().family(libc::NFPROTO_IPV6).verdict(libc::NF_DROP),
    ];
    rules.extend(forbidden.iter().map(|(network, bits)| {
        Rule::default()
            .family(libc::NFPROTO_IPV4)
            .address(DESTINATION_OFFSET, *network, *bits)
            .verdict(libc::NF_DROP)
    }));
    batch.extend(rules.into_iter().map(|rule| rule.into_message(table, chain_name)));
    batch.push(batch_edge(libc::NFNL_MSG_BATCH_END));
    Socket::netfilter()?.carry_out(batch)
}

/// Forwards what this guest sends by a tap, translated, and the answers; see the module. With `asks` it may ask this network
/// namespace for names. Lasts as long as that.
pub fn forward(tap: &str, guest: Ipv4Addr, forbidden: &[(Ipv4Addr, u32)], asks: bool) -> io::Result<()> {
    let table = "sealci-machine";
    let tap = format!("{tap}\0");
    let to = |operator| Rule::default().interface(libc::NFT_META_OIFNAME, operator, &tap);
    let ipv4 = || Rule::default().family(libc::NFPROTO_IPV4);
    let mut rules = vec![
        to(libc::NFT_CMP_EQ).state(ANSWERS).verdict(libc::NF_ACCEPT),
        to(libc::NFT_CMP_EQ).verdict(libc::NF_DROP),
        Rule::default().family(libc::NFPROTO_IPV6).verdict(libc::NF_DROP),
        ipv4()
            .field(SOURCE_OFFSET)
            .compare(libc::NFT_CMP_NEQ, guest.octets().to_vec())
            .verdict(libc::NF_DROP),
        Rule::default().state(INVALID).verdict(libc::NF_DROP),
    ];
    rules.extend(
        forbidden.iter().map(|(network, bits)| {
            ipv4().address(DESTINATION_OFFSET, *network, *bits).verdict(libc::NF_DROP)
        }),
    );
    let from = || Rule::default().interface(libc::NFT_META_IIFNAME, libc::NFT_CMP_EQ, &tap);
    let question = |protocol| {
        let guests = from().family(libc::NFPROTO_IPV4).address(SOURCE_OFFSET, guest, 32);
        guests.port(protocol, NAME_PORT).verdict(libc::NF_ACCEPT).into_message(table, "input")
    };
    let mut batch = vec![
        batch_edge(libc::NFNL_MSG_BATCH_BEGIN),
        message(libc::NFT_MSG_NEWTABLE).text(attribute::TABLE_NAME, table),
        chain(table, "input", "filter", libc::NF_INET_LOCAL_IN, libc::NF_IP_PRI_FILTER),
        chain(table, "forward", "filter", libc::NF_INET_FORWARD, libc::NF_IP_PRI_FILTER),
        chain(table, "postrouting", "nat", libc::NF_INET_POST_ROUTING, libc::NF_IP_PRI_NAT_SRC),
    ];
    if asks {
        batch.extend([libc::IPPROTO_TCP, libc::IPPROTO_UDP].map(question));
    }
    batch.extend([
        from().verdict(libc::NF_DROP).into_message(table, "input"),
        to(libc::NFT_CMP_NEQ).expression("masq", |data| data).into_message(table, "postrouting"),
    ]);
    batch.extend(rules.into_iter().map(|rule| rule.into_message(table, "forward")));
    batch.push(batch_edge(libc::NFNL_MSG_BATCH_END));
    Socket::netfilter()?.carry_out(batch)
}

/// struct nfgenmsg: family, version, resource (big-endian).
pub(super) fn batch_edge(kind: libc::c_int) -> Message {
    let resource = (libc::NFNL_SUBSYS_NFTABLES as u16).to_be_bytes();
    Message::new(kind as u16, 0).raw(&[libc::AF_UNSPEC as u8, 0, resource[0], resource[1]])
}

pub(super) fn message(kind: libc::c_int) -> Message {
    let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_APPEND;
    Message::new(SUBSYSTEM | kind as u16, flags).raw(&[libc::NFPROTO_INET as u8, 0, 0, 0])
}

pub(super) fn chain(
    table: &str,
    name: &str,
    kind: &str,
    hook: libc::c_int,
    priority: libc::c_int,
) -> Message {
    message(libc::NFT_MSG_NEWCHAIN)
        .text(attribute::CHAIN_TABLE, table)
        .text(attribute::CHAIN_NAME, name)
        .nested(attribute::CHAIN_HOOK, |data| {
            data.big_endian(attribute::HOOK_NUMBER, hook as u32)
                .big_endian(attribute::HOOK_PRIORITY, priority as u32)
        })
        .text(attribute::CHAIN_TYPE, kind)
}

/// Bits of `ct state`, in this machine's order.
const INVALID: u32 = 1 << 0;
/// `established,related`.
pub(super) const ANSWERS: u32 = 1 << 1 | 1 << 2;

const SOURCE_OFFSET: u32 = 12;
const DESTINATION_OFFSET: u32 = 16;

type Fill = Box<dyn FnOnce(Message) -> Message>;

/// A rule's expressions, in order; each passes to the next what it matches.
#[derive(Default)]
pub(super) struct Rule(Vec<Fill>);

impl Rule {
    pub fn expression(mut self, name: &'static str, data: impl FnOnce(Message) -> Message + 'static) -> Self {
        self.0.push(Box::new(move |rule| {
            rule.nested(LIST_ELEMENT, |element| {
                element.text(attribute::EXPRESSION_NAME, name).nested(attribute::EXPRESSION_DATA, data)
            })
        }));
        self
    }

    pub fn compare(self, operator: libc::c_int, value: Vec<u8>) -> Self {
        self.expression("cmp", move |data| {
            data.big_endian(1, REGISTER)
                .big_endian(2, operator as u32)
                .nested(3, |nest| nest.attribute(attribute::DATA_VALUE, &value))
        })
    }

    fn mask(self, mask: [u8; 4]) -> Self {
        self.expression("bitwise", move |data| {
            data.big_endian(1, REGISTER)
                .big_endian(2, REGISTER)
                .big_endian(3, 4)
                .nested(4, |nest| nest.attribute(attribute::DATA_VALUE, &mask))
                .nested(5, |nest| nest.attribute(attribute::DATA_VALUE, &[0; 4]))
        })
    }

    fn meta(self, key: libc::c_int) -> Self {
        self.expression("meta", move |data| data.big_endian(1, REGISTER).big_endian(2, key as u32))
    }

    /// Names that begin with `prefix`: a comparison shorter than the register.
    pub fn interface(self, key: libc::c_int, operator: libc::c_int, prefix: &str) -> Self {
        self.meta(key).compare(operator, prefix.as_bytes().to_vec())
    }

    pub fn family(self, family: libc::c_int) -> Self {
        self.meta(libc::NFT_META_NFPROTO).compare(libc::NFT_CMP_EQ, vec![family as u8])
    }

    /// Four bytes of the network header.
    pub fn field(self, offset: u32) -> Self {
        self.expression("payload", move |data| {
            data.big_endian(1, REGISTER)
                .big_endian(2, libc::NFT_PAYLOAD_NETWORK_HEADER as u32)
                .big_endian(3, offset)
                .big_endian(4, 4)
        })
    }

    pub fn address(self, offset: u32, network: Ipv4Addr, bits: u32) -> Self {
        let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
        self.field(offset).mask(mask.to_be_bytes()).compare(libc::NFT_CMP_EQ, network.octets().to_vec())
    }

    /// Packets of this protocol to this port.
    pub fn port(self, protocol: libc::c_int, port: u16) -> Self {
        // All protocols fit in a byte.
        self.meta(libc::NFT_META_L4PROTO)
            .compare(libc::NFT_CMP_EQ, vec![protocol as u8])
            .port_field(REGISTER)
            .compare(libc::NFT_CMP_EQ, port.to_be_bytes().to_vec())
    }

    /// Packets of this protocol whose destination's address and port are together in the set.
    pub fn destination_in(self, protocol: libc::c_int, set: &'static str) -> Self {
        self.meta(libc::NFT_META_L4PROTO)
            .compare(libc::NFT_CMP_EQ, vec![protocol as u8])
            .field(DESTINATION_OFFSET)
            .port_field(libc::NFT_REG32_01 as u32)
            .expression("lookup", move |data| data.text(1, set).big_endian(2, REGISTER))
    }

    /// The destination's port, which the transport header has at its third byte, padded with zeroes.
    fn port_field(self, register: u32) -> Self {
        self.expression("payload", move |data| {
            data.big_endian(1, register)
                .big_endian(2, libc::NFT_PAYLOAD_TRANSPORT_HEADER as u32)
                .big_endian(3, 2)
                .big_endian(4, 2)
        })
    }

    /// Packets of this protocol.
    pub fn protocol(self, protocol: libc::c_int) -> Self {
        self.meta(libc::NFT_META_L4PROTO).compare(libc::NFT_CMP_EQ, vec![protocol as u8])
    }

    /// Tells whoever listens to this group, and goes on.
    pub fn tell(self, group: u16) -> Self {
        self.expression("log", move |data| data.attribute(1, &group.to_be_bytes()))
    }

    /// Answers as a closed port does.
    pub fn reset(self) -> Self {
        self.expression("reject", |data| data.big_endian(1, REJECT_RESET).attribute(2, &[0]))
    }

    /// Answers that it is prohibited.
    pub fn prohibit(self) -> Self {
        self.expression("reject", |data| {
            data.big_endian(1, REJECT_UNREACHABLE).attribute(2, &[REJECT_PROHIBITED])
        })
    }

    /// Goes on in another chain, for good.
    pub fn go_to(self, chain: &'static str) -> Self {
        self.verdict_with(libc::NFT_GOTO, move |verdict| verdict.text(attribute::VERDICT_CHAIN, chain))
    }

    /// `ct state` with one of these bits.
    pub fn state(self, bits: u32) -> Self {
        self.expression("ct", |data| data.big_endian(1, REGISTER).big_endian(2, libc::NFT_CT_STATE as u32))
            .mask(bits.to_ne_bytes())
            .compare(libc::NFT_CMP_NEQ, vec![0; 4])
    }

    pub fn verdict(self, code: libc::c_int) -> Self {
        self.verdict_with(code, |verdict| verdict)
    }

    fn verdict_with(self, code: libc::c_int, fill: impl FnOnce(Message) -> Message + 'static) -> Self {
        self.expression("immediate", move |data| {
            data.big_endian(1, libc::NFT_REG_VERDICT as u32).nested(2, |nest| {
                nest.nested(attribute::DATA_VERDICT, |verdict| {
                    fill(verdict.big_endian(attribute::VERDICT_CODE, code as u32))
                })
            })
        })
    }

    pub fn into_message(self, table: &str, chain: &str) -> Message {
        message(libc::NFT_MSG_NEWRULE)
            .text(attribute::RULE_TABLE, table)
            .text(attribute::RULE_CHAIN, chain)
            .nested(attribute::RULE_EXPRESSIONS, |list| {
                self.0.into_iter().fold(list, |list, fill| fill(list))
            })
    }
}
