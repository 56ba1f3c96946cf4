//! Serves the socket: who comes is looked at, told what runs, or let in.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::Uid;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::wire::{self, Ask, Ending, Frame, INPUT_WINDOW, RunningAction};
use super::{Entries, socket_of};
use crate::causes::with_causes;
use crate::executor::door::{Door, DoorError, ExecEnd, ExecRequest, Said, Talk};

/// So many may be inside at once; the others wait.
const VISITORS: usize = 64;
/// Who says nothing of what is wanted is sent away.
const ASK_PATIENCE: Duration = Duration::from_secs(10);
/// Longer than any action is debugged.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// Where the listener is in trouble, as without free descriptors, it is tried again after a while.
const AFTER_TROUBLE: Duration = Duration::from_secs(1);

/// Serves for ever; dropping the future ends everything that was started. An agent that cannot have the socket does without.
pub(crate) async fn serve(data_folder: &Path, entries: Entries) -> std::convert::Infallible {
    let path = socket_of(data_folder);
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(socket = %path.display(), %error, "`sealci exec` cannot enter the actions of this agent");
            return std::future::pending().await;
        }
    };
    let room = Arc::new(Semaphore::new(VISITORS));
    let mut visits = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(permit) = room.clone().acquire_owned().await else { return std::future::pending().await };
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let entries = entries.clone();
                    visits.spawn(async move {
                        let _permit = permit;
                        // Who has left hears nothing.
                        let _ = visit(stream, entries).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "nobody can be let in for a moment");
                    tokio::time::sleep(AFTER_TROUBLE).await;
                }
            },
            Some(_) = visits.join_next() => {}
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    // A former process's: the agent's folder is this one's alone.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Whoever comes before this is told apart by the kernel's word for who it is.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn visit(stream: UnixStream, entries: Entries) -> io::Result<()> {
    let visitor = Uid::from_raw(stream.peer_cred()?.uid());
    let (mut reader, mut writer) = stream.into_split();
    let asked = tokio::time::timeout(ASK_PATIENCE, wire::read(&mut reader)).await;
    let asked = asked.map_err(|_| io::ErrorKind::TimedOut)??;
    if !visitor.is_root() && visitor != Uid::effective() {
        let why = "an agent's actions are entered by its own user and by root alone";
        return wire::write(&mut writer, &Frame::Refused(why.to_owned())).await;
    }
    match asked {
        Some(Frame::Ask(Ask::List)) => wire::write(&mut writer, &Frame::Running(running(&entries))).await,
        Some(Frame::Ask(Ask::Exec { attempt, service, program })) => {
            let talk = match door_of(&entries, &attempt, service.as_deref()) {
                Ok(door) => begin(&door, program).await,
                Err(why) => Err(why),
            };
            match talk {
                Ok(talk) => {
                    tracing::info!(attempt.id = attempt, user.id = visitor.as_raw(), "somebody enters");
                    converse(talk, reader, writer).await
                }
                Err(why) => wire::write(&mut writer, &Frame::Refused(why)).await,
            }
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn running(entries: &Entries) -> Vec<RunningAction> {
    let told = |(attempt, entry): (sealci_core::ids::AttemptId, super::Entry)| RunningAction {
        attempt: attempt.to_string(),
        action: entry.action,
        pipeline: entry.pipeline,
        services: entry.services.into_iter().map(|(name, _)| name).collect(),
    };
    entries.all().into_iter().map(told).collect()
}

/// The error is for a person.
fn door_of(entries: &Entries, attempt: &str, service: Option<&str>) -> Result<Door, String> {
    let entry =
        entries.find(attempt).ok_or_else(|| format!("attempt {attempt} does not run here any more"))?;
    let Some(service) = service else { return Ok(entry.door) };
    let found = entry.services.iter().find(|(name, _)| name == service);
    found.map(|(_, door)| door.clone()).ok_or_else(|| {
        let names: Vec<&str> = entry.services.iter().map(|(name, _)| name.as_str()).collect();
        match names.is_empty() {
            true => format!("`{}` has no services", entry.action),
            false => format!("`{}` has no service `{service}`, but {}", entry.action, names.join(", ")),
        }
    })
}

async fn begin(door: &Door, program: Vec<String>) -> Result<Talk, String> {
    let request = ExecRequest { program, env: Vec::new(), timeout: LONGEST };
    door.talk(request).await.map_err(|error| match error {
        DoorError::Closed => "it is over".to_owned(),
        error => with_causes(&error),
    })
}

/// Passes on what is said, until the program ends or its visitor leaves.
async fn converse(mut talk: Talk, reader: OwnedReadHalf, mut writer: OwnedWriteHalf) -> io::Result<()> {
    wire::write(&mut writer, &Frame::Begun).await?;
    // Who keeps to the window never has this full.
    let (sender, mut input) = mpsc::channel(INPUT_WINDOW + 1);
    let hearing = hear(reader, sender);
    tokio::pin!(hearing);
    loop {
        tokio::select! {
            left = &mut hearing => return left,
            Some(piece) = input.recv(), if talk.takes_input() => {
                if talk.send(piece).await.is_ok() {
                    wire::write(&mut writer, &Frame::Room).await?;
                }
            }
            said = talk.next() => match said {
                Ok(Said::Output { is_error, bytes }) => {
                    wire::write(&mut writer, &Frame::Output { is_error, bytes }).await?;
                    // An error shows in what is said next.
                    let _ = talk.taken().await;
                }
                Ok(Said::Room) => {}
                Ok(Said::Ended(end)) => {
                    let ending = match end {
                        ExecEnd::Exited { exit_code } => Ending::Exited(exit_code),
                        ExecEnd::TimedOut => Ending::BrokeOff(format!("it ran for {} h", LONGEST.as_secs() / 3600)),
                        ExecEnd::Stopped => Ending::BrokeOff("the action is over, and what was run in it".to_owned()),
                    };
                    return wire::write(&mut writer, &Frame::Ended(ending)).await;
                }
                Err(DoorError::Refused(why)) => return wire::write(&mut writer, &Frame::Refused(why)).await,
                Err(error) => {
                    let ending = Ending::BrokeOff(with_causes(&error));
                    return wire::write(&mut writer, &Frame::Ended(ending)).await;
                }
            }
        }
    }
}

/// Takes input, and comes back when the visitor has left.
async fn hear(mut reader: OwnedReadHalf, sender: mpsc::Sender<bytes::Bytes>) -> io::Result<()> {
    loop {
        match wire::read(&mut reader).await? {
            None => return Ok(()),
            Some(Frame::Input(bytes)) if bytes.len() <= wire::MAX_INPUT_BYTES => {
                sender.try_send(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            }
            Some(_) => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
