//! Lets actions fill a small disk: who takes too much is stopped, the others go on, and its end is told.

#![allow(clippy::unwrap_used, clippy::expect_used)]

// The other test of the agent needs more of it.
#[allow(dead_code)]
mod support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use sealci_agent::RoomLimits;
use sealci_agent::executor::Executor;
use sealci_agent::executor::process::ProcessExecutor;
use sealci_core::outcome::{Cause, Limit, Outcome};
use support::*;

const MIB: u64 = 1 << 20;

/// A small file system of its own, unmounted at the end.
struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(folder.path())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self { folder });
        }
        skipped("the agent's small disk", "a file system can be mounted by root only");
        None
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a failed test may leave something open.
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

/// Says loudly that a test does not run here, and why.
fn skipped(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
    if let Ok(file) = std::env::var("SEALCI_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        std::io::Write::write_all(&mut file, format!("{what}: {why}\n").as_bytes()).unwrap();
    }
}

/// An agent whose data folder is on the disk, with real processes, greeted and with credit.
async fn connected(disk: &SmallDisk, room: RoomLimits) -> (ScriptedScheduler, TestAgent, Line) {
    let mut scheduler = ScriptedScheduler::start().await;
    let executor: Arc<dyn Executor> = Arc::new(ProcessExecutor::new(disk.path(), None).unwrap());
    let mut config = config(disk.path(), &scheduler.url);
    config.executors = vec![executor];
    config.room = room;
    let agent = TestAgent::start(config);
    let (line, ..) = scheduler.greet().await;
    line.credit(1 << 20).await;
    (scheduler, agent, line)
}

/// Writes so many times 64 KiB into a file, about 5 MiB a second at most.
fn write(file: &str, times: u32) -> String {
    format!(
        "i=0; while [ $i -lt {times} ]; do head -c 65536 /dev/zero >> {file}; i=$((i+1)); sleep 0.012; done"
    )
}

/// Says so, and waits for the file.
fn wait_for(go: &Path) -> String {
    format!("echo waiting; until [ -e {} ]; do sleep 0.02; done; echo went on", go.display())
}

#[tokio::test]
async fn an_action_over_its_bound_is_stopped_and_its_neighbour_goes_on() {
    let Some(disk) = SmallDisk::mount("64m") else { return };
    let room = RoomLimits { workspace_bytes: 4 * MIB, reserve_bytes: 0 };
    let (_scheduler, agent, mut line) = connected(&disk, room).await;
    let go = disk.path().join("go");
    let (greedy, modest) = (attempt(1), attempt(2));
    let mut record = Record::default();
    let greedy_spec = spec(&["echo begins", &write("fill", 100_000), "echo never"]);
    let modest_spec = spec(&[&write("some", 16), &wait_for(&go)]);
    line.desire([(greedy, run(&greedy_spec)), (modest, run(&modest_spec))]).await;
    line.serve(&mut record, |record| record.is_closed(greedy)).await;

    let recorded = record.of(greedy);
    assert_eq!(recorded.outcome(), Some(&Outcome::Failed { exit_code: 137, limit: Some(Limit::Disk) }));
    let text = recorded.text();
    assert!(text.starts_with("begins\nsealci: stopped: ") && !text.contains("never"), "{text}");
    assert!(text.contains("an action may have 4 MiB") && text.contains("--workspace-bytes"), "{text}");

    line.serve(&mut record, |record| record.log_end(modest) > 0).await;
    std::fs::write(&go, "").unwrap();
    line.serve(&mut record, |record| record.is_closed(modest) && record.held.attempts.is_empty()).await;
    assert_eq!(record.of(modest).text(), "waiting\nwent on\n");
    assert_eq!(record.of(modest).outcome(), Some(&Outcome::Succeeded));
    agent.stop().await;
    assert_eq!(std::fs::read_dir(disk.path().join("work")).unwrap().count(), 0);
}

#[tokio::test]
async fn before_the_disk_is_full_the_largest_that_grows_is_stopped() {
    let Some(disk) = SmallDisk::mount("64m") else { return };
    let room = RoomLimits { workspace_bytes: 1 << 30, reserve_bytes: 24 * MIB };
    let (_scheduler, agent, mut line) = connected(&disk, room).await;
    let go = disk.path().join("go");
    let (large, growing, small) = (attempt(1), attempt(2), attempt(3));
    let mut record = Record::default();
    // Large, but at rest when room gets scarce.
    let large_spec = spec(&["head -c 25165824 /dev/zero > large", &wait_for(&go)]);
    line.desire([(large, run(&large_spec))]).await;
    line.serve(&mut record, |record| record.log_end(large) > 0).await;
    let growing_spec = spec(&[&write("fill", 100_000)]);
    let small_spec =
        spec(&[&format!("(while [ ! -e {} ]; do echo x >> grows; sleep 0.02; done)", go.display())]);
    let wishes = [(large, run(&large_spec)), (growing, run(&growing_spec)), (small, run(&small_spec))];
    line.desire(wishes).await;
    // The end is spooled on that same disk, and reaches the controller.
    line.serve(&mut record, |record| record.is_closed(growing)).await;
    let Some(Outcome::Errored { cause: Cause::DiskFull, message }) = record.of(growing).outcome() else {
        panic!("{:?}", record.of(growing).outcome());
    };
    assert!(message.contains("24 MiB are kept in reserve (--disk-reserve-bytes)"), "{message}");

    std::fs::write(&go, "").unwrap();
    line.serve(&mut record, |record| record.is_closed(large) && record.is_closed(small)).await;
    for neighbour in [large, small] {
        assert_eq!(record.of(neighbour).outcome(), Some(&Outcome::Succeeded));
    }
    agent.stop().await;
}
