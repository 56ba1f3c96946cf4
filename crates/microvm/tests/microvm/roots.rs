//! Roots, held against what `unsquashfs` and, where there is one, the kernel's overlayfs make of the same layers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Barrier};

use sealci_image::{Image, Lease};
use sealci_microvm::root::{RootError, RootStore};

use crate::lab::{Lab, Layer, is_root, output, program, skipped};

static GO_ON: AtomicBool = AtomicBool::new(false);

/// What a test compares of a file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: u32,
    mode: u32,
    owner: (u32, u32),
    /// Of a file, or of a link.
    content: Vec<u8>,
    /// Not of the root, which squashfs dates by itself.
    mtime: i64,
}

fn tree(root: &Path) -> BTreeMap<OsString, Seen> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let content = if metadata.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if metadata.is_file() {
                fs::read(&path).unwrap()
            } else {
                Vec::new()
            };
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let seen = Seen {
                kind: metadata.mode() & 0o170_000,
                mode: metadata.mode() & 0o7777,
                owner: (metadata.uid(), metadata.gid()),
                content,
                mtime: metadata.mtime(),
            };
            found.insert(path.strip_prefix(root).unwrap().into(), seen);
        }
    }
    found
}

/// What no packing makes smaller, and larger than a block.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

async fn layered(lab: &Lab) -> Image {
    let lowest = Layer::new()
        .folder("bin", 0o755)
        .owned("bin/su", b"setuid", 0o4755, (0, 0))
        .owned("home/file", b"of a user", 0o600, (1000, 1001))
        .file("empty", b"")
        .file("large", &noise(700_000))
        .file("zeroes", &vec![0; 400_000])
        .hard_link("also-large", "large")
        .symlink("link", "/etc/../bin/su")
        .symlink("out", "/etc/passwd")
        .fifo("fifo")
        .folder("sticky", 0o1777)
        .file("gone", b"x")
        .file("folder-gone/a", b"x")
        .file("opaque/below", b"x")
        .file("replaced", b"a file")
        .file("made-file/inner", b"x")
        .file("merged/low", b"low");
    let middle = Layer::new()
        .file(".wh.gone", b"")
        .file(".wh.folder-gone", b"")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/above", b"y")
        .folder("replaced", 0o700)
        .file("replaced/inner", b"z")
        .file("merged/middle", b"middle")
        .file(".wh.made-file", b"");
    let highest = Layer::new()
        .file("folder-gone/b", b"again")
        .file("made-file", b"now a file")
        .folder("merged", 0o711)
        .file("merged/low", b"changed")
        .file("name with spaces and \u{e9}", b"1");
    lab.image("layered", vec![lowest, middle, highest]).await
}

#[tokio::test]
async fn a_root_is_what_overlayfs_would_show() {
    let Some(unsquashfs) = program("unsquashfs", "the root is read by squashfs-tools") else { return };
    let lab = Lab::new();
    let image = layered(&lab).await;
    let store = RootStore::open(&lab.path().join("roots")).unwrap();
    let root = store.obtain(&image, &GO_ON).unwrap();
    let unpacked = lab.path().join("unpacked");
    output(Command::new(unsquashfs).args(["-no-progress", "-d"]).arg(&unpacked).arg(root.path()));
    let found = tree(&unpacked);

    let names: Vec<_> = found.keys().map(|name| name.to_str().unwrap()).collect();
    assert_eq!(
        names,
        [
            "also-large",
            "bin",
            "bin/su",
            "empty",
            "fifo",
            "folder-gone",
            "folder-gone/b",
            "home",
            "home/file",
            "large",
            "link",
            "made-file",
            "merged",
            "merged/low",
            "merged/middle",
            "name with spaces and \u{e9}",
            "opaque",
            "opaque/above",
            "out",
            "replaced",
            "replaced/inner",
            "sticky",
            "zeroes",
        ]
    );
    let of = |name: &str| &found[&OsString::from(name)];
    assert_eq!(of("bin/su").mode, 0o4755);
    assert_eq!(of("sticky").mode, 0o1777);
    assert_eq!(of("merged").mode, 0o711);
    assert_eq!(of("also-large").content, noise(700_000));
    assert_eq!(of("zeroes").content, vec![0; 400_000]);
    assert_eq!(of("out").content, b"/etc/passwd");
    assert_eq!(of("merged/low").content, b"changed");
    assert_eq!(of("large").mtime, 1_700_000_000);
    assert_eq!(of("home/file").owner, if is_root() { (1000, 1001) } else { of("empty").owner });

    // The kernel agrees.
    let Some(overlay) = Overlay::mount(&image, lab.path()) else { return };
    assert_eq!(tree(overlay.0.as_path()), found);
}

/// The layers as the executors have them.
struct Overlay(std::path::PathBuf);

