//! Measures how long a push takes until its pipeline runs, with a monitor that polls.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::Bench;
use super::client::Connection;
use super::fleet::{AgentShape, Fleet};
use super::table::{Row, Table, Target, median, millis};

/// The shortest that a configuration may ask for.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
const PUSHES: u32 = 11;
/// Between two looks at the list, which has no stream of its own.
const LOOK: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(20);

pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let binary = bench.programs.path("sealci")?;
    let mut fleet = Fleet::start(binary, 1, AgentShape { at_once: 2 })?;
    let mut monitor = fleet.start_monitor(binary, POLL_INTERVAL)?.connect()?;
    let settings = json!({"repository_url": fleet.repository.url(), "events": ["push"]});
    let watched = monitor.post("/api/v1/configurations", &settings)?;
    let path = format!("/api/v1/configurations/{}", watched["id"].as_str().unwrap_or_default());
    until("the monitor looks at the repository", || Ok(!monitor.get(&path)?["last_poll"].is_null()))?;
    let mut controller = fleet.connect()?;
    let mut times = Vec::new();
    for push in 0..PUSHES {
        // At another moment between two polls each time.
        std::thread::sleep(POLL_INTERVAL * push / PUSHES);
        fleet.repository.git(&["commit", "--quiet", "--allow-empty", "-m", &format!("Push {push}")])?;
        let begun = Instant::now();
        let revision = fleet.repository.git(&["rev-parse", "HEAD"])?;
        until("the push runs", || is_running(&mut controller, &revision))?;
        times.push(begun.elapsed());
    }
    let slowest = times.iter().copied().max().unwrap_or_default();
    let limit = Some(Target::AtMost(millis(POLL_INTERVAL) + 1000.0));
    for (what, time, target) in [("median", median(times), None), ("slowest", slowest, limit)] {
        let name = format!("push → running, poll interval 1 s: {what} of {PUSHES}");
        table.push(Row { name, value: millis(time), unit: "ms", target, floor: None });
    }
    Ok(())
}

/// Whether the pipeline of a revision has begun to run; it may be over by now.
fn is_running(controller: &mut Connection, revision: &str) -> Result<bool> {
    let page = controller.get("/api/v1/pipelines?limit=1")?;
    let newest: &Value = &page["pipelines"][0];
    Ok(newest["revision"] == revision && (newest["state"] == "running" || newest["state"] == "finished"))
}

fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        if begun.elapsed() > PATIENCE {
            bail!("{what}: not within {PATIENCE:?}");
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
