//! Runs the fuzz targets: libFuzzer drives them by what the compiler counts, which `fuzz/rustc` has it do on a stable toolchain.
//!
//! ```text
//!   target/fuzz/corpus/NAME      what long runs have found to be worth keeping; a short run begins with nothing but the seeds
//!   target/fuzz/failures/NAME-…  bytes that a target failed on
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::workspace;

/// A target, and how long its inputs get.
struct Target {
    name: &'static str,
    longest_bytes: u32,
    /// In the workspace; files to begin with.
    seeds: &'static [&'static str],
}

const TARGETS: &[Target] = &[
    Target { name: "spool", longest_bytes: 1024, seeds: &[] },
    Target { name: "frames", longest_bytes: 2048, seeds: &[] },
    Target { name: "logs", longest_bytes: 256, seeds: &[] },
    Target { name: "archives", longest_bytes: 2048, seeds: &[] },
    Target {
        name: "manifest",
        longest_bytes: 8192,
        seeds: &[".sealci/pipeline.yaml", "crates/core/tests/manifests/many_errors.yaml"],
    },
    Target { name: "messages", longest_bytes: 1024, seeds: &[] },
    Target { name: "put", longest_bytes: 2048, seeds: &[] },
    Target { name: "layer", longest_bytes: 2048, seeds: &[] },
    Target { name: "registers", longest_bytes: 256, seeds: &[] },
    Target { name: "block", longest_bytes: 256, seeds: &[] },
    Target { name: "vsock", longest_bytes: 256, seeds: &[] },
    Target { name: "entropy", longest_bytes: 256, seeds: &[] },
    Target { name: "balloon", longest_bytes: 256, seeds: &[] },
    Target { name: "snapshot", longest_bytes: 512, seeds: &[] },
    Target { name: "net", longest_bytes: 256, seeds: &[] },
    Target { name: "names", longest_bytes: 1024, seeds: &[] },
];

/// Crates of others that do much of the work: without optimization they are most of a run's time.
const OPTIMIZED: &[&str] =
    &["libfuzzer-sys", "zstd-sys", "granit-parser", "rustix", "virtio-queue", "vm-memory"];

/// What the test command gives each.
const SHORT_SECONDS: u64 = 4;
/// What a run without a word about it takes.
const LONG_SECONDS: u64 = 60;
/// Of a target's process, with all that C code allocates (I6).
const MEMORY_MEBIBYTES: u32 = 256;
/// Longer than any input may take, also where others keep the machine busy.
const INPUT_SECONDS: u32 = 60;

/// The command `fuzz [NAME [SECONDS]]`.
pub fn command(arguments: &[&str]) -> Result<bool> {
    let (name, seconds) = match arguments {
        [] => (None, LONG_SECONDS),
        [name] => (Some(*name), LONG_SECONDS),
        [name, seconds] => (Some(*name), seconds.parse().context("that is no number of seconds")?),
        _ => bail!("cargo xtask fuzz [NAME [SECONDS]]"),
    };
    let targets: Vec<_> =
        TARGETS.iter().filter(|target| name.is_none_or(|name| name == target.name)).collect();
    if targets.is_empty() {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        bail!("there is no such target; there are {}", names.join(", "));
    }
    run(&targets, seconds, true).map(|()| true)
}

/// The test command's step: each target for some seconds.
pub fn step() -> Result<()> {
    run(&TARGETS.iter().collect::<Vec<_>>(), SHORT_SECONDS, false)
}

