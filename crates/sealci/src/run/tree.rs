//! Hands every action its own copy of the working tree as it was when the run began.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use sealci_agent::workspace::{Checkout, Source, WorkspaceError};
use sealci_git::copy_folder;

/// A snapshot of a working tree, from which workspaces are filled. Nothing in a workspace is linked to it, and nothing
/// in it to the tree that it was made of.
#[derive(Debug)]
pub struct TreeCheckout {
    snapshot: PathBuf,
}

impl TreeCheckout {
    /// The snapshot may still be made: nothing is prepared before a pipeline asks for it.
    pub fn new(snapshot: PathBuf) -> Self {
        Self { snapshot }
    }
}

#[async_trait]
impl Checkout for TreeCheckout {
    async fn prepare(&self, source: &Source, into: &Path) -> Result<(), WorkspaceError> {
        let (from, to) = (self.snapshot.clone(), into.to_owned());
        let copying = tokio::task::spawn_blocking(move || copy_folder(&from, &to));
        let message = match copying.await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => sealci_service::problem::chain(&error),
            Err(stopped) => stopped.to_string(),
        };
        Err(WorkspaceError::Checkout {
            repository: source.repository_url.clone(),
            revision: source.revision.clone(),
            disk_full: message.contains("No space left on device"),
            message,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn copies_share_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (snapshot, one, two) = (dir.path().join("s"), dir.path().join("1"), dir.path().join("2"));
        fs::create_dir_all(snapshot.join("a/b")).unwrap();
        fs::write(snapshot.join("a/b/c"), "as it was").unwrap();
        let source = Source {
            repository_url: "file:///x".into(),
            r#ref: None,
            revision: "0".repeat(40).parse().unwrap(),
            credentials: None,
        };
        let checkout = TreeCheckout::new(snapshot.clone());
        fs::create_dir(&one).unwrap();
        checkout.prepare(&source, &one).await.unwrap();
        fs::write(one.join("a/b/c"), "changed").unwrap();
        fs::create_dir(&two).unwrap();
        checkout.prepare(&source, &two).await.unwrap();
        for folder in [&snapshot, &two] {
            assert_eq!(fs::read_to_string(folder.join("a/b/c")).unwrap(), "as it was");
        }
        let gone = TreeCheckout::new(dir.path().join("nowhere"));
        assert!(gone.prepare(&source, &one).await.unwrap_err().to_string().contains("nowhere"));
    }
}
