//! Keeps the account of the commands: which one runs, what it wrote, and what it took.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use sealci_guest::wire::{Ending, FromInit, Usage};

use super::{Phase, Supervisor};
use crate::meter::Meter;
use crate::script::Script;
use crate::sys::{self, Reaped};

/// How far the commands have come.
pub(super) struct Account {
    pub meter: Meter,
    pub boundary: Option<Boundary>,
    log_offset: u64,
    current: Option<Current>,
    next_command: usize,
}

/// A place in the log that is not passed before the bytes in front of it.
pub(super) struct Boundary {
    pub remaining_bytes: usize,
    pub then: Then,
}

pub(super) enum Then {
    /// The shell waits for the next command.
    NextCommand(Option<Done>),
    /// What ran is gone.
    RunEnded(Option<Done>),
    Finish,
}

/// What is known of a command when it ends.
pub(super) struct Done {
    index: u32,
    exit_code: i32,
    duration: Duration,
    usage: Usage,
}

struct Current {
    index: u32,
    started_at: Instant,
}

impl Default for Account {
    fn default() -> Self {
        Self { meter: Meter::new(0), boundary: None, log_offset: 0, current: None, next_command: 0 }
    }
}

impl Supervisor {
    pub(super) fn take_log(&mut self) -> io::Result<()> {
        let Some(run) = &self.run else { return Ok(()) };
        if !self.outbox.takes_more() {
            return Ok(());
        }
        let limit = self.account.boundary.as_ref().map_or(usize::MAX, |boundary| boundary.remaining_bytes);
        if limit == 0 {
            return Ok(());
        }
        let count = self.outbox.take_log(&run.log, limit)?;
        self.account.log_offset += count as u64;
        if let Some(boundary) = &mut self.account.boundary {
            boundary.remaining_bytes -= count;
        }
        Ok(())
    }

    pub(super) fn take_question(&mut self) -> io::Result<()> {
        if self.account.boundary.is_some() {
            return Ok(());
        }
        let Some(exit_code) = self.script().and_then(Script::take_question) else { return Ok(()) };
        let done = self.account.current.take().map(|current| Done {
            index: current.index,
            exit_code,
            duration: current.started_at.elapsed(),
            usage: self.account.meter.sample(),
        });
        self.set_boundary(Then::NextCommand(done))
    }

    pub(super) fn set_boundary(&mut self, then: Then) -> io::Result<()> {
        let remaining_bytes = match &self.run {
            Some(run) => sys::bytes_readable(run.log.as_fd())?,
            None => 0,
        };
        self.account.boundary = Some(Boundary { remaining_bytes, then });
        Ok(())
    }

    pub(super) fn pass_boundary(&mut self, then: Then) {
        match then {
            Then::NextCommand(done) => {
                self.report(done);
                // Else an exit stands in the next one's place.
                if self.phase == Phase::Running {
                    self.begin_next();
                }
                if let Some(script) = self.script() {
                    script.answer();
                }
            }
            Then::RunEnded(done) => self.report(done),
            Then::Finish => {
                let ending = self.cut_short.take().unwrap_or(match self.exit_code {
                    Some(0) => Ending::Succeeded,
                    Some(exit_code) => Ending::Failed { exit_code },
                    None => Ending::Error("what runs could not be waited for".to_owned()),
                });
                self.finish(ending);
            }
        }
    }

    fn report(&mut self, done: Option<Done>) {
        let Some(done) = done else { return };
        self.push(&FromInit::CommandFinished {
            index: done.index,
            exit_code: done.exit_code,
            duration_us: u64::try_from(done.duration.as_micros()).unwrap_or(u64::MAX),
            log_offset: self.account.log_offset,
            usage: done.usage,
        });
    }

    fn script(&mut self) -> Option<&mut Script> {
        self.run.as_mut().and_then(|run| run.script.as_mut())
    }

    fn begin_next(&mut self) {
        let index = self.account.next_command;
        let Some(script) = self.script().filter(|script| index < script.command_count()) else { return };
        if let Err(error) = script.write_command(index) {
            return self.cut_by_kill(Ending::Error(error.to_string()));
        }
        self.tell_begin(index);
    }

    /// One program is one command, which has begun.
    pub(super) fn begin_program(&mut self) {
        self.tell_begin(0);
    }

    fn tell_begin(&mut self, index: usize) {
        let now = Instant::now();
        if index == 0 {
            self.deadline = self.timeout.and_then(|timeout| now.checked_add(timeout));
        }
        self.account.next_command = index + 1;
        // At most 16,384 commands pass the wire.
        let index = index as u32;
        self.account.current = Some(Current { index, started_at: now });
        self.push(&FromInit::CommandStarted { index, log_offset: self.account.log_offset });
    }

    /// No further command shall run, but what the shell has set for its exit shall; also where a handler of TERM breaks off
    /// the wait for the next command. The one before may be let go and not read yet.
    pub(super) fn withdraw_commands(&mut self) {
        let current = self.account.current.as_ref().map(|current| current.index as usize);
        let next = self.account.next_command;
        let Some(script) = self.script() else { return };
        for index in current.into_iter().chain([next]) {
            if let Err(error) = script.write_exit(index) {
                // The grace ends it then.
                eprintln!("sealci-init: {error}");
            }
        }
    }

    pub(super) fn on_run_end(&mut self, run: &Reaped) -> io::Result<()> {
        // A question that came with the shell's last breath.
        if self.account.boundary.is_none() {
            self.take_question()?;
        }
        if let Some(Boundary { then: Then::NextCommand(done), .. }) = self.account.boundary.take() {
            // The shell died while it waited for the answer; the command before was over.
            self.account.current = None;
            self.exit_code = Some(run.exit_code);
            return self.set_boundary(Then::RunEnded(done));
        }
        self.exit_code = Some(run.exit_code);
        let usage = self.account.meter.last(run);
        let done = self.account.current.take().map(|current| Done {
            index: current.index,
            exit_code: run.exit_code,
            duration: current.started_at.elapsed(),
            usage,
        });
        self.set_boundary(Then::RunEnded(done))
    }
}
