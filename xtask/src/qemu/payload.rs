//! Builds a test program, and packs what the guest needs of this run.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::base::Base;
use super::{NOT_CORE, Part};
use crate::{machine, oci, workspace};

/// What it does when it has booted.
const SCRIPT: &str = include_str!("guest.sh");
/// What it does at the end.
const OVER: &str = "echo 'guest: over' >&3\nsync\necho o >/proc/sysrq-trigger\nsleep 60\n";
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What guests within the guest are made of.
const FOR_MACHINES: &str = "modprobe kvm_amd || modprobe kvm_intel\n\
    mount -t tracefs tracefs /sys/kernel/tracing\n\
    read -r word < <(exec /sealci/once) && echo \"$word\" >&3\n\
    export SEALCI_TEST_KERNEL=/sealci/vmlinuz SEALCI_TEST_MODULES=/lib/modules/$(uname -r)\n\
    export SEALCI_TEST_VMM=/sealci/sealci-vmm SEALCI_TEST_PEER=/sealci/peer\n\
    export SEALCI_TEST_INIT=/sealci/sealci-init SEALCI_REQUIRE=kvm,root\n\
    export SEALCI_BIN=/sealci/sealci SEALCI_TEST_IMAGES=/sealci/images\n";
/// The parts: the virtual machine monitor; an image's root and our init on it; the executor on all of that.
const MACHINE_PARTS: [(&str, &str, &str); 3] =
    [("machine", "tests", ""), ("whole", "whole", ""), ("microvm", "executor", "microvm")];
const MACHINE_PROGRAMS: &[&str] = &["--test", "machine", "--test", "whole", "--test", "executor"];
/// Of all of them, not of their core: the whole system, on an image of Debian.
const SYSTEM_PART: (&str, &str, &str) = ("system", "machines", "");
/// What is in that image beside Debian's essential packages.
const IN_IMAGE: &str = "tcc,libc6-dev";
/// Left out of their core: what another test reaches, too.
const NOT_CORE_OF_MACHINES: &[&str] = &[
    "a_clone_takes_little",
    "a_kernel_that_panics",
    "a_kernel_that_was_unpacked",
    "a_machine_says_what_is_wrong",
    "a_machine_that_goes_on_has_its_network",
    "a_machine_that_cannot_call",
    "a_machine_without_memory",
    "all_virtual_cpus_go_on",
    "an_image_runs_in_a_machine",
    "file_systems_live_on_disks",
    "little_memory_is_enough",
    "memory_that_the_guest_frees",
    "microvm::exit_codes",
    "microvm::resource_use",
    "microvm::services_are_programs",
    "microvm::services_end",
    "no_action_fails_by_a_template",
    "random_numbers_come",
    "the_machine_can_be_turned_off",
    "two_hundred_actions",
    "what_is_written_takes_memory",
];

/// What machines are measured beside, and what its usual one is started with.
const QEMU: &str = "qemu-system-x86_64";
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin"];

/// Which of the machines' tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Core,
    All,
}

impl Extent {
    fn system(self) -> Option<(&'static str, &'static str, &'static str)> {
        (self == Self::All).then_some(SYSTEM_PART)
    }
}

fn machines_script(extent: Extent) -> String {
    let mut text = format!("{SCRIPT}{FOR_MACHINES}");
    if let Some(seed) = std::env::var("SEALCI_SEED").ok().and_then(|seed| seed.parse::<u64>().ok()) {
        let _ = writeln!(text, "export SEALCI_SEED={seed}");
    }
    for (part, program, filter) in MACHINE_PARTS.into_iter().chain(extent.system()) {
        let _ = write!(text, "TESTS=/sealci/{program} part {part} 0 --test-threads=1");
        for name in NOT_CORE_OF_MACHINES.iter().filter(|_| extent == Extent::Core) {
            let _ = write!(text, " --skip {name}");
        }
        let _ = writeln!(text, " {filter}");
    }
    text + OVER
}

/// Packs the executors' tests.
pub fn executors(folder: &Path, parts: &[Part]) -> Result<PathBuf> {
    let built = Built::by(&["--test", "executor"])?;
    let tree = Tree::begin(folder)?;
    tree.script(&script(parts))?;
    tree.place(&built.find("executor", true)?, "sealci/tests")?;
    // The test program looks for it where it was built.
    tree.place_where_built(&built.find("sealci-sandbox-helper", false)?)?;
    tree.own_folder()?;
    tree.archive()
}

