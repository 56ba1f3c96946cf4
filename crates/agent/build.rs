//! Builds the programs that the agent carries: a static binary runs in any environment, whatever libc it has.
//!
//! A static binary needs other compiler flags than the agent, so each is a build of its own, in its own target folder: the
//! outer cargo holds the lock of the other one. It resolves nothing and downloads nothing, since they are members of the
//! workspace that is being built, and what they depend on is in its lock file.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// The folder of its crate, its name, and the variable that tells the agent where it is.
const PROGRAMS: [(&str, &str, &str); 2] =
    [("guest", "sealci-init", "SEALCI_INIT_BINARY"), ("vmm", "sealci-vmm", "SEALCI_VMM_BINARY")];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for (folder, name, told_as) in PROGRAMS {
        match build(folder, name) {
            Ok(binary) => println!("cargo::rustc-env={told_as}={}", binary.display()),
            Err(message) => {
                // Cargo shows it as the build's error.
                eprintln!("cannot build {name}: {message}");
                std::process::exit(1);
            }
        }
    }
}

/// Builds one of them; where it is.
fn build(folder: &str, name: &str) -> Result<PathBuf, String> {
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let crates = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("..");
    let crate_folder = crates.join(folder);
    println!("cargo::rerun-if-changed={}", crate_folder.display());

    // Where the agent runs the init runs.
    let target = variable("TARGET")?;
    let target_dir = PathBuf::from(variable("OUT_DIR")?).join("programs");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .args(["build", "--quiet", "--locked", "--offline", "--release", "--bin", name, "--target", &target])
        .arg("--manifest-path")
        .arg(crate_folder.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target_dir);
    for (name, _) in env::vars_os() {
        // What the outer build set for itself: flags, wrappers such as clippy's, features, profile, jobserver's makeflags.
        let name_text = name.to_string_lossy();
        let of_outer_build = [
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET",
        ]
        .contains(&name_text.as_ref())
            || ["CARGO_CFG_", "CARGO_FEATURE_", "CARGO_PROFILE_", "CARGO_PKG_", "CARGO_MANIFEST_"]
                .iter()
                .any(|prefix| name_text.starts_with(prefix));
        if of_outer_build {
            cargo.env_remove(&name);
        }
    }
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    let status = cargo.status().map_err(|error| format!("{cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!("{cargo:?} ended with {status}"));
    }
    Ok(target_dir.join(&target).join("release").join(name))
}
