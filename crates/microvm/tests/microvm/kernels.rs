//! Kernels in folders that look like a host's, and the host's own where it has one.

use std::fs;
use std::path::Path;

use sealci_microvm::kernel::{FOR_MACHINE, Kernel, KernelError, Need, PACKAGE};
use tempfile::TempDir;

use crate::lab::skipped;

const CLOUD: &str = "6.1.0-48-cloud-amd64";

/// A folder with `boot` and `modules`.
fn host() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("boot")).unwrap();
    folder
}

fn find(host: &TempDir) -> Result<Kernel, KernelError> {
    Kernel::find(&host.path().join("boot"), &host.path().join("modules"))
}

fn install_image(host: &TempDir, release: &str) {
    let mut image = vec![0; 0x400];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    image[0x236] = 1;
    image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    image[0x300..0x300 + release.len()].copy_from_slice(release.as_bytes());
    fs::write(host.path().join("boot").join(format!("vmlinuz-{release}")), image).unwrap();
}

fn install_module(host: &TempDir, release: &str, file: &str, depends: &str) {
    let path = host.path().join("modules").join(release).join("kernel").join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let bytes = format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0").into_bytes();
    let packed = match path.extension().unwrap().to_str().unwrap() {
        "zst" => zstd::encode_all(&bytes[..], 1).unwrap(),
        _ => bytes,
    };
    fs::write(path, packed).unwrap();
}

fn built_in(host: &TempDir, release: &str, text: &str) {
    let folder = host.path().join("modules").join(release);
    fs::create_dir_all(folder.join("kernel")).unwrap();
    fs::write(folder.join("modules.builtin"), text).unwrap();
}

fn must(name: &'static str) -> Need {
    Need { name, is_optional: false }
}

#[test]
fn modules_come_behind_what_they_need_and_once() {
    let host = host();
    install_image(&host, CLOUD);
    install_module(&host, CLOUD, "drivers/virtio/virtio.ko", "");
    install_module(&host, CLOUD, "drivers/virtio/virtio_ring.ko.zst", "");
    install_module(&host, CLOUD, "drivers/virtio/virtio-mmio.ko", "virtio,virtio_ring");
    install_module(&host, CLOUD, "drivers/block/virtio_blk.ko.zst", "virtio,virtio_ring");
    built_in(&host, CLOUD, "kernel/fs/ext4/ext4.ko\n");
    let kernel = find(&host).unwrap();
    assert_eq!(kernel.release, CLOUD);
    let needs = [
        must("virtio_mmio"),
        must("ext4"),
        must("virtio_blk"),
        Need { name: "virtio_rng", is_optional: true },
    ];
    let modules = kernel.modules(&needs).unwrap();
    let names: Vec<_> = modules.iter().map(|module| &module.name[..]).collect();
    assert_eq!(names, ["virtio", "virtio_ring", "virtio_mmio", "virtio_blk"]);
    assert!(modules.iter().all(|module| module.bytes.starts_with(b"\x7fELF")));
}

#[test]
fn what_is_missing_is_said_with_the_package_to_install() {
    let host = host();
    let error = find(&host).unwrap_err().to_string();
    assert!(error.contains(PACKAGE), "{error}");
    // A kernel without its modules is none, and named.
    install_image(&host, CLOUD);
    let error = find(&host).unwrap_err().to_string();
    assert!(error.contains(PACKAGE) && error.contains(&format!("vmlinuz-{CLOUD}")), "{error}");
    built_in(&host, CLOUD, "");
    let error = find(&host).unwrap().modules(FOR_MACHINE).unwrap_err().to_string();
    assert!(error.contains("`virtio_mmio`") && error.contains(PACKAGE), "{error}");
    // One that ends in the middle.
    fs::write(host.path().join("boot").join(format!("vmlinuz-{CLOUD}")), b"MZ").unwrap();
    let error = find(&host).unwrap_err().to_string();
    assert!(error.contains("damaged"), "{error}");
}

#[test]
fn a_module_that_is_no_module_is_named() {
    let host = host();
    install_image(&host, CLOUD);
    install_module(&host, CLOUD, "fs/overlayfs/overlay.ko", "");
    let path = host.path().join("modules").join(CLOUD).join("kernel/fs/overlayfs/overlay.ko");
    fs::write(&path, "<html>").unwrap();
    let error = find(&host).unwrap().modules(&[must("overlay")]).unwrap_err();
    assert!(error.to_string().contains("overlay.ko"), "{error}");
}

#[test]
fn the_hosts_own_kernel_has_what_a_machine_needs() {
    let what = "the host's kernel is found";
    match Kernel::find(Path::new("/boot"), Path::new("/lib/modules")) {
        Err(KernelError::None { .. }) => skipped(what, "no kernel is installed"),
        Err(error) => skipped(what, &error.to_string()),
        Ok(kernel) => {
            let modules = kernel.modules(FOR_MACHINE).unwrap();
            let place = |name: &str| modules.iter().position(|module| module.name == name);
            assert!(place("virtio_ring") < place("virtio_blk"), "{}", kernel.release);
        }
    }
}
