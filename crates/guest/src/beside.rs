//! Runs programs beside the commands: readiness checks, and what looks into a running action.
//!
//! Invariants: of its output no more is kept than is told; it is killed with its process group at its deadline; what it
//! leaves behind is the action's, and dies with it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use sealci_guest::wire::{Exec, ExecEnd};

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
    output: File,
    /// It no longer has an end that can be written to.
    is_closed: bool,
    tail: VecDeque<u8>,
    deadline: Instant,
    /// Why it was killed.
    killed: Option<ExecEnd>,
}

impl Beside {
    pub fn start(&mut self, exec: &Exec, surroundings: &Surroundings) -> Result<(), String> {
        if self.0.len() >= MOST {
            return Err(format!("{MOST} programs run beside the action already; wait for one to end"));
        }
        let [program, arguments @ ..] = &exec.program[..] else {
            return Err("there is nothing to run".to_owned());
        };
        let (output, writer) = io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?;
        sys::set_nonblocking(output.as_fd()).map_err(|error| format!("cannot set up a pipe: {error}"))?;
        let child = surroundings
            .command(program, &writer)
            .and_then(|mut command| {
                command.args(arguments).envs(exec.env.iter().map(|(name, value)| (name, value))).spawn()
            })
            .map_err(|error| surroundings.explain(program, &error))?;
        // A day is as good as never.
        let timeout = Duration::from_millis(exec.timeout_ms).min(Duration::from_secs(24 * 3600));
        self.0.push(Program {
            id: exec.id,
            pid: i32::try_from(child.id()).unwrap_or(i32::MAX),
            output: File::from(OwnedFd::from(output)),
            is_closed: false,
            tail: VecDeque::new(),
            deadline: Instant::now() + timeout,
            killed: None,
        });
        Ok(())
    }

    /// Whose output is to be polled for, by its place.
    pub fn outputs(&self) -> impl Iterator<Item = (usize, &File)> {
        self.0
            .iter()
            .enumerate()
            .filter(|(_, program)| !program.is_closed)
            .map(|(place, p)| (place, &p.output))
    }

    pub fn take_output(&mut self, place: usize) {
        if let Some(program) = self.0.get_mut(place) {
            program.take_output();
        }
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
        for program in &mut self.0 {
            program.killed.get_or_insert(ExecEnd::Stopped);
        }
    }

    /// What is to be told if it is one of these that ended.
    pub fn reaped(&mut self, child: &Reaped) -> Option<Ended> {
        let place = self.0.iter().position(|program| program.pid == child.pid)?;
        Some(self.0.swap_remove(place).ended(child.exit_code))
    }

    /// Forgets those that not even KILL has ended.
    pub fn give_up(&mut self) -> impl Iterator<Item = Ended> {
        self.expect_death();
        std::mem::take(&mut self.0).into_iter().map(|program| program.ended(KILLED))
    }
}

impl Program {
    fn take_output(&mut self) {
        let mut buffer = [0; 8 << 10];
        for _ in 0..MOST_READS {
            match self.output.read(&mut buffer) {
                Ok(0) => {
                    self.is_closed = true;
                    return;
                }
                Ok(count) => {
                    self.tail.extend(&buffer[..count]);
                    let excess = self.tail.len().saturating_sub(TAIL_BYTES);
                    self.tail.drain(..excess);
                }
                // Else the next poll tells.
                Err(_) => return,
            }
        }
    }

    fn kill(&mut self, why: ExecEnd) {
        if self.killed.is_none() {
            self.killed = Some(why);
            sys::kill(-self.pid, libc::SIGKILL);
        }
    }

    fn ended(mut self, exit_code: i32) -> Ended {
        self.take_output();
        let end = match self.killed {
            // Else it ended by itself, a moment before it would have been killed.
            Some(why) if exit_code == KILLED => why,
            _ => ExecEnd::Exited { exit_code },
        };
        Ended { id: self.id, end, output: self.tail.into() }
    }
}
