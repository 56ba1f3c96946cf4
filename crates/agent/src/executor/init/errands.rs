//! Keeps what is asked of an init through the door, until it is answered.
//!
//! Files are one errand at a time; programs are as many as the init allows. Invariant: whoever asked hears an answer, or
//! that the environment is gone, which is what dropping this says.

use std::collections::HashMap;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use sealci_guest::wire::{self, FromInit, MAX_PUT_DATA_BYTES, PUT_WINDOW_BYTES, ToInit, WireError};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_util::sync::CancellationToken;

use super::channel::Outgoing;
use crate::executor::door::{
    Answer, DoorError, ExecEnd, ExecEnded, ExecRequest, News, Piece, Stored, Taken, Wanted,
};

/// What is under way.
#[derive(Default)]
pub(super) struct Errands {
    last_id: u32,
    programs: HashMap<u32, Program>,
    /// Those that talk, each as soon as nobody listens to it any more.
    deserted: FuturesUnordered<BoxFuture<'static, u32>>,
    files: Option<Files>,
    /// What may still be said of files is nobody's.
    is_given_up: bool,
}

/// A program that runs beside the commands.
struct Program {
    /// None: it does not talk.
    news: Option<mpsc::Sender<News>>,
    answer: Answer<ExecEnded>,
}

/// What whoever asked has done.
pub(super) enum Move {
    /// A piece to send; none: it was given up.
    Piece(Option<Piece>),
    /// Whether the piece that waits can be passed on; false: nobody wants it any more.
    Room(bool),
    /// Nobody listens to this program any more.
    Deserted(u32),
}

enum Files {
    In(Putting),
    Out(Taking),
}

struct Putting {
    id: u32,
    pieces: mpsc::Receiver<Piece>,
    /// What there was no room for yet.
    rest: Bytes,
    /// How much the init has room for.
    room_bytes: usize,
    /// It is all sent, or given up.
    is_over: bool,
    answer: Answer<Stored>,
}

struct Taking {
    id: u32,
    paths: Vec<String>,
    pieces: mpsc::Sender<Bytes>,
    /// Not passed on yet; nothing else is heard meanwhile.
    waiting: Option<Bytes>,
    is_over: bool,
    answer: Answer<Taken>,
}

impl Errands {
    pub fn has_files(&self) -> bool {
        self.files.is_some()
    }

    pub fn put(
        &mut self,
        put: wire::Put,
        pieces: mpsc::Receiver<Piece>,
        answer: Answer<Stored>,
        out: &mut Outgoing,
    ) {
        let id = self.next_id();
        match out.post(&ToInit::Put(wire::Put { id, ..put })) {
            Ok(()) => {
                let (rest, room_bytes, is_over) = (Bytes::new(), PUT_WINDOW_BYTES, false);
                self.files = Some(Files::In(Putting { id, pieces, rest, room_bytes, is_over, answer }));
            }
            Err(error) => refuse(answer, DoorError::TooLarge(error)),
        }
    }

    pub fn take(
        &mut self,
        wanted: Wanted,
        pieces: mpsc::Sender<Bytes>,
        answer: Answer<Taken>,
        out: &mut Outgoing,
    ) {
        let id = self.next_id();
        let Wanted { paths, base, limits } = wanted;
        let take = wire::Take {
            id,
            paths: paths.clone(),
            base: base.into_bytes(),
            max_bytes: limits.max_bytes,
            max_files: limits.max_files,
        };
        match out.post(&ToInit::Take(take)) {
            Ok(()) => {
                let taking = Taking { id, paths, pieces, waiting: None, is_over: false, answer };
                self.files = Some(Files::Out(taking));
            }
            Err(error) => refuse(answer, DoorError::TooLarge(error)),
        }
    }

    pub fn exec(&mut self, exec: ExecRequest, answer: Answer<ExecEnded>, out: &mut Outgoing) {
        self.begin_program(exec, Program { news: None, answer }, out);
    }

    pub fn talk(
        &mut self,
        exec: ExecRequest,
        (news, listener): (mpsc::Sender<News>, CancellationToken),
        answer: Answer<ExecEnded>,
        out: &mut Outgoing,
    ) {
        let id = self.begin_program(exec, Program { news: Some(news), answer }, out);
        self.deserted.push(Box::pin(async move {
            listener.cancelled().await;
            id
        }));
    }

