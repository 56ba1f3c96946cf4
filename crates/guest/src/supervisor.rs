//! Runs the init's one loop: what comes from the host, from the shell, and from the kernel, in one thread.
//!
//! ```text
//!             Start            shell ended
//!   Waiting ────────▶ Running ─────────────▶ Killing ──▶ Reporting ──▶ exit
//!                        │ cancel, timeout      ▲ nothing lives: drain the log, Finished
//!                        └────▶ Terminating ────┘
//!                                 grace over, or nothing lives
//!   any ── channel ends ──▶ Abandoned ── nothing lives ──▶ exit
//! ```
//!
//! Invariants: no step waits but [`sys::poll`]; a boundary in the log (between two commands, or behind the last) is passed
//! only when every byte before it has been taken; a host that does not read stops the log, not signals and deadlines.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use sealci_guest::wire::{self, Ending, FromInit, HEADER_BYTES, Header, ToInit, Usage};

use crate::kinfolk;
use crate::meter::Meter;
use crate::outbox::Outbox;
use crate::shell::Shell;
use crate::sys::{self, Reaped, Reaping, Watch};

/// What the host gets to see of an error at most.
const LONGEST_ERROR_BYTES: usize = 4096;
/// The grace when it is a signal to the init itself that ends the action.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);
/// How long KILL may take until what still lives is counted as survivors.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
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
    /// `Finished` is in the outbox; nothing else is left to do.
    Reporting,
    Abandoned {
        give_up_at: Instant,
    },
}

/// A place in the log that is not passed before the bytes in front of it.
struct Boundary {
    remaining_bytes: usize,
    then: Then,
}

enum Then {
    /// The shell waits for the next command.
    NextCommand(Option<Done>),
    /// The shell is gone.
    ShellEnded(Option<Done>),
    Finish,
}

/// What is known of a command when it ends.
struct Done {
    index: u32,
    exit_code: i32,
    duration: Duration,
    usage: Usage,
}

struct Current {
    index: u32,
    started_at: Instant,
}

/// Everything the init knows.
pub struct Supervisor {
    channel: File,
    signals: File,
    outbox: Outbox,
    inbox: Vec<u8>,
    phase: Phase,
    shell: Option<Shell>,
    meter: Meter,
    boundary: Option<Boundary>,
    log_offset: u64,
    current: Option<Current>,
    next_command: usize,
    shell_exit_code: Option<i32>,
    timeout: Option<Duration>,
    deadline: Option<Instant>,
    grace: Duration,
    /// The first reason to end it before its time; it becomes the ending.
    cut_short: Option<Ending>,
    children_left: bool,
}

