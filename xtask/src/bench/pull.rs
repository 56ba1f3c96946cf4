//! Measures pulling an image, beside what other programs need for the same.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Bench;
use super::table::{Floor, Row, Table, Target};

pub fn measure(bench: &Bench, table: &mut Table) -> Result<()> {
    let output = Command::new(bench.programs.path("pull")?).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("the benchmark of pulls failed");
    }
    let measured: Value = serde_json::from_slice(&output.stdout).context("it did not answer with JSON")?;
    if let Some(why) = measured["skipped"].as_str() {
        table.skip("pull", why);
        return Ok(());
    }
    let figure = |name: &str| measured[name].as_f64().with_context(|| format!("it told no {name}"));
    let mebibytes = |name: &str| Ok::<_, anyhow::Error>((figure(name)? / f64::from(1 << 20)).round());
    table.push(Row {
        name: format!(
            "pull of 5 layers, {} files, {} MiB packed, {} MiB unpacked",
            figure("files")?,
            mebibytes("packed_bytes")?,
            mebibytes("unpacked_bytes")?
        ),
        value: figure("pull_ms")?,
        unit: "ms",
        target: Some(Target::WithinFloor(1.0)),
        floor: Some(Floor { what: "skopeo copy + umoci unpack", value: figure("skopeo_umoci_ms")? }),
    });
    Ok(())
}
