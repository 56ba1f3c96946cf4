//! Lets a sandbox reach outwards without root: pasta or slirp4netns reads its packets from a tap interface in its network
//! namespace, and opens ordinary sockets of the agent's user for them.
//!
//! ```text
//! sandbox: filter ── eth0 10.213.255.100/24 ── tap ── pasta or slirp4netns ── sockets of the user ──▶ outside
//! ```
//!
//! For such a socket the host's loopback, its other addresses and what it may reach itself are near, so the way there is
//! closed twice: by what the relay is told (no mapped gateway, no forwarded ports), and by a packet filter in the sandbox's
//! own network namespace, which nobody inside can change. Invariants: the filter stands before the relay is started; the
//! relay serves before anything else goes on; it is in the sandbox's PID namespace and ends with it. IPv6 is off.
//!
//! An address that the host is given while a sandbox runs is not in that one's filter.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use super::link::INSIDE;
use super::{FIRST_ADDRESS, firewall};
use crate::spec::NetworkSpec;
use crate::sys;

/// The last of the sandboxes' networks of 256 addresses, in the block that no agent takes.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 213, 255, 100);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 213, 255, 2);
const PREFIX_BITS: u32 = 24;
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 213, 255, 0);
const TUNNEL_DEVICE: &str = sys::TUNNEL_DEVICE;
/// Where this network namespace's own addresses are told.
const ADDRESS_TABLE: &str = "/proc/net/fib_trie";

/// Beside metadata: this network (RFC 791), loopback, all sandboxes of this machine, multicast and all above it.
const NEVER: [(Ipv4Addr, u32); 4] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (FIRST_ADDRESS, 16),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
];

/// Why a sandbox has no relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    #[error("neither pasta nor slirp4netns is installed: apt-get install passt")]
    NotInstalled,
    #[error("{} is not installed: apt-get install {}", kind.program(), kind.package())]
    KindNotInstalled { kind: RelayKind },
    #[error(
        "{TUNNEL_DEVICE} is not usable by this user: as root, modprobe tun && chmod 0666 {TUNNEL_DEVICE}"
    )]
    Tunnel(#[source] io::Error),
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "cannot make a network namespace with a packet filter; that needs nf_tables: as root, modprobe nf_tables"
    )]
    Filter(#[source] io::Error),
    #[error("cannot start {}", program.display())]
    Start {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} does not serve: {complaint}", program.display())]
    Refused { program: PathBuf, complaint: String },
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> RelayError {
    move |source| RelayError::Io { doing, source }
}

/// The programs that we know how to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RelayKind {
    Pasta,
    Slirp4netns,
}

impl RelayKind {
    /// The first is preferred: it is the faster one.
    const ALL: [Self; 2] = [Self::Pasta, Self::Slirp4netns];

    fn program(self) -> &'static str {
        match self {
            Self::Pasta => "pasta",
            Self::Slirp4netns => "slirp4netns",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Pasta => "passt",
            Self::Slirp4netns => "slirp4netns",
        }
    }
}

/// A program that carries a sandbox's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relay {
    pub kind: RelayKind,
    pub program: PathBuf,
}

impl Relay {
    /// Finds one on this process's path: of this kind, or any.
    pub fn find(kind: Option<RelayKind>) -> Result<Self, RelayError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> =
            std::env::split_paths(&path).chain(["/usr/bin", "/usr/local/bin"].map(PathBuf::from)).collect();
        let found = RelayKind::ALL
            .into_iter()
            .filter(|candidate| kind.is_none_or(|kind| kind == *candidate))
            .find_map(|kind| {
                let programs = folders.iter().map(|folder| folder.join(kind.program()));
                let program = programs.filter(|file| file.is_absolute()).find(|file| file.is_file())?;
                Some(Self { kind, program })
            });
        found.ok_or(match kind {
            Some(kind) => RelayError::KindNotInstalled { kind },
            None => RelayError::NotInstalled,
        })
    }

    /// The network of a sandbox, for its description.
    pub fn link(&self) -> NetworkSpec {
        NetworkSpec::Relayed { relay: self.clone(), resolvers: super::resolvers() }
    }

    /// How it is told to serve the network namespace at this path. slirp4netns tells on its standard input that it does;
    /// pasta goes to the background then.
    fn command(&self, namespace: &Path) -> Command {
        let mut command = Command::new(&self.program);
        match self.kind {
            RelayKind::Pasta => {
                let (address, gateway) = (ADDRESS.to_string(), GATEWAY.to_string());
                command.args(["--quiet", "--ipv4-only", "--config-net", "--no-netns-quit"]);
                command.args(["--tcp-ports", "none", "--udp-ports", "none"]);
                command.args(["--tcp-ns", "none", "--udp-ns", "none", "--no-map-gw"]);
                command.args(["--no-dhcp", "--no-ndp", "--no-dhcpv6", "--no-ra"]);
                command.args(["--address", &address, "--netmask", &PREFIX_BITS.to_string()]);
                command.args(["--gateway", &gateway, "--ns-ifname", INSIDE]);
                command.arg("--netns").arg(namespace);
            }
            RelayKind::Slirp4netns => {
                let network = format!("{NETWORK}/{PREFIX_BITS}");
                command.args(["--configure", "--mtu=65520", "--cidr", &network]);
                command.args(["--disable-host-loopback", "--disable-dns"]);
                command.args(["--enable-sandbox", "--enable-seccomp"]);
                command.args(["--ready-fd=0", "--netns-type=path"]).arg(namespace).arg(INSIDE);
            }
        }
        command
    }

    /// Starts it, and waits until it serves. What it complains of goes to the file `log`.
    fn start(&self, namespace: &Path, log: &Path) -> Result<(), RelayError> {
        let failed = |source| RelayError::Start { program: self.program.clone(), source };
        let complaints = fs::File::create(log).map_err(failed)?;
        let (mut ready, tell) = io::pipe().map_err(failed)?;
        let mut command = self.command(namespace);
        command.env_clear().stdout(Stdio::null()).stderr(complaints);
        match self.kind {
            RelayKind::Pasta => command.stdin(Stdio::null()),
            RelayKind::Slirp4netns => command.stdin(tell),
        };
        let mut child = command.spawn().map_err(failed)?;
        // Our copy of the pipe's other end would keep it open.
        drop(command);
        let serves = match self.kind {
            RelayKind::Pasta => child.wait().map_err(failed)?.success(),
            RelayKind::Slirp4netns => ready.read(&mut [0]).map_err(failed)? == 1,
        };
        if serves {
            return Ok(());
        }
        let complaint = fs::read_to_string(log).unwrap_or_default();
        let last = complaint.lines().rfind(|line| !line.contains("syslog")).unwrap_or("it does not say why");
        Err(RelayError::Refused { program: self.program.clone(), complaint: last.trim().to_owned() })
    }
}

