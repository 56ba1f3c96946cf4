//! Brings single layers onto the disk, each once however many want it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use super::files::LayerFolder;
use super::flight::Told;
use super::resolve::{LayerSource, Resolved, megabytes};
use super::{Inner, Notes, blocking};
use crate::digest::Digest;
use crate::error::{ImageError, is_full};
use crate::registry::{Blob, Partial};
use crate::unpack::{self, Expected, UnpackError};

/// How often a long download is told of.
const TELL_EVERY: Duration = Duration::from_secs(5);

impl Inner {
    /// Those layers of an image that are there already, kept from now on.
    pub(super) async fn layers_on_disk(
        self: &Arc<Self>,
        resolved: &Arc<Resolved>,
    ) -> Result<HashMap<Digest, Arc<LayerFolder>>, ImageError> {
        let (inner, resolved) = (self.clone(), resolved.clone());
        blocking(move || {
            let mut held = HashMap::new();
            for layer in &resolved.layers {
                if let Some(folder) = inner.layer_on_disk(&layer.diff_id)? {
                    held.insert(layer.diff_id.clone(), folder);
                }
            }
            Ok(held)
        })
        .await
    }

    fn layer_on_disk(&self, diff_id: &Digest) -> Result<Option<Arc<LayerFolder>>, ImageError> {
        if let Some(folder) = self.in_use(diff_id) {
            return Ok(Some(folder));
        }
        let found = self.files.layer(diff_id);
        let found = found.map_err(|error| ImageError::disk(&self.files.layer_path(diff_id), error))?;
        Ok(found.map(|folder| self.keep_in_use(diff_id, folder)))
    }

