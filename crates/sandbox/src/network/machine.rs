//! Lets a virtual machine reach what a sandbox in its place would: its tap is in such a sandbox's network namespace, which
//! forwards and translates.
//!
//! ```text
//! guest: eth0 10.213.254.1/31 ──── machine 10.213.254.0/31 ── filter ── masquerade ── eth0: a sandbox's ──▶ outside
//! ```
//!
//! A guest is root over its card and sends what it likes, where a sandbox has no privilege to. Invariants: nothing leaves the
//! namespace but under its own address, and nothing comes in but answers; so whatever keeps a sandbox from the host and from
//! others keeps a machine from them, too. What a relay's own sockets could reach is forbidden here as well, for its filter
//! judges only what is sent from within the namespace. All of it goes with the namespace. IPv6 is off.

use std::fs;
use std::io;
use std::net::Ipv4Addr;

use super::firewall;
use super::link::{self, PREFIX_BITS as LINK_PREFIX_BITS};
use super::netlink::Socket;
use super::relay::{self, RelayError};
use crate::spec::NetworkSpec;
use crate::sys;

/// The name of the tap.
pub const TAP: &str = "machine";
/// The guest's own.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 254, 1);
pub const PREFIX_BITS: u8 = LINK_PREFIX_BITS;
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 213, 254, 0);

/// Why a machine has no tap.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("cannot make a tap; {} is needed: as root, modprobe tun", sys::TUNNEL_DEVICE)]
    Make(#[source] io::Error),
    #[error("cannot give the tap its address")]
    Raise(#[source] io::Error),
    #[error(
        "cannot forward what comes from the tap; that needs nf_tables and its NAT: as root, modprobe nft_masq"
    )]
    Forward(#[source] io::Error),
}

/// What a machine on this network may not reach. To be called while this process is in the host's network namespace.
pub fn forbidden(network: &NetworkSpec) -> Result<Vec<(Ipv4Addr, u32)>, RelayError> {
    match network {
        NetworkSpec::Relayed { .. } => relay::forbidden(),
        // The host's filter knows the rest.
        NetworkSpec::Off | NetworkSpec::On { .. } | NetworkSpec::Joined { .. } => {
            Ok(firewall::METADATA.to_vec())
        }
    }
}

/// Makes the tap in this process's network namespace, which is a sandbox's already. With `asks` the guest asks that for names.
pub fn attach(forbidden: &[(Ipv4Addr, u32)], asks: bool) -> Result<(), TapError> {
    sys::make_tap(TAP).map_err(TapError::Make)?;
    // What is not there cannot be disabled, and need not be.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6"), "1");
    Socket::route().and_then(|socket| link::raise(&socket, TAP, GATEWAY)).map_err(TapError::Raise)?;
    firewall::forward(TAP, ADDRESS, forbidden, asks)
        .and_then(|()| fs::write(super::FORWARDING, "1"))
        .map_err(TapError::Forward)
}
