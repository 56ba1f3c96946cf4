//! Plays actions from a script, without any process: for tests and benchmarks of everything around execution.
//!
//! Each line of a command is one instruction:
//!
//! | instruction | does |
//! |---|---|
//! | `print TEXT` | writes TEXT and a line feed |
//! | `lines N` | writes `line 1` … `line N` |
//! | `bytes N` | writes N bytes, a repeating pattern |
//! | `sleep MS` | waits so many milliseconds |
//! | `exit CODE` | ends the command; unless 0, the action |
//! | `error MESSAGE` | ends the action as errored by its executor |
//! | `hang` | waits for its end; TERM ends it |
//! | `stubborn` | waits for its end; only KILL ends it |
//! | anything else | is written as it stands, with a line feed |

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::ExecutorKind;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::door::{DoorError, ExecEnd, ExecEnded, Piece, Request, Stored, Taken};
use super::{
    Backstage, ExecutionEvent, ExecutionRequest, Executor, ExecutorError, ResourceUse, Standby, Wish, standby,
};

/// Output comes in pieces of at most so many bytes, as from the real executors.
const PIECE_BYTES: usize = 64 << 10;

/// The scripted executor.
#[derive(Debug, Default)]
pub struct FakeExecutor {
    uses_workspace: bool,
    tasks: TaskTracker,
    running: Arc<Mutex<HashSet<AttemptId>>>,
    /// Every attempt whose first command began, once for each time.
    begun: Option<Arc<Mutex<Vec<AttemptId>>>>,
}

impl FakeExecutor {
    /// No instruction reads a file, so nothing is checked out for it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes there which attempts' commands began, once for each time.
    pub fn noting(mut self, begun: Arc<Mutex<Vec<AttemptId>>>) -> Self {
        self.begun = Some(begun);
        self
    }

    /// Has a workspace filled all the same.
    pub fn with_workspace(mut self) -> Self {
        self.uses_workspace = true;
        self
    }
}

