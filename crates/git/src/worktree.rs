//! Copies a person's working tree as it is, uncommitted changes included.
//!
//! Unlike everything else here this reads the user's own git configuration (their global ignore file, their safe
//! directories): it is their repository, on their machine. What could run a program stays switched off.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use sealci_core::event::{RefName, Revision};

use crate::command::{Call, Git};
use crate::process::RunError;

/// What a copied working tree was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorktreeSnapshot {
    /// The commit it is based on; none outside git, or before the first commit.
    pub head: Option<Revision>,
    /// The branch it is on; none outside git, or when detached.
    pub r#ref: Option<RefName>,
    pub files: usize,
}

/// Why a working tree could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("cannot copy {}", path.display())]
    Copy { path: PathBuf, source: io::Error },
    #[error("cannot list the files of the working tree {}", path.display())]
    List { path: PathBuf, source: RunError },
}

impl Git {
    /// Copies what `git add --all` would see of the folder (tracked and untracked files, not the ignored ones), or, if
    /// it is in no git repository, everything in it. Only the folder itself is copied, also when it lies inside a larger
    /// repository. `into` must not lie inside the folder.
    pub async fn snapshot_worktree(
        &self,
        folder: &Path,
        into: &Path,
    ) -> Result<WorktreeSnapshot, SnapshotError> {
        /// Room for about a million paths.
        const MAX_LISTING_BYTES: usize = 128 << 20;
        let listing =
            self.in_worktree(folder).args(["ls-files", "-z", "-co", "--exclude-standard", "--deduplicate"]);
        let bounds = listing.query_bounds(MAX_LISTING_BYTES);
        let (place, listing) = tokio::join!(self.place(folder), listing.run(b"", &bounds));
        let (paths, mut snapshot) = match place {
            Some(snapshot) => {
                let listing =
                    listing.map_err(|source| SnapshotError::List { path: folder.to_owned(), source })?;
                (Some(listing), snapshot)
            }
            None => (None, WorktreeSnapshot::default()),
        };
        let (folder, into) = (folder.to_owned(), into.to_owned());
        let copying = tokio::task::spawn_blocking(move || match paths {
            Some(listing) => copy_listed(&folder, &into, &listing),
            None => copy_folder(&folder, &into),
        });
        snapshot.files = copying.await.unwrap_or_else(|stopped| {
            Err(SnapshotError::Copy { path: PathBuf::new(), source: io::Error::other(stopped) })
        })?;
        Ok(snapshot)
    }

    fn in_worktree(&self, folder: &Path) -> Call<'_> {
        let mut call = self.local().without_env("GIT_CONFIG_GLOBAL").without_env("GIT_CONFIG_NOSYSTEM");
        call = call.without_env("XDG_CONFIG_HOME").without_env("HOME").without_setting("core.excludesFile");
        for name in ["HOME", "XDG_CONFIG_HOME", "GIT_CONFIG_GLOBAL"] {
            if let Some(value) = std::env::var_os(name) {
                call = call.env(name, value);
            }
        }
        call.args([OsStr::new("-C"), folder.as_os_str()])
    }

    /// Where a folder stands in its repository; none where it is in no working tree.
    async fn place(&self, folder: &Path) -> Option<WorktreeSnapshot> {
        const HEAD: [&str; 3] = ["HEAD^{commit}", "--symbolic-full-name", "HEAD"];
        let inside = ["rev-parse", "--is-inside-work-tree"];
        let mut snapshot = WorktreeSnapshot::default();
        // Usually one process tells all: yes, the commit, and the branch, or `HEAD` where there is none.
        if let Some(answer) = self.ask(folder, &[&inside[..], &HEAD].concat()).await {
            let mut lines = answer.lines();
            if lines.next() != Some("true") {
                return None;
            }
            snapshot.head = lines.next().and_then(|head| head.parse().ok());
            snapshot.r#ref = lines.next().filter(|name| *name != "HEAD").and_then(|name| name.parse().ok());
            return Some(snapshot);
        }
        // Before the first commit there is no HEAD to be shown.
        if self.ask(folder, &inside).await.as_deref() != Some("true") {
            return None;
        }
        let branch = self.ask(folder, &["symbolic-ref", "--quiet", "HEAD"]).await;
        snapshot.r#ref = branch.and_then(|branch| branch.parse().ok());
        Some(snapshot)
    }

    /// What git says about a working tree; none where it fails.
    async fn ask(&self, folder: &Path, question: &[&str]) -> Option<String> {
        let call = self.in_worktree(folder).args(question);
        let bounds = call.query_bounds(1 << 12);
        let answer = call.run(b"", &bounds).await.ok()?;
        Some(String::from_utf8(answer).ok()?.trim().to_owned())
    }
}

