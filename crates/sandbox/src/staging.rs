//! Builds the tree that becomes `/` inside, in the helper's own mount namespace.
//!
//! ```text
//! /run/sealci/        a tmpfs of its own, over whatever the host keeps there
//!   root/             → /
//!     usr             overlay: the host's /usr below, upper/usr on top
//!     bin, lib, …     the host's symlinks, or overlays like /usr
//!     etc             copies of few files, some folders read-only, accounts of its own
//!     workspace       the action's tree, its owners mapped
//!     root, tmp       folders of the scratch, their owners mapped
//!     run/sealci      the init and its scratch
//!   lower/ upper/ work/
//! ```
//!
//! Without root the tree stands in the scratch, the host's folders are read-only without a layer on top (their owners are
//! nobody inside, and nobody inside may act for them, so that there would be nothing to throw away), and nothing is mapped:
//! what is lent is the user's own.
//!
//! With root, owners are mapped by the mounts (`MOUNT_ATTR_IDMAP`): what the host's root owns is root's inside, and the other way
//! round, without a file being touched. Invariant: nothing here follows a path that an action could have made; the
//! workspace and the scratch are mounted as they are and never walked.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use crate::spec::{IDS_PER_SANDBOX, NetworkSpec, SandboxSpec, inside};
use crate::sys;

/// Where the tree stands, in the helper's own mount namespace. On its way there everyone may go: part of libcontainer
/// does as root inside, who has no business in the agent's folders.
const STAGE: &str = "/run/sealci";

/// Folders of the host's programs; those that are symlinks stay symlinks.
const PROGRAM_FOLDERS: [&str; 7] = ["usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32"];

/// Copied, where the host has them: what programs of these folders need to find names, time and each other.
const ETC_FILES: [&str; 22] = [
    "bash.bashrc",
    "debian_version",
    "ethertypes",
    "gai.conf",
    "host.conf",
    "ld.so.cache",
    "ld.so.conf",
    "locale.alias",
    "locale.conf",
    "localtime",
    "login.defs",
    "magic",
    "mime.types",
    "nsswitch.conf",
    "os-release",
    "profile",
    "protocols",
    "rpc",
    "services",
    "shells",
    "timezone",
    "inputrc",
];

/// Seen read-only, where the host has them: certificates, and the choices of the host's package manager.
const ETC_FOLDERS: [&str; 10] = [
    "alternatives",
    "ca-certificates",
    "crypto-policies",
    "fonts",
    "java",
    "ld.so.conf.d",
    "maven",
    "perl",
    "pki",
    "ssl/certs",
];

/// Folders of the scratch, and where they are inside.
const LENT_FOLDERS: [(&str, &str); 2] = [("home", inside::HOME), ("tmp", inside::TEMPORARY)];

const ACCOUNTS: &str =
    "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUPS: &str = "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n";

const NO_SETUID_NO_DEVICES: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// What could not be staged.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}", path.display())]
pub struct StagingError {
    doing: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

trait Doing<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, StagingError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, doing: &'static str, path: &Path) -> Result<T, StagingError> {
        self.map_err(|source| StagingError { doing, path: path.to_owned(), source })
    }
}

/// Where the tree of a sandbox stands.
pub fn folder(spec: &SandboxSpec) -> PathBuf {
    if spec.rootless { spec.scratch.join("stage") } else { PathBuf::from(STAGE) }
}

/// The tree under construction.
pub struct Stage<'a> {
    spec: &'a SandboxSpec,
    folder: PathBuf,
    root: PathBuf,
    mapping: &'a OwnedFd,
}

