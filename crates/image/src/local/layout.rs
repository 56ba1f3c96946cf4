//! OCI layout folders (image-spec, image-layout.md), as `skopeo copy … oci:FOLDER:TAG` makes them.

use std::path::{Path, PathBuf};

use super::{Images, LocalImage, Section};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{self, CONFIG_BYTES, Descriptor, Document, MANIFEST_BYTES};
use crate::platform::Platform;

const NAME: &str = "org.opencontainers.image.ref.name";
/// Index within index; nobody makes more.
const DEPTH: usize = 4;

pub(crate) fn resolve(
    images: &Images,
    image: &str,
    folder: &Path,
    tag: Option<&str>,
    machine: &Platform,
) -> Result<LocalImage, ImageError> {
    let malformed = |reason: String| ImageError::Malformed { image: image.to_owned(), reason };
    let path = folder.join("index.json");
    let bytes = images.read(&path, MANIFEST_BYTES).map_err(|error| images.error(image, &path, error))?;
    let Document::Index(listed) = manifest::document(&bytes).map_err(malformed)? else {
        return Err(malformed("its index.json is no index".to_owned()));
    };
    let mut listed = named(listed, tag).map_err(|there_is| ImageError::NotFound {
        image: image.to_owned(),
        place: format!("{} (there is {there_is})", images.folder.join(folder).display()),
    })?;
    for _ in 0..DEPTH {
        let chosen = manifest::choose(&listed, machine).map_err(|available| ImageError::Platform {
            image: image.to_owned(),
            wanted: machine.to_string(),
            available,
        })?;
        let bytes = blob(images, image, folder, chosen, MANIFEST_BYTES)?;
        match manifest::document(&bytes).map_err(malformed)? {
            Document::Index(inner) => listed = inner,
            Document::Manifest(found) => {
                let bytes = blob(images, image, folder, &found.config, CONFIG_BYTES)?;
                let configuration = manifest::configuration(&bytes).map_err(malformed)?;
                let section = |layer: &Descriptor| Section {
                    path: blob_path(folder, &layer.digest),
                    offset: 0,
                    bytes: layer.size,
                    digest: Some(layer.digest.clone()),
                };
                return Ok(LocalImage {
                    digest: chosen.digest.clone(),
                    configuration,
                    layers: found.layers.iter().map(section).collect(),
                });
            }
        }
    }
    Err(malformed("its indexes lie too deep in one another".to_owned()))
}

/// Those of a tag; without one, all if they are one image. Else the tags there are.
fn named(listed: Vec<Descriptor>, tag: Option<&str>) -> Result<Vec<Descriptor>, String> {
    let name = |descriptor: &Descriptor| descriptor.annotations.get(NAME).cloned();
    let mut names: Vec<String> = listed.iter().filter_map(name).collect();
    names.sort();
    names.dedup();
    let tag = match tag {
        Some(tag) => tag,
        None if names.len() <= 1 => return Ok(listed),
        None => "latest",
    };
    let is_named = |descriptor: &Descriptor| {
        // Some write the whole name, as in `docker.io/library/debian:bookworm`.
        name(descriptor).is_some_and(|name| name == tag || name.ends_with(&format!(":{tag}")))
    };
    let found: Vec<_> = listed.into_iter().filter(is_named).collect();
    if !found.is_empty() {
        return Ok(found);
    }
    names.truncate(20);
    Err(if names.is_empty() { "no tag".to_owned() } else { names.join(", ") })
}

fn blob(
    images: &Images,
    image: &str,
    folder: &Path,
    descriptor: &Descriptor,
    bound: u64,
) -> Result<Vec<u8>, ImageError> {
    let path = blob_path(folder, &descriptor.digest);
    let bytes = images.read(&path, bound).map_err(|error| images.error(image, &path, error))?;
    let found = Digest::of(&bytes);
    if found == descriptor.digest {
        return Ok(bytes);
    }
    let what = format!("a file of `{image}`");
    let place = images.folder.join(path).display().to_string();
    Err(ImageError::WrongDigest { what, place, expected: descriptor.digest.clone(), found })
}

fn blob_path(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join("blobs/sha256").join(digest.hex())
}
