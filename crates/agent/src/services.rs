//! Runs what an action has beside it: starts its services, waits until each is ready, keeps their output apart, and ends them.
//!
//! The action's environment comes first, and is what they share: its network, in which each is also reached by its name, and its
//! limits. They start when the claim is granted and end before the action's environment does. A service that ends early is
//! said in the log; the action goes on, and fails by itself if it needs it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sealci_core::outcome::Outcome;
use sealci_core::plan::{Ready, Service};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::executor::door::{Door, ExecEnd, ExecRequest};
use crate::executor::{
    Execution, ExecutionEvent, ExecutionHandle, ExecutionRequest, Executor, ExecutorError, Notes, ServiceRole,
};

/// What is kept of a service's output; the rest is counted.
const MAX_LOG_BYTES: u64 = 32 << 20;
/// What is shown in the action's log of a service that does not become ready.
const SHOWN_LINES: usize = 20;
const SHOWN_LINE_CHARACTERS: usize = 300;
/// One try of a service's readiness may take so long.
const TRY_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries, at first and at most.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The stop signal → so long → KILL.
const GRACE: Duration = Duration::from_secs(10);
/// Longer than any action.
const NO_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why an action's services do not stand.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    #[error("the service `{name}` cannot be started")]
    Start {
        name: String,
        #[source]
        source: ExecutorError,
    },
    #[error("the service `{name}` {how} before it was ready; what it said last is above")]
    Ended { name: String, how: String },
    #[error(
        "the service `{name}` was not ready after {} s: `{command}` did not succeed ({last}); what the service said last is above", waited.as_secs()
    )]
    NotReady { name: String, command: String, last: String, waited: Duration },
}

/// Services that run. Dropping it kills them.
#[derive(Debug)]
pub struct Services {
    running: Vec<Running>,
    /// Each takes down what one service says.
    tasks: JoinSet<()>,
}

/// A service's output, in a file.
#[derive(Debug, Clone)]
pub struct ServiceLog {
    pub name: String,
    pub path: PathBuf,
}

#[derive(Debug)]
struct Running {
    service: Service,
    handle: ExecutionHandle,
    door: Door,
    state: watch::Receiver<State>,
    tail: Tail,
    log: ServiceLog,
}

/// How far a service is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Starting,
    Running,
    Ended(Outcome),
}

impl Services {
    /// Starts all that `beside` has, what the action was prepared with, and waits until all are ready.
    pub async fn start(
        executor: &dyn Executor,
        beside: &ExecutionRequest,
        folder: &Path,
    ) -> Result<Self, ServiceError> {
        let mut started = Self { running: Vec::new(), tasks: JoinSet::new() };
        let preparing = beside.services.iter().map(|service| prepare(executor, beside, service, folder));
        for prepared in futures_util::future::join_all(preparing).await {
            let (service, execution) = prepared?;
            started.take_on(service, execution, folder, &beside.notes);
        }
        let notes = &beside.notes;
        let ready = started.running.iter().map(|running| running.ready(notes));
        futures_util::future::try_join_all(ready).await?;
        Ok(started)
    }

    fn take_on(&mut self, service: Service, execution: Execution, folder: &Path, notes: &Notes) {
        let (tell, state) = watch::channel(State::Starting);
        let tail = Tail::default();
        let log = ServiceLog { name: service.name.clone(), path: log_path(folder, &service.name) };
        let (handle, door) = (execution.handle(), execution.door());
        let following = Following { log: log.clone(), tail: tail.clone(), tell, notes: notes.clone() };
        self.tasks.spawn(following.follow(execution));
        self.running.push(Running { service, handle, door, state, tail, log });
    }

    /// The ways into them, by their names.
    pub fn doors(&self) -> Vec<(String, Door)> {
        self.running.iter().map(|running| (running.service.name.clone(), running.door.clone())).collect()
    }

    /// What may be said to them.
    pub fn handles(&self) -> Vec<ExecutionHandle> {
        self.running.iter().map(|running| running.handle.clone()).collect()
    }

