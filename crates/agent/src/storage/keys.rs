//! Fills in the keys of caches: from the event, and from the repository's files as they stand in the fresh workspace.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use sealci_core::template::{EventValue, Template, Values};
use sha2::{Digest, Sha256};

/// Files that one `hash(…)` takes in.
const MAX_FILES: usize = 100_000;
/// Folders within one another.
const MAX_DEPTH: usize = 128;
/// A key; what is put in front of it when it is stored fits in the 1,024 that the storage takes.
const MAX_KEY_BYTES: usize = 1000;
/// Hexadecimal digits of a hash: 128 bits of a SHA-256.
const HASH_DIGITS: usize = 32;

/// Why a key cannot be filled in.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read {path} for a cache's key")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "more than {MAX_FILES} files, or more than {MAX_DEPTH} folders within one another, match {patterns} in a cache's key; hash fewer"
    )]
    TooMany { patterns: String },
    #[error(
        "the cache's key {template} has more than {MAX_KEY_BYTES} bytes when it is filled in; shorten it"
    )]
    TooLong { template: String },
}

/// What keys are filled in from. The workspace must be as the checkout made it: nothing of the action has run yet.
#[derive(Debug, Clone)]
pub struct KeySource {
    pub workspace: PathBuf,
    /// Empty where there is none.
    pub r#ref: String,
    pub revision: String,
}

impl KeySource {
    /// The key, filled in. Blocks while files are read.
    pub fn fill_in(&self, template: &Template) -> Result<String, KeyError> {
        let key = template.expand(self)?;
        if key.len() > MAX_KEY_BYTES {
            return Err(KeyError::TooLong { template: template.to_string() });
        }
        Ok(key)
    }
}

impl Values for KeySource {
    type Error = KeyError;

    /// Of the files' paths and contents, in the order of the paths; of a link, of what it says. Where nothing matches it is the
    /// hash of nothing.
    fn hash(&self, patterns: &[String]) -> Result<String, KeyError> {
        let mut found = Vec::new();
        let mut walk = Walk { workspace: &self.workspace, patterns, found: &mut found };
        walk.enter(Path::new(""), 0)?;
        found.sort();
        let mut hash = Sha256::new();
        for path in found {
            let whole = self.workspace.join(&path);
            let content = digest_of(&whole).map_err(|source| KeyError::Read { path: whole, source })?;
            hash.update(path.as_os_str().as_bytes());
            hash.update([0]);
            hash.update(content);
        }
        let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(digits[..HASH_DIGITS].to_owned())
    }

    fn event(&self, value: EventValue) -> String {
        let short = |prefix| self.r#ref.strip_prefix(prefix).unwrap_or_default().to_owned();
        match value {
            EventValue::Ref => self.r#ref.clone(),
            EventValue::Branch => short("refs/heads/"),
            EventValue::Tag => short("refs/tags/"),
            EventValue::Revision => self.revision.clone(),
        }
    }
}

/// Looks for what matches, following no link.
struct Walk<'a> {
    workspace: &'a Path,
    patterns: &'a [String],
    found: &'a mut Vec<PathBuf>,
}

impl Walk<'_> {
    /// `folder` is relative to the workspace.
    fn enter(&mut self, folder: &Path, depth: usize) -> Result<(), KeyError> {
        let whole = self.workspace.join(folder);
        let unreadable = |source| KeyError::Read { path: whole.clone(), source };
        for entry in fs::read_dir(&whole).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let path = folder.join(entry.file_name());
            if path == Path::new(".git") || path == Path::new(".sealci/artifacts") {
                continue;
            }
            let kind = entry.file_type().map_err(unreadable)?;
            if kind.is_dir() {
                if self.may_match_below(&path) {
                    self.check(depth + 1 < MAX_DEPTH)?;
                    self.enter(&path, depth + 1)?;
                }
            } else if (kind.is_file() || kind.is_symlink()) && self.matches(&path) {
                self.check(self.found.len() < MAX_FILES)?;
                self.found.push(path);
            }
        }
        Ok(())
    }

    fn check(&self, is_within: bool) -> Result<(), KeyError> {
        let patterns = || self.patterns.join(", ");
        if is_within { Ok(()) } else { Err(KeyError::TooMany { patterns: patterns() }) }
    }

    fn matches(&self, path: &Path) -> bool {
        let path = path.as_os_str().as_bytes();
        self.patterns.iter().any(|pattern| fast_glob::glob_match(pattern.trim_start_matches("./"), path))
    }

    /// Whether a pattern begins, as far as it is plain text, as the folder does.
    fn may_match_below(&self, folder: &Path) -> bool {
        let folder = folder.as_os_str().as_bytes();
        self.patterns.iter().any(|pattern| {
            let pattern = pattern.trim_start_matches("./").as_bytes();
            let plain = pattern.iter().position(|byte| b"*?[{\\!".contains(byte)).unwrap_or(pattern.len());
            let common = plain.min(folder.len());
            pattern[..common] == folder[..common] && (plain < pattern.len() || plain > folder.len())
        })
    }
}

