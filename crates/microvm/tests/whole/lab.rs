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
/// The same, and what it calls to be saved.
const SAVED_PORT: &str = "sealci.port=1024 sealci.snapshot=1025";
const MADE_OF: &str = "busybox";
pub const MEBIBYTES: u64 = 256;
const PROGRAMS: &[&str] = &[
    "cat", "cut", "date", "dd", "df", "grep", "head", "hostname", "id", "sh", "sleep", "tail", "test",
    "uname",
];

pub struct Lab {
    pub folder: TempDir,
    pub kernel: Kernel,
    /// That kernel's image, or what was unpacked of it.
    pub image: PathBuf,
    pub initramfs: Initramfs,
    pub vmm: PathBuf,
    root: Root,
}

/// What a machine is given.
#[derive(Clone)]
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
        let of_busybox = Image {
            digest: "busybox".to_owned(),
            config: sealci_image::ImageConfig::default(),
            layers: vec![layer(folder.path())?],
            lease: Lease::none(),
        };
        let roots = RootStore::open(&folder.path().join("roots")).unwrap();
        let root = roots.obtain(&of_busybox, &AtomicBool::new(false)).unwrap();
        Ok(Self { folder, kernel, image, initramfs, vmm, root })
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

    /// Has one be saved before it calls; the folder.
    pub fn save(&self, wanted: &Wanted) -> PathBuf {
        let folder = self.folder.path().join("snapshot");
        let mut command = self.command(&Wanted { port: SAVED_PORT, ..wanted.clone() });
        command.args(["--made-of", MADE_OF, "--snapshot"]).arg(format!("1025={}", folder.display()));
        let console = ended_or_killed(command.spawn().unwrap());
        assert!(folder.join("state").exists(), "{console}");
        folder
    }

    /// Has one of this name go on, and waits until it calls.
    pub fn go_on(&self, snapshot: &Path, wanted: &Wanted, name: &str) -> Machine {
        let socket = self.folder.path().join(format!("{name}.socket"));
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let mut command = Command::new(&self.vmm);
        command.arg("--restore").arg(snapshot).args(["--made-of", MADE_OF]);
        self.add_disks(&mut command, wanted, name);
        command.arg("--vsock").arg(format!("1024={}", socket.display()));
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        Machine::new(command.spawn().unwrap(), &listener, socket)
    }

    /// Boots one that nobody listens to, to its end; returns what its console said.
    pub fn boot_deaf(&self, wanted: &Wanted) -> String {
        let mut command = self.command(wanted);
        let child = command.args(["--serial", "-"]).spawn().unwrap();
        ended_or_killed(child)
    }

    pub fn command(&self, wanted: &Wanted) -> Command {
        let mut command = Command::new(&self.vmm);
        command.arg("--kernel").arg(&self.image).arg("--initramfs").arg(self.initramfs.path());
        command.arg("--command-line-extra").arg(format!("quiet loglevel=1 {}", wanted.port));
        command.arg("--memory-mib").arg(MEBIBYTES.to_string());
        self.add_disks(&mut command, wanted, "scratch");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    fn add_disks(&self, command: &mut Command, wanted: &Wanted, name: &str) {
        if let Some(root) = &wanted.root {
            command.arg("--disk").arg(format!("{}:ro", root.display()));
        }
        if let Some(bytes) = wanted.scratch_bytes {
            let disk = self.folder.path().join(name);
            // That of a machine that is gone.
            let _ = fs::remove_file(&disk);
            scratch::make(&disk, bytes).unwrap();
            command.arg("--disk").arg(disk);
        }
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

/// The process that runs the guest: the one that was started has no other child.
pub fn process_of(keeper: u32) -> String {
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
    children.trim().to_owned()
}

/// What it does not share with any other.
pub fn private_kibibytes(keeper: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process_of(keeper))).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
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
