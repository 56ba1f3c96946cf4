//! Runs cargo-deny on what `deny.toml` says of bans, licences and sources; builds it first where it is not installed.
//!
//! Advisories are left out: they need a database from the network, and a build must not fail for what others publish.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace;

/// The version that is built where none is installed.
const VERSION: &str = "0.20.2";

/// Both in one.
pub fn run() -> Result<()> {
    check(&find_or_build()?)
}

/// Checks the workspace.
pub fn check(program: &Path) -> Result<()> {
    let status = Command::new(program)
        .current_dir(workspace::root())
        .args(["--locked", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"])
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if status.success() { Ok(()) } else { bail!("cargo-deny refuses the dependencies, see above") }
}

/// The program, built where it is not installed.
pub fn find_or_build() -> Result<PathBuf> {
    if let Some(program) = crate::machine::find("cargo-deny") {
        return Ok(program);
    }
    let tools = workspace::target_folder()?.join("tools");
    let program = tools.join("bin/cargo-deny");
    if program.is_file() {
        return Ok(program);
    }
    println!("building cargo-deny {VERSION} once, into {}", tools.display());
    // It runs for a second: time spent on optimising or debug information would be lost.
    let status = workspace::cargo()
        .args(["install", "--quiet", "--locked", "--debug", "--no-default-features", "cargo-deny"])
        .args(["--version", VERSION])
        .arg("--root")
        .arg(&tools)
        .env("CARGO_PROFILE_DEV_DEBUG", "0")
        .env("CARGO_INCREMENTAL", "0")
        .env("CARGO_TARGET_DIR", tools.join("build"))
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo install")?;
    if !status.success() {
        bail!("cargo-deny could not be built, see above");
    }
    let _ = fs::remove_dir_all(tools.join("build"));
    Ok(program)
}
