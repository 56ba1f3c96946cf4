//! Measures what a cache is worth to a real project: hyperfine's own tests in a Debian image, twice in fresh workspaces and
//! without a network, the second time with the first one's cache.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::fleet::{AgentShape, Fleet, Folder, Repository};
use super::latency::follow_one;
use super::table::{Floor, Row, Table, Target, millis};
use super::{Bench, succeed};
use crate::{machine, oci, workspace};

/// A release that Debian 12's compiler builds.
const CRATE: [&str; 2] = ["hyperfine", "1.14.0"];
const PACKAGES: &str = "cargo,rustc,gcc,libc6-dev";

/// What the crate needs, in the image: Cargo takes a dependency for changed when its files are newer, as in a checkout.
const VENDOR: &str = "vendor";

const WARM: &str = "name: warm
actions:
  image: {configuration: {container: \"oci:debian\", network: off}, commands: [cargo --version]}
";
const TESTED: &str = "name: project
actions:
  test:
    configuration: {container: \"oci:debian\", network: off, resources: {cpu: 2, memory: 3GiB}}
    cache: [{key: \"cargo-${{ hash('Cargo.lock') }}\", paths: [target]}]
    commands: [cargo test --offline --locked]
";

pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let name =
        format!("{} {}: `cargo test` in a Debian image, second run, created → finished", CRATE[0], CRATE[1]);
    if machine::find("mmdebstrap").is_none() || !machine::is_root() {
        table.skip(name, "it needs root and mmdebstrap");
        return Ok(());
    }
    let folder = Folder::make()?;
    let images = folder.0.join("images");
    let repository = fetch_project(&folder.0)?;
    make_image(&images, &folder.0.join(VENDOR))?;
    let arguments = ["--images-folder".to_owned(), images.display().to_string()];
    let mut fleet =
        Fleet::start_with(bench.programs.path("sealci")?, 1, AgentShape { at_once: 4 }, &arguments)?;
    fleet.repository = repository;
    follow_one(&mut fleet, Some(WARM))?;
    let first = follow_one(&mut fleet, Some(TESTED))?.0.settled;
    let second = follow_one(&mut fleet, Some(TESTED))?.0.settled;
    table.push(Row {
        name,
        value: millis(second) / 1e3,
        unit: "s",
        target: Some(Target::WithinFloor(1.0 / 3.0)),
        floor: Some(Floor { what: "the first run", value: millis(first) / 1e3 }),
    });
    Ok(())
}

/// The crate as its authors published it; what it needs goes into a folder beside it.
fn fetch_project(folder: &Path) -> Result<Repository> {
    let [name, version] = CRATE;
    let asking = folder.join("asking");
    fs::create_dir_all(asking.join("src"))?;
    fs::write(asking.join("src/lib.rs"), "")?;
    let manifest = format!(
        "[package]\nname = \"asking\"\nversion = \"0.0.0\"\n[dependencies]\n{name} = \"={version}\"\n[workspace]\n"
    );
    fs::write(asking.join("Cargo.toml"), manifest)?;
    succeed(workspace::cargo().args(["vendor", "--quiet", "--versioned-dirs"]).current_dir(&asking))?;
    let project = folder.join("project");
    fs::rename(asking.join(format!("vendor/{name}-{version}")), &project)?;
    fs::remove_dir_all(&asking)?;
    let vendor = folder.join(VENDOR);
    succeed(workspace::cargo().args(["vendor", "--quiet", "--locked"]).arg(vendor).current_dir(&project))?;
    fs::create_dir_all(project.join(".cargo"))?;
    let sources = format!(
        "[source.crates-io]\nreplace-with = \"vendored\"\n[source.vendored]\ndirectory = \"/{VENDOR}\"\n"
    );
    fs::write(project.join(".cargo/config.toml"), sources)?;
    Repository::of(&project)
}

/// The image `debian`: Debian with the compiler, and the crates over it.
fn make_image(folder: &Path, crates: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let (lower, upper) = (folder.join("lower.tar"), folder.join("upper.tar"));
    oci::debian("minbase", PACKAGES, &lower)?;
    let parent = crates.parent().context("the crates have no folder")?;
    succeed(Command::new("tar").arg("-cf").arg(&upper).arg("-C").arg(parent).args([
        "--owner=0",
        "--group=0",
        VENDOR,
    ]))?;
    oci::layout(&folder.join("debian"), [lower, upper])
}
