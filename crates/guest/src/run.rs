//! Starts what an action is: a shell that runs its commands, or one program.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sealci_guest::wire::{Start, User};

use crate::failure::While;
use crate::places::{self, Places};
use crate::script::Script;
use crate::sys;

/// So that a shell is found even where the action's environment says nothing.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Commands write this much ahead of the init.
const LOG_PIPE_BYTES: i32 = 1 << 20;

/// What every program of an action is started with.
#[derive(Debug, Clone)]
pub struct Surroundings {
    pub env: Vec<(String, String)>,
    pub places: Places,
    pub user: Option<User>,
}

impl Surroundings {
    /// Takes them out of `start`, with a home where it says none.
    pub fn of(start: &mut Start) -> Self {
        let mut env = std::mem::take(&mut start.env);
        let home = match env.iter().rev().find(|(name, _)| name == "HOME") {
            Some((_, home)) => PathBuf::from(home),
            None => {
                let home = places::home_of(start.user.map_or_else(sys::own_uid, |user| user.uid));
                env.push(("HOME".to_owned(), home.to_string_lossy().into_owned()));
                home
            }
        };
        let workdir = PathBuf::from(OsStr::from_bytes(&start.workdir));
        Self { env, places: Places { workdir, home }, user: start.user }
    }

    /// A program of the action's: an ordinary process, in a group of its own, that reads nothing and writes to `output`.
    pub fn command(&self, program: &str, output: &io::PipeWriter) -> io::Result<Command> {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", DEFAULT_PATH)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.places.workdir)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .process_group(0);
        if let Some(user) = self.user {
            // std drops supplementary groups with the user, where it may.
            command.gid(user.gid).uid(user.uid);
        }
        sys::make_ordinary(&mut command);
        Ok(command)
    }

    /// Why a program could not be started, for a person.
    pub fn explain(&self, program: &str, error: &io::Error) -> String {
        let workdir = self.places.workdir.display();
        if error.kind() != io::ErrorKind::NotFound {
            return format!("cannot start `{program}` in {workdir}: {error}");
        }
        if !self.places.workdir.is_dir() {
            return format!("cannot start `{program}`: there is no folder {workdir} to start it in");
        }
        let remedy = "install it there, or name another";
        if Path::new(program).is_file() {
            return format!("cannot start `{program}`: the interpreter that it names is missing; {remedy}");
        }
        format!("the action's environment has no `{program}` ({error}); {remedy}")
    }
}

/// What runs, and what is shared with it.
pub struct Run {
    /// The shell's, or the program's.
    pub pid: i32,
    /// What is written to either of the outputs.
    pub log: File,
    /// None: it is one program.
    pub script: Option<Script>,
    /// Keeps the log from ever hanging up, so that its being empty is all there is to know.
    _log_writer: io::PipeWriter,
}

impl Run {
    /// Starts it. A shell's first question comes before the first command.
    pub fn start(start: Start, surroundings: &Surroundings) -> Result<Self, String> {
        let (log, log_writer) = io::pipe().doing(|| "make a pipe".to_owned()).map_err(|f| f.to_string())?;
        sys::enlarge_pipe(log.as_fd(), LOG_PIPE_BYTES);
        sys::set_nonblocking(log.as_fd())
            .doing(|| "set up a pipe".to_owned())
            .map_err(|failure| failure.to_string())?;
        let (words, script) = words_to_run(start)?;
        let [program, arguments @ ..] = &words[..] else {
            return Err("there is nothing to run".to_owned());
        };
        let child = surroundings
            .command(program, &log_writer)
            .and_then(|mut command| command.args(arguments).spawn())
            .map_err(|error| surroundings.explain(program, &error))?;
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        Ok(Self { pid, log: File::from(OwnedFd::from(log)), script, _log_writer: log_writer })
    }
}

fn words_to_run(start: Start) -> Result<(Vec<String>, Option<Script>), String> {
    if !start.program.is_empty() {
        return Ok((start.program, None));
    }
    let owner = start.user.map(|user| (user.uid, user.gid));
    let folder = PathBuf::from(OsStr::from_bytes(&start.scratch));
    let script = Script::write(start.commands, folder, owner).map_err(|failure| failure.to_string())?;
    let mut words = start.wrapper;
    // The last is what the shell's own messages begin with.
    words.extend([start.shell.clone(), "-e".to_owned(), "-c".to_owned(), script.line(), start.shell]);
    Ok((words, Some(script)))
}
