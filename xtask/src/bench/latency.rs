//! Measures how long one action takes on an idle system, from just before it is asked for until its reader knows.
//!
//! One clock tells all: this process's. The reader follows `/watch`, so that what is measured is what a person who looks
//! sees: the commit of each step is in it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Bench;
use super::fleet::{AgentShape, Fleet};
use super::floors::{self, Bare, Floors};
use super::table::{Floor, Row, Table, Target, median, millis};

const RUNS: usize = 25;
/// So that what one run leaves to be tidied up is not in the next one's way: the system is idle.
const PAUSE: Duration = Duration::from_millis(60);

pub fn manifest(executor: &str, network: &str) -> String {
    format!(
        "name: bench\nactions:\n  one:\n    configuration: {{executor: {executor}, network: {network}}}\n    \
         commands: [\"true\"]\n"
    )
}

/// What the reader saw of one pipeline, since just before it was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    pub accepted: Duration,
    pub started: Duration,
    pub finished: Duration,
    /// Everything is known and stored, the whole log too.
    pub settled: Duration,
}

/// Makes one pipeline and follows it to its end; it must succeed.
pub fn follow_one(fleet: &mut Fleet, manifest: Option<&str>) -> Result<(Seen, Value)> {
    let creation = fleet.creation(manifest);
    let (mut asking, watching) = (fleet.connect()?, fleet.connect()?);
    let begun = Instant::now();
    let created = asking.post("/api/v1/pipelines", &creation)?;
    let accepted = begun.elapsed();
    let id = created["id"].as_str().context("the pipeline has no id")?;
    let (mut started, mut finished, mut last) = (None, None, Value::Null);
    watching.follow(&format!("/api/v1/pipelines/{id}/watch"), |pipeline| {
        let now = begun.elapsed();
        let attempts = pipeline["actions"][0]["attempts"].as_array();
        let commands = attempts.and_then(|attempts| attempts.last()?["commands"].as_array());
        if commands.is_some_and(|commands| !commands.is_empty()) {
            started.get_or_insert(now);
        }
        if pipeline["state"] == "finished" {
            finished.get_or_insert(now);
        }
        last = pipeline;
        Ok(true)
    })?;
    let settled = begun.elapsed();
    if last["outcome"] != "succeeded" {
        bail!("a measured pipeline did not succeed: {last:#}\n{}", fleet.logs());
    }
    let missing = "the watch stream ended early";
    let seen =
        Seen { accepted, started: started.context(missing)?, finished: finished.context(missing)?, settled };
    Ok((seen, last))
}

/// One way to run the action.
struct Variant {
    name: &'static str,
    executor: &'static str,
    network: &'static str,
    /// Whose bare figure is the floor.
    bare: &'static str,
    /// To the first command's start, and to the end.
    targets_ms: Option<[f64; 2]>,
    /// Or in the repository, where the controller reads it.
    manifest_in_request: bool,
}

const PROCESS: Variant = Variant {
    name: "process",
    executor: "process",
    network: "on",
    bare: "process",
    targets_ms: Some([15.0, 20.0]),
    manifest_in_request: true,
};

const SANDBOX: Variant = Variant {
    name: "sandbox",
    executor: "sandbox",
    network: "off",
    bare: "sandbox",
    targets_ms: Some([25.0, 35.0]),
    manifest_in_request: true,
};

const VARIANTS: [Variant; 4] = [
    PROCESS,
    SANDBOX,
    Variant { name: "sandbox, manifest from Git", targets_ms: None, manifest_in_request: false, ..SANDBOX },
    Variant { name: "sandbox, network on", network: "on", bare: "network", targets_ms: None, ..SANDBOX },
];

pub fn measure(bench: &Bench, floors: &Floors, table: &mut Table) -> Result<()> {
    let mut fleet = Fleet::start(bench.programs.path("sealci")?, 1, AgentShape { at_once: 2 })?;
    for variant in VARIANTS {
        let Variant { name, targets_ms, .. } = variant;
        let Some(bare) = floors::bare_latency(&bench.programs, variant.bare)? else {
            table.skip(format!("latency, {name}"), "its environment cannot be made here (it needs root)");
            continue;
        };
        let manifest = manifest(variant.executor, variant.network);
        let manifest = variant.manifest_in_request.then_some(manifest.as_str());
        for _ in 0..3 {
            follow_one(&mut fleet, manifest)?;
            std::thread::sleep(PAUSE);
        }
        let mut seen = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            seen.push(follow_one(&mut fleet, manifest)?.0);
            std::thread::sleep(PAUSE);
        }
        let middle = |part: fn(&Seen) -> Duration| millis(median(seen.iter().map(part).collect()));
        let row = |step: &str, value: f64, target: Option<f64>, floor: f64| Row {
            name: format!("{name}: created → {step}"),
            value,
            unit: "ms",
            target: target.map(Target::AtMost),
            floor: Some(Floor { what: "its parts, bare", value: floor }),
        };
        let accepted = middle(|seen| seen.accepted);
        table.push(row("answered", accepted, None, floors.commit_ms));
        let (started, finished) = path_floors(floors, bare);
        table.push(row(
            "first command started",
            middle(|seen| seen.started),
            targets_ms.map(|targets| targets[0]),
            started,
        ));
        table.push(row(
            "finished",
            middle(|seen| seen.finished),
            targets_ms.map(|targets| targets[1]),
            finished,
        ));
    }
    Ok(())
}

/// What cannot be left out on the way: the pipeline's commit; the claim's commit, with the checkout beside it; the
/// executor; and the commit of what is then seen.
fn path_floors(floors: &Floors, bare: Bare) -> (f64, f64) {
    let before = floors.commit_ms + floors.commit_ms.max(floors.checkout_ms);
    (before + bare.started_ms + floors.commit_ms, before + bare.finished_ms + floors.commit_ms)
}

/// The whole process `sealci run`, where the binary has it.
pub fn measure_run(bench: &Bench, floors: &Floors, table: &mut Table) -> Result<()> {
    use std::process::{Command, Stdio};
    let binary: &Path = bench.programs.path("sealci")?;
    let name = "sealci run, whole process, sandbox";
    let quiet = |arguments: &[&str], folder: &Path| {
        let mut command = Command::new(binary);
        command.args(arguments).current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).status()
    };
    let folder = super::fleet::Folder::make()?;
    if !quiet(&["run", "--help"], &folder.0)?.success() {
        table.skip(name, "this binary has no command `run` yet");
        return Ok(());
    }
    let Some(bare) = floors::bare_latency(&bench.programs, "sandbox")? else {
        table.skip(name, "the sandbox cannot be made here (it needs root)");
        return Ok(());
    };
    let repository = super::fleet::Repository::make(&folder.0.join("repository"))?;
    let mut times = Vec::with_capacity(RUNS);
    for run in 0..=RUNS {
        let begun = Instant::now();
        if !quiet(&["run"], &repository.path)?.success() {
            bail!("`sealci run` failed");
        }
        if run > 0 {
            times.push(begun.elapsed());
        }
    }
    table.push(Row {
        name: name.to_owned(),
        value: millis(median(times)),
        unit: "ms",
        target: Some(Target::AtMost(30.0)),
        floor: Some(Floor { what: "spawn + bare sandbox", value: floors.spawn_ms + bare.finished_ms }),
    });
    Ok(())
}
