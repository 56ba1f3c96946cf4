//! Runs the init's one loop: what comes from the host, from what it runs, and from the kernel, in one thread.
//!
//! ```text
//!             Start            shell ended
//!   Waiting ────────▶ Running ─────────────▶ Killing ──▶ Reporting ──▶ exit
//!    │  ▲ Put            │ cancel, timeout      ▲  │ nothing lives: drain the log, Finished
//!    └──┘                └────▶ Terminating ────┘  │
//!                                 grace over, or   └──▶ Staying ──▶ Reporting
//!                                 nothing lives   Ended   Take*   Leave, Cancel or Kill
//!   any ── channel ends ──▶ Abandoned ── nothing lives ──▶ exit
//! ```
//!
//! Invariants: no step waits but [`sys::poll`]; a boundary in the log (between two commands, or behind the last) is passed
//! only when every byte before it has been taken; a host that does not read stops the log and the archives, not signals
//! and deadlines. What does wait, for disks, is a thread of the [`Carrier`]'s, and the init's exit is its end.

mod commands;
mod ending;
mod files;
mod host;
mod lease;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use commands::Account;
use sealci_guest::wire::{self, Ending, FromInit};

use crate::beside::{Beside, End};
use crate::carrier::Carrier;
use crate::machine::Machine;
use crate::outbox::Outbox;
use crate::run::{Run, Surroundings};
use crate::sys::{self, Reaped, Reaping, Watch};

/// The grace when it is a signal to the init itself that ends the action.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);
/// Between two rounds of KILL, should one child fork while another dies.
const KILL_INTERVAL: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Terminating {
        kill_at: Instant,
    },
    Killing {
        give_up_at: Instant,
    },
    /// `Ended` is told, and files may be taken out.
    Staying,
    /// `Finished` is in the outbox; nothing else is left to do.
    Reporting,
    Abandoned {
        give_up_at: Instant,
    },
}

/// Everything the init knows.
pub struct Supervisor {
    channel: File,
    /// Where the channel is two pipes: the one to the host.
    output: Option<File>,
    signals: File,
    outbox: Outbox,
    inbox: Vec<u8>,
    phase: Phase,
    surroundings: Option<Surroundings>,
    run: Option<Run>,
    /// Of what runs, once it has ended.
    exit_code: Option<i32>,
    account: Account,
    beside: Beside,
    carrier: Option<Carrier>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    /// Rings when the lease ends; none where there is no lease.
    lease: Option<File>,
    grace: Duration,
    stop_signal: i32,
    stays: bool,
    /// The first reason to end it before its time; it becomes the ending.
    cut_short: Option<Ending>,
    /// What `Ended` said, and `Finished` says again.
    ended: Option<(Ending, u32)>,
    children_left: bool,
    /// Where it is in one of ours.
    machine: Option<Machine>,
}

/// On what a watch is.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Channel,
    Output,
    Log,
    Question,
    Lease,
    Carrier,
    /// By its place in [`Beside`].
    Beside(usize, End),
}