/// The SHA-256 of a file's bytes, or of where a link leads.
fn digest_of(path: &Path) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    if fs::symlink_metadata(path)?.is_symlink() {
        hash.update(b"link\0");
        hash.update(fs::read_link(path)?.as_os_str().as_bytes());
        return Ok(hash.finalize().into());
    }
    hash.update(b"file\0");
    let mut file = File::options().read(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(path)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&buffer[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn source() -> (tempfile::TempDir, KeySource) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in
            [("Cargo.lock", "a"), ("b/Cargo.lock", "b"), ("b/c/x.toml", "c"), (".git/Cargo.lock", "no")]
        {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let source = KeySource {
            workspace: folder.path().to_owned(),
            r#ref: "refs/heads/main".into(),
            revision: "abc".into(),
        };
        (folder, source)
    }

    fn key(source: &KeySource, template: &str) -> String {
        source.fill_in(&Template::parse(template).unwrap()).unwrap()
    }

    #[test]
    fn a_key_changes_with_what_it_hashes_and_with_nothing_else() {
        let (folder, source) = source();
        let hash = "x-${{ hash('**/Cargo.lock') }}";
        let first = key(&source, hash);
        assert_eq!(first.len(), 2 + HASH_DIGITS);
        assert_eq!(first, key(&source, "x-${{ hash('./**/Cargo.lock', 'nothing') }}"));
        fs::write(folder.path().join("b/c/x.toml"), "changed").unwrap();
        fs::write(folder.path().join(".git/Cargo.lock"), "changed").unwrap();
        assert_eq!(first, key(&source, hash));
        fs::write(folder.path().join("b/Cargo.lock"), "changed").unwrap();
        assert_ne!(first, key(&source, hash));
        fs::write(folder.path().join("b/Cargo.lock"), "b").unwrap();
        assert_eq!(first, key(&source, hash));
        fs::rename(folder.path().join("b"), folder.path().join("d")).unwrap();
        assert_ne!(first, key(&source, hash), "the path counts");
        let single = key(&source, "${{ hash('Cargo.lock') }}");
        assert_ne!(single, key(&source, "${{ hash('nothing') }}"));
        assert_eq!(single, key(&source, "${{ hash('{Cargo,Other}.lock') }}"));
    }

    #[test]
    fn links_are_not_followed() {
        let (folder, source) = source();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "1").unwrap();
        symlink(outside.path(), folder.path().join("out")).unwrap();
        symlink(outside.path().join("secret"), folder.path().join("link")).unwrap();
        let nothing = key(&source, "${{ hash('nothing') }}");
        assert_eq!(key(&source, "${{ hash('out/secret') }}"), nothing);
        let before = key(&source, "${{ hash('link') }}");
        assert_ne!(before, nothing);
        fs::write(outside.path().join("secret"), "2").unwrap();
        assert_eq!(key(&source, "${{ hash('link') }}"), before);
    }

    #[test]
    fn events_fill_in_and_bounds_hold() {
        let (_folder, mut source) = source();
        let all = "${{ event.ref }} ${{ event.branch }} ${{ event.tag }}${{ event.revision }}";
        assert_eq!(key(&source, all), "refs/heads/main main abc");
        source.r#ref = format!("refs/tags/{}", "v".repeat(1200));
        let template = Template::parse("${{ event.tag }}").unwrap();
        assert!(matches!(source.fill_in(&template), Err(KeyError::TooLong { .. })));
    }

    #[test]
    fn only_folders_that_may_hold_a_match_are_entered() {
        let patterns = ["a/b/*.x".to_owned(), "c/d".to_owned(), "**/e".to_owned()];
        let may = |patterns: &[String], folder: &str| {
            Walk { workspace: Path::new("/"), patterns, found: &mut Vec::new() }
                .may_match_below(Path::new(folder))
        };
        assert!(may(&patterns[..1], "a/b") && !may(&patterns[..1], "a/c") && !may(&patterns[..1], "b"));
        assert!(may(&patterns[1..2], "c") && !may(&patterns[1..2], "c/d"));
        assert!(may(&patterns[2..], "any/thing"));
    }
}
