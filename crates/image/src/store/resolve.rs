//! Finds out what a name stands for: the manifest for this machine, its configuration, its layers.

use std::collections::HashMap;
use std::sync::Arc;

use super::files::LayerFolder;
use super::{Inner, Notes, blocking};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::image::{ImageConfig, PullPolicy, Wanted};
use crate::local::{self, Images, Section};
use crate::manifest::{self, CONFIG_BYTES, Configuration, Descriptor, Document, MANIFEST_BYTES};
use crate::reference::{ImageReference, RegistryReference};

/// An image whose layers are known, not that they are there.
#[derive(Debug)]
pub(super) struct Resolved {
    /// As it was asked for.
    pub image: String,
    /// Of the manifest for this machine.
    pub digest: Digest,
    /// What the name stood for: that, or the index it is in.
    pub named: Digest,
    /// What is needed to resolve it again without asking.
    pub blobs: Vec<Digest>,
    pub config: ImageConfig,
    pub layers: Vec<Layer>,
}

#[derive(Debug)]
pub(super) struct Layer {
    pub diff_id: Digest,
    pub source: LayerSource,
}

#[derive(Debug)]
pub(super) enum LayerSource {
    Registry { reference: RegistryReference, digest: Digest, bytes: u64 },
    Local { images: Images, section: Section },
}

impl Layer {
    /// Of the blob.
    pub fn bytes(&self) -> u64 {
        match &self.source {
            LayerSource::Registry { bytes, .. } => *bytes,
            LayerSource::Local { section, .. } => section.bytes,
        }
    }
}

impl Resolved {
    pub fn is_remote(&self) -> bool {
        self.layers.iter().any(|layer| matches!(layer.source, LayerSource::Registry { .. }))
    }

    /// Before anything is fetched.
    pub fn announcement(&self, held: &HashMap<Digest, Arc<LayerFolder>>) -> String {
        let missing: Vec<_> = self.layers.iter().filter(|layer| !held.contains_key(&layer.diff_id)).collect();
        let bytes: u64 = missing.iter().map(|layer| layer.bytes()).sum();
        let verb = if self.is_remote() { "pulling" } else { "unpacking" };
        let (count, all) = (missing.len(), self.layers.len());
        format!("{verb} {}: {count} of {all} layers, {}", self.image, megabytes(bytes))
    }
}

/// For people.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

