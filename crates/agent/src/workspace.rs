//! Makes what an action works in: its own writable tree at the exact revision, and scratch room, both gone when it ends.
//!
//! ```text
//!   <data>/work/<action>.<number>/workspace    what the repository holds at the revision
//!   <data>/work/<action>.<number>/scratch      the executor's
//! ```

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use sealci_core::event::{RefName, Revision};
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Cause;
use sealci_core::repository::redacted;
use sealci_proto::agent;
use serde::Deserialize;

use crate::causes::is_disk_full;
use crate::identity::Identity;

/// What shall stand in a workspace.
#[derive(Debug, Clone)]
pub struct Source {
    pub repository_url: String,
    /// Where the revision was seen.
    pub r#ref: Option<RefName>,
    pub revision: Revision,
    /// None where the repository needs none.
    pub credentials: Option<RepositoryCredentials>,
}

/// What opens a repository for reading. Sealed to the agent's key it is JSON: `{"username": …, "secret": …}` for
/// `https`, or `{"ssh_key": …}`, a private key in OpenSSH's format.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum RepositoryCredentials {
    Password { username: String, secret: String },
    SshKey { ssh_key: String },
}

impl std::fmt::Debug for RepositoryCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RepositoryCredentials(***)")
    }
}

/// Fills workspaces: from Git mirrors, or from a snapshot of a local tree.
#[async_trait]
pub trait Checkout: Send + Sync {
    /// Writes the source's tree into the existing, empty folder `into`. Dropping the future gives it up; what is in the
    /// folder then is the caller's to remove.
    async fn prepare(&self, source: &Source, into: &Path) -> Result<(), WorkspaceError>;
}

/// Why a workspace does not stand.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    #[error("cannot make the folder {path}: {source}; check the agent's data folder and its disk")]
    Folder { path: PathBuf, source: io::Error },
    #[error(
        "the action's source cannot be understood: {0}; the controller and this agent may be of different releases"
    )]
    Malformed(String),
    #[error(
        "the credentials for {repository} cannot be used: {why}; if this agent was set up anew, enrol it anew as well"
    )]
    Credentials { repository: String, why: String },
    #[error(
        "cannot have {revision} of {repository} in the workspace: {message}; check that the agent reaches the repository and may read it"
    )]
    Checkout {
        /// Without credentials.
        repository: String,
        revision: Revision,
        /// What went wrong.
        message: String,
        disk_full: bool,
    },
}

impl WorkspaceError {
    /// What it means for the attempt.
    pub fn cause(&self) -> Cause {
        match self {
            Self::Folder { source, .. } if is_disk_full(source) => Cause::DiskFull,
            Self::Checkout { disk_full: true, .. } => Cause::DiskFull,
            Self::Malformed(_) => Cause::Unsupported,
            Self::Folder { .. } | Self::Credentials { .. } | Self::Checkout { .. } => Cause::Workspace,
        }
    }
}

impl Source {
    /// Reads the wire's source, opening the credentials that came with the grant with the agent's key.
    pub fn read(
        wire: &agent::Source,
        sealed_credentials: &[u8],
        identity: &Identity,
    ) -> Result<Self, WorkspaceError> {
        let malformed = |error: &dyn std::fmt::Display| WorkspaceError::Malformed(error.to_string());
        let r#ref = match wire.r#ref.as_str() {
            "" => None,
            name => Some(name.parse().map_err(|error| malformed(&error))?),
        };
        Ok(Self {
            repository_url: wire.repository_url.clone(),
            r#ref,
            revision: wire.revision.parse().map_err(|error| malformed(&error))?,
            credentials: opened(wire.needs_credentials, sealed_credentials, identity).map_err(|why| {
                WorkspaceError::Credentials { repository: redacted(&wire.repository_url), why }
            })?,
        })
    }
}

fn opened(
    are_needed: bool,
    sealed: &[u8],
    identity: &Identity,
) -> Result<Option<RepositoryCredentials>, String> {
    if !are_needed {
        return Ok(None);
    }
    if sealed.is_empty() {
        return Err("the controller gave none".to_owned());
    }
    let opened = identity.open(sealed).map_err(|error| error.to_string())?;
    // The parser's message could repeat the secret.
    let read = serde_json::from_slice(&opened).map_err(|_| "they are of no known form".to_owned())?;
    Ok(Some(read))
}

/// The folders of one attempt.
#[derive(Debug, Clone)]
pub struct Folders {
    root: PathBuf,
}

impl Folders {
    pub fn of(work: &Path, attempt: AttemptId) -> Self {
        Self { root: work.join(attempt.to_string()) }
    }

