//! What a store may do and use.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use crate::credentials::Credentials;
use crate::unpack::UnpackLimits;

#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Of unpacked layers on disk. Above it those of images used least recently go, unless somebody uses them.
    pub budget_bytes: u64,
    /// Where `oci:` and `docker-archive:` images lie. Without it there are none.
    pub images_folder: Option<PathBuf>,
    pub registries: Registries,
    pub unpack: UnpackLimits,
    /// Of all layers of an image together, unpacked.
    pub max_image_bytes: u64,
    pub timeouts: Timeouts,
    /// Layers that are fetched at once, by all together; as many are unpacked at once.
    pub layers_at_once: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            budget_bytes: 20 << 30,
            images_folder: None,
            registries: Registries::default(),
            unpack: UnpackLimits::default(),
            max_image_bytes: 40 << 30,
            timeouts: Timeouts::default(),
            layers_at_once: 3,
        }
    }
}

/// How registries are reached.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    /// Asked before the registry itself, in this order: `docker.io` → `mirror.example.org`, or with a path, or with
    /// `https://`. They speak the same protocol and serve the same names.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// `host:port` or `host` of those that are spoken to without TLS. None is by itself, loopback neither. Logins go to one only
    /// if it is on loopback.
    pub insecure: BTreeSet<String>,
    pub credentials: Credentials,
    /// Certificates (PEM) of authorities that are trusted besides the system's.
    pub authorities: Vec<u8>,
}

/// Who brings less of a layer in [`Timeouts::crawl`] does not go on: about a kilobyte in a second, by default.
pub const LEAST_BYTES: u64 = 64 << 10;

/// How long is waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub connect: Duration,
    /// For the next byte.
    pub stall: Duration,
    /// For the next [`LEAST_BYTES`] of a layer.
    pub crawl: Duration,
    /// Before the first retry; each further one waits twice as long.
    pub retry_after: Duration,
    /// After the first try. One that brought a mebibyte or more starts the count again.
    pub retries: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            crawl: Duration::from_secs(60),
            retry_after: Duration::from_millis(500),
            retries: 3,
        }
    }
}