impl Overlay {
    fn mount(image: &Image, folder: &Path) -> Option<Self> {
        let place = folder.join("overlay");
        fs::create_dir(&place).unwrap();
        let layers: Vec<_> = image.layers.iter().rev().map(|layer| layer.to_str().unwrap()).collect();
        let options = format!("ro,userxattr,lowerdir={}", layers.join(":"));
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "-o", &options, "overlay"]).arg(&place);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        if !mounted {
            skipped("a root is held against overlayfs", "overlayfs cannot be mounted here");
        }
        mounted.then_some(Self(place))
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test]
async fn the_kernel_can_mount_a_root() {
    let lab = Lab::new();
    let image = layered(&lab).await;
    let store = RootStore::open(&lab.path().join("roots")).unwrap();
    let root = store.obtain(&image, &GO_ON).unwrap();
    let place = lab.path().join("mounted");
    fs::create_dir(&place).unwrap();
    let mut mount = Command::new("mount");
    mount.args(["-t", "squashfs", "-o", "loop,ro"]).arg(root.path()).arg(&place);
    let output = mount.output().unwrap();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return skipped("the kernel mounts a root", &why);
    }
    let _mounted = Overlay(place.clone());
    let found = tree(&place);
    assert_eq!(found.len(), 23);
    assert_eq!(found[&OsString::from("large")].content, noise(700_000));
}

#[tokio::test]
async fn equal_layers_give_equal_bytes() {
    let lab = Lab::new();
    let image = layered(&lab).await;
    let roots = ["one", "other"].map(|name| RootStore::open(&lab.path().join(name)).unwrap());
    let bytes = roots.map(|store| fs::read(store.obtain(&image, &GO_ON).unwrap().path()).unwrap());
    assert!(bytes[0] == bytes[1]);
    // What is there twice is kept once.
    assert!(bytes[0].len() < 900_000, "{}", bytes[0].len());
}

#[tokio::test]
async fn many_who_ask_at_once_have_it_made_once() {
    let lab = Lab::new();
    let image = layered(&lab).await;
    let folder = lab.path().join("roots");
    let start = Arc::new(Barrier::new(8));
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let (image, folder, start) = (image.clone(), folder.clone(), start.clone());
            std::thread::spawn(move || {
                // Each a store of its own, as if it were another process.
                let store = RootStore::open(&folder).unwrap();
                start.wait();
                let root = store.obtain(&image, &GO_ON).unwrap();
                fs::metadata(root.path()).unwrap().ino()
            })
        })
        .collect();
    let inodes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
}

#[tokio::test]
async fn what_is_in_use_is_not_removed() {
    let lab = Lab::new();
    let store = RootStore::open(&lab.path().join("roots")).unwrap();
    let old = lab.image("old", vec![Layer::new().file("a", &noise(100_000))]).await;
    let new = lab.image("new", vec![Layer::new().file("b", &noise(100_000))]).await;
    let in_use = store.obtain(&old, &GO_ON).unwrap();
    let unused = store.obtain(&new, &GO_ON).unwrap().path().to_owned();
    let collected = store.collect(0).unwrap();
    assert_eq!(collected.removed, 1);
    assert!(collected.freed_bytes > 0 && collected.kept_bytes > 0, "{collected:?}");
    assert!(in_use.path().exists() && !unused.exists());
    drop(in_use);
    assert_eq!(store.collect(0).unwrap().kept_bytes, 0);
}

#[tokio::test]
async fn a_death_or_a_wish_to_stop_leaves_nothing_that_is_believed() {
    let lab = Lab::new();
    let image = layered(&lab).await;
    let folder = lab.path().join("roots");
    let store = RootStore::open(&folder).unwrap();
    let stopped = store.obtain(&image, &AtomicBool::new(true)).unwrap_err();
    assert!(matches!(stopped, RootError::Stopped), "{stopped}");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);

    // What a process that died had begun: taken for what it is by whoever comes next.
    let name = store.obtain(&image, &GO_ON).unwrap().path().to_owned();
    let partial = name.with_extension("partial");
    fs::rename(&name, &partial).unwrap();
    fs::write(&partial, vec![7; 5 << 20]).unwrap();
    let root = store.obtain(&image, &GO_ON).unwrap();
    assert!(fs::read(root.path()).unwrap().starts_with(b"hsqs"));
    assert!(!partial.exists());
    fs::write(&partial, b"again").unwrap();
    RootStore::open(&folder).unwrap();
    assert!(!partial.exists() && root.path().exists());
}

#[tokio::test]
async fn a_layer_that_is_gone_is_named() {
    let lab = Lab::new();
    let mut image = layered(&lab).await;
    image.layers = vec![lab.path().join("nowhere")];
    image.lease = Lease::none();
    let store = RootStore::open(&lab.path().join("roots")).unwrap();
    let error = store.obtain(&image, &GO_ON).unwrap_err();
    assert!(error.to_string().contains("nowhere"), "{error}");
    assert_eq!(fs::read_dir(lab.path().join("roots")).unwrap().count(), 0);
}
