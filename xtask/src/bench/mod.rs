//! Measures SealCI as it is released, with the machine's own floors in the same run: `cargo xtask bench [NAME…]`.
//!
//! Everything is driven from outside: the real binary, every service a process of its own, through the REST API.

mod build;
mod client;
mod containers;
mod fleet;
mod floors;
mod growth;
mod host;
mod latency;
mod machines;
mod project;
mod pull;
mod push;
mod rates;
mod table;

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use build::Programs;
use floors::Floors;
use table::{Row, Table};

/// What every measurement has.
#[derive(Debug)]
pub struct Bench {
    programs: Programs,
}

/// The measurements, in their order.
pub const NAMES: [&str; 11] = [
    "latency",
    "push",
    "run",
    "fake",
    "sandbox",
    "log",
    "containers",
    "pull",
    "project",
    "growth",
    "machines",
];

pub fn run(wanted: &[&str]) -> Result<bool> {
    if let Some(unknown) = wanted.iter().find(|name| !NAMES.contains(name)) {
        bail!("there is no measurement `{unknown}`, only {}", NAMES.join(", "));
    }
    let host = host::describe();
    let begun = Instant::now();
    let mut table = Table::default();
    let names: Vec<&str> =
        NAMES.into_iter().filter(|name| wanted.is_empty() || wanted.contains(name)).collect();
    if names == ["machines"] {
        // Nothing of it is the whole system's.
        machines::measure(&mut table)?;
        println!("{host}- took: {:.0} s\n\n{}", begun.elapsed().as_secs_f64(), table.show());
        return Ok(true);
    }
    let bench = Bench { programs: Programs::find()? };
    if names == ["growth"] {
        // It compares figures of its own with one another; the bare machine's say nothing of it.
        growth::measure(&bench, &mut table)?;
        println!("{host}- took: {:.0} s\n\n{}", begun.elapsed().as_secs_f64(), table.show());
        return Ok(true);
    }
    let floors = Floors::measure(&bench.programs)?;
    show_floors(&floors, &mut table);
    for name in names {
        eprintln!("{name} …");
        match name {
            "latency" => latency::measure(&bench, &floors, &mut table)?,
            "push" => push::measure(&bench, &mut table)?,
            "run" => latency::measure_run(&bench, &floors, &mut table)?,
            "sandbox" => rates::measure_sandbox(&bench, &mut table)?,
            "fake" => rates::measure_fake(&bench, &mut table)?,
            "containers" => containers::measure(&bench, &mut table)?,
            "pull" => pull::measure(&bench, &mut table)?,
            "growth" => growth::measure(&bench, &mut table)?,
            "project" => project::measure(&bench, &mut table)?,
            "machines" => machines::measure(&mut table)?,
            _ => rates::measure_log(&bench, &mut table)?,
        }
    }
    println!("{host}- took: {:.0} s\n\n{}", begun.elapsed().as_secs_f64(), table.show());
    // A missed target is a fact to be read, not a failure of this command: absolute times are for a quiet host.
    Ok(true)
}

fn show_floors(floors: &Floors, table: &mut Table) {
    for (name, value) in [
        ("floor: 4 KiB appended and synced", floors.fsync_ms),
        ("floor: one row committed by SQLite", floors.commit_ms),
        ("floor: /bin/true spawned and awaited", floors.spawn_ms),
        ("floor: ten files written by git read-tree", floors.checkout_ms),
    ] {
        table.push(Row { name: name.to_owned(), value, unit: "ms", target: None, floor: None });
    }
}

/// Runs a program that must succeed; what it says is shown only where it does not.
fn succeed(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
