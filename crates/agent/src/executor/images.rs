//! Says where the executors that run images have them from.

use std::fmt::Debug;

use async_trait::async_trait;
use sealci_core::plan::{Container, Pull};
use sealci_image::{Image, ImageError, ImageReference, ImageStore, PullPolicy, Wanted};

use super::{ExecutorError, Notes};

/// What has images.
#[async_trait]
pub trait Images: Send + Sync + Debug {
    /// Has the image on disk, unpacked, while the answer lives. Dropping the future gives up.
    async fn obtain(&self, container: &Container, notes: &Notes) -> Result<Image, ExecutorError>;

    /// Waits until nothing goes on behind what was obtained. Nothing may be obtained any more.
    async fn close(&self) {}
}

#[async_trait]
impl Images for ImageStore {
    async fn obtain(&self, container: &Container, notes: &Notes) -> Result<Image, ExecutorError> {
        // The grammar is the same on every agent: another one would not have it either.
        let reference: ImageReference = container.image.parse().map_err(|error| {
            ExecutorError::Unsupported(format!("`{}` names no image: {error}", container.image))
        })?;
        let pull = match container.pull {
            Pull::IfMissing => PullPolicy::IfMissing,
            Pull::Always => PullPolicy::Always,
            Pull::Never => PullPolicy::Never,
        };
        let say = |line: &str| notes.say(line);
        let obtained = ImageStore::obtain(self, &Wanted { reference, pull }, &say).await;
        obtained.map_err(|error| failed(container.image.clone(), error))
    }

    async fn close(&self) {
        ImageStore::close(self).await;
    }
}

/// Tells what may pass by itself from what has to be mended.
fn failed(image: String, error: ImageError) -> ExecutorError {
    match error {
        ImageError::DiskFull { .. } => ExecutorError::Image { image, disk_full: true, source: error.into() },
        // The store's own trouble is this agent's; another one may do better.
        ImageError::Storage { .. } | ImageError::FileSystem { .. } | ImageError::Closed => {
            ExecutorError::io(format_args!("have the image {image}"))(std::io::Error::other(error))
        }
        error if error.is_passing() => ExecutorError::Registry { image, source: error.into() },
        error => ExecutorError::Image { image, disk_full: false, source: error.into() },
    }
}

#[cfg(test)]
mod tests {
    use sealci_core::outcome::Cause;

    use super::*;

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let text = || "x".to_owned();
        let refused =
            |status| ImageError::Refused { registry: text(), what: text(), status, detail: String::new() };
        let digest = || format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let cases = [
            (ImageError::NotFound { image: text(), place: text() }, false),
            (ImageError::NotOnDisk { image: text() }, false),
            (ImageError::Unauthorized { image: text(), registry: text(), reason: text() }, false),
            (
                ImageError::WrongDigest { what: text(), place: text(), expected: digest(), found: digest() },
                false,
            ),
            (ImageError::Platform { image: text(), wanted: text(), available: text() }, false),
            (ImageError::Malformed { image: text(), reason: text() }, false),
            (refused(403), false),
            (ImageError::Unreachable { registry: text(), attempts: 4, reason: text() }, true),
            (ImageError::BrokenOff { registry: text(), what: text(), attempts: 4, reason: text() }, true),
            (refused(503), true),
            (refused(429), true),
        ];
        for (error, passes) in cases {
            let told = error.to_string();
            let cause = failed(text(), error).cause();
            assert_eq!(cause, if passes { Cause::Registry } else { Cause::Image }, "{told}");
            assert_eq!(cause.is_transient(), passes);
        }
    }
}
