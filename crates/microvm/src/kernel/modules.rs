//! Collects kernel modules in the order in which they can be loaded.
//!
//! What a module needs stands in the module itself (`depends=` in its `.modinfo`): `modules.dep` is made of it on the machine
//! where a kernel is installed, and so is not there where one was only unpacked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::{Kernel, KernelError};

/// A module is a megabyte at most; what unpacks to more is none.
const MOST_BYTES: u64 = 64 << 20;

/// A module that a machine needs, or only likes to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// With `_` for `-`, as `lsmod` says it.
    pub name: &'static str,
    pub is_optional: bool,
}

const fn must(name: &'static str) -> Need {
    Need { name, is_optional: false }
}

const fn may(name: &'static str) -> Need {
    Need { name, is_optional: true }
}

/// What a machine of our monitor's is started with.
pub const FOR_MACHINE: &[Need] = &[
    must("virtio_mmio"),
    must("virtio_blk"),
    must("squashfs"),
    must("overlay"),
    must("ext4"),
    must("vmw_vsock_virtio_transport"),
    may("virtio_rng"),
    may("virtio_net"),
    may("virtio_balloon"),
];

/// A module, unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    pub name: String,
    pub bytes: Vec<u8>,
}

pub(super) fn resolve(kernel: &Kernel, needs: &[Need]) -> Result<Vec<Module>, KernelError> {
    let tree = Tree::read(kernel)?;
    let mut loading = Loading { tree, loaded: Vec::new(), seen: BTreeSet::new() };
    for need in needs {
        let is_there = loading.tree.files.contains_key(need.name);
        if is_there || !need.is_optional {
            loading.load(need.name)?;
        }
    }
    Ok(loading.loaded)
}

/// What a kernel has.
struct Tree<'a> {
    kernel: &'a Kernel,
    /// Modules by name.
    files: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

struct Loading<'a> {
    tree: Tree<'a>,
    loaded: Vec<Module>,
    seen: BTreeSet<String>,
}

impl Loading<'_> {
    /// Puts a module behind what it needs. Each is taken once, so a circle ends.
    fn load(&mut self, name: &str) -> Result<(), KernelError> {
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.tree.files.get(name) else {
            let Kernel { release, modules, .. } = self.tree.kernel;
            return if self.tree.built_in.contains(name) {
                Ok(())
            } else {
                Err(KernelError::NoModule {
                    release: release.clone(),
                    name: name.to_owned(),
                    modules: modules.clone(),
                })
            };
        };
        let bytes = unpacked(path)?;
        for needed in depends(&bytes) {
            self.load(&needed)?;
        }
        self.loaded.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

impl<'a> Tree<'a> {
    fn read(kernel: &'a Kernel) -> Result<Self, KernelError> {
        let mut files = BTreeMap::new();
        collect(&kernel.modules.join("kernel"), &mut files)?;
        let path = kernel.modules.join("modules.builtin");
        let text = match fs::read_to_string(&path) {
            // Then nothing counts as built in.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            text => text.map_err(|source| KernelError::Read { path, source })?,
        };
        let built_in = text.lines().filter_map(|line| name_of(Path::new(line))).collect();
        Ok(Self { kernel, files, built_in })
    }
}

fn collect(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), KernelError> {
    let error = |source| KernelError::Read { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        if entry.file_type().map_err(error)?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = name_of(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `…/virtio-rng.ko.xz` → `virtio_rng`; none of what is no module.
fn name_of(path: &Path) -> Option<String> {
    let (name, packing) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(packing, "" | ".xz" | ".zst" | ".gz").then(|| name.replace('-', "_"))
}

fn unpacked(path: &Path) -> Result<Vec<u8>, KernelError> {
    let error = |source| KernelError::Read { path: path.to_owned(), source };
    let bad = |reason: &str| KernelError::BadModule { path: path.to_owned(), reason: reason.to_owned() };
    let file = fs::File::open(path).map_err(error)?;
    let reader: Box<dyn Read> = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => Box::new(lzma_rust2::XzReader::new(file, false)),
        Some("zst") => Box::new(zstd::Decoder::new(file).map_err(error)?),
        Some("gz") => return Err(bad("it is packed with gzip, which is not read here")),
        _ => Box::new(file),
    };
    let mut bytes = Vec::new();
    reader.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(bad("it is too large"));
    }
    if bytes.starts_with(b"\x7fELF") { Ok(bytes) } else { Err(bad("it is no ELF file")) }
}

/// Names in the module's `depends=`, which is one of the texts of its `.modinfo`, each with a NUL before and behind it.
fn depends(module: &[u8]) -> Vec<String> {
    let start = b"\0depends=";
    let found = module.windows(start.len()).position(|window| window == start);
    let text = found.and_then(|at| module[at + start.len()..].split(|byte| *byte == 0).next());
    let text = String::from_utf8_lossy(text.unwrap_or_default()).replace('-', "_");
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_what_the_kernel_calls_it() {
        for (path, name) in [
            ("kernel/drivers/char/hw_random/virtio-rng.ko", Some("virtio_rng")),
            ("a/overlay.ko.xz", Some("overlay")),
            ("a/overlay.ko.zst", Some("overlay")),
            ("a/overlay.kobold", None),
            ("modules.order", None),
        ] {
            assert_eq!(name_of(Path::new(path)).as_deref(), name, "{path}");
        }
    }

    #[test]
    fn what_a_module_needs_is_read_from_it() {
        assert_eq!(
            depends(b"\x7fELF..\0license=GPL\0depends=virtio,virtio-ring\0name=x\0"),
            ["virtio", "virtio_ring"]
        );
        for none in [&b"\x7fELF\0depends=\0"[..], b"\x7fELF", b"\0depends="] {
            assert!(depends(none).is_empty());
        }
    }
}
