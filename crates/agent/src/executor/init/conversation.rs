//! Holds the conversation with one init: what is wished and asked goes in, what it tells comes out as events.
//!
//! ```text
//!   Standing ── go ──▶ Running ── Ended ──▶ Staying ── leave ──▶ Leaving
//!     put                exec                 take                  │
//!                          └────────────── Finished ◀───────────────┘
//! ```
//!
//! A machine's init calls first and is then woken; and its first files are the workspace's, which it does not see.

use std::time::Duration;

use sealci_core::outcome::Outcome;
use sealci_guest::wire::{self, Ending, FromInit, ToInit, WireError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cargo::Cargo;
use super::channel::{Frame, Incoming, Outgoing, Unreadable};
use super::errands::{Errands, Move, refuse};
use super::{End, Environment, Machine, Opening, Owner};
use crate::executor::door::{DoorError, Request};
use crate::executor::{ExecutionEvent, Lease, ResourceUse, Wish};

/// How long an init may take to come up and to understand its `Start`.
const START_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 60 });
/// How much longer than the grace an init may take to end what it runs.
const END_PATIENCE: Duration = Duration::from_secs(3);
/// How long an init may be silent while it packs or unpacks: long, for it waits for disks, and it says when it gets on.
const FILES_PATIENCE: Duration =
    if cfg!(test) { Duration::from_millis(600) } else { Duration::from_secs(60) };

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Standing,
    Running,
    Staying,
    Leaving,
}

pub(super) struct Conversation<'a> {
    incoming: Incoming,
    outgoing: Outgoing,
    environment: &'a mut dyn Environment,
    machine: Option<Machine>,
    /// The machine's init has not called yet.
    sleeps: bool,
    /// The workspace, while it goes in.
    cargo: Option<Cargo>,
    /// What is put in after it.
    set_aside: Option<Request>,
    opening: Opening,
    wishes: watch::Receiver<Wish>,
    leases: watch::Receiver<Option<Lease>>,
    requests: mpsc::Receiver<Request>,
    leave: CancellationToken,
    timeout: Duration,
    grace: Duration,
    errands: Errands,
    phase: Phase,
    /// The workspace is the action's.
    is_open: bool,
    /// It goes as soon as the files are in.
    may_go: bool,
    log_offset: u64,
    /// A command has started: the deadline is the timeout's, unless a wish came after it.
    runs: bool,
    /// When the init is ended by force, should it not have said a thing by then.
    deadline: Instant,
    is_late: bool,
    /// An event that there is no room for yet; nothing else is heard meanwhile.
    waiting: Option<ExecutionEvent>,
    /// What the commands came to, once that is told.
    over: Option<Outcome>,
}

/// What happened next.
enum Step<'a> {
    /// False: nobody can wish any more.
    Wish(bool),
    /// False: nobody can renew it any more.
    Lease(bool),
    /// False: it never goes.
    Go(bool),
    Leave,
    Written,
    Permit(Option<mpsc::Permit<'a, ExecutionEvent>>),
    Frame(Result<Option<Frame>, Unreadable>),
    Request(Option<Request>),
    Move(Move),
    Late,
}

impl<'a> Conversation<'a> {
    pub fn new(
        (incoming, outgoing): (Incoming, Outgoing),
        environment: &'a mut dyn Environment,
        opening: Opening,
        (timeout, grace): (Duration, Duration),
        owner: Owner,
    ) -> Self {
        let machine = environment.machine();
        Self {
            incoming,
            outgoing,
            environment,
            sleeps: machine.is_some(),
            machine,
            cargo: None,
            set_aside: None,
            opening,
            wishes: owner.wishes,
            leases: owner.leases,
            requests: owner.requests,
            leave: owner.leave,
            timeout,
            grace,
            errands: Errands::default(),
            phase: Phase::Standing,
            is_open: false,
            may_go: false,
            log_offset: 0,
            runs: false,
            deadline: Instant::now() + START_PATIENCE,
            is_late: false,
            waiting: None,
            over: None,
        }
    }

