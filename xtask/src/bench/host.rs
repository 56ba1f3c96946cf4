//! Says on what the figures were taken.

use std::fs;
use std::process::Command;

use crate::workspace;

/// A list, for the head of a report.
pub fn describe() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split(' ').take(3).collect();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "- CPU: {}, {cores} cores\n- kernel: {}\n- revision: {}\n- folder: {}\n- load before: {}\n",
        cpu_model(),
        fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim(),
        revision(),
        std::env::temp_dir().display(),
        load.join(" ")
    )
}

fn cpu_model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("model name"));
    line.and_then(|line| line.split_once(':')).map_or("unknown", |(_, name)| name.trim()).to_owned()
}

fn revision() -> String {
    if let Some(folder) = std::env::var_os("SEALCI_BENCH_PROGRAMS") {
        return format!("unknown, the programs in {}", folder.display());
    }
    let output = Command::new("git")
        .current_dir(workspace::root())
        .args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.ok().filter(|text| !text.is_empty()).unwrap_or_else(|| "unknown".to_owned())
}
