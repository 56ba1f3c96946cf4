//! Finds out whom an image's programs run as, in a tree of the image's.

use sealci_guest::accounts::{Account, AccountError, GROUP, LIMIT_BYTES, PASSWD};
use serde::{Deserialize, Serialize};

use super::tree::Tree;

/// Whom the init runs as, in ids as seen from inside. Root by default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// Why nobody can be run as that user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    #[error(transparent)]
    Account(#[from] AccountError),
    #[error(
        "it shall run as user {0}, and an agent without root has no other user for it than root; say `user: root`, or run the agent as root"
    )]
    OnlyRoot(u32),
}

impl User {
    /// As [`Account::find`].
    pub fn find(tree: &Tree, text: &str) -> Result<Self, UserError> {
        let read = |place| tree.read(place, LIMIT_BYTES).unwrap_or_default();
        let Account { uid, gid, groups } = Account::find(text, &read(PASSWD), &read(GROUP))?;
        Ok(Self { uid, gid, groups })
    }
}
