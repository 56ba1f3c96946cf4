//! Keeps images on disk: within the budget, in use by several, through full disks, power cuts and processes that are killed.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sealci_image::{Collected, ImageError, ImageStore, StoreOptions};
use tempfile::TempDir;

use crate::lab::*;
use crate::scripted::Scripted;

const MIB: usize = 1 << 20;

fn sized(name: &str, mebibytes: usize) -> (Vec<u8>, Packing) {
    (Archive::new().file(name, &vec![b'x'; mebibytes * MIB]).bytes(), Packing::Zstd)
}

fn options_with(images: &Path, budget_mebibytes: usize) -> StoreOptions {
    StoreOptions {
        images_folder: Some(images.to_owned()),
        budget_bytes: (budget_mebibytes * MIB) as u64,
        ..options()
    }
}

/// Images `a` and `b` with a base of 2 MiB in common and 2 MiB of their own, and `c` of 2 MiB alone.
fn three_images() -> TempDir {
    let images = TempDir::new().unwrap();
    let a = image(&[sized("base", 2), sized("a", 2)]);
    let b = image(&[sized("base", 2), sized("b", 2)]);
    let c = image(&[sized("c", 2)]);
    write_layout(&images.path().join("it"), &[("a", &a), ("b", &b), ("c", &c)]);
    images
}

/// As if it had been used so many hours ago.
fn used_before(lab: &Lab, reference: &str, hours: u64) {
    let name = sealci_image::Digest::of(reference.as_bytes());
    let file = std::fs::File::open(lab.path().join("images").join(format!("{}.json", name.hex()))).unwrap();
    file.set_modified(std::time::SystemTime::now() - Duration::from_secs(3600 * hours)).unwrap();
}

#[tokio::test]
async fn what_was_used_longest_ago_goes_first() {
    let images = three_images();
    let lab = Lab::new(options_with(images.path(), 100));
    for (name, hours) in [("oci:it:a", 3), ("oci:it:b", 2), ("oci:it:c", 1)] {
        drop(obtain(&lab.store, name).await.unwrap());
        used_before(&lab, name, hours);
    }
    // Using it makes it recent.
    drop(obtain(&lab.store, "oci:it:a").await.unwrap());
    lab.store.close().await;
    std::fs::write(lab.path().join("layers/README"), "not ours").unwrap();
    std::fs::write(lab.path().join("partial/other"), "not ours").unwrap();
    assert_eq!(
        lab.store.collect().await.unwrap(),
        Collected { kept_bytes: kept(&lab).await, ..Collected::default() }
    );
    let collect = async |budget| {
        let store = ImageStore::open(&lab.path(), options_with(images.path(), budget)).unwrap();
        let collected = store.collect().await.unwrap();
        (collected.images, collected.layers)
    };
    // Of `b` only its own layer: `a` needs the base as well.
    assert_eq!(collect(7).await, (1, 1));
    assert_eq!(collect(5).await, (1, 1));
    assert_eq!(collect(0).await, (1, 2));
    assert_eq!((lab.names("layers"), lab.names("partial")), (vec!["README".into()], vec!["other".into()]));
    assert_eq!(read(&obtain(&lab.store, "oci:it:a").await.unwrap(), 1, "a").len(), 2 * MIB);
}

async fn kept(lab: &Lab) -> u64 {
    lab.store.size_bytes().await.unwrap()
}

#[tokio::test]
async fn what_is_in_use_stays() {
    let images = three_images();
    let lab = Lab::new(options_with(images.path(), 0));
    let a = obtain(&lab.store, "oci:it:a").await.unwrap();
    drop(obtain(&lab.store, "oci:it:b").await.unwrap());
    let clone = a.clone();
    drop(a);
    lab.store.close().await;
    // Another process's store is no different.
    let other = ImageStore::open(&lab.path(), options_with(images.path(), 0)).unwrap();
    for store in [&lab.store, &other] {
        store.collect().await.unwrap();
        assert_eq!(read(&clone, 0, "base").len(), 2 * MIB);
        assert_eq!(lab.names("layers").len(), 2);
        // It can still be had: its record stayed.
        obtain(store, "oci:it:a").await.unwrap();
    }
    drop(clone);
    other.collect().await.unwrap();
    assert_eq!((lab.names("layers").len(), lab.names("images").len(), lab.names("trash").len()), (0, 0, 0));
}

#[tokio::test]
async fn a_pull_over_the_budget_makes_room() {
    let images = three_images();
    let lab = Lab::new(options_with(images.path(), 5));
    for name in ["oci:it:a", "oci:it:c"] {
        drop(obtain(&lab.store, name).await.unwrap());
        lab.store.close().await;
    }
    assert!(kept(&lab).await < (5 * MIB) as u64);
    assert_eq!(lab.names("images").len(), 1);
}

