//! Fills the disks of the controller and of an agent, and takes the store of objects away.

use std::fs;
use std::time::{Duration, Instant};

use sealci_tests::{Part, Periods, S3, SmallDisk, action, attempts, both, eventually};

use crate::oracle::{Oracle, WAIT};
use crate::row::{Row, seconds, within};
use crate::services::submit_body;

const FINE: &str =
    "name: fine\nactions:\n  fine:\n    configuration: {executor: fake}\n    commands: ['print fine']\n";

#[test]
fn the_database_has_no_room() {
    let row = Row::begin(
        "database or disk full",
        Periods::Usual,
        "SQLite on a tmpfs of 24 MiB, a log of 40 MB that cannot be packed; then the tmpfs is made larger",
        "refuses clearly, goes on when there is room, nothing acknowledged is lost",
    );
    let Some(row) = row.needs_root() else { return };
    let mut installation = row.installation();
    let disk = SmallDisk::mount(&installation.data(), 24);
    let agent = SmallDisk::bind(&installation.scratch("agents-own"), &installation.data().join("agent"));
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", &format!("head -c 40M /dev/urandom; {WAIT}; echo over"));
    let number = oracle.submit(&installation);
    oracle.wait_all_begun();
    let mut acknowledged = vec![number.clone()];
    let mut count = 0;
    let refusal = eventually("the controller to have no room", || {
        count += 1;
        let (status, body, _) = submit_body(&installation, "file:///nowhere", FINE, &format!("fine-{count}"));
        if status >= 300 {
            return Some(format!("{status}: {}", body["detail"].as_str().unwrap_or_default()));
        }
        acknowledged.push(body["number"].to_string());
        None
    });
    assert!(refusal.starts_with("503: it could not be recorded"), "clearly: {refusal}");
    disk.resize(400);
    let resized = Instant::now();
    let (_, again) = within("the controller to take work again", Duration::from_secs(30), || {
        (submit_body(&installation, "file:///nowhere", FINE, "again").0 < 300).then_some(())
    });
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    let done = resized.elapsed();
    oracle.judge(&installation, &number, &pipeline);
    for number in &acknowledged {
        assert_eq!(installation.finished(number)["outcome"], "succeeded", "{number} was acknowledged");
    }
    assert_eq!(attempts(action(&pipeline, "long")), ["succeeded"], "{pipeline}");
    row.passed(&format!(
        "refused: “{refusal}”; takes work {} after there is room, the log whole after {}",
        seconds(again),
        seconds(done)
    ));
    drop(installation);
    drop(agent);
}

#[test]
fn the_agents_disk_has_no_room() {
    let row = Row::begin(
        "agent's disk full",
        Periods::Usual,
        "the agent's folder on a tmpfs of 64 MiB; an action writes 200 MB, then a stranger fills it",
        "the action ends with the reason; the agent takes no more until there is room, then by itself (I7)",
    );
    let Some(row) = row.needs_root() else { return };
    let mut installation = row.installation();
    let folder = installation.data().join("agent");
    let disk = SmallDisk::mount(&folder, 64);
    let bounds = ["--min-free-disk-bytes", "33554432", "--disk-reserve-bytes", "8388608"];
    installation.arguments.insert(Part::Agent, bounds.iter().map(|word| (*word).to_owned()).collect());
    installation.start_all();
    let manifest = "name: fills\nactions:\n  fills:\n    configuration: {executor: process}\n    \
                    commands: ['head -c 200M /dev/urandom > large']\n";
    let number = installation.submit_manifest("fills", manifest);
    let pipeline = installation.finished(&number);
    let outcome = action(&pipeline, "fills")["outcome"].clone();
    assert_eq!(outcome["cause"], "disk_full", "{pipeline}");
    let reason = outcome["message"].as_str().unwrap_or_default().to_owned();
    // Its workspace is gone, so there is room again; a stranger takes it.
    installation.wait_for_agents(1);
    fs::write(folder.join("stranger"), vec![1; 40 << 20]).unwrap();
    let refusal = eventually("the agent to take no more", || {
        let agents = installation.json(&["agent", "list"]);
        (agents[0]["accepting"] == false).then(|| agents[0]["not_accepting_because"].to_string())
    });
    let waiting = installation.submit_manifest("fine", FINE);
    let why = eventually("a reason to wait", || {
        let text = both(&installation.sealci(&["why", &waiting]));
        (text.contains("disk") || text.contains("free")).then_some(text)
    });
    eprintln!("waits because: {why}");
    fs::remove_file(folder.join("stranger")).unwrap();
    let emptied = Instant::now();
    assert_eq!(installation.finished(&waiting)["outcome"], "succeeded");
    row.passed(&format!(
        "“{reason}”; then not accepting: {refusal}; goes on {} after there is room",
        seconds(emptied.elapsed())
    ));
    drop(installation);
    drop(disk);
}

#[test]
fn the_object_storage_is_down() {
    let row = Row::begin(
        "object storage down",
        Periods::Usual,
        "SIGSTOP the S3 server, 8 actions, SIGCONT",
        "actions go on, their logs are read meanwhile and are what was printed (I3), and move when it is back (I7)",
    );
    let s3 = match S3::start() {
        Ok(s3) => s3,
        Err(why) => return row.skip("s3", &why),
    };
    let mut installation = row.installation();
    installation.environment.extend(s3.environment());
    installation.arguments.insert(Part::Controller, vec!["--objects".to_owned(), s3.location()]);
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    for name in 0..8 {
        oracle.add(&format!("a{name}"), "head -c 300000 /dev/urandom");
    }
    let before = oracle.submit(&installation);
    let pipeline = oracle.finished(&installation, &before);
    oracle.judge(&installation, &before, &pipeline);
    eventually("the logs to be objects", || (s3.logs() == 8).then_some(()));

    s3.hang();
    let begun = Instant::now();
    let mut meanwhile = Oracle::new(installation.scratch("meanwhile"));
    for name in 0..8 {
        meanwhile.add(&format!("a{name}"), "head -c 300000 /dev/urandom");
    }
    let number = meanwhile.submit(&installation);
    let pipeline = meanwhile.finished(&installation, &number);
    meanwhile.judge(&installation, &number, &pipeline);
    let took = begun.elapsed();
    s3.wake();
    let patience = Duration::from_secs(120);
    let (_, moved) = within("the logs to move", patience, || (s3.logs() == 16).then_some(()));
    for (oracle, number) in [(&oracle, &before), (&meanwhile, &number)] {
        let pipeline = oracle.finished(&installation, number);
        oracle.judge(&installation, number, &pipeline);
    }
    row.passed(&format!(
        "8 actions done and their logs read in {} meanwhile; moved {} after it is back",
        seconds(took),
        seconds(moved)
    ));
}
