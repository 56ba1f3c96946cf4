//! Drives what every environment with a `sealci-init` in it has in common: the conversation over its channel, from `Start`
//! to `Finished`, and the clean-up behind it.
//!
//! An executor makes an [`Environment`] with an init in it that waits for its `Start`; from there on [`drive`] is the same
//! for all. Invariants: the init is believed only as far as it hurts itself (offsets are counted here, texts are
//! bounded); an environment is cleared before its end is told; an init that does not answer in time is ended by force,
//! but never while what it sent still waits to be taken.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use sealci_core::outcome::{Cause, Limit, Outcome};
use sealci_guest::wire::{self, Ending, FromInit, HEADER_BYTES, Header, OUTPUT_KIND, ToInit, WireError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Backstage, ExecutionEvent, ExecutorError, ResourceUse, Wish};

/// The static init, built for the machine this agent is built for.
static INIT_BINARY: &[u8] = include_bytes!(env!("SEALCI_INIT_BINARY"));

/// How long an init may take to come up and to understand its `Start`.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How much longer than the grace an init may take to end what it runs.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// The largest frame and a header fit.
const READ_BUFFER_BYTES: usize = 128 << 10;

/// Puts the init where it can be executed: `<data_dir>/bin/sealci-init-<checksum>`. Does nothing if it is there.
pub fn install(data_dir: &Path) -> Result<PathBuf, ExecutorError> {
    // It only keeps versions apart: what is there is compared as a whole.
    let checksum = crc32fast::hash(INIT_BINARY);
    let folder = data_dir.join("bin");
    let path = folder.join(format!("sealci-init-{checksum:08x}"));
    if fs::read(&path).is_ok_and(|bytes| bytes == INIT_BINARY) {
        return Ok(path);
    }
    let write = || {
        fs::create_dir_all(&folder)?;
        // Its own name for each process: two that start together do not write into one file.
        let partial = folder.join(format!(".sealci-init-{}", std::process::id()));
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(&partial)?;
        file.write_all(INIT_BINARY)?;
        // Whatever the umask is.
        file.set_permissions(fs::Permissions::from_mode(0o755))?;
        // Not synced: what a crash leaves of it is found to be broken at the next start.
        drop(file);
        fs::rename(&partial, &path)
    };
    write().map_err(ExecutorError::io(format_args!("write {}", path.display())))?;
    Ok(path)
}

/// What an init runs in.
#[async_trait]
pub(super) trait Environment: Send {
    /// Does what has to be done between the filling of the workspace and the first command.
    async fn open_up(&mut self) -> Result<(), ExecutorError>;

    /// Ends everything in it, the init included, without asking. May be repeated.
    fn kill(&mut self);

    /// The limit that was run into so far.
    fn limit_reached(&self) -> Option<Limit>;

    /// Waits for the init's end, and takes the environment down: nothing of it is left afterwards, but what the error
    /// names. `orderly` says that the init has reported that nothing lives.
    async fn clear(&mut self, orderly: bool) -> Result<(), String>;

    /// What init and helpers complained of on their standard error; for a person, bounded. Asked after `clear`.
    fn complaints(&mut self) -> String;
}

/// An environment whose init waits for its `Start`.
pub(super) struct Prepared {
    pub channel: UnixStream,
    /// An encoded `Start`.
    pub start: Vec<u8>,
    pub environment: Box<dyn Environment>,
    pub timeout: Duration,
    pub grace: Duration,
}

/// Encodes what sets the commands going.
pub(super) fn encoded(start: wire::Start) -> Result<Vec<u8>, ExecutorError> {
    encode(&ToInit::Start(start)).map_err(ExecutorError::TooLarge)
}

fn encode(message: &ToInit) -> Result<Vec<u8>, WireError> {
    let mut frame = Vec::new();
    message.encode(&mut frame)?;
    Ok(frame)
}

/// Waits until it may go, runs an environment to its end, and tells that last.
pub(super) async fn drive(prepared: Prepared, backstage: Backstage) {
    let Prepared { channel, start, mut environment, timeout, grace } = prepared;
    let Backstage { go, events, wishes } = backstage;
    let (reader, mut writer) = channel.into_split();
    // It sets a helper on its way. Should it not arrive, that shows in what is heard.
    if let Ok(hello) = encode(&ToInit::Hello { version: wire::VERSION }) {
        let _ = writer.write_all(&hello).await;
    }
    let opened = match go.await {
        Ok(()) => environment
            .open_up()
            .await
            .map_err(|error| Outcome::Errored { cause: error.cause(), message: error.message() }),
        // It is not to go any more.
        Err(_) => Err(Outcome::Cancelled),
    };
    if let Err(outcome) = opened {
        drop((reader, writer));
        environment.kill();
        let remains = environment.clear(false).await.err();
        let _ = events.send(ExecutionEvent::Finished { outcome, remains }).await;
        return;
    }
    let mut conversation = Conversation {
        incoming: Incoming { reader, buffer: BytesMut::with_capacity(READ_BUFFER_BYTES) },
        writer,
        wishes,
        environment: environment.as_mut(),
        log_offset: 0,
        runs: false,
        deadline: Instant::now() + START_PATIENCE,
        timeout,
        grace,
    };
    let end = conversation.hold(&start, &events).await;
    let wish = *conversation.wishes.borrow();
    // The channel's end ends the init, if anything of it is left.
    drop(conversation);
    let limit = environment.limit_reached();
    let orderly = matches!(end, End::Told { survivors: 0, .. });
    let cleared = environment.clear(orderly).await;
    let outcome = end.outcome(limit, wish, || environment.complaints());
    // Nobody listens when the execution was dropped.
    let _ = events.send(ExecutionEvent::Finished { outcome, remains: cleared.err() }).await;
}

