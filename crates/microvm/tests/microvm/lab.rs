//! Makes images, and a store that has unpacked them.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use sealci_image::{Digest, Image, ImageStore, PullPolicy, StoreOptions, Wanted};
use serde_json::json;
use tempfile::TempDir;

/// Says loudly that a test does not run here, and why.
pub fn skipped(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
    if let Ok(file) = std::env::var("SEALCI_SKIPS") {
        let mut file = std::fs::File::options().append(true).create(true).open(file).unwrap();
        file.write_all(format!("{what}: {why}\n").as_bytes()).unwrap();
    }
}

/// A program on the path; none, loudly.
pub fn program(name: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        skipped(what, &format!("there is no {name}"));
    }
    found
}

pub fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A layer's archive, made entry by entry.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub fn file(self, path: &str, content: &[u8]) -> Self {
        self.owned(path, content, 0o644, (0, 0))
    }

    pub fn owned(mut self, path: &str, content: &[u8], mode: u32, (uid, gid): (u64, u64)) -> Self {
        let mut header = header(tar::EntryType::Regular, mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    pub fn folder(mut self, path: &str, mode: u32) -> Self {
        self.0.append_data(&mut header(tar::EntryType::Directory, mode), path, &b""[..]).unwrap();
        self
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.link(tar::EntryType::Symlink, path, target)
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.link(tar::EntryType::Link, path, target)
    }

    pub fn fifo(mut self, path: &str) -> Self {
        self.0.append_data(&mut header(tar::EntryType::Fifo, 0o640), path, &b""[..]).unwrap();
        self
    }

    fn link(mut self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        self.0.append_link(&mut header(kind, 0o777), path, target).unwrap();
        self
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(0);
    header
}

/// An image store, and the images that it can obtain.
pub struct Lab {
    folder: TempDir,
    store: ImageStore,
}

impl Lab {
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let options =
            StoreOptions { images_folder: Some(folder.path().join("images")), ..StoreOptions::default() };
        let store = ImageStore::open(&folder.path().join("store"), options).unwrap();
        Self { folder, store }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Has the store unpack an image of these layers, the lowest first.
    pub async fn image(&self, name: &str, layers: Vec<Layer>) -> Image {
        let blobs = self.folder.path().join("images").join(name).join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8], kind: &str| {
            let digest = Digest::of(bytes);
            std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
            json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": digest.to_string(), "size": bytes.len(),
            })
        };
        let layers: Vec<_> = layers.into_iter().map(|layer| put(&layer.bytes(), "layer.v1.tar")).collect();
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
        let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
        let config = json!({
            "architecture": architecture, "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = put(&serde_json::to_vec(&config).unwrap(), "config.v1+json");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": layers,
        });
        let mut entry = put(&serde_json::to_vec(&manifest).unwrap(), "manifest.v1+json");
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": "it"});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        let layout = blobs.parent().and_then(Path::parent).unwrap();
        std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(layout.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
        let reference = format!("oci:{name}:it").parse().unwrap();
        let wanted = Wanted { reference, pull: PullPolicy::IfMissing };
        self.store.obtain(&wanted, &|_: &str| ()).await.unwrap()
    }
}
