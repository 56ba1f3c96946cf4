//! Gives a run a folder to work in, with something beside it that nobody may touch.
//!
//! ```text
//!   <place>/inside       what is fuzzed works here
//!   <place>/outside/…    stays as it is, whatever the bytes say
//! ```

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// The folder of one run. It goes with this value.
pub struct Place {
    folder: tempfile::TempDir,
    before: Vec<(PathBuf, u32, u64, i64, u64)>,
}

impl Place {
    pub fn new() -> Self {
        // In memory where that is offered: a run takes a fraction of a millisecond.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let folder = tempfile::Builder::new().prefix("sealci-fuzz-").tempdir_in(parent).expect("a folder");
        fs::create_dir(folder.path().join("inside")).expect("a folder");
        fs::create_dir_all(folder.path().join("outside/a")).expect("a folder");
        fs::write(folder.path().join("outside/a/b"), b"as it was").expect("a file");
        fs::write(folder.path().join("outside/b"), b"as it was").expect("a file");
        let before = seen(&folder.path().join("outside"));
        Self { folder, before }
    }

    pub fn inside(&self) -> PathBuf {
        self.folder.path().join("inside")
    }

    /// Panics if anything beside the folder is other than it was.
    pub fn check(&self) {
        assert_eq!(seen(&self.folder.path().join("outside")), self.before, "something outside was changed");
        let mut names: Vec<_> = fs::read_dir(self.folder.path())
            .expect("the folder")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["inside", "outside"]);
        assert!(fs::symlink_metadata(self.inside()).expect("the folder").is_dir());
    }
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        open_up(self.folder.path());
    }
}

/// What is there: path, mode, size, time of change, number of links.
fn seen(folder: &Path) -> Vec<(PathBuf, u32, u64, i64, u64)> {
    let mut all = Vec::new();
    let mut left = vec![folder.to_owned()];
    while let Some(path) = left.pop() {
        let found = fs::symlink_metadata(&path).expect("what stood here");
        if found.is_dir() {
            left.extend(fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
        }
        let size = if found.is_dir() { 0 } else { found.size() };
        all.push((
            path,
            found.mode(),
            size,
            found.mtime() * 1_000_000_000 + found.mtime_nsec(),
            found.nlink(),
        ));
    }
    all.sort();
    all
}

/// Lets everything below be removed.
fn open_up(folder: &Path) {
    let _ = fs::set_permissions(folder, fs::Permissions::from_mode(0o700));
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// Gives up root's rights: what is looked for is an unpacking that writes where it should not. For a target's beginning, before
/// anything else runs.
pub fn become_nobody() {
    use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
    const NOBODY: u32 = 65_534;
    if Uid::effective().is_root() {
        setgroups(&[])
            .and_then(|()| setgid(Gid::from_raw(NOBODY)))
            .and_then(|()| setuid(Uid::from_raw(NOBODY)))
            .expect("root can be given up");
    }
}
