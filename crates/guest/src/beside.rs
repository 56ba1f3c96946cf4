//! Runs programs beside the commands: readiness checks, and what looks into a running action.
//!
//! Invariants: of its output no more is kept than is told, or than the host has room for; it is killed with its process group at
//! its deadline; what it leaves behind is the action's, and dies with it.

mod flow;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use sealci_guest::wire::{Exec, ExecEnd, WireError};

pub use self::flow::Piece;
use self::flow::{Flow, Read as Found};
use crate::run::Surroundings;
use crate::sys::{self, Reaped};

/// What is told of its output: the last of it.
const TAIL_BYTES: usize = 4 << 10;
/// As many may run at a time.
const MOST: usize = 16;
/// What a shell calls the end by KILL.
const KILLED: i32 = 128 + libc::SIGKILL;
/// So much of one's output is read at a time, for the sake of all else.
const MOST_READS: usize = 16;

/// What is to be told of one that ended.
pub struct Ended {
    pub id: u32,
    pub end: ExecEnd,
    pub output: Vec<u8>,
}

/// The programs that run.
#[derive(Default)]
pub struct Beside(Vec<Program>);

struct Program {
    id: u32,
    pid: i32,
    speech: Speech,
    deadline: Instant,
    /// Why it was killed.
    killed: Option<ExecEnd>,
    /// It has ended, and what it wrote is still passed on.
    exit_code: Option<i32>,
}

/// What becomes of what it says.
enum Speech {
    /// The last of it is told at its end.
    Tail { output: File, is_closed: bool, tail: VecDeque<u8> },
    /// All of it is passed on, and its input, too.
    Flow(Flow),
}

/// On what of a program a watch is.
#[derive(Debug, Clone, Copy)]
pub enum End {
    /// By its place.
    Output(usize),
    Input,
}

impl Beside {
    pub fn start(&mut self, exec: &Exec, surroundings: &Surroundings) -> Result<(), String> {
        if self.0.len() >= MOST {
            return Err(format!("{MOST} programs run beside the action already; wait for one to end"));
        }
        let [program, arguments @ ..] = &exec.program[..] else {
            return Err("there is nothing to run".to_owned());
        };
        let (output, writer) = pipe()?;
        let mut command =
            surroundings.command(program, &writer).map_err(|error| surroundings.explain(program, &error))?;
        command.args(arguments).envs(exec.env.iter().map(|(name, value)| (name, value)));
        let output = File::from(OwnedFd::from(output));
        let speech = if exec.streams {
            Speech::Flow(flow_of(&mut command, output)?)
        } else {
            Speech::Tail { output, is_closed: false, tail: VecDeque::new() }
        };
        let child = command.spawn().map_err(|error| surroundings.explain(program, &error))?;
        // A day is as good as never.
        let timeout = Duration::from_millis(exec.timeout_ms).min(Duration::from_secs(24 * 3600));
        self.0.push(Program {
            id: exec.id,
            pid: i32::try_from(child.id()).unwrap_or(i32::MAX),
            speech,
            deadline: Instant::now() + timeout,
            killed: None,
            exit_code: None,
        });
        Ok(())
    }

    /// What is to be polled for, by a program's place: to be read, or to be written to. `has_room` where what is read can be told.
    pub fn ends(&self, has_room: bool) -> impl Iterator<Item = (usize, End, &File)> {
        self.0.iter().enumerate().flat_map(move |(place, program)| {
            program.ends(has_room).into_iter().map(move |(end, file)| (place, end, file))
        })
    }

    /// Takes what there is; a piece of it where that is to be told.
    pub fn take(&mut self, place: usize, end: End) -> Option<Piece> {
        let program = self.0.get_mut(place)?;
        match (&mut program.speech, end) {
            (Speech::Tail { .. }, _) => {
                program.take_tail();
                None
            }
            (Speech::Flow(flow), End::Input) => {
                flow.pass_on();
                None
            }
            (Speech::Flow(flow), End::Output(output)) => match flow.read(output) {
                Found::Piece { is_error, bytes } => Some(Piece { id: program.id, is_error, bytes }),
                Found::Nothing | Found::End => None,
            },
        }
    }

    /// A piece of input came.
    pub fn receive(&mut self, id: u32, bytes: Vec<u8>) -> Result<(), WireError> {
        match self.flow(id) {
            Some(flow) => flow.receive(bytes),
            // It has ended meanwhile.
            None => Ok(()),
        }
    }

    /// The host has passed on a piece of output.
    pub fn taken(&mut self, id: u32) {
        if let Some(flow) = self.flow(id) {
            flow.taken();
        }
    }

    fn flow(&mut self, id: u32) -> Option<&mut Flow> {
        let program = self.0.iter_mut().find(|program| program.id == id)?;
        match &mut program.speech {
            Speech::Flow(flow) => Some(flow),
            Speech::Tail { .. } => None,
        }
    }

    /// Which programs have passed on a piece of input that this was not told of.
    pub fn passed_on(&mut self) -> Option<u32> {
        self.0.iter_mut().find_map(|program| match &mut program.speech {
            Speech::Flow(flow) => flow.tell_passed_on().then_some(program.id),
            Speech::Tail { .. } => None,
        })
    }

