//! How long an init is waited for while it is to pack files.

use std::sync::Arc;

use sealci_guest::wire::{FromInit, Taken, take_data_header};
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;

use super::*;
use crate::executor::door::{DoorError, TakeLimits};
use crate::executor::{Execution, standby};

const LIMITS: TakeLimits = TakeLimits { max_bytes: 1, max_files: 1 };

/// An environment of which there is nothing but its being killed.
struct Mortal(Arc<Notify>);

#[async_trait]
impl Environment for Mortal {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn kill(&mut self) {
        self.0.notify_one();
    }

    fn limit_reached(&self) -> Option<Limit> {
        None
    }

    async fn clear(&mut self, _: bool) -> Result<(), String> {
        Ok(())
    }

    fn complaints(&mut self) -> String {
        String::new()
    }
}

async fn say(init: &mut UnixStream, told: FromInit<'_>) {
    let mut frame = Vec::new();
    told.encode(&mut frame).unwrap();
    init.write_all(&frame).await.unwrap();
}

/// An execution that is over, its init's end of the channel, and what says that it was killed.
async fn over() -> (Execution, UnixStream, Arc<Notify>) {
    let (channel, mut init) = UnixStream::pair().unwrap();
    let killed = Arc::new(Notify::new());
    let prepared = Prepared {
        channel,
        start: encoded(wire::Start::default()).unwrap(),
        environment: Box::new(Mortal(killed.clone())),
        timeout: Duration::from_secs(60),
        grace: Duration::ZERO,
    };
    let (standby, backstage) = standby();
    // It ends with the test's runtime at the latest.
    tokio::spawn(drive(prepared, backstage));
    let mut execution = standby.begin();
    for told in [
        FromInit::Hello { version: wire::VERSION },
        FromInit::Ready,
        FromInit::Ended { ending: Ending::Succeeded, survivors: 0 },
    ] {
        say(&mut init, told).await;
    }
    assert_eq!(execution.next().await, Some(ExecutionEvent::Started));
    assert_eq!(execution.next().await, Some(ExecutionEvent::Over { outcome: Outcome::Succeeded }));
    (execution, init, killed)
}

#[tokio::test]
async fn an_init_that_falls_silent_is_ended_by_force() {
    let (mut execution, init, killed) = over().await;
    let door = execution.door();
    let dying = async {
        killed.notified().await;
        drop(init);
    };
    let (taken, ()) = tokio::join!(door.take(&[], "", LIMITS, tokio::io::sink()), dying);
    assert!(matches!(taken, Err(DoorError::Closed)), "{taken:?}");
    let finished = ExecutionEvent::Finished { outcome: Outcome::Succeeded, remains: None };
    assert_eq!(execution.next().await, Some(finished));
}

#[tokio::test]
async fn an_init_that_gets_on_has_all_the_time() {
    let (mut execution, mut init, _killed) = over().await;
    let door = execution.door();
    // Whoever asks nothing is not waited for at all.
    tokio::time::sleep(Duration::from_millis(800)).await;
    let packing = async {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(250)).await;
            init.write_all(&take_data_header(0)).await.unwrap();
        }
        say(&mut init, FromInit::Taken(Taken { id: 1, files: 7, ..Taken::default() })).await;
    };
    let (taken, ()) = tokio::join!(door.take(&[], "", LIMITS, tokio::io::sink()), packing);
    assert_eq!(taken.unwrap().files, 7);
    execution.leave();
    say(&mut init, FromInit::Finished { ending: Ending::Succeeded, survivors: 0 }).await;
    let finished = ExecutionEvent::Finished { outcome: Outcome::Succeeded, remains: None };
    assert_eq!(execution.next().await, Some(finished));
}

#[tokio::test]
async fn an_answer_to_nothing_is_garbage() {
    let (mut execution, mut init, _killed) = over().await;
    say(&mut init, FromInit::Stored { id: 1, files: 1, bytes: 1 }).await;
    let finished = ExecutionEvent::Finished { outcome: Outcome::Succeeded, remains: None };
    // What was told stands all the same.
    let taken = execution.door().take(&[], "", LIMITS, tokio::io::sink()).await;
    assert!(matches!(taken, Err(DoorError::Closed)), "{taken:?}");
    assert_eq!(execution.next().await, Some(finished));
}

#[test]
fn what_a_dead_process_was_writing_goes_with_the_next_start() {
    let folder = tempfile::tempdir().unwrap();
    let bin = folder.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let mut dead = std::process::Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let own = format!(".sealci-init-{}", std::process::id());
    let theirs = format!(".sealci-init-{}", dead.id());
    for name in [&own, &theirs, ".sealci-init-", ".sealci-init-x", "other"] {
        fs::write(bin.join(name), "half").unwrap();
    }
    for _ in ["where the init is missing", "where it is there"] {
        fs::write(bin.join(&theirs), "half").unwrap();
        let init = install(folder.path()).unwrap();
        let mut names: Vec<_> = fs::read_dir(&bin)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| *name != own && !init.ends_with(name))
            .collect();
        names.sort();
        assert_eq!(names, [".sealci-init-", ".sealci-init-x", "other"]);
    }
}