impl Supervisor {
    pub fn new(channel: File) -> io::Result<Self> {
        sys::set_nonblocking(channel.as_fd())?;
        let signals =
            sys::signal_file(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT])?;
        Ok(Self {
            channel,
            signals,
            outbox: Outbox::new(),
            inbox: Vec::new(),
            phase: Phase::Waiting,
            shell: None,
            meter: Meter::new(0),
            boundary: None,
            log_offset: 0,
            current: None,
            next_command: 0,
            shell_exit_code: None,
            timeout: None,
            deadline: None,
            grace: DEFAULT_GRACE,
            cut_short: None,
            children_left: false,
        })
    }

    /// Runs until everything is reported or the host is gone.
    pub fn run(mut self) -> io::Result<ExitCode> {
        self.push(&FromInit::Hello { version: wire::VERSION });
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
        let host_listens = !matches!(self.phase, Phase::Abandoned { .. });
        let log_flows = host_listens && self.outbox.takes_log();
        let questions_wait = host_listens && self.boundary.is_none();
        let mut watches = [
            Watch::new(&self.signals, true, false),
            Watch::new(&self.channel, host_listens, host_listens && !self.outbox.is_empty()),
            match &self.shell {
                Some(shell) => Watch::new(&shell.log, log_flows, false),
                None => Watch::new(&self.signals, false, false),
            },
            match &self.shell {
                Some(shell) => Watch::new(shell.question_source(), questions_wait, false),
                None => Watch::new(&self.signals, false, false),
            },
        ];
        sys::poll(&mut watches, self.next_wake())?;
        let [signals, channel, log, question] = watches.map(|watch| watch.readable());
        if channel {
            self.hear();
        }
        if log {
            self.take_log()?;
        }
        if question {
            self.take_question()?;
        }
        // Last, so that a question asked before the shell ended is answered before its end.
        if signals {
            self.take_signals()?;
        }
        Ok(())
    }

    fn next_wake(&self) -> Option<Duration> {
        let at = match self.phase {
            Phase::Waiting | Phase::Reporting => None,
            Phase::Running => self.deadline,
            Phase::Terminating { kill_at } => Some(kill_at),
            Phase::Killing { .. } | Phase::Abandoned { .. } => {
                return self.children_left.then_some(KILL_INTERVAL);
            }
        };
        at.map(|at| at.saturating_duration_since(Instant::now()))
    }

    // ---- the host ----

    fn push(&mut self, message: &FromInit<'_>) {
        if let Err(error) = self.outbox.push(message) {
            // Only `Finished` has a text, and it is cut to size.
            eprintln!("sealci-init: {error}");
        }
    }

    /// Whether the channel still works.
    fn flush_or_abandon(&mut self) -> bool {
        if matches!(self.phase, Phase::Abandoned { .. }) {
            return false;
        }
        match self.outbox.flush(&self.channel) {
            Ok(()) => true,
            Err(_) => {
                self.abandon();
                false
            }
        }
    }

    fn hear(&mut self) {
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

    fn obey(&mut self) -> Result<(), wire::WireError> {
        while let Some((head, _)) = self.inbox.split_first_chunk::<HEADER_BYTES>() {
            let header = Header::parse(*head, wire::MAX_TO_INIT_BYTES)?;
            let end = HEADER_BYTES + header.payload_bytes;
            let Some(payload) = self.inbox.get(HEADER_BYTES..end) else { break };
            let message = ToInit::decode(header.kind, payload)?;
            self.inbox.drain(..end);
            match message {
                ToInit::Hello { version: wire::VERSION } => {}
                ToInit::Hello { version } => self.cut_by_kill(Ending::Error(format!(
                    "the agent speaks version {version} of the protocol, this sealci-init version {}",
                    wire::VERSION
                ))),
                ToInit::Start(start) if self.phase == Phase::Waiting => self.start(start),
                ToInit::Start(_) => return Err(wire::WireError::Invalid("second Start")),
                ToInit::Signal { number } => {
                    if let Some(shell) = self.shell.as_ref().filter(|_| self.shell_exit_code.is_none()) {
                        sys::kill(-shell.pid, i32::from(number));
                    }
                }
                ToInit::Cancel { grace_ms } => {
                    self.terminate(Ending::Cancelled, Duration::from_millis(grace_ms));
                }
                ToInit::Kill => self.cut_by_kill(Ending::Cancelled),
            }
        }
        Ok(())
    }

    fn start(&mut self, start: wire::Start) {
        self.timeout = start.timeout_ms.map(Duration::from_millis);
        self.grace = Duration::from_millis(start.grace_ms);
        self.push(&FromInit::Ready);
        match Shell::start(start) {
            Ok(shell) => {
                self.meter = Meter::new(shell.pid);
                self.shell = Some(shell);
                self.children_left = true;
                self.phase = Phase::Running;
            }
            Err(error) => self.finish_at_once(Ending::Error(error.to_string())),
        }
    }

    /// The host is gone: nobody is left to tell.
    fn abandon(&mut self) {
        if !matches!(self.phase, Phase::Abandoned { .. }) {
            self.phase = Phase::Abandoned { give_up_at: Instant::now() + KILL_PATIENCE };
            self.boundary = None;
            self.reap();
        }
    }

    // ---- the shell ----

    fn take_log(&mut self) -> io::Result<()> {
        let Some(shell) = &self.shell else { return Ok(()) };
        if !self.outbox.takes_log() {
            return Ok(());
        }
        let limit = self.boundary.as_ref().map_or(usize::MAX, |boundary| boundary.remaining_bytes);
        if limit == 0 {
            return Ok(());
        }
        let count = self.outbox.take_log(&shell.log, limit)?;
        self.log_offset += count as u64;
        if let Some(boundary) = &mut self.boundary {
            boundary.remaining_bytes -= count;
        }
        Ok(())
    }

    fn take_question(&mut self) -> io::Result<()> {
        if self.boundary.is_some() {
            return Ok(());
        }
        let Some(exit_code) = self.shell.as_mut().and_then(Shell::take_question) else { return Ok(()) };
        let done = self.current.take().map(|current| Done {
            index: current.index,
            exit_code,
            duration: current.started_at.elapsed(),
            usage: self.meter.sample(),
        });
        self.set_boundary(Then::NextCommand(done))
    }

    fn set_boundary(&mut self, then: Then) -> io::Result<()> {
        let remaining_bytes = match &self.shell {
            Some(shell) => sys::bytes_readable(shell.log.as_fd())?,
            None => 0,
        };
        self.boundary = Some(Boundary { remaining_bytes, then });
        Ok(())
    }

    fn pass_boundary(&mut self, then: Then) {
        match then {
            Then::NextCommand(done) => {
                self.report(done);
                // Else an exit stands in the next one's place.
                if self.phase == Phase::Running {
                    self.begin_next();
                }
                if let Some(shell) = &mut self.shell {
                    shell.answer();
                }
            }
            Then::ShellEnded(done) => self.report(done),
            Then::Finish => {
                let ending = self.cut_short.take().unwrap_or(match self.shell_exit_code {
                    Some(0) => Ending::Succeeded,
                    Some(exit_code) => Ending::Failed { exit_code },
                    None => Ending::Error("the shell could not be waited for".to_owned()),
                });
                self.finish_at_once(ending);
            }
        }
    }

    fn report(&mut self, done: Option<Done>) {
        let Some(done) = done else { return };
        self.push(&FromInit::CommandFinished {
            index: done.index,
            exit_code: done.exit_code,
            duration_us: u64::try_from(done.duration.as_micros()).unwrap_or(u64::MAX),
            log_offset: self.log_offset,
            usage: done.usage,
        });
    }

    fn begin_next(&mut self) {
        let Some(shell) = &mut self.shell else { return };
        let index = self.next_command;
        if index >= shell.command_count() {
            return;
        }
        if let Err(error) = shell.write_command(index) {
            return self.cut_by_kill(Ending::Error(error.to_string()));
        }
        let now = Instant::now();
        if index == 0 {
            self.deadline = self.timeout.and_then(|timeout| now.checked_add(timeout));
        }
        self.next_command += 1;
        // At most 16,384 commands pass the wire.
        let index = index as u32;
        self.current = Some(Current { index, started_at: now });
        self.push(&FromInit::CommandStarted { index, log_offset: self.log_offset });
    }

    /// No further command shall run, but what the shell has set for its exit shall; also where a handler of TERM breaks off
    /// the wait for the next command. The one before may be let go and not read yet.
    fn withdraw_commands(&mut self) {
        let Some(shell) = &mut self.shell else { return };
        let current = self.current.as_ref().map(|current| current.index as usize);
        for index in current.into_iter().chain([self.next_command]) {
            if let Err(error) = shell.write_exit(index) {
                // The grace ends it then.
                eprintln!("sealci-init: {error}");
            }
        }
    }

    fn on_shell_end(&mut self, shell: &Reaped) -> io::Result<()> {
        // A question that came with the shell's last breath.
        if self.boundary.is_none() {
            self.take_question()?;
        }
        if let Some(Boundary { then: Then::NextCommand(done), .. }) = self.boundary.take() {
            // The shell died while it waited for the answer; the command before was over.
            self.current = None;
            self.shell_exit_code = Some(shell.exit_code);
            return self.set_boundary(Then::ShellEnded(done));
        }
        self.shell_exit_code = Some(shell.exit_code);
        let usage = self.meter.last(shell);
        let done = self.current.take().map(|current| Done {
            index: current.index,
            exit_code: shell.exit_code,
            duration: current.started_at.elapsed(),
            usage,
        });
        self.set_boundary(Then::ShellEnded(done))
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
        if let Some(shell) = self.reap() {
            self.on_shell_end(&shell)?;
        }
        Ok(())
    }

    /// Collects all ended children; returns the shell if it is among them.
    fn reap(&mut self) -> Option<Reaped> {
        let mut ended_shell = None;
        loop {
            match sys::reap() {
                Reaping::Child(child) => {
                    let is_shell = self.shell_exit_code.is_none()
                        && self.shell.as_ref().is_some_and(|shell| shell.pid == child.pid);
                    if is_shell {
                        ended_shell = Some(child);
                    } else {
                        self.meter.add_orphan(&child);
                    }
                }
                Reaping::NoneEnded => {
                    self.children_left = true;
                    return ended_shell;
                }
                Reaping::NoChildren => {
                    self.children_left = false;
                    return ended_shell;
                }
            }
        }
    }

    // ---- ending ----

    /// Asks everything to end. A later wish may shorten the grace, never lengthen it.
    fn terminate(&mut self, why: Ending, grace: Duration) {
        let now = Instant::now();
        let kill_at = now + grace.min(Duration::from_secs(24 * 3600));
        match self.phase {
            Phase::Waiting => self.finish_at_once(why),
            Phase::Running if self.shell_exit_code.is_none() => {
                self.cut_short = Some(why);
                self.phase = Phase::Terminating { kill_at };
                self.withdraw_commands();
                kinfolk::ask_all_to_end();
            }
            Phase::Terminating { kill_at: before } => {
                self.phase = Phase::Terminating { kill_at: before.min(kill_at) };
            }
            _ => {}
        }
    }

    fn cut_by_kill(&mut self, why: Ending) {
        match self.phase {
            Phase::Waiting => self.finish_at_once(why),
            Phase::Running if self.shell_exit_code.is_none() => {
                self.cut_short = Some(why);
                self.kill();
            }
            Phase::Running | Phase::Terminating { .. } => self.kill(),
            _ => {}
        }
    }

    fn kill(&mut self) {
        kinfolk::signal_all(libc::SIGKILL);
        self.phase = Phase::Killing { give_up_at: Instant::now() + KILL_PATIENCE };
    }

    fn finish_at_once(&mut self, ending: Ending) {
        let ending = match ending {
            Ending::Error(mut text) => {
                text.truncate(text.floor_char_boundary(LONGEST_ERROR_BYTES));
                Ending::Error(text)
            }
            other => other,
        };
        let survivors = if self.children_left { kinfolk::count() } else { 0 };
        self.push(&FromInit::Finished { ending, survivors });
        self.phase = Phase::Reporting;
    }

    /// Takes the steps that have become due.
    fn advance(&mut self) {
        if self.boundary.as_ref().is_some_and(|boundary| boundary.remaining_bytes == 0)
            && let Some(boundary) = self.boundary.take()
        {
            self.pass_boundary(boundary.then);
        }
        let now = Instant::now();
        match self.phase {
            Phase::Waiting | Phase::Reporting => {}
            Phase::Running => {
                if self.shell_exit_code.is_some() {
                    // Its log is drained first: what is left behind shall not write into its command's part.
                    if self.boundary.is_none() {
                        self.kill_rest();
                    }
                } else if self.deadline.is_some_and(|deadline| now >= deadline) {
                    self.terminate(Ending::TimedOut, self.grace);
                }
            }
            Phase::Terminating { kill_at } => {
                if !self.children_left || now >= kill_at {
                    self.kill_rest();
                }
            }
            Phase::Killing { give_up_at } => {
                if self.children_left && now < give_up_at {
                    kinfolk::signal_all(libc::SIGKILL);
                } else if self.boundary.is_none() {
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

    fn kill_rest(&mut self) {
        if self.children_left {
            self.kill();
        } else {
            self.phase = Phase::Killing { give_up_at: Instant::now() };
        }
        if !self.children_left && self.boundary.is_none() {
            self.drain_to_end();
        }
    }

    fn drain_to_end(&mut self) {
        if let Err(error) = self.set_boundary(Then::Finish) {
            return self.finish_at_once(Ending::Error(format!("cannot read the log's pipe: {error}")));
        }
        if let Some(Boundary { remaining_bytes: 0, then }) = self.boundary.take_if(|b| b.remaining_bytes == 0)
        {
            self.pass_boundary(then);
        }
    }
}