    /// Of those that have ended, the next piece, or the end of one.
    pub fn rest(&mut self) -> Option<Result<Piece, Ended>> {
        for place in 0..self.0.len() {
            let program = &mut self.0[place];
            let Some(exit_code) = program.exit_code else { continue };
            let found = match &mut program.speech {
                Speech::Flow(flow) if program.killed.is_none() => flow.rest(),
                _ => Some(Found::End),
            };
            match found {
                Some(Found::Piece { is_error, bytes }) => {
                    return Some(Ok(Piece { id: program.id, is_error, bytes }));
                }
                Some(Found::Nothing | Found::End) => {
                    return Some(Err(self.0.swap_remove(place).ended(exit_code)));
                }
                // The host has no room for it.
                None => {}
            }
        }
        None
    }

    /// When the next one's time is over.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.0.iter().filter(|program| program.killed.is_none()).map(|program| program.deadline).min()
    }

    pub fn kill_late(&mut self, now: Instant) {
        for program in &mut self.0 {
            if now >= program.deadline {
                program.kill(ExecEnd::TimedOut);
            }
        }
    }

    pub fn stop(&mut self, id: u32) {
        for program in self.0.iter_mut().filter(|program| program.id == id) {
            program.kill(ExecEnd::Stopped);
        }
    }

    /// All are about to be killed with the action.
    pub fn expect_death(&mut self) {
        for program in self.0.iter_mut().filter(|program| program.exit_code.is_none()) {
            program.killed.get_or_insert(ExecEnd::Stopped);
        }
    }

    /// Whether it is one of these that ended; what is to be told of it comes by [`Beside::rest`].
    pub fn reaped(&mut self, child: &Reaped) -> bool {
        let is_it = |program: &&mut Program| program.pid == child.pid && program.exit_code.is_none();
        let Some(program) = self.0.iter_mut().find(is_it) else { return false };
        program.exit_code = Some(child.exit_code);
        true
    }

    /// Forgets those that not even KILL has ended, and what nobody has taken of the others.
    pub fn give_up(&mut self) -> impl Iterator<Item = Ended> {
        self.expect_death();
        std::mem::take(&mut self.0).into_iter().map(|program| {
            let exit_code = program.exit_code.unwrap_or(KILLED);
            program.ended(exit_code)
        })
    }
}

impl Program {
    fn ends(&self, has_room: bool) -> Vec<(End, &File)> {
        if self.exit_code.is_some() {
            return Vec::new();
        }
        match &self.speech {
            Speech::Tail { is_closed: true, .. } => Vec::new(),
            Speech::Tail { output, .. } => vec![(End::Output(0), output)],
            Speech::Flow(flow) => {
                let outputs = flow.open_outputs().map(|(place, file)| (End::Output(place), file));
                let outputs = outputs.filter(|_| has_room);
                outputs.chain(flow.input().map(|file| (End::Input, file))).collect()
            }
        }
    }

    fn take_tail(&mut self) {
        let Speech::Tail { output, is_closed, tail } = &mut self.speech else { return };
        let mut buffer = [0; 8 << 10];
        for _ in 0..MOST_READS {
            match output.read(&mut buffer) {
                Ok(0) => {
                    *is_closed = true;
                    return;
                }
                Ok(count) => {
                    tail.extend(&buffer[..count]);
                    let excess = tail.len().saturating_sub(TAIL_BYTES);
                    tail.drain(..excess);
                }
                // Else the next poll tells.
                Err(_) => return,
            }
        }
    }

    fn kill(&mut self, why: ExecEnd) {
        if self.killed.is_none() {
            self.killed = Some(why);
            // Of one that has ended the number may be another's.
            if self.exit_code.is_none() {
                sys::kill(-self.pid, libc::SIGKILL);
            }
        }
    }

    fn ended(mut self, exit_code: i32) -> Ended {
        self.take_tail();
        let end = match self.killed {
            // Else it ended by itself, a moment before it would have been killed.
            Some(why) if exit_code == KILLED => why,
            _ => ExecEnd::Exited { exit_code },
        };
        let output = match self.speech {
            Speech::Tail { tail, .. } => tail.into(),
            Speech::Flow(_) => Vec::new(),
        };
        Ended { id: self.id, end, output }
    }
}

/// Its input and outputs apart, each a pipe.
fn flow_of(command: &mut Command, output: File) -> Result<Flow, String> {
    let (errors, error_writer) = pipe()?;
    let (reader, input) = io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
    sys::set_nonblocking(input.as_fd()).map_err(|error| format!("cannot set up a pipe: {error}"))?;
    command.stdin(reader).stderr(error_writer);
    Ok(Flow::new(File::from(OwnedFd::from(input)), [output, File::from(OwnedFd::from(errors))]))
}

/// The end that is read does not wait.
fn pipe() -> Result<(io::PipeReader, io::PipeWriter), String> {
    let (output, writer) = io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
    sys::set_nonblocking(output.as_fd()).map_err(|error| format!("cannot set up a pipe: {error}"))?;
    Ok((output, writer))
}
