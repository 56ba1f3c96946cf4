//! Builds what is measured, as it is released: the product's binary, and the programs that measure the floors.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::workspace;

/// The programs, by their targets' names.
#[derive(Debug)]
pub struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Those in the folder that `SEALCI_BENCH_PROGRAMS` names, to compare builds; else what is built now.
    pub fn find() -> Result<Self> {
        let Some(folder) = std::env::var_os("SEALCI_BENCH_PROGRAMS").map(PathBuf::from) else {
            return Self::build();
        };
        let programs = ["sealci", "floors", "commits", "pull", "many_agents", "placement_bench"]
            .map(|name| (name.to_owned(), folder.join(name)));
        Ok(Self(programs.into_iter().collect()))
    }

    /// One call of cargo, so that the dependencies are built once, with one set of features.
    fn build() -> Result<Self> {
        let output = workspace::cargo()
            .args(["build", "--release", "--locked", "--message-format=json-render-diagnostics"])
            .args([
                "-p",
                "sealci",
                "-p",
                "sealci-agent",
                "-p",
                "sealci-service",
                "-p",
                "sealci-image",
                "-p",
                "sealci-scheduler",
            ])
            .args([
                "--bin",
                "sealci",
                "--bin",
                "sealci-sandbox-helper",
                "--bench",
                "floors",
                "--bench",
                "commits",
                "--bench",
                "pull",
                "--example",
                "many_agents",
                "--example",
                "placement_bench",
            ])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo build")?;
        if !output.status.success() {
            bail!("the release build failed");
        }
        let messages = String::from_utf8_lossy(&output.stdout);
        let programs = messages.lines().filter_map(|line| {
            let message: Value = serde_json::from_str(line).ok()?;
            Some((message["target"]["name"].as_str()?.to_owned(), message["executable"].as_str()?.into()))
        });
        Ok(Self(programs.collect()))
    }

    pub fn path(&self, name: &str) -> Result<&PathBuf> {
        self.0.get(name).with_context(|| format!("cargo built no program `{name}`"))
    }
}
