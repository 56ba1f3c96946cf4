//! Starts a process that is in its control groups from its first instruction on.
//!
//! To move a process into a group afterwards costs the writer a grace period of the kernel's (some ten milliseconds), for
//! the kernel must exclude that the process forks meanwhile. A process that is born in a group (`CLONE_INTO_CGROUP`,
//! version 2), or that moves its own single thread (version 1), waits for nobody.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::sys;

/// The control groups that a process is born into.
#[derive(Debug, Default)]
pub struct Entrance {
    /// The group's folder in the version 2 hierarchy.
    pub unified: Option<OwnedFd>,
    /// The group's `tasks` in each version 1 hierarchy, open for writing.
    pub tasks: Vec<File>,
}

/// What to start, with an empty environment in `/`.
#[derive(Debug)]
pub struct Birth<'a> {
    /// No search is made for it.
    pub program: &'a Path,
    pub arguments: Vec<&'a OsStr>,
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
    pub entrance: &'a Entrance,
}

impl Birth<'_> {
    /// Starts it; returns a pidfd, which is all that keeps its end from being lost. May be called from any thread.
    ///
    /// The errors are those of fork(2), of writing to `tasks`, and of execve(2).
    pub fn spawn(self) -> io::Result<OwnedFd> {
        let program = CString::new(self.program.as_os_str().as_bytes())?;
        let mut arguments = vec![program.clone()];
        for argument in &self.arguments {
            arguments.push(CString::new(argument.as_bytes())?);
        }
        let (mut failure, report) = io::pipe()?;
        let tasks: Vec<_> = self.entrance.tasks.iter().map(AsFd::as_fd).collect();
        let child = sys::Child {
            program: &program,
            arguments: &arguments,
            standard: [self.stdin.as_fd(), self.stdout.as_fd(), self.stderr.as_fd()],
            tasks: &tasks,
            report: report.as_fd(),
        };
        let pidfd = child.start(self.entrance.unified.as_ref().map(AsFd::as_fd))?;
        drop(report);
        // Closed by a successful execve; else it brings what went wrong.
        let mut code = [0; 4];
        match failure.read_exact(&mut code) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(pidfd),
            Err(error) => Err(error),
            Ok(()) => {
                sys::reap(&pidfd)?;
                Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
            }
        }
    }
}

/// Sends KILL to the process of a pidfd; one that is gone is fine.
pub fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    signal(pidfd, libc::SIGKILL)
}

/// Sends TERM to the process of a pidfd; one that is gone is fine.
pub fn terminate(pidfd: &OwnedFd) -> io::Result<()> {
    signal(pidfd, libc::SIGTERM)
}

fn signal(pidfd: &OwnedFd, signal: libc::c_int) -> io::Result<()> {
    match sys::signal_process(pidfd.as_raw_fd(), signal) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

/// The process id of a pidfd's process, which nobody else gets before it is reaped (proc_pid_fdinfo(5)).
pub fn id(pidfd: &OwnedFd) -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let id = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    // -1 for one that is reaped.
    id.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// Takes note of the end of a pidfd's process, waiting for it, so that no zombie stays.
pub fn reap(pidfd: &OwnedFd) -> io::Result<()> {
    sys::reap(pidfd)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn null() -> OwnedFd {
        File::options().read(true).write(true).open("/dev/null").unwrap().into()
    }

    fn spawn(program: &str, arguments: &[&str], stdout: OwnedFd) -> io::Result<OwnedFd> {
        let birth = Birth {
            program: Path::new(program),
            arguments: arguments.iter().map(OsStr::new).collect(),
            stdin: null(),
            stdout,
            stderr: null(),
            entrance: &Entrance::default(),
        };
        birth.spawn()
    }

    fn output_of(program: &str, arguments: &[&str]) -> String {
        let (mut output, theirs) = io::pipe().unwrap();
        let child = spawn(program, arguments, theirs.into()).unwrap();
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        reap(&child).unwrap();
        text
    }

    #[test]
    fn a_process_starts_with_nothing_of_ours() {
        assert_eq!(output_of("/bin/pwd", &[]), "/\n");
        assert_eq!(output_of("/usr/bin/env", &[]), "");
        let inherited = File::open("/").unwrap();
        sys::let_be_inherited(&inherited);
        // 3 is what `ls` itself opens.
        assert_eq!(output_of("/bin/ls", &["/proc/self/fd"]), "0\n1\n2\n3\n");
        let masks = output_of("/bin/grep", &["-E", "SigBlk|SigIgn", "/proc/self/status"]);
        let masks: Vec<u64> = masks
            .split_whitespace()
            .filter(|word| word.len() == 16)
            .map(|word| u64::from_str_radix(word, 16).unwrap())
            .collect();
        let pipe = 1 << (libc::SIGPIPE - 1);
        assert!(matches!(masks[..], [0, ignored] if ignored & pipe == 0), "{masks:x?}");
    }

    #[test]
    fn what_cannot_be_executed_is_told_and_leaves_no_child() {
        let error = spawn("/nonexistent/program", &[], null()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(spawn("/etc/passwd", &[], null()).is_err());
    }

    #[test]
    fn a_killed_process_is_reaped() {
        let child = spawn("/bin/sleep", &["1000"], null()).unwrap();
        assert!(std::path::Path::new(&format!("/proc/{}", id(&child).unwrap())).exists());
        kill(&child).unwrap();
        reap(&child).unwrap();
        kill(&child).unwrap();
        assert!(id(&child).is_err());
    }
}
