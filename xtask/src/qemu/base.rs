//! Makes the guest's system of Debian's packages, once for each list of them.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::guest::bounded;

/// What the guest has beside Debian's essential packages.
const PACKAGES: &[&str] = &[
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "git",
    "iproute2",
    "passt",
    "procps",
    "slirp4netns",
    "uidmap",
];

/// What is not unpacked: nobody reads it there.
const WITHOUT: &[&str] = &["/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*"];

/// What the initial RAM disk is made of: just what finds the root, so that it is soon packed and soon unpacked.
const INITRD: &str = "\
    mkdir -p \"$1\"/etc/initramfs-tools/conf.d \"$1\"/usr/share/initramfs-tools/modules.d; \
    printf 'MODULES=list\\nCOMPRESS=gzip\\nCOMPRESSLEVEL=1\\n' >\"$1\"/etc/initramfs-tools/conf.d/sealci; \
    printf 'virtio_pci\\nvirtio_blk\\next4\\ncrc32c_generic\\n' >\"$1\"/usr/share/initramfs-tools/modules.d/sealci";

/// The guest's first process: puts the tests, which are a disk without a file system, in their place.
const START: &str = "#!/bin/sh\ntar -x -f /dev/vdb -C / && exec /bin/bash /sealci/guest.sh\n";

/// Sparse, and in a file that goes with the guest.
const ROOT_BYTES: u64 = 4 << 30;

/// Longer than packages take over a slow line.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
/// Older ones are made anew, with the packages of the day.
const MAX_AGE: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// A system that boots.
pub struct Base {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// An ext4 file system, never written.
    pub root: PathBuf,
}

impl Base {
    /// Finds it below `folder`, or makes it.
    pub fn obtain(folder: &Path) -> Result<Self> {
        let place = folder.join(format!("base-{}", key()?));
        if !is_recent(&place) {
            clear(folder)?;
            let partial = folder.join("base.partial");
            make(&partial).with_context(|| "cannot make Debian's root file system")?;
            fs::rename(&partial, &place)?;
        }
        Ok(Self {
            kernel: place.join("vmlinuz"),
            initrd: place.join("initrd.img"),
            root: place.join("root.img"),
        })
    }
}

fn is_recent(place: &Path) -> bool {
    let made = fs::metadata(place).and_then(|place| place.modified());
    made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age < MAX_AGE))
}

/// Changes with all that goes into it.
fn key() -> Result<String> {
    let mut hasher = DefaultHasher::new();
    (PACKAGES, WITHOUT, INITRD, START, ROOT_BYTES, codename()?).hash(&mut hasher);
    Ok(format!("{:016x}", hasher.finish()))
}

/// Debian's name of the machine's release, `bookworm`.
fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(name.context("/etc/os-release has no VERSION_CODENAME")?.trim_matches('"').to_owned())
}

/// Removes other lists' systems and what a killed run has left.
fn clear(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("base") {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn make(place: &Path) -> Result<()> {
    fs::create_dir(place)?;
    let tree = place.join("tree");
    debootstrap(&tree)?;
    let start = tree.join("sealci-start");
    fs::write(&start, START)?;
    fs::set_permissions(&start, fs::Permissions::from_mode(0o755))?;
    for name in ["vmlinuz", "initrd.img"] {
        let of_kernel = only(&tree.join("boot"), &format!("{name}-"))?;
        fs::rename(of_kernel, place.join(name))?;
    }
    let root = place.join("root.img");
    fs::File::create(&root)?.set_len(ROOT_BYTES)?;
    let mut mkfs = bounded("mkfs.ext4", PATIENCE);
    // Without a journal: it is never mounted a second time.
    mkfs.args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-d"]).arg(&tree).arg(&root);
    let status = mkfs.status().context("cannot run mkfs.ext4")?;
    if !status.success() {
        bail!("mkfs.ext4 ended with {status}");
    }
    fs::remove_dir_all(&tree)?;
    Ok(())
}

/// From the machine's own package sources; from Debian's where these do not do.
fn debootstrap(tree: &Path) -> Result<()> {
    let sources = package_sources();
    if !sources.is_empty() && mmdebstrap(tree, "", &sources)? {
        return Ok(());
    }
    if mmdebstrap(tree, &codename()?, &[])? { Ok(()) } else { bail!("mmdebstrap failed, see above") }
}

fn mmdebstrap(tree: &Path, suite: &str, sources: &[PathBuf]) -> Result<bool> {
    if tree.exists() {
        fs::remove_dir_all(tree)?;
    }
    let mut command = bounded("mmdebstrap", PATIENCE);
    command.args(["--quiet", "--mode=root", "--variant=minbase", "--format=directory"]);
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.args(["--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io"]);
    command.args(WITHOUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--essential-hook={INITRD}"));
    command.arg(suite).arg(tree).args(sources);
    Ok(command.status().context("cannot run mmdebstrap")?.success())
}

/// The files in which apt finds its sources.
fn package_sources() -> Vec<PathBuf> {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let mut files: Vec<_> = parts.map(|entry| entry.path()).collect();
    files.sort();
    let is_source = |path: &PathBuf| {
        path.extension().is_some_and(|extension| extension == "list" || extension == "sources")
    };
    let main = PathBuf::from("/etc/apt/sources.list");
    let says_something = |path: &PathBuf| {
        fs::read_to_string(path).is_ok_and(|text| {
            text.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
        })
    };
    [main].into_iter().chain(files).filter(is_source).filter(says_something).collect()
}

/// The one file of a folder whose name begins so.
fn only(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let names = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found = names.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    match (found.next(), found.next()) {
        (Some(entry), None) => Ok(entry.path()),
        _ => bail!("{} has not exactly one file {prefix}…", folder.display()),
    }
}
