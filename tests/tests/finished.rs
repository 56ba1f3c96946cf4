//! Finished logs leave the database, whatever is killed meanwhile, and are deleted by `sealci gc`: with the real binary.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sealci_tests::{Installation, Part, both, eventually};
use serde_json::Value;

/// Bytes that do not compress, and their digest in the last line.
fn manifest(bytes: u32) -> String {
    format!(
        "name: noise\nactions:\n  one:\n    commands:\n      - head -c {bytes} /dev/urandom > noise; cat noise\n      \
         - sha256sum < noise\n"
    )
}

/// Whether a log is the noise that its last line says it is.
fn is_sound(log: &[u8], bytes: usize) -> bool {
    let said = String::from_utf8_lossy(&log[bytes.min(log.len())..]).into_owned();
    let mut sha256sum =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = sha256sum.stdin.take().unwrap();
    let noise = log[..bytes.min(log.len())].to_vec();
    let writing = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &noise));
    let found = sha256sum.wait_with_output().unwrap();
    writing.join().unwrap().unwrap();
    log.len() > bytes && said == String::from_utf8_lossy(&found.stdout)
}

/// The objects of logs in a folder; those that are being written are named otherwise.
fn log_objects(installation: &Installation) -> Vec<PathBuf> {
    fn below(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => below(&path, found),
                false => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    below(&installation.data().join("objects/logs"), &mut found);
    found.retain(|path| path.extension().is_some_and(|extension| extension == "zst"));
    found
}

/// An installation whose logs leave the database as soon as their actions end.
fn moving_at_once() -> Installation {
    let mut installation = Installation::none();
    let at_once = ["--move-logs-after-ms", "0"].map(str::to_owned);
    installation.arguments.insert(Part::Controller, at_once.to_vec());
    installation.start_all();
    installation
}

/// The most memory that a process has had.
fn peak_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn a_controller_that_is_killed_while_a_long_log_moves_loses_none_of_it() {
    const BYTES: usize = 100_000_000;
    let mut installation = moving_at_once();
    let number = installation.submit_manifest("repository", &manifest(BYTES as u32));
    assert_eq!(installation.finished(&number)["outcome"], "succeeded");
    // At any moment of the move, or after it.
    for round in 0..6_u64 {
        installation.kill(Part::Controller);
        installation.start_part(Part::Controller);
        std::thread::sleep(Duration::from_millis(round * 150));
    }
    assert!(is_sound(&installation.log(&number, "one"), BYTES), "while it moves");
    // What was begun and killed is not whole, and has no such name.
    eventually("the log to be one object", || (!log_objects(&installation).is_empty()).then_some(()));
    assert!(is_sound(&installation.log(&number, "one"), BYTES), "when it has moved");
    let peak = peak_kib(installation.pid(Part::Controller));
    println!("the controller had {} MiB at most", peak / 1024);
    assert!(peak < 128 * 1024, "{peak} KiB");
}

#[test]
fn gc_deletes_what_has_had_its_time_and_says_what_went() {
    let mut installation = Installation::none();
    // Its budget is looked at when a sixteenth has come to it: the last log is too small for that.
    installation.arguments.insert(Part::Controller, vec!["--logs-budget".into(), "1MiB".into()]);
    installation.start_all();
    let mut numbers = Vec::new();
    for (count, bytes) in [600_000, 430_000, 40_000].into_iter().enumerate() {
        let number = installation.submit_manifest(&format!("repository-{count}"), &manifest(bytes));
        assert_eq!(installation.finished(&number)["outcome"], "succeeded");
        assert!(is_sound(&installation.log(&number, "one"), bytes as usize));
        eventually("the log to move", || (log_objects(&installation).len() == count + 1).then_some(()));
        numbers.push(number);
    }
    let counted = |garbage: &Value| {
        assert_eq!((&garbage["logs"], &garbage["objects"]), (&Value::from(1), &Value::from(1)), "{garbage}");
        let freed = garbage["freed_bytes"].as_i64().unwrap();
        assert!((600_000..602_000).contains(&freed), "{garbage}");
    };
    // The row that says so is committed after the object is there.
    let would = eventually("the logs to be over their budget", || {
        let would = installation.json(&["gc", "--dry-run"]);
        (would["logs"] == 1).then_some(would)
    });
    assert_eq!(would["dry_run"], true);
    counted(&would);
    assert_eq!(log_objects(&installation).len(), 3, "a dry run deletes nothing");
    let words = both(&installation.sealci(&["gc", "--dry-run"]));
    assert!(words.starts_with("would delete 1 log, 1 stored object: "), "{words}");

    let went = installation.json(&["gc"]);
    assert_eq!(went["dry_run"], false);
    counted(&went);
    assert_eq!(log_objects(&installation).len(), 2);
    assert_eq!(both(&installation.sealci(&["gc"])), "nothing to delete\n");

    let gone = installation.sealci(&["logs", &numbers[0], "one"]);
    assert_eq!(gone.status.code(), Some(2));
    for part in ["this log was deleted on 2", "--logs-budget"] {
        assert!(both(&gone).contains(part), "{}", both(&gone));
    }
    let followed = installation.sealci(&["logs", "-f", &numbers[0]]);
    assert_eq!(
        followed.status.code(),
        Some(0),
        "its pipeline has an outcome all the same: {}",
        both(&followed)
    );
    assert!(both(&followed).contains("--logs-budget"), "{}", both(&followed));
    assert!(is_sound(&installation.log(&numbers[2], "one"), 40_000));
}