/// Builds the targets and runs them, as many at once as there are cores.
fn run(targets: &[&Target], seconds: u64, keeps: bool) -> Result<()> {
    let programs = build()?;
    let folder = workspace::target_folder()?.join("fuzz");
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.subsec_nanos() | 1);
    println!("seed {seed}, {seconds} s for each target");
    let left = Mutex::new(targets.iter());
    let failed = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let next = || left.lock().map_or(None, |mut left| left.next());
    std::thread::scope(|scope| {
        for _ in 0..cores.min(targets.len()) {
            scope.spawn(|| {
                while let Some(target) = next() {
                    let ended = run_one(target, &programs, &folder, seconds, seed, keeps);
                    if let Err(error) = ended
                        && let Ok(mut failed) = failed.lock()
                    {
                        println!("{}: {error:#}", target.name);
                        failed.push(target.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if failed.is_empty() { Ok(()) } else { bail!("{} failed, see above", failed.join(", ")) }
}

/// Builds all targets; the folder with them.
fn build() -> Result<PathBuf> {
    let optimized = OPTIMIZED.iter().map(|name| format!("--config=profile.dev.package.{name}.opt-level=2"));
    let status = workspace::cargo()
        .args(["build", "--locked", "--package", "sealci-fuzz", "--bins"])
        .args(optimized)
        .env("RUSTC_WORKSPACE_WRAPPER", workspace::root().join("fuzz/rustc"))
        .stdin(Stdio::null())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the fuzz targets were not built: {status}");
    }
    Ok(workspace::target_folder()?.join("debug"))
}

fn run_one(
    target: &Target,
    programs: &Path,
    folder: &Path,
    seconds: u64,
    seed: u32,
    keeps: bool,
) -> Result<()> {
    let Target { name, longest_bytes, seeds } = target;
    let failures = folder.join("failures");
    let corpus = if keeps {
        folder.join("corpus").join(name)
    } else {
        std::env::temp_dir().join(format!("sealci-fuzz-{}-{name}", std::process::id()))
    };
    for folder in [&failures, &corpus] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // A target that unpacks archives gives up root.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777))?;
    }
    for seed in *seeds {
        let file = workspace::root().join(seed);
        let copy = corpus.join(seed.replace('/', "-"));
        fs::copy(&file, copy).with_context(|| format!("cannot copy {}", file.display()))?;
    }
    let output = Command::new(programs.join(name))
        .arg(&corpus)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-seed={seed}"))
        .arg(format!("-max_len={longest_bytes}"))
        .arg(format!("-rss_limit_mb={MEMORY_MEBIBYTES}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-artifact_prefix={}/{name}-", failures.display()))
        // Inputs are as long as they may be from the beginning, and nobody else writes to the corpus.
        .args(["-len_control=0", "-reload=0", "-use_value_profile=1", "-print_final_stats=1"])
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run the target {name}"))?;
    if !keeps {
        let _ = fs::remove_dir_all(&corpus);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let from =
            said.lines().position(|line| line.contains("panicked at") || line.starts_with("==")).unwrap_or(0);
        let told: Vec<_> = said.lines().skip(from).take(60).collect();
        bail!(
            "{}\nagain: {} FILE, with the file that is named above",
            told.join("\n"),
            programs.join(name).display()
        );
    }
    println!("{name}: {}", summary(&said));
    Ok(())
}

/// How many inputs were tried, and how many of them found something new.
fn summary(said: &str) -> String {
    let figure = |name: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(&format!("stat::{name}:")));
        line.map_or("?", str::trim)
    };
    let edges = said.lines().rev().find_map(|line| line.split_once(" cov: ")?.1.split_whitespace().next());
    format!(
        "{} inputs, {} a second, {} edges, at most {} MiB",
        figure("number_of_executed_units"),
        figure("average_exec_per_sec"),
        edges.unwrap_or("?"),
        figure("peak_rss_mb")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libfuzzers_figures_are_read() {
        let said = "#2\tINITED cov: 30 ft: 31\n#900\tDONE   cov: 415 ft: 2000 corp: 7/8b\n\
                    stat::number_of_executed_units: 900\nstat::average_exec_per_sec:     225\nstat::peak_rss_mb: 40\n";
        assert_eq!(summary(said), "900 inputs, 225 a second, 415 edges, at most 40 MiB");
    }

    #[test]
    fn every_target_of_the_package_is_run() {
        let package = fs::read_to_string(workspace::root().join("fuzz/Cargo.toml")).unwrap();
        let named: Vec<_> =
            package.lines().filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")).collect();
        let listed: Vec<_> = TARGETS.iter().map(|target| format!("{}.rs\"", target.name)).collect();
        assert_eq!(named, listed);
    }
}
