//! Where environments meet that share a network: an action and its services.

use std::sync::{Arc, Mutex, PoisonError};

use sealci_sandbox::NetworkSpec;

use super::microvm::Company;

/// Environments in one network: that of the first that is prepared with it. The others reach what it reaches, and meet at
/// `localhost`. Its copies are one. The first has to outlive the others.
#[derive(Debug, Clone, Default)]
pub struct Neighbourhood(Arc<Mutex<Option<Home>>>);

/// Whose network it is.
#[derive(Debug, Clone)]
pub(super) enum Home {
    /// A helper's.
    Helper(NetworkSpec),
    /// A daemon's container's, by its id.
    Container(String),
    /// A machine's, in which there is room for each of them.
    Machine(Company),
}

impl Neighbourhood {
    /// None: nobody lives there yet.
    pub(super) fn home(&self) -> Option<Home> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn found(&self, home: Home) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(home);
    }
}
