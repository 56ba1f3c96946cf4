//! Shows what is kept in the form the document gives it.

use serde::Serialize;

use crate::configuration::{Settings, WatchedKind};
use crate::status::{LastDelivery, LastPoll};
use crate::store::{StoreError, Stored};
use crate::watch::Watch;

/// `Configuration` of the document.
#[derive(Debug, Serialize)]
pub struct ShownConfiguration {
    id: String,
    repository_url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    credentials: Option<String>,
    events: Vec<WatchedKind>,
    branches: Vec<String>,
    tags: Vec<String>,
    manifest_path: String,
    uploaded_manifest: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    poll_interval_ms: Option<u64>,
    enabled: bool,
    build_existing: bool,
    created_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_poll: Option<LastPoll>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_delivery: Option<LastDelivery>,
    undelivered: u64,
}

/// `ConfigurationPage` of the document.
#[derive(Debug, Serialize)]
pub struct ShownPage {
    pub configurations: Vec<ShownConfiguration>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// `Manifest` of the document, in and out.
#[derive(Debug, Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShownManifest {
    pub body: String,
}

/// `Health` of the document.
#[derive(Debug, Serialize)]
pub struct ShownHealth {
    pub status: &'static str,
}

impl ShownConfiguration {
    pub async fn of(watch: &Watch, stored: Stored) -> Result<Self, StoreError> {
        let undelivered = watch.store.undelivered(stored.number).await?;
        let status = watch.board.of(stored.id);
        let Settings { repository_url, credentials, events, branches, tags, manifest_path, .. } =
            stored.settings;
        Ok(Self {
            id: stored.id.to_string(),
            repository_url,
            credentials,
            events,
            branches: branches.patterns().to_vec(),
            tags: tags.patterns().to_vec(),
            manifest_path,
            uploaded_manifest: stored.manifest_digest.is_some(),
            poll_interval_ms: stored
                .settings
                .poll_interval
                .map(|interval| u64::try_from(interval.as_millis()).unwrap_or(u64::MAX)),
            enabled: stored.settings.enabled,
            build_existing: stored.settings.build_existing,
            created_at: stored.created_at,
            last_poll: status.last_poll,
            last_delivery: status.failing.or(stored.last_delivery),
            undelivered,
        })
    }
}
