//! Measures how much the whole engine does in a time: many small actions, and one action with a large log.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Bench;
use super::fleet::{AgentShape, Fleet};
use super::floors;
use super::latency::follow_one;
use super::table::{Floor, Row, Table, Target, median_of};

const PIPELINES: usize = 20;
const ACTIONS: usize = 50;
const ROUNDS: usize = 3;

/// The bench looks so often whether all is done: seldom enough not to be what is measured.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const PATIENCE: Duration = Duration::from_secs(120);
/// No further round begins after this: on a busy machine fewer rounds have to do, so that the whole stays short.
const BUDGET: Duration = Duration::from_secs(40);

fn manifest(executor: &str, command: &str) -> String {
    let mut text = "name: many\nactions:\n".to_owned();
    for number in 0..ACTIONS {
        text += &format!(
            "  a{number}:\n    needs: []\n    configuration: {{executor: {executor}, network: off}}\n    \
             commands: [\"{command}\"]\n"
        );
    }
    text
}

/// Makes the pipelines, all at the same time, and waits until they are finished: actions a second.
fn burst(fleet: &mut Fleet, manifest: &str) -> Result<f64> {
    let creations: Vec<_> = (0..PIPELINES).map(|_| fleet.creation(Some(manifest))).collect();
    let mut connection = fleet.connect()?;
    let before = finished(&mut connection)?;
    let begun = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let fleet = &*fleet;
        let askers: Vec<_> = creations
            .iter()
            .map(|creation| scope.spawn(move || fleet.connect()?.post("/api/v1/pipelines", creation)))
            .collect();
        for asker in askers {
            asker.join().map_err(|_| anyhow::anyhow!("asking for a pipeline broke off"))??;
        }
        Ok(())
    })?;
    while finished(&mut connection)? < before + PIPELINES {
        if begun.elapsed() > PATIENCE {
            bail!("the pipelines are not finished after {PATIENCE:?}\n{}", fleet.logs());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(floors::rate((PIPELINES * ACTIONS) as u64, begun.elapsed()))
}

/// How many pipelines are finished; all of them must have succeeded.
fn finished(connection: &mut super::client::Connection) -> Result<usize> {
    let page = connection.get("/api/v1/pipelines?state=finished&limit=200")?;
    let pipelines = page["pipelines"].as_array().context("a list without pipelines")?;
    if let Some(bad) = pipelines.iter().find(|pipeline| pipeline["outcome"] != "succeeded") {
        bail!("a measured pipeline did not succeed: {bad:#}");
    }
    Ok(pipelines.len())
}

pub fn measure_sandbox(bench: &Bench, table: &mut Table) -> Result<()> {
    const AGENTS: usize = 4;
    const AT_ONCE: u64 = 2;
    let name = "1,000 one-command sandbox actions, 4 agents × 2 at once";
    let bare_rate = || floors::bare_rate(&bench.programs, "sandbox", 250, AGENTS * AT_ONCE as usize);
    if bare_rate()?.is_none() {
        table.skip(name, "the sandbox cannot be made here (it needs root)");
        return Ok(());
    }
    let shape = AgentShape { at_once: AT_ONCE };
    let mut fleet = Fleet::start(bench.programs.path("sealci")?, AGENTS, shape)?;
    let manifest = manifest("sandbox", "true");
    // By turns, so that what else the machine does falls on both.
    let (mut rates, mut bare) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    while rates.len() < ROUNDS && begun.elapsed() < BUDGET {
        rates.push(burst(&mut fleet, &manifest)?);
        bare.extend(bare_rate()?);
    }
    let floor = Floor { what: "bare libcontainer", value: median_of(bare) };
    let (value, unit) = (median_of(rates), "/s");
    let row = |target| Row { name: name.to_owned(), value, unit, target: Some(target), floor: Some(floor) };
    table.push(row(Target::AtLeast(60.0)));
    table.push(row(Target::OfFloor(0.45)));
    Ok(())
}

pub fn measure_fake(bench: &Bench, table: &mut Table) -> Result<()> {
    let shape = AgentShape { at_once: 2 };
    let mut fleet = Fleet::start(bench.programs.path("sealci")?, 20, shape)?;
    let manifest = manifest("fake", "print hello");
    let (mut rates, begun) = (Vec::new(), Instant::now());
    while rates.len() < ROUNDS && begun.elapsed() < BUDGET {
        rates.push(burst(&mut fleet, &manifest)?);
    }
    table.push(Row {
        name: "1,000 fake actions, 20 agents".to_owned(),
        value: median_of(rates),
        unit: "/s",
        target: Some(Target::AtLeast(500.0)),
        floor: None,
    });
    Ok(())
}

pub fn measure_log(bench: &Bench, table: &mut Table) -> Result<()> {
    const LINES: u64 = 1_000_000;
    const LINE: &str =
        "a line of a log as long as the lines of compilers often are: 99 letters, and the line feed as last";
    const MEMORY_BYTES: f64 = (256 << 20) as f64;
    let bytes = LINES * (LINE.len() as u64 + 1);
    let command = format!("yes '{LINE}' | head -n {LINES}");
    let mut fleet = Fleet::start(bench.programs.path("sealci")?, 1, AgentShape { at_once: 2 })?;
    let is_root = floors::bare_latency(&bench.programs, "sandbox")?.is_some();
    let executor = if is_root { "sandbox" } else { "process" };
    let manifest = format!(
        "name: log\nactions:\n  one:\n    configuration: {{executor: {executor}, network: off}}\n    commands:\n      \
         - {command}\n"
    );
    let (mut rates, mut pipes, mut disks) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let (seen, pipeline) = follow_one(&mut fleet, Some(&manifest))?;
        let attempt = &pipeline["actions"][0]["attempts"][0];
        if attempt["log_end"] != bytes || attempt["log_length"] != bytes {
            bail!("not all of {bytes} bytes were stored: {attempt:#}");
        }
        rates.push(floors::rate(bytes, seen.settled - seen.started) / 1e6);
        pipes.push(floors::pipe_rate(&command, bytes)? / 1e6);
        disks.push(floors::disk_rate(bytes)? / 1e6);
    }
    let (controller, agent) = fleet.peak_memory_bytes()?;
    let row =
        |value, unit, name: String, target, floor| Row { name, value, unit, target: Some(target), floor };
    let name = format!("one log of 1,000,000 lines, {executor}: emitted → stored");
    let pipe = Floor { what: "the same through one pipe", value: median_of(pipes) };
    let disk = Floor { what: "written to a file, synced", value: median_of(disks) };
    let rate = median_of(rates);
    table.push(row(rate, "MB/s", name.clone(), Target::AtLeast(150.0), Some(pipe)));
    table.push(Row { name, value: rate, unit: "MB/s", target: None, floor: Some(disk) });
    for (who, peak) in [("controller", controller), ("agent", agent)] {
        let (name, mib) = (format!("… its {who}'s peak memory"), (1 << 20) as f64);
        table.push(row(peak as f64 / mib, "MiB", name, Target::AtMost(MEMORY_BYTES / mib), None));
    }
    Ok(())
}
