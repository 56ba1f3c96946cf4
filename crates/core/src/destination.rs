//! Reads what an action may reach that is held to a list.
//!
//! ```text
//! destination  place (":" port)?                       without a port: 80 and 443
//! place        name | "*." name | address | network    `example.org`, `*.example.org`, `192.0.2.7`, `10.1.0.0/16`
//! ```
//!
//! `*.example.org` is every name below `example.org`, however far, and not that name itself. A port is open for TCP and UDP.
//! There is no IPv6 in any environment, so nothing here names any.

use std::fmt;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// What is open where no port is named: the web.
const WEB_PORTS: [u16; 2] = [80, 443];
/// Of a name (RFC 1035), and of one of its labels.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

/// A place, and the ports that may be reached there.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Destination {
    pub place: Place,
    port: Option<u16>,
}

/// Where a destination is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// Whatever this name leads to. In lower case.
    Name(String),
    /// Whatever the names below this one lead to. In lower case.
    Below(String),
    /// The addresses whose first bits are these; the others are 0.
    Network { address: Ipv4Addr, prefix_bits: u8 },
}

/// Why a text is no destination.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}; {mend}")]
pub struct InvalidDestination {
    /// What goes on after the text: "is an address of a page".
    pub message: &'static str,
    /// What to do.
    pub mend: String,
}

impl InvalidDestination {
    fn new(message: &'static str, mend: impl Into<String>) -> Self {
        Self { message, mend: mend.into() }
    }
}

impl Destination {
    /// Reads one.
    pub fn parse(text: &str) -> Result<Self, InvalidDestination> {
        if text.is_empty() {
            return Err(InvalidDestination::new("names no place", "write `packages.example.org:443`"));
        }
        if let Some((_, behind)) = text.split_once("://") {
            let host = behind.split('/').next().unwrap_or_default();
            return Err(InvalidDestination::new("is the address of a page", format!("write `{host}`")));
        }
        let (place, port) = match text.split_once(':') {
            None => (text, None),
            Some((_, port)) if text.starts_with('[') || port.contains(':') => {
                let mend = "name the host, or its IPv4 address: environments have no IPv6";
                return Err(InvalidDestination::new("is an IPv6 address", mend));
            }
            Some((place, port)) => (place, Some(parse_port(port)?)),
        };
        Ok(Self { place: Place::parse(place)?, port })
    }

    /// The ports, at least one.
    pub fn ports(&self) -> Vec<u16> {
        self.port.map_or(WEB_PORTS.to_vec(), |port| vec![port])
    }
}

fn parse_port(text: &str) -> Result<u16, InvalidDestination> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    let port = text.parse().ok().filter(|_| is_plain);
    port.ok_or_else(|| {
        InvalidDestination::new("has no port behind its `:`", "write a number from 1 to 65535")
    })
}

impl Place {
    fn parse(text: &str) -> Result<Self, InvalidDestination> {
        if let Some((address, bits)) = text.split_once('/') {
            return Self::parse_network(address, bits);
        }
        if let Ok(address) = text.parse() {
            return Ok(Self::Network { address, prefix_bits: 32 });
        }
        let lower = text.to_ascii_lowercase();
        match lower.strip_prefix("*.") {
            Some(name) if is_host_name(name) => Ok(Self::Below(name.to_owned())),
            None if is_host_name(&lower) => Ok(Self::Name(lower)),
            _ if text == "*" => {
                Err(InvalidDestination::new("is everything", "write `network: on`, or name what is reached"))
            }
            _ if text.contains('*') => {
                let mend = "a `*` stands in front alone, and for whole labels: `*.example.org`";
                Err(InvalidDestination::new("has its `*` where none can be", mend))
            }
            _ => {
                let mend = "write `packages.example.org`, `*.example.org`, `192.0.2.7` or `10.1.0.0/16`, and a port \
                            behind a `:`";
                Err(InvalidDestination::new("is no name of a host and no address", mend))
            }
        }
    }

    fn parse_network(address: &str, bits: &str) -> Result<Self, InvalidDestination> {
        let wrong = || {
            let mend = "write a network as `10.1.0.0/16`, and a host without what is behind the `/`";
            InvalidDestination::new("is no network", mend)
        };
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let is_plain = bits.bytes().all(|byte| byte.is_ascii_digit());
        let prefix_bits = bits.parse::<u8>().ok().filter(|bits| is_plain && *bits <= 32).ok_or_else(wrong)?;
        if prefix_bits == 0 {
            return Err(InvalidDestination::new(
                "is everything",
                "write `network: on`, or name what is reached",
            ));
        }
        let first = Ipv4Addr::from(u32::from(address) & (u32::MAX << (32 - prefix_bits)));
        if first != address {
            let mend = format!("write `{first}/{prefix_bits}`, or `{address}` for the one address");
            return Err(InvalidDestination::new("has bits behind its network's", mend));
        }
        Ok(Self::Network { address, prefix_bits })
    }
}

