//! Archives that `docker save` makes: a tar file with `manifest.json`, configurations and layers.

use std::collections::HashMap;
use std::io::{BufReader, Read};
use std::path::{Component, Path};
use std::sync::Arc;

use serde::Deserialize;

use super::{Images, LocalImage, Section};
use crate::digest::Digest;
use crate::error::ImageError;
use crate::manifest::{self, CONFIG_BYTES, MANIFEST_BYTES};
use crate::unpack::{ArchiveEntry, UnpackError, walk};

/// More than any has.
const MOST_FILES: usize = 20_000;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    layers: Vec<String>,
}

/// Where the archive's files lie in it.
#[derive(Default)]
struct Contents {
    files: HashMap<Vec<u8>, (u64, u64)>,
    /// Older Dockers link a layer that is there twice.
    links: HashMap<Vec<u8>, Vec<u8>>,
}

pub(crate) fn resolve(images: &Images, image: &str, path: &Path) -> Result<LocalImage, ImageError> {
    let malformed = |reason: String| ImageError::Malformed { image: image.to_owned(), reason };
    let contents = contents(images, image, path)?;
    let read = |name: &str, bound: u64| -> Result<Vec<u8>, ImageError> {
        let (offset, bytes) = contents
            .find(name)
            .ok_or_else(|| malformed(format!("the archive has no `{}`", name.escape_debug())))?;
        if bytes > bound {
            return Err(malformed(format!("its `{}` is too large", name.escape_debug())));
        }
        let section = Section { path: path.to_owned(), offset, bytes, digest: None };
        let mut read = Vec::new();
        let result = images.section(&section).and_then(|mut section| section.read_to_end(&mut read));
        result.map_err(|error| images.error(image, path, error))?;
        Ok(read)
    };
    let saved = read("manifest.json", MANIFEST_BYTES)?;
    let saved: Vec<Saved> = serde_json::from_slice(&saved)
        .map_err(|error| malformed(format!("its manifest.json is not one ({error})")))?;
    let [saved] = &saved[..] else {
        return Err(malformed(format!("the archive holds {} images; save one alone", saved.len())));
    };
    let configuration_bytes = read(&saved.config, CONFIG_BYTES)?;
    let configuration = manifest::configuration(&configuration_bytes).map_err(malformed)?;
    let layers = saved.layers.iter().map(|name| {
        let found = contents.find(name);
        let (offset, bytes) =
            found.ok_or_else(|| malformed(format!("the archive has no `{}`", name.escape_debug())))?;
        Ok(Section { path: path.to_owned(), offset, bytes, digest: None })
    });
    let layers = layers.collect::<Result<_, ImageError>>()?;
    Ok(LocalImage { digest: Digest::of(&configuration_bytes), configuration, layers })
}

fn contents(images: &Images, image: &str, path: &Path) -> Result<Contents, ImageError> {
    let file = images.open(path).map_err(|error| images.error(image, path, error))?;
    let mut contents = Contents::default();
    let mut count = 0;
    let walked = walk(BufReader::with_capacity(64 << 10, file), |entry| {
        count += 1;
        if count > MOST_FILES {
            return Err(UnpackError::TooLarge {
                what: "the archive has too many files",
                bound: MOST_FILES as u64,
            });
        }
        match entry {
            ArchiveEntry::File { path, offset, bytes } => {
                contents.files.insert(path.to_vec(), (offset, bytes));
            }
            ArchiveEntry::Symlink { path, target } => {
                contents.links.insert(path.to_vec(), target.to_vec());
            }
        }
        Ok(())
    });
    match walked {
        Ok(()) => Ok(contents),
        Err(UnpackError::Read(source)) => {
            Err(ImageError::Storage { path: images.folder.join(path), source: Arc::clone(&source) })
        }
        Err(error) => {
            Err(ImageError::Malformed { image: image.to_owned(), reason: format!("{error} (is it packed?)") })
        }
    }
}

impl Contents {
    fn find(&self, name: &str) -> Option<(u64, u64)> {
        if let Some(place) = self.files.get(name.as_bytes()) {
            return Some(*place);
        }
        let target = self.links.get(name.as_bytes())?;
        let target = Path::new(std::str::from_utf8(target).ok()?);
        let mut path = Path::new(name).parent()?.to_owned();
        for component in target.components() {
            match component {
                Component::Normal(part) => path.push(part),
                Component::ParentDir if path.pop() => {}
                Component::CurDir => {}
                _ => return None,
            }
        }
        self.files.get(path.as_os_str().as_encoded_bytes()).copied()
    }
}
