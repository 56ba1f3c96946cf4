//! Reaches into a standing environment: puts files in, takes files out, runs a program beside the commands.
//!
//! ```text
//!   prepare ─▶ put* ─▶ begin ─▶ exec* ─▶ Over ─▶ take* ─▶ leave ─▶ Finished
//! ```
//!
//! Archives are tar streams: the agent moves them and never unpacks one, so whatever is in them concerns the environment
//! alone. Invariants: a caller that goes away ends its request; one that is slow holds up nobody but itself; memory stays
//! bounded by a few pieces.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use sealci_guest::wire::{EXEC_WINDOW_PIECES, MAX_EXEC_PIECE_BYTES, MAX_PUT_DATA_BYTES, WireError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How many requests wait for the environment.
const REQUEST_CAPACITY: usize = 4;
/// How many pieces of an archive wait on either side.
pub(super) const PIECE_CAPACITY: usize = 2;

/// The way into one environment. Its clones are the same door; requests for files go through it one after another.
#[derive(Debug, Clone)]
pub struct Door {
    requests: mpsc::Sender<Request>,
}

/// What was put in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Entries of the archive.
    pub files: u64,
    /// Of content.
    pub bytes: u64,
}

/// How much may be taken out at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TakeLimits {
    /// Of content.
    pub max_bytes: u64,
    /// Entries of the archive.
    pub max_files: u64,
}

/// What was taken out, and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Taken {
    /// Entries of the archive.
    pub files: u64,
    /// Of content.
    pub bytes: u64,
    /// The patterns that chose nothing.
    pub missing: Vec<String>,
    /// Devices, sockets and FIFOs, which are left out.
    pub specials: u64,
    /// What could not be read, or not to its end.
    pub unreadable: u64,
    /// The first of those, for a person.
    pub unreadable_names: Vec<String>,
}

/// A program to run beside the commands, in their environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// It and its arguments.
    pub program: Vec<String>,
    /// What is added to the commands' environment, or replaced in it.
    pub env: Vec<(String, String)>,
    /// When it is killed.
    pub timeout: Duration,
}