/// How a conversation ended.
enum End {
    Told {
        ending: Ending,
        survivors: u32,
    },
    /// The channel closed without a `Finished`: the init is dead, or was ended by force.
    Silent,
    /// It was not the init's language.
    Garbled(WireError),
    Late(&'static str),
    /// It did not end what ran into the timeout.
    LateAfterTimeout,
}

impl End {
    fn outcome(self, limit: Option<Limit>, wish: Wish, complaints: impl FnOnce() -> String) -> Outcome {
        let errored = |message: String| Outcome::Errored { cause: Cause::Executor, message };
        let what = match self {
            Self::Told { ending, .. } => match ending {
                Ending::Succeeded => return Outcome::Succeeded,
                Ending::Failed { exit_code } => return Outcome::Failed { exit_code, limit },
                Ending::TimedOut => return Outcome::TimedOut,
                Ending::Cancelled => return Outcome::Cancelled,
                Ending::Error(message) => return errored(message),
            },
            _ if wish != Wish::GoOn => return Outcome::Cancelled,
            Self::LateAfterTimeout => return Outcome::TimedOut,
            // The kernel may choose the init itself to make room.
            Self::Silent if limit == Some(Limit::Memory) => {
                return Outcome::Failed { exit_code: 128 + nix::libc::SIGKILL, limit };
            }
            Self::Silent => "sealci-init ended without a report; was it killed?".to_owned(),
            Self::Garbled(error) => format!("sealci-init sent what is not understood: {error}"),
            Self::Late(what) => format!("sealci-init {what} in time, and was killed"),
        };
        let complaints = complaints();
        if complaints.is_empty() { errored(what) } else { errored(format!("{what}: {complaints}")) }
    }
}

struct Conversation<'a> {
    incoming: Incoming,
    writer: tokio::net::unix::OwnedWriteHalf,
    wishes: watch::Receiver<Wish>,
    environment: &'a mut dyn Environment,
    log_offset: u64,
    /// A command has started: the deadline is the timeout's, unless a wish came after it.
    runs: bool,
    /// When the init is ended by force, should it not have said a thing by then.
    deadline: Instant,
    timeout: Duration,
    grace: Duration,
}

