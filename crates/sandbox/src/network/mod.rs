//! Lets sandboxes reach outwards, and nothing of the host: each has a link of its own to the host, which forwards and
//! translates; the packet filter drops what is meant for the host itself, for other sandboxes, or for a cloud's metadata.
//!
//! ```text
//! sandbox: eth0 10.213.a.b/31 ──── host: sealci07-12 10.213.a.(b-1)/31 ── filter ── masquerade ──▶ outside
//! ```
//!
//! Invariants: an agent owns a block of addresses by a lock that ends with its process; the filter's table belongs to a
//! socket of the agent's and ends with it, too (`NFT_TABLE_F_OWNER`); a link ends with its sandbox's network namespace. So
//! nothing is left by an agent that was killed. IPv6 is off on these links. What forwards packets is the kernel's global
//! switch, which stays on once it has been turned on.

mod firewall;
mod gate;
mod link;
pub mod machine;
mod netlink;
pub mod relay;

use std::fs::{self, File, TryLockError};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use gate::{ADDRESS as GATE_ADDRESS, GateError, Gatekeeper};
pub use link::Link;
pub use netlink::Socket;
pub use relay::{Relay, RelayError, RelayKind};

use crate::spec::NetworkSpec;
use crate::sys;

/// Where the blocks' locks are, for all agents of a machine.
const LOCK_FOLDER: &str = "/run/sealci";
/// Every agent's interfaces begin with it.
const INTERFACE_PREFIX: &str = "sealci";
/// 10.213.0.0/16 in blocks of 2,048 addresses. The last one is for networks that exist within one sandbox's or machine's
/// namespace only: [`relay`]'s and [`machine`]'s.
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 0);
const BLOCKS: u32 = 31;
const ADDRESSES_PER_BLOCK: u32 = 2048;
const BLOCK_PREFIX_BITS: u32 = 21;
/// The lowest port for everybody, of this process's network namespace (Linux 4.11).
const UNPRIVILEGED_PORTS: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// Why sandboxes have no way outwards.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    #[error("cannot {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "all {BLOCKS} blocks of addresses from {FIRST_ADDRESS} on are in use by other agents or networks"
    )]
    NoBlock,
    #[error("cannot set the packet filter's rules; they need Linux 5.12 with nf_tables and its NAT")]
    Firewall(#[source] io::Error),
}

/// An agent's way outwards, for all of its sandboxes. Dropping it closes it.
#[derive(Debug)]
pub struct Uplink {
    block: Block,
    resolvers: Vec<String>,
    _lock: File,
    _firewall: Socket,
}

impl Uplink {
    /// Takes a free block, and sets the rules for it. This process must be root's.
    pub fn open() -> Result<Self, UplinkError> {
        let (block, lock) = Block::take()?;
        let firewall = firewall::install(&block).map_err(UplinkError::Firewall)?;
        let path = Path::new(FORWARDING);
        if fs::read_to_string(path).map_err(io_error("read", path))?.trim() != "1" {
            fs::write(path, "1").map_err(io_error("turn on forwarding in", path))?;
        }
        Ok(Self { block, resolvers: resolvers(), _lock: lock, _firewall: firewall })
    }

