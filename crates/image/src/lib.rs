//! Keeps OCI images on disk: brings them from registries, layout folders and archives, checks every byte against its
//! digest, and unpacks each layer once for all who run it. Knows nothing of CI.
//!
//! ```text
//! reference → manifest for this machine → configuration → layers (fetched side by side) → folders for overlayfs
//! ```

mod credentials;
mod digest;
mod error;
mod image;
mod local;
mod manifest;
mod options;
mod platform;
mod reference;
mod registry;
mod store;
mod unpack;

pub use credentials::{Credentials, CredentialsError, Login};
pub use digest::{Digest, NotADigest};
pub use error::ImageError;
pub use image::{Image, ImageConfig, PullPolicy, Wanted};
pub use options::{Registries, StoreOptions, Timeouts};
pub use platform::Platform;
pub use reference::{DEFAULT_REGISTRY, ImageReference, ReferenceError, RegistryReference};
pub use store::{Collected, ImageStore, Lease, Notes};
pub use unpack::{UnpackError, UnpackLimits};
