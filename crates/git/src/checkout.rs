//! Reads a mirror: writes a revision's exact tree into a folder, reads one file, lists a folder.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sealci_core::event::{RefName, Revision};

use crate::mirror::{Mirror, MirrorError};
use crate::process::{Bounds, RunError};
use crate::remote::Remote;

/// Why a revision's tree could not be written.
#[derive(Debug, thiserror::Error)]
pub enum CheckoutError {
    /// To be fetched first.
    #[error("the mirror has no commit {revision}")]
    Absent { revision: Revision },
    #[error("commit {revision} holds a path that would leave the workspace or change git itself: {message}")]
    Refused { revision: Revision, message: String },
    #[error("the folder {} is not empty", path.display())]
    NotEmpty { path: PathBuf },
    #[error("cannot use the folder {}", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot check out commit {revision}")]
    Git { revision: Revision, source: RunError },
    #[error("cannot fetch commit {revision}")]
    Fetch { revision: Revision, source: Arc<MirrorError> },
}

/// Why a mirror could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// To be fetched first.
    #[error("the mirror has no commit {revision}")]
    AbsentRevision { revision: Revision },
    #[error("there is no file `{path}` in commit {}", revision.short())]
    NoFile { path: String, revision: Revision },
    #[error("`{path}` is larger than {max_bytes} bytes")]
    TooLarge { path: String, max_bytes: usize },
    #[error(
        "`{path}` is no path inside a repository: it may not be empty, begin with `/` or hold `.`, `..` or control characters"
    )]
    InvalidPath { path: String },
    #[error("cannot read `{path}` from the mirror")]
    Git { path: String, source: RunError },
    #[error("git's answer about `{path}` makes no sense")]
    Answer { path: String },
}

/// What a folder of a revision holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeEntry {
    /// The path from the repository's root.
    pub path: String,
    pub kind: EntryKind,
    /// Of a file or a link's target.
    pub size_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    File,
    Executable,
    Symlink,
    Folder,
    Submodule,
}

