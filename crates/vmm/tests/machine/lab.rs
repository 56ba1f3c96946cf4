//! Runs `sealci-vmm`, and finds what guests are made of.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::NamedTempFile;

use super::initramfs::Initramfs;

/// How long a guest may take. Emulated twice, on a busy machine, one takes half a minute.
const PATIENCE: Duration = Duration::from_secs(150);
/// What a kernel says of itself only where something is wrong.
const QUIET: &str = "quiet loglevel=1";

/// What guests are made of here.
#[derive(Clone)]
pub struct Lab {
    pub kernel: PathBuf,
    pub busybox: PathBuf,
}

/// What came of a guest.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    /// What `sealci-vmm` wrote to standard output, where the guest's console goes, and to standard error.
    pub console: String,
    pub said: String,
}

impl Lab {
    /// None where no guest gets through, which is said.
    pub fn open() -> Option<Self> {
        static PROBED: OnceLock<Result<Lab, String>> = OnceLock::new();
        match PROBED.get_or_init(Self::probe) {
            Ok(lab) => Some(lab.clone()),
            Err(why) => {
                skip(why);
                None
            }
        }
    }

    /// By a guest: some machines have a `/dev/kvm` that opens, and in which no kernel gets anywhere.
    fn probe() -> Result<Self, String> {
        if !Path::new("/dev/kvm").exists() {
            return Err("there is no /dev/kvm".to_owned());
        }
        let kernel =
            kernel().ok_or("there is no kernel in /boot (apt-get install linux-image-cloud-amd64)")?;
        let busybox =
            ["/usr/bin/busybox", "/bin/busybox"].map(PathBuf::from).into_iter().find(|file| file.exists());
        let busybox = busybox.ok_or("busybox is not installed (apt-get install busybox-static)")?;
        let lab = Self { kernel, busybox };
        let initramfs = Initramfs::only(&lab.busybox, "#!/bin/busybox sh\n/bin/busybox reboot -f\n").file();
        match run(lab.command(&initramfs), PATIENCE) {
            Some(outcome) if outcome.status.success() => Ok(lab),
            Some(outcome) => Err(format!("/dev/kvm does not work: {}", outcome.said)),
            None => Err(format!("in /dev/kvm no guest gets through within {PATIENCE:?}")),
        }
    }

    /// A module of the running kernel, which guests have too.
    pub fn module(&self, name: &str) -> Vec<u8> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let folder = Path::new("/lib/modules").join(release.trim());
        let list = fs::read_to_string(folder.join("modules.dep")).unwrap();
        let ending = format!("/{name}.ko");
        let paths = list.lines().filter_map(|line| line.split_once(':')).map(|(path, _)| path);
        let path = paths.into_iter().find(|path| path.ends_with(&ending));
        fs::read(folder.join(path.unwrap_or_else(|| panic!("no module {name}")))).unwrap()
    }

    /// The program `peer`, which speaks vsock within a guest; the harness builds it.
    pub fn peer(&self) -> Option<Vec<u8>> {
        let path = std::env::var_os("SEALCI_TEST_PEER");
        if path.is_none() {
            skip(
                "SEALCI_TEST_PEER does not name the program that speaks vsock (cargo xtask vm-test builds it)",
            );
        }
        path.map(|path| fs::read(path).unwrap())
    }

    /// Starts a guest that runs a script, and whose console is heard.
    pub fn start<S: AsRef<OsStr>>(
        &self,
        initramfs: &NamedTempFile,
        arguments: impl IntoIterator<Item = S>,
    ) -> Running {
        let mut command = self.console(initramfs);
        command.args(arguments);
        Running::start(command)
    }

    /// A guest of the least size, whose console is standard output.
    pub fn console(&self, initramfs: &NamedTempFile) -> Command {
        let mut command = self.command(initramfs);
        command.args(["--serial", "-", "--command-line-extra", QUIET]);
        command
    }

    /// A guest of the least size, without a serial line.
    pub fn command(&self, initramfs: &NamedTempFile) -> Command {
        let mut command = vmm();
        command.arg("--kernel").arg(&self.kernel).arg("--initramfs").arg(initramfs.path());
        command
    }

    /// Runs a script in a guest to the guest's end.
    pub fn run<S: AsRef<OsStr>>(&self, script: &str, arguments: impl IntoIterator<Item = S>) -> Outcome {
        self.run_with(Initramfs::running(&self.busybox, &format!("{script}\nreboot -f\n")), arguments)
    }

    pub fn run_with<S: AsRef<OsStr>>(
        &self,
        initramfs: Initramfs,
        arguments: impl IntoIterator<Item = S>,
    ) -> Outcome {
        let initramfs = initramfs.file();
        let mut command = self.console(&initramfs);
        command.args(arguments);
        run(command, PATIENCE).expect("the guest came to no end")
    }
}

