//! Holds all that the monitor is told at its start.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sealci_git::{AllowedTransports, CredentialBook, Credentials};
use sealci_service::auth::{Token, Tokens};
use sealci_service::database::DatabaseUrl;
use sealci_service::listen::Limits;

/// Built once, before anything runs.
#[derive(Debug, Clone)]
pub struct Config {
    pub database: DatabaseUrl,
    /// Who may use the monitor's API.
    pub tokens: Tokens,
    pub controller: ControllerAddress,
    pub git: sealci_git::Options,
    pub transports: AllowedTransports,
    /// What opens private repositories where a configuration names no credentials.
    pub repositories: Arc<CredentialBook>,
    /// What opens private repositories, by the name that configurations give.
    pub credentials: BTreeMap<String, Credentials>,
    /// How often a repository is looked at when its configuration does not say.
    pub poll_interval: Duration,
    /// How many repositories are asked at the same time.
    pub max_concurrent_polls: usize,
    pub retry: Backoff,
    pub http: Limits,
}

/// Where events go.
#[derive(Debug, Clone)]
pub struct ControllerAddress {
    /// The base of its API: `https://ci.example.org:8420`; plain `http://` on this machine.
    pub url: String,
    /// The authority of its certificate, PEM; the system's if none.
    pub ca_pem: Option<Vec<u8>>,
    /// A token with the role `run`.
    pub token: Token,
}

/// How long to wait after a failure: twice as long each time, up to a bound.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    pub first: Duration,
    pub longest: Duration,
}

impl Backoff {
    /// The wait after so many failures in a row.
    pub fn after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(20);
        self.first.saturating_mul(1 << doublings).min(self.longest)
    }
}

impl Config {
    /// The usual configuration. Nobody may use the API until `tokens` has some.
    pub fn new(database: DatabaseUrl, controller: ControllerAddress, git: sealci_git::Options) -> Self {
        Self {
            database,
            tokens: Tokens::default(),
            controller,
            git,
            transports: AllowedTransports::default(),
            repositories: Arc::default(),
            credentials: BTreeMap::new(),
            poll_interval: Duration::from_secs(10),
            max_concurrent_polls: 64,
            retry: Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(60) },
            http: Limits::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_bound() {
        let backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(60) };
        let waits: Vec<u64> = [1, 2, 3, 6, 7, 1000].map(|failures| backoff.after(failures).as_secs()).into();
        assert_eq!(waits, [1, 2, 4, 32, 60, 60]);
    }
}
