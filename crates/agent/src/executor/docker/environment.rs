//! Keeps one container of a daemon's, with the channel to its init: the daemon's attached streams on the one side, a pair of
//! sockets on the other.
//!
//! ```text
//!   conversation ⇄ socket pair ⇄ two tasks ⇄ attached connection ⇄ daemon ⇄ pipes ⇄ init
//! ```
//!
//! Each step holds back the one before it. The container's standard input ends with the connection, also when this process
//! is killed; that ends the init, and everything in its PID namespace with it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bollard::container::{AttachContainerResults, LogOutput};
use bollard::query_parameters::{
    KillContainerOptionsBuilder, RemoveContainerOptionsBuilder, WaitContainerOptionsBuilder,
};
use futures_util::StreamExt;
use sealci_core::outcome::Limit;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::daemon::{Daemon, DockerError};
use super::giving::Giving;
use super::limits::LimitWatch;
use crate::executor::ExecutorError;
use crate::executor::environment::kill_by_environment;
use crate::executor::init::Environment;

/// How long a container may take to be gone after its channel is closed; the daemon may have much to do.
const EXIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a daemon that went away is waited for.
const RETURN_PATIENCE: Duration = Duration::from_secs(10);
const RETURN_INTERVAL: Duration = Duration::from_millis(500);
/// How long it may take until the daemon has told all of a container that is gone.
const NEWS_PATIENCE: Duration = Duration::from_secs(2);
/// What is shown of an init's complaints.
const COMPLAINT_BYTES: usize = 2048;
const COPY_BYTES: usize = 64 << 10;

/// What init has in its own environment, so that it is found without the daemon.
pub(super) const MARKER: &str = "SEALCI_INIT_OF";

/// A text that several write to.
#[derive(Debug, Clone, Default)]
pub(super) struct Complaints(Arc<Mutex<Vec<u8>>>);

impl Complaints {
    fn add(&self, bytes: &[u8]) {
        let mut text = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = COMPLAINT_BYTES.saturating_sub(text.len());
        text.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn take(&self) -> String {
        let text = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        String::from_utf8_lossy(&text).trim().to_owned()
    }
}

/// A container, from its making to its removal.
#[derive(Debug)]
pub(super) struct DockerEnvironment {
    pub daemon: Daemon,
    pub id: String,
    /// For people.
    pub name: String,
    pub attempt: String,
    pub limits: LimitWatch,
    pub complaints: Complaints,
    /// What copies, and kills.
    pub tasks: JoinSet<()>,
    /// Ends when the daemon has told of the container's removal.
    pub news: JoinSet<()>,
    pub giving: Option<Giving>,
    pub workspace: PathBuf,
}

/// Copies between a channel and an attached container.
pub(super) fn bridge(
    tasks: &mut JoinSet<()>,
    channel: UnixStream,
    attached: AttachContainerResults,
    complaints: Complaints,
) {
    let (mut reader, mut writer) = channel.into_split();
    let AttachContainerResults { mut output, mut input } = attached;
    tasks.spawn(async move {
        let mut buffer = vec![0; COPY_BYTES];
        while let Ok(count @ 1..) = reader.read(&mut buffer).await {
            if input.write_all(&buffer[..count]).await.is_err() || input.flush().await.is_err() {
                break;
            }
        }
        // The daemon closes the container's standard input upon this.
        let _ = input.shutdown().await;
    });
    tasks.spawn(async move {
        let mut is_heard = true;
        while let Some(frame) = output.next().await {
            match frame {
                // What nobody hears any more is taken all the same: the daemon waits for that before it says that a
                // container is over.
                Ok(LogOutput::StdOut { message } | LogOutput::Console { message }) if is_heard => {
                    is_heard = writer.write_all(&message).await.is_ok();
                }
                Ok(LogOutput::StdErr { message }) => complaints.add(&message),
                Ok(_) => {}
                Err(error) => {
                    complaints
                        .add(format!("the container daemon broke the connection off: {error}").as_bytes());
                    break;
                }
            }
        }
    });
}

impl DockerEnvironment {
    /// Waits until the daemon has removed the container.
    async fn is_gone(&self) -> Result<bool, DockerError> {
        let options = WaitContainerOptionsBuilder::new().condition("removed").build();
        let mut waiting = self.daemon.docker.wait_container(&self.id, Some(options));
        match tokio::time::timeout(EXIT_PATIENCE, waiting.next()).await {
            Err(_) => Ok(false),
            // With whatever status.
            Ok(None | Some(Ok(_) | Err(bollard::errors::Error::DockerContainerWaitError { .. }))) => Ok(true),
            Ok(Some(Err(error))) => self.absence_is_fine(error, "wait for").map(|()| true),
        }
    }

