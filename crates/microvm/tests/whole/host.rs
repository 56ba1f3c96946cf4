//! Plays the agent of a machine, frame by frame.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, ExitStatus};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sealci_guest::wire::machine::{SCRATCH, WORKSPACE};
use sealci_guest::wire::{
    Ending, FromInit, HEADER_BYTES, Header, MAX_FROM_INIT_BYTES, Start, ToInit, VERSION, Wake,
};

/// How long a machine may take. Emulated twice, on a busy machine, one takes half a minute.
const PATIENCE: Duration = Duration::from_secs(150);

/// What an init says, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Output(String),
    OutOfMemory,
    Finished(Ending),
    Other,
}

/// Of the only host that there is: the test's, whose clock is not the machine's.
pub fn boot_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    u64::try_from(now.as_millis()).unwrap()
}

pub fn wake_at(time: Duration, entropy: u8) -> ToInit {
    ToInit::Wake(Wake {
        unix_time_us: u64::try_from(time.as_micros()).unwrap(),
        host_boot_ms: boot_ms(),
        entropy: vec![entropy; 64],
        host_name: "m1".to_owned(),
        names: vec!["database".to_owned()],
        ..Wake::default()
    })
}

pub fn start(commands: &[&str]) -> ToInit {
    ToInit::Start(Start {
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
        shell: "sh".to_owned(),
        workdir: WORKSPACE.into(),
        scratch: SCRATCH.into(),
        grace_ms: 1000,
        ..Start::default()
    })
}

/// A machine that has called.
pub struct Machine {
    pub monitor: u32,
    /// How long after its monitor was started it said its first word.
    pub ready_after: Duration,
    stream: UnixStream,
    console: ChildStdout,
    guard: Guard,
}

/// Kills a process that takes too long, and connects to where it was expected, so that nobody waits for it any more.
struct Guard {
    over: mpsc::Sender<()>,
    thread: Option<JoinHandle<(Child, bool)>>,
}

impl Guard {
    fn new(mut child: Child, expected_at: Option<PathBuf>) -> Self {
        let (over, is_over) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let in_time = is_over.recv_timeout(PATIENCE) != Err(mpsc::RecvTimeoutError::Timeout);
            if !in_time {
                child.kill().unwrap();
                let _ = expected_at.map(UnixStream::connect);
            }
            (child, in_time)
        });
        Self { over, thread: Some(thread) }
    }

    /// The process back, and whether it was left alive.
    fn end(&mut self) -> Option<(Child, bool)> {
        let _ = self.over.send(());
        self.thread.take().map(|thread| thread.join().unwrap())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some((mut child, _)) = self.end() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits for the end of one that nobody listens to; returns what its console said.
pub fn ended_or_killed(mut child: Child) -> String {
    let mut console = child.stdout.take().unwrap();
    let mut guard = Guard::new(child, None);
    let mut bytes = Vec::new();
    console.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (mut child, in_time) = guard.end().unwrap();
    assert!(in_time, "it came to no end: {text}");
    assert!(child.wait().unwrap().success(), "{text}");
    text
}

impl Machine {
    pub fn new(mut child: Child, listener: &UnixListener, socket: PathBuf) -> Self {
        let begun = Instant::now();
        let (monitor, console) = (child.id(), child.stdout.take().unwrap());
        let guard = Guard::new(child, Some(socket));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut machine = Self { monitor, ready_after: Duration::ZERO, stream, console, guard };
        assert_eq!(machine.hear(), Said::Other);
        machine.ready_after = begun.elapsed();
        machine
    }

    pub fn send(&mut self, message: &ToInit) {
        let mut frame = Vec::new();
        message.encode(&mut frame).unwrap();
        // One that has reported does not listen any more.
        let _ = self.stream.write_all(&frame);
    }

    pub fn hear(&mut self) -> Said {
        let mut head = [0; HEADER_BYTES];
        self.stream.read_exact(&mut head).expect("the machine says something");
        let header = Header::parse(head, MAX_FROM_INIT_BYTES).unwrap();
        let mut payload = vec![0; header.payload_bytes];
        self.stream.read_exact(&mut payload).unwrap();
        match FromInit::decode(header.kind, &payload).unwrap() {
            FromInit::Hello { version } => {
                assert_eq!(version, VERSION);
                Said::Other
            }
            FromInit::Output(bytes) => Said::Output(String::from_utf8(bytes.to_vec()).unwrap()),
            FromInit::Finished { ending, survivors } => {
                assert_eq!(survivors, 0);
                Said::Finished(ending)
            }
            FromInit::OutOfMemory => Said::OutOfMemory,
            _ => Said::Other,
        }
    }

    /// All that it writes, and how it ends.
    pub fn listen(&mut self) -> (String, Ending) {
        let mut text = String::new();
        loop {
            match self.hear() {
                Said::Output(piece) => text.push_str(&piece),
                Said::Finished(ending) => return (text, ending),
                Said::OutOfMemory => text.push_str("(out of memory)\n"),
                Said::Other => {}
            }
        }
    }

    /// Goes away, and waits for the machine's end.
    pub fn hang_up(self) -> ExitStatus {
        let Self { stream, mut console, mut guard, .. } = self;
        drop(stream);
        // It holds this open while it lives.
        console.read_to_end(&mut Vec::new()).unwrap();
        let (mut child, in_time) = guard.end().unwrap();
        assert!(in_time, "it came to no end");
        child.wait().unwrap()
    }
}
