//! Builds the tree that becomes `/` inside, in the helper's own mount namespace.
//!
//! ```text
//! /run/sealci/        a tmpfs of its own, over whatever the host keeps there
//!   root/             → /        of the host's programs (`host`):       of an image (`image`):
//!     usr             overlay: the host's /usr below,                   one overlay of all layers over
//!                     upper/usr on top                                  the whole root, its upper folder
//!     bin, lib, …     the host's symlinks, or overlays like /usr        in the scratch
//!     etc             copies of few files, some folders read-only,      names of its own
//!                     accounts of its own
//!     workspace       the action's tree, its owners mapped              the same
//!     root, tmp       folders of the scratch, their owners mapped       the image's own
//!     run/sealci      the init and its scratch                          the same
//!   lower/ upper/ work/                                                 init/
//! ```
//!
//! Without root the tree stands in the scratch, and nothing is mapped: what is lent is the user's own.
//!
//! With root, owners are mapped by the mounts (`MOUNT_ATTR_IDMAP`): what the host's root owns is inside whose the action runs
//! as, and the other way round, without a file being touched. Invariant: nothing here follows a path that an action or an
//! image could have made; the workspace and the scratch are mounted as they are and never walked, an image is walked
//! from inside its own root alone (`tree`).

mod accounts;
mod copying;
mod host;
mod image;
mod stack;
mod tree;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

pub use self::accounts::{User, UserError};
pub use self::copying::copy_image;
pub use self::stack::{ImageProbe, look};
use sealci_guest::accounts::COMPLAINT;

use crate::spec::{IDS_PER_SANDBOX, NetworkSpec, RootSpec, SandboxSpec};
use crate::sys;

/// Where the tree stands, in the helper's own mount namespace. On its way there everyone may go: part of libcontainer
/// does as root inside, who has no business in the agent's folders.
const STAGE: &str = "/run/sealci";

const NO_SETUID_NO_DEVICES: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// What could not be staged.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    #[error("cannot {doing} {}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{COMPLAINT}: {0}")]
    User(#[from] UserError),
}

trait Doing<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, StagingError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, StagingError> {
        self.map_err(|source| StagingError::Io { doing, path: path.to_owned(), source })
    }
}

/// Where the tree of a sandbox stands.
pub fn folder(spec: &SandboxSpec) -> PathBuf {
    if spec.rootless { spec.scratch.join("stage") } else { PathBuf::from(STAGE) }
}

/// A tree that stands.
pub struct Staged {
    pub root: PathBuf,
    /// Whom the init runs as.
    pub user: User,
}

/// The tree under construction.
pub struct Stage<'a> {
    spec: &'a SandboxSpec,
    folder: PathBuf,
    root: PathBuf,
    mapping: &'a OwnedFd,
}

impl<'a> Stage<'a> {
    /// Builds the whole tree. This process must be in a mount namespace of its own, and private.
    pub fn build(spec: &'a SandboxSpec, user_namespace: &'a OwnedFd) -> Result<Staged, StagingError> {
        let folder = folder(spec);
        fs::DirBuilder::new()
            .mode(0o755)
            .recursive(true)
            .create(&folder)
            .doing("make the folder", &folder)?;
        let size = match &spec.root {
            RootSpec::Host { layer_bytes, .. } => *layer_bytes,
            RootSpec::Image(_) => image::STAGE_BYTES,
        };
        let options = format!("mode=755,size={size},uid={0},gid={0}", spec.id_base);
        sys::mount("sealci", &folder, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, &options)
            .doing("mount a tmpfs at", &folder)?;
        let root = folder.join("root");
        let stage = Self { spec, folder, root, mapping: user_namespace };
        let user = match &spec.root {
            RootSpec::Host { extra_paths, .. } => {
                stage.show_host(extra_paths)?;
                User::default()
            }
            RootSpec::Image(image) => stage.show_image(image)?,
        };
        Ok(Staged { root: stage.root, user })
    }

    /// The files of `/etc` that tell of this sandbox itself: names, and what they hold.
    fn own_etc(&self) -> Vec<(&'static str, String)> {
        let host_name = &self.spec.id;
        let mut names = vec!["localhost", host_name];
        // What else could be a name would be another line.
        let is_plain = |name: &str| {
            !name.is_empty()
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        };
        names.extend(self.spec.names.iter().map(String::as_str).filter(|name| is_plain(name)));
        let mut files = vec![
            ("hostname", format!("{host_name}\n")),
            ("hosts", format!("127.0.0.1 {}\n::1 localhost\n", names.join(" "))),
        ];
        if self.spec.network != NetworkSpec::Off {
            let resolvers = self.spec.network.resolvers();
            let text = resolvers.iter().map(|address| format!("nameserver {address}\n")).collect();
            files.push(("resolv.conf", text));
        }
        files
    }

