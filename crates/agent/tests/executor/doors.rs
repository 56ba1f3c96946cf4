//! Files that go in and out of an environment, and programs beside its commands.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use sealci_agent::executor::door::{Door, DoorError, ExecEnd, ExecRequest, Said, TakeLimits, Taken, Talk};
use sealci_agent::executor::{Execution, ExecutionEvent, ExecutionRequest};
use sealci_core::outcome::Outcome;
use tokio::io::AsyncReadExt;

use crate::lab::{Lab, PATIENCE, Record, eventually, processes_of, until_output};

const LIMITS: TakeLimits = TakeLimits { max_bytes: 4 << 30, max_files: 100_000 };

fn staying<C: Into<String>>(lab: &Lab, commands: impl IntoIterator<Item = C>) -> ExecutionRequest {
    ExecutionRequest { stays: true, ..lab.request(commands) }
}

/// Takes events until the commands are over.
pub async fn until_over(execution: &mut Execution) -> Record {
    let mut record = Record::default();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while record.over.is_none() {
        let event = tokio::time::timeout_at(deadline, execution.next()).await.expect("it is over in time");
        record.take(event.expect("it is over before it ends"));
    }
    record
}

async fn rest(execution: &mut Execution, mut record: Record) -> Record {
    while let Some(event) = tokio::time::timeout(PATIENCE, execution.next()).await.expect("it ends in time") {
        record.take(event);
    }
    assert_eq!(record.remains, None);
    record
}

pub async fn take(door: &Door, paths: &[&str], base: &str) -> Result<(Vec<u8>, Taken), DoorError> {
    let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
    let mut archive = Vec::new();
    let taken = door.take(&paths, base, LIMITS, &mut archive).await?;
    Ok((archive, taken))
}

/// What an archive holds: names, modes, times and contents, or links.
fn entries_of(archive: &[u8]) -> Vec<(String, u32, u64, String)> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let (mode, time) = (entry.header().mode().unwrap(), entry.header().mtime().unwrap());
        let mut content = String::new();
        match entry.link_name().unwrap() {
            Some(target) => content = format!("-> {}", target.display()),
            None => drop(entry.read_to_string(&mut content).unwrap()),
        }
        (name, mode, time, content)
    });
    entries.collect()
}

pub fn archive_of(files: &[(&str, &str, u32)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, content, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        header.set_mtime(1_234_567_890);
        archive.append_data(&mut header, name, content.as_bytes()).unwrap();
    }
    archive.into_inner().unwrap()
}

pub async fn files_go_in_and_come_out(lab: &Lab) {
    let many: Vec<_> =
        (0..2000).map(|index| (format!("in/d{}/f{index}", index % 20), format!("{index}\n"))).collect();
    let many: Vec<_> = many.iter().map(|(name, content)| (&**name, &**content, 0o644)).collect();
    let request = staying(
        lab,
        [
            "cat in/d7/f7 \"$HOME\"/.cache/kept tool/run; tool/run; ls in | wc -l; test -w in/d7/f7; rm -r in/d0",
            "ln -s /etc/passwd in/link; mkdir out; echo result >out/result; chmod 600 out/result; exit 3",
        ],
    );
    let standby = lab.executor.prepare(request).await.unwrap();
    let door = standby.door();
    let stored = door.put("", &archive_of(&many)[..]).await.unwrap();
    assert_eq!(stored.files, 2000);
    let kept = archive_of(&[("kept", "from the cache\n", 0o640)]);
    door.put("~/.cache", &kept[..]).await.unwrap();
    let tool = archive_of(&[("run", "echo ran\n", 0o755)]);
    door.put("tool", &tool[..]).await.unwrap();
    let mut execution = standby.begin();
    let record = until_over(&mut execution).await;
    assert_eq!(record.over, Some(Outcome::Failed { exit_code: 3, limit: None }), "{}", record.text());
    assert_eq!(record.text().replace(' ', ""), "7\nfromthecache\nechoran\nran\n20\n");
    let (archive, taken) = take(&door, &["in", "!in/d1*", "out/*", "nothing/*"], "").await.unwrap();
    assert_eq!((taken.missing, taken.unreadable, taken.specials), (vec!["nothing/*".to_owned()], 0, 0));
    let entries = entries_of(&archive);
    // Nine of the folders are left, with what is in them.
    let wanted = |entry: &&(String, u32, u64, String)| entry.0.starts_with("in/d7/f");
    let found: Vec<_> = entries.iter().filter(wanted).collect();
    assert_eq!(found.len(), 100);
    assert!(found.iter().all(|(_, mode, time, _)| (*mode, *time) == (0o644, 1_234_567_890)));
    assert!(entries.iter().any(|(name, _, _, content)| name == "in/link" && content == "-> /etc/passwd"));
    assert!(
        entries
            .iter()
            .any(|(name, mode, _, content)| name == "out/result" && *mode == 0o600 && content == "result\n")
    );
    assert!(!entries.iter().any(|(name, ..)| name.starts_with("in/d1") || name.starts_with("in/d0")));
    let (home, _) = take(&door, &["~/.cache/kept"], "~").await.unwrap();
    assert_eq!(entries_of(&home)[0].0, ".cache/kept");
    execution.leave();
    let record = rest(&mut execution, record).await;
    assert_eq!(record.outcome(), &Outcome::Failed { exit_code: 3, limit: None });
    assert!(matches!(take(&door, &["in"], "").await, Err(DoorError::Closed)));
}

