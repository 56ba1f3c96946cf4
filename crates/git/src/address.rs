//! Keeps repository URLs from reaching what only the service's own machine should: its loopback, its link, and the
//! metadata service of its cloud.
//!
//! A name is resolved once, here; git is then told to connect to just those addresses, so a name server that answers
//! differently the second time changes nothing. Redirects are not followed at all. Private networks (10.0.0.0/8 and
//! the like) are allowed: that is where most forges of one's own are.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::url::RemoteUrl;

/// Where a repository's host may be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pinned {
    pub host: String,
    pub port: u16,
    pub addresses: Vec<IpAddr>,
}

/// Why a repository's host is not connected to.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("cannot resolve the host `{host}`")]
    Unresolved { host: String, source: io::Error },
    #[error("the host `{host}` resolves to no address")]
    NoAddress { host: String },
    #[error(
        "the host `{host}` resolves to {address}, which only this machine should reach (loopback, link-local or metadata); have local addresses allowed in the service's configuration if this is wanted"
    )]
    Local { host: String, address: IpAddr },
}

/// Resolves the URL's host and refuses it if any of its addresses is local. A file URL has no host.
pub(crate) async fn pin(url: &RemoteUrl) -> Result<Option<Pinned>, AddressError> {
    let Some((host, port)) = url.authority() else { return Ok(None) };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let resolved = tokio::net::lookup_host((bare, port)).await;
    let resolved = resolved.map_err(|source| AddressError::Unresolved { host: host.to_owned(), source })?;
    let mut addresses: Vec<IpAddr> = Vec::new();
    for address in resolved.map(|socket| socket.ip()) {
        if is_local(address) {
            return Err(AddressError::Local { host: host.to_owned(), address });
        }
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(AddressError::NoAddress { host: host.to_owned() });
    }
    Ok(Some(Pinned { host: host.to_owned(), port, addresses }))
}

/// Tells whether an address means this machine, its link or its cloud's metadata service, in any notation that leads
/// there (IPv4 mapped, translated or tunnelled into IPv6 included).
pub fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => is_local_v4(v4),
        IpAddr::V6(v6) => is_local_v6(v6),
    }
}

fn is_local_v4(address: Ipv4Addr) -> bool {
    /// The metadata service of a large cloud that did not choose a link-local address.
    const METADATA: Ipv4Addr = Ipv4Addr::new(100, 100, 100, 200);
    address.octets()[0] == 0
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || address == METADATA
}

fn is_local_v6(address: Ipv6Addr) -> bool {
    /// The metadata service of another, in its unique-local range.
    const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254);
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_local_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // ::, ::1, ::a.b.c.d and ::ffff:a.b.c.d
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => embedded(high, low) || address.is_loopback(),
        // NAT64 (RFC 6052) and 6to4 (RFC 3056) carry an IPv4 address.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        _ => {
            address.is_unicast_link_local()
                || address.is_multicast()
                || segments[0] & 0xffc0 == 0xfec0
                || address == METADATA
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::url::AllowedTransports;

    #[test]
    fn local_addresses_are_known_in_every_notation() {
        for local in [
            "127.0.0.1",
            "127.255.0.1",
            "0.0.0.0",
            "169.254.169.254",
            "100.100.100.200",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "fe80::1",
            "fd00:ec2::254",
            "ff02::1",
            "fec0::1",
        ] {
            assert!(is_local(local.parse().unwrap()), "{local}");
        }
        for other in ["10.0.0.1", "192.168.1.1", "8.8.8.8", "2001:db8::1", "fd12::1", "64:ff9b::808:808"] {
            assert!(!is_local(other.parse().unwrap()), "{other}");
        }
    }

    #[tokio::test]
    async fn a_host_that_resolves_to_loopback_is_refused() {
        let allowed = AllowedTransports { http: true, file: true };
        for url in
            ["https://localhost/o/r", "https://127.1/o/r", "http://2130706433/o/r", "ssh://git@[::1]/o/r"]
        {
            let url = RemoteUrl::parse(url, &allowed).unwrap();
            let refused = pin(&url).await.unwrap_err();
            assert!(matches!(refused, AddressError::Local { .. }), "{url}: {refused}");
        }
        let file = RemoteUrl::parse("file:///srv/x", &allowed).unwrap();
        assert_eq!(pin(&file).await.unwrap(), None);
    }
}
