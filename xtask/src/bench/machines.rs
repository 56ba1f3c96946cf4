//! Measures machines beside QEMU's (`crates/microvm/benches/machines.rs`), in the machine in which the machines' tests run.
//!
//! Its own clock counts instructions where it is emulated; the same is measured by this machine's, from line to line. Of both only
//! ratios mean something.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::table::{Floor, Row, Table, Target, median_of, millis};
use crate::qemu;
use crate::report::Counts;

/// By what was measured, and by which clock.
type Figures = BTreeMap<String, Vec<f64>>;

const CLOCKS: [&str; 2] = ["its own clock", "the wall clock"];
const KIBIBYTES: &str = "memory";

pub fn measure(table: &mut Table) -> Result<()> {
    let mut figures = Figures::new();
    let mut begun = None;
    let (mut counts, mut skipped) = (Counts::default(), Vec::new());
    let mut take = |line: &str| {
        let Some(words) = line.strip_prefix("measure: ") else { return };
        let (kind, rest) = words.split_once(' ').unwrap_or_default();
        let figure = rest.rsplit_once(' ').and_then(|(what, value)| Some((what, value.parse::<f64>().ok()?)));
        let mut add = |key: String, value| figures.entry(key).or_default().push(value);
        match (kind, figure) {
            ("begin", _) => begun = Some(Instant::now()),
            ("end", Some((what, value))) => {
                add(key(what, CLOCKS[0]), value);
                if let Some(begun) = begun.take() {
                    add(key(what, CLOCKS[1]), millis(begun.elapsed()));
                }
            }
            (KIBIBYTES, Some((what, value))) => add(key(what, KIBIBYTES), value),
            _ => {}
        }
    };
    qemu::run(&qemu::MEASURED_MACHINES, &mut counts, &mut skipped, &mut take)?;
    if let Some((_, why)) = skipped.first() {
        bail!("the machines were not measured: {why}");
    }
    rows(&figures, table)
}

fn key(what: &str, by: &str) -> String {
    format!("{what}, {by}")
}

fn rows(figures: &Figures, table: &mut Table) -> Result<()> {
    let median = |what: &str, by: &str| {
        let values = figures.get(&key(what, by)).with_context(|| format!("no figure of {what} by {by}"))?;
        anyhow::Ok(median_of(values.clone()))
    };
    for clock in CLOCKS {
        let floor =
            |what: &'static str, of: &str| anyhow::Ok(Some(Floor { what, value: median(of, clock)? }));
        let qemus = "qemu -M pc, Debian's kernel as it is";
        for (name, what, target, floor) in [
            ("started → over, kernel as it is", "packed: over", 0.65, floor(qemus, "qemu: over")?),
            ("started → over, kernel unpacked", "unpacked: over", 0.65, floor(qemus, "qemu: over")?),
            ("gone on → init ready", "restored: ready", 0.12, floor("booted → init ready", "booted: ready")?),
        ] {
            let name = format!("machine, {name}, by {clock}");
            let target = Some(Target::WithinFloor(target));
            table.push(Row { name, value: median(what, clock)?, unit: "ms", target, floor });
        }
    }
    for (name, what, most) in [
        ("machine: memory beside its guest's, an action running", "beside a busy guest's", 2.0),
        ("machine gone on: memory of its own", "of a clone's own", 12.0),
    ] {
        let (value, target) = (median(what, KIBIBYTES)? / 1024.0, Some(Target::AtMost(most)));
        table.push(Row { name: name.to_owned(), value, unit: "MiB", target, floor: None });
    }
    Ok(())
}
