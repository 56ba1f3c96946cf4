//! The command `test`: every check and every test, in the order in which they fail fastest.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::machine::{self, Capability};
use crate::postgres::Postgres;
use crate::report::{Counts, Report};
use crate::{deny, fuzz, imports, qemu, s3, workspace};

/// Runs it all; whether all passed.
pub fn run() -> Result<bool> {
    let required = machine::required(&std::env::var("SEALCI_REQUIRE").unwrap_or_default())?;
    let is_required = |capability| required.contains(&capability);
    let mut report = Report::default();

    report.step("rust", rust_version);
    report.step("machine", || {
        prepare_machine();
        Ok(())
    });
    for capability in Capability::ALL {
        if let Some(why) = machine::lacks(capability) {
            report.missing(capability.name(), &why, is_required(capability));
        }
    }

    report.step("imports", imports::check);
    report.step("fmt", || cargo(&["fmt", "--all", "--check"]));
    report.step("clippy", || {
        let all = ["clippy", "--workspace", "--all-targets", "--locked"];
        // Its dependencies need a C++ compiler; the step `fuzz` builds it.
        let but = ["--exclude", "sealci-fuzz", "--", "-D", "warnings"];
        cargo(&[&all[..], &but[..]].concat())
    });
    match deny::find_or_build() {
        Ok(program) => {
            report.step("deny", || deny::check(&program));
        }
        Err(error) => report.missing("deny", &format!("{error:#}"), is_required(Capability::Deny)),
    }

    if machine::lacks(Capability::Cxx).is_none() {
        report.step("fuzz", fuzz::step);
    }

    let s3 = match s3::find_or_install() {
        Ok(program) => Some(program),
        Err(error) => {
            report.missing("s3", &format!("{error:#}"), is_required(Capability::S3));
            None
        }
    };
    let postgres = machine::postgres_programs().and_then(|_| report.step("postgres", Postgres::start));
    let skips = Skips::new();
    let mut counts = Counts::default();
    report.step("tests", || tests(postgres.as_ref(), s3.as_deref(), &skips, &mut counts));
    drop(postgres);
    let skipped = skips.read();
    for (name, why) in &skipped {
        report.missing(name, why, false);
    }
    report.counts = counts;
    report.counts.skipped += skipped.len() as u64;
    if machine::lacks(Capability::Qemu).is_none() {
        qemu::step(&mut report, &qemu::EXECUTORS);
        qemu::step(&mut report, &qemu::MACHINES);
    }
    print!("{}", report.summary());
    io::stdout().flush()?;
    Ok(report.passed())
}

/// Cargo itself refuses a toolchain older than the workspace's `rust-version`; this says what it is.
fn rust_version() -> Result<()> {
    let metadata = workspace::metadata()?;
    let wanted = metadata["packages"][0]["rust_version"].as_str().unwrap_or("?").to_owned();
    let output = Command::new("rustc").arg("--version").output().context("cannot run rustc")?;
    let found = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    println!("{found}; at least {wanted} is needed");
    if is_older(&found, &wanted) { bail!("{found} is older than {wanted}: rustup update") } else { Ok(()) }
}

/// Compares `rustc 1.95.0 (…)` with `1.94`.
fn is_older(found: &str, wanted: &str) -> bool {
    let numbers = |text: &str| -> Option<(u32, u32)> {
        let mut parts = text.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    match (found.split_whitespace().nth(1).and_then(numbers), numbers(wanted)) {
        (Some(found), Some(wanted)) => found < wanted,
        _ => false,
    }
}

/// Installs what is missing, where it may.
pub fn prepare_machine() {
    let packages = machine::missing_packages();
    if packages.is_empty() {
        println!("nothing to install");
        return;
    }
    println!("missing Debian packages: {}", packages.join(" "));
    if let Some(why) = machine::cannot_install() {
        println!("not installed ({why}): what needs them is skipped");
        return;
    }
    if packages.contains(&"openssh-server") {
        println!("note: the service of openssh-server is not started; to keep it so: systemctl disable ssh");
    }
    // One by one: what cannot be had must not keep the others away.
    for package in packages {
        if let Err(error) = machine::install(&[package]) {
            println!("error: {error:#}");
        }
    }
}

fn cargo(arguments: &[&str]) -> Result<()> {
    let status =
        workspace::cargo().args(arguments).stdin(Stdio::null()).status().context("cannot run cargo")?;
    if status.success() { Ok(()) } else { bail!("cargo {} ended with {status}", arguments[0]) }
}

/// Runs cargo's tests, passing their output on and counting, also where some fail.
fn tests(postgres: Option<&Postgres>, s3: Option<&Path>, skips: &Skips, counts: &mut Counts) -> Result<()> {
    // The end-to-end tests drive the real binary.
    cargo(&["build", "--locked", "--bin", "sealci"])?;
    let mut command = workspace::cargo();
    command
        .args(["test", "--workspace", "--exclude", "sealci-fuzz", "--locked", "--no-fail-fast"])
        .env("SEALCI_SKIPS", &skips.file);
    if let Some(postgres) = postgres {
        command.env("SEALCI_TEST_POSTGRES", &postgres.url);
    }
    if let Some(program) = s3 {
        command.env("SEALCI_TEST_S3", program);
    }
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot run cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no standard output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("cannot read what cargo test says")?;
        counts.add_line(&String::from_utf8_lossy(&line));
        let mut out = io::stdout().lock();
        out.write_all(&line)?;
        out.write_all(b"\n")?;
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{} of {} tests failed", counts.failed, counts.passed + counts.failed);
    }
    if counts.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

/// The file in which tests say what they had to skip, one `name: reason` a line.
struct Skips {
    file: std::path::PathBuf,
}

impl Skips {
    fn new() -> Self {
        let file = std::env::temp_dir().join(format!("sealci-skips-{}", std::process::id()));
        let _ = fs::remove_file(&file);
        Self { file }
    }

    fn read(&self) -> Vec<(String, String)> {
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        let line = |line: &str| {
            let (name, why) = line.split_once(": ").unwrap_or((line, "no reason was given"));
            (format!("test {name}"), why.to_owned())
        };
        text.lines().map(line).collect()
    }
}

impl Drop for Skips {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(!is_older("rustc 1.95.0 (abc 2026-04-14)", "1.94"));
        assert!(is_older("rustc 1.9.0 (abc 2016-04-14)", "1.94"));
        assert!(!is_older("rustc 1.94.0", "1.94"));
        assert!(is_older("rustc 1.93.1-nightly", "1.94"));
    }
}
