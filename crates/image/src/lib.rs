//! Keeps OCI images on disk: brings them from registries, layout folders and archives, checks every byte against its
//! digest, and unpacks each layer once for all who run it. Knows nothing of CI.

mod image;

pub use image::{Image, ImageConfig, PullPolicy};