/// Packs the virtual machine monitor and its tests, and the kernel, which is that of the guests within the guest, too.
pub fn machines(folder: &Path, base: &Base, extent: Extent) -> Result<PathBuf> {
    let built = match extent {
        Extent::Core => Built::by(MACHINE_PROGRAMS)?,
        Extent::All => Built::by(&[MACHINE_PROGRAMS, &["--test", "machines"]].concat())?,
    };
    let tree = Tree::begin(folder)?;
    tree.script(&machines_script(extent))?;
    tree.place(&built.find("machine", true)?, "sealci/tests")?;
    tree.place(&built.find("whole", true)?, "sealci/whole")?;
    tree.place(&built.find("executor", true)?, "sealci/executor")?;
    tree.place_where_built(&built.find("sealci-sandbox-helper", false)?)?;
    tree.what_machines_are_made_of(base)?;
    build_alone("crates/vmm/tests/machine/peer.rs", &tree.path.join("sealci/peer"))?;
    if extent == Extent::All {
        tree.place(&built.find("machines", true)?, "sealci/machines")?;
        tree.place(&build_system()?, "sealci/sealci")?;
        let layer = folder.join("debian.tar");
        oci::debian("essential", IN_IMAGE, &layer)?;
        oci::layout(&tree.path.join("sealci/images/debian"), [layer])?;
    }
    tree.archive()
}

/// Packs what machines are measured with: QEMU, too.
pub fn measured_machines(folder: &Path, base: &Base) -> Result<PathBuf> {
    let built = Built::by(&["--bench", "machines"])?;
    let tree = Tree::begin(folder)?;
    tree.script(&format!(
        "{SCRIPT}{FOR_MACHINES}SEALCI_BENCH_QEMU=/sealci/qemu TESTS=/sealci/measured part measured 0\n{OVER}"
    ))?;
    tree.place(&built.find("machines", true)?, "sealci/measured")?;
    tree.what_machines_are_made_of(base)?;
    let qemu = machine::find(QEMU).with_context(|| format!("{QEMU} is not installed"))?;
    tree.copy(&qemu, &format!("sealci/qemu/{QEMU}"))?;
    for library in libraries(&qemu)? {
        let name = library.file_name().context("a library has no name")?.to_string_lossy().into_owned();
        tree.copy(&library, &format!("sealci/qemu/lib/{name}"))?;
    }
    for name in FIRMWARE {
        let places = ["/usr/share/qemu", "/usr/share/seabios"].map(|place| Path::new(place).join(name));
        let file = places.iter().find(|file| file.exists()).with_context(|| format!("no {name} of QEMU"))?;
        tree.copy(file, &format!("sealci/qemu/share/{name}"))?;
    }
    tree.archive()
}

/// What a program is linked with, but for the C library, which has to be the system's.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let paths = text.lines().filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next());
    let of_system = ["libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "libresolv.so"];
    let is_own = |path: &&str| !of_system.iter().any(|name| path.contains(name));
    Ok(paths.filter(|path| path.starts_with('/')).filter(is_own).map(PathBuf::from).collect())
}

/// Builds the whole system, as the end-to-end tests do.
fn build_system() -> Result<PathBuf> {
    let status = workspace::cargo().args(["build", "--quiet", "--locked", "--bin", "sealci"]).status();
    let status = status.context("cannot run cargo")?;
    if !status.success() {
        bail!("sealci could not be built: cargo ended with {status}");
    }
    Ok(workspace::target_folder()?.join("debug/sealci"))
}

/// Builds a program as the agent carries it: static. Its flags are not the workspace's, so its folder is not either.
fn build_static(package: &str, name: &str) -> Result<PathBuf> {
    let folder = workspace::target_folder()?.join("static");
    let status = workspace::cargo()
        .args(["build", "--quiet", "--locked", "--release", "--package", package, "--bin", name])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&folder)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("{name} could not be built: cargo ended with {status}");
    }
    Ok(folder.join(TARGET).join("release").join(name))
}

/// Builds a program of one file, without crates, and static.
fn build_alone(source: &str, to: &Path) -> Result<()> {
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition=2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"]);
    let status = rustc.arg(to).arg(workspace::root().join(source)).status().context("cannot run rustc")?;
    if status.success() { Ok(()) } else { bail!("rustc ended with {status}") }
}

/// What becomes the guest's disk, on its way there.
struct Tree {
    path: PathBuf,
    archive: PathBuf,
}

