//! Measures one action in an image from its start to its end, in turns with `runc run` and `docker run` on the same files.
//!
//! Ours is the executor's whole work: image mounted, guest's init, user namespace, seccomp, limits, network, and nothing left.
//! `runc` gets the image's files already laid out in one folder, the same limits, and neither a user namespace nor seccomp;
//! Docker what its command line gives by itself.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::fleet::Folder;
use super::floors::{self, Floor as Program};
use super::table::{Floor, Row, Table, Target, median_of, millis};
use super::{Bench, succeed};
use crate::machine;

const RUNS: usize = 20;
const MEMORY_BYTES: u64 = 1 << 30;
const PIDS: u64 = 300;

pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let name = "container, warm image, one `true`";
    let Some(mut off) = Program::start(&bench.programs, &["turns", "container"])? else {
        table.skip(name, "its environment cannot be made here (it needs root)");
        return Ok(());
    };
    let mut on = Program::start(&bench.programs, &["turns", "container-network"])?;
    let runc = match machine::find("runc") {
        Some(_) => Some(Bundle::make(&off.ready["layers"])?),
        None => None,
    };
    let docker = match Program::start(&bench.programs, &["docker"])? {
        Some(program) => Some(Docker::of(program)?),
        None => None,
    };
    let [mut ours_off, mut ours_on, mut by_runc, mut docker_off, mut docker_on]: [Vec<f64>; 5] =
        Default::default();
    for run in 0..=RUNS {
        // The first of each is for warming up.
        let keep = |times: &mut Vec<f64>, time| {
            if run > 0 {
                times.push(time)
            }
        };
        keep(&mut ours_off, once(&mut off)?);
        if let Some(bundle) = &runc {
            keep(&mut by_runc, bundle.run()?);
        }
        if let Some(docker) = &docker {
            keep(&mut docker_off, docker.run("none")?);
        }
        if let Some(on) = &mut on {
            keep(&mut ours_on, once(on)?);
        }
        if let Some(docker) = &docker {
            keep(&mut docker_on, docker.run("bridge")?);
        }
    }
    let row = |network: &str, ours: &[f64], rival: &[f64], what: &'static str, part: f64| Row {
        name: format!("{name}, network {network}: start → end"),
        value: median_of(ours.to_vec()),
        unit: "ms",
        target: Some(Target::WithinFloor(part)),
        floor: Some(Floor { what, value: median_of(rival.to_vec()) }),
    };
    if runc.is_some() {
        table.push(row("off", &ours_off, &by_runc, "runc run", 1.0));
    } else {
        table.skip(name, "runc is not installed");
    }
    if docker.is_some() {
        table.push(row("off", &ours_off, &docker_off, "docker run --rm --network=none", 1.0 / 8.0));
        table.push(row("on", &ours_on, &docker_on, "docker run --rm", 1.0 / 4.0));
    } else {
        table.skip(name, "docker is not installed");
    }
    at_once(bench, table)
}

/// Fifty at once: each must succeed, else the program fails.
fn at_once(bench: &Bench, table: &mut Table) -> Result<()> {
    const COUNT: usize = 50;
    let rates: Result<Vec<Option<f64>>> =
        (0..3).map(|_| floors::bare_rate(&bench.programs, "container", COUNT, COUNT)).collect();
    let rates: Vec<f64> = rates?.into_iter().flatten().collect();
    table.push(Row {
        name: format!("{COUNT} containers at once, without an error: a second"),
        value: median_of(rates),
        unit: "/s",
        target: None,
        floor: None,
    });
    Ok(())
}

fn once(program: &mut Program) -> Result<f64> {
    program.once()?["finished_ms"].as_f64().context("no figure for a container")
}

/// What `runc` runs.
struct Bundle(Folder);

impl Bundle {
    /// Lays the layers over each other; they hide nothing but a file.
    fn make(layers: &Value) -> Result<Self> {
        let folder = Folder::make()?;
        let root = folder.0.join("rootfs");
        fs::create_dir(&root)?;
        for layer in layers.as_array().context("no layers")? {
            let layer = layer.as_str().context("no layer")?;
            succeed(Command::new("cp").arg("-a").arg(format!("{layer}/.")).arg(&root))?;
        }
        succeed(Command::new("runc").arg("spec").current_dir(&folder.0))?;
        let file = folder.0.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["sh", "-c", "true"]);
        config["root"]["readonly"] = false.into();
        config["linux"]["resources"]["memory"] = json!({"limit": MEMORY_BYTES});
        config["linux"]["resources"]["pids"] = json!({"limit": PIDS});
        config["linux"]["resources"]["cpu"] = json!({"quota": 200_000, "period": 100_000});
        fs::write(&file, config.to_string())?;
        Ok(Self(folder))
    }

    fn run(&self) -> Result<f64> {
        let state = self.0.0.join("state");
        let name = format!("sealci-bench-{}", std::process::id());
        let mut command = Command::new("runc");
        timed(command.arg("--root").arg(state).args(["run", "--bundle"]).arg(&self.0.0).arg(name))
    }
}

/// A daemon with the image.
struct Docker {
    socket: PathBuf,
    image: String,
    _daemon: Program,
}

impl Docker {
    fn of(daemon: Program) -> Result<Self> {
        let text = |name: &str| daemon.ready[name].as_str().map(str::to_owned).context("no daemon");
        Ok(Self { socket: text("socket")?.into(), image: text("image")?, _daemon: daemon })
    }

    fn run(&self, network: &str) -> Result<f64> {
        let mut command = Command::new("docker");
        command.arg("-H").arg(format!("unix://{}", self.socket.display()));
        command.args(["run", "--rm", "--cpus=2"]);
        command.args([
            format!("--network={network}"),
            format!("--memory={MEMORY_BYTES}"),
            format!("--pids-limit={PIDS}"),
        ]);
        timed(command.arg(&self.image).args(["sh", "-c", "true"]))
    }
}

fn timed(command: &mut Command) -> Result<f64> {
    let begun = Instant::now();
    succeed(command)?;
    Ok(millis(begun.elapsed()))
}
