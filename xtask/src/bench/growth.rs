//! Measures how the cost of an action grows with the agents that are there and the actions that wait.
//!
//! Agents are simulated by `many_agents`, one process with as many real sessions, spools and identities, whose executor plays
//! scripts. It shares the machine with what is measured.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Bench;
use super::fleet::{Cost, Fleet};
use super::latency::follow_one;
use super::table::{Row, Table, Target};
use crate::postgres::Postgres;

const AGENTS: [usize; 4] = [1, 10, 100, 1000];
const QUEUED: [usize; 4] = [100, 1_000, 10_000, 100_000];
/// A manifest takes 512.
const ACTIONS_A_PIPELINE: usize = 500;
/// So long nothing is asked, to see what that costs.
const IDLE: Duration = Duration::from_secs(10);
/// What the background writer notes of running transactions, once in 15 s; no commit that writes is as small.
const OWN_WAL_BYTES: f64 = 56.0;
const PATIENCE: Duration = Duration::from_secs(300);
/// So long a queue of which nobody sees the end is worked on.
const DRAIN: Duration = Duration::from_secs(20);

/// How often it is looked whether all is done.
const LOOK_EVERY: Duration = Duration::from_millis(50);

const MIB: f64 = (1 << 20) as f64;

fn manifest(actions: usize) -> String {
    let mut text = "name: many\nactions:\n".to_owned();
    for number in 0..actions {
        text += &format!(
            "  a{number}: {{needs: [], configuration: {{executor: fake}}, commands: ['print hello']}}\n"
        );
    }
    text
}

/// All of it; `only` keeps to numbers up to this, for a quick look.
pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let only =
        std::env::var("SEALCI_BENCH_AT_MOST").ok().and_then(|text| text.parse().ok()).unwrap_or(usize::MAX);
    for agents in AGENTS.into_iter().filter(|agents| *agents <= only) {
        measure_agents(bench, agents, table)?;
    }
    for queued in QUEUED.into_iter().filter(|queued| *queued <= only) {
        measure_queue(bench, queued, table)?;
    }
    measure_postgres(bench, table)
}

fn push(table: &mut Table, name: String, value: f64, unit: &'static str, target: Option<Target>) {
    table.push(Row { name, value, unit, target, floor: None });
}

/// What agents cost while nothing happens, how soon one action is claimed, and how many are done in a time.
fn measure_agents(bench: &Bench, agents: usize, table: &mut Table) -> Result<()> {
    let at_once = (100 / agents).clamp(2, 64);
    let mut fleet = Fleet::start_many(&bench.programs, agents, at_once, None)?;
    let name = |what: &str| format!("{agents} agents: {what}");
    let idle = idle_cost(&fleet)?;
    let target = (agents == 1000).then_some(Target::AtMost(2.0));
    push(table, name("scheduler while idle, of a core"), idle.scheduler_percent, "%", target);
    push(table, name("controller while idle, of a core"), idle.controller_percent, "%", None);
    push(
        table,
        name("controller while idle, written to the disk"),
        idle.controller_written as f64,
        "B",
        None,
    );
    let one = manifest(1);
    let mut waits = Vec::new();
    for _ in 0..50 {
        let (_, pipeline) = follow_one(&mut fleet, Some(&one))?;
        waits.extend(waits_of(&pipeline)?);
    }
    push(table, name("created → claimed, one at a time, p50"), percentile(&mut waits, 50), "ms", None);
    push(table, name("created → claimed, one at a time, p99"), percentile(&mut waits, 99), "ms", None);
    let before = fleet.controller_cost()?;
    let rate = drain(&mut fleet, 2_000)?;
    let written = fleet.controller_cost()?.since(before).written;
    let target = (agents == 10).then_some(Target::AtLeast(1000.0));
    push(table, name("2,000 actions, SQLite"), rate, "/s", target);
    push(table, name("… the controller wrote for each"), written as f64 / 2_000.0 / 1024.0, "KiB", None);
    push_memory(&fleet, &format!("{agents} agents"), table)?;
    let each = fleet.agents_memory_bytes()? as f64 / agents as f64 / 1024.0;
    push(table, name("memory of the simulated agents, each"), each, "KiB", None);
    Ok(())
}