impl<'a> Stage<'a> {
    /// Builds the whole tree; returns its root. This process must be in a mount namespace of its own, and private.
    pub fn build(spec: &'a SandboxSpec, user_namespace: &'a OwnedFd) -> Result<PathBuf, StagingError> {
        let folder = folder(spec);
        fs::DirBuilder::new()
            .mode(0o755)
            .recursive(true)
            .create(&folder)
            .doing("make the folder", &folder)?;
        let options = format!("mode=755,size={},uid={1},gid={1}", spec.layer_bytes, spec.id_base);
        sys::mount("sealci", &folder, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, &options)
            .doing("mount a tmpfs at", &folder)?;
        let root = folder.join("root");
        let stage = Self { spec, folder, root, mapping: user_namespace };
        stage.make_folders()?;
        for name in PROGRAM_FOLDERS {
            stage.show_programs(name)?;
        }
        stage.fill_etc()?;
        for (name, _) in LENT_FOLDERS {
            make_folder(&spec.scratch.join(name))?;
        }
        let temporary = spec.scratch.join("tmp");
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o1777)).doing("open up", &temporary)?;
        for path in &spec.extra_paths {
            stage.make_room(path)?;
        }
        stage.lend(&spec.workspace, inside::WORKSPACE)?;
        for (name, place) in LENT_FOLDERS {
            let folder = spec.scratch.join(name);
            if !spec.maps_owners {
                give_away(&folder, spec.id_base).doing("change the owners below", &folder)?;
            }
            stage.lend(&folder, place)?;
        }
        for path in &spec.extra_paths {
            stage.show(path, &stage.at(&path.to_string_lossy()))?;
        }
        stage.show_file(&spec.init, inside::INIT)?;
        Ok(stage.root)
    }

    fn make_folders(&self) -> Result<(), StagingError> {
        self.make("")?;
        for name in [
            "dev",
            "etc",
            "etc/ssl",
            "home",
            "mnt",
            "opt",
            "proc",
            "run",
            "run/lock",
            "srv",
            "sys",
            "var",
            "var/cache",
            "var/lib",
            "var/log",
        ] {
            self.make(name)?;
        }
        for name in [inside::WORKSPACE, inside::HOME, inside::TEMPORARY, inside::INIT_FOLDER, inside::SCRATCH]
        {
            self.make(name)?;
        }
        for (link, target) in [("var/tmp", "../tmp"), ("var/run", "../run"), ("var/lock", "../run/lock")] {
            self.link(target.as_ref(), link)?;
        }
        Ok(())
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

    /// Shows a folder of the host's programs, with a throw-away layer on top.
    fn show_programs(&self, name: &str) -> Result<(), StagingError> {
        let host = Path::new("/").join(name);
        let Ok(metadata) = fs::symlink_metadata(&host) else { return Ok(()) };
        if metadata.is_symlink() {
            let target = fs::read_link(&host).doing("read the link", &host)?;
            return self.link(&target, name);
        }
        if !metadata.is_dir() {
            return Ok(());
        }
        if self.spec.rootless {
            return self.show_folder(&host, name);
        }
        let target = self.make(name)?;
        let [lower, upper, work] = ["lower", "upper", "work"].map(|kind| self.folder.join(kind).join(name));
        for folder in [&lower, &upper, &work] {
            if let Some(parent) = folder.parent() {
                self.own_folder(parent)?;
            }
            self.own_folder(folder)?;
        }
        let tree = self.shown_tree(&host).doing("copy the mount", &host)?;
        sys::attach_tree(&tree, &lower).doing("mount", &lower)?;
        // Relative, for no character of these names means anything to overlayfs.
        std::env::set_current_dir(&self.folder).doing("enter", &self.folder)?;
        let options = format!("lowerdir=lower/{name},upperdir=upper/{name},workdir=work/{name}");
        sys::mount("overlay", &target, "overlay", libc::MS_NOSUID | libc::MS_NODEV, &options)
            .doing("mount an overlay at", &target)
    }

    fn fill_etc(&self) -> Result<(), StagingError> {
        for name in ETC_FILES {
            let host = Path::new("/etc").join(name);
            // Followed: the host's own links, such as localtime, lead into /usr.
            if let Ok(bytes) = fs::read(&host) {
                self.write(&format!("etc/{name}"), &bytes)?;
            }
        }
        for name in ETC_FOLDERS {
            let host = Path::new("/etc").join(name);
            if host.is_dir() {
                self.show_folder(&host, &format!("etc/{name}"))?;
            }
        }
        let host_name = &self.spec.id;
        self.write("etc/hostname", format!("{host_name}\n").as_bytes())?;
        self.write("etc/hosts", format!("127.0.0.1 localhost {host_name}\n::1 localhost\n").as_bytes())?;
        let resolvers = self.spec.network.resolvers();
        if self.spec.network != NetworkSpec::Off {
            let text: String = resolvers.iter().map(|address| format!("nameserver {address}\n")).collect();
            self.write("etc/resolv.conf", text.as_bytes())?;
        }
        self.write("etc/passwd", ACCOUNTS.as_bytes())?;
        self.write("etc/group", GROUPS.as_bytes())
    }

    fn write(&self, place: &str, bytes: &[u8]) -> Result<(), StagingError> {
        let path = self.at(place);
        fs::write(&path, bytes).doing("write", &path)?;
        self.own(&path)
    }

    /// Makes what an extra path will be mounted on. That may be in a lent folder, which cannot be written through its
    /// mount: the helper has no id there.
    fn make_room(&self, path: &Path) -> Result<(), StagingError> {
        let lent = LENT_FOLDERS
            .iter()
            .find_map(|(name, place)| Some((self.spec.scratch.join(name), path.strip_prefix(place).ok()?)));
        let (base, below) = match &lent {
            Some((base, below)) => (base.clone(), *below),
            None => (self.root.clone(), path.strip_prefix("/").unwrap_or(path)),
        };
        let mut place = base;
        let mut components = below.components().peekable();
        while let Some(component) = components.next() {
            place.push(component);
            if components.peek().is_none() && !path.is_dir() {
                fs::write(&place, b"").doing("write", &place)?;
            } else if !place.exists() {
                make_folder(&place)?;
                if lent.is_none() {
                    self.own(&place)?;
                }
            }
        }
        Ok(())
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
        let tree = sys::clone_tree(host, true).doing("copy the mount", host)?;
        sys::set_attributes(&tree, true, NO_SETUID_NO_DEVICES, mapping).doing("map the owners of", host)?;
        sys::attach_tree(&tree, &target).doing("mount", &target)
    }
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
pub fn give_away(path: &Path, id: u32) -> io::Result<()> {
    lchown(path, Some(id), Some(id))?;
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            give_away(&entry?.path(), id)?;
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
