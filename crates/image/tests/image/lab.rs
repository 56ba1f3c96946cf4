//! Makes images, a registry to serve them, and a store to obtain them.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use sealci_image::{
    Digest, Image, ImageError, ImageStore, PullPolicy, Registries, StoreOptions, Timeouts, Wanted,
};
use serde_json::{Value, json};
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

/// Whether files can be given to anybody: not so for root of a small user namespace.
pub fn is_root() -> bool {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    rustix::process::geteuid().is_root() && map.trim_end().ends_with("4294967295")
}

/// Short patience, so that what hangs is told soon.
pub fn options() -> StoreOptions {
    StoreOptions {
        timeouts: Timeouts {
            connect: std::time::Duration::from_secs(5),
            stall: std::time::Duration::from_secs(20),
            retry_after: std::time::Duration::from_millis(1),
            crawl: std::time::Duration::from_secs(20),
            retries: 3,
        },
        ..StoreOptions::default()
    }
}

/// Options for one registry that speaks no TLS.
pub fn options_for(host: &str) -> StoreOptions {
    let registries = Registries { insecure: [host.to_owned()].into(), ..Registries::default() };
    StoreOptions { registries, ..options() }
}

pub fn wanted(reference: &str, pull: PullPolicy) -> Wanted {
    Wanted { reference: reference.parse().unwrap_or_else(|error| panic!("{reference}: {error}")), pull }
}

pub async fn obtain(store: &ImageStore, reference: &str) -> Result<Image, ImageError> {
    store.obtain(&wanted(reference, PullPolicy::IfMissing), &|_: &str| ()).await
}

/// Obtains, and what was said meanwhile.
pub async fn obtain_noted(
    store: &ImageStore,
    reference: &str,
    pull: PullPolicy,
) -> (Result<Image, ImageError>, Vec<String>) {
    let notes = Arc::new(Mutex::new(Vec::new()));
    let heard = notes.clone();
    let note = move |line: &str| heard.lock().unwrap().push(line.to_owned());
    let result = store.obtain(&wanted(reference, pull), &note).await;
    let notes = notes.lock().unwrap().clone();
    (result, notes)
}

/// Bytes that no packing makes smaller.
pub fn noise(bytes: usize, mut seed: u64) -> Vec<u8> {
    let next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 32) as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

/// How a layer's archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub fn pack(self, archive: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => archive.to_vec(),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(archive).unwrap();
                encoder.finish().unwrap()
            }
            Self::Zstd => zstd::encode_all(archive, 1).unwrap(),
        }
    }

    pub fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// A layer's archive, made entry by entry.
pub struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    pub fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    pub fn file(mut self, path: &str, content: &[u8]) -> Self {
        self.put(header(tar::EntryType::Regular, 0o644), path, content);
        self
    }

    pub fn folder(mut self, path: &str) -> Self {
        self.put(header(tar::EntryType::Directory, 0o755), path, b"");
        self
    }

    pub fn link(mut self, kind: tar::EntryType, path: &str, target: &str) -> Self {
        let mut header = header(kind, 0o777);
        literal_link(&mut header, target);
        self.put(header, path, b"");
        self
    }

    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.link(tar::EntryType::Symlink, path, target)
    }

    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.link(tar::EntryType::Link, path, target)
    }

    /// Any header, whose name is written as it is.
    pub fn entry(mut self, header: tar::Header, path: &str, content: &[u8]) -> Self {
        self.put(header, path, content);
        self
    }

    /// pax records for the next entry.
    pub fn pax(mut self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (name, value) in records {
            let rest = name.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length += 1;
            }
            body.extend_from_slice(format!("{length} {name}=").as_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.put(header(tar::EntryType::XHeader, 0o644), "pax", &body);
        self
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.get_mut().extend_from_slice(bytes);
        self
    }

    fn put(&mut self, mut header: tar::Header, path: &str, content: &[u8]) {
        // `set_path` would refuse what these tests want.
        let name = &mut header.as_old_mut().name;
        assert!(path.len() <= name.len(), "{path}");
        name.fill(0);
        name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn header(kind: tar::EntryType, mode: u32) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(0);
    header
}

fn literal_link(header: &mut tar::Header, target: &str) {
    let name = &mut header.as_old_mut().linkname;
    name.fill(0);
    name[..target.len()].copy_from_slice(target.as_bytes());
}

/// One blob of an image.
#[derive(Debug, Clone)]
pub struct Blob {
    pub digest: Digest,
    pub bytes: Vec<u8>,
}

impl Blob {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { digest: Digest::of(&bytes), bytes }
    }

    pub fn json(value: &Value) -> Self {
        Self::new(serde_json::to_vec(value).unwrap())
    }
}

