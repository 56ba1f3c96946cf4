//! How long an init is waited for while it is to pack files.

use std::sync::Arc;

use sealci_guest::wire::{FromInit, Taken, take_data_header};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
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

/// A machine of which there is nothing but its workspace.
struct Nowhere(PathBuf);

#[async_trait]
impl Environment for Nowhere {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        Ok(())
    }

    fn machine(&self) -> Option<Machine> {
        let names = vec!["db".to_owned()];
        Some(Machine {
            host_name: "sealci".to_owned(),
            names,
            network: None,
            workspace: self.0.clone(),
            user: "build".to_owned(),
            services: vec!["postgres".to_owned()],
        })
    }

    fn kill(&mut self) {}

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

/// What a machine's init hears, one frame after another.
async fn hear(init: &mut UnixStream) -> (u8, Vec<u8>) {
    let mut head = [0; wire::HEADER_BYTES];
    init.read_exact(&mut head).await.unwrap();
    let header = wire::Header::parse(head, wire::MAX_TO_INIT_BYTES).unwrap();
    let mut payload = vec![0; header.payload_bytes];
    init.read_exact(&mut payload).await.unwrap();
    (header.kind, payload)
}

async fn hear_message(init: &mut UnixStream) -> ToInit {
    let (kind, payload) = hear(init).await;
    ToInit::decode(kind, &payload).unwrap()
}

/// Takes an archive; its names.
async fn take_archive(init: &mut UnixStream) -> Vec<String> {
    let mut archive = Vec::new();
    loop {
        let (kind, payload) = hear(init).await;
        if kind == wire::PUT_DATA_KIND {
            archive.extend(payload);
        } else {
            assert_eq!(ToInit::decode(kind, &payload), Ok(ToInit::PutEnd));
            break;
        }
    }
    let mut archive = tar::Archive::new(&archive[..]);
    let name =
        |entry: std::io::Result<tar::Entry<'_, _>>| entry.unwrap().path().unwrap().display().to_string();
    let mut names: Vec<_> = archive.entries().unwrap().map(name).collect();
    names.sort();
    names
}

fn machine(workspace: PathBuf) -> (crate::executor::Standby, UnixStream) {
    let (channel, init) = UnixStream::pair().unwrap();
    let prepared = Prepared {
        channel,
        start: encoded(wire::Start { workdir: b"/workspace".to_vec(), ..wire::Start::default() }).unwrap(),
        environment: Box::new(Nowhere(workspace)),
        timeout: Duration::from_secs(60),
        grace: Duration::ZERO,
    };
    let (standby, backstage) = standby();
    tokio::spawn(drive(prepared, backstage));
    (standby, init)
}

#[tokio::test]
async fn a_machine_is_woken_when_it_calls_and_gets_the_workspace_first() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    std::fs::write(folder.path().join("sub/file"), "text").unwrap();
    let (standby, mut init) = machine(folder.path().to_owned());
    let door = standby.door();
    let put = tokio::spawn(async move { door.put("~/cache", &b"an archive"[..]).await });
    assert_eq!(hear_message(&mut init).await, ToInit::Hello { version: wire::VERSION });
    // Nothing is said to who has not called.
    let quiet = tokio::time::timeout(Duration::from_millis(50), hear(&mut init)).await;
    assert!(quiet.is_err(), "{quiet:?}");
    say(&mut init, FromInit::Hello { version: wire::VERSION }).await;
    let ToInit::Wake(wake) = hear_message(&mut init).await else { panic!("it is woken first") };
    assert_eq!(
        (wake.host_name.as_str(), &wake.names[..], wake.entropy.len()),
        ("sealci", &["db".to_owned()][..], 32)
    );
    assert_eq!((wake.user.as_str(), &wake.services[..]), ("build", &["postgres".to_owned()][..]));
    assert!(wake.host_boot_ms > 0 && wake.unix_time_us > 0, "{wake:?}");

    let ToInit::Put(put_in) = hear_message(&mut init).await else { panic!("the workspace goes in") };
    assert_eq!((put_in.root.as_slice(), put_in.workdir.as_slice()), (&b""[..], &b"/workspace"[..]));
    assert_eq!(take_archive(&mut init).await, ["sub", "sub/file"]);
    say(&mut init, FromInit::Stored { id: put_in.id, files: 2, bytes: 4 }).await;
    let ToInit::Put(put_in) = hear_message(&mut init).await else { panic!("then what else there is") };
    assert_eq!(put_in.root, b"~/cache");
    loop {
        let (kind, payload) = hear(&mut init).await;
        if kind != wire::PUT_DATA_KIND {
            assert_eq!(ToInit::decode(kind, &payload), Ok(ToInit::PutEnd));
            break;
        }
    }
    say(&mut init, FromInit::Stored { id: put_in.id, files: 1, bytes: 10 }).await;
    assert_eq!(put.await.unwrap().unwrap(), crate::executor::door::Stored { files: 1, bytes: 10 });
    let mut execution = standby.begin();
    assert!(matches!(hear_message(&mut init).await, ToInit::Start(_)));
    say(&mut init, FromInit::Finished { ending: Ending::Succeeded, survivors: 0 }).await;
    let finished = ExecutionEvent::Finished { outcome: Outcome::Succeeded, remains: None };
    assert_eq!(execution.next().await, Some(finished));
}

#[tokio::test]
async fn a_machine_that_does_not_come_up_is_waited_for_so_long() {
    let (standby, _init) = machine("/nowhere/at/all".into());
    match standby.begin().next().await {
        Some(ExecutionEvent::Finished { outcome: Outcome::Errored { cause, message }, .. }) => {
            assert_eq!(cause, Cause::Executor);
            assert!(message.contains("did not come up in time"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_machine_that_ends_while_it_stands_by_is_noticed() {
    let (standby, mut init) = machine("/nowhere/at/all".into());
    assert_eq!(hear_message(&mut init).await, ToInit::Hello { version: wire::VERSION });
    say(&mut init, FromInit::Hello { version: wire::VERSION }).await;
    assert!(matches!(hear_message(&mut init).await, ToInit::Wake(_)));
    let ending = Ending::Error("there is no disk".to_owned());
    say(&mut init, FromInit::Finished { ending, survivors: 0 }).await;
    // Its channel is let go before anybody wants it to begin, or gives it up.
    assert_eq!(init.read(&mut [0]).await.unwrap(), 0);
    match standby.abandon().await {
        (Outcome::Errored { message, .. }, None) => assert_eq!(message, "there is no disk"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_workspace_that_cannot_be_packed_ends_it_before_it_begins() {
    let (standby, mut init) = machine("/nowhere/at/all".into());
    let mut execution = standby.begin();
    say(&mut init, FromInit::Hello { version: wire::VERSION }).await;
    let mut heard = Vec::new();
    while !matches!(heard.last(), Some(ToInit::Stop { .. })) {
        heard.push(hear_message(&mut init).await);
    }
    let Some(ToInit::Stop { id }) = heard.last() else { unreachable!() };
    say(&mut init, FromInit::Refused { id: *id, why: "it was given up".into() }).await;
    match execution.next().await {
        Some(ExecutionEvent::Finished { outcome: Outcome::Errored { message, .. }, .. }) => {
            assert!(message.contains("pack /nowhere/at/all: No such file"), "{message}");
        }
        other => panic!("{other:?}"),
    }
}