    fn in_use(&self, diff_id: &Digest) -> Option<Arc<LayerFolder>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner).get(diff_id)?.upgrade()
    }

    fn keep_in_use(&self, diff_id: &Digest, folder: LayerFolder) -> Arc<LayerFolder> {
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        in_use.retain(|_, folder| folder.strong_count() > 0);
        let folder = Arc::new(folder);
        in_use.insert(diff_id.clone(), Arc::downgrade(&folder));
        folder
    }

    /// Fetches and unpacks a layer, or waits for whoever does.
    pub(super) async fn fetch_layer(
        self: &Arc<Self>,
        resolved: &Arc<Resolved>,
        index: usize,
        notes: &dyn Notes,
    ) -> Result<Arc<LayerFolder>, ImageError> {
        let (inner, resolved) = (self.clone(), resolved.clone());
        let name = resolved.layers[index].diff_id.to_string();
        let start = move |told: Told| -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
            Box::pin(async move { inner.make_layer(&resolved, index, &told).await })
        };
        self.fetching.join(&name, notes, start).await
    }

    async fn make_layer(
        self: &Arc<Self>,
        resolved: &Arc<Resolved>,
        index: usize,
        told: &Told,
    ) -> Result<Arc<LayerFolder>, ImageError> {
        let layer = &resolved.layers[index];
        // Somebody may have been faster.
        if let Some(folder) = self.layer_on_disk(&layer.diff_id)? {
            return Ok(folder);
        }
        let what = format!("layer {} of {}", index + 1, resolved.layers.len());
        if layer.bytes() > self.options.unpack.layer_bytes {
            let (bytes, bound) = (layer.bytes(), self.options.unpack.layer_bytes);
            return Err(ImageError::TooLarge {
                what: format!("{what} of `{}`", resolved.image),
                bytes,
                bound,
            });
        }
        let started = Instant::now();
        let partial = match &layer.source {
            LayerSource::Registry { .. } => Some(self.download(resolved, index, &what, told).await?),
            LayerSource::Local { .. } => None,
        };
        let fetched = started.elapsed();
        let place = self.unpacks.clone().acquire_owned().await.map_err(|_| ImageError::Closed)?;
        let unpacking = Instant::now();
        let folder = self.unpack_layer(resolved, index, partial, place).await?;
        let of = format!("{what} ({}): ", megabytes(layer.bytes()));
        let unpacked = format!("unpacked in {:.1} s", unpacking.elapsed().as_secs_f64());
        told.tell(match &layer.source {
            LayerSource::Registry { .. } => {
                format!("{of}fetched in {:.1} s, {unpacked}", fetched.as_secs_f64())
            }
            LayerSource::Local { .. } => format!("{of}{unpacked}"),
        });
        Ok(folder)
    }

    async fn download(
        self: &Arc<Self>,
        resolved: &Resolved,
        index: usize,
        what: &str,
        told: &Told,
    ) -> Result<Partial, ImageError> {
        let LayerSource::Registry { reference, digest, bytes } = &resolved.layers[index].source else {
            return Err(ImageError::Closed);
        };
        let _place = self.downloads.acquire().await.map_err(|_| ImageError::Closed)?;
        let partial =
            self.files.partial(digest).map_err(|error| ImageError::disk(&self.files.folder, error))?;
        let what = format!("{what} of `{}`", resolved.image);
        let blob = Blob { reference, digest, bytes: *bytes, what: &what };
        let progress = Progress::new(told, &what, *bytes);
        match self.client.download(&blob, &partial, &|count| progress.add(count)).await {
            Ok(()) => Ok(partial),
            Err(error) => {
                // Others need the room more than a later try needs the beginning.
                if matches!(error, ImageError::DiskFull { .. }) {
                    partial.discard();
                }
                Err(error)
            }
        }
    }

    async fn unpack_layer(
        self: &Arc<Self>,
        resolved: &Arc<Resolved>,
        index: usize,
        partial: Option<Partial>,
        place: OwnedSemaphorePermit,
    ) -> Result<Arc<LayerFolder>, ImageError> {
        let gone = CancelOnDrop::default();
        let (inner, resolved, cancelled) = (self.clone(), resolved.clone(), gone.0.clone());
        let folder = blocking(move || {
            let folder = inner.unpack_blocking(&resolved, index, partial, &cancelled);
            drop(place);
            folder
        })
        .await;
        drop(gone);
        folder
    }

    fn unpack_blocking(
        self: &Arc<Self>,
        resolved: &Resolved,
        index: usize,
        partial: Option<Partial>,
        cancelled: &AtomicBool,
    ) -> Result<Arc<LayerFolder>, ImageError> {
        let layer = &resolved.layers[index];
        let disk = |error| ImageError::disk(&self.files.folder, error);
        let staging = self.files.staging(&layer.diff_id).map_err(disk)?;
        let mut expected = Expected { digest: None, diff_id: Some(layer.diff_id.clone()) };
        let blob: Box<dyn Read> = match (&layer.source, &partial) {
            (LayerSource::Local { images, section }, _) => {
                expected.digest = section.digest.clone();
                let path = images.folder.join(&section.path);
                Box::new(images.section(section).map_err(|error| ImageError::disk(&path, error))?)
            }
            (_, Some(partial)) => {
                let mut file: &File = &partial.file;
                file.seek(SeekFrom::Start(0)).map_err(disk)?;
                Box::new(file)
            }
            (LayerSource::Registry { .. }, None) => return Err(ImageError::Closed),
        };
        let result = unpack::unpack(blob, &expected, &staging.fs(), &self.options.unpack, cancelled);
        let is_spent = !matches!(result, Err(UnpackError::Cancelled | UnpackError::Write { .. }));
        if let Some(partial) = partial.filter(|_| is_spent) {
            // Unpacked, or of no use: its bytes were right.
            partial.discard();
        }
        let unpacked = result.map_err(|error| self.layer_error(resolved, index, error))?;
        let finished = self.files.finish(staging, &layer.diff_id, unpacked).map_err(disk)?;
        self.is_unsettled.store(true, Ordering::Release);
        let folder = finished
            .ok_or_else(|| disk(std::io::Error::other("a layer was removed as soon as it was made")))?;
        Ok(self.keep_in_use(&layer.diff_id, folder))
    }

    fn layer_error(&self, resolved: &Resolved, index: usize, error: UnpackError) -> ImageError {
        match error {
            UnpackError::Write { source, .. } if is_full(&source) => {
                ImageError::DiskFull { folder: self.files.folder.clone(), source }
            }
            UnpackError::Write { source, entry }
                if source.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) =>
            {
                tracing::debug!(entry, "no attributes");
                ImageError::FileSystem { folder: self.files.folder.clone() }
            }
            // Of the disk, not of the layer.
            UnpackError::Write { source, .. } | UnpackError::Read(source) if is_the_disks(&source) => {
                ImageError::Storage { path: self.files.folder.clone(), source }
            }
            UnpackError::TooLarge { what, bound } => ImageError::TooLarge {
                what: format!("layer {} of `{}` ({what})", index + 1, resolved.image),
                bytes: bound + 1,
                bound,
            },
            UnpackError::Cancelled => ImageError::Closed,
            source => ImageError::CorruptLayer {
                image: resolved.image.clone(),
                layer: format!("{} of {}", index + 1, resolved.layers.len()),
                source,
            },
        }
    }
}

/// Errors that no layer can cause.
fn is_the_disks(error: &std::io::Error) -> bool {
    use rustix::io::Errno;
    let codes =
        [Errno::IO, Errno::ROFS, Errno::ACCESS, Errno::PERM, Errno::NFILE, Errno::MFILE, Errno::STALE];
    codes.into_iter().any(|code| error.raw_os_error() == Some(code.raw_os_error()))
}

/// Tells a thread that nobody waits for it any more.
#[derive(Default)]
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Tells now and then how far a download is.
struct Progress<'a> {
    told: &'a Told,
    what: &'a str,
    bytes: u64,
    done: AtomicU64,
    last: Mutex<Instant>,
}

impl<'a> Progress<'a> {
    fn new(told: &'a Told, what: &'a str, bytes: u64) -> Self {
        Self { told, what, bytes, done: AtomicU64::new(0), last: Mutex::new(Instant::now()) }
    }

    fn add(&self, count: u64) {
        let done = self.done.fetch_add(count, Ordering::Relaxed) + count;
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= TELL_EVERY {
            *last = Instant::now();
            let (done, all) = (megabytes(done), megabytes(self.bytes));
            self.told.tell(format!("{}: {done} of {all} fetched", self.what));
        }
    }
}