/// An image as its blobs.
#[derive(Debug, Clone)]
pub struct MadeImage {
    pub manifest: Blob,
    pub config: Blob,
    pub layers: Vec<Blob>,
}

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// An image for this machine.
pub fn image(archives: &[(Vec<u8>, Packing)]) -> MadeImage {
    image_for(archives, this_architecture(), json!({"Env": ["A=1"], "Cmd": ["sh"]}))
}

pub fn this_architecture() -> &'static str {
    if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }
}

pub fn image_for(archives: &[(Vec<u8>, Packing)], architecture: &str, config: Value) -> MadeImage {
    let diff_ids: Vec<_> = archives.iter().map(|(archive, _)| Digest::of(archive).to_string()).collect();
    let layers: Vec<_> = archives.iter().map(|(archive, packing)| Blob::new(packing.pack(archive))).collect();
    let packings: Vec<_> = archives.iter().map(|(_, packing)| *packing).collect();
    image_of(layers, &packings, &diff_ids, architecture, config)
}

pub fn image_of(
    layers: Vec<Blob>,
    packings: &[Packing],
    diff_ids: &[String],
    architecture: &str,
    config: Value,
) -> MadeImage {
    let config = Blob::json(&json!({
        "architecture": architecture, "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }));
    let described: Vec<_> =
        layers.iter().zip(packings).map(|(layer, packing)| descriptor(layer, packing.media_type())).collect();
    let manifest = Blob::json(&json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
        "config": descriptor(&config, "application/vnd.oci.image.config.v1+json"), "layers": described,
    }));
    MadeImage { manifest, config, layers }
}

pub fn descriptor(blob: &Blob, media_type: &str) -> Value {
    json!({"mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.bytes.len()})
}

/// Writes an OCI layout with images of these tags.
pub fn write_layout(folder: &Path, images: &[(&str, &MadeImage)]) {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let mut entries = Vec::new();
    for (tag, image) in images {
        for blob in image.layers.iter().chain([&image.config, &image.manifest]) {
            std::fs::write(blobs.join(blob.digest.hex()), &blob.bytes).unwrap();
        }
        let mut entry = descriptor(&image.manifest, MANIFEST_TYPE);
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        entries.push(entry);
    }
    let index = json!({"schemaVersion": 2, "manifests": entries});
    std::fs::write(folder.join("index.json"), serde_json::to_vec(&index).unwrap()).unwrap();
}

/// Debian's registry server on a port of its own.
pub struct Registry {
    server: Child,
    pub host: String,
    _folder: TempDir,
}

impl Registry {
    /// `extra` is more of its configuration. None, loudly, where there is no such server.
    pub fn start(extra: &str) -> Option<Self> {
        let program = program("docker-registry", "pulls from a registry")?;
        self::program("skopeo", "pulls from a registry")?;
        let folder = TempDir::new().unwrap();
        let config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n{extra}",
            folder.path().join("data").display()
        );
        let file = folder.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut server = Command::new(program)
            .arg("serve")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(server.stderr.take().unwrap());
        let mut line = String::new();
        let host = loop {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the registry server ended");
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.chars().take_while(|c| c.is_ascii_digit() || matches!(c, '.' | ':')).collect();
            }
        };
        // Its log is read to the end, so that it never waits.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Some(Self { server, host, _folder: folder })
    }

    /// Pushes an image with `skopeo`.
    pub fn push(&self, image: &MadeImage, name: &str) {
        let layout = TempDir::new().unwrap();
        write_layout(layout.path(), &[("it", image)]);
        self.copy(&format!("oci:{}:it", layout.path().display()), name, &[]);
    }

    pub fn copy(&self, from: &str, name: &str, options: &[&str]) {
        let output = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--preserve-digests"])
            .args(options)
            .args([from, &format!("docker://{}/{name}", self.host)])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn options(&self) -> StoreOptions {
        options_for(&self.host)
    }

    pub fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A store in a folder of its own.
pub struct Lab {
    pub folder: TempDir,
    pub store: ImageStore,
}

impl Lab {
    pub fn new(options: StoreOptions) -> Self {
        let folder = TempDir::new().unwrap();
        let store = ImageStore::open(&folder.path().join("store"), options).unwrap();
        Self { folder, store }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    /// Names in one of the store's folders.
    pub fn names(&self, part: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path().join(part)).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // What goes on behind a pull may still make a file in a folder that is being removed.
        for _ in 0..1000 {
            if std::fs::remove_dir_all(self.folder.path()).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
    }
}

/// What is in a layer.
pub fn read(image: &Image, layer: usize, path: &str) -> String {
    std::fs::read_to_string(image.layers[layer].join(path)).unwrap()
}
