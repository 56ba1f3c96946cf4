//! Finds a kernel for microVMs on the host, with the modules that belong to it.
//!
//! One flavour is made for virtual machines and starts soonest: Debian's and Ubuntu's `cloud`. Where there is none of it, the
//! newest kernel is taken whose modules are there. Nothing is downloaded.

mod header;
mod modules;
mod unpacked;

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use header::NotAKernel;
pub use modules::{FOR_MACHINE, Module, Need};
pub use unpacked::{KernelStore, UnpackError, Unpacked};

/// What to install where there is none.
pub const PACKAGE: &str = "linux-image-cloud-amd64";

/// Why there is no kernel, or no module of it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "there is no kernel for microVMs in {}{}; install the package {PACKAGE} (Ubuntu: linux-image-virtual), or name a kernel and the folder with its modules",
        boot.display(), told(reasons)
    )]
    None { boot: PathBuf, reasons: Vec<String> },
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is no kernel for this machine: {reason}", path.display())]
    NotAKernel { path: PathBuf, reason: NotAKernel },
    #[error(
        "the modules of the kernel {} are not in {}; install them (Debian has both in {PACKAGE}), or name the folder that has them",
        image.display(), modules.display()
    )]
    NoModules { image: PathBuf, modules: PathBuf },
    #[error(
        "the kernel {release} has no module `{name}` in {}, and it is not built in; install {PACKAGE}, or take another kernel",
        modules.display()
    )]
    NoModule { release: String, name: String, modules: PathBuf },
    #[error("the module {} cannot be understood: {reason}", path.display())]
    BadModule { path: PathBuf, reason: String },
}

fn told(reasons: &[String]) -> String {
    if reasons.is_empty() { String::new() } else { format!(" ({})", reasons.join("; ")) }
}

/// A kernel, and where its modules are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// A bzImage, or an ELF file that was extracted from one.
    pub image: PathBuf,
    /// As `uname -r` says it: `6.1.0-48-cloud-amd64`.
    pub release: String,
    /// With `kernel` and `modules.builtin` in it.
    pub modules: PathBuf,
}

impl Kernel {
    /// The host's best one: of `boot` (`/boot`) and `modules` (`/lib/modules`).
    pub fn find(boot: &Path, modules: &Path) -> Result<Self, KernelError> {
        let (mut found, mut reasons) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(boot).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) else {
                continue;
            };
            match Self::at(&entry.path(), Some(&modules.join(release))) {
                Ok(kernel) => found.push(kernel),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        reasons.sort();
        found.sort_by(|one, other| preference(&one.release, &other.release));
        found.pop().ok_or_else(|| KernelError::None { boot: boot.to_owned(), reasons })
    }

    /// This one, with the modules of that folder; without one, with those of the host for its release.
    pub fn at(image: &Path, modules: Option<&Path>) -> Result<Self, KernelError> {
        let head =
            header::read(image).map_err(|source| KernelError::Read { path: image.to_owned(), source })?;
        let release = header::release(&head)
            .map_err(|reason| KernelError::NotAKernel { path: image.to_owned(), reason })?;
        let modules = match (modules, &release) {
            (Some(modules), _) => modules.to_owned(),
            (None, Some(release)) => Path::new("/lib/modules").join(release),
            (None, None) => {
                // An ELF file does not say which kernel it is where it is cheap to find.
                let reason = NotAKernel::Nameless;
                return Err(KernelError::NotAKernel { path: image.to_owned(), reason });
            }
        };
        if !modules.join("kernel").is_dir() {
            return Err(KernelError::NoModules { image: image.to_owned(), modules });
        }
        let of_folder = || modules.file_name().and_then(OsStr::to_str).unwrap_or("unknown").to_owned();
        Ok(Self { image: image.to_owned(), release: release.unwrap_or_else(of_folder), modules })
    }

    /// The modules that are needed, and what they need, in the order in which they can be loaded; what is built in is not among them.
    pub fn modules(&self, needs: &[Need]) -> Result<Vec<Module>, KernelError> {
        modules::resolve(self, needs)
    }
}

/// The better is the greater: made for virtual machines, then newer.
fn preference(one: &str, other: &str) -> Ordering {
    let is_made_for_it = |release: &str| release.contains("cloud") || release.contains("virtual");
    is_made_for_it(one).cmp(&is_made_for_it(other)).then_with(|| version(one).cmp(&version(other)))
}

/// `6.1.0-48-cloud-amd64` → 6, 1, 0, 48, 64.
fn version(release: &str) -> Vec<u64> {
    let numbers = release.split(|character: char| !character.is_ascii_digit());
    numbers.filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cloud_flavour_comes_first_and_then_the_newest() {
        let mut releases = [
            "6.12.1-1-amd64",
            "6.1.0-9-cloud-amd64",
            "6.1.0-48-cloud-amd64",
            "6.1.0-100-amd64",
            "5.10.0-30-cloud-amd64",
        ];
        releases.sort_by(|one, other| preference(one, other));
        assert_eq!(
            releases,
            [
                "6.1.0-100-amd64",
                "6.12.1-1-amd64",
                "5.10.0-30-cloud-amd64",
                "6.1.0-9-cloud-amd64",
                "6.1.0-48-cloud-amd64"
            ]
        );
    }
}
