//! Builds a root of an image's layers, and puts in it what every sandbox has.
//!
//! The image is somebody else's, and may be hostile: what is placed in it is placed by descriptors that were found inside its
//! root (`tree`). The folders that others will mount on by their names (`/dev`, `/proc`) and ours are real ones, whatever
//! the image has there: in the throw-away layer a link is replaced by a folder.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::Path;

use rustix::fs::Mode;

use super::tree::{self, Tree};
use super::{Doing, Stage, StagingError, User, UserError, lent_tree, make_folder, stack};
use crate::spec::{Assembly, IDS_PER_SANDBOX, ImageRoot, SandboxSpec, inside};
use crate::sys;

/// The stage itself holds mount points and the commands of one action.
pub const STAGE_BYTES: u64 = 64 << 20;

/// Where overlayfs keeps what is written, in the scratch.
const WRITTEN: &str = "written";
/// Where the tree is that was copied, in the scratch.
const COPIED: &str = "image";

/// The folder with the tree of an image that is copied, not stacked.
pub fn copied_folder(spec: &SandboxSpec) -> std::path::PathBuf {
    spec.scratch.join(COPIED)
}

impl Stage<'_> {
    /// Fills the root; tells whom the image runs as.
    pub(super) fn show_image(&self, image: &ImageRoot) -> Result<User, StagingError> {
        self.own_folder(&self.root)?;
        let mapping = self.spec.maps_owners.then_some(self.mapping.as_fd());
        match image.assembly {
            Assembly::Stacked => {
                let disk = self.spec.scratch.join(WRITTEN);
                make_folder(&disk)?;
                let (stage, owner) = (&self.folder, self.spec.id_base);
                let stack = stack::Stack { layers: &image.layers, disk: &disk, stage, mapping, owner };
                stack.mount(&self.root)?;
            }
            Assembly::Copied => {
                let tree = lent_tree(&copied_folder(self.spec), mapping)?;
                sys::attach_tree(&tree, &self.root).doing("mount", &self.root)?;
            }
        }
        let tree = Tree::open(&self.root).doing("open", &self.root)?;
        let user = self.user(&tree, &image.user)?;
        // What is made in the image is its root's.
        sys::act_on_files_as(self.spec.id_base).doing("act as the owner of", &self.root)?;
        let places = self.make_places(&tree);
        sys::act_on_files_as(0).doing("be root again for", &self.root)?;
        let (workspace, init_folder) = places?;
        self.lend_workspace(&workspace, &user)?;
        self.show_init(&init_folder, &user)?;
        Ok(user)
    }

    fn user(&self, tree: &Tree, text: &str) -> Result<User, StagingError> {
        let mut user = User::find(tree, text)?;
        if self.spec.rootless {
            if user.uid != 0 || user.gid != 0 {
                return Err(UserError::OnlyRoot(user.uid.max(user.gid)).into());
            }
            // A user's own namespace may not change its groups (user_namespaces(7)).
            user.groups.clear();
        }
        Ok(user)
    }

    /// Makes what will be mounted on, and the files of `/etc`; returns the workspace's place and the init's.
    fn make_places(&self, tree: &Tree) -> Result<(OwnedFd, OwnedFd), StagingError> {
        let real = |name: &str| tree.real_folder(name).doing("make a folder in the image:", Path::new(name));
        for name in ["dev", "proc", "sys"] {
            real(name)?;
        }
        let workspace = real(inside::WORKSPACE.trim_start_matches('/'))?;
        let run = real("run")?;
        let init_folder = tree::real_folder(run.as_fd(), "sealci", Mode::from_raw_mode(0o755))
            .doing("make a folder in the image:", Path::new(inside::INIT_FOLDER))?;
        tree.folder(inside::TEMPORARY, 0o1777)
            .doing("make a folder in the image:", Path::new(inside::TEMPORARY))?;
        let etc = Path::new("/etc");
        let folder = tree.folder("/etc", 0o755).doing("make a folder in the image:", etc)?;
        for (name, text) in self.own_etc() {
            tree::put_file(folder.as_fd(), name, text.as_bytes())
                .doing("write in the image:", &etc.join(name))?;
        }
        Ok((workspace, init_folder))
    }

    /// What is root's on the host is that user's inside.
    fn lend_workspace(&self, place: &OwnedFd, user: &User) -> Result<(), StagingError> {
        let path = &self.spec.workspace;
        let own;
        let mapping = match (self.spec.maps_owners, user.uid | user.gid) {
            (false, _) => None,
            (true, 0) => Some(self.mapping.as_fd()),
            (true, _) => {
                let [users, groups] = [user.uid, user.gid].map(|id| swapped(self.spec.id_base, id));
                own = sys::mapped_namespace(&users, &groups).doing("map the owners of", path)?;
                Some(own.as_fd())
            }
        };
        let tree = lent_tree(path, mapping)?;
        sys::attach_tree_to(&tree, place.as_fd()).doing("mount", path)
    }

    /// In memory, like the sandbox's.
    fn show_init(&self, place: &OwnedFd, user: &User) -> Result<(), StagingError> {
        let folder = self.folder.join("init");
        let scratch = folder.join("scratch");
        let program = folder.join("sealci-init");
        self.own_folder(&folder)?;
        make_folder(&scratch)?;
        let [uid, gid] = [user.uid, user.gid].map(|id| self.spec.id_base + id);
        chown(&scratch, Some(uid), Some(gid)).doing("change the owner of", &scratch)?;
        fs::write(&program, b"").doing("write", &program)?;
        self.show(&self.spec.init, &program)?;
        let tree = sys::clone_tree(&folder, true).doing("copy the mount", &folder)?;
        sys::attach_tree_to(&tree, place.as_fd()).doing("mount", &folder)
    }
}

/// The map of all ids of a container, in which 0 and another one have changed places (user_namespaces(7)).
fn swapped(base: u32, id: u32) -> String {
    let mut ranges = vec![(0, id, 1)];
    if id > 0 {
        ranges.extend([(id, 0, 1), (1, 1, id - 1), (id + 1, id + 1, IDS_PER_SANDBOX - id - 1)]);
    }
    if id == 0 {
        ranges.push((1, 1, IDS_PER_SANDBOX - 1));
    }
    let lines = ranges.into_iter().filter(|(_, _, count)| *count > 0);
    lines.map(|(inside, outside, count)| format!("{inside} {} {count}\n", base + outside)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ids_change_places_and_the_others_stay() {
        for id in [0, 1, 2, 1000, 65535] {
            let map: Vec<Vec<u32>> = swapped(500_000, id)
                .lines()
                .map(|line| line.split(' ').map(|number| number.parse().unwrap()).collect())
                .collect();
            let mut seen = vec![None; IDS_PER_SANDBOX as usize];
            for range in map {
                for step in 0..range[2] {
                    let place = &mut seen[(range[0] + step) as usize];
                    assert_eq!(*place, None, "{id}");
                    *place = Some(range[1] + step - 500_000);
                }
            }
            for (from, to) in seen.into_iter().enumerate() {
                let expected = match from as u32 {
                    0 => id,
                    other if other == id => 0,
                    other => other,
                };
                assert_eq!(to, Some(expected), "{id}");
            }
        }
    }
}
