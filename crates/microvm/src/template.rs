//! Keeps machines that were saved when they had come up, for others to go on from.
//!
//! ```text
//! GENERATION-KEY.template/snapshot    what the monitor has saved
//! ```
//!
//! A generation is what no template outlives: a monitor, a kernel, a processor. Who makes and who looks for a template never waits
//! for another: it costs less to boot. What is found is believed to be whole; whether a machine can go on from it is the
//! monitor's to say.

use std::io;
use std::path::{Path, PathBuf};

use sealci_image::Digest;

pub use crate::shelf::Collected;
use crate::shelf::{Kept, Shelf};

/// In the template's folder.
const SNAPSHOT: &str = "snapshot";
/// Of a digest's hexadecimal digits: enough to tell one agent's generations apart.
const GENERATION_DIGITS: usize = 16;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("cannot keep templates of machines in {}", folder.display())]
    Storage {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no machine was saved")]
    Unsaved(#[source] io::Error),
}

/// A machine that was saved. It stays there while this lives.
#[derive(Debug)]
pub struct Template {
    kept: Kept,
}

impl Template {
    /// What the monitor restores.
    pub fn snapshot(&self) -> PathBuf {
        self.kept.path().join(SNAPSHOT)
    }
}

/// Templates of one generation in one folder, which several processes may have open.
#[derive(Debug, Clone)]
pub struct TemplateStore {
    shelf: Shelf,
    generation: String,
}

impl TemplateStore {
    /// Opens a folder, which is made if need be, and removes what died with its process, and what is of other generations.
    pub fn open(folder: &Path, generation: &Digest) -> Result<Self, TemplateError> {
        let generation = generation.hex()[..GENERATION_DIGITS].to_owned();
        let open = || {
            let shelf = Shelf::open(folder, "template")?;
            shelf.retain(|name| name.split_once('-').is_some_and(|(of, _)| of == generation))?;
            Ok(shelf)
        };
        let shelf = open().map_err(|source| TemplateError::Storage { folder: folder.to_owned(), source })?;
        Ok(Self { shelf, generation })
    }

    /// The template of this key, if there is one.
    pub fn find(&self, key: &Digest) -> Result<Option<Template>, TemplateError> {
        let kept = self.shelf.find(&self.name(key)).map_err(|source| self.storage(source))?;
        Ok(kept.map(|kept| Template { kept }))
    }

    /// Has `save` write a snapshot to a path, in a folder in which it may leave nothing else; none where another process is at it.
    /// Blocks.
    pub fn make(
        &self,
        key: &Digest,
        save: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<Option<Template>, TemplateError> {
        let make = |folder: &Path| save(&folder.join(SNAPSHOT)).map_err(TemplateError::Unsaved);
        let kept = self.shelf.make_folder(&self.name(key), make, |source| self.storage(source))?;
        Ok(kept.map(|kept| Template { kept }))
    }

    /// Removes one that no machine goes on from.
    pub fn discard(&self, template: &Template) -> Result<(), TemplateError> {
        self.shelf.discard(&template.kept).map_err(|source| self.storage(source))
    }

    /// Removes those that were used longest ago until no more than `budget_bytes` are taken; what is in use stays.
    pub fn collect(&self, budget_bytes: u64) -> Result<Collected, TemplateError> {
        self.shelf.collect(budget_bytes).map_err(|source| self.storage(source))
    }

    fn name(&self, key: &Digest) -> String {
        format!("{}-{}", self.generation, key.hex())
    }

    fn storage(&self, source: io::Error) -> TemplateError {
        TemplateError::Storage { folder: self.shelf.folder().to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn each_key_has_its_own_and_other_generations_go() {
        let place = tempfile::tempdir().unwrap();
        let generations = ["a monitor", "another"].map(|text| Digest::of(text.as_bytes()));
        let keys = ["small", "large"].map(|text| Digest::of(text.as_bytes()));
        let store = TemplateStore::open(place.path(), &generations[0]).unwrap();
        let save = |text: &'static str| move |path: &Path| fs::write(path, text);
        let refused = store.make(&keys[0], |_| Err(io::Error::other("it did not come up"))).unwrap_err();
        assert!(matches!(refused, TemplateError::Unsaved(_)), "{refused}");
        assert!(store.find(&keys[0]).unwrap().is_none());
        let small = store.make(&keys[0], save("small")).unwrap().unwrap();
        store.make(&keys[1], save("large")).unwrap().unwrap();
        assert!(store.make(&keys[0], |_| panic!("it is there")).unwrap().is_none());
        let found = store.find(&keys[1]).unwrap().unwrap();
        assert_eq!(fs::read_to_string(found.snapshot()).unwrap(), "large");

        // Another agent on the same folder has the same ones, one of another monitor none, and takes those that are not used.
        let same = TemplateStore::open(place.path(), &generations[0]).unwrap();
        assert!(same.find(&keys[0]).unwrap().is_some());
        drop(found);
        let other = TemplateStore::open(place.path(), &generations[1]).unwrap();
        assert!(other.find(&keys[0]).unwrap().is_none());
        assert!(small.snapshot().exists() && store.find(&keys[1]).unwrap().is_none());

        store.discard(&small).unwrap();
        assert!(store.find(&keys[0]).unwrap().is_none());
    }
}
