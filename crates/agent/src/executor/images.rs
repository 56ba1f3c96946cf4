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
        obtained.map_err(|error| ExecutorError::Image {
            image: container.image.clone(),
            disk_full: matches!(error, ImageError::DiskFull { .. }),
            source: error.into(),
        })
    }
}