/// A guest that goes on until it has been looked at.
pub struct Running {
    child: Child,
    lines: mpsc::Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let console = BufReader::new(child.stdout.take().unwrap());
        let (said, lines) = mpsc::sync_channel(1000);
        let reader = thread::spawn(move || {
            console.lines().map_while(Result::ok).try_for_each(|line| said.send(line)).unwrap_or_default();
        });
        Self { child, lines, reader: Some(reader) }
    }

    /// Until the guest's console shows this line.
    pub fn wait_for(&self, line: &str) {
        loop {
            let found = self.lines.recv_timeout(PATIENCE);
            if found.unwrap_or_else(|error| panic!("the guest did not say {line}: {error}")).trim() == line {
                return;
            }
        }
    }

    /// Closes its standard input, and waits for its end; with what it said to standard error.
    pub fn close_input(mut self) -> (ExitStatus, String) {
        drop(self.child.stdin.take());
        // The console closes with the process.
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it goes on"),
            }
        }
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap(), said)
    }

    /// A file below /proc of the process that runs the guest: the one that was started has no other child.
    pub fn proc(&self, name: &str) -> PathBuf {
        let keeper = self.child.id();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).unwrap();
        format!("/proc/{}/{name}", children.trim()).into()
    }

    /// Ends the process that was started, and waits until the console is closed, which it is with the last that had it open.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it goes on"),
            }
        }
    }

    /// What is in memory of the guest's own, of so many MiB, and of all else, in KiB.
    pub fn resident(&self, mebibytes: u64) -> (u64, u64) {
        let smaps = fs::read_to_string(self.proc("smaps")).unwrap();
        let figure = |line: &str| line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        let (mut guests, mut others, mut is_guests, mut found) = (0, 0, false, 0);
        for line in smaps.lines() {
            if line.starts_with("Size:") {
                is_guests = figure(line) == Some(mebibytes << 10);
                found += u64::from(is_guests);
            } else if line.starts_with("Rss:") {
                *(if is_guests { &mut guests } else { &mut others }) += figure(line).unwrap();
            }
        }
        assert_eq!(found, 1, "{smaps}");
        (guests, others)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.lines.try_iter().for_each(drop);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// The number after `name=` on the guest's console.
pub fn figure(console: &str, name: &str) -> u64 {
    let text = console.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='));
    text.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no {name}: {console}"))
}

/// The program as it is given out, where the harness has built it.
pub fn static_vmm() -> Option<PathBuf> {
    std::env::var_os("SEALCI_TEST_VMM").map(PathBuf::from)
}

pub fn vmm() -> Command {
    Command::new(static_vmm().unwrap_or(env!("CARGO_BIN_EXE_sealci-vmm").into()))
}

/// Runs it to its end; none where it was ended because it took too long.
pub fn run(mut command: Command, patience: Duration) -> Option<Outcome> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut out, mut error) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (ended, end) = mpsc::sync_channel(1);
    let console = thread::spawn(move || {
        let mut bytes = Vec::new();
        out.read_to_end(&mut bytes).unwrap();
        ended.send(()).unwrap();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    });
    let said = thread::spawn(move || {
        let mut text = String::new();
        error.read_to_string(&mut text).unwrap();
        text
    });
    let is_over = end.recv_timeout(patience).is_ok();
    if !is_over {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    let outcome = Outcome { status, console: console.join().unwrap(), said: said.join().unwrap() };
    if is_over {
        return Some(outcome);
    }
    eprintln!("it was ended after {patience:?}: {outcome:?}");
    None
}

/// The kernel that is given, or the newest that is installed.
pub fn kernel() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("SEALCI_TEST_KERNEL") {
        return Some(path.into());
    }
    let files = fs::read_dir("/boot").into_iter().flatten().flatten().map(|entry| entry.path());
    files
        .filter(|path| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"vmlinuz")))
        .max()
}

/// Says loudly what was not tested, and why; `cargo xtask test` lists it at its end. Fails where `SEALCI_REQUIRE` names `kvm`.
pub fn skip(why: &str) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    let required = std::env::var("SEALCI_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name.trim() == "kvm"), "{test} needs kvm: {why}");
    eprintln!("SKIPPED: {test}: {why}");
    if let Some(path) = std::env::var_os("SEALCI_SKIPS") {
        use std::io::Write;
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.unwrap(), "{test}: {why}").unwrap();
    }
}
