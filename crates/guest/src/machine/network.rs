//! Connects a machine with the network that the host has for it.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use sealci_guest::wire::Network;

use super::root;
use crate::failure::{Failure, While};
use crate::sys::machine as sys;

/// The first network card's name, where nobody gives it another one.
const CARD: &str = "eth0";

/// Sets the card going: address and way out.
pub fn connect(network: &Network) -> Result<(), Failure> {
    if !Path::new("/sys/class/net").join(CARD).exists() {
        let missing = io::Error::other("it is not there; the kernel may lack the module virtio_net");
        return Err(missing).doing(|| format!("find the network card {CARD}"));
    }
    set_going(network)
}

/// Says in a root whom to ask for names, whatever the image says.
pub fn write_resolvers(network: &Network) -> Result<(), Failure> {
    root::write_etc("resolv.conf", &resolver_lines(&network.resolvers))
}

fn set_going(network: &Network) -> Result<(), Failure> {
    // It leads nowhere; what is not there cannot be disabled, and need not be.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{CARD}/disable_ipv6"), "1");
    sys::set_address(CARD, network.address, netmask(network.prefix_bits))
        .doing(|| format!("give the network card {CARD} its address"))?;
    sys::raise(CARD).doing(|| format!("set the network card {CARD} going"))?;
    sys::route_by(network.gateway).doing(|| format!("lead all that goes out by {}", network.gateway))
}

fn netmask(prefix_bits: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(prefix_bits)).unwrap_or(0))
}

/// resolv.conf(5).
fn resolver_lines(resolvers: &[Ipv4Addr]) -> String {
    resolvers.iter().map(|address| format!("nameserver {address}\n")).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// This very test, in a network namespace in which there is a card.
    #[test]
    fn all_that_goes_out_goes_by_the_card() {
        const INSIDE: &str = "SEALCI_TEST_CARD";
        if std::env::var_os(INSIDE).is_none() {
            let name = "machine::network::tests::all_that_goes_out_goes_by_the_card";
            let script = format!(
                "ip link add {CARD} type veth peer name other && exec \"$0\" --exact {name} --nocapture"
            );
            let mut inside = Command::new("unshare");
            inside
                .args(["--map-root-user", "--net", "sh", "-c", &script])
                .arg(std::env::current_exe().unwrap());
            let output = inside.env(INSIDE, "1").output().unwrap();
            let told = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && told.contains("1 passed"), "{told}{output:?}");
            return;
        }
        let network = Network {
            address: Ipv4Addr::new(10, 213, 254, 1),
            prefix_bits: 31,
            gateway: Ipv4Addr::new(10, 213, 254, 0),
            resolvers: Vec::new(),
        };
        set_going(&network).unwrap();
        // In network order, read as this machine's integers.
        let in_hex = |address: Ipv4Addr| format!("{:08X}", u32::from(address).to_be());
        let routes = fs::read_to_string("/proc/self/net/route").unwrap();
        let found: Vec<Vec<&str>> =
            routes.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
        let [anywhere, own] = ["0.0.0.0", "255.255.255.254"].map(|mask| in_hex(mask.parse().unwrap()));
        let gateway = in_hex(network.gateway);
        // Interface, destination, gateway; the eighth is the mask.
        let is_there = |destination: &str, by: &str, mask: &str| {
            found
                .iter()
                .any(|route| [route[0], route[1], route[2], route[7]] == [CARD, destination, by, mask])
        };
        assert!(is_there(&anywhere, &gateway, &anywhere) && is_there(&gateway, &anywhere, &own), "{routes}");
    }

    #[test]
    fn masks_are_as_long_as_their_prefix() {
        for (bits, mask) in [
            (0, "0.0.0.0"),
            (1, "128.0.0.0"),
            (24, "255.255.255.0"),
            (31, "255.255.255.254"),
            (32, "255.255.255.255"),
        ] {
            assert_eq!(netmask(bits).to_string(), mask);
        }
    }

    #[test]
    fn each_resolver_has_a_line() {
        assert_eq!(resolver_lines(&[]), "");
        let two = [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(192, 0, 2, 2)];
        assert_eq!(resolver_lines(&two), "nameserver 192.0.2.1\nnameserver 192.0.2.2\n");
    }
}
