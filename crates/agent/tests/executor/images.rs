//! Images for the tests, made on the spot, of programs of this machine with the libraries that they need.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use async_trait::async_trait;
use sealci_agent::executor::{ExecutorError, Images, Notes};
use sealci_core::plan::Container;
use sealci_image::{Image, ImageConfig, ImageStore, Lease, StoreOptions};
use sha2::{Digest, Sha256};

/// Tells a test that runs as an ordinary user where its image is.
pub const GIVEN: &str = "SEALCI_TEST_IMAGE";

/// Made anew when the list of programs, or what is made of it, changes.
const EDITION: &str = "tools-2";

/// What the tests' commands use.
const PROGRAMS: [&str; 71] = [
    "awk",
    "basename",
    "bash",
    "cat",
    "chmod",
    "chown",
    "chroot",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "dirname",
    "du",
    "echo",
    "env",
    "expr",
    "false",
    "find",
    "getent",
    "grep",
    "head",
    "hostname",
    "id",
    "kill",
    "ln",
    "ls",
    "mkdir",
    "mkfifo",
    "mknod",
    "mktemp",
    "mount",
    "mv",
    "nohup",
    "nproc",
    "nsenter",
    "od",
    "perl",
    "printenv",
    "printf",
    "ps",
    "pwd",
    "readlink",
    "rm",
    "rmdir",
    "sed",
    "seq",
    "setpriv",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "sync",
    "tail",
    "tar",
    "tee",
    "test",
    "timeout",
    "touch",
    "tr",
    "true",
    "umount",
    "uname",
    "uniq",
    "unshare",
    "wc",
    "whoami",
    "xargs",
    "yes",
];

/// Folders that an image of a distribution has.
const FOLDERS: [&str; 15] = [
    "dev",
    "etc",
    "home",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "srv",
    "sys",
    "tmp",
    "usr/local/bin",
    "var/lib",
    "var/tmp",
    "var/cache",
];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbuild:x:1000:100:builder:/home/build:/bin/bash\n\
    nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nvideo:x:44:build\nusers:x:100:\nnogroup:x:65534:\n";

/// A shelf with images by name.
#[derive(Debug)]
pub struct TestImages(Mutex<BTreeMap<String, Image>>);

impl TestImages {
    /// Programs of this machine.
    pub const TOOLS: &str = "tools";

    pub fn empty() -> Self {
        Self(Mutex::default())
    }

    pub fn new() -> Self {
        let images = Self::empty();
        let folder = match std::env::var_os(GIVEN) {
            Some(given) => PathBuf::from(given),
            None => tools_of(nix::unistd::geteuid().as_raw()),
        };
        images.put(Self::TOOLS, image(vec![folder.join("low"), folder.join("high")]));
        images
    }

    /// A real store beside the tests' own images, with the archive `tools.tar`.
    pub fn stored(folder: &Path) -> ImageStore {
        let images = folder.join("images");
        std::fs::create_dir(&images).unwrap();
        save_archive(&images.join("tools.tar"), &Self::new().layers(Self::TOOLS)[0]);
        let options = StoreOptions { images_folder: Some(images), ..StoreOptions::default() };
        ImageStore::open(&folder.join("store"), options).unwrap()
    }

    /// The layers of an image that was put here.
    pub fn layers(&self, name: &str) -> Vec<PathBuf> {
        self.0.lock().unwrap()[name].layers.clone()
    }

    pub fn put(&self, name: &str, image: Image) {
        self.0.lock().unwrap().insert(name.to_owned(), image);
    }
}

#[async_trait]
impl Images for TestImages {
    async fn obtain(&self, container: &Container, notes: &Notes) -> Result<Image, ExecutorError> {
        if container.image == "never" {
            notes.say("this one never comes");
            std::future::pending::<()>().await;
        }
        self.0.lock().unwrap().get(&container.image).cloned().ok_or_else(|| ExecutorError::Image {
            image: container.image.clone(),
            source: "there is no such image".into(),
            disk_full: false,
        })
    }
}

/// An image that says nothing about how to run it but where its programs are.
pub fn image(layers: Vec<PathBuf>) -> Image {
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let env = [("PATH".to_owned(), path.to_owned())].into();
    let config = ImageConfig { env, ..ImageConfig::default() };
    Image { digest: "sha256:0".to_owned(), config, layers, lease: Lease::none() }
}