pub async fn everything_has_its_time(lab: &Lab) {
    let standby =
        lab.executor.prepare(staying(lab, ["echo up; until test -e go; do sleep 0.01; done"])).await.unwrap();
    let door = standby.door();
    let exec = |line: &str| door.exec(ExecRequest::line(line, PATIENCE));
    assert!(matches!(take(&door, &["."], "").await, Err(DoorError::NotNow(_))));
    assert!(matches!(exec("true").await, Err(DoorError::NotNow(_))));
    // Nothing of what is refused stands in the way of what follows.
    match door.put("", &archive_of(&[("f", "x", 0o644)])[..700]).await {
        Err(DoorError::Refused(why)) => assert!(why.contains("not a whole"), "{why}"),
        other => panic!("{other:?}"),
    }
    let broken = archive_that_breaks();
    assert!(matches!(door.put("", broken).await, Err(DoorError::Source(_))));
    let mut execution = standby.begin();
    let record = until_output(&mut execution, "up").await;
    assert!(matches!(door.put("", &archive_of(&[])[..]).await, Err(DoorError::NotNow(_))));
    assert!(matches!(take(&door, &["."], "").await, Err(DoorError::NotNow(_))));
    let ended = exec("echo \"in $(basename \"$(pwd)\")\"; exit 5").await.unwrap();
    assert_eq!(ended.end, ExecEnd::Exited { exit_code: 5 });
    assert!(ended.output.starts_with(b"in "));
    exec("touch go").await.unwrap();
    execution.leave();
    let record = rest(&mut execution, record).await;
    assert_eq!((record.over.as_ref(), record.outcome()), (Some(&Outcome::Succeeded), &Outcome::Succeeded));
    assert!(matches!(exec("true").await, Err(DoorError::Closed)));
}

/// An archive that breaks off with an error.
fn archive_that_breaks() -> impl tokio::io::AsyncRead {
    let head = std::io::Cursor::new(archive_of(&[("f", "x", 0o644)])[..512].to_vec());
    AsyncReadExt::chain(head, FailingReader)
}

struct FailingReader;

impl tokio::io::AsyncRead for FailingReader {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Ready(Err(std::io::Error::other("the disk is gone")))
    }
}

/// An archive that never comes.
struct SilentReader;

impl tokio::io::AsyncRead for SilentReader {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::task::Poll::Pending
    }
}