/// What a queue of this length costs, and how fast it is worked on.
fn measure_queue(bench: &Bench, queued: usize, table: &mut Table) -> Result<()> {
    let name = |what: &str| format!("{queued} queued: {what}");
    let output = Command::new(bench.programs.path("placement_bench")?).arg(queued.to_string()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line =
        text.lines().rfind(|line| line.starts_with("decisions ")).context("no decisions were timed")?;
    for part in ["p50", "p99"] {
        let target = (part == "p99").then_some(Target::AtMost(1000.0));
        push(
            table,
            name(&format!("a decision, {part}, 1,000 agents")),
            microseconds(line, part)?,
            "µs",
            target,
        );
    }
    let mut fleet = Fleet::start_many(&bench.programs, 0, 0, None)?;
    let begun = Instant::now();
    let ids = fill(&mut fleet, queued)?;
    push(table, name("taken in"), queued as f64 / begun.elapsed().as_secs_f64(), "actions/s", None);
    push_memory(&fleet, &format!("{queued} queued"), table)?;
    fleet.add_many(&bench.programs, 10, 10)?;
    let rate = work_on(&fleet, &ids, Instant::now(), DRAIN)?;
    push(table, name("worked on by 10 agents × 10, SQLite"), rate, "/s", None);
    push_memory(&fleet, &format!("{queued} queued, worked on"), table)
}

/// The same on PostgreSQL, whose statistics count transactions.
fn measure_postgres(bench: &Bench, table: &mut Table) -> Result<()> {
    if crate::machine::postgres_programs().is_none() {
        table.skip("growth on PostgreSQL", "it is not installed");
        return Ok(());
    }
    const ACTIONS: usize = 2_000;
    let postgres = Postgres::start_durable()?;
    let mut fleet = Fleet::start_many(&bench.programs, 10, 10, Some(&postgres.url))?;
    let (before, wal) = (commits(&postgres)?, wal_bytes(&postgres)?);
    let rate = drain(&mut fleet, ACTIONS)?;
    // Its sessions tell their counts once they have been quiet for a moment.
    std::thread::sleep(Duration::from_secs(2));
    let name = |what: &str| format!("10 agents × 10, {ACTIONS} actions, PostgreSQL: {what}");
    push(table, name("done"), rate, "/s", Some(Target::AtLeast(500.0)));
    let each = |count: f64| count / ACTIONS as f64;
    push(table, name("commits for each"), each(commits(&postgres)? - before), "", None);
    push(table, name("write-ahead log for each"), each(wal_bytes(&postgres)? - wal) / 1024.0, "KiB", None);
    drop(fleet);
    let fleet = Fleet::start_many(&bench.programs, 1000, 1, Some(&postgres.url))?;
    // Sessions that are quiet tell their counts after ten seconds at the latest.
    std::thread::sleep(Duration::from_secs(12));
    let (before, wal) = (commits(&postgres)?, wal_bytes(&postgres)?);
    idle_cost(&fleet)?;
    let name = |what: &str| format!("1,000 agents idle for {} s, PostgreSQL: {what}", IDLE.as_secs());
    let target = Some(Target::AtMost(OWN_WAL_BYTES));
    push(table, name("write-ahead log"), wal_bytes(&postgres)? - wal, "B", target);
    // The question itself is one.
    push(table, name("commits, those of the questions included"), commits(&postgres)? - before, "", None);
    Ok(())
}

fn commits(postgres: &Postgres) -> Result<f64> {
    postgres.ask("select xact_commit from pg_stat_database where datname = 'postgres'")
}

fn wal_bytes(postgres: &Postgres) -> Result<f64> {
    postgres.ask("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")
}

/// What the services spend while nothing is asked of them.
struct IdleCost {
    scheduler_percent: f64,
    controller_percent: f64,
    controller_written: u64,
}

fn idle_cost(fleet: &Fleet) -> Result<IdleCost> {
    // What the arrivals began is over by then.
    std::thread::sleep(Duration::from_secs(2));
    let costs = || -> Result<(Cost, Cost)> { Ok((fleet.scheduler_cost()?, fleet.controller_cost()?)) };
    let (scheduler, controller) = costs()?;
    std::thread::sleep(IDLE);
    let (scheduler_after, controller_after) = costs()?;
    let percent = |cost: Cost| cost.cpu.as_secs_f64() / IDLE.as_secs_f64() * 100.0;
    let controller = controller_after.since(controller);
    Ok(IdleCost {
        scheduler_percent: percent(scheduler_after.since(scheduler)),
        controller_percent: percent(controller),
        controller_written: controller.written,
    })
}

fn push_memory(fleet: &Fleet, when: &str, table: &mut Table) -> Result<()> {
    let (controller, scheduler) = fleet.peaks()?;
    let target = Some(Target::AtMost(256.0));
    push(table, format!("{when}: controller's peak memory"), controller as f64 / MIB, "MiB", target);
    push(table, format!("{when}: scheduler's peak memory"), scheduler as f64 / MIB, "MiB", target);
    Ok(())
}

/// Milliseconds from an action's being queued to its claim, by the controller's clock.
fn waits_of(pipeline: &Value) -> Result<Vec<f64>> {
    let actions = pipeline["actions"].as_array().context("a pipeline without actions")?;
    let wait =
        |action: &Value| Some(millis(&action["attempts"][0]["claimed_at"])? - millis(&action["queued_at"])?);
    actions.iter().map(|action| wait(action).context("an action without times")).collect()
}

/// The milliseconds of the day in `2026-11-30T07:16:03.123456Z`.
fn millis(time: &Value) -> Option<f64> {
    let time = time.as_str()?.split_once('T')?.1.trim_end_matches('Z');
    let mut parts = time.splitn(3, ':').map(|part| part.parse::<f64>());
    let (hours, minutes, seconds) = (parts.next()?.ok()?, parts.next()?.ok()?, parts.next()?.ok()?);
    Some(((hours * 60.0 + minutes) * 60.0 + seconds) * 1e3)
}

fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) * percent / 100).copied().unwrap_or(f64::NAN)
}