impl Mirror {
    /// Writes the revision's tree into the empty folder `into`, fetching it first when the mirror lacks it, and making
    /// the mirror anew when it turns out broken. In the warm case this is one git process.
    pub async fn materialize(
        &self,
        remote: &Remote,
        revision: &Revision,
        r#ref: Option<&RefName>,
        into: &Path,
    ) -> Result<(), CheckoutError> {
        let fetch = async || {
            let fetched = self.ensure(remote, revision, r#ref).await;
            fetched.map_err(|source| CheckoutError::Fetch { revision: revision.clone(), source })
        };
        let broken = |error: &CheckoutError| {
            matches!(
                error,
                CheckoutError::Absent { .. } | CheckoutError::Git { source: RunError::Failed { .. }, .. }
            )
        };
        let mut last = self.checkout(revision, into).await;
        if matches!(last, Err(CheckoutError::Absent { .. })) {
            fetch().await?;
            last = self.checkout(revision, into).await;
        }
        let Err(error) = last else { return Ok(()) };
        if !broken(&error) {
            return Err(error);
        }
        tracing::warn!(repository.identity = %remote.url.identity(), %error, "the mirror is broken, making it anew");
        empty(into).await?;
        self.discard().await.map_err(|source| CheckoutError::Fetch {
            revision: revision.clone(),
            source: Arc::new(source),
        })?;
        fetch().await?;
        self.checkout(revision, into).await
    }

    /// Writes the revision's tree into the empty folder `into`: its files, modes and symbolic links as git itself would
    /// check them out with no configuration. No hook or filter runs, submodules stay empty folders, and no `.git` is
    /// left behind. After an error the folder may be partly filled.
    pub async fn checkout(&self, revision: &Revision, into: &Path) -> Result<(), CheckoutError> {
        let folder = |source| CheckoutError::Folder { path: into.to_owned(), source };
        if std::fs::read_dir(into).map_err(folder)?.next().is_some() {
            return Err(CheckoutError::NotEmpty { path: into.to_owned() });
        }
        let _reading = self.reading().await;
        if !self.exists() {
            return Err(CheckoutError::Absent { revision: revision.clone() });
        }
        let into = std::path::absolute(into).map_err(folder)?;
        let scratch = tempfile::tempdir_in(self.scratch()).map_err(folder)?;
        let call =
            self.call().env("GIT_WORK_TREE", &into).env("GIT_INDEX_FILE", scratch.path().join("index"));
        let call = call.args(["read-tree", "-u", "--reset", revision.as_str()]);
        let limits = self.git().limits();
        let bounds = Bounds {
            timeout: limits.checkout_timeout,
            max_output_bytes: 1 << 20,
            growth: Some((into, limits.max_workspace_bytes)),
        };
        let revision = revision.clone();
        call.run(b"", &bounds).await.map(drop).map_err(|source| {
            let said = source.message();
            if said.contains("failed to unpack tree object") || said.contains("Not a valid object name") {
                CheckoutError::Absent { revision }
            } else if said.contains("invalid path") {
                let message = said.lines().find(|line| line.contains("invalid path")).unwrap_or(said);
                CheckoutError::Refused { revision, message: message.chars().take(300).collect() }
            } else {
                CheckoutError::Git { revision, source }
            }
        })
    }

    /// Reads one file of a revision.
    pub async fn read_file(
        &self,
        revision: &Revision,
        path: &str,
        max_bytes: usize,
    ) -> Result<Vec<u8>, ReadError> {
        check_path(path)?;
        let absent = || ReadError::AbsentRevision { revision: revision.clone() };
        let no_file = || ReadError::NoFile { path: path.to_owned(), revision: revision.clone() };
        let too_large = || ReadError::TooLarge { path: path.to_owned(), max_bytes };
        let answer = || ReadError::Answer { path: path.to_owned() };
        let reading = self.reading().await;
        if !self.exists() {
            return Err(absent());
        }
        let call = self.call().args(["cat-file", "--batch"]);
        let bounds = call.query_bounds(max_bytes.saturating_add(64 << 10));
        let question = format!("{revision}:{path}\n");
        let answered = match call.run(question.as_bytes(), &bounds).await {
            Ok(answered) => answered,
            Err(RunError::TooMuchOutput { .. }) => return Err(too_large()),
            Err(source) => return Err(ReadError::Git { path: path.to_owned(), source }),
        };
        // `<id> <type> <size>`, then the bytes; or `<question> missing`.
        let end_of_header = answered.iter().position(|byte| *byte == b'\n').ok_or_else(answer)?;
        let header = std::str::from_utf8(&answered[..end_of_header]).map_err(|_| answer())?;
        if header.ends_with(" missing") || header.ends_with(" ambiguous") {
            drop(reading);
            return Err(if self.has(revision).await { no_file() } else { absent() });
        }
        let mut words = header.rsplitn(3, ' ');
        let size: usize = words.next().and_then(|size| size.parse().ok()).ok_or_else(answer)?;
        if words.next() != Some("blob") {
            return Err(no_file());
        }
        if size > max_bytes {
            return Err(too_large());
        }
        let start = end_of_header + 1;
        answered.get(start..start + size).map(<[u8]>::to_vec).ok_or_else(answer)
    }

    /// Lists a folder of a revision (`""` is its root), not what lies below. A folder that is not there is empty.
    pub async fn list(&self, revision: &Revision, folder: &str) -> Result<Vec<TreeEntry>, ReadError> {
        /// Enough for some 100,000 entries.
        const MAX_LISTING_BYTES: usize = 16 << 20;
        let folder = folder.trim_end_matches('/');
        if !folder.is_empty() {
            check_path(folder)?;
        }
        let _reading = self.reading().await;
        if !self.exists() {
            return Err(ReadError::AbsentRevision { revision: revision.clone() });
        }
        let mut call = self.call().args(["ls-tree", "-z", "-l", "--full-tree", revision.as_str()]);
        if !folder.is_empty() {
            call = call.arg("--").arg(format!("{folder}/"));
        }
        let bounds = call.query_bounds(MAX_LISTING_BYTES);
        let listing = match call.run(b"", &bounds).await {
            Ok(listing) => listing,
            Err(source)
                if source.message().contains("ot a valid object")
                    || source.message().contains("not a tree") =>
            {
                return Err(ReadError::AbsentRevision { revision: revision.clone() });
            }
            Err(source) => return Err(ReadError::Git { path: folder.to_owned(), source }),
        };
        Ok(listing.split(|byte| *byte == 0).filter_map(parse_entry).collect())
    }
}

/// Reads `<mode> <type> <id> <size>TAB<path>`; a path that is not UTF-8 is left out.
fn parse_entry(line: &[u8]) -> Option<TreeEntry> {
    let (facts, path) = std::str::from_utf8(line).ok()?.split_once('\t')?;
    let mut facts = facts.split_ascii_whitespace();
    let kind = match facts.next()? {
        "100644" | "100664" => EntryKind::File,
        "100755" => EntryKind::Executable,
        "120000" => EntryKind::Symlink,
        "040000" => EntryKind::Folder,
        "160000" => EntryKind::Submodule,
        _ => return None,
    };
    Some(TreeEntry { path: path.to_owned(), kind, size_bytes: facts.nth(2)?.parse().ok() })
}

fn check_path(path: &str) -> Result<(), ReadError> {
    let bad_part = |part: &str| part.is_empty() || part == "." || part == "..";
    if path.len() > 4096 || path.chars().any(char::is_control) || path.split('/').any(bad_part) {
        let path = path.chars().take(200).flat_map(char::escape_default).collect();
        return Err(ReadError::InvalidPath { path });
    }
    Ok(())
}

/// Removes what a failed checkout has written.
async fn empty(folder: &Path) -> Result<(), CheckoutError> {
    let owned = folder.to_owned();
    let emptying = tokio::task::spawn_blocking(move || {
        for entry in std::fs::read_dir(&owned)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                std::fs::remove_dir_all(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    });
    let emptied = emptying.await.unwrap_or_else(|stopped| Err(io::Error::other(stopped)));
    emptied.map_err(|source| CheckoutError::Folder { path: folder.to_owned(), source })
}