#[tokio::test]
async fn equal_layers_are_named_once() {
    let images = TempDir::new().unwrap();
    let (a, b) = (sized("a", 1), sized("b", 1));
    write_layout(&images.path().join("it"), &[("it", &image(&[a.clone(), b, a]))]);
    let lab = Lab::new(options_with(images.path(), 100));
    let image = obtain(&lab.store, "oci:it").await.unwrap();
    assert_eq!(image.layers.len(), 2);
    assert!(image.layers[0].join("b").exists() && image.layers[1].join("a").exists());
}

#[tokio::test]
async fn an_image_of_too_many_bytes_is_refused() {
    let images = three_images();
    let mut options = options_with(images.path(), 100);
    options.max_image_bytes = (3 * MIB) as u64;
    let lab = Lab::new(options);
    let error = obtain(&lab.store, "oci:it:a").await.unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
    obtain(&lab.store, "oci:it:c").await.unwrap();
}

#[tokio::test]
async fn after_a_power_cut_only_what_was_on_the_disk_is_believed() {
    let images = three_images();
    let lab = Lab::new(options_with(images.path(), 100));
    let image = obtain(&lab.store, "oci:it:a").await.unwrap();
    let layers: Vec<_> = image.layers.iter().map(|fs| fs.parent().unwrap().to_owned()).collect();
    drop(image);
    lab.store.close().await;
    for layer in &layers {
        assert!(layer.join("durable").exists());
        // Of another boot of the machine, and torn.
        let facts = std::fs::read_to_string(layer.join("layer.json")).unwrap();
        let mut facts: serde_json::Value = serde_json::from_str(&facts).unwrap();
        facts["boot"] = "another".into();
        std::fs::write(layer.join("layer.json"), facts.to_string()).unwrap();
    }
    std::fs::remove_file(layers[1].join("durable")).unwrap();
    std::fs::write(layers[1].join("fs/a"), "torn").unwrap();
    for record in lab.names("images") {
        std::fs::write(lab.path().join("images").join(record), "{torn").unwrap();
    }
    let again = ImageStore::open(&lab.path(), options_with(images.path(), 100)).unwrap();
    let (image, notes) = obtain_noted(&again, "oci:it:a", sealci_image::PullPolicy::IfMissing).await;
    assert_eq!(read(&image.unwrap(), 1, "a").len(), 2 * MIB);
    assert!(notes[0].contains("1 of 2 layers"), "{notes:?}");
}

