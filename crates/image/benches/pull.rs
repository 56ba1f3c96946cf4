//! Measures pulling an image of five layers from a registry on this machine, in turns with `skopeo copy` and `umoci unpack`.
//!
//! `cargo bench -p sealci-image --bench pull` prints one JSON object: the image's size and the medians, or
//! `{"skipped": …}` where one of the programs is missing. Each round of each begins with an empty folder and ends with a tree
//! that can be used.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sealci_image::ImageStore;
use serde_json::json;
use tempfile::TempDir;

#[path = "../tests/image/lab.rs"]
#[allow(dead_code)]
mod lab;

use lab::{Packing, Registry};

const ROUNDS: usize = 5;

/// Real files, of many sizes; each folder is a layer.
const FOLDERS: [&str; 5] =
    ["usr/bin", "usr/include", "usr/share/doc", "usr/share/perl", "usr/lib/x86_64-linux-gnu/perl"];
/// Of a folder no more than so much is taken.
const LAYER_BYTES: u64 = 48 << 20;

#[tokio::main]
async fn main() {
    let programs =
        ["skopeo", "umoci", "docker-registry"].map(|name| lab::program(name, "the benchmark of pulls"));
    if !lab::is_root() || programs.iter().any(Option::is_none) {
        println!("{}", json!({"skipped": "it needs root, skopeo, umoci and docker-registry"}));
        return;
    }
    let (archives, files): (Vec<_>, Vec<u64>) = FOLDERS.iter().map(|folder| layer(folder)).unzip();
    let archives: Vec<_> = archives.into_iter().map(|archive| (archive, Packing::Gzip)).collect();
    let image = lab::image(&archives);
    let (packed, unpacked): (usize, usize) = (
        image.layers.iter().map(|layer| layer.bytes.len()).sum(),
        archives.iter().map(|(archive, _)| archive.len()).sum(),
    );
    let registry = Registry::start("").unwrap();
    registry.push(&image, "five:1");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..=ROUNDS {
        ours.push(pull(&registry).await);
        theirs.push(copy_and_unpack(&registry));
    }
    println!(
        "{}",
        json!({
            "packed_bytes": packed, "unpacked_bytes": unpacked, "files": files.iter().sum::<u64>(),
            "pull_ms": median(ours), "skopeo_umoci_ms": median(theirs),
        })
    );
}

/// The archive of as many of a folder's files as a layer holds, and their number.
fn layer(folder: &str) -> (Vec<u8>, u64) {
    let mut archive = tar::Builder::new(Vec::new());
    archive.mode(tar::HeaderMode::Deterministic);
    let (mut bytes, mut files) = (0, 0);
    let mut folders = vec![Path::new("/").join(folder)];
    while let Some(next) = folders.pop() {
        let mut entries: Vec<_> = std::fs::read_dir(&next).into_iter().flatten().flatten().collect();
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            let kind = entry.file_type().unwrap();
            let size = entry.metadata().unwrap().len();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && bytes + size <= LAYER_BYTES {
                archive.append_path_with_name(entry.path(), entry.path().strip_prefix("/").unwrap()).unwrap();
                bytes += size;
                files += 1;
            }
        }
    }
    (archive.into_inner().unwrap(), files)
}

/// Into a store of its own, until it would survive a crash.
async fn pull(registry: &Registry) -> Duration {
    let folder = TempDir::new().unwrap();
    let begun = Instant::now();
    let store = ImageStore::open(folder.path(), registry.options()).unwrap();
    let image = lab::obtain(&store, &registry.name("five:1")).await.unwrap();
    assert_eq!(image.layers.len(), FOLDERS.len());
    store.close().await;
    begun.elapsed()
}

fn copy_and_unpack(registry: &Registry) -> Duration {
    let folder = TempDir::new().unwrap();
    let (layout, bundle) = (folder.path().join("layout"), folder.path().join("bundle"));
    let begun = Instant::now();
    run(Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"])
        .arg(format!("docker://{}", registry.name("five:1")))
        .arg(format!("oci:{}:it", layout.display())));
    run(Command::new("umoci")
        .arg("unpack")
        .arg("--image")
        .arg(format!("{}:it", layout.display()))
        .arg(&bundle));
    let taken = begun.elapsed();
    assert!(bundle.join("rootfs/usr/bin").is_dir());
    taken
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// In milliseconds; the first was for warming up.
fn median(mut times: Vec<Duration>) -> f64 {
    times.remove(0);
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}