#[async_trait]
impl Executor for FakeExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Fake
    }

    fn uses_workspace(&self) -> bool {
        self.uses_workspace
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        request.refuse_service(self.kind())?;
        let attempt = request.attempt;
        if !self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(attempt) {
            return Err(ExecutorError::AlreadyRunning(attempt));
        }
        let (standby, backstage) = standby();
        let (running, begun) = (Arc::clone(&self.running), self.begun.clone());
        self.tasks.spawn(async move {
            let Backstage { go, events, wishes, leases: _, mut requests, leave } = backstage;
            let mut stage = Stage { events, wishes, log_offset: 0, deadline: None };
            let stays = request.stays;
            let outcome = match serve(&mut requests, go).await {
                Ok(()) => {
                    if let Some(begun) = begun {
                        begun.lock().unwrap_or_else(PoisonError::into_inner).push(attempt);
                    }
                    serve(&mut requests, stage.play(&request)).await
                }
                Err(_) => Outcome::Cancelled,
            };
            if stays && outcome != Outcome::Cancelled {
                let over = ExecutionEvent::Over { outcome: outcome.clone() };
                if stage.events.send(over).await.is_ok() {
                    let left = async {
                        tokio::select! {
                            () = leave.cancelled() => {}
                            () = cancelled(&mut stage.wishes) => {}
                        }
                    };
                    serve(&mut requests, left).await;
                }
            }
            running.lock().unwrap_or_else(PoisonError::into_inner).remove(&attempt);
            // Nobody listens when the execution was dropped.
            let _ = stage.events.send(ExecutionEvent::Finished { outcome, remains: None }).await;
        });
        Ok(standby)
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        Ok(())
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// How a command ended, or the whole with it.
enum End {
    Exit(i32),
    Action(Outcome),
}

struct Stage {
    events: mpsc::Sender<ExecutionEvent>,
    wishes: watch::Receiver<Wish>,
    log_offset: u64,
    deadline: Option<Instant>,
}

impl Stage {
    async fn play(&mut self, request: &ExecutionRequest) -> Outcome {
        match self.play_commands(request).await {
            Ok(()) => Outcome::Succeeded,
            Err(outcome) => outcome,
        }
    }

    async fn play_commands(&mut self, request: &ExecutionRequest) -> Result<(), Outcome> {
        self.tell(ExecutionEvent::Started).await?;
        self.deadline = Instant::now().checked_add(request.timeout);
        for (index, command) in (0u32..).zip(&request.commands) {
            self.tell(ExecutionEvent::CommandStarted { index, log_offset: self.log_offset }).await?;
            let started_at = Instant::now();
            let exit_code = match self.play_command(command, request.grace).await {
                End::Exit(exit_code) => exit_code,
                End::Action(outcome) => return Err(outcome),
            };
            self.tell(ExecutionEvent::CommandFinished {
                index,
                exit_code,
                duration: started_at.elapsed(),
                log_offset: self.log_offset,
                resource_use: ResourceUse::default(),
            })
            .await?;
            if exit_code != 0 {
                return Err(Outcome::Failed { exit_code, limit: None });
            }
        }
        Ok(())
    }

    async fn play_command(&mut self, command: &str, grace: Duration) -> End {
        for line in command.lines() {
            let line = line.trim();
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            let done = match (word, rest.trim()) {
                ("print", text) => self.write(format!("{text}\n").into()).await,
                ("lines", count) => self.write_lines(number(count)).await,
                ("bytes", count) => self.write_bytes(number(count)).await,
                ("sleep", millis) => self.wait(Some(Duration::from_millis(number(millis)))).await,
                ("exit", code) => return End::Exit(code.parse().unwrap_or(0)),
                ("error", message) => {
                    return End::Action(Outcome::Errored {
                        cause: Cause::Executor,
                        message: message.to_owned(),
                    });
                }
                ("hang", _) => self.wait(None).await,
                ("stubborn", _) => self.resist(grace).await,
                ("", _) => Ok(()),
                _ => self.write(format!("{line}\n").into()).await,
            };
            if let Err(outcome) = done {
                return End::Action(outcome);
            }
        }
        End::Exit(0)
    }

    /// Waits so long, or without end; a wish or the timeout ends it.
    async fn wait(&mut self, duration: Option<Duration>) -> Result<(), Outcome> {
        let Self { wishes, deadline, .. } = self;
        tokio::select! {
            biased;
            () = cancelled(wishes) => Err(Outcome::Cancelled),
            () = elapsed(*deadline) => Err(Outcome::TimedOut),
            () = elapsed(duration.and_then(|duration| Instant::now().checked_add(duration))) => Ok(()),
        }
    }

    /// Waits for KILL, or for the grace after TERM to be over.
    async fn resist(&mut self, grace: Duration) -> Result<(), Outcome> {
        let outcome = match self.wait(None).await {
            Err(outcome) => outcome,
            Ok(()) => return Ok(()),
        };
        let wish = *self.wishes.borrow_and_update();
        let grace = match wish {
            Wish::Kill => return Err(outcome),
            Wish::Cancel { grace } => grace,
            Wish::GoOn => grace,
        };
        tokio::select! {
            _ = self.wishes.wait_for(|wish| *wish == Wish::Kill) => {}
            () = tokio::time::sleep(grace) => {}
        }
        Err(outcome)
    }

    async fn write_lines(&mut self, count: u64) -> Result<(), Outcome> {
        let mut piece = String::new();
        for line in 1..=count {
            piece.push_str("line ");
            piece.push_str(&line.to_string());
            piece.push('\n');
            if piece.len() >= PIECE_BYTES - 32 {
                self.write(std::mem::take(&mut piece).into()).await?;
            }
        }
        self.write(piece.into()).await
    }

    async fn write_bytes(&mut self, count: u64) -> Result<(), Outcome> {
        let pattern: Bytes = (0..=u8::MAX).cycle().take(PIECE_BYTES).collect();
        let mut left = count;
        while left > 0 {
            let length = left.min(PIECE_BYTES as u64);
            // At most PIECE_BYTES.
            self.write(pattern.slice(..length as usize)).await?;
            left -= length;
        }
        Ok(())
    }

    async fn write(&mut self, bytes: Bytes) -> Result<(), Outcome> {
        if bytes.is_empty() {
            return Ok(());
        }
        let length = bytes.len() as u64;
        self.tell(ExecutionEvent::Output(bytes)).await?;
        self.log_offset += length;
        Ok(())
    }

    async fn tell(&mut self, event: ExecutionEvent) -> Result<(), Outcome> {
        let Self { events, wishes, deadline, .. } = self;
        tokio::select! {
            biased;
            () = cancelled(wishes) => Err(Outcome::Cancelled),
            sent = events.send(event) => sent.map_err(|_| Outcome::Cancelled),
            () = elapsed(*deadline) => Err(Outcome::TimedOut),
        }
    }
}

/// Answers what is asked through the door, until something else is done. There are no files, and programs do nothing.
async fn serve<T>(requests: &mut mpsc::Receiver<Request>, until: impl Future<Output = T>) -> T {
    tokio::pin!(until);
    loop {
        let request = tokio::select! {
            biased;
            done = &mut until => return done,
            Some(request) = requests.recv() => request,
        };
        // Who asked may be gone.
        match request {
            Request::Put { mut pieces, answer, .. } => {
                while let Some(Piece::Bytes(_)) = pieces.recv().await {}
                let _ = answer.send(Ok(Stored { files: 0, bytes: 0 }));
            }
            Request::Take { wanted, answer, .. } => {
                let missing = wanted.paths.into_iter().filter(|path| !path.starts_with('!')).collect();
                let _ = answer.send(Ok(Taken { missing, ..Taken::default() }));
            }
            Request::Talk { answer, .. } => {
                let why = "the executor `fake` has no programs";
                let _ = answer.send(Err(DoorError::NotNow(why)));
            }
            Request::Input { .. } | Request::Taken { .. } => {}
            Request::Exec { answer, .. } => {
                let end = ExecEnd::Exited { exit_code: 0 };
                let _ = answer.send(Ok(ExecEnded { end, output: Vec::new() }));
            }
        }
    }
}

async fn cancelled(wishes: &mut watch::Receiver<Wish>) {
    // An error means that the execution and all its handles are dropped, which is a wish, too.
    let _ = wishes.wait_for(|wish| *wish != Wish::GoOn).await;
}

async fn elapsed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use sealci_core::ids::ActionId;
    use sealci_core::plan::{Network, Resources};

    use super::*;
    use crate::executor::ShellKind;

    fn request(number: u32, commands: &[&str]) -> ExecutionRequest {
        ExecutionRequest {
            attempt: AttemptId { action: ActionId::from_parts(1, &[0; 10]), number },
            commands: commands.iter().map(|command| (*command).to_owned()).collect(),
            shell: ShellKind::Sh,
            env: Default::default(),
            workspace: PathBuf::new(),
            scratch: PathBuf::new(),
            resources: Resources::DEFAULT,
            container: None,
            notes: Default::default(),
            stop: Default::default(),
            network: Network::Off,
            neighbourhood: None,
            service: None,
            services: Vec::new(),
            names: Vec::new(),
            timeout: Duration::from_secs(600),
            grace: Duration::from_secs(10),
            stays: false,
        }
    }

    async fn play(request: ExecutionRequest) -> (Vec<u8>, Vec<(u32, i32)>, Outcome) {
        let mut execution = FakeExecutor::new().prepare(request).await.unwrap().begin();
        let (mut output, mut codes) = (Vec::new(), Vec::new());
        loop {
            match execution.next().await.expect("the stream ends with Finished") {
                ExecutionEvent::Output(bytes) => output.extend_from_slice(&bytes),
                ExecutionEvent::CommandFinished { index, exit_code, .. } => codes.push((index, exit_code)),
                ExecutionEvent::Finished { outcome, .. } => {
                    assert!(execution.next().await.is_none());
                    return (output, codes, outcome);
                }
                _ => {}
            }
        }
    }

    #[tokio::test]
    async fn instructions_do_what_the_table_says() {
        let (output, codes, outcome) =
            play(request(1, &["print a b\nlines 2", "make all", "bytes 3", "sleep 1", "exit 4", "print no"]))
                .await;
        assert_eq!(output, b"a b\nline 1\nline 2\nmake all\n\x00\x01\x02");
        assert_eq!(codes, [(0, 0), (1, 0), (2, 0), (3, 0), (4, 4)]);
        assert_eq!(outcome, Outcome::Failed { exit_code: 4, limit: None });
        let (_, _, outcome) = play(request(1, &["error no room"])).await;
        assert_eq!(outcome, Outcome::Errored { cause: Cause::Executor, message: "no room".into() });
        let (output, _, outcome) = play(request(1, &["lines 100000", "bytes 1000000"])).await;
        assert_eq!(
            output.len(),
            (1..=100_000).map(|n| format!("line {n}\n").len()).sum::<usize>() + 1_000_000
        );
        assert_eq!(outcome, Outcome::Succeeded);
    }

    #[tokio::test]
    async fn timeouts_and_wishes_end_it() {
        let mut short = request(1, &["hang"]);
        short.timeout = Duration::from_millis(5);
        assert_eq!(play(short).await.2, Outcome::TimedOut);
        let executor = FakeExecutor::new();
        let mut execution = executor.prepare(request(1, &["print up", "stubborn"])).await.unwrap().begin();
        assert!(matches!(
            executor.prepare(request(1, &["print"])).await,
            Err(ExecutorError::AlreadyRunning(_))
        ));
        execution.handle().cancel(Duration::from_millis(5));
        let mut last = None;
        while let Some(event) = execution.next().await {
            last = Some(event);
        }
        assert_eq!(last, Some(ExecutionEvent::Finished { outcome: Outcome::Cancelled, remains: None }));
        drop(executor.prepare(request(2, &["hang"])).await.unwrap().begin());
        executor.close().await;
    }

    #[tokio::test]
    async fn thousands_play_in_a_moment() {
        let executor = FakeExecutor::new();
        for number in 1..=5000 {
            let mut execution = executor.prepare(request(number, &["print hello"])).await.unwrap().begin();
            while execution.next().await.is_some() {}
        }
        executor.close().await;
    }
}
