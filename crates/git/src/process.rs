//! Runs one git process within its bounds, and leaves nothing of it behind.
//!
//! The process leads a group of its own. Whatever ends the call early (the time, a bound, the caller dropping the
//! future) kills that whole group, so git's own children (`git-remote-https`, `ssh`, `index-pack`) go with it.

use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::tree_size;

/// How much of what git says about an error is kept: its end, where the cause stands.
const ERROR_TAIL_BYTES: usize = 8 << 10;
/// How often a growing folder is measured. Nothing tells when a folder grows, so this one is looked at.
const GROWTH_INTERVAL: Duration = Duration::from_millis(300);

/// Bounds of one call.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    pub timeout: Duration,
    pub max_output_bytes: usize,
    /// A folder the call writes to, and how many bytes it may hold.
    pub growth: Option<(PathBuf, u64)>,
}

/// Why one run of git gave no result.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("cannot start `{program}`: is git installed and on the service's PATH?")]
    Start { program: String, source: io::Error },
    #[error("cannot talk to the git process")]
    Pipe { source: io::Error },
    #[error("git took longer than {} s and was stopped", after.as_secs_f32())]
    TimedOut { after: Duration },
    #[error("git printed more than {max_bytes} bytes and was stopped")]
    TooMuchOutput { max_bytes: usize },
    #[error(
        "git wrote more than {max_bytes} bytes to disk and was stopped: raise the size limit if this is wanted"
    )]
    TooLarge { max_bytes: u64 },
    #[error("git ended with {status}: {message}")]
    Failed { status: ExitStatus, message: String },
}

impl RunError {
    /// What git itself said, when it was git that failed.
    pub(crate) fn message(&self) -> &str {
        if let Self::Failed { message, .. } = self { message } else { "" }
    }
}

/// Runs the command and returns what it printed. `redact` cleans what git said before it becomes part of an error.
pub(crate) async fn run(
    mut command: Command,
    stdin: &[u8],
    bounds: &Bounds,
    redact: impl Fn(&str) -> String,
) -> Result<Vec<u8>, RunError> {
    command.stdin(if stdin.is_empty() { Stdio::null() } else { Stdio::piped() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).kill_on_drop(true);
    let mut child = command.spawn().map_err(|source| RunError::Start {
        program: command.as_std().get_program().to_string_lossy().into_owned(),
        source,
    })?;
    let mut group = Group::led_by(&child);

    let ended = tokio::select! {
        done = tokio::time::timeout(bounds.timeout, talk(&mut child, stdin, bounds.max_output_bytes)) => {
            done.unwrap_or(Err(RunError::TimedOut { after: bounds.timeout }))
        }
        error = outgrown(bounds) => Err(error),
    };
    let (status, stdout, stderr) = match ended {
        Ok(ended) => ended,
        Err(error) => {
            group.kill();
            // Reaped here, so that nothing of the call runs once it has answered.
            let _ = child.wait().await;
            return Err(error);
        }
    };
    group.has_ended();
    if status.success() {
        return Ok(stdout);
    }
    Err(RunError::Failed { status, message: redact(String::from_utf8_lossy(&stderr).trim()) })
}

/// Feeds and drains the process until it ends.
async fn talk(
    child: &mut Child,
    input: &[u8],
    max_output_bytes: usize,
) -> Result<(ExitStatus, Vec<u8>, Vec<u8>), RunError> {
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let Some(mut stdin) = stdin {
            // Git may end before it has read everything; its exit status then says why.
            let _ = stdin.write_all(input).await;
        }
        Ok(())
    };
    let ((), stdout, stderr) = tokio::try_join!(feed, read_all(stdout, max_output_bytes), read_tail(stderr))?;
    let status = child.wait().await.map_err(|source| RunError::Pipe { source })?;
    Ok((status, stdout, stderr))
}

async fn read_all(pipe: Option<impl AsyncRead + Unpin>, max_bytes: usize) -> Result<Vec<u8>, RunError> {
    let mut all = Vec::new();
    if let Some(pipe) = pipe {
        let mut pipe = pipe.take(max_bytes as u64 + 1);
        pipe.read_to_end(&mut all).await.map_err(|source| RunError::Pipe { source })?;
    }
    if all.len() > max_bytes { Err(RunError::TooMuchOutput { max_bytes }) } else { Ok(all) }
}