impl Supervisor {
    /// `output` is given where `channel` can only be read.
    pub fn new(channel: File, output: Option<File>) -> io::Result<Self> {
        for end in [Some(&channel), output.as_ref()].into_iter().flatten() {
            sys::set_nonblocking(end.as_fd())?;
        }
        let signals =
            sys::signal_file(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT])?;
        Ok(Self {
            channel,
            output,
            signals,
            outbox: Outbox::new(),
            inbox: Vec::new(),
            phase: Phase::Waiting,
            surroundings: None,
            run: None,
            exit_code: None,
            account: Account::default(),
            beside: Beside::default(),
            carrier: None,
            timeout: None,
            deadline: None,
            lease: None,
            grace: DEFAULT_GRACE,
            stop_signal: libc::SIGTERM,
            stays: false,
            cut_short: None,
            ended: None,
            children_left: false,
            machine: None,
        })
    }

    /// Knows that it is in a machine of ours.
    pub fn of(self, machine: Machine) -> Self {
        Self { machine: Some(machine), ..self }
    }

    /// Runs until everything is reported or the host is gone.
    pub fn run(mut self) -> io::Result<ExitCode> {
        self.push(&FromInit::Hello { version: wire::VERSION });
        self.serve()
    }

    /// As [`Supervisor::run`], for a host that was told of it already.
    pub fn serve(mut self) -> io::Result<ExitCode> {
        if let Some(why) = self.machine.as_mut().and_then(Machine::take_trouble) {
            self.finish(Ending::Error(why));
        }
        loop {
            if self.flush_or_abandon() && self.phase == Phase::Reporting && self.outbox.is_empty() {
                return Ok(ExitCode::SUCCESS);
            }
            if let Phase::Abandoned { give_up_at } = self.phase
                && (!self.children_left || Instant::now() >= give_up_at)
            {
                return Ok(ExitCode::FAILURE);
            }
            self.wait_and_handle()?;
            self.advance();
        }
    }

    fn wait_and_handle(&mut self) -> io::Result<()> {
        let (mut watches, sources) = self.watches();
        sys::poll(&mut watches, self.next_wake())?;
        let mut signalled = false;
        for (watch, source) in watches.iter().zip(sources) {
            match source {
                // Last, so that a question asked before the shell ended is answered before its end.
                Source::Signals => signalled = watch.readable(),
                Source::Channel if watch.readable() => self.hear(),
                Source::Log if watch.readable() => self.take_log()?,
                Source::Question if watch.readable() => self.take_question()?,
                Source::Lease if watch.readable() => self.lease_ended(),
                Source::Carrier if watch.readable() || watch.writable() => self.carry(),
                Source::Beside(place, end) if watch.readable() || watch.writable() => {
                    let piece = self.beside.take(place, end);
                    self.tell_piece(piece);
                }
                _ => {}
            }
        }
        if signalled {
            self.take_signals()?;
        }
        Ok(())
    }

    /// What to wait for. `Beside`'s are the last: nothing that is handled before them changes their places.
    fn watches(&self) -> (Vec<Watch>, Vec<Source>) {
        let host_listens = !matches!(self.phase, Phase::Abandoned { .. });
        let takes_more = host_listens && self.outbox.takes_more();
        let questions_wait = host_listens && self.account.boundary.is_none();
        let (mut watches, mut sources) = (Vec::with_capacity(8), Vec::with_capacity(8));
        let mut watch = |source, watch| {
            sources.push(source);
            watches.push(watch);
        };
        watch(Source::Signals, Watch::new(&self.signals, true, false));
        let has_news = host_listens && !self.outbox.is_empty();
        match &self.output {
            None => watch(Source::Channel, Watch::new(&self.channel, host_listens, has_news)),
            Some(output) => {
                watch(Source::Channel, Watch::new(&self.channel, host_listens, false));
                // What there is to write is written at each turn.
                watch(Source::Output, Watch::new(output, false, has_news));
            }
        }
        if let Some(run) = &self.run {
            watch(Source::Log, Watch::new(&run.log, takes_more, false));
            if let Some(script) = &run.script {
                watch(Source::Question, Watch::new(script.question_source(), questions_wait, false));
            }
        }
        if let Some(alarm) = self.lease.as_ref().filter(|_| self.lease_counts()) {
            watch(Source::Lease, Watch::new(alarm, true, false));
        }
        if let Some(carrier) = &self.carrier {
            watch(Source::Carrier, Watch::new(&carrier.stream, takes_more, carrier.has_waiting()));
        }
        for (place, end, file) in self.beside.ends(takes_more) {
            let is_input = matches!(end, End::Input);
            watch(Source::Beside(place, end), Watch::new(file, !is_input, is_input));
        }
        (watches, sources)
    }

    fn next_wake(&self) -> Option<Duration> {
        let at = match self.phase {
            Phase::Waiting | Phase::Staying | Phase::Reporting => None,
            Phase::Running => self.deadline,
            Phase::Terminating { kill_at } => Some(kill_at),
            Phase::Killing { .. } | Phase::Abandoned { .. } => {
                return self.children_left.then_some(KILL_INTERVAL);
            }
        };
        let sign_at = self.carrier.as_ref().map(Carrier::sign_at);
        let at = [at, sign_at, self.beside.next_deadline()].into_iter().flatten().min();
        at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    // ---- the kernel ----

    fn take_signals(&mut self) -> io::Result<()> {
        let mut entries = [0; sys::SIGNAL_ENTRY_BYTES * 8];
        while let Ok(count) = self.signals.read(&mut entries) {
            for entry in entries[..count].chunks_exact(sys::SIGNAL_ENTRY_BYTES) {
                let Some((number, sender)) = sys::read_signal(entry) else { continue };
                // In a PID namespace of its own only the outside may wish for the end, not what runs in it.
                let from_below = std::process::id() == 1 && sender != 0;
                if number != libc::SIGCHLD && !from_below {
                    self.terminate(Ending::Cancelled, self.grace);
                }
            }
        }
        if let Some(ended) = self.reap() {
            self.on_run_end(&ended)?;
        }
        Ok(())
    }

    /// Collects all ended children; returns what runs if it is among them.
    fn reap(&mut self) -> Option<Reaped> {
        let mut ended_run = None;
        loop {
            match sys::reap() {
                Reaping::Child(child) => {
                    let is_run =
                        self.exit_code.is_none() && self.run.as_ref().is_some_and(|run| run.pid == child.pid);
                    if is_run {
                        ended_run = Some(child);
                    } else if !self.beside.reaped(&child) {
                        self.account.meter.add_orphan(&child);
                    }
                }
                Reaping::NoneEnded => {
                    self.children_left = true;
                    return ended_run;
                }
                Reaping::NoChildren => {
                    self.children_left = false;
                    return ended_run;
                }
            }
        }
    }
}
