//! Obtains images and keeps them on disk.
//!
//! ```text
//! obtain ─→ resolve: name → manifest → configuration        (resolve.rs; one at a time for one name)
//!       └─→ layers: there? else fetch, unpack, name it       (layers.rs; one at a time for one layer)
//!       └─→ record the use; then, behind it: settle, collect
//! ```
//! Several processes may have the same folder open; files.rs says how that is safe.

mod collect;
mod files;
mod flight;
mod layers;
mod resolve;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;

use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

pub use collect::Collected;

use crate::digest::Digest;
use crate::error::ImageError;
use crate::image::{Image, PullPolicy, Wanted};
use crate::local::Images;
use crate::options::StoreOptions;
use crate::platform::Platform;
use crate::registry::RegistryClient;
use files::{Files, LayerFolder, Record};
use flight::Flights;
use resolve::Resolved;

/// Hears, line by line, what is being done: for the log of whoever waits.
pub trait Notes: Send + Sync {
    fn note(&self, line: &str);
}

impl<F: Fn(&str) + Send + Sync> Notes for F {
    fn note(&self, line: &str) {
        self(line);
    }
}

/// Keeps an image's layers on disk while it, or a clone of it, lives.
#[derive(Debug, Clone, Default)]
pub struct Lease {
    _layers: Vec<Arc<LayerFolder>>,
}

impl Lease {
    /// Keeps nothing: for folders that are no store's.
    pub fn none() -> Self {
        Self::default()
    }
}

/// Images in one folder. Clones are the same store.
#[derive(Clone)]
pub struct ImageStore {
    inner: Arc<Inner>,
    /// What goes on behind a pull; cancelled with the store.
    behind: Arc<Mutex<JoinSet<()>>>,
}

struct Inner {
    files: Files,
    options: StoreOptions,
    images: Option<Images>,
    client: RegistryClient,
    machine: Platform,
    resolving: Flights<Arc<Resolved>>,
    fetching: Flights<Arc<LayerFolder>>,
    /// Layers that somebody here uses: all share one lock.
    in_use: Mutex<HashMap<Digest, Weak<LayerFolder>>>,
    downloads: Semaphore,
    /// Places for threads that unpack: they have them until they end, which may be after nobody waits any more.
    unpacks: Arc<Semaphore>,
    /// Whether a layer was made since the last settling.
    is_unsettled: AtomicBool,
}

impl ImageStore {
    /// Opens a folder, which is made if need be; it should be this user's alone. Removes what is left of processes that died.
    /// Blocks for a moment.
    pub fn open(folder: &Path, options: StoreOptions) -> Result<Self, ImageError> {
        let files = Files::open(folder).map_err(|error| ImageError::disk(folder, error))?;
        let client = RegistryClient::new(options.registries.clone(), options.timeouts).map_err(|error| {
            let reason = crate::error::root_cause(&error);
            let source = Arc::new(std::io::Error::other(reason));
            ImageError::Storage { path: "the certificates of authorities for registries".into(), source }
        })?;
        let at_once = options.layers_at_once.max(1);
        let inner = Inner {
            files,
            images: options.images_folder.clone().map(|folder| Images { folder }),
            client,
            machine: Platform::this_machine(),
            resolving: Flights::default(),
            fetching: Flights::default(),
            in_use: Mutex::default(),
            downloads: Semaphore::new(at_once),
            unpacks: Arc::new(Semaphore::new(at_once)),
            is_unsettled: AtomicBool::new(false),
            options,
        };
        Ok(Self { inner: Arc::new(inner), behind: Arc::default() })
    }

    /// Brings an image onto the disk and keeps it there while the result lives. Dropping the future is safe at any moment; what
    /// was fetched so far is used the next time.
    pub async fn obtain(&self, wanted: &Wanted, notes: &dyn Notes) -> Result<Image, ImageError> {
        let result = self.obtain_once(wanted, notes).await;
        if let Err(ImageError::NotFound { image, .. }) = &result
            && wanted.pull == PullPolicy::IfMissing
            && !wanted.reference.is_pinned()
            && self.inner.files.record(image).is_some()
        {
            // What the tag stood for is not whole on disk any more, and gone from the registry: it stands for another image.
            notes.note(&format!("{image} is not what it was; asking anew"));
            return self.obtain_once(&Wanted { pull: PullPolicy::Always, ..wanted.clone() }, notes).await;
        }
        result
    }

    async fn obtain_once(&self, wanted: &Wanted, notes: &dyn Notes) -> Result<Image, ImageError> {
        let started = Instant::now();
        let inner = &self.inner;
        let name = wanted.reference.to_string();
        let resolved = inner.resolve(wanted, notes).await?;
        let may_fetch = wanted.pull != PullPolicy::Never || !resolved.is_remote();
        let mut held = inner.layers_on_disk(&resolved).await?;
        let missing = resolved.layers.iter().filter(|layer| !held.contains_key(&layer.diff_id)).count();
        if missing > 0 && !may_fetch {
            return Err(ImageError::NotOnDisk { image: name });
        }
        if missing > 0 {
            notes.note(&resolved.announcement(&held));
            self.fetch(&resolved, &mut held, notes).await?;
        }
        inner.check_size(&name, held.values())?;
        inner.record(&name, &resolved).await?;
        if missing > 0 {
            for note in held.values().flat_map(|folder| &folder.facts.notes).collect::<BTreeSet<_>>() {
                notes.note(note);
            }
            notes.note(&format!("{name} is on disk after {:.1} s", started.elapsed().as_secs_f64()));
            self.tidy_behind();
        }
        Ok(image(&resolved, &held))
    }