    /// Ends them all, properly; returns what they said.
    pub async fn stop(mut self) -> Vec<ServiceLog> {
        for running in &self.running {
            running.handle.cancel(GRACE);
        }
        while self.tasks.join_next().await.is_some() {}
        self.running.drain(..).map(|running| running.log).collect()
    }
}

async fn prepare(
    executor: &dyn Executor,
    beside: &ExecutionRequest,
    service: &Service,
    folder: &Path,
) -> Result<(Service, Execution), ServiceError> {
    let failed = |source| ServiceError::Start { name: service.name.clone(), source };
    let own = folder.join("services").join(&service.name);
    let (workspace, scratch) = (own.join("workspace"), own.join("scratch"));
    for folder in [&workspace, &scratch] {
        tokio::fs::create_dir_all(folder).await.map_err(|source| {
            failed(ExecutorError::Io { doing: format!("make the folder {}", folder.display()), source })
        })?;
    }
    let request = ExecutionRequest {
        commands: Vec::new(),
        env: service.env.clone(),
        workspace,
        scratch,
        container: Some(service.container.clone()),
        service: Some(ServiceRole { name: service.name.clone(), command: service.command.clone() }),
        services: Vec::new(),
        timeout: NO_TIMEOUT,
        grace: GRACE,
        stays: false,
        ..beside.clone()
    };
    let standby = executor.prepare(request).await.map_err(failed)?;
    Ok((service.clone(), standby.begin()))
}

fn log_path(folder: &Path, name: &str) -> PathBuf {
    folder.join("services").join(name).join("log")
}

impl Running {
    /// Waits until the service can be used.
    async fn ready(&self, notes: &Notes) -> Result<(), ServiceError> {
        let began = Instant::now();
        let name = &self.service.name;
        let mut state = self.state.clone();
        // Its sender only goes after the end was told.
        let begun = state.wait_for(|state| *state != State::Starting).await.map(|state| state.clone());
        if let Ok(State::Ended(outcome)) = begun {
            return Err(self.ended(&outcome, notes));
        }
        let Some(ready) = &self.service.ready else { return Ok(()) };
        let checked = tokio::select! {
            checked = self.check(ready, began) => checked,
            ended = state.wait_for(|state| matches!(state, State::Ended(_))) => {
                let outcome = match ended.as_deref() {
                    Ok(State::Ended(outcome)) => outcome.clone(),
                    _ => Outcome::Cancelled,
                };
                return Err(self.ended(&outcome, notes));
            }
        };
        match checked {
            Ok(()) => {
                notes.say(format_args!(
                    "service `{name}` is ready after {:.1} s",
                    began.elapsed().as_secs_f64()
                ));
                Ok(())
            }
            Err(last) => {
                self.show_tail(notes);
                let (command, waited) = (ready.command.clone(), ready.timeout);
                Err(ServiceError::NotReady { name: name.clone(), command, last, waited })
            }
        }
    }

