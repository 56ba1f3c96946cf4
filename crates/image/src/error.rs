//! What can go wrong with an image, one variant for each thing that somebody can mend.
//!
//! No text holds a credential: addresses are shown without what follows a `?` (signed links) and never with a password.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::digest::Digest;
use crate::unpack::UnpackError;

/// Why an image was not obtained. Many may wait for the same one, so it can be cloned.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    #[error("there is no image `{image}` at {place}; check its name and tag, or log in if it is private")]
    NotFound { image: String, place: String },
    #[error("the image `{image}` is not on this machine, and may not be pulled (pull: never)")]
    NotOnDisk { image: String },
    #[error(
        "{registry} refuses access to `{image}`: {reason}; add a login for {registry} to the agent's docker config file"
    )]
    Unauthorized { image: String, registry: String, reason: String },
    #[error(
        "{what} from {place} has the digest {found}, and should have {expected}; it was not used. The registry, a mirror or \
             something between is wrong: try again, then tell who runs it"
    )]
    WrongDigest { what: String, place: String, expected: Digest, found: Digest },
    #[error("`{image}` is not made for this machine ({wanted}); there is {available}")]
    Platform { image: String, wanted: String, available: String },
    #[error(
        "{registry} cannot be reached ({attempts} tries): {reason}; check its name and this machine's network"
    )]
    Unreachable { registry: String, attempts: u32, reason: String },
    #[error("{registry} does not go on: no byte of {what} for {} s ({attempts} tries); try again later or use a mirror", silence.as_secs_f32())]
    Hangs { registry: String, what: String, silence: Duration, attempts: u32 },
    #[error("{registry} crawls: less than {least_bytes} bytes of {what} in {} s ({attempts} tries); try again later or use a mirror", within.as_secs_f32())]
    Crawls { registry: String, what: String, least_bytes: u64, within: Duration, attempts: u32 },
    #[error("{registry} broke off {what} ({attempts} tries): {reason}; try again later")]
    BrokenOff { registry: String, what: String, attempts: u32, reason: String },
    #[error(
        "{address} is not encrypted, and {why}; use https, or allow {host} as an insecure registry in the agent's configuration"
    )]
    Insecure { address: String, host: String, why: &'static str },
    #[error("{registry} answered {what} with {status}{detail}")]
    Refused { registry: String, what: String, status: u16, detail: String },
    #[error("`{image}` cannot be understood: {reason}; it has to be made again")]
    Malformed { image: String, reason: String },
    #[error("layer {layer} of `{image}` is not sound and was not used; the image has to be made again")]
    CorruptLayer {
        image: String,
        layer: String,
        #[source]
        source: UnpackError,
    },
    #[error(
        "{what} is too large: {bytes} bytes, and {bound} are allowed; raise the bound or use a smaller image"
    )]
    TooLarge { what: String, bytes: u64, bound: u64 },
    #[error("the disk with {} is full; make room, or lower the budget for images", folder.display())]
    DiskFull {
        folder: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error(
        "`{image}` is a file on this machine, and none may be used: the configuration names no images folder"
    )]
    NoImagesFolder { image: String },
    #[error(
        "the login for {registry} is kept by the program `docker-credential-{helper}`, which is not run here; put it into `auths` \
             of a docker config file of its own (`docker login` with an empty config folder)"
    )]
    CredentialHelper { registry: String, helper: String },
    #[error("the file system of {} takes no `user.*` attributes, which layers need; put the image folder on ext4, xfs or btrfs", folder.display())]
    FileSystem { folder: PathBuf },
    #[error("{} cannot be used", path.display())]
    Storage {
        path: PathBuf,
        #[source]
        source: Arc<io::Error>,
    },
    #[error("the image store is closed")]
    Closed,
}

impl ImageError {
    /// Of an error on the store's own disk.
    pub(crate) fn disk(path: &Path, source: io::Error) -> Self {
        let source = Arc::new(source);
        if is_full(&source) {
            Self::DiskFull { folder: path.to_owned(), source }
        } else {
            Self::Storage { path: path.to_owned(), source }
        }
    }

    /// Whether the same, asked again, may go better.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Hangs { .. }
            | Self::Crawls { .. }
            | Self::BrokenOff { .. }
            | Self::DiskFull { .. } => true,
            Self::Refused { status, .. } => *status >= 500 || *status == 429,
            _ => false,
        }
    }
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The innermost cause is what says something to people.
pub(crate) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
