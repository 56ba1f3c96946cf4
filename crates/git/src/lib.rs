//! Drives the `git` command line against repositories that nobody vouches for: listing their refs, mirroring them,
//! reading single files, and checking out exact revisions.
//!
//! Invariants:
//! - every call is bounded in time and output, and those that write are bounded in disk; a call that is given up or
//!   dropped takes its whole process group with it;
//! - git sees a cleared environment and no configuration but ours: no hooks, no credential helpers, no filters, no
//!   prompts, no transports but those allowed, no redirects;
//! - no credential is ever on a command line, in a URL given to git, or in an error;
//! - what is checked out is the exact revision asked for, never "what the branch is now".

mod address;
mod checkout;
mod command;
mod credential_book;
mod credentials;
mod fetch;
mod mirror;
mod mirrors;
mod process;
mod remote;
mod tree_size;
mod url;
mod worktree;

#[cfg(feature = "testing")]
pub mod testing;

pub use address::{AddressError, is_local};
pub use checkout::{CheckoutError, EntryKind, ReadError, TreeEntry};
pub use command::{Git, Limits, Options};
pub use credential_book::{CredentialBook, CredentialBookError};
pub use credentials::{Credentials, Secret, SshKey};
pub use mirror::{Mirror, MirrorError};
pub use mirrors::{Evicted, Mirrors};
pub use process::RunError;
pub use remote::{Remote, RemoteError, RemoteRef};
pub use url::{AllowedTransports, InvalidRemoteUrl, RemoteUrl, Transport};
pub use worktree::{SnapshotError, WorktreeSnapshot, copy_folder};