/// The folder with the layers `low` and `high` of [`TestImages::TOOLS`] for the user's own. Stays for the next test.
pub fn tools_of(user: u32) -> PathBuf {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{EDITION}-{user}"));
    if folder.exists() {
        return folder;
    }
    let partial = tempfile::TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::set_permissions(partial.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let [low, high] = ["low", "high"].map(|name| partial.path().join(name));
    make_tools(&low);
    // The accounts come from the higher layer, with something to hide in the lower one.
    std::fs::create_dir_all(high.join("etc")).unwrap();
    std::fs::write(low.join("etc/passwd"), "wrong\n").unwrap();
    std::fs::write(high.join("etc/passwd"), PASSWD).unwrap();
    std::fs::write(high.join("etc/group"), GROUP).unwrap();
    std::fs::write(low.join("removed"), "").unwrap();
    let whiteout = nix::sys::stat::SFlag::S_IFCHR;
    nix::sys::stat::mknod(&high.join("removed"), whiteout, nix::sys::stat::Mode::empty(), 0).unwrap();
    if user != nix::unistd::geteuid().as_raw() {
        sealci_sandbox::give_away(partial.path(), user, user).unwrap();
    }
    // Another process may have been faster.
    if std::fs::rename(partial.path(), &folder).is_ok() {
        let _ = partial.keep();
    }
    assert!(folder.exists());
    folder
}

fn make_tools(root: &Path) {
    for name in FOLDERS {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    for name in ["tmp", "var/tmp"] {
        std::fs::set_permissions(root.join(name), std::fs::Permissions::from_mode(0o1777)).unwrap();
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        std::fs::create_dir_all(root.join("usr").join(name)).unwrap();
        symlink(format!("usr/{name}"), root.join(name)).unwrap();
    }
    let mut needed = BTreeSet::new();
    for name in PROGRAMS {
        let folders = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        let found = folders.iter().map(|folder| Path::new(folder).join(name)).find(|path| path.exists());
        let Some(program) = found else { continue };
        copy_into(root, &Path::new("/usr/bin").join(name), &program);
        let output = Command::new("ldd").arg(&program).output().unwrap();
        for word in
            String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/'))
        {
            needed.insert(PathBuf::from(word));
        }
    }
    for library in needed {
        copy_into(root, &library, &library);
    }
    let perl = Path::new("/usr/lib/x86_64-linux-gnu/perl-base");
    if perl.is_dir() {
        std::fs::create_dir_all(root.join("usr/lib/x86_64-linux-gnu")).unwrap();
        let copied =
            Command::new("cp").arg("-r").arg(perl).arg(root.join("usr/lib/x86_64-linux-gnu")).status();
        assert!(copied.unwrap().success());
    }
}

/// Copies the file behind a path of this machine to a place of the tree.
fn copy_into(root: &Path, place: &Path, file: &Path) {
    let target = root.join(place.strip_prefix("/").unwrap());
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    if !target.exists() {
        std::fs::copy(file, &target).unwrap();
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
}

/// Writes an archive as `docker save` does, of one layer with the lower half of the tools.
pub fn save_archive(file: &Path, tools: &Path) {
    let work = tempfile::TempDir::new().unwrap();
    let tar = |to: &Path, folder: &Path, names: &[&str]| {
        let made = Command::new("tar").arg("-cf").arg(to).arg("-C").arg(folder).args(names).status();
        assert!(made.unwrap().success());
    };
    tar(&work.path().join("layer.tar"), tools, &["."]);
    let digest = Sha256::digest(std::fs::read(work.path().join("layer.tar")).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let config = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Env": ["PATH=/usr/bin:/bin", "FROM_IMAGE=archive"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    std::fs::write(work.path().join("config.json"), config.to_string()).unwrap();
    let manifest = serde_json::json!([{"Config": "config.json", "Layers": ["layer.tar"]}]);
    std::fs::write(work.path().join("manifest.json"), manifest.to_string()).unwrap();
    tar(file, work.path(), &["manifest.json", "config.json", "layer.tar"]);
}