/// The figure behind a name in what `placement_bench` prints: `p99 12.3µs`.
fn microseconds(line: &str, name: &str) -> Result<f64> {
    let words: Vec<&str> = line.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    let place = words.iter().position(|word| *word == name).context("a figure is missing")?;
    let word = words.get(place + 1).context("a figure is missing")?;
    for (unit, factor) in [("ns", 1e-3), ("µs", 1.0), ("ms", 1e3), ("s", 1e6)] {
        if let Some(number) = word.strip_suffix(unit).and_then(|number| number.parse::<f64>().ok()) {
            return Ok(number * factor);
        }
    }
    bail!("`{word}` is no time")
}

/// Puts so many actions in the queue, pipeline by pipeline: the pipelines' ids.
fn fill(fleet: &mut Fleet, actions: usize) -> Result<Vec<String>> {
    let mut connection = fleet.connect()?;
    let (mut left, mut ids) = (actions, Vec::new());
    while left > 0 {
        let count = left.min(ACTIONS_A_PIPELINE);
        let creation = fleet.creation(Some(&manifest(count)));
        let pipeline = connection.post("/api/v1/pipelines", &creation)?;
        ids.push(pipeline["id"].as_str().context("a pipeline without an id")?.to_owned());
        left -= count;
    }
    Ok(ids)
}

/// Takes so many actions in and does them: actions a second, from the first request on.
fn drain(fleet: &mut Fleet, actions: usize) -> Result<f64> {
    let begun = Instant::now();
    let ids = fill(fleet, actions)?;
    work_on(fleet, &ids, begun, PATIENCE)
}

/// Waits until all pipelines are finished, or for so long: actions done in a second since then.
fn work_on(fleet: &Fleet, ids: &[String], begun: Instant, patience: Duration) -> Result<f64> {
    let mut connection = fleet.connect()?;
    let mut unfinished: Vec<&String> = ids.iter().collect();
    while !unfinished.is_empty() && begun.elapsed() < patience {
        std::thread::sleep(LOOK_EVERY);
        // A page holds as many as there ever are.
        let page = connection.get("/api/v1/pipelines?state=finished&limit=200")?;
        let finished = page["pipelines"].as_array().context("a list without pipelines")?;
        if let Some(bad) = finished.iter().find(|pipeline| pipeline["outcome"] != "succeeded") {
            bail!("a measured pipeline did not succeed: {bad:#}");
        }
        unfinished.retain(|id| !finished.iter().any(|pipeline| pipeline["id"] == **id));
    }
    let took = begun.elapsed();
    let mut done = 0;
    for id in ids {
        let pipeline = connection.get(&format!("/api/v1/pipelines/{id}"))?;
        let actions = pipeline["actions"].as_array().context("a pipeline without actions")?;
        done += actions.iter().filter(|action| action["state"] == "finished").count();
    }
    Ok(done as f64 / took.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(millis(&Value::from("2026-11-30T00:01:02.5Z")), Some(62_500.0));
        let line = "decisions afterwards: 5 times, p50 780ns, p99 12.5µs, p99.9 1ms, longest 2s";
        assert_eq!(microseconds(line, "p50").unwrap(), 0.78);
        assert_eq!(microseconds(line, "p99").unwrap(), 12.5);
        assert_eq!(percentile(&mut [3.0, 1.0, 2.0], 50), 2.0);
    }
}