impl Tree {
    fn begin(folder: &Path) -> Result<Self> {
        let path = folder.join("payload");
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(path.join("sealci"))?;
        Ok(Self { path, archive: folder.join("payload.tar") })
    }

    fn script(&self, text: &str) -> Result<()> {
        Ok(fs::write(self.path.join("sealci/guest.sh"), text)?)
    }

    fn place(&self, program: &Path, to: &str) -> Result<()> {
        place(program, &self.path.join(to))
    }

    fn place_where_built(&self, program: &Path) -> Result<()> {
        place(program, &self.path.join(program.strip_prefix("/").context("cargo builds at a relative path")?))
    }

    /// The test programs look for their folder where they were built. It is everybody's: they run as more than one user.
    fn own_folder(&self) -> Result<()> {
        let own = workspace::target_folder()?.join("tmp");
        let own = self.path.join(own.strip_prefix("/").context("cargo builds at a relative path")?);
        fs::create_dir_all(&own)?;
        Ok(fs::set_permissions(&own, fs::Permissions::from_mode(0o1777))?)
    }

    fn what_machines_are_made_of(&self, base: &Base) -> Result<()> {
        for (package, program) in [("sealci-vmm", "sealci-vmm"), ("sealci-guest", "sealci-init")] {
            self.copy(&build_static(package, program)?, &format!("sealci/{program}"))?;
        }
        build_alone("xtask/src/qemu/once.rs", &self.path.join("sealci/once"))?;
        self.own_folder()?;
        self.copy(&base.kernel, "sealci/vmlinuz")?;
        let busybox = machine::find("busybox").context("busybox is not installed")?;
        self.copy(&busybox, "usr/bin/busybox")
    }

    fn copy(&self, file: &Path, to: &str) -> Result<()> {
        let to = self.path.join(to);
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(file, to).with_context(|| format!("cannot copy {}", file.display()))?;
        Ok(())
    }

    fn archive(self) -> Result<PathBuf> {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--owner=0", "--group=0", "--mode=a+rX", "--file"]).arg(&self.archive);
        let status = tar.arg("--directory").arg(&self.path).arg(".").status().context("cannot run tar")?;
        if !status.success() {
            bail!("tar ended with {status}");
        }
        fs::remove_dir_all(&self.path)?;
        Ok(self.archive)
    }
}

/// Copies a program without its debug information, which is most of it.
fn place(program: &Path, to: &Path) -> Result<()> {
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    let stripped = Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(program).status();
    if !stripped.is_ok_and(|status| status.success()) {
        fs::copy(program, to).with_context(|| format!("cannot copy {}", program.display()))?;
    }
    Ok(())
}

fn script(parts: &[Part]) -> String {
    let mut text = String::from(SCRIPT);
    for part in parts {
        let _ = write!(text, "SEALCI_REQUIRE={} part {} {}", part.required, part.name, part.uid);
        for name in NOT_CORE.iter().chain(part.without) {
            let _ = write!(text, " --skip {name}");
        }
        for name in part.executors {
            let _ = write!(text, " {name}");
        }
        text.push('\n');
    }
    text.push_str(OVER);
    text
}

/// What cargo has built.
struct Built(Vec<Value>);

impl Built {
    /// Builds these programs for tests, and what they run. Of the whole workspace, so that what `cargo xtask test` has built is not
    /// built with other features once more.
    fn by(targets: &[&str]) -> Result<Self> {
        let output = workspace::cargo()
            .args(["test", "--workspace"])
            .args(targets)
            .args(["--locked", "--no-run", "--message-format=json-render-diagnostics"])
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        if !output.status.success() {
            bail!("cargo test --no-run ended with {}", output.status);
        }
        let lines = output.stdout.split(|byte| *byte == b'\n');
        Ok(Self(lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()))
    }

    /// A program of its own has tests of its own, which are another program of the same name.
    fn find(&self, name: &str, is_test: bool) -> Result<PathBuf> {
        let is_meant =
            |message: &&Value| message["target"]["name"] == name && message["profile"]["test"] == is_test;
        let path = self.0.iter().filter(is_meant).find_map(|message| message["executable"].as_str());
        path.map(PathBuf::from).with_context(|| format!("cargo built no program `{name}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_ends_with_its_parts() {
        let part = Part { name: "user", uid: 7, executors: &["a::"], without: &["b::"], required: "root" };
        let text = script(&[part]);
        assert!(text.contains("\nSEALCI_REQUIRE=root part user 7 --skip "), "{text}");
        assert!(text.contains(" --skip b:: a::\necho 'guest: over'"), "{text}");
    }
}
