//! Holds an environment to what its action may reach, and says in the log what it did reach.

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use sealci_core::destination::Place;
use sealci_core::outcome::Limit;
use sealci_core::plan::{ExecutorKind, Network};
use sealci_sandbox::reached::{Protocol, Verdict};
use sealci_sandbox::{AllowedName, AllowedNetwork, GateSpec, Reached};

use super::init::{Environment, Machine};
use super::{ExecutionRequest, ExecutorError, Notes};

/// What the log has room for.
const SHOWN_LINES: usize = 50;

/// What the gate of an environment is told; none where the action is held to no list.
pub(super) fn spec(request: &ExecutionRequest, resolvers: &[Ipv4Addr]) -> Option<GateSpec> {
    let Network::Allow(destinations) = &request.network else { return None };
    let (mut names, mut networks) = (Vec::new(), Vec::new());
    for destination in destinations {
        let ports = destination.ports();
        match destination.place.clone() {
            Place::Name(name) => names.push(AllowedName { name, below: false, ports }),
            Place::Below(name) => names.push(AllowedName { name, below: true, ports }),
            Place::Network { address, prefix_bits } => {
                networks.push(AllowedNetwork { address, prefix_bits, ports });
            }
        }
    }
    Some(GateSpec { names, networks, resolvers: resolvers.to_vec(), record: request.scratch.join("reached") })
}

/// What an executor says that cannot hold an action to a list.
pub(super) fn refuse(request: &ExecutionRequest, kind: ExecutorKind) -> Result<(), ExecutorError> {
    match &request.network {
        Network::Allow(_) => Err(ExecutorError::Unsupported(format!(
            "the executor `{}` cannot hold an action to what its `network` allows; use `sandbox`, `container` or `microvm`",
            kind.as_str()
        ))),
        Network::On | Network::Off => Ok(()),
    }
}

/// Has the log say what the environment reached, once it is over.
pub(super) fn told(
    environment: Box<dyn Environment>,
    gate: Option<&GateSpec>,
    notes: &Notes,
) -> Box<dyn Environment> {
    match gate {
        Some(gate) => Box::new(Gated { environment, record: gate.record.clone(), notes: notes.clone() }),
        None => environment,
    }
}

struct Gated {
    environment: Box<dyn Environment>,
    record: PathBuf,
    notes: Notes,
}

#[async_trait]
impl Environment for Gated {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        self.environment.open_up().await
    }

    fn machine(&self) -> Option<Machine> {
        self.environment.machine()
    }

    fn ran_out_of_memory(&mut self) {
        self.environment.ran_out_of_memory();
    }

    fn kill(&mut self) {
        self.environment.kill();
    }

    fn limit_reached(&self) -> Option<Limit> {
        self.environment.limit_reached()
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        let cleared = self.environment.clear(orderly).await;
        say(&self.record, &self.notes);
        cleared
    }

    fn complaints(&mut self) -> String {
        self.environment.complaints()
    }
}

fn say(record: &Path, notes: &Notes) {
    match Reached::read(record) {
        Ok(reached) => {
            for entry in reached.iter().take(SHOWN_LINES) {
                notes.say(Line(entry));
            }
            let more = reached.len().saturating_sub(SHOWN_LINES);
            if more > 0 {
                notes.say(format_args!("network: {more} more destinations"));
            }
        }
        // It never stood.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => notes.say(format_args!("network: what was reached is not known: {error}")),
    }
}

/// An entry as the log has it.
struct Line<'a>(&'a Reached);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Reached { destination, count } = self.0;
        let name = destination.name.as_deref();
        f.write_str("network: ")?;
        match destination.verdict {
            Verdict::Reached => f.write_str("connected to ")?,
            Verdict::Refused => f.write_str("refused: ")?,
            Verdict::Misled => {
                let address = destination.address.unwrap_or(Ipv4Addr::UNSPECIFIED);
                let name = name.unwrap_or_default();
                write!(f, "refused: {name} leads to {address}, which no action reaches")?;
                return times(f, *count);
            }
            Verdict::Unanswered => {
                let name = name.unwrap_or_default();
                write!(f, "no name server of the agent's told where {name} leads")?;
                return times(f, *count);
            }
            Verdict::LeftOut => {
                return write!(f, "{count} more attempts, to so many places that they are only counted");
            }
            Verdict::Missed => {
                return f.write_str(
                    "attempts came faster than they could be written down; some are not in the record",
                );
            }
        }
        match (name, destination.address) {
            (Some(name), None) => write!(f, "the name {name}")?,
            (Some(name), Some(address)) => write!(f, "{name} at {address}")?,
            (None, address) => write!(f, "{}", address.unwrap_or(Ipv4Addr::UNSPECIFIED))?,
        }
        if let Some(port) = destination.port {
            write!(f, ":{port}")?;
        }
        let protocol = match destination.protocol {
            Some(Protocol::Tcp) | None => "",
            Some(Protocol::Udp) => " by UDP",
            Some(Protocol::Icmp) => " by ICMP",
            Some(Protocol::Other) => " by another protocol",
        };
        f.write_str(protocol)?;
        if destination.verdict == Verdict::Refused {
            f.write_str(" is not what the action may reach")?;
        }
        times(f, *count)
    }
}

fn times(f: &mut fmt::Formatter<'_>, count: u64) -> fmt::Result {
    match count {
        1 => Ok(()),
        count => write!(f, " ({count} times)"),
    }
}

#[cfg(test)]
mod tests {
    use sealci_sandbox::reached;

    use super::*;

    #[test]
    fn each_entry_is_a_line() {
        let entry = |verdict, name: Option<&str>, address: Option<[u8; 4]>, port, protocol, count| {
            let destination = reached::Destination {
                verdict,
                name: name.map(str::to_owned),
                address: address.map(Ipv4Addr::from),
                port,
                protocol,
            };
            Line(&Reached { destination, count }).to_string()
        };
        let address = Some([192, 0, 2, 7]);
        assert_eq!(
            entry(Verdict::Reached, Some("a.example"), address, Some(443), Some(Protocol::Tcp), 3),
            "network: connected to a.example at 192.0.2.7:443 (3 times)"
        );
        assert_eq!(
            entry(Verdict::Refused, None, address, Some(53), Some(Protocol::Udp), 1),
            "network: refused: 192.0.2.7:53 by UDP is not what the action may reach"
        );
        assert_eq!(
            entry(Verdict::Refused, Some("b.example"), None, None, None, 2),
            "network: refused: the name b.example is not what the action may reach (2 times)"
        );
        assert_eq!(
            entry(Verdict::Misled, Some("a.example"), Some([127, 0, 0, 1]), None, None, 1),
            "network: refused: a.example leads to 127.0.0.1, which no action reaches"
        );
        assert_eq!(
            entry(Verdict::Unanswered, Some("a.example"), None, None, None, 1),
            "network: no name server of the agent's told where a.example leads"
        );
    }
}
