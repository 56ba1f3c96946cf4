//! Goes about in a tree that somebody else has made, as if it were the root: no link in it leads out.
//!
//! Every path is looked up by the kernel below the tree's own descriptor (`RESOLVE_IN_ROOT`), and nothing that is mounted in
//! the tree is entered. What stands where a folder has to be, and is none, is replaced: it is a throw-away layer.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

/// The root of somebody else's tree.
pub struct Tree(OwnedFd);

const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl Tree {
    pub fn open(root: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(root, FOLDER | OFlags::NOFOLLOW, Mode::empty())?))
    }

    fn resolve(&self, place: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let limits = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
        Ok(rustix::fs::openat2(&self.0, place, flags | OFlags::CLOEXEC, Mode::empty(), limits)?)
    }

    /// A folder of the root itself, no link to one; made where there is none.
    pub fn real_folder(&self, name: &str) -> io::Result<OwnedFd> {
        real_folder(self.0.as_fd(), name, Mode::from_raw_mode(0o755))
    }

    /// The folder to which a place leads, over links inside the tree; what is missing on the way is made, the last one with
    /// this mode.
    pub fn folder(&self, place: &str, mode: u32) -> io::Result<OwnedFd> {
        let mut way = Path::new("/").to_owned();
        let mut folder = self.resolve(&way, FOLDER)?;
        for name in place.split('/').filter(|name| !name.is_empty()) {
            way.push(name);
            folder = match self.resolve(&way, FOLDER) {
                Ok(folder) => folder,
                Err(_) => {
                    let is_last = way == Path::new("/").join(place);
                    let mode = if is_last { mode } else { 0o755 };
                    real_folder(folder.as_fd(), name, Mode::from_raw_mode(mode))?
                }
            };
        }
        Ok(folder)
    }

    /// The text of a file, as far as `limit_bytes`; none where there is no regular one.
    pub fn read(&self, place: &str, limit_bytes: u64) -> Option<String> {
        // A pipe would keep its reader waiting, unlike a file that is opened so.
        let file = File::from(self.resolve(Path::new(place), OFlags::RDONLY | OFlags::NONBLOCK).ok()?);
        let mut bytes = Vec::new();
        let is_file = file.metadata().ok()?.is_file();
        is_file.then(|| file.take(limit_bytes).read_to_end(&mut bytes).ok()).flatten()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// A folder of this name in a folder, no link to one; made in the place of anything else.
pub fn real_folder(parent: BorrowedFd<'_>, name: &str, mode: Mode) -> io::Result<OwnedFd> {
    match rustix::fs::openat(parent, name, FOLDER | OFlags::NOFOLLOW, Mode::empty()) {
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
        }
        Err(rustix::io::Errno::NOENT) => {}
        found => return Ok(found?),
    }
    rustix::fs::mkdirat(parent, name, mode)?;
    // Whatever the mask is. What was made a moment ago is no link: nobody else is here.
    rustix::fs::chmodat(parent, name, mode, AtFlags::empty())?;
    Ok(rustix::fs::openat(parent, name, FOLDER | OFlags::NOFOLLOW, Mode::empty())?)
}

/// Puts a new file in a folder, in the place of what has its name.
pub fn put_file(folder: BorrowedFd<'_>, name: &str, bytes: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        // Only an empty one goes: what is in another would be somebody's.
        Err(rustix::io::Errno::ISDIR) => rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?,
        Err(error) if error != rustix::io::Errno::NOENT => return Err(error.into()),
        _ => {}
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(0o644))?;
    File::from(file).write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A tree in a folder, and beside it what must stay as it is.
    struct Trap {
        folder: tempfile::TempDir,
    }

    impl Trap {
        fn lay(links: &[(&str, &str)]) -> (Self, Tree) {
            let folder = tempfile::tempdir().unwrap();
            let root = folder.path().join("root");
            std::fs::create_dir_all(&root).unwrap();
            std::fs::create_dir(folder.path().join("outside")).unwrap();
            std::fs::write(folder.path().join("outside/file"), "untouched").unwrap();
            for (link, target) in links {
                let target = target.replace("OUTSIDE", folder.path().join("outside").to_str().unwrap());
                symlink(target, root.join(link)).unwrap();
            }
            let tree = Tree::open(&root).unwrap();
            (Self { folder }, tree)
        }

        fn outside_is_untouched(&self) {
            let outside = self.folder.path().join("outside");
            let names: Vec<_> =
                std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["file"]);
            assert_eq!(std::fs::read_to_string(outside.join("file")).unwrap(), "untouched");
        }

        fn root(&self) -> std::path::PathBuf {
            self.folder.path().join("root")
        }
    }

    #[test]
    fn links_lead_nowhere_but_into_the_tree() {
        for target in ["OUTSIDE", "../outside", "../../../../../..", "/", "x", "etc", "/proc/self/root"] {
            let (trap, tree) = Trap::lay(&[("etc", target)]);
            let folder = tree.folder("etc", 0o755).unwrap();
            put_file(folder.as_fd(), "file", b"mine").unwrap();
            trap.outside_is_untouched();
            assert_eq!(tree.read("etc/file", 100).as_deref(), Some("mine"), "{target}");
            drop(tree.real_folder("etc").unwrap());
            assert!(std::fs::symlink_metadata(trap.root().join("etc")).unwrap().is_dir(), "{target}");
        }
    }

    #[test]
    fn a_link_inside_the_tree_is_followed() {
        let (trap, tree) = Trap::lay(&[("run", "/var/run"), ("var", "really/var")]);
        std::fs::create_dir_all(trap.root().join("really/var/run")).unwrap();
        put_file(tree.folder("run/deep", 0o755).unwrap().as_fd(), "file", b"x").unwrap();
        assert!(trap.root().join("really/var/run/deep/file").is_file());
        let made = tree.folder("tmp", 0o1777).unwrap();
        drop(made);
        let mode = std::fs::metadata(trap.root().join("tmp")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o1777);
    }

    #[test]
    fn a_file_is_put_in_the_place_of_a_link_and_not_through_it() {
        let (trap, tree) = Trap::lay(&[("hosts", "OUTSIDE/file"), ("resolv.conf", "OUTSIDE/none")]);
        std::fs::create_dir(trap.root().join("hostname")).unwrap();
        let root = tree.folder("", 0o755).unwrap();
        for name in ["hosts", "resolv.conf", "hostname"] {
            put_file(root.as_fd(), name, b"mine").unwrap();
            assert_eq!(std::fs::read_to_string(trap.root().join(name)).unwrap(), "mine");
        }
        trap.outside_is_untouched();
        std::fs::create_dir_all(trap.root().join("full/of")).unwrap();
        assert!(put_file(root.as_fd(), "full", b"").is_err());
    }

    #[test]
    fn only_regular_files_are_read_and_only_so_much() {
        let (trap, tree) = Trap::lay(&[("link", "OUTSIDE/file"), ("device", "/dev/zero")]);
        std::fs::write(trap.root().join("long"), "x".repeat(100)).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            trap.root().join("pipe"),
            rustix::fs::FileType::Fifo,
            Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        assert_eq!(tree.read("long", 10).unwrap().len(), 10);
        for place in ["link", "device", "pipe", "none", "/", "../outside/file"] {
            assert_eq!(tree.read(place, 10), None, "{place}");
        }
    }
}
