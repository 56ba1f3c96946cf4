//! Builds a root of the host's own programs.
//!
//! Without root the host's folders are read-only without a layer on top: their owners are nobody inside, and nobody inside
//! may act for them, so that there would be nothing to throw away.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Doing, Stage, StagingError, give_away, make_folder};
use crate::spec::inside;
use crate::sys;

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

impl Stage<'_> {
    /// Fills the root; `extra_paths` as in [`crate::RootSpec::Host`].
    pub(super) fn show_host(&self, extra_paths: &[PathBuf]) -> Result<(), StagingError> {
        let scratch = &self.spec.scratch;
        self.make_folders()?;
        for name in PROGRAM_FOLDERS {
            self.show_programs(name)?;
        }
        self.fill_etc()?;
        for (name, _) in LENT_FOLDERS {
            make_folder(&scratch.join(name))?;
        }
        let temporary = scratch.join("tmp");
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o1777)).doing("open up", &temporary)?;
        for path in extra_paths {
            self.make_room(path)?;
        }
        self.lend(&self.spec.workspace, inside::WORKSPACE)?;
        for (name, place) in LENT_FOLDERS {
            let folder = scratch.join(name);
            if !self.spec.maps_owners {
                let id = self.spec.id_base;
                give_away(&folder, id, id).doing("change the owners below", &folder)?;
            }
            self.lend(&folder, place)?;
        }
        for path in extra_paths {
            self.show(path, &self.at(&path.to_string_lossy()))?;
        }
        self.show_file(&self.spec.init, inside::INIT)
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
        for (name, text) in self.own_etc() {
            self.write(&format!("etc/{name}"), text.as_bytes())?;
        }
        self.write("etc/passwd", ACCOUNTS.as_bytes())?;
        self.write("etc/group", GROUPS.as_bytes())
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
}
