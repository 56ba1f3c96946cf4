//! Says how the scheduler is to run.

use std::time::Duration;

use secrecy::{SecretSlice, SecretString};

use crate::state::Settings;

/// The certificates of the listener, its own first, and the key of that.
#[derive(Debug, Clone)]
pub struct Tls {
    pub certificates_pem: Vec<u8>,
    pub key_pem: SecretSlice<u8>,
}

/// Everything that the scheduler is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// What makes the listener one for other machines.
    pub tls: Option<Tls>,
    /// What controllers prove themselves with.
    pub cluster_secret: SecretString,
    /// Periods and bounds of the scheduling itself.
    pub settings: Settings,
    /// A connection on which nothing came for so long is probed. A half-open one is found after this and `keepalive_timeout`.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
    /// So long a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// So long a stream may take to say `Hello`.
    pub hello_timeout: Duration,
    /// So long open connections may take to end on shutdown.
    pub shutdown_timeout: Duration,
    /// The largest message taken from an agent. A log chunk may have 1 MiB.
    pub max_agent_message_bytes: usize,
    /// The largest message taken from a controller: a snapshot or a directory may be long.
    pub max_controller_message_bytes: usize,
    /// How many messages to an agent may wait before its stream is ended.
    pub agent_mailbox: usize,
    /// How many messages to a controller may wait before its stream is ended.
    pub controller_mailbox: usize,
    /// How many messages may wait for the scheduler before those who send are held up.
    pub inbox: usize,
}

impl Config {
    /// A part of each period, where others are waited for.
    pub fn hurried(mut self, factor: u32) -> Self {
        for period in [
            &mut self.keepalive_interval,
            &mut self.keepalive_timeout,
            &mut self.settings.held_interval,
            &mut self.settings.silence,
            &mut self.settings.directory_wait,
            &mut self.settings.deserted_after,
            &mut self.settings.supersede_after,
        ] {
            *period /= factor;
        }
        self
    }

    /// Sensible figures for everything but the secret.
    pub fn new(cluster_secret: SecretString) -> Self {
        Self {
            tls: None,
            cluster_secret,
            settings: Settings::default(),
            // A line that is cut in the other direction lets what the agent says through, which puts the probe off once: it is
            // found after twice the interval and the timeout, 22 s, at the latest. The interval is as long as that allows, for
            // each probe of an idle agent costs as much as its word does.
            keepalive_interval: Duration::from_secs(7),
            keepalive_timeout: Duration::from_secs(8),
            handshake_timeout: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(10),
            shutdown_timeout: Duration::from_secs(5),
            max_agent_message_bytes: 4 << 20,
            max_controller_message_bytes: 64 << 20,
            agent_mailbox: 1024,
            controller_mailbox: 16 * 1024,
            inbox: 1024,
        }
    }
}
