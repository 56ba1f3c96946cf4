//! Hears the host, and does what it says.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use sealci_guest::wire::{
    self, Ending, ExecEnd, FromInit, HEADER_BYTES, Header, PUT_DATA_KIND, ToInit, WireError,
};

use super::ending::KILL_PATIENCE;
use super::{Phase, Supervisor};
use crate::beside::{Ended, Piece};
use crate::meter::Meter;
use crate::run::{Run, Surroundings};
use crate::sys;

/// What the host gets to see of an error at most.
const LONGEST_ERROR_BYTES: usize = 4096;

/// Cuts what is told to a person.
pub(super) fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(LONGEST_ERROR_BYTES));
    text
}

impl Supervisor {
    pub(super) fn push(&mut self, message: &FromInit<'_>) {
        if let Err(error) = self.outbox.push(message) {
            // All texts are cut to size, and so are lists.
            eprintln!("sealci-init: {error}");
        }
    }

    /// Whether the channel still works.
    pub(super) fn flush_or_abandon(&mut self) -> bool {
        if matches!(self.phase, Phase::Abandoned { .. }) {
            return false;
        }
        match self.outbox.flush(self.output.as_ref().unwrap_or(&self.channel)) {
            Ok(()) => true,
            Err(_) => {
                self.abandon();
                false
            }
        }
    }

    pub(super) fn hear(&mut self) {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.channel.read(&mut buffer) {
                Ok(0) => return self.abandon(),
                Ok(count) => self.inbox.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.abandon(),
            }
            if let Err(error) = self.obey() {
                eprintln!("sealci-init: the host sent what is not understood: {error}");
                return self.abandon();
            }
        }
    }

    fn obey(&mut self) -> Result<(), WireError> {
        let inbox = std::mem::take(&mut self.inbox);
        let mut rest = &inbox[..];
        while let Some((head, behind)) = rest.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::parse(*head, wire::MAX_TO_INIT_BYTES)?;
            let Some((payload, next)) = behind.split_at_checked(header.payload_bytes) else { break };
            rest = next;
            if header.kind == PUT_DATA_KIND {
                self.receive(payload)?;
            } else {
                self.do_as_said(ToInit::decode(header.kind, payload)?)?;
            }
        }
        // What is left is a piece of a frame; its memory is kept while there is more to come.
        let done = inbox.len() - rest.len();
        self.inbox = inbox;
        self.inbox.drain(..done);
        Ok(())
    }

    fn do_as_said(&mut self, message: ToInit) -> Result<(), WireError> {
        // An environment of a machine that could not be made ready has said so, whatever was on its way.
        if self.machine.is_some() && self.phase == Phase::Reporting {
            return Ok(());
        }
        match message {
            ToInit::Hello { version: wire::VERSION } => {}
            ToInit::Hello { version } => self.cut_by_kill(Ending::Error(wire::unlike(version))),
            ToInit::Wake(_) => {
                return Err(WireError::Invalid("Wake, which is for a machine and before all else,"));
            }
            ToInit::Start(start) => {
                if self.phase != Phase::Waiting || self.carrier.is_some() {
                    return Err(WireError::Invalid("Start, which comes once and after all files,"));
                }
                self.start(start);
            }
            ToInit::Signal { number } => {
                if let Some(run) = self.run.as_ref().filter(|_| self.exit_code.is_none()) {
                    sys::kill(-run.pid, i32::from(number));
                }
            }
            ToInit::Cancel { grace_ms } => {
                self.terminate(Ending::Cancelled, Duration::from_millis(grace_ms));
            }
            ToInit::Kill => self.cut_by_kill(Ending::Cancelled),
            ToInit::Lease(lease) => self.renew(lease),
            ToInit::Put(put) => self.put(put),
            ToInit::PutEnd => self.end_put()?,
            ToInit::Take(take) => self.take(take),
            ToInit::Exec(exec) => self.exec(&exec),
            ToInit::ExecInput { id, bytes } => self.beside.receive(id, bytes)?,
            ToInit::ExecTaken { id } => self.beside.taken(id),
            ToInit::Stop { id } => {
                self.beside.stop(id);
                if let Some(carrier) = self.carrier.as_mut().filter(|carrier| carrier.id == id) {
                    carrier.stop();
                }
            }
            ToInit::Leave => self.leave(),
        }
        Ok(())
    }

    fn start(&mut self, mut start: wire::Start) {
        self.timeout = start.timeout_ms.map(Duration::from_millis);
        self.grace = Duration::from_millis(start.grace_ms);
        self.stop_signal = i32::from(start.stop_signal);
        self.stays = start.stays;
        self.push(&FromInit::Ready);
        let is_program = !start.program.is_empty();
        let surroundings = Surroundings::of(&mut start);
        match Run::start(start, &surroundings) {
            Ok(run) => {
                self.account.meter = Meter::new(run.pid);
                self.run = Some(run);
                self.surroundings = Some(surroundings);
                self.children_left = true;
                self.phase = Phase::Running;
                if is_program {
                    self.begin_program();
                }
            }
            Err(why) => self.finish(Ending::Error(why)),
        }
    }

    fn exec(&mut self, exec: &wire::Exec) {
        let started = match (&self.surroundings, self.phase) {
            (Some(surroundings), Phase::Running) if self.exit_code.is_none() => {
                self.beside.start(exec, surroundings)
            }
            _ => Err("the action is not running".to_owned()),
        };
        if let Err(why) = started {
            let end = ExecEnd::Refused { why: shortened(why) };
            self.tell_of(Ended { id: exec.id, end, output: Vec::new() });
        }
    }

    pub(super) fn tell_piece(&mut self, piece: Option<Piece>) {
        if let Some(Piece { id, is_error, bytes }) = piece {
            self.push(&FromInit::ExecOutput { id, is_error, bytes });
        }
    }

    /// Tells what has become of programs beside the commands, as far as there is room.
    pub(super) fn advance_beside(&mut self, now: Instant) {
        self.beside.kill_late(now);
        while let Some(id) = self.beside.passed_on() {
            self.push(&FromInit::ExecTaken { id });
        }
        while self.outbox.takes_more()
            && let Some(told) = self.beside.rest()
        {
            match told {
                Ok(piece) => self.tell_piece(Some(piece)),
                Err(ended) => self.tell_of(ended),
            }
        }
    }

    pub(super) fn tell_of(&mut self, ended: Ended) {
        let Ended { id, end, output } = ended;
        self.push(&FromInit::ExecEnded { id, end, output });
    }

    /// The host is gone: nobody is left to tell.
    pub(super) fn abandon(&mut self) {
        if !matches!(self.phase, Phase::Abandoned { .. }) {
            self.phase = Phase::Abandoned { give_up_at: Instant::now() + KILL_PATIENCE };
            self.account.boundary = None;
            self.carrier = None;
            self.reap();
        }
    }
}
