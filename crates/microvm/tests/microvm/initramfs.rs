//! Initial RAM disks, as the program `cpio` reads them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use sealci_microvm::initramfs::{InitramfsStore, archive};
use sealci_microvm::kernel::Module;

use crate::lab::program;

fn modules() -> Vec<Module> {
    let module = |name: &str, bytes: &[u8]| Module { name: name.to_owned(), bytes: bytes.to_vec() };
    vec![module("virtio", b"\x7fELF1"), module("virtio_blk", b"\x7fELF22")]
}

#[test]
fn cpio_unpacks_what_was_packed() {
    let Some(cpio) = program("cpio", "an initial RAM disk is read by cpio") else { return };
    let folder = tempfile::tempdir().unwrap();
    let store = InitramfsStore::open(&folder.path().join("kept")).unwrap();
    let initramfs = store.obtain(b"#!init", &modules()).unwrap();
    let status = Command::new(cpio)
        // Only root can make a device.
        .args(["--extract", "--quiet", "--make-directories", "--format=newc", "--nonmatching", "dev/*"])
        .current_dir(&folder)
        .stdin(Stdio::from(fs::File::open(initramfs.path()).unwrap()))
        .status()
        .unwrap();
    assert!(status.success());
    let list = Command::new("cpio")
        .args(["--list", "--verbose", "--quiet"])
        .stdin(Stdio::from(fs::File::open(initramfs.path()).unwrap()))
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let null = list.lines().find(|line| line.ends_with(" dev/null")).unwrap();
    assert!(null.starts_with("crw-rw-rw-") && null.contains("1,   3"), "{null}");
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    assert_eq!(read("init"), b"#!init");
    assert_eq!(read("modules/virtio.ko"), b"\x7fELF1");
    assert_eq!(read("modules/virtio_blk.ko"), b"\x7fELF22");
    assert_eq!(read("modules/order"), b"virtio\nvirtio_blk\n");
    let mode = fs::metadata(folder.path().join("init")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}

#[test]
fn equal_input_gives_equal_bytes_and_one_file() {
    assert_eq!(archive(b"init", &modules()).unwrap(), archive(b"init", &modules()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let store = InitramfsStore::open(folder.path()).unwrap();
    let first = store.obtain(b"init", &modules()).unwrap();
    let same = store.obtain(b"init", &modules()).unwrap();
    assert_eq!(first.path(), same.path());
    let mut other_order = modules();
    other_order.reverse();
    let other = store.obtain(b"init", &other_order).unwrap();
    assert_ne!(first.path(), other.path());
    drop(other);
    store.clear().unwrap();
    assert!(first.path().exists());
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
}
