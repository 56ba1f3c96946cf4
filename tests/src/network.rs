//! Makes a network between this machine and one service, to be cut, slowed and made lossy: a network namespace at the other end of a
//! pair of links.

use std::net::{IpAddr, Ipv4Addr};
use std::process::Command;
use std::sync::atomic::{AtomicU8, Ordering};

/// Which way packets do not pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Both,
    /// From this machine into the namespace.
    In,
}

/// The namespace, which goes with this.
pub struct Network {
    name: String,
    /// This machine's end.
    pub address: IpAddr,
}

impl Network {
    /// Makes one; why it cannot be had here otherwise.
    pub fn make() -> Result<Self, String> {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Of the block that RFC 2544 keeps for tests of networks; a process's place in it follows from its id.
        let place = std::process::id().wrapping_mul(64).wrapping_add(u32::from(number));
        let [_, _, high, low] = ((place % (1 << 14)) * 4).to_be_bytes();
        let (near, far) = (Ipv4Addr::new(198, 18, high, low + 1), Ipv4Addr::new(198, 18, high, low + 2));
        let name = format!("scf{}x{number}", std::process::id());
        let (link, peer) = (format!("{name}a"), format!("{name}b"));
        let network = Self { name: name.clone(), address: near.into() };
        run("ip", &["netns", "add", &name])?;
        run("ip", &["link", "add", &link, "type", "veth", "peer", "name", &peer, "netns", &name])?;
        run("ip", &["addr", "add", &format!("{near}/30"), "dev", &link])?;
        run("ip", &["link", "set", &link, "up"])?;
        network.inside(&["ip", "addr", "add", &format!("{far}/30"), "dev", &peer])?;
        network.inside(&["ip", "link", "set", &peer, "up"])?;
        network.inside(&["ip", "link", "set", "lo", "up"])?;
        Ok(network)
    }

    /// What a command line begins with that is to run in it.
    pub fn prefix(&self) -> Vec<String> {
        vec!["nsenter".to_owned(), format!("--net=/run/netns/{}", self.name)]
    }

    /// Lets nothing pass any more.
    pub fn cut(&self, direction: Direction) {
        self.filter("INPUT", &["-j", "DROP"]);
        if direction == Direction::Both {
            self.filter("OUTPUT", &["-j", "DROP"]);
        }
    }

    /// Lets everything pass again.
    pub fn mend(&self) {
        self.inside(&["iptables", "-F"]).expect("rules can be removed");
    }

    /// Makes the line slow, 1 Mbit/s each way, and loses this share of what comes and goes.
    pub fn spoil(&self, share: &str) {
        let slow = ["root", "tbf", "rate", "1mbit", "burst", "16kb", "latency", "400ms"];
        let (link, peer) = (format!("{}a", self.name), format!("{}b", self.name));
        run("tc", &[&["qdisc", "add", "dev", &link], &slow[..]].concat()).expect("the line can be slowed");
        self.inside(&[&["tc", "qdisc", "add", "dev", &peer], &slow[..]].concat()).expect("and the way back");
        let lossy = ["-m", "statistic", "--mode", "random", "--probability", share, "-j", "DROP"];
        for chain in ["INPUT", "OUTPUT"] {
            self.filter(chain, &lossy);
        }
    }

    fn filter(&self, chain: &str, rule: &[&str]) {
        self.inside(&[&["iptables", "-A", chain], rule].concat()).expect("rules can be made");
    }

    fn inside(&self, words: &[&str]) -> Result<(), String> {
        let net = format!("--net=/run/netns/{}", self.name);
        run("nsenter", &[&[net.as_str()], words].concat())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The links go with their namespace, once its last process is gone.
        let _ = run("ip", &["link", "del", &format!("{}a", self.name)]);
        let _ = run("ip", &["netns", "del", &self.name]);
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
    }
}