    /// The error says how the last try went.
    async fn check(&self, ready: &Ready, began: Instant) -> Result<(), String> {
        let deadline = began + ready.timeout;
        let mut pause = SHORTEST_PAUSE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = left.min(TRY_TIMEOUT).max(SHORTEST_PAUSE);
            let last = match self.door.exec(ExecRequest::line(&ready.command, timeout)).await {
                Ok(ended) => match ended.end {
                    ExecEnd::Exited { exit_code: 0 } => return Ok(()),
                    ExecEnd::Exited { exit_code } => {
                        let text = String::from_utf8_lossy(&ended.output);
                        let line = text.lines().last().unwrap_or_default().trim().to_owned();
                        if line.is_empty() {
                            format!("exit code {exit_code}")
                        } else {
                            format!("exit code {exit_code}: {line}")
                        }
                    }
                    ExecEnd::TimedOut => format!("it took more than {} s", timeout.as_secs()),
                    ExecEnd::Stopped => "it was stopped".to_owned(),
                },
                Err(error) => error.to_string(),
            };
            if Instant::now() + pause >= deadline {
                return Err(last);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn ended(&self, outcome: &Outcome, notes: &Notes) -> ServiceError {
        self.show_tail(notes);
        ServiceError::Ended { name: self.service.name.clone(), how: how_it_ended(outcome) }
    }

    fn show_tail(&self, notes: &Notes) {
        for line in self.tail.lines() {
            notes.say(format_args!("{}: {line}", self.service.name));
        }
    }
}

fn how_it_ended(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Succeeded => "ended (exit code 0)".to_owned(),
        Outcome::Failed { exit_code, limit: None } => format!("ended (exit code {exit_code})"),
        Outcome::Failed { limit: Some(limit), .. } => format!("was ended by the limit of {}", limit.as_str()),
        Outcome::Errored { message, .. } => format!("broke off ({message})"),
        Outcome::Cancelled | Outcome::TimedOut | Outcome::Skipped { .. } => "was ended".to_owned(),
    }
}

/// Takes down what one service says.
struct Following {
    log: ServiceLog,
    tail: Tail,
    tell: watch::Sender<State>,
    notes: Notes,
}

impl Following {
    async fn follow(self, mut execution: Execution) {
        // Without a file only the tail is kept; the disk may be full.
        let mut file = File::create(&self.log.path).await.ok();
        let (mut written, mut cut) = (0, false);
        while let Some(event) = execution.next().await {
            match event {
                ExecutionEvent::CommandStarted { .. } => {
                    self.tell.send_replace(State::Running);
                }
                ExecutionEvent::Output(bytes) => {
                    self.tail.add(&bytes);
                    let room = usize::try_from(MAX_LOG_BYTES - written).unwrap_or(usize::MAX);
                    cut |= bytes.len() > room;
                    let kept = &bytes[..bytes.len().min(room)];
                    written += kept.len() as u64;
                    if let Some(open) = &mut file
                        && open.write_all(kept).await.is_err()
                    {
                        file = None;
                    }
                }
                ExecutionEvent::Finished { outcome, .. } => {
                    if outcome != Outcome::Cancelled {
                        let how = how_it_ended(&outcome);
                        self.notes.say(format_args!("service `{}` {how}", self.log.name));
                    }
                    self.tell.send_replace(State::Ended(outcome));
                }
                ExecutionEvent::Started
                | ExecutionEvent::CommandFinished { .. }
                | ExecutionEvent::Over { .. } => {}
            }
        }
        if let Some(mut open) = file {
            if cut {
                let _ = open.write_all(b"\nsealci: the log is cut here\n").await;
            }
            let _ = open.flush().await;
        }
        self.tell.send_if_modified(|state| {
            let told = matches!(state, State::Ended(_));
            if !told {
                *state = State::Ended(Outcome::Cancelled);
            }
            !told
        });
    }
}

/// The last lines of a service's output.
#[derive(Debug, Clone, Default)]
struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    fn add(&self, bytes: &[u8]) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(bytes);
        for (number, part) in text.split('\n').enumerate() {
            if number > 0 || lines.is_empty() {
                lines.push_back(String::new());
            }
            if let Some(line) = lines.back_mut() {
                let room = SHOWN_LINE_CHARACTERS.saturating_sub(line.chars().count());
                line.extend(part.chars().take(room));
            }
            while lines.len() > SHOWN_LINES + 1 {
                lines.pop_front();
            }
        }
    }

    fn lines(&self) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| !line.trim().is_empty()).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_last_lines_and_bounded() {
        let tail = Tail::default();
        for piece in ["one\ntw", "o\n\nthr", "ee"] {
            tail.add(piece.as_bytes());
        }
        assert_eq!(tail.lines(), ["one", "two", "three"]);
        tail.add(&[b"x".repeat(10_000), b"\n".repeat(5), b"end\n".to_vec()].concat());
        let lines = tail.lines();
        assert_eq!(lines.last().map(String::as_str), Some("end"));
        assert!(lines.iter().all(|line| line.len() <= SHOWN_LINE_CHARACTERS));
        for number in 0..1000 {
            tail.add(format!("{number}\n").as_bytes());
        }
        assert_eq!(tail.lines().len(), SHOWN_LINES);
        assert_eq!(tail.lines()[0], "980");
    }
}