    /// A place inside, as a path of the helper's.
    fn at(&self, place: &str) -> PathBuf {
        self.root.join(place.trim_start_matches('/'))
    }

    fn make(&self, place: &str) -> Result<PathBuf, StagingError> {
        let path = self.at(place);
        self.own_folder(&path)?;
        Ok(path)
    }

    /// Makes a folder of root's inside.
    fn own_folder(&self, path: &Path) -> Result<(), StagingError> {
        make_folder(path)?;
        self.own(path)
    }

    fn own(&self, path: &Path) -> Result<(), StagingError> {
        chown(path, Some(self.spec.id_base), Some(self.spec.id_base)).doing("change the owner of", path)
    }

    fn link(&self, target: &Path, place: &str) -> Result<(), StagingError> {
        let path = self.at(place);
        symlink(target, &path).doing("make the link", &path)?;
        lchown(&path, Some(self.spec.id_base), Some(self.spec.id_base)).doing("change the owner of", &path)
    }

    /// A copy of a part of the host's tree to be looked at, its owners mapped where that can be.
    fn shown_tree(&self, path: &Path) -> io::Result<OwnedFd> {
        let tree = sys::clone_tree(path, true)?;
        let attributes = libc::MOUNT_ATTR_RDONLY | NO_SETUID_NO_DEVICES;
        // Without root what is not the user's own is nobody's inside, and mounts may not say otherwise.
        let mapping = (!self.spec.rootless).then_some(self.mapping.as_fd());
        let mapped = sys::set_attributes(&tree, true, attributes, mapping);
        // Somewhere below is a file system that cannot map: seen as it is, it is merely not root's inside.
        mapped.or_else(|_| sys::set_attributes(&tree, true, attributes, None))?;
        Ok(tree)
    }

    fn write(&self, place: &str, bytes: &[u8]) -> Result<(), StagingError> {
        let path = self.at(place);
        fs::write(&path, bytes).doing("write", &path)?;
        self.own(&path)
    }

    fn show_folder(&self, host: &Path, place: &str) -> Result<(), StagingError> {
        let target = self.make(place)?;
        self.show(host, &target)
    }

    fn show_file(&self, host: &Path, place: &str) -> Result<(), StagingError> {
        let target = self.at(place);
        fs::write(&target, b"").doing("write", &target)?;
        self.show(host, &target)
    }

    /// Mounts a part of the host, read-only, on what is there already.
    fn show(&self, host: &Path, target: &Path) -> Result<(), StagingError> {
        let tree = self.shown_tree(host).doing("copy the mount", host)?;
        sys::attach_tree(&tree, target).doing("mount", target)
    }

    /// Gives the action a folder of its own to change.
    fn lend(&self, host: &Path, place: &str) -> Result<(), StagingError> {
        let target = self.at(place);
        let mapping = self.spec.maps_owners.then_some(self.mapping.as_fd());
        let tree = lent_tree(host, mapping)?;
        sys::attach_tree(&tree, &target).doing("mount", &target)
    }
}

/// A copy of a folder's mount, to be changed by the action; its owners mapped, if by anything.
fn lent_tree(host: &Path, mapping: Option<BorrowedFd<'_>>) -> Result<OwnedFd, StagingError> {
    let tree = sys::clone_tree(host, true).doing("copy the mount", host)?;
    sys::set_attributes(&tree, true, NO_SETUID_NO_DEVICES, mapping).doing("map the owners of", host)?;
    Ok(tree)
}

/// Whether mounts of a folder's file system can map owners (from kernel 5.12 on, and not on every one). `id_base` as in
/// [`SandboxSpec`].
pub fn maps_owners(folder: &Path, id_base: u32) -> bool {
    let tried = sys::user_namespace(id_base, IDS_PER_SANDBOX).and_then(|namespace| {
        let tree = sys::clone_tree(folder, false)?;
        sys::set_attributes(&tree, false, 0, Some(namespace.as_fd()))
    });
    tried.is_ok()
}

/// Changes the owner and group of a folder and of all below it, following no link.
pub fn give_away(path: &Path, user: u32, group: u32) -> io::Result<()> {
    lchown(path, Some(user), Some(group))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give_away(&entry?.path(), user, group)?;
        }
    }
    Ok(())
}

/// Makes a folder; one that is there is fine.
fn make_folder(path: &Path) -> Result<(), StagingError> {
    match fs::DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).doing("make the folder", path)
        }
        _ => Ok(()),
    }
}