    /// Fetches what is missing, side by side.
    async fn fetch(
        &self,
        resolved: &Arc<Resolved>,
        held: &mut HashMap<Digest, Arc<LayerFolder>>,
        notes: &dyn Notes,
    ) -> Result<(), ImageError> {
        let missing: Vec<_> = (0..resolved.layers.len())
            .filter(|index| {
                let id = &resolved.layers[*index].diff_id;
                let is_first = resolved.layers[..*index].iter().all(|layer| layer.diff_id != *id);
                is_first && !held.contains_key(id)
            })
            .collect();
        // Lazily: work that nobody polls must not hold a place (see `Flights`).
        let mut fetched = futures_util::stream::iter(missing)
            .map(|index| async move {
                let folder = self.inner.fetch_layer(resolved, index, notes).await?;
                Ok::<_, ImageError>((resolved.layers[index].diff_id.clone(), folder))
            })
            .buffer_unordered(self.inner.options.layers_at_once.max(1));
        while let Some((id, folder)) = fetched.try_next().await? {
            held.insert(id, folder);
            self.inner.check_size(&resolved.image, held.values())?;
        }
        Ok(())
    }

    /// Removes what is over the budget, but nothing that is in use, and what died with its process.
    pub async fn collect(&self) -> Result<Collected, ImageError> {
        let inner = self.inner.clone();
        blocking(move || collect::collect(&inner.files, inner.options.budget_bytes)).await
    }

    /// Waits until all that was unpacked so far would survive a loss of power. It is done behind each pull as well.
    pub async fn settle(&self) -> Result<(), ImageError> {
        let inner = self.inner.clone();
        blocking(move || inner.settle()).await
    }

    /// Waits for what goes on behind pulls, and for threads that nobody waits for any more. It can be used again afterwards.
    pub async fn close(&self) {
        let mut behind = std::mem::take(&mut *self.behind.lock().unwrap_or_else(PoisonError::into_inner));
        while behind.join_next().await.is_some() {}
        let all = u32::try_from(self.inner.options.layers_at_once.max(1)).unwrap_or(u32::MAX);
        drop(self.inner.unpacks.acquire_many(all).await);
    }

    /// Bytes that all layers take on disk, about.
    pub async fn size_bytes(&self) -> Result<u64, ImageError> {
        let inner = self.inner.clone();
        blocking(move || Ok(collect::size(&inner.files))).await
    }

    /// After a pull: makes it durable, and makes room. Nobody waits for it, so what goes wrong is only logged: the next pull does
    /// it again.
    fn tidy_behind(&self) {
        let inner = self.inner.clone();
        inner.is_unsettled.store(true, Ordering::Release);
        let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        while behind.try_join_next().is_some() {}
        behind.spawn(async move {
            let tidy = move || {
                inner.settle()?;
                let budget_bytes = inner.options.budget_bytes;
                if collect::size(&inner.files) > budget_bytes {
                    let collected = collect::collect(&inner.files, budget_bytes)?;
                    tracing::info!(
                        images = collected.images,
                        layers = collected.layers,
                        freed_bytes = collected.freed_bytes,
                        "images were removed to keep the budget"
                    );
                }
                Ok(())
            };
            if let Err(error) = blocking(tidy).await {
                tracing::warn!(error = %error, "the image store could not be tidied");
            }
        });
    }
}

impl std::fmt::Debug for ImageStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("ImageStore").field("folder", &self.inner.files.folder).finish_non_exhaustive()
    }
}

impl Inner {
    fn settle(&self) -> Result<(), ImageError> {
        if self.is_unsettled.swap(false, Ordering::AcqRel) {
            self.files.settle().map_err(|error| ImageError::disk(&self.files.folder, error))?;
        }
        Ok(())
    }

    fn check_size<'a>(
        &self,
        image: &str,
        layers: impl Iterator<Item = &'a Arc<LayerFolder>>,
    ) -> Result<(), ImageError> {
        let (bytes, bound) =
            (layers.map(|layer| layer.facts.archive_bytes).sum(), self.options.max_image_bytes);
        if bytes > bound {
            return Err(ImageError::TooLarge { what: format!("the image `{image}`"), bytes, bound });
        }
        Ok(())
    }

    /// Notes that the image was used, and what its name stands for.
    async fn record(self: &Arc<Self>, name: &str, resolved: &Resolved) -> Result<(), ImageError> {
        let record = Record {
            reference: name.to_owned(),
            digest: resolved.named.clone(),
            blobs: resolved.blobs.clone(),
            layers: resolved.layers.iter().map(|layer| layer.diff_id.clone()).collect(),
        };
        let inner = self.clone();
        blocking(move || {
            inner.files.keep_record(&record).map_err(|error| ImageError::disk(&inner.files.folder, error))
        })
        .await
    }
}

/// Of equal layers only the highest is named.
fn image(resolved: &Resolved, held: &HashMap<Digest, Arc<LayerFolder>>) -> Image {
    let mut layers = Vec::new();
    let mut lease = Lease::default();
    for (index, layer) in resolved.layers.iter().enumerate() {
        let is_last = resolved.layers[index + 1..].iter().all(|other| other.diff_id != layer.diff_id);
        if let Some(folder) = held.get(&layer.diff_id).filter(|_| is_last) {
            layers.push(folder.path.clone());
            lease._layers.push(folder.clone());
        }
    }
    Image { digest: resolved.digest.to_string(), config: resolved.config.clone(), layers, lease }
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ImageError::Closed),
    }
}
