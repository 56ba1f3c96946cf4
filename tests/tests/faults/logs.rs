//! Lets actions print too much, in lines that are too long, and what is no text.

use std::fs;
use std::time::{Duration, Instant};

use sealci_tests::{Installation, Part, Periods, action, attempts};

use crate::oracle::{Oracle, log_digest};
use crate::row::{Row, seconds};

/// The most memory that a service ever had, in MiB (proc_pid_status(5)).
fn peak_mebibytes(installation: &Installation, part: Part) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", installation.pid(part))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel knows it");
    line.split_whitespace().next().and_then(|kibibytes| kibibytes.parse::<u64>().ok()).expect("in kB") / 1024
}

/// I6 for all that a log passes.
fn peaks(installation: &Installation) -> String {
    let parts = [("controller", Part::Controller), ("scheduler", Part::Scheduler), ("agent", Part::Agent)];
    let peaks: Vec<String> = parts
        .into_iter()
        .map(|(name, part)| {
            let peak = peak_mebibytes(installation, part);
            assert!(peak <= 256, "I6: the {name} had {peak} MiB");
            format!("{name} {peak}")
        })
        .collect();
    format!("peaks in MiB: {}", peaks.join(", "))
}

fn a_log_without_end(periods: Periods, how: &'static str, size: &str, quota: u64) {
    let row =
        Row::begin("a log of 20 GB", periods, how, "I6; cut at its quota, with a marker; the action goes on");
    let mut installation = row.installation();
    let arguments = vec!["--log-quota-bytes".to_owned(), quota.to_string()];
    installation.arguments.insert(Part::Controller, arguments);
    installation.start_all();
    let manifest = format!(
        "name: endless\nactions:\n  long:\n    configuration: {{executor: process}}\n    \
         commands: ['yes | head -c {size}', 'test -d .']\n"
    );
    let begun = Instant::now();
    let number = installation.submit_manifest("endless", &manifest);
    let pipeline = loop {
        let pipeline = installation.json(&["show", &number]);
        if pipeline["state"] == "finished" {
            break pipeline;
        }
        assert!(begun.elapsed() < Duration::from_secs(900), "{pipeline}");
        std::thread::sleep(Duration::from_millis(100));
    };
    let took = begun.elapsed();
    assert_eq!(attempts(action(&pipeline, "long")), ["succeeded"], "{pipeline}");
    let output = installation.sealci(&["logs", "-f", &number, "long"]);
    let (stored, marker) = (output.stdout, String::from_utf8_lossy(&output.stderr).into_owned());
    let kept =
        stored.iter().zip(b"y\n".iter().cycle()).take_while(|(have, want)| have == want).count() as u64;
    assert!(
        kept == stored.len() as u64 && kept >= quota * 9 / 10 && kept <= quota,
        "{kept} of {quota} are kept"
    );
    assert!(marker.contains("quota"), "the gap says why: {marker}");
    let marker = marker.trim().to_owned();
    row.passed(&format!(
        "{kept} bytes kept, then “{marker}”; done after {}; {}",
        seconds(took),
        peaks(&installation)
    ));
}

#[test]
fn a_log_without_end_is_cut() {
    a_log_without_end(Periods::Tenth, "`yes | head -c 200M`, quota 8 MB", "200M", 8_000_000);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_log_without_end_is_cut_as_shipped() {
    a_log_without_end(Periods::AsShipped, "`yes | head -c 20G`, quota 1 GiB", "20G", 1 << 30);
}

fn what_is_printed_is_kept(row: Row, script: &str) {
    let mut installation = row.installation();
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", script);
    let begun = Instant::now();
    let number = oracle.submit(&installation);
    let pipeline = oracle.finished(&installation, &number);
    oracle.judge(&installation, &number, &pipeline);
    let took = begun.elapsed();
    let (length, digest) = log_digest(&installation, &number, "long", 1);
    row.passed(&format!(
        "{length} bytes, SHA-256 {}… as printed, in {}; {}",
        &digest[..12],
        seconds(took),
        peaks(&installation)
    ));
}

fn a_long_line(periods: Periods, how: &'static str, script: &str) {
    let row = Row::begin("a line of 100 MB", periods, how, "I6; the log is what was printed (I3)");
    what_is_printed_is_kept(row, script);
}

#[test]
fn a_long_line_is_kept() {
    a_long_line(
        Periods::Usual,
        "a tenth: `head -c 10M /dev/zero | tr '\\0' x`",
        "head -c 10M /dev/zero | tr '\\0' x",
    );
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_long_line_is_kept_as_shipped() {
    a_long_line(
        Periods::AsShipped,
        "`head -c 100M /dev/zero | tr '\\0' x`",
        "head -c 100M /dev/zero | tr '\\0' x",
    );
}

#[test]
fn what_is_no_text_is_kept() {
    let row = Row::begin(
        "binary, non-UTF-8, NUL bytes in a log",
        Periods::Usual,
        "8 MB of /dev/urandom, and NUL bytes",
        "the log is what was printed (I3)",
    );
    what_is_printed_is_kept(
        row,
        "head -c 8M /dev/urandom; head -c 1000 /dev/zero; printf '\\377\\376\\r\\n\\033[2J'",
    );
}