async fn read_tail(pipe: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, RunError> {
    let mut tail = Vec::new();
    let Some(mut pipe) = pipe else { return Ok(tail) };
    let mut buffer = [0; 4096];
    loop {
        let read = pipe.read(&mut buffer).await.map_err(|source| RunError::Pipe { source })?;
        if read == 0 {
            return Ok(tail);
        }
        tail.extend_from_slice(&buffer[..read]);
        let excess = tail.len().saturating_sub(ERROR_TAIL_BYTES);
        tail.drain(..excess);
    }
}

/// Ends when the folder has outgrown its bound; never, if there is none.
async fn outgrown(bounds: &Bounds) -> RunError {
    let Some((folder, max_bytes)) = bounds.growth.clone() else { return std::future::pending().await };
    loop {
        tokio::time::sleep(GROWTH_INTERVAL).await;
        let folder = folder.clone();
        let measured = tokio::task::spawn_blocking(move || tree_size::exceeds(&folder, max_bytes)).await;
        if measured.unwrap_or(false) {
            return RunError::TooLarge { max_bytes };
        }
    }
}

/// The process group of one running git, killed when dropped before it has ended.
struct Group {
    leader: Option<Pid>,
}

impl Group {
    fn led_by(child: &Child) -> Self {
        let leader = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        Self { leader }
    }

    fn kill(&mut self) {
        if let Some(leader) = self.leader.take() {
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }

    /// The leader was reaped: its number may belong to another process from now on.
    fn has_ended(&mut self) {
        self.leader = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    fn bounds(timeout: Duration) -> Bounds {
        Bounds { timeout, max_output_bytes: 1000, growth: None }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_run_gives_its_output_and_takes_its_input() {
        let out = run(shell("cat"), b"hello", &bounds(LONG), str::to_owned).await.unwrap();
        assert_eq!(out, b"hello");
    }

    #[tokio::test]
    async fn a_run_over_its_time_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("pid");
        let script = format!("sleep 300 & echo $! > {}; wait", pid_file.display());
        let error =
            run(shell(&script), b"", &bounds(Duration::from_millis(500)), str::to_owned).await.unwrap_err();
        assert!(matches!(error, RunError::TimedOut { .. }), "{error}");
        assert_gone(&pid_file).await;
    }

    #[tokio::test]
    async fn a_dropped_run_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("pid");
        // The reader of the fifo is the event the test waits for: the child is up.
        let fifo = folder.path().join("up");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let script =
            format!("sleep 300 & echo $! > {}; echo up > {}; wait", pid_file.display(), fifo.display());
        let bounds = bounds(LONG);
        tokio::select! {
            _ = run(shell(&script), b"", &bounds, str::to_owned) => panic!("it cannot end"),
            read = tokio::fs::read(&fifo) => assert_eq!(read.unwrap(), b"up\n"),
        }
        assert_gone(&pid_file).await;
    }

    /// Waits until the process is gone or a zombie that nobody has reaped yet.
    async fn assert_gone(pid_file: &std::path::Path) {
        let pid = std::fs::read_to_string(pid_file).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        for _ in 0..100 {
            match std::fs::read_to_string(&stat) {
                Ok(stat) if !stat.contains(") Z ") => tokio::time::sleep(Duration::from_millis(20)).await,
                _ => return,
            }
        }
        panic!("process {pid} is still there");
    }

    #[tokio::test]
    async fn too_much_output_ends_the_run() {
        let error = run(shell("yes"), b"", &bounds(LONG), str::to_owned).await.unwrap_err();
        assert!(matches!(error, RunError::TooMuchOutput { max_bytes: 1000 }), "{error}");
    }

    #[tokio::test]
    async fn a_folder_that_outgrows_its_bound_ends_the_run() {
        let folder = tempfile::tempdir().unwrap();
        let script = format!("cd {}; head -c 5000000 /dev/zero > big; sleep 300", folder.path().display());
        let bounds = Bounds { growth: Some((folder.path().to_owned(), 1 << 20)), ..bounds(LONG) };
        let error = run(shell(&script), b"", &bounds, str::to_owned).await.unwrap_err();
        assert!(matches!(error, RunError::TooLarge { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_failure_carries_the_end_of_what_was_said_redacted() {
        let script = "head -c 100000 /dev/zero | tr '\\0' x >&2; echo token hunter2 is bad >&2; exit 128";
        let redact = |text: &str| text.replace("hunter2", "***");
        let error = run(shell(script), b"", &bounds(LONG), redact).await.unwrap_err().to_string();
        assert!(error.ends_with("token *** is bad") && error.len() < 9000, "{error}");
    }
}
