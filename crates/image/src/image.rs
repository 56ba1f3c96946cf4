//! Describes an image that is on disk, as whoever runs it needs it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::reference::ImageReference;
use crate::store::Lease;

/// When a registry is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PullPolicy {
    /// When the image is not on disk. One that is named by its digest is never asked for twice.
    #[default]
    IfMissing,
    /// Each time; what is on disk already is not fetched again.
    Always,
    /// Never: what is not on disk is an error.
    Never,
}

/// Which image, and how hard to look for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Wanted {
    pub reference: ImageReference,
    pub pull: PullPolicy,
}

/// An image on disk, unpacked. It stays there while this lives.
#[derive(Debug, Clone)]
pub struct Image {
    /// Of the manifest for this machine's platform: `sha256:…`. An archive of `docker save` has none; this is its configuration's.
    pub digest: String,
    pub config: ImageConfig,
    /// Folders with one unpacked layer each, the lowest first; whiteouts and opaque folders are overlayfs's own, the latter as
    /// `user.overlay.*` attributes (mount option `userxattr`). None is there twice: overlayfs refuses that, and of equal layers
    /// only the highest can be seen.
    pub layers: Vec<PathBuf>,
    /// Keeps the layers on disk. [`Lease::none`] for folders that no store owns.
    pub lease: Lease,
}

/// What an image says about how to run it (OCI image-spec, `config` of the image configuration).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageConfig {
    pub entrypoint: Vec<String>,
    /// Arguments behind the entrypoint; the whole command where there is none.
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty for root.
    pub user: String,
    /// Absolute; empty for `/`.
    pub working_folder: String,
    pub labels: BTreeMap<String, String>,
    /// `SIGTERM`, `15`; empty where it says nothing.
    pub stop_signal: String,
}