impl Inner {
    pub(super) async fn resolve(
        self: &Arc<Self>,
        wanted: &Wanted,
        notes: &dyn Notes,
    ) -> Result<Arc<Resolved>, ImageError> {
        let name = format!("{:?} {}", wanted.pull, wanted.reference);
        let (inner, wanted) = (self.clone(), wanted.clone());
        let start = move |_| -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
            Box::pin(async move {
                let image = wanted.reference.to_string();
                let resolved = match wanted.reference {
                    ImageReference::Registry(reference) => {
                        inner.resolve_remote(&reference, wanted.pull).await
                    }
                    local => inner.resolve_local(local, image).await,
                };
                resolved.map(Arc::new)
            })
        };
        self.resolving.join(&name, notes, start).await
    }

    async fn resolve_local(
        self: Arc<Self>,
        reference: ImageReference,
        image: String,
    ) -> Result<Resolved, ImageError> {
        let images =
            self.images.clone().ok_or_else(|| ImageError::NoImagesFolder { image: image.clone() })?;
        blocking(move || {
            let found = match &reference {
                ImageReference::Layout { folder, tag } => {
                    local::resolve_layout(&images, &image, folder, tag.as_deref(), &self.machine)?
                }
                ImageReference::Archive { file } => local::resolve_archive(&images, &image, file)?,
                ImageReference::Registry(_) => return Err(ImageError::Closed),
            };
            let sources = found
                .layers
                .into_iter()
                .map(|section| LayerSource::Local { images: images.clone(), section });
            let layers = self.layers_of(&image, &found.configuration, sources.collect())?;
            let config = found.configuration.config;
            Ok(Resolved {
                image,
                named: found.digest.clone(),
                digest: found.digest,
                blobs: Vec::new(),
                config,
                layers,
            })
        })
        .await
    }

    async fn resolve_remote(
        self: &Arc<Self>,
        reference: &RegistryReference,
        pull: PullPolicy,
    ) -> Result<Resolved, ImageError> {
        let image = reference.to_string();
        let known = match &reference.digest {
            Some(digest) => Some(digest.clone()),
            None => self.files.record(&image).map(|record| record.digest),
        };
        // The digest that the registry names now, where that is asked for.
        let (mut named, mut first) = (known, None);
        match pull {
            PullPolicy::Never if named.is_none() => return Err(ImageError::NotOnDisk { image }),
            PullPolicy::Always if reference.digest.is_none() && named.is_some() => {
                named = self.client.head(reference).await?;
            }
            _ => {}
        }
        if named.is_none() {
            let fetched = self.client.manifest(reference, &reference.version(), MANIFEST_BYTES).await?;
            self.keep(&fetched.digest, &fetched.bytes)?;
            named = Some(fetched.digest);
            first = Some(fetched.bytes);
        }
        let Some(named) = named else { return Err(ImageError::NotOnDisk { image }) };
        self.resolve_from(reference, pull, image, named, first).await
    }

    /// Goes from a digest down to the manifest for this machine, by what is on disk, else by asking.
    async fn resolve_from(
        self: &Arc<Self>,
        reference: &RegistryReference,
        pull: PullPolicy,
        image: String,
        named: Digest,
        mut bytes: Option<Vec<u8>>,
    ) -> Result<Resolved, ImageError> {
        let malformed = |reason: String| ImageError::Malformed { image: image.clone(), reason };
        let mut digest = named.clone();
        let mut blobs = Vec::new();
        for _ in 0..4 {
            blobs.push(digest.clone());
            let text = match bytes.take() {
                Some(bytes) => bytes,
                None => self.manifest(reference, &digest, pull).await?,
            };
            match manifest::document(&text).map_err(malformed)? {
                Document::Index(listed) => {
                    let chosen = manifest::choose(&listed, &self.machine).map_err(|available| {
                        ImageError::Platform {
                            image: image.clone(),
                            wanted: self.machine.to_string(),
                            available,
                        }
                    })?;
                    digest = chosen.digest.clone();
                }
                Document::Manifest(found) => {
                    let text = self.configuration(reference, &found.config, pull).await?;
                    blobs.push(found.config.digest.clone());
                    let configuration = manifest::configuration(&text).map_err(malformed)?;
                    let source = |layer: Descriptor| LayerSource::Registry {
                        reference: reference.clone(),
                        digest: layer.digest,
                        bytes: layer.size,
                    };
                    let sources = found.layers.into_iter().map(source).collect();
                    let layers = self.layers_of(&image, &configuration, sources)?;
                    return Ok(Resolved {
                        image,
                        digest,
                        named,
                        blobs,
                        config: configuration.config,
                        layers,
                    });
                }
            }
        }
        Err(malformed("its indexes lie too deep in one another".to_owned()))
    }

    async fn manifest(
        &self,
        reference: &RegistryReference,
        digest: &Digest,
        pull: PullPolicy,
    ) -> Result<Vec<u8>, ImageError> {
        match self.files.read_blob(digest, MANIFEST_BYTES) {
            Some(bytes) => Ok(bytes),
            None if pull == PullPolicy::Never => Err(ImageError::NotOnDisk { image: reference.to_string() }),
            None => {
                let fetched = self.client.manifest(reference, &digest.to_string(), MANIFEST_BYTES).await?;
                self.keep(digest, &fetched.bytes)?;
                Ok(fetched.bytes)
            }
        }
    }

    async fn configuration(
        &self,
        reference: &RegistryReference,
        descriptor: &Descriptor,
        pull: PullPolicy,
    ) -> Result<Vec<u8>, ImageError> {
        match self.files.read_blob(&descriptor.digest, CONFIG_BYTES) {
            Some(bytes) => Ok(bytes),
            None if pull == PullPolicy::Never => Err(ImageError::NotOnDisk { image: reference.to_string() }),
            None => {
                let fetched = self.client.blob(reference, &descriptor.digest, CONFIG_BYTES).await?;
                self.keep(&descriptor.digest, &fetched.bytes)?;
                Ok(fetched.bytes)
            }
        }
    }

    /// A few kilobytes, written where they stand.
    fn keep(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        self.files.write_blob(digest, bytes).map_err(|error| ImageError::disk(&self.files.folder, error))
    }

    /// Puts each layer's blob and its diff id together, and looks whether this machine can run it.
    fn layers_of(
        &self,
        image: &str,
        configuration: &Configuration,
        sources: Vec<LayerSource>,
    ) -> Result<Vec<Layer>, ImageError> {
        let platform = &configuration.platform;
        // An image of one platform has no index that says so.
        if !platform.architecture.is_empty() && self.machine.fitness(platform).is_none() {
            return Err(ImageError::Platform {
                image: image.to_owned(),
                wanted: self.machine.to_string(),
                available: platform.to_string(),
            });
        }
        let diff_ids = &configuration.diff_ids;
        if diff_ids.len() != sources.len() {
            let reason =
                format!("it has {} layers, and its configuration names {}", sources.len(), diff_ids.len());
            return Err(ImageError::Malformed { image: image.to_owned(), reason });
        }
        let layers = diff_ids.iter().cloned().zip(sources);
        Ok(layers.map(|(diff_id, source)| Layer { diff_id, source }).collect())
    }
}
