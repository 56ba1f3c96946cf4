//! Ends what runs: with grace, by force, and when it has ended by itself.

use std::time::{Duration, Instant};

use sealci_guest::wire::{Ending, FromInit};

use super::commands::{Boundary, Then};
use super::host::shortened;
use super::{Phase, Supervisor};
use crate::kinfolk;
use crate::machine::Machine;
use crate::run::Run;
use crate::sys;

/// How long KILL may take until what still lives is counted as survivors.
pub(super) const KILL_PATIENCE: Duration = Duration::from_secs(20);

impl Supervisor {
    /// Asks everything to end. A later wish may shorten the grace, never lengthen it.
    pub(super) fn terminate(&mut self, why: Ending, grace: Duration) {
        let now = Instant::now();
        let kill_at = now + grace.min(Duration::from_secs(24 * 3600));
        match self.phase {
            Phase::Waiting => self.finish(why),
            Phase::Staying => self.leave(),
            Phase::Running if self.exit_code.is_none() => {
                self.cut_short = Some(why);
                self.phase = Phase::Terminating { kill_at };
                self.ask_to_end();
            }
            Phase::Terminating { kill_at: before } => {
                self.phase = Phase::Terminating { kill_at: before.min(kill_at) };
            }
            _ => {}
        }
    }

    fn ask_to_end(&mut self) {
        match &self.run {
            // One program knows what of its own to end, and how: what it started hears of it from nobody else.
            Some(Run { pid, script: None, .. }) => {
                sys::kill(*pid, self.stop_signal);
                // What is stopped could not hear it.
                sys::kill(*pid, libc::SIGCONT);
            }
            _ => {
                self.withdraw_commands();
                kinfolk::ask_all_to_end();
            }
        }
    }

    pub(super) fn cut_by_kill(&mut self, why: Ending) {
        match self.phase {
            Phase::Waiting => self.finish(why),
            Phase::Staying => self.leave(),
            Phase::Running if self.exit_code.is_none() => {
                self.cut_short = Some(why);
                self.kill();
            }
            Phase::Running | Phase::Terminating { .. } => self.kill(),
            _ => {}
        }
    }

    fn kill(&mut self) {
        self.beside.expect_death();
        kinfolk::signal_all(libc::SIGKILL);
        self.phase = Phase::Killing { give_up_at: Instant::now() + KILL_PATIENCE };
    }

    /// Tells how it ended, and that nothing lives; stays for the files where that is wanted.
    pub(super) fn finish(&mut self, ending: Ending) {
        let ending = match ending {
            Ending::Error(text) => Ending::Error(shortened(text)),
            other => other,
        };
        let survivors = if self.children_left { kinfolk::count() } else { 0 };
        for ended in self.beside.give_up().collect::<Vec<_>>() {
            self.tell_of(ended);
        }
        if self.machine.as_ref().is_some_and(Machine::ran_out_of_memory) {
            self.push(&FromInit::OutOfMemory);
        }
        // Of what was cancelled, or never ran, nobody wants files.
        let is_wanted = !matches!(ending, Ending::Cancelled | Ending::Expired);
        if self.stays && self.run.is_some() && is_wanted {
            self.push(&FromInit::Ended { ending: ending.clone(), survivors });
            self.ended = Some((ending, survivors));
            self.phase = Phase::Staying;
        } else {
            self.push(&FromInit::Finished { ending, survivors });
            self.phase = Phase::Reporting;
        }
    }

    /// Says again what was said at the end of the commands. Files that are on their way are given up.
    pub(super) fn leave(&mut self) {
        if let Some((ending, survivors)) = self.ended.take() {
            self.carrier = None;
            self.push(&FromInit::Finished { ending, survivors });
            self.phase = Phase::Reporting;
        }
    }

    /// Takes the steps that have become due.
    pub(super) fn advance(&mut self) {
        if self.account.boundary.as_ref().is_some_and(|boundary| boundary.remaining_bytes == 0)
            && let Some(boundary) = self.account.boundary.take()
        {
            self.pass_boundary(boundary.then);
        }
        let now = Instant::now();
        self.advance_files(now);
        self.advance_beside(now);
        match self.phase {
            Phase::Waiting | Phase::Staying | Phase::Reporting => {}
            Phase::Running => {
                if self.exit_code.is_some() {
                    // Its log is drained first: what is left behind shall not write into its command's part.
                    if self.account.boundary.is_none() {
                        self.kill_rest();
                    }
                } else if self.deadline.is_some_and(|deadline| now >= deadline) {
                    self.terminate(Ending::TimedOut, self.grace);
                }
            }
            Phase::Terminating { kill_at } => {
                let is_over = !self.children_left || (self.exit_code.is_some() && self.is_program());
                if is_over || now >= kill_at {
                    self.kill_rest();
                }
            }
            Phase::Killing { give_up_at } => {
                if self.children_left && now < give_up_at {
                    kinfolk::signal_all(libc::SIGKILL);
                } else if self.account.boundary.is_none() {
                    self.drain_to_end();
                }
            }
            Phase::Abandoned { .. } => {
                if self.children_left {
                    kinfolk::signal_all(libc::SIGKILL);
                }
            }
        }
    }

    /// Whose end ends everything that it left.
    fn is_program(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.script.is_none())
    }

    fn kill_rest(&mut self) {
        if self.children_left {
            self.kill();
        } else {
            self.phase = Phase::Killing { give_up_at: Instant::now() };
        }
        if !self.children_left && self.account.boundary.is_none() {
            self.drain_to_end();
        }
    }

    fn drain_to_end(&mut self) {
        if let Err(error) = self.set_boundary(Then::Finish) {
            return self.finish(Ending::Error(format!("cannot read the log's pipe: {error}")));
        }
        if let Some(Boundary { remaining_bytes: 0, then }) =
            self.account.boundary.take_if(|b| b.remaining_bytes == 0)
        {
            self.pass_boundary(then);
        }
    }
}