impl Conversation<'_> {
    async fn hold(&mut self, start: &[u8], events: &mpsc::Sender<ExecutionEvent>) -> End {
        match tokio::time::timeout_at(self.deadline, self.writer.write_all(start)).await {
            Ok(Ok(())) => {}
            // Its end shows when reading, after what it may still have said.
            Ok(Err(_)) => {}
            Err(_) => return End::Late("did not read its commands"),
        }
        let mut waiting = None;
        let mut late = false;
        loop {
            let step = tokio::select! {
                biased;
                changed = self.wishes.changed() => Step::Wish(changed.is_ok()),
                permit = events.reserve(), if waiting.is_some() => Step::Permit(permit.ok()),
                frame = self.incoming.next(), if waiting.is_none() => Step::Frame(frame),
                // Last: what has been said is heard before it is said to be late.
                () = tokio::time::sleep_until(self.deadline), if waiting.is_none() => Step::Late,
            };
            match step {
                Step::Wish(true) => {
                    let wish = *self.wishes.borrow_and_update();
                    self.pass_on(wish);
                }
                Step::Permit(Some(permit)) => {
                    if let Some(event) = waiting.take() {
                        permit.send(event);
                    }
                }
                // The owner and all handles are gone.
                Step::Wish(false) | Step::Permit(None) => return End::Silent,
                Step::Frame(Ok(Some(frame))) => match self.understand(frame) {
                    Ok(Heard::Event(event)) => waiting = Some(event),
                    Ok(Heard::Nothing) => {}
                    Ok(Heard::End(end)) => return end,
                    Err(error) => return End::Garbled(error),
                },
                Step::Frame(Err(Unreadable::Garbled(error))) => return End::Garbled(error),
                Step::Frame(Ok(None) | Err(Unreadable::Io)) | Step::Late if late => {
                    return if self.runs { End::LateAfterTimeout } else { End::Late("did not answer") };
                }
                Step::Frame(Ok(None) | Err(Unreadable::Io)) => return End::Silent,
                Step::Late => {
                    late = true;
                    self.environment.kill();
                    self.put_off(END_PATIENCE);
                }
            }
        }
    }

    fn understand(&mut self, frame: Frame) -> Result<Heard, WireError> {
        let (kind, payload) = match frame {
            Frame::Control(kind, payload) => (kind, payload),
            Frame::Output(bytes) => {
                self.log_offset += bytes.len() as u64;
                return Ok(Heard::Event(ExecutionEvent::Output(bytes)));
            }
        };
        let event = match FromInit::decode(kind, &payload)? {
            FromInit::Hello { version: wire::VERSION } => return Ok(Heard::Nothing),
            FromInit::Hello { version } => {
                let text =
                    format!("sealci-init speaks version {version} of the protocol, not {}", wire::VERSION);
                let ending = Ending::Error(text);
                return Ok(Heard::End(End::Told { ending, survivors: u32::MAX }));
            }
            FromInit::Ready => ExecutionEvent::Started,
            FromInit::CommandStarted { index, .. } => {
                self.runs = true;
                if index == 0 && *self.wishes.borrow() == Wish::GoOn {
                    self.put_off(self.timeout.saturating_add(self.grace).saturating_add(END_PATIENCE));
                }
                ExecutionEvent::CommandStarted { index, log_offset: self.log_offset }
            }
            // `Frame` keeps output apart.
            FromInit::Output(_) => return Err(WireError::Invalid("kind")),
            FromInit::CommandFinished { index, exit_code, duration_us, usage, .. } => {
                ExecutionEvent::CommandFinished {
                    index,
                    exit_code,
                    duration: Duration::from_micros(duration_us),
                    log_offset: self.log_offset,
                    resource_use: ResourceUse {
                        cpu_user: Duration::from_micros(usage.cpu_user_us),
                        cpu_system: Duration::from_micros(usage.cpu_system_us),
                        memory_peak_bytes: usage.memory_peak_bytes,
                    },
                }
            }
            FromInit::Finished { ending, survivors } => {
                return Ok(Heard::End(End::Told { ending, survivors }));
            }
        };
        Ok(Heard::Event(event))
    }

    fn pass_on(&mut self, wish: Wish) {
        let (message, patience) = match wish {
            Wish::GoOn => return,
            Wish::Cancel { grace } => {
                let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
                (ToInit::Cancel { grace_ms }, grace.saturating_add(END_PATIENCE))
            }
            Wish::Kill => (ToInit::Kill, END_PATIENCE),
        };
        let sent = encode(&message)
            .is_ok_and(|frame| self.writer.try_write(&frame).is_ok_and(|count| count == frame.len()));
        if sent {
            self.put_off(patience);
        } else {
            // It has not read in a long time: it is past listening.
            self.environment.kill();
            self.put_off(END_PATIENCE);
        }
    }

    fn put_off(&mut self, patience: Duration) {
        let now = Instant::now();
        // A year is as good as never.
        let never = Duration::from_secs(365 * 24 * 3600);
        self.deadline = now + patience.min(never);
    }
}

/// What happened next.
enum Step<'a> {
    /// False: nobody can wish any more.
    Wish(bool),
    Permit(Option<mpsc::Permit<'a, ExecutionEvent>>),
    Frame(Result<Option<Frame>, Unreadable>),
    Late,
}

enum Heard {
    Event(ExecutionEvent),
    Nothing,
    End(End),
}

enum Frame {
    Output(bytes::Bytes),
    Control(u8, bytes::Bytes),
}

enum Unreadable {
    Garbled(WireError),
    Io,
}

/// Cuts the channel's bytes into frames, without copying output.
struct Incoming {
    reader: OwnedReadHalf,
    buffer: BytesMut,
}

impl Incoming {
    /// The next frame; none at the channel's end. Dropping the future loses nothing.
    async fn next(&mut self) -> Result<Option<Frame>, Unreadable> {
        loop {
            if let Some(frame) = self.take_frame().map_err(Unreadable::Garbled)? {
                return Ok(Some(frame));
            }
            // While the events still hold the old memory this takes new.
            self.buffer.reserve(READ_BUFFER_BYTES / 2);
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Unreadable::Io),
            }
        }
    }

    fn take_frame(&mut self) -> Result<Option<Frame>, WireError> {
        let Some((head, rest)) = self.buffer.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let Header { kind, payload_bytes } = Header::parse(*head, wire::MAX_FROM_INIT_BYTES)?;
        if rest.len() < payload_bytes {
            self.buffer.reserve(HEADER_BYTES + payload_bytes - self.buffer.len());
            return Ok(None);
        }
        let mut frame = self.buffer.split_to(HEADER_BYTES + payload_bytes);
        let payload = frame.split_off(HEADER_BYTES).freeze();
        Ok(Some(if kind == OUTPUT_KIND { Frame::Output(payload) } else { Frame::Control(kind, payload) }))
    }
}
