//! Reads manifests from real repositories, through the controller's own mirrors.

use std::sync::Arc;

use async_trait::async_trait;
use sealci_core::event::{RefName, Revision};
use sealci_core::manifest::MAX_MANIFEST_BYTES;
use sealci_git::{
    AllowedTransports, CredentialBook, MirrorError, Mirrors, ReadError, Remote, RemoteError, RemoteUrl,
};
use sealci_service::problem::chain;

use crate::intake::{Repositories, RepositoryError};

/// Repositories on Git servers.
#[derive(Debug)]
pub struct GitRepositories {
    mirrors: Mirrors,
    transports: AllowedTransports,
    credentials: Arc<CredentialBook>,
}

impl GitRepositories {
    /// Keeps mirrors below the folder that `mirrors` has.
    pub fn new(mirrors: Mirrors, transports: AllowedTransports, credentials: Arc<CredentialBook>) -> Self {
        Self { mirrors, transports, credentials }
    }

    fn remote(&self, url: &str) -> Result<Remote, RepositoryError> {
        let credentials = self.credentials.of(url);
        let url = RemoteUrl::parse(url, &self.transports)
            .map_err(|error| RepositoryError::NotAllowed(error.to_string()))?;
        Ok(Remote::new(url, credentials))
    }
}

#[async_trait]
impl Repositories for GitRepositories {
    fn check(&self, url: &str) -> Result<(), RepositoryError> {
        self.remote(url).map(|_| ())
    }

    async fn resolve(
        &self,
        url: &str,
        r#ref: Option<&RefName>,
    ) -> Result<(RefName, Revision), RepositoryError> {
        let remote = self.remote(url)?;
        let git = self.mirrors.git();
        let found = match r#ref {
            None => git.default_branch(&remote).await.map_err(of_remote)?,
            Some(wanted) => {
                let refs = git.ls_remote(&remote).await.map_err(of_remote)?;
                refs.into_iter().find(|found| found.name == *wanted)
            }
        };
        found.map(|found| (found.name, found.revision)).ok_or_else(|| {
            let wanted = r#ref.map_or("default branch", RefName::as_str);
            RepositoryError::NotFound(format!("{}: has no {wanted}", remote.url))
        })
    }

    async fn read(
        &self,
        url: &str,
        r#ref: Option<&RefName>,
        revision: &Revision,
        path: &str,
    ) -> Result<Vec<u8>, RepositoryError> {
        let remote = self.remote(url)?;
        // What git or the disk said stands in the sources.
        let unreachable =
            |error: &(dyn std::error::Error + 'static)| RepositoryError::Unreachable(chain(error));
        let mirror = self.mirrors.open(remote.url.identity()).await.map_err(|error| unreachable(&error))?;
        mirror.ensure(&remote, revision, r#ref).await.map_err(|error| match error.as_ref() {
            MirrorError::Absent { .. } | MirrorError::Refused { .. } => {
                RepositoryError::NotFound(error.to_string())
            }
            MirrorError::Remote(RemoteError::NotFound { .. }) => RepositoryError::NotFound(error.to_string()),
            other => unreachable(other),
        })?;
        mirror.read_file(revision, path, MAX_MANIFEST_BYTES).await.map_err(|error| match error {
            ReadError::Git { .. } | ReadError::Answer { .. } => unreachable(&error),
            error => RepositoryError::NotFound(format!("{}: {error}", remote.url)),
        })
    }
}

fn of_remote(error: RemoteError) -> RepositoryError {
    match error {
        RemoteError::NotFound { .. } => RepositoryError::NotFound(error.to_string()),
        RemoteError::Address { .. } => RepositoryError::NotAllowed(error.to_string()),
        error => RepositoryError::Unreachable(error.to_string()),
    }
}