/// Enters a new network namespace, filtered and served by the relay. `scratch` takes a name for the namespace meanwhile, and
/// the relay's complaints.
pub fn connect(relay: &Relay, scratch: &Path) -> Result<(), RelayError> {
    let namespace = filtered_namespace()?;
    // By a descriptor's path the relay could not open it: it gives up the privileges that this process still has.
    let name = scratch.join("network");
    fs::write(&name, b"").map_err(io_error("name the network namespace"))?;
    let own = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    sys::mount(&own, &name, "", libc::MS_BIND, "").map_err(io_error("name the network namespace"))?;
    // Started from here, it opens its sockets in the host's network.
    relay.start(&name, &scratch.join("network.log"))?;
    sys::detach(&name).map_err(io_error("let go of the network namespace's name"))?;
    sys::enter(namespace.as_fd()).map_err(io_error("enter the network namespace"))
}

/// What nobody behind a relay may reach. To be called while this process is in the host's network namespace.
pub fn forbidden() -> Result<Vec<(Ipv4Addr, u32)>, RelayError> {
    let table = fs::read_to_string(ADDRESS_TABLE).map_err(io_error("read the host's addresses"))?;
    let hosts = own_addresses(&table).into_iter().map(|address| (address, 32));
    Ok(NEVER.into_iter().chain(firewall::METADATA).chain(hosts).collect())
}

/// A network namespace with its loopback up, and with the filter. Tells early where no relay could serve it.
pub fn filtered_namespace() -> Result<OwnedFd, RelayError> {
    fs::File::options().read(true).write(true).open(TUNNEL_DEVICE).map_err(RelayError::Tunnel)?;
    let forbidden = forbidden()?;
    let prepare = || {
        super::arrange()?;
        // What is not there cannot be disabled, and need not be.
        let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        firewall::confine(&forbidden)
    };
    sys::network_namespace(prepare).map_err(RelayError::Filter)
}

/// The addresses that lead to this machine itself, of all its interfaces. In `fib_trie` a leaf is an address, and each of
/// its routes a line of its own below.
fn own_addresses(table: &str) -> BTreeSet<Ipv4Addr> {
    let mut leaf: Option<Ipv4Addr> = None;
    let mut found = BTreeSet::new();
    for line in table.lines() {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
        } else if line.starts_with("/32 host LOCAL") {
            found.extend(leaf);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_addresses_are_found() {
        let table = "\
Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 192.0.2.0/24 2 0 2
        |-- 192.0.2.0
           /24 link UNICAST
        |-- 192.0.2.2
           /32 host LOCAL
        |-- 192.0.2.255
           /32 link BROADCAST
Local:
     |-- 127.0.0.0
        /8 host LOCAL
     |-- 127.0.0.1
        /32 host LOCAL
     |-- 192.0.2.2
        /32 host LOCAL
";
        let found: Vec<String> = own_addresses(table).iter().map(Ipv4Addr::to_string).collect();
        assert_eq!(found, ["127.0.0.1", "192.0.2.2"]);
        assert!(own_addresses("").is_empty());
    }

    #[test]
    fn a_relay_is_told_to_keep_off_the_host() {
        let arguments = |kind| {
            let relay = Relay { kind, program: "/usr/bin/relay".into() };
            let command = relay.command(Path::new("/x"));
            command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect::<Vec<_>>()
        };
        let pasta = arguments(RelayKind::Pasta);
        for ports in ["--tcp-ports", "--udp-ports", "--tcp-ns", "--udp-ns"] {
            let place = pasta.iter().position(|argument| argument == ports).unwrap();
            assert_eq!(pasta[place + 1], "none");
        }
        assert!(pasta.contains(&"--no-map-gw".to_owned()));
        let slirp = arguments(RelayKind::Slirp4netns);
        assert!(slirp.contains(&"--disable-host-loopback".to_owned()));
    }

    #[test]
    fn a_relay_that_is_not_there_names_its_package() {
        let error = RelayError::KindNotInstalled { kind: RelayKind::Pasta };
        assert!(error.to_string().contains("apt-get install passt"));
    }
}