    /// Holds the others.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn workspace(&self) -> PathBuf {
        self.root.join("workspace")
    }

    pub fn scratch(&self) -> PathBuf {
        self.root.join("scratch")
    }

    /// For archives on their way in or out; made where it is absent.
    pub async fn archives(&self) -> Result<PathBuf, WorkspaceError> {
        let path = self.root.join("archives");
        match tokio::fs::create_dir_all(&path).await {
            Ok(()) => Ok(path),
            Err(source) => Err(WorkspaceError::Folder { path, source }),
        }
    }

    /// Makes them, empty.
    pub async fn make(&self) -> Result<(), WorkspaceError> {
        for path in [self.workspace(), self.scratch()] {
            tokio::fs::create_dir_all(&path)
                .await
                .map_err(|source| WorkspaceError::Folder { path, source })?;
        }
        Ok(())
    }

    /// Removes them with all that is in them. What cannot be removed now is removed at the next start.
    pub async fn remove(&self) {
        let root = self.root.clone();
        let removed = tokio::task::spawn_blocking(move || remove_tree(&root)).await;
        match removed.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => {}
            Err(error) => tracing::warn!(folder = %self.root.display(), %error, "cannot remove a workspace"),
        }
    }
}

/// Removes a folder with all that is in it, also where its owner is not root and folders of his are closed to himself. One
/// that is not there is fine. Nobody may use it meanwhile. Blocks.
pub fn remove_tree(folder: &Path) -> io::Result<()> {
    let mut removed = std::fs::remove_dir_all(folder);
    if removed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
        open_up(folder);
        removed = std::fs::remove_dir_all(folder);
    }
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Opens a folder and all folders below to their owner, following no link. What cannot be opened stays as it is.
fn open_up(folder: &Path) {
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(metadata) = std::fs::symlink_metadata(&folder) else { continue };
        if !metadata.is_dir() {
            continue;
        }
        let mode = metadata.permissions().mode();
        let _ = std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode | 0o700));
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        folders.extend(entries.flatten().map(|entry| entry.path()));
    }
}

/// Removes what former processes left, and makes the folder for this one. Blocks.
pub fn clear(work: &Path) -> io::Result<()> {
    match std::fs::read_dir(work) {
        Ok(entries) => {
            for entry in entries {
                let path = entry?.path();
                if let Err(error) = remove_tree(&path) {
                    tracing::warn!(folder = %path.display(), %error, "cannot remove a leftover workspace");
                }
            }
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => std::fs::create_dir_all(work),
        Err(error) => Err(error),
    }
}

/// What is free on the folder's disk for a user without privileges, in bytes (statvfs(3)).
pub fn free_disk_bytes(folder: &Path) -> io::Result<u64> {
    let disk = nix::sys::statvfs::statvfs(folder)?;
    Ok(disk.blocks_available().saturating_mul(disk.fragment_size()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::private::Persistence;

    fn wire(needs_credentials: bool) -> agent::Source {
        agent::Source {
            repository_url: "https://user:hunter2@forge.example.org/o/r".into(),
            r#ref: "refs/heads/main".into(),
            revision: "a".repeat(40),
            event_kind: "push".into(),
            needs_credentials,
        }
    }

    #[test]
    fn credentials_are_opened_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_make(folder.path(), Persistence::Scratch).unwrap();
        let key = crypto_box::PublicKey::from(identity.public_key());
        let seal = |text: &str| key.seal(&mut crypto_box::aead::OsRng, text.as_bytes()).unwrap();
        let read = |sealed: &[u8]| Source::read(&wire(true), sealed, &identity);
        let with_password = read(&seal(r#"{"username": "git", "secret": "hunter2"}"#)).unwrap();
        let expected = RepositoryCredentials::Password { username: "git".into(), secret: "hunter2".into() };
        assert_eq!(with_password.credentials.as_ref(), Some(&expected));
        assert!(!format!("{:?}", with_password.credentials).contains("hunter2"));
        let with_key = read(&seal(r#"{"ssh_key": "KEY"}"#)).unwrap();
        assert_eq!(with_key.credentials, Some(RepositoryCredentials::SshKey { ssh_key: "KEY".into() }));
        for bad in [seal("{hunter2"), b"garbage".to_vec(), Vec::new()] {
            let error = read(&bad).unwrap_err().to_string();
            assert!(error.contains("forge.example.org/o/r") && !error.contains("hunter2"), "{error}");
        }
        assert!(Source::read(&wire(false), &[], &identity).unwrap().credentials.is_none());
    }

    #[test]
    fn a_source_without_a_full_revision_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_make(folder.path(), Persistence::Scratch).unwrap();
        for revision in ["", "main", "--upload-pack=x"] {
            let wire = agent::Source { revision: revision.into(), ..wire(false) };
            let error = Source::read(&wire, &[], &identity).unwrap_err();
            assert_eq!(error.cause(), Cause::Unsupported);
        }
    }

    #[test]
    fn leftovers_are_removed() {
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("work");
        clear(&work).unwrap();
        std::fs::create_dir_all(work.join("x/workspace")).unwrap();
        clear(&work).unwrap();
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0);
        assert!(free_disk_bytes(&work).unwrap() > 0);
    }
}