#[tokio::test]
async fn a_full_disk_is_said_and_leaves_nothing_half() {
    let Some(disk) = SmallDisk::mount("3m") else { return };
    let images = three_images();
    let folder = disk.0.path().join("store");
    let store = ImageStore::open(&folder, options_with(images.path(), 100)).unwrap();
    let error = obtain(&store, "oci:it:a").await.unwrap_err();
    assert!(matches!(error, ImageError::DiskFull { .. }), "{error:?}");
    assert!(error.to_string().contains("make room"), "{error}");
    store.close().await;
    assert_eq!(std::fs::read_dir(folder.join("staging")).unwrap().count(), 0);
    // So it is for a download.
    let registry = Scripted::start().await;
    registry.serve(
        "a",
        "1",
        &image(&[(Archive::new().file("a", &noise(4 * MIB, 5)).bytes(), Packing::Gzip)]),
    );
    let mut options = options_with(images.path(), 100);
    options.registries.insecure.insert(registry.host.clone());
    let other = ImageStore::open(&folder, options).unwrap();
    let error = obtain(&other, &registry.name("a:1")).await.unwrap_err();
    assert!(matches!(error, ImageError::DiskFull { .. }), "{error:?}");
    // With room again everything goes on.
    disk.grow("30m");
    obtain(&other, &registry.name("a:1")).await.unwrap();
    obtain(&store, "oci:it:a").await.unwrap();
    store.close().await;
    other.close().await;
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let options = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder.path()).output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(folder));
        }
        skipped("a full disk under the image store", "a file system can be mounted by root only");
        None
    }

    fn grow(&self, size: &str) {
        let options = format!("remount,size={size}");
        let grown = Command::new("mount").args(["-o", &options]).arg(self.0.path()).status();
        assert!(grown.unwrap().success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn overlayfs_sees_what_the_layers_mean() {
    let bottom = Archive::new().file("etc/hidden", b"x").file("etc/kept", b"x").file("opt/hidden", b"x");
    let bottom = bottom.file("gone/hidden", b"x").file("file", b"old");
    let top = Archive::new().file("etc/.wh.hidden", b"").folder("opt/").file("opt/.wh..wh..opq", b"");
    let top = top.file("opt/new", b"x").file(".wh.gone", b"").file("file", b"new");
    let images = TempDir::new().unwrap();
    let made = image(&[(bottom.bytes(), Packing::Gzip), (top.bytes(), Packing::Gzip)]);
    write_layout(&images.path().join("it"), &[("it", &made)]);
    let lab = Lab::new(options_with(images.path(), 100));
    let image = obtain(&lab.store, "oci:it").await.unwrap();
    let mount = TempDir::new().unwrap();
    let layers = format!("lowerdir={}:{}", image.layers[1].display(), image.layers[0].display());
    let text = "mount -t overlay overlay -o \"$1,userxattr\" \"$2\" && cd \"$2\" && find . -type f | sort && cat file";
    let as_root = rustix::process::geteuid().is_root();
    let output = Command::new("unshare")
        .args(if as_root { &["--mount"][..] } else { &["--mount", "--user", "--map-root-user"] })
        .args(["sh", "-c", text, "sh", &layers])
        .arg(mount.path())
        .output()
        .unwrap();
    if !output.status.success() {
        return skipped("layers under overlayfs", String::from_utf8_lossy(&output.stderr).trim());
    }
    assert_eq!(String::from_utf8_lossy(&output.stdout), "./etc/kept\n./file\n./opt/new\nnew");
}

/// The folder of the store, that of the images, and a registry.
const CHILD: &str = "SEALCI_TEST_KILLED_STORE";

/// What is killed by `a_store_survives_kill_9`: obtains, removes, and begins again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_child() {
    let Ok(folders) = std::env::var(CHILD) else { return };
    let [store, images, host] = folders.splitn(3, ':').collect::<Vec<_>>().try_into().unwrap();
    println!("ready");
    loop {
        let mut options = options_with(Path::new(images), 0);
        options.registries.insecure.insert(host.to_owned());
        let store = ImageStore::open(Path::new(store), options).unwrap();
        for name in [&format!("{host}/a:1"), "oci:it:a", "oci:it:b", "oci:it:c"] {
            obtain(&store, name).await.unwrap();
        }
        store.close().await;
        store.collect().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_survives_kill_9() {
    let seed: u64 =
        std::env::var("SEALCI_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("SEALCI_SEED={seed}");
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let images = three_images();
    let registry = Scripted::start().await;
    let pulled = Archive::new().file("a", &noise(4 * MIB, 5)).bytes();
    registry.serve("a", "1", &image(&[(pulled, Packing::Gzip), sized("b", 2)]));
    let options = || {
        let mut options = options_with(images.path(), 100);
        options.registries.insecure.insert(registry.host.clone());
        options
    };
    let lab = Lab::new(options());
    for _ in 0..10 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "keeping::killed_child", "--nocapture"])
            .env(CHILD, format!("{}:{}:{}", lab.path().display(), images.path().display(), registry.host))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        while !line.contains("ready") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut output, &mut line).unwrap() > 0, "the child ended");
        }
        // A moment at random is what this test is about.
        std::thread::sleep(Duration::from_micros(rand::Rng::random_range(&mut random, 0..200_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        let store = ImageStore::open(&lab.path(), options()).unwrap();
        let image = obtain(&store, &registry.name("a:1")).await.unwrap();
        assert_eq!(std::fs::read(image.layers[0].join("a")).unwrap(), noise(4 * MIB, 5), "seed {seed}");
        for (name, file) in [("a", "a"), ("b", "b"), ("c", "c")] {
            let image = obtain(&store, &format!("oci:it:{name}")).await.unwrap();
            let top = image.layers.last().unwrap().join(file);
            assert_eq!(std::fs::read(top).unwrap(), vec![b'x'; 2 * MIB], "seed {seed}");
        }
        store.close().await;
        for part in ["staging", "trash", "partial"] {
            assert_eq!(lab.names(part), Vec::<String>::new(), "{part}, seed {seed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_of_several_processes_share_a_folder() {
    let images = three_images();
    let lab = Lab::new(options_with(images.path(), 100));
    let mut all = tokio::task::JoinSet::new();
    for index in 0..12 {
        // Each store knows nothing of the others, as in processes of their own; some remove all the time.
        let store =
            ImageStore::open(&lab.path(), options_with(images.path(), if index % 3 == 0 { 0 } else { 100 }));
        let store = store.unwrap();
        all.spawn(async move {
            for name in ["a", "b", "c", "b", "a"] {
                let image = obtain(&store, &format!("oci:it:{name}")).await;
                let image = image.unwrap_or_else(|error| panic!("{error:?}"));
                assert_eq!(read(&image, image.layers.len() - 1, name).len(), 2 * MIB);
                drop(image);
                store.collect().await.unwrap();
            }
            store.close().await;
        });
    }
    all.join_all().await;
}