    fn begin_program(&mut self, exec: ExecRequest, program: Program, out: &mut Outgoing) -> u32 {
        let id = self.next_id();
        let ExecRequest { program: words, env, timeout } = exec;
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let streams = program.news.is_some();
        match out.post(&ToInit::Exec(wire::Exec { id, program: words, env, timeout_ms, streams })) {
            Ok(()) => {
                if let Some(news) = &program.news {
                    // Its first, so there is room.
                    let _ = news.try_send(News::Begun { id });
                }
                self.programs.insert(id, program);
            }
            Err(error) => refuse(program.answer, DoorError::TooLarge(error)),
        }
        id
    }

    /// Passes input on. Of one that has ended it is nobody's.
    pub fn input(&mut self, id: u32, bytes: &Bytes, out: &mut Outgoing) {
        if self.programs.contains_key(&id) {
            // The door cuts it to size.
            let _ = out.post(&ToInit::ExecInput { id, bytes: bytes.to_vec() });
        }
    }

    /// A piece of output was passed on.
    pub fn taken(&mut self, id: u32, out: &mut Outgoing) {
        if self.programs.contains_key(&id) {
            let _ = out.post(&ToInit::ExecTaken { id });
        }
    }

    /// Whether anybody may stop listening.
    pub fn have_listeners(&self) -> bool {
        !self.deserted.is_empty()
    }

    /// Stops it, if it still runs.
    pub fn stop(&mut self, id: u32, out: &mut Outgoing) {
        if self.programs.contains_key(&id) {
            let _ = out.post(&ToInit::Stop { id });
        }
    }

    fn next_id(&mut self) -> u32 {
        self.last_id = self.last_id.wrapping_add(1);
        self.last_id
    }

    /// Whether it is the init that has to do or say something about files.
    pub fn await_init(&self) -> bool {
        match &self.files {
            None => false,
            Some(Files::In(putting)) => putting.is_over || putting.room_bytes == 0,
            Some(Files::Out(taking)) => taking.waiting.is_none(),
        }
    }

    /// Waits for whoever asked: for a piece to send, or for room to pass one on, where `can_move`; or for one that leaves. Dropping
    /// the future loses nothing.
    pub async fn next_move(&mut self, can_move: bool) -> Move {
        let files = self.files.as_mut().filter(|_| can_move);
        tokio::select! {
            biased;
            Some(id) = self.deserted.next(), if !self.deserted.is_empty() => Move::Deserted(id),
            moved = next_of_files(files) => moved,
        }
    }

    /// Nobody gets files any more: who asked hears that the environment is gone, and who is slow holds up no ending.
    pub fn give_up_files(&mut self) {
        self.files = None;
        self.is_given_up = true;
    }

    // ---- in ----

    /// Whether another piece can be sent.
    pub fn want_piece(&self) -> bool {
        matches!(&self.files, Some(Files::In(putting)) if !putting.is_over && putting.room_bytes > 0)
    }

    pub fn send(&mut self, piece: Option<Piece>, out: &mut Outgoing) {
        let Some(Files::In(putting)) = &mut self.files else { return };
        let last = match piece {
            Some(Piece::Bytes(mut bytes)) => {
                let count = bytes.len().min(putting.room_bytes).min(MAX_PUT_DATA_BYTES);
                putting.rest = bytes.split_off(count);
                putting.room_bytes -= count;
                return out.post_piece(&bytes);
            }
            Some(Piece::End) => ToInit::PutEnd,
            None => ToInit::Stop { id: putting.id },
        };
        putting.is_over = true;
        // Neither is ever too long.
        let _ = out.post(&last);
    }

    // ---- out ----

    /// A piece came in.
    pub fn keep(&mut self, piece: Bytes) -> Result<(), WireError> {
        match &mut self.files {
            Some(Files::Out(taking)) => {
                taking.waiting = Some(piece).filter(|piece| !piece.is_empty() && !taking.is_over);
                Ok(())
            }
            None if self.is_given_up => Ok(()),
            _ => Err(WireError::Invalid("kind")),
        }
    }

    /// Whether a piece waits for whoever takes it.
    pub fn have_waiting(&self) -> bool {
        matches!(&self.files, Some(Files::Out(Taking { waiting: Some(_), .. })))
    }

