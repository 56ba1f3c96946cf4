//! Puts the root file systems of a machine together, and what every program expects in one.
//!
//! The lower part is an image, on a disk that can only be read; what is written goes to the scratch disk, or to memory. An
//! image is a stranger's, but it can trick nobody here: no path is resolved in it before it is the root, and then what it leads
//! to is its own machine's.

use std::fmt::Write;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use sealci_guest::wire::machine::{SCRATCH, WORKSPACE};

use crate::failure::{Failure, While};
use crate::sys::machine::{NO_ATIME, NO_SETUID, PLAIN, READ_ONLY, mount, move_root};

/// The action's root, and what is written; see [`sealci_guest::wire::machine`].
pub const ROOT_DISK: &str = "/dev/vda";
const SCRATCH_DISK: &str = "/dev/vdb";

/// In the initial RAM disk.
const LOWER: &str = "/lower";
const WRITABLE: &str = "/writable";
const WHOLE: &str = "/whole";

/// A file system of the kernel's own: its kind, where it is mounted, flags and options.
type Mount = (&'static str, &'static str, u64, &'static str);

const EARLY: &[Mount] = &[
    ("devtmpfs", "/dev", NO_SETUID, "mode=0755"),
    ("proc", "/proc", PLAIN, ""),
    ("sysfs", "/sys", PLAIN, ""),
];

/// Of the whole root, behind [`EARLY`].
const LATE: &[Mount] = &[
    ("devpts", "/dev/pts", PLAIN & !libc::MS_NODEV, "mode=0620,ptmxmode=0666,gid=5"),
    ("tmpfs", "/dev/shm", PLAIN, "mode=1777"),
    ("tmpfs", "/run", NO_SETUID, "mode=0755"),
    ("cgroup2", "/sys/fs/cgroup", PLAIN, ""),
];

/// Folders that a program counts on, or the host does.
const FOLDERS: &[(&str, u32)] = &[("/tmp", 0o1777), (WORKSPACE, 0o755), (SCRATCH, 0o711)];

/// What a kernel leaves to its first process.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts what the first steps need.
pub fn mount_early() -> Result<(), Failure> {
    EARLY.iter().try_for_each(mount_one)
}

/// Mounts an image, over another one where there is one.
pub fn mount_lower(disk: &str) -> Result<(), Failure> {
    make_folder(LOWER)?;
    if !Path::new(disk).exists() {
        return Err(io::Error::other("the machine was given none")).doing(|| format!("find the disk {disk}"));
    }
    mount(disk, LOWER, "squashfs", READ_ONLY, "").doing(|| {
        format!("mount the root file system (squashfs) of {disk}; what made it, or its disk, damaged it")
    })
}

/// Mounts what all that is written goes to.
pub fn mount_writable() -> Result<(), Failure> {
    make_folder(WRITABLE)?;
    if Path::new(SCRATCH_DISK).exists() {
        // Its inode tables are holes, which read as zeroes: they need not be written.
        mount(SCRATCH_DISK, WRITABLE, "ext4", NO_ATIME, "noinit_itable")
            .doing(|| format!("mount the scratch disk {SCRATCH_DISK} (ext4)"))
    } else {
        // Half of the memory at most, which is the kernel's own bound.
        mount("tmpfs", WRITABLE, "tmpfs", 0, "mode=0755").doing(|| "mount a tmpfs".to_owned())
    }
}

/// Makes a root over the image, and goes into it. `name` is nobody else's in this machine.
pub fn enter(name: &str) -> Result<(), Failure> {
    put_together(name)?;
    move_root(WHOLE).doing(|| "go into the root file system".to_owned())?;
    EARLY.iter().chain(LATE).try_for_each(mount_one)?;
    for (path, mode) in FOLDERS {
        make_folder(path)?;
        fs::set_permissions(path, Permissions::from_mode(*mode))
            .doing(|| format!("set the mode of {path}"))?;
    }
    for (target, link) in LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.doing(|| format!("make the link {link}"))?,
        }
    }
    Ok(())
}

fn put_together(name: &str) -> Result<(), Failure> {
    make_folder(WHOLE)?;
    let [upper, work] = ["upper", "work"].map(|kind| format!("{WRITABLE}/{name}/{kind}"));
    make_folder(&upper)?;
    make_folder(&work)?;
    let of_image = fs::metadata(LOWER).doing(|| format!("look at {LOWER}"))?.permissions();
    fs::set_permissions(&upper, of_image).doing(|| format!("set the mode of {upper}"))?;
    // Nothing of it outlives the machine, so nothing waits for the disk.
    let options = format!("lowerdir={LOWER},upperdir={upper},workdir={work},volatile");
    mount("overlay", WHOLE, "overlay", 0, &options)
        .doing(|| "lay what can be written over the root".to_owned())
}

/// Has the user own what the host has for the action in every root.
pub fn give_folders(uid: u32, gid: u32) -> Result<(), Failure> {
    for path in [WORKSPACE, SCRATCH] {
        chown(path, Some(uid), Some(gid)).doing(|| format!("change the owner of {path}"))?;
    }
    Ok(())
}

fn mount_one((kind, target, flags, options): &Mount) -> Result<(), Failure> {
    make_folder(target)?;
    mount(kind, target, kind, *flags, options).doing(|| format!("mount {kind} at {target}"))
}

fn make_folder(path: &str) -> Result<(), Failure> {
    fs::create_dir_all(path).doing(|| format!("make the folder {path}"))
}

/// Writes who this machine and its neighbours are, whatever the image says.
pub fn write_hosts(host_name: &str, names: &[String]) -> Result<(), Failure> {
    let mut text = String::from("127.0.0.1 localhost");
    for name in names.iter().map(String::as_str).chain(Some(host_name).filter(|name| !name.is_empty())) {
        let _ = write!(text, " {name}");
    }
    text.push_str("\n::1 localhost\n");
    write_etc("hosts", &text)
}

/// Writes a file in `/etc`, in the place of the image's.
pub fn write_etc(name: &str, text: &str) -> Result<(), Failure> {
    make_folder("/etc")?;
    let path = format!("/etc/{name}");
    // An image may have a link there.
    let _ = fs::remove_file(&path);
    fs::write(&path, text).doing(|| format!("write {path}"))
}
