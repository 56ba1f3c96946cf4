//! The command `exec`: runs a program in an action, or in a service beside it, that runs on this machine.
//!
//! The agents' sockets are found where the kernel lists them, so this works alike for `agent`, `up` and `run`. Nobody but an agent's
//! user and root gets in; and nothing is typed into a socket of somebody else's.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use nix::unistd::Uid;
use sealci_agent::entry::wire::{self, Ask, Ending, Frame, INPUT_WINDOW, MAX_INPUT_BYTES, RunningAction};
use sealci_agent::entry::{SOCKET_NAME, socket_of};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Semaphore;

use crate::exit::{Exit, Failure};
use crate::terminal::one_line;

#[derive(Debug, Args)]
#[command(
    after_help = "The program has the variables, user and folder of the action's commands, and ends with the action. It has no \
terminal of its own. Its exit code is passed on. Only the user that runs the agent, and root, may do this, and only on the \
agent's machine."
)]
pub struct ExecArgs {
    /// The action's name, or the id of it or of its attempt
    #[arg(value_name = "ACTION")]
    action: String,
    /// A service beside it
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// The data folder of an agent, of `up` or of a run, where several run on this machine [default: all of them]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// What to run
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// An action, and where it is entered.
struct Found {
    socket: PathBuf,
    action: RunningAction,
}

pub async fn exec(args: ExecArgs) -> Result<Exit, Failure> {
    let found = look_for(&args.action, args.data.as_deref()).await?;
    let stream =
        connect(&found.socket, args.data.is_some()).await.map_err(|error| broke(&found.socket, &error))?;
    let (mut reader, mut writer) = stream.into_split();
    let ask = Ask::Exec { attempt: found.action.attempt, service: args.service, program: args.command };
    let asking = async {
        wire::write(&mut writer, &Frame::Ask(ask)).await?;
        wire::read(&mut reader).await
    };
    match asking.await.map_err(|error| broke(&found.socket, &error))? {
        Some(Frame::Begun) => {}
        Some(Frame::Refused(why)) => return Err(Failure::usage(one_line(&why))),
        _ => return Err(broke(&found.socket, &io::ErrorKind::UnexpectedEof.into())),
    }
    let room = Arc::new(Semaphore::new(INPUT_WINDOW));
    let told = tokio::select! {
        told = pass_on(&mut reader, &room) => told,
        never = give_input(writer, &room) => match never {},
    };
    match told.map_err(|error| broke(&found.socket, &error))? {
        // Its own code; and a read of the terminal that still waits would hold up any other end.
        Ok(Ending::Exited(code)) => std::process::exit(code),
        Ok(Ending::BrokeOff(why)) => Err(Failure::infrastructure(one_line(&why))),
        Err(why) => Err(Failure::usage(one_line(&why))),
    }
}

/// Writes what the program says; returns how it ended, or why it could not begin.
async fn pass_on(reader: &mut OwnedReadHalf, room: &Semaphore) -> io::Result<Result<Ending, String>> {
    let (mut stdout, mut stderr) = (tokio::io::stdout(), tokio::io::stderr());
    loop {
        match wire::read(reader).await? {
            Some(Frame::Output { is_error: true, bytes }) => {
                stderr.write_all(&bytes).await?;
                stderr.flush().await?;
            }
            Some(Frame::Output { is_error: false, bytes }) => {
                stdout.write_all(&bytes).await?;
                stdout.flush().await?;
            }
            Some(Frame::Room) => room.add_permits(1),
            Some(Frame::Ended(ending)) => return Ok(Ok(ending)),
            Some(Frame::Refused(why)) => return Ok(Err(why)),
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Passes on the input to its end. What becomes of it shows on the other side.
async fn give_input(mut writer: OwnedWriteHalf, room: &Semaphore) -> std::convert::Infallible {
    let mut stdin = tokio::io::stdin();
    let mut buffer = vec![0; MAX_INPUT_BYTES];
    loop {
        if let Ok(permit) = room.acquire().await {
            permit.forget();
        }
        // What cannot be read ends it.
        let count = stdin.read(&mut buffer).await.unwrap_or(0);
        let frame = Frame::Input(Bytes::copy_from_slice(&buffer[..count]));
        if wire::write(&mut writer, &frame).await.is_err() || count == 0 {
            return std::future::pending().await;
        }
    }
}

/// The one action that is meant.
async fn look_for(wanted: &str, data: Option<&Path>) -> Result<Found, Failure> {
    let sockets = match data {
        Some(folder) => {
            let beside = [socket_of(folder), socket_of(&folder.join("agent"))];
            beside.into_iter().filter(|socket| socket.exists()).collect()
        }
        None => sockets(&std::fs::read_to_string("/proc/net/unix").unwrap_or_default()),
    };
    let (mut running, mut agents, mut refusal) = (Vec::new(), 0, None);
    for socket in sockets {
        match list(&socket, data.is_some()).await {
            Ok(actions) => {
                agents += 1;
                running.extend(actions.into_iter().map(|action| Found { socket: socket.clone(), action }));
            }
            Err(error) => refusal = Some(format!("{}: {error}", socket.display())),
        }
    }
    if agents == 0 {
        let help = "run this on the agent's machine, as the user that runs the agent or as root; name its data folder with --data";
        let why = refusal.map(|why| format!(" ({why})")).unwrap_or_default();
        return Err(Failure::new(Exit::NotAllowed, format!("no agent can be entered here{why}")).help(help));
    }
    let fits = |found: &Found| {
        let RunningAction { attempt, action, .. } = &found.action;
        attempt == wanted || action == wanted || attempt.rsplit_once('.').is_some_and(|(id, _)| id == wanted)
    };
    let shown = shown(&running);
    let mut fitting: Vec<Found> = running.into_iter().filter(fits).collect();
    match (fitting.pop(), fitting.is_empty()) {
        (Some(found), true) => Ok(found),
        (Some(_), false) => Err(Failure::usage(format!("several actions are called `{}`", one_line(wanted)))
            .help(format!("name one by its attempt:\n{shown}"))),
        (None, _) if shown.is_empty() => Err(Failure::usage(format!(
            "`{}` does not run here, nor does any other action",
            one_line(wanted)
        ))),
        (None, _) => Err(Failure::usage(format!("`{}` does not run here", one_line(wanted)))
            .help(format!("these do:\n{shown}"))),
    }
}

fn shown(running: &[Found]) -> String {
    let line = |Found { action, .. }: &Found| {
        let services = match action.services.is_empty() {
            true => String::new(),
            false => format!("  services: {}", action.services.join(", ")),
        };
        one_line(&format!("  {}  {} of {}{services}", action.attempt, action.action, action.pipeline))
            .to_string()
    };
    running.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// The agents' sockets that the kernel lists (proc_net(5)): the path is the last field.
fn sockets(listed: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = listed
        .lines()
        .filter_map(|line| line.find(" /").map(|at| Path::new(&line[at + 1..])))
        .filter(|path| path.file_name().is_some_and(|name| name == SOCKET_NAME))
        .map(Path::to_owned)
        .collect();
    // Each connection is listed as well.
    found.sort();
    found.dedup();
    found
}

async fn list(socket: &Path, is_named: bool) -> io::Result<Vec<RunningAction>> {
    let (mut reader, mut writer) = connect(socket, is_named).await?.into_split();
    wire::write(&mut writer, &Frame::Ask(Ask::List)).await?;
    match wire::read(&mut reader).await? {
        Some(Frame::Running(running)) => Ok(running),
        Some(Frame::Refused(why)) => Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Who listens is this user or root; else anybody could pass for an agent. One that was named by its folder is trusted.
async fn connect(socket: &Path, is_named: bool) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket).await?;
    let listener = Uid::from_raw(stream.peer_cred()?.uid());
    if is_named || listener.is_root() || listener == Uid::effective() {
        return Ok(stream);
    }
    let why = format!("it is user {listener}'s; name it with --data");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

fn broke(socket: &Path, error: &io::Error) -> Failure {
    Failure::of_error(Exit::Infrastructure, format!("the agent at {}", socket.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_among_all() {
        let listed = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 20001 /run/dbus/socket\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 20002 /var/lib/a b/agent/sealci-exec.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 20003 /var/lib/a b/agent/sealci-exec.sock\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 20004\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 20005 @/sealci-exec.sock\n";
        assert_eq!(sockets(listed), [PathBuf::from("/var/lib/a b/agent/sealci-exec.sock")]);
    }
}
