//! Keeps which agents exist, as the controllers say.

use std::collections::HashMap;

use sealci_core::ids::{AgentId, InstanceId};
use sealci_proto::{Malformed, scheduler};
use subtle::ConstantTimeEq;

/// What is known of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known {
    pub name: String,
    pub credential_sha256: [u8; 32],
    /// The instance that gets new work; none until a controller has seen one.
    pub current: Option<InstanceId>,
    pub drained: bool,
}

/// One line of a statement, read.
#[derive(Debug)]
pub(super) enum Entry {
    Known(AgentId, Known),
    Removed(AgentId),
}

#[derive(Debug, Default)]
pub(super) struct Directory {
    /// A controller has said all. Before that agents are neither accepted nor refused.
    pub complete: bool,
    agents: HashMap<AgentId, Known>,
}

impl Directory {
    pub fn agent(&self, id: AgentId) -> Option<&Known> {
        self.agents.get(&id)
    }

    /// Whether the agent exists and has this credential.
    pub fn accepts(&self, id: AgentId, credential_sha256: &[u8; 32]) -> bool {
        self.agents.get(&id).is_some_and(|known| bool::from(known.credential_sha256.ct_eq(credential_sha256)))
    }

    pub fn set(&mut self, id: AgentId, known: Known) -> Option<Known> {
        self.agents.insert(id, known)
    }

    pub fn remove(&mut self, id: AgentId) {
        self.agents.remove(&id);
    }

    pub fn ids(&self) -> impl Iterator<Item = AgentId> {
        self.agents.keys().copied()
    }
}

impl TryFrom<scheduler::DirectoryEntry> for Entry {
    type Error = Malformed;

    fn try_from(wire: scheduler::DirectoryEntry) -> Result<Self, Malformed> {
        let id = wire.agent_id.parse()?;
        if wire.removed {
            return Ok(Self::Removed(id));
        }
        let credential_sha256 = wire
            .credential_sha256
            .try_into()
            .map_err(|_| Malformed("`credential_sha256` is not 32 bytes long".into()))?;
        let current = match wire.current_instance_id.as_str() {
            "" => None,
            text => Some(text.parse()?),
        };
        Ok(Self::Known(id, Known { name: wire.name, credential_sha256, current, drained: wire.drained }))
    }
}
