//! Describes what is watched, and refuses what cannot be.

use sealci_core::event::EventKind;
use sealci_git::{AllowedTransports, Credentials, InvalidRemoteUrl, RemoteUrl};
use serde::{Deserialize, Serialize};
use std::time::Duration;

use crate::filter::NameFilter;

pub const DEFAULT_MANIFEST_PATH: &str = ".sealci/pipeline.yaml";
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
const POLL_INTERVAL_MS: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;

/// The kinds of events that looking at a repository can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WatchedKind {
    Push,
    Tag,
}

impl From<WatchedKind> for EventKind {
    fn from(kind: WatchedKind) -> Self {
        match kind {
            WatchedKind::Push => Self::Push,
            WatchedKind::Tag => Self::Tag,
        }
    }
}

/// How a repository is watched, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// As given; [`SettingsInput::validate`] has seen it.
    pub repository_url: String,
    /// The name of credentials in the service's own configuration.
    pub credentials: Option<String>,
    pub events: Vec<WatchedKind>,
    pub branches: NameFilter,
    pub tags: NameFilter,
    pub manifest_path: String,
    pub poll_interval: Option<Duration>,
    pub enabled: bool,
    pub build_existing: bool,
}

/// A configuration's settings as a request gives them.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SettingsInput {
    pub repository_url: String,
    pub credentials: Option<String>,
    pub events: Option<Vec<WatchedKind>>,
    #[serde(default)]
    pub branches: Vec<String>,
    #[serde(default)]
    pub tags: Vec<String>,
    pub manifest_path: Option<String>,
    pub manifest: Option<String>,
    pub poll_interval_ms: Option<u64>,
    pub enabled: Option<bool>,
    #[serde(default)]
    pub build_existing: bool,
}

/// One setting that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SettingError {
    pub setting: String,
    pub message: String,
}

impl SettingError {
    fn new(setting: impl Into<String>, message: impl Into<String>) -> Self {
        Self { setting: setting.into(), message: message.into() }
    }
}

impl SettingsInput {
    /// The settings and the uploaded manifest, or everything that is wrong with them.
    pub fn validate(
        self,
        allowed: &AllowedTransports,
        knows_credentials: &dyn Fn(&str) -> bool,
    ) -> Result<(Settings, Option<String>), Vec<SettingError>> {
        let mut errors = Vec::new();
        if let Err(error) = check_url(&self.repository_url, allowed) {
            errors.push(SettingError::new("repository_url", error));
        }
        if let Some(name) = &self.credentials
            && !knows_credentials(name)
        {
            let name: String = name.chars().take(128).collect();
            let message = format!("the service's configuration has no credentials named `{name}`");
            errors.push(SettingError::new("credentials", message));
        }
        let mut filter = |setting: &str, patterns| {
            NameFilter::new(patterns).unwrap_or_else(|(index, why)| {
                errors.push(SettingError::new(format!("{setting}[{index}]"), why));
                NameFilter::default()
            })
        };
        let (branches, tags) = (filter("branches", self.branches), filter("tags", self.tags));
        let mut events = self.events.unwrap_or_else(|| vec![WatchedKind::Push]);
        events.dedup();
        if events.is_empty() {
            errors.push(SettingError::new("events", "without any event there is nothing to watch for"));
        }
        let manifest_path = self.manifest_path.unwrap_or_else(|| DEFAULT_MANIFEST_PATH.to_owned());
        if let Err(why) = check_manifest_path(&manifest_path) {
            errors.push(SettingError::new("manifest_path", why));
        }
        if let Some(Err(why)) = self.manifest.as_deref().map(check_manifest) {
            errors.push(SettingError::new("manifest", why));
        }
        if self.poll_interval_ms.is_some_and(|interval| !POLL_INTERVAL_MS.contains(&interval)) {
            errors.push(SettingError::new("poll_interval_ms", "it must be between 1 s and 1 day"));
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        let settings = Settings {
            repository_url: self.repository_url,
            credentials: self.credentials,
            events,
            branches,
            tags,
            manifest_path,
            poll_interval: self.poll_interval_ms.map(Duration::from_millis),
            enabled: self.enabled.unwrap_or(true),
            build_existing: self.build_existing,
        };
        Ok((settings, self.manifest))
    }
}

fn check_url(text: &str, allowed: &AllowedTransports) -> Result<(), String> {
    let url = RemoteUrl::parse(text, allowed).map_err(|error: InvalidRemoteUrl| error.to_string())?;
    if *url.embedded_credentials() != Credentials::None {
        return Err(
            "the URL has a user or password in it, which would be shown to everyone who may read: name \
                    credentials of the service's configuration in `credentials` instead"
                .to_owned(),
        );
    }
    Ok(())
}

fn check_manifest_path(path: &str) -> Result<(), &'static str> {
    let bad_part = |part: &str| part.is_empty() || part == "." || part == "..";
    if path.len() > 1024 || path.chars().any(char::is_control) || path.split('/').any(bad_part) {
        return Err("it must be a path inside the repository, such as `.sealci/pipeline.yaml`");
    }
    Ok(())
}

/// What can be said of a manifest without reading it; the rest is the controller's.
pub fn check_manifest(text: &str) -> Result<(), &'static str> {
    if text.trim().is_empty() {
        return Err("the manifest is empty");
    }
    if text.len() > MAX_MANIFEST_BYTES {
        return Err("the manifest is larger than 1 MiB");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validate(json: serde_json::Value) -> Result<(Settings, Option<String>), Vec<SettingError>> {
        let input: SettingsInput = serde_json::from_value(json).unwrap();
        input.validate(&AllowedTransports::default(), &|name| name == "forge")
    }

    #[test]
    fn little_is_needed() {
        let (settings, manifest) = validate(serde_json::json!({"repository_url": "https://h/o/r"})).unwrap();
        assert_eq!(settings.events, [WatchedKind::Push]);
        assert_eq!(settings.manifest_path, ".sealci/pipeline.yaml");
        assert!(settings.enabled && !settings.build_existing && manifest.is_none());
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let errors = validate(serde_json::json!({
            "repository_url": "https://me:hunter2@h/o/r", "credentials": "none", "branches": ["ok", ""],
            "tags": ["refs/tags/x"], "events": [], "manifest_path": "../x", "manifest": " ", "poll_interval_ms": 999,
        }))
        .unwrap_err();
        let settings: Vec<_> = errors.iter().map(|error| error.setting.as_str()).collect();
        let expected = [
            "repository_url",
            "credentials",
            "branches[1]",
            "tags[0]",
            "events",
            "manifest_path",
            "manifest",
            "poll_interval_ms",
        ];
        assert_eq!(settings.len(), expected.len());
        assert!(expected.iter().all(|setting| settings.contains(setting)), "{settings:?}");
        assert!(!format!("{errors:?}").contains("hunter2"));
    }
}
