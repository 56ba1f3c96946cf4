//! Boots the guest and hears what it says; it ends with its owner.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail};

use super::base::Base;
use crate::machine;

/// With virtualization it takes seconds. Some machines have a `/dev/kvm` that does not work, each in its own way.
const KVM_BOOT: Duration = Duration::from_secs(60);
const EMULATED_BOOT: Duration = Duration::from_secs(240);

/// On a busy machine an emulated timer comes late, which the kernel would take for a broken one.
const COMMAND_LINE: &str =
    "root=/dev/vda rw rootfstype=ext4 console=ttyS0 init=/sealci-start quiet panic=-1 no_timer_check";

/// Lines that may wait to be read.
const WAITING_LINES: usize = 1024;
/// Of the console and of QEMU's own complaints.
const LAST_LINES: usize = 40;

/// What a guest has.
pub struct Hardware {
    /// Its kind of processor where it is emulated.
    pub emulated: &'static str,
    /// How many it has at most.
    pub processors: usize,
    /// QEMU's arguments for its clock where it is emulated.
    pub clock: &'static [&'static str],
}

/// A running guest.
pub struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    /// It ends when QEMU closes its end.
    reader: Option<JoinHandle<()>>,
    console: PathBuf,
    complaints: PathBuf,
    /// The last that was heard.
    heard: String,
}

/// A program that has so long, yields to all others, and ends with us: it, and all it has started and mounted.
pub fn bounded(program: &str, patience: Duration) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "nice", "-n", "19"])
        .args(["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["timeout", "--kill-after=10", &patience.as_secs().to_string(), program])
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null());
    command
}

impl Guest {
    /// Returns when the guest's script says that it runs.
    pub fn boot(folder: &Path, base: &Base, payload: &Path, hardware: &Hardware) -> Result<Self> {
        let processors = processors().min(hardware.processors);
        let is_there = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        let useless = Useless::of(folder);
        if is_there && !useless.is_known() {
            match Self::boot_with(("kvm", "max", processors, &[]), KVM_BOOT, folder, base, payload) {
                Ok(guest) => return Ok(guest),
                Err(_) => println!("/dev/kvm does not work here: the guest is emulated"),
            }
            useless.remember();
        }
        let emulated = ("tcg", hardware.emulated, processors, hardware.clock);
        Self::boot_with(emulated, EMULATED_BOOT, folder, base, payload)
    }

    fn boot_with(
        (accelerator, processor, processors, clock): (&str, &str, usize, &[&str]),
        patience: Duration,
        folder: &Path,
        base: &Base,
        payload: &Path,
    ) -> Result<Self> {
        let (console, complaints) = (folder.join("console.log"), folder.join("qemu.log"));
        let _ = fs::remove_file(&console);
        let mut qemu = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-accel", accelerator, "-cpu", processor, "-smp", &processors.to_string()])
            .args(clock)
            .args(["-m", &format!("{}M", memory_mebibytes()), "-nodefaults", "-nographic", "-no-reboot"])
            .args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"])
            .arg("-kernel")
            .arg(&base.kernel)
            .arg("-initrd")
            .arg(&base.initrd)
            .args(["-append", COMMAND_LINE])
            // Writes go into a file that QEMU makes in TMPDIR and unlinks at once.
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio,snapshot=on", base.root.display()))
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio,readonly=on", payload.display()))
            .env("TMPDIR", folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&complaints)?)
            .spawn()
            .context("cannot run qemu-system-x86_64")?;
        let stdout = qemu.stdout.take().context("QEMU has no standard output")?;
        let (said, lines) = mpsc::sync_channel(WAITING_LINES);
        let reader = Some(thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if said.send(line).is_err() {
                    return;
                }
            }
        }));
        let mut guest = Self { qemu, lines, reader, console, complaints, heard: String::new() };
        loop {
            let line = guest.next_line(patience).map_err(|error| guest.with_last_words(&error))?;
            let Some(line) = line else {
                return Err(guest.with_last_words(&anyhow!("QEMU ended before the guest was up")));
            };
            if let Some(kernel) = line.strip_prefix("guest: up ") {
                println!("the guest runs Linux {kernel}, by {accelerator}");
                return Ok(guest);
            }
        }
    }

    /// The next line of the guest's report; none after QEMU's end.
    pub fn next_line(&mut self, patience: Duration) -> Result<Option<String>> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => {
                self.heard.clone_from(&line);
                Ok(Some(line))
            }
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest has said nothing for {patience:?}, and was ended")
            }
        }
    }

    /// For a person who wants to know why it did not go on, or did not as it should.
    pub fn with_last_words(&self, error: &Error) -> Error {
        let mut text = format!("{error:#}\nits last line: `{}`", self.heard);
        for (what, file) in [("its console", &self.console), ("QEMU", &self.complaints)] {
            let bytes = fs::read(file).unwrap_or_default();
            let all = String::from_utf8_lossy(&bytes).replace('\r', "");
            let lines: Vec<_> = all.lines().filter(|line| !line.trim().is_empty()).collect();
            if !lines.is_empty() {
                let last = &lines[lines.len().saturating_sub(LAST_LINES)..];
                text.push_str(&format!("\nlast of {what}:\n  {}", last.join("\n  ")));
            }
        }
        anyhow!(text)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        // The reader may wait for room.
        self.lines.try_iter().for_each(drop);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// That `/dev/kvm` has not worked since the machine was started, which takes a minute to find out.
struct Useless {
    note: PathBuf,
    boot: String,
}

impl Useless {
    fn of(folder: &Path) -> Self {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { note: folder.join("kvm-is-useless"), boot }
    }

    fn is_known(&self) -> bool {
        fs::read_to_string(&self.note).is_ok_and(|boot| boot == self.boot)
    }

    fn remember(&self) {
        let _ = fs::write(&self.note, &self.boot);
    }
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Half of what is there: the tests' own limits are far below.
fn memory_mebibytes() -> u64 {
    (machine::available_memory_mebibytes() / 2).clamp(1500, 4096)
}
