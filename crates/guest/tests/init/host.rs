//! Plays the host of a real `sealci-init`, frame by frame.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sealci_guest::wire::{
    Ending, ExecEnd, FromInit, HEADER_BYTES, Header, MAX_FROM_INIT_BYTES, Put, Start, Take, Taken, ToInit,
    VERSION, put_data_header,
};
use tempfile::TempDir;

/// Longer than anything here takes, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What an init says, kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    Hello,
    Ready,
    Started(u32),
    Output(Vec<u8>),
    Done { index: u32, exit_code: i32 },
    Ended(Ending),
    Finished(Ending),
    Room(u32),
    Stored { id: u32, files: u64, bytes: u64 },
    Refused { id: u32, why: String },
    Data(Vec<u8>),
    Taken(Taken),
    Exec { id: u32, end: ExecEnd, output: Vec<u8> },
    Piece { is_error: bool, bytes: Vec<u8> },
    Passed(u32),
}

pub struct Host {
    pub stream: UnixStream,
    pub child: Child,
    /// Holds `work` and `scratch`.
    pub folder: TempDir,
    buffer: Vec<u8>,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Host {
    pub fn new() -> Self {
        Self::with(TempDir::new().unwrap())
    }

    /// Where many files cost little, if there is such a place.
    pub fn in_memory() -> Self {
        Self::with(TempDir::new_in("/dev/shm").or_else(|_| TempDir::new()).unwrap())
    }

    fn with(folder: TempDir) -> Self {
        for name in ["work", "scratch"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        let (stream, theirs) = UnixStream::pair().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_sealci-init"))
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        let mut host = Self { stream, child, folder, buffer: Vec::new() };
        host.send(&ToInit::Hello { version: VERSION });
        assert_eq!(host.hear(), Said::Hello);
        host
    }

    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    /// What runs `commands` in the work folder.
    pub fn start_of(&self, commands: &[&str]) -> Start {
        let bytes = |path: &Path| path.to_str().unwrap().as_bytes().to_vec();
        Start {
            commands: commands.iter().map(|command| (*command).to_owned()).collect(),
            shell: "sh".to_owned(),
            workdir: bytes(&self.work()),
            scratch: bytes(&self.folder.path().join("scratch")),
            grace_ms: 1000,
            ..Start::default()
        }
    }

    pub fn start(&mut self, start: Start) {
        self.send(&ToInit::Start(start));
        assert_eq!(self.hear(), Said::Ready);
    }

    /// Runs commands to their end, and stays.
    pub fn run_and_stay(&mut self, commands: &[&str]) {
        let start = Start { stays: true, ..self.start_of(commands) };
        self.start(start);
        let text = self.output_until(|said| matches!(said, Said::Ended(_)));
        assert_eq!(text.1, Said::Ended(Ending::Succeeded), "{}", text.0);
    }

    pub fn send(&mut self, message: &ToInit) {
        let mut frame = Vec::new();
        message.encode(&mut frame).unwrap();
        self.stream.write_all(&frame).unwrap();
    }

    pub fn hear(&mut self) -> Said {
        self.try_hear().expect("the init says something")
    }

    /// None: the channel has ended.
    pub fn try_hear(&mut self) -> Option<Said> {
        loop {
            if let Some(said) = self.take_frame() {
                return Some(said);
            }
            let mut piece = [0; 64 << 10];
            match self.stream.read(&mut piece).expect("the init says something in time") {
                0 => return None,
                count => self.buffer.extend_from_slice(&piece[..count]),
            }
        }
    }

    fn take_frame(&mut self) -> Option<Said> {
        let (head, rest) = self.buffer.split_first_chunk::<HEADER_BYTES>()?;
        let header = Header::parse(*head, MAX_FROM_INIT_BYTES).unwrap();
        let payload = rest.get(..header.payload_bytes)?;
        let said = match FromInit::decode(header.kind, payload).unwrap() {
            FromInit::Hello { version } => {
                assert_eq!(version, VERSION);
                Said::Hello
            }
            FromInit::OutOfMemory => panic!("only a machine's init says so"),
            FromInit::Ready => Said::Ready,
            FromInit::CommandStarted { index, .. } => Said::Started(index),
            FromInit::Output(bytes) => Said::Output(bytes.to_vec()),
            FromInit::CommandFinished { index, exit_code, .. } => Said::Done { index, exit_code },
            FromInit::Ended { ending, survivors: 0 } => Said::Ended(ending),
            FromInit::Finished { ending, survivors: 0 } => Said::Finished(ending),
            FromInit::Ended { .. } | FromInit::Finished { .. } => panic!("something survives"),
            FromInit::PutRoom { bytes } => Said::Room(bytes),
            FromInit::Stored { id, files, bytes } => Said::Stored { id, files, bytes },
            FromInit::Refused { id, why } => Said::Refused { id, why },
            FromInit::TakeData(bytes) => Said::Data(bytes.to_vec()),
            FromInit::Taken(taken) => Said::Taken(taken),
            FromInit::ExecOutput { is_error, bytes, .. } => Said::Piece { is_error, bytes },
            FromInit::ExecTaken { id } => Said::Passed(id),
            FromInit::ExecEnded { id, end, output } => Said::Exec { id, end, output },
        };
        let count = HEADER_BYTES + header.payload_bytes;
        self.buffer.drain(..count);
        Some(said)
    }

    /// All output up to something said, and that.
    pub fn output_until(&mut self, is_last: impl Fn(&Said) -> bool) -> (String, Said) {
        let mut output = Vec::new();
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "in time: {}", String::from_utf8_lossy(&output));
            match self.hear() {
                said if is_last(&said) => return (String::from_utf8_lossy(&output).into_owned(), said),
                Said::Output(bytes) => output.extend(bytes),
                _ => {}
            }
        }
    }