/// Copies the listed paths. A path that is listed but gone was deleted and not yet committed; a folder is a submodule or
/// a repository inside this one, and is copied whole but for its `.git`.
fn copy_listed(folder: &Path, into: &Path, listing: &[u8]) -> Result<usize, SnapshotError> {
    let mut files = 0;
    let mut last_parent: Option<(PathBuf, bool)> = None;
    for path in listing.split(|byte| *byte == 0).filter(|path| !path.is_empty()) {
        let relative = Path::new(OsStr::from_bytes(path));
        let parent = relative.parent().unwrap_or(Path::new(""));
        let present = match &last_parent {
            Some((last, present)) if last == parent => *present,
            _ => {
                let present = is_folder_within(folder, parent);
                if present {
                    let made = fs::create_dir_all(into.join(parent));
                    made.map_err(|source| SnapshotError::Copy { path: into.join(parent), source })?;
                }
                last_parent = Some((parent.to_owned(), present));
                present
            }
        };
        if !present {
            continue;
        }
        let (from, to) = (folder.join(relative), into.join(relative));
        files += match copy_entry(&from, &to) {
            Ok(Copied::File) => 1,
            Ok(Copied::Nothing) => 0,
            Ok(Copied::Folder) => copy_folder(&from, &to)?,
            Err(source) if is_gone(&source) => 0,
            Err(source) => return Err(SnapshotError::Copy { path: from, source }),
        };
    }
    Ok(files)
}

/// Tells whether the path leads to a folder through folders only. Where a listed file's folder has become a link, the
/// file is gone, and what the link leads to is not ours to read, nor to write over.
fn is_folder_within(folder: &Path, relative: &Path) -> bool {
    let mut path = folder.to_owned();
    relative.components().all(|part| {
        path.push(part);
        fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir())
    })
}

/// Copies a folder and all below it, without any `.git`; gives the number of files. Nothing is shared with the original
/// but, where the file system can do that, blocks that are copied when they are written. Blocks.
pub fn copy_folder(folder: &Path, into: &Path) -> Result<usize, SnapshotError> {
    let fail = |path: &Path, source| SnapshotError::Copy { path: path.to_owned(), source };
    let mut files = 0;
    let mut folders = vec![(folder.to_owned(), into.to_owned())];
    while let Some((from, to)) = folders.pop() {
        fs::create_dir_all(&to).map_err(|source| fail(&to, source))?;
        for entry in fs::read_dir(&from).map_err(|source| fail(&from, source))? {
            let name = entry.map_err(|source| fail(&from, source))?.file_name();
            if name == ".git" {
                continue;
            }
            let (from, to) = (from.join(&name), to.join(&name));
            match copy_entry(&from, &to) {
                Ok(Copied::File) => files += 1,
                Ok(Copied::Nothing) => {}
                Ok(Copied::Folder) => folders.push((from, to)),
                Err(source) if is_gone(&source) => {}
                Err(source) => return Err(fail(&from, source)),
            }
        }
    }
    Ok(files)
}

enum Copied {
    File,
    /// To be gone into.
    Folder,
    /// A socket, pipe or device: nothing a repository could hold.
    Nothing,
}

/// Copies a file with its mode and time of change (build tools compare those), or a symbolic link as it stands.
fn copy_entry(from: &Path, to: &Path) -> io::Result<Copied> {
    let metadata = fs::symlink_metadata(from)?;
    if metadata.is_symlink() {
        symlink(fs::read_link(from)?, to)?;
    } else if metadata.is_dir() {
        return Ok(Copied::Folder);
    } else if metadata.is_file() {
        fs::copy(from, to)?;
        let times = fs::FileTimes::new().set_modified(metadata.modified()?);
        match fs::File::open(to).and_then(|file| file.set_times(times)) {
            // A file its owner cannot read was still copied; its time does not matter then.
            Err(error) if error.kind() != io::ErrorKind::PermissionDenied => return Err(error),
            _ => {}
        }
    } else {
        return Ok(Copied::Nothing);
    }
    Ok(Copied::File)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
