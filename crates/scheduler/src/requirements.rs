//! Says what an attempt asks of an agent and what an agent has to give, and whether the one meets the other.
//!
//! Executors are compared by name and never read: a scheduler places for executors it has not heard of.

use std::collections::BTreeMap;

use sealci_core::plan::Resources;
use sealci_proto::{Malformed, agent, scheduler};

/// What an attempt asks of its agent. Attempts that ask the same are of one class, and are looked at together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Requirements {
    pub resources: Resources,
    /// The agent must offer each of these.
    pub labels: BTreeMap<String, String>,
    /// None: any agent's default will do.
    pub executor: Option<String>,
}

impl TryFrom<scheduler::Requirements> for Requirements {
    type Error = Malformed;

    fn try_from(wire: scheduler::Requirements) -> Result<Self, Malformed> {
        Ok(Self {
            resources: wire.resources.ok_or_else(|| Malformed::missing("requirements.resources"))?.into(),
            labels: wire.labels.into_iter().collect(),
            executor: Some(wire.executor).filter(|name| !name.is_empty()),
        })
    }
}

/// What an agent has to give.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Offer {
    /// Everything, whether free or not.
    pub capacity: Resources,
    pub labels: BTreeMap<String, String>,
    /// The first is its default.
    pub executors: Vec<String>,
    /// At most so many attempts at a time.
    pub slots: u32,
    /// Why it takes nothing new; none while it does.
    pub closed_because: Option<String>,
}

impl From<agent::Offer> for Offer {
    fn from(wire: agent::Offer) -> Self {
        Self {
            capacity: wire.capacity.map(Resources::from).unwrap_or_default(),
            labels: wire.labels.into_iter().collect(),
            executors: wire.executors,
            slots: wire.slots,
            closed_because: (!wire.accepting).then_some(wire.not_accepting_because),
        }
    }
}

impl Offer {
    /// Whether it has every label asked for.
    pub fn has_labels(&self, wanted: &Requirements) -> bool {
        wanted.labels.iter().all(|(key, value)| self.labels.get(key) == Some(value))
    }

    /// Whether it has the executor asked for; one that offers none has no default either.
    pub fn has_executor(&self, wanted: &Requirements) -> bool {
        match &wanted.executor {
            Some(name) => self.executors.contains(name),
            None => !self.executors.is_empty(),
        }
    }

    /// Whether the attempt could run here if nothing else did.
    pub fn could_run(&self, wanted: &Requirements) -> bool {
        self.slots > 0
            && self.capacity.fits(&wanted.resources)
            && self.has_executor(wanted)
            && self.has_labels(wanted)
    }
}

/// How much memory counts as much as a thousandth of a CPU when amounts of the two are compared: 2 GiB to the CPU,
/// about what machines have.
const BYTES_PER_CPU_MILLI: u64 = (2 << 30) / 1000;

/// CPU and memory as one number. What fits into something never weighs more than it.
pub fn weight(resources: &Resources) -> u64 {
    resources.cpu_millis.saturating_mul(BYTES_PER_CPU_MILLI).saturating_add(resources.memory_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(executors: &[&str]) -> Offer {
        Offer {
            capacity: Resources { cpu_millis: 2000, memory_bytes: 2 << 30 },
            labels: [("arch".to_owned(), "arm".to_owned())].into(),
            executors: executors.iter().map(|&name| name.to_owned()).collect(),
            slots: 1,
            closed_because: None,
        }
    }

    fn asks(executor: Option<&str>, labels: &[(&str, &str)]) -> Requirements {
        Requirements {
            resources: Resources::DEFAULT,
            labels: labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect(),
            executor: executor.map(str::to_owned),
        }
    }

    #[test]
    fn a_default_needs_an_executor_to_be_one() {
        assert!(offer(&["sandbox"]).could_run(&asks(None, &[])));
        assert!(!offer(&[]).could_run(&asks(None, &[])));
        assert!(offer(&["sandbox", "process"]).could_run(&asks(Some("process"), &[])));
        assert!(!offer(&["sandbox"]).could_run(&asks(Some("process"), &[])));
    }

    #[test]
    fn labels_match_by_key_and_value() {
        assert!(offer(&["sandbox"]).could_run(&asks(None, &[("arch", "arm")])));
        assert!(!offer(&["sandbox"]).could_run(&asks(None, &[("arch", "x86_64")])));
        assert!(!offer(&["sandbox"]).could_run(&asks(None, &[("arch", "arm"), ("gpu", "true")])));
    }

    #[test]
    fn what_fits_never_weighs_more() {
        let small = Resources { cpu_millis: 1, memory_bytes: u64::MAX };
        let large = Resources { cpu_millis: u64::MAX, memory_bytes: u64::MAX };
        assert!(weight(&small) <= weight(&large));
    }
}
