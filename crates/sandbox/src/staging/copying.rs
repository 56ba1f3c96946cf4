//! Makes one tree of an image's layers by copying them, where they cannot be stacked.
//!
//! Slower by far than an overlay, and as large as the image; seen from inside it is the same, but for extended attributes,
//! which are not copied. Invariant: the tree is written below its own folder only. Nobody else writes there, so a
//! component that is known to be a folder and no link stays one; nothing else is ever written through.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps};

use super::stack::OPAQUE;
use super::tree::Tree;
use super::{Doing, StagingError, User, image, make_folder};
use crate::spec::{IDS_PER_SANDBOX, ImageRoot, SandboxSpec};

/// The owner of what a container has no id for (`/proc/sys/kernel/overflowuid`).
const NOBODY: u32 = 65534;

/// Copies the layers of the spec's image to where the stage looks for them; tells whom the image runs as.
pub fn copy_image(spec: &SandboxSpec, image: &ImageRoot) -> Result<User, StagingError> {
    let root = image::copied_folder(spec);
    make_folder(&root)?;
    // Where mounts map owners, the files keep the layers' own.
    let id_base = (!spec.rootless && !spec.maps_owners).then_some(spec.id_base);
    for layer in &image.layers {
        let mut copy = Copy { id_base, keeps_owners: !spec.rootless, links: HashMap::new() };
        copy.folder(layer, &root)?;
    }
    if image.layers.is_empty()
        && let Some(id) = id_base
    {
        lchown(&root, Some(id), Some(id)).doing("change the owner of", &root)?;
    }
    let tree = Tree::open(&root).doing("open", &root)?;
    Ok(User::find(&tree, &image.user)?)
}

/// Puts one layer on what is there.
struct Copy {
    /// Added to every id.
    id_base: Option<u32>,
    keeps_owners: bool,
    /// Files of several names: the layer's inode, and the first copy.
    links: HashMap<u64, PathBuf>,
}

impl Copy {
    /// Both folders exist.
    fn folder(&mut self, from: &Path, to: &Path) -> Result<(), StagingError> {
        if is_opaque(from) {
            empty(to).doing("empty", to)?;
        }
        for entry in fs::read_dir(from).doing("read", from)? {
            let entry = entry.doing("read", from)?;
            let (from, to) = (entry.path(), to.join(entry.file_name()));
            self.entry(&from, &to)?;
        }
        // Last: what is put in changes its time, and it may be closed to its own owner.
        let metadata = fs::metadata(from).doing("look at", from)?;
        self.dress(&metadata, to).doing("set the attributes of", to)
    }

    fn entry(&mut self, from: &Path, to: &Path) -> Result<(), StagingError> {
        let metadata = fs::symlink_metadata(from).doing("look at", from)?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            if !fs::symlink_metadata(to).is_ok_and(|there| there.is_dir()) {
                remove(to).doing("remove", to)?;
                make_folder(to)?;
            }
            return self.folder(from, to);
        }
        remove(to).doing("remove", to)?;
        if metadata.nlink() > 1
            && let Some(first) = self.links.get(&metadata.ino())
        {
            return fs::hard_link(first, to).doing("link", to);
        }
        if kind.is_file() {
            fs::copy(from, to).doing("copy", from)?;
        } else if kind.is_symlink() {
            let target = fs::read_link(from).doing("read the link", from)?;
            symlink(target, to).doing("make the link", to)?;
        } else if kind.is_fifo() {
            rustix::fs::mknodat(CWD, to, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                .map_err(io::Error::from)
                .doing("make the pipe", to)?;
        } else {
            // A whiteout has done its work, and devices are nothing to an action.
            return Ok(());
        }
        if metadata.nlink() > 1 {
            self.links.insert(metadata.ino(), to.to_owned());
        }
        self.dress(&metadata, to).doing("set the attributes of", to)
    }

    fn dress(&self, metadata: &fs::Metadata, to: &Path) -> io::Result<()> {
        if self.keeps_owners {
            let mapped = |id: u32| match self.id_base {
                Some(base) => base + if id < IDS_PER_SANDBOX { id } else { NOBODY },
                None => id,
            };
            lchown(to, Some(mapped(metadata.uid())), Some(mapped(metadata.gid())))?;
        }
        if !metadata.is_symlink() {
            // After the owner, whose change takes bits away.
            fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
        }
        let time = |seconds, nanoseconds| Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps {
            last_access: time(metadata.atime(), metadata.atime_nsec()),
            last_modification: time(metadata.mtime(), metadata.mtime_nsec()),
        };
        Ok(rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

fn is_opaque(folder: &Path) -> bool {
    let mut value = [0; 1];
    matches!(rustix::fs::lgetxattr(folder, OsStr::new(OPAQUE), &mut value), Ok(1) if value == *b"y")
}

fn empty(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        remove(&entry?.path())?;
    }
    Ok(())
}

/// Removes whatever is there, following no link.
fn remove(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
