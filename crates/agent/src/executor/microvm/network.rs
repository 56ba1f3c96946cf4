//! Puts a machine's monitor in a network like a sandbox's, with a tap for the machine's card.
//!
//! The sandboxes' helper makes that network, and becomes the monitor in it: so what keeps a sandbox from the host keeps a
//! machine from it, with root and without, and nothing stays of it when the monitor has ended.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use sealci_guest::wire;
use sealci_sandbox::{MACHINE_ARGUMENT, MachineSpec, NetworkSpec, machine};

use crate::executor::ExecutorError;
use crate::executor::helper::HelperCommand;

/// What the helper makes of it.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub helper: HelperCommand,
    pub spec: MachineSpec,
}

impl Link {
    /// A network that leads nowhere, with the same card. `scratch` is an empty folder.
    pub fn apart(&self, scratch: &Path) -> Self {
        let spec =
            MachineSpec { network: NetworkSpec::Off, scratch: scratch.to_owned(), ..self.spec.clone() };
        Self { helper: self.helper.clone(), spec }
    }

    /// What starts this program and its arguments in the network, with the card's tap.
    pub fn around(
        &self,
        program: &Path,
        arguments: Vec<OsString>,
    ) -> Result<(PathBuf, Vec<OsString>), ExecutorError> {
        let description = self.spec.scratch.join("machine.json");
        let text =
            serde_json::to_vec(&self.spec).map_err(|error| ExecutorError::Unsupported(error.to_string()))?;
        fs::write(&description, text)
            .map_err(ExecutorError::io(format_args!("write {}", description.display())))?;
        let mut words = self.helper.arguments.clone();
        words.extend([MACHINE_ARGUMENT.into(), description.into(), program.into()]);
        words.extend(arguments);
        words.extend(["--tap".into(), machine::TAP.into()]);
        Ok((self.helper.program.clone(), words))
    }

    /// What the machine's init is told of it.
    pub fn inside(&self) -> wire::Network {
        let resolvers = self.spec.network.resolvers().iter();
        wire::Network {
            address: machine::ADDRESS,
            prefix_bits: machine::PREFIX_BITS,
            gateway: machine::GATEWAY,
            resolvers: resolvers.filter_map(|address| address.parse().ok()).collect(),
        }
    }
}