pub async fn a_put_may_be_given_up(lab: &Lab) {
    let request = lab.request(["ls | wc -l"]);
    let standby = lab.executor.prepare(request).await.unwrap();
    let door = standby.door();
    let given_up = tokio::time::timeout(Duration::from_millis(50), door.put("", SilentReader)).await;
    assert!(given_up.is_err());
    door.put("", &archive_of(&[("f", "x", 0o644)])[..]).await.unwrap();
    // One that is under way is waited for, and given up with the standby.
    let putting = tokio::spawn({
        let door = door.clone();
        async move { door.put("", SilentReader).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(standby.abandon().await, (Outcome::Cancelled, None));
    assert!(matches!(putting.await.unwrap(), Err(DoorError::Closed)));
    let record = lab.run(ExecutionRequest { stays: false, ..lab.request(["true"]) }).await;
    assert_eq!((record.over.as_ref(), record.outcome()), (None, &Outcome::Succeeded));
}

pub async fn who_takes_slowly_holds_up_nobody(lab: &Lab) {
    let big = "head -c 30000000 /dev/zero >big; echo x >small; exit 2";
    let failed = Outcome::Failed { exit_code: 2, limit: None };
    let mut execution = lab.start(staying(lab, [big])).await;
    let record = until_over(&mut execution).await;
    let door = execution.door();
    // Takes nothing: given up, and the next is not disturbed.
    let (writer, _reader) = tokio::io::duplex(1024);
    let paths = ["big".to_owned()];
    let slow = door.take(&paths, "", LIMITS, writer);
    assert!(tokio::time::timeout(Duration::from_millis(100), slow).await.is_err());
    let (archive, _) = take(&door, &["small"], "").await.unwrap();
    assert_eq!(entries_of(&archive)[0].3, "x\n");
    // Breaks.
    let (writer, reader) = tokio::io::duplex(1024);
    drop(reader);
    assert!(matches!(door.take(&paths, "", LIMITS, writer).await, Err(DoorError::Sink(_))));
    let too_many = TakeLimits { max_bytes: 1000, max_files: 10 };
    match door.take(&paths, "", too_many, tokio::io::sink()).await {
        Err(DoorError::Refused(why)) => assert!(why.contains("more than 1000 bytes"), "{why}"),
        other => panic!("{other:?}"),
    }
    // Killed in its midst: what was told stands.
    let (writer, mut reader) = tokio::io::duplex(1024);
    let stuck = tokio::spawn({
        let (door, paths) = (door.clone(), paths.clone());
        async move { door.take(&paths, "", LIMITS, writer).await }
    });
    reader.read_exact(&mut [0; 512]).await.unwrap();
    // So that everything on the way has filled up, on most machines; on others this shows less, and fails no more.
    tokio::time::sleep(Duration::from_millis(100)).await;
    let killed_at = Instant::now();
    execution.handle().kill();
    let record = rest(&mut execution, record).await;
    assert!(killed_at.elapsed() < Duration::from_secs(10));
    assert_eq!(record.outcome(), &failed);
    drop(reader);
    assert!(stuck.await.unwrap().is_err());
}

pub async fn what_cannot_be_read_is_named(lab: &Lab) {
    let shut = "mkdir shut open; echo a >shut/a; echo b >open/b; echo c >open/c; chmod 0 shut open/c; mkfifo open/fifo";
    let request = staying(lab, [shut]);
    let workspace = request.workspace.clone();
    let mut execution = lab.start(request).await;
    let record = until_over(&mut execution).await;
    let (archive, taken) = take(&execution.door(), &["shut", "open"], "").await.unwrap();
    let names: Vec<_> = entries_of(&archive).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(taken.specials, 1);
    if taken.unreadable == 0 {
        // Nothing is shut to root on the bare host.
        assert_eq!(names, ["open/", "open/b", "open/c", "shut/", "shut/a"]);
    } else {
        assert_eq!(names, ["open/", "open/b", "shut/"]);
        assert_eq!(taken.unreadable, 2);
        let told = taken.unreadable_names.join(" ");
        assert!(
            told.contains("open/c: Permission denied") && told.contains("shut: Permission denied"),
            "{told}"
        );
    }
    execution.leave();
    rest(&mut execution, record).await;
    // So that it can be removed.
    std::fs::set_permissions(workspace.join("shut"), std::fs::Permissions::from_mode(0o700)).unwrap();
}

pub async fn an_environment_that_stays_is_empty_and_ends(lab: &Lab) {
    let left = "(trap '' TERM HUP; setsid sleep 1000 & sleep 1000) >/dev/null 2>&1 & echo on";
    // By being told beforehand, by a cancel, by being dropped.
    let request = staying(lab, [left]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let record = until_over(&mut execution).await;
    let commands = processes_of(attempt);
    assert!(commands.iter().all(|line| !line.contains("sleep")), "{commands:?}");
    execution.handle().cancel(PATIENCE);
    assert_eq!(rest(&mut execution, record).await.outcome(), &Outcome::Succeeded);

    let mut execution = lab.start(staying(lab, [left])).await;
    execution.leave();
    let record = rest(&mut execution, Record::default()).await;
    assert_eq!((record.over.as_ref(), record.outcome()), (Some(&Outcome::Succeeded), &Outcome::Succeeded));

    let request = staying(lab, ["echo up; sleep 1000"]);
    let mut execution = lab.start(request).await;
    let record = until_output(&mut execution, "up").await;
    execution.handle().cancel(PATIENCE);
    let record = rest(&mut execution, record).await;
    assert_eq!((record.over.as_ref(), record.outcome()), (None, &Outcome::Cancelled));

    let request = staying(lab, ["echo over"]);
    let scratch = request.scratch.clone();
    let mut execution = lab.start(request).await;
    until_over(&mut execution).await;
    drop(execution);
    eventually("it is taken down", || !mounted_below(&scratch));
}

fn mounted_below(folder: &std::path::Path) -> bool {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(folder.to_str().unwrap())
}

pub async fn programs_beside_end_with_the_commands(lab: &Lab) {
    let request = lab.request(["echo up; until test -e go; do sleep 0.01; done"]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let record = until_output(&mut execution, "up").await;
    let door = execution.door();
    let late = door.exec(ExecRequest::line("echo late; sleep 1000", Duration::from_secs(2))).await.unwrap();
    assert_eq!((late.end, &late.output[..]), (ExecEnd::TimedOut, &b"late\n"[..]));
    let mut missing = ExecRequest::line("", PATIENCE);
    missing.program = vec!["nosuch".to_owned()];
    assert!(matches!(door.exec(missing).await, Err(DoorError::Refused(why)) if why.contains("nosuch")));
    let lasting =
        tokio::spawn(async move { door.exec(ExecRequest::line("touch go; sleep 1000", PATIENCE)).await });
    let record = rest(&mut execution, record).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(lasting.await.unwrap().unwrap().end, ExecEnd::Stopped);
    assert_eq!(processes_of(attempt), Vec::<String>::new());
    // Its work is not the command's.
    assert!(!matches!(execution.next().await, Some(ExecutionEvent::Output(_))));
}

/// All that a program says on both outputs, passed on as it comes, and how it ended.
async fn all_of_it(talk: &mut Talk) -> ([Vec<u8>; 2], ExecEnd) {
    let mut said = [Vec::new(), Vec::new()];
    loop {
        match talk.next().await.unwrap() {
            Said::Output { is_error, bytes } => {
                said[usize::from(is_error)].extend_from_slice(&bytes);
                talk.taken().await.unwrap();
            }
            Said::Room => {}
            Said::Ended(end) => return (said, end),
        }
    }
}

pub async fn programs_beside_are_talked_with(lab: &Lab) {
    const PIECES: usize = 200;
    let mut request = lab.request(["echo up; until test -e go; do sleep 0.01; done"]);
    request.env.insert("OF_THE_ACTION".into(), "seen".into());
    let mut execution = lab.start(request).await;
    let record = until_output(&mut execution, "up").await;
    let door = execution.door();
    let line = "read word; echo $word $OF_THE_ACTION; echo error >&2; exit 7";
    let mut talk = door.talk(ExecRequest::line(line, PATIENCE)).await.unwrap();
    talk.send("hello\n".into()).await.unwrap();
    let (said, end) = all_of_it(&mut talk).await;
    assert_eq!(said.map(|bytes| String::from_utf8(bytes).unwrap()), ["hello seen\n", "error\n"]);
    assert_eq!(end, ExecEnd::Exited { exit_code: 7 });
    let mut missing = ExecRequest::line("", PATIENCE);
    missing.program = vec!["nosuch".to_owned()];
    let mut talk = door.talk(missing).await.unwrap();
    assert!(matches!(talk.next().await, Err(DoorError::Refused(why)) if why.contains("nosuch")));

    // Megabytes there and back, while the log goes its way.
    let mut talk = door.talk(ExecRequest::line("cat", PATIENCE)).await.unwrap();
    let (mut sent, mut back) = (0, 0);
    loop {
        while talk.takes_input() && sent <= PIECES {
            // The last is its end.
            let length = if sent == PIECES { 0 } else { Talk::MAX_INPUT_BYTES };
            talk.send(vec![b'x'; length].into()).await.unwrap();
            sent += 1;
        }
        match talk.next().await.unwrap() {
            Said::Output { bytes, .. } => {
                back += bytes.len();
                talk.taken().await.unwrap();
            }
            Said::Room => {}
            Said::Ended(end) => break assert_eq!(end, ExecEnd::Exited { exit_code: 0 }),
        }
    }
    assert_eq!(back, PIECES * Talk::MAX_INPUT_BYTES);

    // Who leaves stops it.
    let mut left = door.talk(ExecRequest::line("echo begun; exec sleep 4242", PATIENCE * 10)).await.unwrap();
    assert!(matches!(left.next().await, Ok(Said::Output { .. })));
    drop(left);
    let line = "while cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -q 'sleep 424[2]'; do sleep 0.01; done";
    let waited = door.exec(ExecRequest::line(line, PATIENCE)).await.unwrap();
    assert_eq!(waited.end, ExecEnd::Exited { exit_code: 0 });
    let mut talk = door.talk(ExecRequest::line("touch go; sleep 1000", PATIENCE)).await.unwrap();
    let record = rest(&mut execution, record).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(all_of_it(&mut talk).await.1, ExecEnd::Stopped);
    assert!(door.talk(ExecRequest::line("true", PATIENCE)).await.is_err());
}
