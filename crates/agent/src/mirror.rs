//! Fills workspaces from Git: one bare mirror for each repository, shared by all actions, within a disk budget.

use std::error::Error;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sealci_core::repository::redacted;
use sealci_git::{AllowedTransports, Credentials, Mirrors, Remote, RemoteUrl, Secret, SshKey};
use tokio::task::JoinSet;

use crate::causes::with_causes;
use crate::workspace::{Checkout, RepositoryCredentials, Source, WorkspaceError};

/// How often mirrors are looked at, at most, for being over their budget.
const EVICT_EVERY: Duration = Duration::from_secs(60);

/// Checks out of mirrors.
#[derive(Debug)]
pub struct MirrorCheckout {
    mirrors: Mirrors,
    allowed: AllowedTransports,
    eviction: Mutex<Eviction>,
}

#[derive(Debug, Default)]
struct Eviction {
    /// At most one; it ends with its owner.
    running: JoinSet<()>,
    began_at: Option<Instant>,
}

impl MirrorCheckout {
    /// `mirrors` may be shared with others on this machine.
    pub fn new(mirrors: Mirrors, allowed: AllowedTransports) -> Self {
        Self { mirrors, allowed, eviction: Mutex::default() }
    }

    async fn check_out(&self, source: &Source, into: &Path) -> Result<(), Box<dyn Error + Send + Sync>> {
        let url = RemoteUrl::parse(&source.repository_url, &self.allowed)?;
        let mirror = self.mirrors.open(url.identity()).await?;
        let remote = Remote::new(url, credentials(source.credentials.as_ref()));
        mirror.materialize(&remote, &source.revision, source.r#ref.as_ref(), into).await?;
        Ok(())
    }

    /// Keeps the mirrors within their budget, without making anyone wait for it.
    fn evict_now_and_then(&self) {
        let mut eviction = self.eviction.lock().unwrap_or_else(PoisonError::into_inner);
        while eviction.running.try_join_next().is_some() {}
        let is_due = eviction.began_at.is_none_or(|began_at| began_at.elapsed() >= EVICT_EVERY);
        if !is_due || !eviction.running.is_empty() {
            return;
        }
        eviction.began_at = Some(Instant::now());
        let mirrors = self.mirrors.clone();
        eviction.running.spawn(async move {
            match mirrors.evict().await {
                Ok(evicted) if evicted.mirrors > 0 => {
                    tracing::info!(
                        mirrors = evicted.mirrors,
                        remaining_bytes = evicted.remaining_bytes,
                        "removed mirrors that were used longest ago"
                    );
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "cannot keep the mirrors within their budget"),
            }
        });
    }
}

#[async_trait]
impl Checkout for MirrorCheckout {
    async fn prepare(&self, source: &Source, into: &Path) -> Result<(), WorkspaceError> {
        let checked_out = self.check_out(source, into).await;
        self.evict_now_and_then();
        checked_out.map_err(|error| {
            let message = with_causes(&*error);
            WorkspaceError::Checkout {
                repository: redacted(&source.repository_url),
                revision: source.revision.clone(),
                // Git passes the operating system's words on.
                disk_full: message.contains("No space left on device"),
                message,
            }
        })
    }
}

fn credentials(ours: Option<&RepositoryCredentials>) -> Credentials {
    match ours {
        None => Credentials::None,
        Some(RepositoryCredentials::Password { username, secret }) => {
            Credentials::Token { username: username.clone(), secret: Secret::new(secret) }
        }
        Some(RepositoryCredentials::SshKey { ssh_key }) => {
            Credentials::SshKey(SshKey::Text(Secret::new(ssh_key)))
        }
    }
}