    async fn remove(&self) -> Result<(), DockerError> {
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        match self.daemon.docker.remove_container(&self.id, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) => match self.absence_is_fine(error, "remove") {
                // It is being removed already.
                Err(DockerError::Refused { status: 409, .. }) => Ok(()),
                result => result,
            },
        }
    }

    fn absence_is_fine(&self, error: bollard::errors::Error, doing: &str) -> Result<(), DockerError> {
        let error = self.daemon.failed(format!("{doing} the container {}", self.name))(error);
        if error.is_absence() { Ok(()) } else { Err(error) }
    }

    /// Has the container removed, whatever it takes.
    async fn take_down(&self) -> Result<(), DockerError> {
        match self.is_gone().await {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(_) => self.kill_without_daemon(),
        }
        let until = tokio::time::Instant::now() + RETURN_PATIENCE;
        loop {
            let gone = match self.remove().await {
                Ok(()) => self.is_gone().await,
                Err(error) => Err(error),
            };
            match gone {
                Ok(true) => return Ok(()),
                Ok(false) => {
                    return Err(DockerError::Late {
                        socket: self.daemon.socket.clone(),
                        doing: format!("remove the container {}", self.name),
                    });
                }
                Err(error @ DockerError::Refused { .. }) => return Err(error),
                Err(error) if tokio::time::Instant::now() >= until => return Err(error),
                // Nothing tells when a daemon is back.
                Err(_) => tokio::time::sleep(RETURN_INTERVAL).await,
            }
        }
    }

    /// The container may outlive its daemon. Where its processes are to be seen by this one, they end.
    fn kill_without_daemon(&self) {
        kill_by_environment(&format!("{MARKER}={}", self.attempt));
        kill_by_environment(&format!("SEALCI_ATTEMPT={}", self.attempt));
    }
}

#[async_trait]
impl Environment for DockerEnvironment {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        match &self.giving {
            Some(giving) => giving.give(&self.daemon, &self.workspace).await,
            None => Ok(()),
        }
    }

    fn kill(&mut self) {
        let (docker, id) = (self.daemon.docker.clone(), self.id.clone());
        self.tasks.spawn(async move {
            let options = KillContainerOptionsBuilder::new().signal("SIGKILL").build();
            // An error means that it is gone, or that the daemon is; `clear` finds out which.
            let _ = docker.kill_container(&id, Some(options)).await;
        });
    }

    fn limit_reached(&self) -> Option<Limit> {
        self.limits.reached()
    }

    async fn clear(&mut self, _orderly: bool) -> Result<(), String> {
        let down = self.take_down().await;
        if down.is_ok() {
            let _ = tokio::time::timeout(NEWS_PATIENCE, self.news.join_next()).await;
        }
        self.news.shutdown().await;
        self.tasks.shutdown().await;
        let returned = match self.giving.take() {
            Some(giving) => giving.take_back(&self.daemon, &self.workspace).await,
            None => Ok(()),
        };
        down.map_err(|error| {
            let error = ExecutorError::from(error).message();
            format!("{error}; the container {} goes with the agent's next start", self.name)
        })?;
        returned.map_err(|error| error.message())
    }

    fn complaints(&mut self) -> String {
        self.complaints.take()
    }
}