    /// All output to the end, and that.
    pub fn finish(&mut self) -> (String, Ending) {
        let (text, said) = self.output_until(|said| matches!(said, Said::Finished(_)));
        let Said::Finished(ending) = said else { unreachable!() };
        assert_eq!(self.try_hear(), None);
        assert!(self.child.wait().unwrap().success());
        (text, ending)
    }

    pub fn until_output(&mut self, text: &str) {
        let mut output = String::new();
        while !output.contains(text) {
            if let Said::Output(bytes) = self.hear() {
                output.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
    }

    pub fn begin_put(&mut self, id: u32, root: &str) {
        let workdir = self.work().to_str().unwrap().as_bytes().to_vec();
        self.send(&ToInit::Put(Put { id, root: root.as_bytes().to_vec(), workdir, home: None }));
    }

    /// A piece of an archive, without regard to room.
    pub fn send_piece(&mut self, piece: &[u8]) {
        self.stream.write_all(&put_data_header(piece.len())).unwrap();
        self.stream.write_all(piece).unwrap();
    }

    /// Puts an archive that fits into the window.
    pub fn put(&mut self, id: u32, root: &str, archive: &[u8]) -> Said {
        self.begin_put(id, root);
        for piece in archive.chunks(64 << 10) {
            self.send_piece(piece);
        }
        self.send(&ToInit::PutEnd);
        loop {
            match self.hear() {
                Said::Room(_) => {}
                said => return said,
            }
        }
    }

    pub fn ask_take(&mut self, id: u32, paths: &[&str], base: &str) {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let base = base.as_bytes().to_vec();
        self.send(&ToInit::Take(Take { id, paths, base, max_bytes: 4 << 30, max_files: 100_000 }));
    }

    /// Takes files; returns the archive, and the answer.
    pub fn take(&mut self, id: u32, paths: &[&str], base: &str) -> (Vec<u8>, Said) {
        self.ask_take(id, paths, base);
        let mut archive = Vec::new();
        loop {
            match self.hear() {
                Said::Data(piece) => archive.extend(piece),
                said => return (archive, said),
            }
        }
    }
}

/// The names in an archive, each with what it is: its content, its link's target, or nothing.
pub fn names_in(archive: &[u8]) -> Vec<(String, String)> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut content = String::new();
        match entry.link_name().unwrap() {
            Some(target) => content.push_str(&format!("-> {}", target.display())),
            None => drop(entry.read_to_string(&mut content).unwrap()),
        }
        (name, content)
    });
    entries.collect()
}

/// The names alone.
pub fn only_names(archive: &[u8]) -> Vec<String> {
    names_in(archive).into_iter().map(|(name, _)| name).collect()
}
