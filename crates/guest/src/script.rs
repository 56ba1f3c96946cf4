//! Has one shell run an action's commands one by one, and tells exactly where each begins and ends.
//!
//! The shell reads a driver that names each command's own file in turn, so an open quote or a syntax error stays within
//! its command, and everything else is as in one script. Between two commands the driver asks through one FIFO and waits
//! for the answer on another:
//!
//! ```text
//! shell   ask "0\n" ─┐ ┌─▶ . command-1 ──▶ ask "$?\n" ─┐     ┌─▶ . command-2 ──▶ exit
//! init               └─┘ answer                        └─────┘ drain the log, answer
//! ```
//!
//! The FIFOs are opened anew for each question, so no descriptor reaches a command, and whatever a command does with
//! descriptors of its own (`exec 9>lock`) lasts. The init holds both ends open and never waits on them: who meddles with
//! them confuses the account of that one action, nothing else.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use crate::failure::{Failure, While};
use crate::sys;

/// A question is a number and a line feed; whoever writes longer lines is not the driver.
const LONGEST_QUESTION_BYTES: usize = 16;

/// The commands, and how their shell is led through them.
pub struct Script {
    ask: File,
    answer: File,
    partial_question: Vec<u8>,
    commands: Vec<String>,
    written: usize,
    folder: PathBuf,
    owner: Option<(u32, u32)>,
}

impl Script {
    /// Puts down what the shell is to run, in a folder that is nobody else's.
    pub fn write(commands: Vec<String>, folder: PathBuf, owner: Option<(u32, u32)>) -> Result<Self, Failure> {
        let in_folder = |what: &str| format!("{what} in {}", folder.display());
        let (ask, answer) = make_fifos(&folder, owner).doing(|| in_folder("make the control files"))?;
        write_for(&folder.join("driver"), driver_script(&folder, commands.len()).as_bytes(), owner)
            .doing(|| in_folder("write the driver"))?;
        Ok(Self { ask, answer, partial_question: Vec::new(), commands, written: 0, folder, owner })
    }

    /// What the shell gets as its `-c`.
    pub fn line(&self) -> String {
        format!(". {}", quoted(&self.folder.join("driver")))
    }

    pub fn command_count(&self) -> usize {
        self.commands.len()
    }

    /// Where questions arrive, to be polled.
    pub fn question_source(&self) -> &File {
        &self.ask
    }

    /// Takes one question, if there is one: the exit status of the command before it.
    pub fn take_question(&mut self) -> Option<i32> {
        let mut byte = [0];
        // One byte at a time, so that a second question stays where it is until its turn.
        while matches!((&self.ask).read(&mut byte), Ok(1)) {
            if byte == *b"\n" {
                let text = std::mem::take(&mut self.partial_question);
                return Some(std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok()).unwrap_or(1));
            }
            if self.partial_question.len() < LONGEST_QUESTION_BYTES {
                self.partial_question.push(byte[0]);
            }
        }
        None
    }

    /// Puts down the text of the next command, so that the driver may go on to it.
    pub fn write_command(&mut self, index: usize) -> Result<(), Failure> {
        // A meddler's extra question finds the file in its place already.
        if index < self.written {
            return Ok(());
        }
        let Some(text) = self.commands.get_mut(index).map(std::mem::take) else { return Ok(()) };
        self.written = index + 1;
        let path = self.folder.join(file_name(index));
        write_for(&path, text.as_bytes(), self.owner).doing(|| format!("write {}", path.display()))
    }

    /// Puts an exit in a command's place. A shell that has not begun to read it never will.
    pub fn write_exit(&mut self, index: usize) -> Result<(), Failure> {
        if index >= self.commands.len() {
            return Ok(());
        }
        self.written = self.written.max(index + 1);
        let path = self.folder.join(file_name(index));
        let text = format!("exit {}", 128 + libc::SIGTERM);
        let new = self.folder.join("exit");
        write_for(&new, text.as_bytes(), self.owner)
            // In one step: the shell may be about to open it.
            .and_then(|()| fs::rename(&new, &path))
            .doing(|| format!("write {}", path.display()))
    }

    /// Lets the shell go on.
    pub fn answer(&mut self) {
        // Full only if something asks on end and never listens; that hurts itself alone.
        let _ = (&self.answer).write(b"\n");
    }
}

fn file_name(index: usize) -> String {
    // People count from 1, and this name stands in front of the shell's error messages.
    format!("command-{}", index + 1)
}

/// What the shell runs: asks before each command, keeping `$?` as it is. The last one ends with the shell, so that what is
/// set for the shell's exit counts as its. The questions' own trace (`set -x`) goes nowhere.
fn driver_script(folder: &Path, commands: usize) -> String {
    let mut script = format!(
        "__sealci() {{ __sealci_status=$?; command printf '%s\\n' \"$__sealci_status\" >{}; \
         IFS= command read -r __sealci_answer <{}; return \"$__sealci_status\"; }}\n",
        quoted(&folder.join("ask")),
        quoted(&folder.join("answer")),
    );
    for index in 0..commands {
        let path = quoted(&folder.join(file_name(index)));
        // Writing to a String does not fail.
        let _ = write!(script, "{{ __sealci; }} 2>/dev/null\n. {path}\n");
    }
    script
}

/// A path as one word of a shell script.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"))
}

fn make_fifos(folder: &Path, owner: Option<(u32, u32)>) -> io::Result<(File, File)> {
    let open = |name: &str| {
        let path = folder.join(name);
        sys::make_fifo(&path, 0o600)?;
        if let Some((uid, gid)) = owner {
            chown(&path, Some(uid), Some(gid))?;
        }
        // Both ways: opening does not wait for the other end, and reading never ends.
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path)
    };
    if let Some((uid, gid)) = owner {
        chown(folder, Some(uid), Some(gid))?;
    }
    Ok((open("ask")?, open("answer")?))
}

fn write_for(path: &Path, bytes: &[u8], owner: Option<(u32, u32)>) -> io::Result<()> {
    // Not through a link that a command may have left in its place.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    if let Some((uid, gid)) = owner {
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
    }
    Ok(())
}
