//! Stacks an image's layers to one tree by overlayfs, and finds out whether that can be done at all.
//!
//! Names of mount points are numbers, and relative: 127 layers fit in the one page that mount(2) has for options, and no
//! character of a folder's name means anything to overlayfs.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::lchown;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, XattrFlags};
use serde::{Deserialize, Serialize};

use super::{Doing, NO_SETUID_NO_DEVICES, StagingError, make_folder};
use crate::sys;

/// What is written goes here, in a folder of the scratch.
pub const UPPER: &str = "upper";
const WORK: &str = "work";
/// The mount point of that folder.
const DISK: &str = "disk";
/// Set on a folder that hides the folder below it (overlayfs with `userxattr`).
pub const OPAQUE: &str = "user.overlay.opaque";

/// Layers, and what is needed to see them as one tree.
pub struct Stack<'a> {
    /// The lowest first.
    pub layers: &'a [PathBuf],
    /// A folder on disk for what is written.
    pub disk: &'a Path,
    /// A folder for mount points.
    pub stage: &'a Path,
    /// Maps the owners of the layers, where that is wanted.
    pub mapping: Option<BorrowedFd<'a>>,
    /// Whom root of the layers is then.
    pub owner: u32,
}

impl Stack<'_> {
    /// Mounts the tree at `target`. Only that stays mounted.
    pub fn mount(&self, target: &Path) -> Result<(), StagingError> {
        for name in [UPPER, WORK] {
            make_folder(&self.disk.join(name))?;
        }
        if self.mapping.is_some() {
            let upper = self.disk.join(UPPER);
            lchown(&upper, Some(self.owner), Some(self.owner)).doing("change the owner of", &upper)?;
        }
        // What is written has the host's owners as it is: overlayfs works in there as who mounts it, root, whom the mapping
        // does not know; somebody else could not reach what users of the image keep to themselves.
        let mut places = vec![self.show(self.disk, DISK, NO_SETUID_NO_DEVICES, None)?];
        // There has to be one, and an image may have none.
        let empty = self.stage.join("empty");
        make_folder(&empty)?;
        let lowest = [empty];
        let layers = if self.layers.is_empty() { &lowest[..] } else { self.layers };
        let mut names = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let name = number.to_string();
            let attributes = libc::MOUNT_ATTR_RDONLY | NO_SETUID_NO_DEVICES;
            places.push(self.show(layer, &name, attributes, self.mapping)?);
            names.push(name);
        }
        // The highest comes first there.
        names.reverse();
        // It is thrown away at the end: nothing of it need be safe from a crash (`volatile`).
        let options = format!(
            "lowerdir={},upperdir={DISK}/{UPPER},workdir={DISK}/{WORK},userxattr,volatile",
            names.join(":")
        );
        std::env::set_current_dir(self.stage).doing("enter", self.stage)?;
        sys::mount("overlay", target, "overlay", libc::MS_NOSUID | libc::MS_NODEV, &options)
            .doing("mount an overlay at", target)?;
        // It holds them by itself.
        for place in places {
            sys::detach(&place).doing("detach", &place)?;
        }
        Ok(())
    }

    fn show(
        &self,
        folder: &Path,
        name: &str,
        attributes: u64,
        mapping: Option<BorrowedFd<'_>>,
    ) -> Result<PathBuf, StagingError> {
        let place = self.stage.join(name);
        make_folder(&place)?;
        let tree = sys::clone_tree(folder, true).doing("copy the mount", folder)?;
        sys::set_attributes(&tree, true, attributes, mapping).doing("map the owners of", folder)?;
        sys::attach_tree(&tree, &place).doing("mount", &place)?;
        Ok(place)
    }
}

/// Whether images' layers can be stacked on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageProbe {
    /// Why they cannot.
    pub stacking: Option<String>,
}

/// Tries it with layers in one folder and what is written in another, both made for that and empty; returns why it cannot
/// be. This process must be in a mount namespace of its own, and private. `owner` is the host's id of root inside.
pub fn look(
    layers: &Path,
    scratch: &Path,
    owner: u32,
    mapping: Option<BorrowedFd<'_>>,
) -> Result<(), StagingError> {
    let [low, high] = ["low", "high"].map(|name| layers.join(name));
    for folder in [&low, &high] {
        make_folder(folder)?;
        make_folder(&folder.join("hidden"))?;
    }
    for name in ["removed", "kept", "hidden/file"] {
        let path = low.join(name);
        fs::write(&path, name).doing("write", &path)?;
    }
    let removed = high.join("removed");
    rustix::fs::mknodat(CWD, &removed, FileType::CharacterDevice, Mode::empty(), 0)
        .map_err(io::Error::from)
        .doing("make a whiteout", &removed)?;
    let hidden = high.join("hidden");
    rustix::fs::setxattr(&hidden, OPAQUE, b"y", XattrFlags::empty())
        .map_err(io::Error::from)
        .doing("set an attribute of", &hidden)?;

    let [stage, disk] = ["stage", "disk"].map(|name| scratch.join(name));
    let target = stage.join("root");
    for folder in [&stage, &disk, &target] {
        make_folder(folder)?;
    }
    Stack { layers: &[low, high], disk: &disk, stage: &stage, mapping, owner }.mount(&target)?;
    sys::act_on_files_as(owner).doing("act as the owner of", &target)?;
    let tried = is_one_tree(&target, owner).doing("use an overlay at", &target);
    sys::act_on_files_as(0).doing("be root again for", &target)?;
    tried
}

fn is_one_tree(root: &Path, owner: u32) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let wrong = |what: &str| Err(io::Error::other(what.to_owned()));
    let is_gone = |name: &str| fs::symlink_metadata(root.join(name)).is_err();
    if !is_gone("removed") || !is_gone("hidden/file") {
        return wrong("what a layer hides is seen");
    }
    if fs::metadata(root.join("kept"))?.uid() != owner {
        return wrong("owners are not mapped");
    }
    fs::write(root.join("kept"), "changed")?;
    fs::rename(root.join("kept"), root.join("moved"))?;
    fs::create_dir(root.join("made"))?;
    fs::remove_dir_all(root.join("hidden"))?;
    if fs::read_to_string(root.join("moved"))? != "changed" || !is_gone("hidden") {
        return wrong("what is written is not there");
    }
    Ok(())
}