impl ExecRequest {
    /// One line for the environment's `sh`.
    pub fn line(line: impl Into<String>, timeout: Duration) -> Self {
        Self { program: vec!["sh".to_owned(), "-c".to_owned(), line.into()], env: Vec::new(), timeout }
    }
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecEnd {
    /// As a shell reports it: 128 + n for signal n.
    Exited {
        exit_code: i32,
    },
    TimedOut,
    /// The commands were over first, or ended.
    Stopped,
}

/// A program that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecEnded {
    pub end: ExecEnd,
    /// The last 4 KiB of its outputs.
    pub output: Vec<u8>,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    #[error("the environment is gone")]
    Closed,
    /// Files are put before the commands begin and taken when they are over; programs run while they do.
    #[error("{0}")]
    NotNow(&'static str),
    /// The environment's own reason, for a person.
    #[error("{0}")]
    Refused(String),
    #[error("the archive could not be read")]
    Source(#[source] io::Error),
    #[error("the archive could not be passed on")]
    Sink(#[source] io::Error),
    #[error("the request is too large")]
    TooLarge(#[source] WireError),
}

/// What is asked of the task that drives the environment.
#[derive(Debug)]
pub(super) enum Request {
    Put {
        root: String,
        pieces: mpsc::Receiver<Piece>,
        answer: Answer<Stored>,
    },
    Take {
        wanted: Wanted,
        pieces: mpsc::Sender<Bytes>,
        answer: Answer<Taken>,
    },
    Exec {
        exec: ExecRequest,
        answer: Answer<ExecEnded>,
    },
    /// As `Exec`, but all of it is passed on. Once the listener is cancelled it is stopped.
    Talk {
        exec: ExecRequest,
        news: mpsc::Sender<News>,
        listener: CancellationToken,
        answer: Answer<ExecEnded>,
    },
    /// A piece of input for one that talks, at most as long as the wire allows; an empty one ends it.
    Input {
        id: u32,
        bytes: Bytes,
    },
    /// A piece of its output was passed on.
    Taken {
        id: u32,
    },
}

/// What one that talks tells.
#[derive(Debug)]
pub(super) enum News {
    Begun {
        id: u32,
    },
    Output {
        is_error: bool,
        bytes: Bytes,
    },
    /// One more piece of input can be sent.
    Room,
}

/// How many news wait at most: each of a window's pieces, in both directions, and the beginning.
const NEWS_CAPACITY: usize = 2 * EXEC_WINDOW_PIECES + 1;

/// A program beside the commands, as it runs. Dropping it stops it.
#[derive(Debug)]
pub struct Talk {
    id: u32,
    door: Door,
    news: mpsc::Receiver<News>,
    ended: oneshot::Receiver<Result<ExecEnded, DoorError>>,
    /// How many more pieces of input can be sent.
    room: usize,
    _listener: DropGuard,
}

/// What it says next.
#[derive(Debug)]
pub enum Said {
    /// [`Talk::taken`] is to be called when it is passed on.
    Output { is_error: bool, bytes: Bytes },
    /// There is room for input again.
    Room,
    /// The last.
    Ended(ExecEnd),
}

impl Talk {
    /// The longest piece of input.
    pub const MAX_INPUT_BYTES: usize = MAX_EXEC_PIECE_BYTES;

    /// The next of what it says. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Said, DoorError> {
        match self.news.recv().await {
            Some(News::Output { is_error, bytes }) => Ok(Said::Output { is_error, bytes }),
            Some(News::Room | News::Begun { .. }) => {
                self.room += 1;
                Ok(Said::Room)
            }
            None => {
                let ended = (&mut self.ended).await.unwrap_or(Err(DoorError::Closed))?;
                Ok(Said::Ended(ended.end))
            }
        }
    }

    /// Whether input can be sent.
    pub fn takes_input(&self) -> bool {
        self.room > 0
    }

    /// Sends a piece of input, at most [`Talk::MAX_INPUT_BYTES`]; an empty one ends it. Only while it takes input.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), DoorError> {
        self.room = self.room.saturating_sub(1);
        self.door.ask(Request::Input { id: self.id, bytes }).await
    }

    /// A piece of output was passed on.
    pub async fn taken(&self) -> Result<(), DoorError> {
        self.door.ask(Request::Taken { id: self.id }).await
    }
}

pub(super) type Answer<T> = oneshot::Sender<Result<T, DoorError>>;

/// What to take out.
#[derive(Debug)]
pub(super) struct Wanted {
    pub paths: Vec<String>,
    pub base: String,
    pub limits: TakeLimits,
}

/// A piece of an archive that goes in. Without an `End` it was given up.
#[derive(Debug)]
pub(super) enum Piece {
    Bytes(Bytes),
    End,
}

/// A door and what is behind it.
pub(super) fn door() -> (Door, mpsc::Receiver<Request>) {
    let (requests, asked) = mpsc::channel(REQUEST_CAPACITY);
    (Door { requests }, asked)
}

impl Door {
    /// Unpacks a tar archive below `root`: `~`, `~/…`, absolute, or else below the working folder; made where it is absent.
    /// Only before the commands begin, and once the workspace is filled.
    ///
    /// Modes, times and links are kept; the owner is the action's user. An archive that is not whole, or has names that
    /// lead elsewhere, is refused; what was unpacked of it stays.
    pub async fn put(&self, root: &str, archive: impl AsyncRead) -> Result<Stored, DoorError> {
        let (sender, pieces) = mpsc::channel(PIECE_CAPACITY);
        let (answer, mut answered) = oneshot::channel();
        self.ask(Request::Put { root: root.to_owned(), pieces, answer }).await?;
        let feeding = feed(archive, sender);
        tokio::select! {
            biased;
            told = &mut answered => told.unwrap_or(Err(DoorError::Closed)),
            fed = feeding => {
                fed.map_err(DoorError::Source)?;
                answered.await.unwrap_or(Err(DoorError::Closed))
            }
        }
    }

    /// Packs what `paths` choose into a tar archive. Only after [`super::ExecutionEvent::Over`].
    ///
    /// Paths are globs (`*`, `?`, `[ab]`, `{a,b}`, `**`), absolute, in `~/`, or else below the working folder; a folder is
    /// taken with all that is in it, and `!…` leaves out. The archive's names are relative to `base`, which is read alike
    /// and holds all that is chosen. Symbolic links stay links.
    pub async fn take(
        &self,
        paths: &[String],
        base: &str,
        limits: TakeLimits,
        archive: impl AsyncWrite,
    ) -> Result<Taken, DoorError> {
        let (pieces, mut arriving) = mpsc::channel(PIECE_CAPACITY);
        let (answer, answered) = oneshot::channel();
        let wanted = Wanted { paths: paths.to_vec(), base: base.to_owned(), limits };
        self.ask(Request::Take { wanted, pieces, answer }).await?;
        tokio::pin!(archive);
        while let Some(piece) = arriving.recv().await {
            archive.write_all(&piece).await.map_err(DoorError::Sink)?;
        }
        let taken = answered.await.unwrap_or(Err(DoorError::Closed))?;
        archive.flush().await.map_err(DoorError::Sink)?;
        Ok(taken)
    }

    /// Runs a program beside the commands, and waits for its end. Only while the commands run.
    pub async fn exec(&self, exec: ExecRequest) -> Result<ExecEnded, DoorError> {
        let (answer, answered) = oneshot::channel();
        self.ask(Request::Exec { exec, answer }).await?;
        answered.await.unwrap_or(Err(DoorError::Closed))
    }

    /// Runs a program beside the commands, and passes on what it reads and writes. Only while the commands run.
    pub async fn talk(&self, exec: ExecRequest) -> Result<Talk, DoorError> {
        let (sender, mut news) = mpsc::channel(NEWS_CAPACITY);
        let (answer, ended) = oneshot::channel();
        let listener = CancellationToken::new();
        let guard = listener.clone().drop_guard();
        self.ask(Request::Talk { exec, news: sender, listener, answer }).await?;
        match news.recv().await {
            Some(News::Begun { id }) => {
                let (door, room) = (self.clone(), EXEC_WINDOW_PIECES);
                Ok(Talk { id, door, news, ended, room, _listener: guard })
            }
            // Its answer says why it has not begun.
            _ => match ended.await.unwrap_or(Err(DoorError::Closed)) {
                Err(error) => Err(error),
                Ok(_) => Err(DoorError::Closed),
            },
        }
    }

    async fn ask(&self, request: Request) -> Result<(), DoorError> {
        self.requests.send(request).await.map_err(|_| DoorError::Closed)
    }
}

/// Reads an archive into pieces, as they are taken.
async fn feed(archive: impl AsyncRead, sender: mpsc::Sender<Piece>) -> io::Result<()> {
    tokio::pin!(archive);
    // An error: nobody takes any more, and the answer says why.
    while let Ok(permit) = sender.reserve().await {
        let mut piece = BytesMut::with_capacity(MAX_PUT_DATA_BYTES / 2);
        if archive.read_buf(&mut piece).await? == 0 {
            permit.send(Piece::End);
            return Ok(());
        }
        permit.send(Piece::Bytes(piece.freeze()));
    }
    Ok(())
}