    pub fn pass_on(&mut self, has_room: bool, out: &mut Outgoing) {
        let Some(Files::Out(taking)) = &mut self.files else { return };
        let piece = taking.waiting.take();
        if has_room && let Some(piece) = piece {
            // Nobody else sends, so the room is still there.
            let _ = taking.pieces.try_send(piece);
        } else if !taking.is_over {
            taking.is_over = true;
            // Never too long.
            let _ = out.post(&ToInit::Stop { id: taking.id });
        }
    }

    // ---- answers ----

    /// Passes an answer on to whoever asked.
    pub fn hear(&mut self, told: FromInit<'_>) -> Result<(), WireError> {
        const UNASKED: WireError = WireError::Invalid("answer");
        match (told, self.files.take()) {
            (FromInit::ExecEnded { id, end, output }, files) => {
                self.files = files;
                let Program { answer, .. } = self.programs.remove(&id).ok_or(UNASKED)?;
                let end = match end {
                    wire::ExecEnd::Exited { exit_code } => Ok(ExecEnd::Exited { exit_code }),
                    wire::ExecEnd::TimedOut => Ok(ExecEnd::TimedOut),
                    wire::ExecEnd::Stopped => Ok(ExecEnd::Stopped),
                    wire::ExecEnd::Refused { why } => Err(DoorError::Refused(why)),
                };
                // Who asked may be gone.
                let _ = answer.send(end.map(|end| ExecEnded { end, output }));
            }
            (FromInit::ExecOutput { id, is_error, bytes }, files) => {
                self.files = files;
                self.tell(id, News::Output { is_error, bytes: bytes.into() })?;
            }
            (FromInit::ExecTaken { id }, files) => {
                self.files = files;
                self.tell(id, News::Room)?;
            }
            (FromInit::PutRoom { bytes }, Some(Files::In(mut putting))) => {
                let room_bytes = putting.room_bytes.saturating_add(bytes as usize);
                putting.room_bytes = room_bytes.min(PUT_WINDOW_BYTES);
                self.files = Some(Files::In(putting));
            }
            (FromInit::Stored { id, files, bytes }, Some(Files::In(putting))) if id == putting.id => {
                let _ = putting.answer.send(Ok(Stored { files, bytes }));
            }
            (FromInit::Refused { id, why }, Some(Files::In(putting))) if id == putting.id => {
                refuse(putting.answer, DoorError::Refused(why));
            }
            (FromInit::Refused { id, why }, Some(Files::Out(taking))) if id == taking.id => {
                refuse(taking.answer, DoorError::Refused(why));
            }
            (FromInit::Taken(taken), Some(Files::Out(taking))) if taken.id == taking.id => {
                let missing = taken.missing.iter().filter_map(|place| taking.paths.get(*place as usize));
                let _ = taking.answer.send(Ok(Taken {
                    files: taken.files,
                    bytes: taken.bytes,
                    missing: missing.cloned().collect(),
                    specials: taken.specials,
                    unreadable: taken.unreadable,
                    unreadable_names: taken.unreadable_names,
                }));
            }
            (FromInit::Taken(_) | FromInit::Refused { .. }, None) if self.is_given_up => {}
            _ => return Err(UNASKED),
        }
        Ok(())
    }
}

async fn next_of_files(files: Option<&mut Files>) -> Move {
    match files {
        Some(Files::Out(taking)) => Move::Room(taking.pieces.reserve().await.is_ok()),
        Some(Files::In(putting)) if putting.rest.is_empty() => Move::Piece(putting.pieces.recv().await),
        Some(Files::In(putting)) => Move::Piece(Some(Piece::Bytes(std::mem::take(&mut putting.rest)))),
        None => std::future::pending().await,
    }
}

impl Errands {
    /// Tells who listens to a program.
    fn tell(&self, id: u32, news: News) -> Result<(), WireError> {
        let program = self.programs.get(&id).ok_or(WireError::Invalid("answer"))?;
        match program.news.as_ref().map(|listener| listener.try_send(news)) {
            // Who listened is gone, and the program is being stopped.
            Some(Ok(()) | Err(TrySendError::Closed(_))) => Ok(()),
            // More than a window.
            Some(Err(TrySendError::Full(_))) | None => Err(WireError::Invalid("answer")),
        }
    }
}

/// Answers with an error; whoever asked may be gone.
pub(super) fn refuse<T>(answer: Answer<T>, error: DoorError) {
    let _ = answer.send(Err(error));
}
