//! Builds `sealci-init`, which the agent carries: a static binary runs in any environment, whatever libc it has.
//!
//! A static binary needs other compiler flags than the agent, so it is a build of its own, in its own target folder: the
//! outer cargo holds the lock of the other one. It resolves nothing and downloads nothing, since it is a member of the
//! workspace that is being built and its dependencies are the agent's, too.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    if let Err(message) = build() {
        // Cargo shows it as the build's error.
        eprintln!("cannot build sealci-init: {message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let guest = manifest_dir.join("../guest");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", guest.display());

    // Where the agent runs the init runs.
    let target = variable("TARGET")?;
    let target_dir = PathBuf::from(variable("OUT_DIR")?).join("init");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .args([
            "build",
            "--quiet",
            "--locked",
            "--offline",
            "--release",
            "--bin",
            "sealci-init",
            "--target",
            &target,
        ])
        .arg("--manifest-path")
        .arg(guest.join("Cargo.toml"))
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
    let binary = target_dir.join(&target).join("release/sealci-init");
    println!("cargo::rustc-env=SEALCI_INIT_BINARY={}", binary.display());
    Ok(())
}
