//! Finds what machines are made of, and makes them.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use sealci_image::{Image, Lease};
use sealci_microvm::initramfs::{Initramfs, InitramfsStore};
use sealci_microvm::kernel::{FOR_MACHINE, Kernel};
use sealci_microvm::root::{Root, RootStore};
use sealci_microvm::scratch;
use tempfile::TempDir;

use crate::host::{Machine, ended_or_killed};

/// What the init calls.
const PORT: &str = "sealci.port=1024";
const PROGRAMS: &[&str] = &[
    "cat", "cut", "date", "dd", "df", "grep", "head", "hostname", "id", "sh", "sleep", "tail", "test",
    "uname",
];

pub struct Lab {
    pub folder: TempDir,
    pub kernel: Kernel,
    vmm: PathBuf,
    initramfs: Initramfs,
    root: Root,
}

/// What a machine is given.
pub struct Wanted {
    pub root: Option<PathBuf>,
    pub scratch_bytes: Option<u64>,
    pub port: &'static str,
}

impl Lab {
    /// None, loudly, where something is missing.
    pub fn open() -> Option<Self> {
        match Self::find() {
            Ok(lab) => Some(lab),
            Err(why) => {
                skip(&why);
                None
            }
        }
    }

    fn find() -> Result<Self, String> {
        let given = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .ok_or(format!("{name} is not set (cargo xtask vm-test)"))
        };
        let (vmm, init) = (given("SEALCI_TEST_VMM")?, given("SEALCI_TEST_INIT")?);
        let (image, modules) = (given("SEALCI_TEST_KERNEL")?, given("SEALCI_TEST_MODULES")?);
        if !Path::new("/dev/kvm").exists() {
            return Err("there is no /dev/kvm".to_owned());
        }
        let folder = TempDir::new().unwrap();
        let kernel = Kernel::at(&image, Some(&modules)).unwrap();
        let init = fs::read(init).unwrap();
        let kept = InitramfsStore::open(&folder.path().join("initramfs")).unwrap();
        let initramfs = kept.obtain(&init, &kernel.modules(FOR_MACHINE).unwrap()).unwrap();
        let image = Image {
            digest: "busybox".to_owned(),
            config: sealci_image::ImageConfig::default(),
            layers: vec![layer(folder.path())?],
            lease: Lease::none(),
        };
        let roots = RootStore::open(&folder.path().join("roots")).unwrap();
        let root = roots.obtain(&image, &AtomicBool::new(false)).unwrap();
        Ok(Self { folder, kernel, vmm, initramfs, root })
    }

    /// The image's root, and nothing else.
    pub fn wanted(&self) -> Wanted {
        Wanted { root: Some(self.root.path().to_owned()), scratch_bytes: None, port: PORT }
    }

    /// Boots one, and waits until it calls.
    pub fn boot(&self, wanted: &Wanted) -> Machine {
        let socket = self.folder.path().join("socket");
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        // Root's machines are nobody.
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let mut command = self.command(wanted);
        command.arg("--vsock").arg(format!("1024={}", socket.display()));
        Machine::new(command.spawn().unwrap(), &listener, socket)
    }

    /// Boots one that nobody listens to, to its end; returns what its console said.
    pub fn boot_deaf(&self, wanted: &Wanted) -> String {
        let mut command = self.command(wanted);
        let child = command.args(["--serial", "-"]).spawn().unwrap();
        ended_or_killed(child)
    }

    fn command(&self, wanted: &Wanted) -> Command {
        let mut command = Command::new(&self.vmm);
        command.arg("--kernel").arg(&self.kernel.image).arg("--initramfs").arg(self.initramfs.path());
        command.arg("--command-line-extra").arg(format!("quiet loglevel=1 {}", wanted.port));
        command.args(["--memory-mib", "256"]);
        if let Some(root) = &wanted.root {
            command.arg("--disk").arg(format!("{}:ro", root.display()));
        }
        if let Some(bytes) = wanted.scratch_bytes {
            let disk = self.folder.path().join("scratch");
            scratch::make(&disk, bytes).unwrap();
            command.arg("--disk").arg(disk);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }
}

/// An image of busybox alone.
fn layer(folder: &Path) -> Result<PathBuf, String> {
    let busybox = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new).into_iter().find(|file| file.exists());
    let busybox = busybox.ok_or("busybox is not installed (apt-get install busybox-static)")?;
    let layer = folder.join("layer");
    fs::create_dir_all(layer.join("bin")).unwrap();
    fs::create_dir_all(layer.join("etc")).unwrap();
    fs::copy(busybox, layer.join("bin/busybox")).unwrap();
    for name in PROGRAMS {
        symlink("busybox", layer.join("bin").join(name)).unwrap();
    }
    fs::write(layer.join("etc/motd"), "of the image\n").unwrap();
    Ok(layer)
}

/// Says loudly what was not tested, and why. Fails where `SEALCI_REQUIRE` names `kvm`.
fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    let required = std::env::var("SEALCI_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name.trim() == "kvm"), "{test} needs kvm: {why}");
    eprintln!("SKIPPED: {test}: {why}");
    if let Some(path) = std::env::var_os("SEALCI_SKIPS") {
        use std::io::Write;
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{test}: {why}").unwrap();
    }
}