/// One of letters, digits, `-` and `_`, whose last label is not a number (what looks like an address is one, or wrong).
fn is_host_name(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let is_label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.bytes().all(is_allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last = text.rsplit('.').next().unwrap_or_default();
    text.len() <= MAX_NAME_BYTES
        && text.split('.').all(is_label)
        && !last.bytes().all(|byte| byte.is_ascii_digit())
}

/// As [`Destination::parse`] reads it.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Name(name) => write!(f, "{name}")?,
            Place::Below(name) => write!(f, "*.{name}")?,
            Place::Network { address, prefix_bits: 32 } => write!(f, "{address}")?,
            Place::Network { address, prefix_bits } => write!(f, "{address}/{prefix_bits}")?,
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

impl TryFrom<String> for Destination {
    type Error = InvalidDestination;

    fn try_from(text: String) -> Result<Self, InvalidDestination> {
        Self::parse(&text)
    }
}

impl From<Destination> for String {
    fn from(destination: Destination) -> Self {
        destination.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_read_and_written() {
        let network = |address: [u8; 4], prefix_bits| Place::Network { address: address.into(), prefix_bits };
        for (text, place, ports) in [
            ("example.org", Place::Name("example.org".into()), vec![80, 443]),
            ("db:5432", Place::Name("db".into()), vec![5432]),
            ("*.example.org:22", Place::Below("example.org".into()), vec![22]),
            ("_a.b-c.x1:65535", Place::Name("_a.b-c.x1".into()), vec![65535]),
            ("192.0.2.7:1", network([192, 0, 2, 7], 32), vec![1]),
            ("10.1.0.0/16", network([10, 1, 0, 0], 16), vec![80, 443]),
            ("10.1.2.0/24:5432", network([10, 1, 2, 0], 24), vec![5432]),
        ] {
            let destination = Destination::parse(text).unwrap();
            assert_eq!((&destination.place, destination.ports()), (&place, ports), "{text}");
            assert_eq!(destination.to_string(), text);
            let json = serde_json::to_string(&destination).unwrap();
            assert_eq!(serde_json::from_str::<Destination>(&json).unwrap(), destination);
        }
        assert_eq!(Destination::parse("Example.ORG").unwrap().to_string(), "example.org");
        assert_eq!(Destination::parse("192.0.2.7/32").unwrap().to_string(), "192.0.2.7");
    }

    #[test]
    fn what_is_no_destination_says_what_to_write() {
        for (text, message, mend) in [
            ("", "names no place", "packages.example.org:443"),
            ("https://example.org/x", "the address of a page", "write `example.org`"),
            ("example.org:", "no port", "65535"),
            ("example.org:0", "no port", "65535"),
            ("example.org:080", "no port", "65535"),
            ("example.org:65536", "no port", "65535"),
            ("example.org:https", "no port", "65535"),
            ("::1", "IPv6", "no IPv6"),
            ("[2001:db8::1]:443", "IPv6", "no IPv6"),
            ("*", "is everything", "network: on"),
            ("0.0.0.0/0", "is everything", "network: on"),
            ("a.*.example.org", "its `*`", "`*.example.org`"),
            ("*example.org", "its `*`", "`*.example.org`"),
            ("*.", "its `*`", "`*.example.org`"),
            ("10.1.2.3/16", "bits behind", "write `10.1.0.0/16`, or `10.1.2.3`"),
            ("10.1.0.0/33", "no network", "10.1.0.0/16"),
            ("10.1.0.0/+8", "no network", "10.1.0.0/16"),
            ("example.org/path", "no network", "without what is behind"),
            ("10.1.2", "no name of a host", "192.0.2.7"),
            ("1.2.3.256", "no name of a host", "192.0.2.7"),
            ("a..b", "no name of a host", "192.0.2.7"),
            ("-a.b", "no name of a host", "192.0.2.7"),
            ("a b", "no name of a host", "192.0.2.7"),
            ("bücher.example", "no name of a host", "192.0.2.7"),
        ] {
            let error = Destination::parse(text).unwrap_err();
            assert!(error.message.contains(message), "{text}: {error}");
            assert!(error.mend.contains(mend), "{text}: {error}");
        }
        assert!(Destination::parse(&"a".repeat(64)).is_err());
        assert!(Destination::parse(&"a.".repeat(127)).is_err());
    }
}
