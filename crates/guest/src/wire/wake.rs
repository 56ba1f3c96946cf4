//! Tells the init of a machine what a machine cannot know by itself.

use std::fmt;
use std::net::Ipv4Addr;

use super::WireError;
use super::fields::{Fields, put_bytes, put_count, put_texts};
use super::machine::MOST_SERVICES;

/// The kernel's generator is whole with 32 bytes; more do no harm, and bound a frame.
pub const MAX_ENTROPY_BYTES: usize = 512;

/// What time it is, and what no other machine has.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Wake {
    /// Since 1970; 0 leaves the clock as it is.
    pub unix_time_us: u64,
    /// The host's `CLOCK_BOOTTIME` (clock_gettime(2)), read after the init called.
    pub host_boot_ms: u64,
    /// Secret, and of this machine alone: what was copied from a snapshot would draw the same numbers as its siblings otherwise.
    pub entropy: Vec<u8>,
    pub host_name: String,
    /// More names for `localhost`.
    pub names: Vec<String>,
    /// None: nothing but the loopback.
    pub network: Option<Network>,
    /// Whom the action runs as, in the words of images (`user`, `uid`, `user:group`, `uid:gid`); empty: root.
    pub user: String,
    /// Likewise whom each of the services beside it runs as, in the order of their disks and ports.
    pub services: Vec<String>,
}

/// What a machine's network card is set to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    pub address: Ipv4Addr,
    pub prefix_bits: u8,
    pub gateway: Ipv4Addr,
    /// Whom to ask for names.
    pub resolvers: Vec<Ipv4Addr>,
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wake")
            .field("unix_time_us", &self.unix_time_us)
            .field("host_name", &self.host_name)
            .finish_non_exhaustive()
    }
}

impl Wake {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.unix_time_us.to_le_bytes());
        out.extend(self.host_boot_ms.to_le_bytes());
        put_bytes(out, &self.entropy);
        put_bytes(out, self.host_name.as_bytes());
        put_texts(out, &self.names);
        match &self.network {
            None => out.push(0),
            Some(network) => {
                out.push(1);
                network.encode(out);
            }
        }
        put_bytes(out, self.user.as_bytes());
        put_texts(out, &self.services);
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            unix_time_us: fields.u64()?,
            host_boot_ms: fields.u64()?,
            entropy: match fields.bytes()? {
                bytes if bytes.len() <= MAX_ENTROPY_BYTES => bytes.to_vec(),
                _ => return Err(WireError::Invalid("entropy")),
            },
            host_name: fields.text()?,
            names: fields.texts()?,
            network: if fields.flag()? { Some(Network::decode(fields)?) } else { None },
            user: fields.text()?,
            services: match fields.texts()? {
                services if services.len() <= MOST_SERVICES => services,
                _ => return Err(WireError::Invalid("services")),
            },
        })
    }
}

impl Network {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.address.octets());
        out.push(self.prefix_bits);
        out.extend(self.gateway.octets());
        put_count(out, self.resolvers.len());
        for resolver in &self.resolvers {
            out.extend(resolver.octets());
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            address: fields.address()?,
            prefix_bits: match fields.u8()? {
                bits @ 0..=32 => bits,
                _ => return Err(WireError::Invalid("prefix")),
            },
            gateway: fields.address()?,
            resolvers: (0..fields.count()?).map(|_| fields.address()).collect::<Result<_, _>>()?,
        })
    }
}