    /// Holds it to its end. Returns that, what was wished last, and what the commands came to if that is told already.
    pub async fn hold(
        mut self,
        mut go: oneshot::Receiver<()>,
        events: &mpsc::Sender<ExecutionEvent>,
    ) -> (End, Wish, Option<Outcome>) {
        // It sets a helper on its way. Should it not arrive, that shows in what is heard.
        let _ = self.outgoing.post(&ToInit::Hello { version: wire::VERSION });
        let end = loop {
            let step = self.step(&mut go, events).await;
            if let Some(end) = self.take(step).await {
                break end;
            }
        };
        let wish = *self.wishes.borrow();
        (end, wish, self.over)
    }

    async fn step<'e>(
        &mut self,
        go: &mut oneshot::Receiver<()>,
        events: &'e mpsc::Sender<ExecutionEvent>,
    ) -> Step<'e> {
        let stands = self.phase == Phase::Standing;
        let is_held_up = self.waiting.is_some() || self.errands.have_waiting();
        let can_send = self.errands.want_piece() && self.outgoing.takes_more();
        let can_move = can_send || self.errands.have_waiting();
        tokio::select! {
            biased;
            changed = self.wishes.changed(), if !stands => Step::Wish(changed.is_ok()),
            changed = self.leases.changed(), if self.phase == Phase::Running => Step::Lease(changed.is_ok()),
            may_go = go, if stands && !self.may_go => Step::Go(may_go.is_ok()),
            () = self.leave.cancelled(), if self.phase == Phase::Staying => Step::Leave,
            () = self.outgoing.write(), if !self.outgoing.is_empty() => Step::Written,
            permit = events.reserve(), if self.waiting.is_some() => Step::Permit(permit.ok()),
            // Of one that stands nothing is heard but what was asked for, and that a machine is over.
            frame = self.incoming.next(), if !is_held_up && (!stands || self.machine.is_some() || self.errands.has_files()) => {
                Step::Frame(frame)
            }
            request = self.requests.recv(), if !self.sleeps && !self.errands.has_files() => Step::Request(request),
            moved = self.errands.next_move(can_move), if can_move || self.errands.have_listeners() => {
                Step::Move(moved)
            }
            // Last: what has been said is heard before it is said to be late.
            () = tokio::time::sleep_until(self.deadline), if !is_held_up && self.awaits_init() => Step::Late,
        }
    }

    /// Whether silence is the init's, and so is counted.
    fn awaits_init(&self) -> bool {
        match self.phase {
            Phase::Running | Phase::Leaving => true,
            Phase::Standing | Phase::Staying => self.is_late || self.sleeps || self.errands.await_init(),
        }
    }

    async fn take(&mut self, step: Step<'_>) -> Option<End> {
        match step {
            Step::Wish(true) => {
                let wish = *self.wishes.borrow_and_update();
                self.pass_on(wish);
            }
            Step::Go(true) => {
                self.may_go = true;
                return self.start_if_ready().await;
            }
            Step::Go(false) => return Some(End::Abandoned),
            Step::Lease(true) => self.pass_lease_on(),
            // The owner and all handles are gone.
            Step::Wish(false) | Step::Lease(false) | Step::Permit(None) => return Some(End::Silent),
            Step::Leave => {
                self.post(&ToInit::Leave);
                self.go_away();
            }
            Step::Written => {}
            Step::Permit(Some(permit)) => {
                if let Some(event) = self.waiting.take() {
                    permit.send(event);
                }
            }
            Step::Frame(frame) => return self.hear(frame).await,
            Step::Request(Some(request)) => return self.accept(request).await,
            // The execution itself holds a door.
            Step::Request(None) => return Some(End::Silent),
            Step::Move(moved) => {
                match moved {
                    Move::Piece(piece) => self.errands.send(piece, &mut self.outgoing),
                    Move::Room(has_room) => self.errands.pass_on(has_room, &mut self.outgoing),
                    Move::Deserted(id) => self.errands.stop(id, &mut self.outgoing),
                }
                self.put_off_files();
            }
            Step::Late if self.is_late => return Some(self.late_end()),
            Step::Late => self.end_by_force(),
        }
        None
    }

    // ---- beginning ----

    /// Sets the commands going once they may and the files are in.
    async fn start_if_ready(&mut self) -> Option<End> {
        if self.phase != Phase::Standing || !self.may_go || self.sleeps || self.errands.has_files() {
            return None;
        }
        if let Err(end) = self.open_up().await {
            return Some(end);
        }
        if self.errands.has_files() {
            return None;
        }
        // In front of it: nothing starts without its deadline.
        self.pass_lease_on();
        self.outgoing.post_frame(&std::mem::take(&mut self.opening.frame));
        self.phase = Phase::Running;
        self.put_off(START_PATIENCE);
        None
    }

    async fn open_up(&mut self) -> Result<(), End> {
        if self.is_open {
            return Ok(());
        }
        self.is_open = true;
        self.environment.open_up().await.map_err(End::NotOpened)?;
        if let Some(machine) = &self.machine {
            let (cargo, request) = Cargo::load(machine.workspace.clone());
            self.cargo = Some(cargo);
            self.put(request);
        }
        Ok(())
    }

    /// Once the cargo is in, what was set aside for it goes on.
    fn unload(&mut self) -> Result<(), End> {
        if self.errands.has_files() {
            return Ok(());
        }
        if let Some(cargo) = self.cargo.take() {
            cargo.arrived().map_err(End::NotOpened)?;
        }
        if let Some(request) = self.set_aside.take() {
            self.put(request);
        }
        Ok(())
    }

    fn put(&mut self, request: Request) {
        let Request::Put { root, pieces, answer } = request else { return };
        let put = wire::Put {
            id: 0,
            root: root.into_bytes(),
            workdir: self.opening.workdir.clone(),
            home: self.opening.home.clone(),
        };
        self.errands.put(put, pieces, answer, &mut self.outgoing);
    }

    /// Tells a machine that has called what it cannot know by itself.
    fn wake(&mut self) {
        if let Some(machine) = self.machine.as_ref().filter(|_| self.sleeps) {
            let wake = machine.wake();
            self.post(&ToInit::Wake(wake));
            self.sleeps = false;
        }
    }

    async fn accept(&mut self, request: Request) -> Option<End> {
        match (request, self.phase) {
            (put @ Request::Put { .. }, Phase::Standing) => {
                if let Err(end) = self.open_up().await {
                    return Some(end);
                }
                if self.cargo.is_some() {
                    self.set_aside = Some(put);
                } else {
                    self.put(put);
                }
            }
            (Request::Take { wanted, pieces, answer }, Phase::Staying) => {
                self.errands.take(wanted, pieces, answer, &mut self.outgoing);
                self.put_off(FILES_PATIENCE);
            }
            (Request::Exec { exec, answer }, Phase::Running) => {
                self.errands.exec(exec, answer, &mut self.outgoing);
            }
            (Request::Talk { exec, news, listener, answer }, Phase::Running) => {
                self.errands.talk(exec, (news, listener), answer, &mut self.outgoing);
            }
            (Request::Input { id, bytes }, _) => self.errands.input(id, &bytes, &mut self.outgoing),
            (Request::Taken { id }, _) => self.errands.taken(id, &mut self.outgoing),
            (Request::Put { answer, .. }, _) => {
                refuse(answer, DoorError::NotNow("files are put in before the commands begin"));
            }
            (Request::Take { answer, .. }, _) => {
                refuse(answer, DoorError::NotNow("files are taken out when the commands are over"));
            }
            (Request::Exec { answer, .. } | Request::Talk { answer, .. }, _) => {
                refuse(answer, DoorError::NotNow("programs run beside the commands only"));
            }
        }
        None
    }

    // ---- hearing ----

    async fn hear(&mut self, frame: Result<Option<Frame>, Unreadable>) -> Option<End> {
        let heard = match frame {
            Ok(Some(Frame::Output(bytes))) => {
                self.log_offset += bytes.len() as u64;
                self.waiting = Some(ExecutionEvent::Output(bytes));
                Ok(None)
            }
            Ok(Some(Frame::Archive(bytes))) => self.errands.keep(bytes).map(|()| None),
            Ok(Some(Frame::Control(kind, payload))) => {
                FromInit::decode(kind, &payload).and_then(|told| self.understand(told))
            }
            Err(Unreadable::Garbled(error)) => Err(error),
            Ok(None) | Err(Unreadable::Io) if self.is_late => return Some(self.late_end()),
            Ok(None) | Err(Unreadable::Io) => return Some(End::Silent),
        };
        self.put_off_files();
        match heard {
            Ok(None) => match self.unload() {
                Ok(()) => self.start_if_ready().await,
                Err(end) => Some(end),
            },
            Ok(end) => end,
            Err(error) => Some(End::Garbled(error)),
        }
    }

    fn understand(&mut self, told: FromInit<'_>) -> Result<Option<End>, WireError> {
        let event = match told {
            FromInit::Hello { version: wire::VERSION } => {
                self.wake();
                return Ok(None);
            }
            FromInit::Hello { version } => {
                let text =
                    format!("sealci-init speaks version {version} of the protocol, not {}", wire::VERSION);
                return Ok(Some(End::Told { ending: Ending::Error(text), survivors: u32::MAX }));
            }
            FromInit::OutOfMemory => {
                self.environment.ran_out_of_memory();
                return Ok(None);
            }
            FromInit::Ready => ExecutionEvent::Started,
            FromInit::CommandStarted { index, .. } => {
                self.runs = true;
                if index == 0 && *self.wishes.borrow() == Wish::GoOn {
                    self.put_off(self.timeout.saturating_add(self.grace).saturating_add(END_PATIENCE));
                }
                ExecutionEvent::CommandStarted { index, log_offset: self.log_offset }
            }
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
                        read_bytes: usage.read_bytes,
                        write_bytes: usage.write_bytes,
                    },
                }
            }
            FromInit::Ended { ending, survivors } if self.phase == Phase::Running => {
                self.phase = Phase::Staying;
                let limit = self.environment.limit_reached();
                let wish = *self.wishes.borrow();
                let outcome = End::Told { ending, survivors }.outcome(limit, wish, String::new);
                self.over = Some(outcome.clone());
                ExecutionEvent::Over { outcome }
            }
            FromInit::Finished { ending, survivors } => {
                return Ok(Some(End::Told { ending, survivors }));
            }
            // `Frame` keeps these apart.
            FromInit::Output(_) | FromInit::TakeData(_) | FromInit::Ended { .. } => {
                return Err(WireError::Invalid("kind"));
            }
            answer => return self.errands.hear(answer).map(|()| None),
        };
        self.waiting = Some(event);
        Ok(None)
    }

    // ---- ending ----

    fn pass_on(&mut self, wish: Wish) {
        let (message, patience) = match wish {
            Wish::GoOn => return,
            Wish::Cancel { grace } => {
                let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
                (ToInit::Cancel { grace_ms }, grace.saturating_add(END_PATIENCE))
            }
            Wish::Kill => (ToInit::Kill, END_PATIENCE),
        };
        self.post(&message);
        if self.phase == Phase::Staying {
            self.go_away();
        } else {
            self.put_off(patience);
        }
        if !self.outgoing.write_now() {
            // It has not read in a long time: it is past listening.
            self.environment.kill();
            self.put_off(END_PATIENCE);
        }
    }

    fn pass_lease_on(&mut self) {
        let lease = *self.leases.borrow_and_update();
        if let Some(lease) = lease {
            self.post(&ToInit::Lease(lease));
        }
    }

    /// Nothing but its end is awaited.
    fn go_away(&mut self) {
        self.phase = Phase::Leaving;
        self.errands.give_up_files();
        self.put_off(END_PATIENCE);
    }

    fn post(&mut self, message: &ToInit) {
        // No message without a list is ever too long.
        let _ = self.outgoing.post(message);
    }

    fn end_by_force(&mut self) {
        self.is_late = true;
        self.environment.kill();
        self.put_off(END_PATIENCE);
    }

    fn late_end(&self) -> End {
        match self.phase {
            _ if self.runs => End::LateAfterTimeout,
            Phase::Standing if self.sleeps => End::Late("did not come up"),
            Phase::Standing => End::Late("did not take its files"),
            _ if self.outgoing.is_empty() => End::Late("did not answer"),
            _ => End::Late("did not read its commands"),
        }
    }

    /// Something moved while there are files on their way, so the init gets its whole time again.
    fn put_off_files(&mut self) {
        if matches!(self.phase, Phase::Standing | Phase::Staying) && !self.is_late {
            self.put_off(FILES_PATIENCE);
        }
    }

    fn put_off(&mut self, patience: Duration) {
        // A year is as good as never.
        let never = Duration::from_secs(365 * 24 * 3600);
        self.deadline = Instant::now() + patience.min(never);
    }
}