    /// The link of the sandbox in this slot, for its description; none past the end of the block.
    pub fn link(&self, slot: u32) -> Option<NetworkSpec> {
        let host_address = self.block.address(slot.checked_mul(2)?)?;
        let address = self.block.address(slot * 2 + 1)?;
        let host_interface = format!("{}{slot}", self.block.interface_prefix());
        Some(NetworkSpec::On { host_interface, host_address, address, resolvers: self.resolvers.clone() })
    }
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> UplinkError {
    let path = path.to_owned();
    move |source| UplinkError::Io { doing, path, source }
}

/// Brings the loopback of this process's network namespace up, and lets everybody in it listen on any port: what is
/// privileged about the lower ones is privileged on the host.
pub fn arrange() -> io::Result<()> {
    // Where that may not be said, or is not known, they stay root's.
    let _ = fs::write(UNPRIVILEGED_PORTS, "0");
    sys::raise_loopback()
}

/// How long another sandbox's helper may take until it has a network of its own.
const FOUNDING_PATIENCE: Duration = Duration::from_secs(10);
const FOUNDING_INTERVAL: Duration = Duration::from_millis(1);

/// The network of the process that `find` names, which must not be this process's: that would be the host's. One that is not
/// there yet is waited for; nothing tells of it.
pub fn of_another(mut find: impl FnMut() -> io::Result<u32>) -> io::Result<File> {
    use std::os::unix::fs::MetadataExt;
    let own = fs::metadata("/proc/self/ns/net")?.ino();
    let until = Instant::now() + FOUNDING_PATIENCE;
    loop {
        let found = find().and_then(|process| File::open(format!("/proc/{process}/ns/net")));
        if let Ok(namespace) = &found
            && namespace.metadata()?.ino() != own
        {
            return found;
        }
        if Instant::now() >= until {
            return Err(found.err().unwrap_or_else(|| io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(FOUNDING_INTERVAL);
    }
}

/// One agent's addresses.
#[derive(Debug, Clone, Copy)]
struct Block {
    number: u32,
}

impl Block {
    fn take() -> Result<(Self, File), UplinkError> {
        let folder = Path::new(LOCK_FOLDER);
        fs::create_dir_all(folder).map_err(io_error("make the folder", folder))?;
        let path = Path::new("/proc/net/route");
        let routes = fs::read_to_string(path).map_err(io_error("read", path))?;
        for number in 0..BLOCKS {
            let block = Self { number };
            if block.is_routed(&routes) {
                continue;
            }
            let path = folder.join(format!("network-{number}.lock"));
            let file = File::create(&path).map_err(io_error("open", &path))?;
            match file.try_lock() {
                Ok(()) => return Ok((block, file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(io_error("lock", &path)(error)),
            }
        }
        Err(UplinkError::NoBlock)
    }

    fn first(self) -> u32 {
        u32::from(FIRST_ADDRESS) + self.number * ADDRESSES_PER_BLOCK
    }

    fn address(self, index: u32) -> Option<Ipv4Addr> {
        (index < ADDRESSES_PER_BLOCK).then(|| Ipv4Addr::from(self.first() + index))
    }

    fn interface_prefix(self) -> String {
        format!("{INTERFACE_PREFIX}{:02}-", self.number)
    }

    /// Whether another network lies in the block. `/proc/net/route` has destination and mask in network order, read as
    /// this machine's integers; a mask of 0 is the default route, and our own links are narrower than any network.
    fn is_routed(self, routes: &str) -> bool {
        let hex = |text: Option<&str>| {
            text.and_then(|text| u32::from_str_radix(text, 16).ok()).map(u32::from_be).unwrap_or(0)
        };
        routes.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace();
            let ours = fields.next().is_some_and(|name| name.starts_with(INTERFACE_PREFIX));
            let (destination, mask) = (hex(fields.next()), hex(fields.nth(5)));
            let mask = mask & (u32::MAX << (32 - BLOCK_PREFIX_BITS));
            !ours && mask != 0 && destination & mask == self.first() & mask
        })
    }
}

/// Name servers that a sandbox can reach. The host's own addresses are closed to it, and so is a resolver on the host's
/// loopback; but what runs one there also writes down whom that asks.
pub(crate) fn resolvers() -> Vec<String> {
    let files =
        ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"];
    files
        .iter()
        .map(|path| reachable_resolvers(&fs::read_to_string(path).unwrap_or_default()))
        .find(|found| !found.is_empty())
        .unwrap_or_default()
}

/// The name servers of this machine itself.
pub fn host_resolvers() -> Vec<Ipv4Addr> {
    named_resolvers(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default()).collect()
}

fn named_resolvers(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let addresses = text.lines().filter_map(|line| line.strip_prefix("nameserver"));
    addresses
        .filter_map(|address| address.trim().parse().ok())
        .filter(|address: &Ipv4Addr| !address.is_unspecified())
}

fn reachable_resolvers(text: &str) -> Vec<String> {
    named_resolvers(text)
        .filter(|address| !address.is_loopback())
        .map(|address| address.to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_and_links_do_not_overlap() {
        let (first, second) = (Block { number: 0 }, Block { number: 1 });
        assert_eq!(first.address(0), Some(Ipv4Addr::new(10, 213, 0, 0)));
        assert_eq!(first.address(2047), Some(Ipv4Addr::new(10, 213, 7, 255)));
        assert_eq!(first.address(2048), None);
        assert_eq!(second.address(0), Some(Ipv4Addr::new(10, 213, 8, 0)));
        // The longest name that an interface may have is 15 bytes.
        assert!(format!("{}1023", Block { number: BLOCKS - 1 }.interface_prefix()).len() <= 15);
    }

    #[test]
    fn a_block_that_is_routed_elsewhere_is_not_taken() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
            sealci00-1\t0008D50A\t00000000\t0001\t0\t0\t0\tFEFFFFFF\t0\t0\t0\n\
            tun0\t0010D50A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";
        let taken: Vec<u32> =
            (0..BLOCKS).filter(|number| Block { number: *number }.is_routed(routes)).collect();
        assert_eq!(taken, [2]);
        let whole = "\ntun0\t0000000A\t0\t1\t0\t0\t0\t000000FF\t0\t0\t0\n";
        assert!((0..BLOCKS).all(|number| Block { number }.is_routed(whole)));
    }

    #[test]
    fn only_resolvers_that_can_be_reached_are_named() {
        let text =
            "# x\nsearch a\nnameserver 127.0.0.53\nnameserver 10.1.2.3\nnameserver fe80::1%eth0\noptions x\n";
        assert_eq!(reachable_resolvers(text), ["10.1.2.3"]);
    }
}
