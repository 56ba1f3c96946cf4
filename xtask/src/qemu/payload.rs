//! Builds the test program, and packs what the guest needs of this run.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{NOT_CORE, Part};
use crate::workspace;

/// What it does when it has booted.
const SCRIPT: &str = include_str!("guest.sh");

/// Makes the archive below `folder`.
pub fn pack(folder: &Path, parts: &[Part]) -> Result<PathBuf> {
    let programs = Programs::build()?;
    let tree = folder.join("payload");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    let sealci = tree.join("sealci");
    fs::create_dir_all(&sealci)?;
    fs::write(sealci.join("guest.sh"), script(parts))?;
    place(&programs.tests, &sealci.join("executor"))?;
    // The test program looks for it where it was built.
    let below_root = programs.helper.strip_prefix("/").context("cargo builds at a relative path")?;
    place(&programs.helper, &tree.join(below_root))?;
    // So does it with its folder for what it makes, which is everybody's: it runs as more than one user.
    let own = workspace::target_folder()?.join("tmp");
    let own = tree.join(own.strip_prefix("/").context("cargo builds at a relative path")?);
    fs::create_dir_all(&own)?;
    fs::set_permissions(&own, fs::Permissions::from_mode(0o1777))?;

    let archive = folder.join("payload.tar");
    let mut tar = Command::new("tar");
    tar.args(["--create", "--owner=0", "--group=0", "--mode=a+rX", "--file"]).arg(&archive);
    let status = tar.arg("--directory").arg(&tree).arg(".").status().context("cannot run tar")?;
    if !status.success() {
        bail!("tar ended with {status}");
    }
    fs::remove_dir_all(&tree)?;
    Ok(archive)
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
    text.push_str("echo 'guest: over' >&3\nsync\necho o >/proc/sysrq-trigger\nsleep 60\n");
    text
}

/// What cargo has built.
struct Programs {
    tests: PathBuf,
    helper: PathBuf,
}

impl Programs {
    fn build() -> Result<Self> {
        // The whole workspace, so that what `cargo xtask test` has built is not built with other features once more.
        let output = workspace::cargo()
            .args(["test", "--workspace", "--locked", "--no-run"])
            .arg("--message-format=json-render-diagnostics")
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        if !output.status.success() {
            bail!("cargo test --no-run ended with {}", output.status);
        }
        let messages: Vec<Value> = output
            .stdout
            .split(|byte| *byte == b'\n')
            .filter_map(|line| serde_json::from_slice(line).ok())
            .collect();
        // A program of its own has tests of its own, which are another program of the same name.
        let find = |name: &str, is_test: bool| {
            let is_meant =
                |message: &&Value| message["target"]["name"] == name && message["profile"]["test"] == is_test;
            let path = messages.iter().filter(is_meant).find_map(|message| message["executable"].as_str());
            path.map(PathBuf::from).with_context(|| format!("cargo built no program `{name}`"))
        };
        Ok(Self { tests: find("executor", true)?, helper: find("sealci-sandbox-helper", false)? })
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
