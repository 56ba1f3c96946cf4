//! The task that owns every unfinished pipeline: rounds of inputs, each with one time and one commit.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealci_core::ids::{ActionId, AgentId, AttemptId, FencingToken, PipelineId, ReplicaId};
use sealci_core::outcome::Cause;
use sealci_git::CredentialBook;
use sealci_proto::scheduler::{PipelineEpoch, Snapshot, controller_message, scheduler_message};
use sealci_service::problem::chain;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::agents::AgentBook;
use super::closing::Closing;
use super::commit::Transaction;
use super::leases::LeaseWatch;
use super::lines::{Line, LineId, Lines, Post};
use super::link::{FromLink, Incoming};
use super::live::Live;
use super::places::{Place, Take};
use super::presence::Presence;
use super::reports::ReportError;
use super::wants::{self, ActionLimits};
use super::why::Question;
use super::{Dispatch, INBOX, Input, Refusal};
use crate::replica::Replica;
use crate::storage::StorageDoor;
use crate::store::{News, Store, StoreError};
use crate::watchers::Watchers;

/// One commit takes at most so many inputs, so that the first of them is not kept waiting.
const INPUTS_PER_COMMIT: usize = 1024;

/// A finished pipeline whose agents still owe something stays in memory so long after the last word of them.
const FINISHED_STAYS: Duration = Duration::from_secs(60);

/// So many fencing tokens are taken from the database at once.
const TOKENS_AT_ONCE: i64 = 1000;

/// How the driver judges and what it asks of agents.
#[derive(Debug, Clone)]
pub struct Config {
    /// Silence of this length makes an attempt lost.
    pub lost_after: Duration,
    /// A replica whose lease stands still for so long is gone.
    pub lease: Duration,
    /// A log that nobody delivers to its end is closed so long after its attempt's.
    pub close_logs_after: Duration,
    pub limits: ActionLimits,
    /// What opens private repositories.
    pub credentials: Arc<CredentialBook>,
    /// SHA-256 of the tokens that let an agent enrol.
    pub enrolment_tokens: Vec<[u8; 32]>,
    /// What lets attempts reach the storage.
    pub storage: StorageDoor,
}

/// The owner of all unfinished pipelines, or, among replicas, of this one's.
#[derive(Debug)]
pub struct Driver {
    pub(super) store: Store,
    pub(super) replica: Replica,
    pub(super) leases: LeaseWatch,
    pub(super) has_lost_lease: bool,
    /// Pipelines of other replicas that something was reported of here, and since when.
    pub(super) elsewhere: HashMap<PipelineId, Instant>,
    pub(super) config: Config,
    pub(super) inbox: mpsc::Receiver<Input>,
    pub(super) watchers: Watchers,
    linked: watch::Sender<bool>,
    /// In one order, as all that is walked through here: the same inputs are then answered by the same words.
    pub(super) live: BTreeMap<PipelineId, Live>,
    pub(super) by_action: HashMap<ActionId, PipelineId>,
    pub(super) agents: AgentBook,
    pub(super) presence: Presence,
    pub(super) closing: Closing,
    pub(super) lines: Lines,
    /// Why-questions under way at the schedulers.
    pub(super) questions: HashMap<u64, Question>,
    pub(super) next_question: u64,
    /// Tokens taken from the database and not given out: `start..end`.
    tokens: std::ops::Range<u64>,
    /// When the round under way began.
    pub(super) now: Instant,
    /// Pipelines that a failed commit made unknown, or that were taken over; read (again) and stated at the next tick.
    pub(super) forgotten: BTreeSet<PipelineId>,
}

impl Driver {
    /// Takes over what the database holds: all of it where nobody else has it open, else what `former`, the process before
    /// this one, left. The driver does nothing until it is [run](Driver::run).
    pub async fn open(
        store: Store,
        config: Config,
        watchers: Watchers,
        (replica, former): (Replica, Option<ReplicaId>),
        now: Instant,
    ) -> Result<(Self, Dispatch), StoreError> {
        if store.is_shared() {
            store.begin_lease(replica.id()).await?;
            if let Some(former) = former {
                let counter = store.leases().await?.get(&former).copied();
                store.take_over_from(former, counter, replica.id()).await?;
            }
        } else {
            store.take_over_all(replica.id()).await?;
        }
        let (sender, inbox) = mpsc::channel(INBOX);
        let (linked, is_linked) = watch::channel(false);
        let mut driver = Self {
            agents: AgentBook::new(store.agents().await?),
            presence: Presence::new(config.lost_after),
            closing: Closing::new(config.close_logs_after),
            leases: LeaseWatch::new(config.lease),
            replica,
            has_lost_lease: false,
            elsewhere: HashMap::new(),
            config,
            inbox,
            watchers,
            linked,
            live: BTreeMap::new(),
            by_action: HashMap::new(),
            lines: Lines::default(),
            questions: HashMap::new(),
            next_question: 1,
            tokens: 0..0,
            now,
            forgotten: BTreeSet::new(),
            store,
        };
        for id in driver.store.unfinished(driver.replica.id()).await? {
            driver.place(id, Take::Never).await?;
        }
        Ok((driver, Dispatch { inbox: sender, linked: is_linked }))
    }

    /// Which of the replicas this is.
    pub fn replica(&self) -> ReplicaId {
        self.replica.id()
    }

    /// Works until told to stop; what is in the inbox then is answered by nobody.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(self.leases.tick());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let first = tokio::select! {
                () = stop.cancelled() => break,
                _ = ticks.tick() => None,
                input = self.inbox.recv() => match input {
                    Some(input) => Some(input),
                    None => break,
                },
            };
            self.round(first, Instant::now(), now_ms()).await;
        }
        self.give_lease_back().await;
    }

    /// One round: takes an input and those behind it, or looks for what is due, commits, and answers.
    pub(super) async fn round(&mut self, first: Option<Input>, now: Instant, now_ms: i64) {
        self.now = now;
        let mut transaction = Transaction::at(now_ms);
        match first {
            Some(input) => self.take_all(input, &mut transaction).await,
            None => self.tick(&mut transaction).await,
        }
        self.finish(transaction).await;
    }

    async fn take_all(&mut self, first: Input, transaction: &mut Transaction) {
        self.take(first, transaction).await;
        for _ in 1..INPUTS_PER_COMMIT {
            let Ok(input) = self.inbox.try_recv() else { return };
            self.take(input, transaction).await;
        }
    }

    async fn take(&mut self, input: Input, transaction: &mut Transaction) {
        match input {
            Input::Create(new, answer) => match self.create(*new, transaction).await {
                Ok(created) => transaction.reply(answer, created),
                Err(error) => fail(answer, &error),
            },
            Input::Cancel(id, answer) => match self.cancel(id, transaction).await {
                Ok(Some(())) => transaction.reply(answer, id),
                Ok(None) => refuse(answer, Refusal::UnknownPipeline),
                Err(error) => fail(answer, &error),
            },
            Input::Rerun { id, scope, request, answer } => {
                match self.rerun(id, scope, request, transaction).await {
                    Ok(Ok(())) => transaction.reply(answer, id),
                    Ok(Err(refusal)) => refuse(answer, refusal),
                    Err(error) => fail(answer, &error),
                }
            }
            Input::Why(action, answer) => self.why(action, answer, transaction).await,
            Input::Agents(answer) => {
                let _ = answer.send(Ok(self.agent_views())); // who asked may have gone away
            }
            Input::Drain { agent, drained, answer } => self.drain(agent, drained, answer, transaction),
            Input::Heard(news) => self.hear(news, transaction).await,
            Input::Link(id, FromLink::Up(line)) => self.line_is_up(id, line, transaction).await,
            Input::Link(id, FromLink::Down) => self.line_is_down(id),
            Input::Link(id, FromLink::Message(incoming)) => self.incoming(id, *incoming, transaction).await,
        }
    }

    async fn incoming(&mut self, line: LineId, incoming: Incoming, transaction: &mut Transaction) {
        use scheduler_message::Body;
        // Of a line that was given up nothing counts: what matters of it comes again by the next.
        if !self.lines.stands(line) {
            return;
        }
        let result = match incoming.message {
            Body::FromAgent(from) => self.report(line, from, incoming.packed, transaction).await,
            Body::AgentState(state) => self.agent_state(line, state, transaction).await,
            Body::Absent(absent) => self.absent(&absent, transaction).await,
            Body::EnrolQuestion(question) => {
                self.enrol(line, question, transaction);
                Ok(())
            }
            Body::WhyAnswer(answer) => {
                self.why_answered(line, answer);
                Ok(())
            }
            Body::Placed(placed) => self.placed(&placed).await,
            Body::Welcome(_) => Ok(()),
        };
        match result {
            Ok(()) => {}
            Err(ReportError::Malformed(error)) => {
                tracing::warn!(%error, "a message from the scheduler was left out");
            }
            // The agent sends it again until it is acknowledged.
            Err(ReportError::Store(error)) => {
                tracing::error!(error = %chain(&error), "a report was not taken")
            }
        }
    }

    async fn absent(
        &mut self,
        absent: &sealci_proto::scheduler::Absent,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let id = sealci_proto::attempt_id(&absent.attempt)?;
        let agent: AgentId = absent.agent_id.parse().map_err(sealci_proto::Malformed::from)?;
        let Some(live) = self.place_of_action(id.action, Take::IfDue).await?.here() else { return Ok(()) };
        let is_theirs = live.current(id).is_some_and(|attempt| {
            attempt.claimant.agent == agent && attempt.claimant.instance.to_string() == absent.instance_id
        });
        if is_theirs {
            let pipeline = live.id();
            self.lose(pipeline, id, "the agent came back without it", transaction);
        }
        Ok(())
    }

    async fn placed(&mut self, placed: &sealci_proto::scheduler::Placed) -> Result<(), ReportError> {
        let id = sealci_proto::attempt_id(&placed.attempt)?;
        let agent = placed.agent_id.parse().map_err(sealci_proto::Malformed::from)?;
        if let Some(live) = self.place_of_action(id.action, Take::Never).await?.here() {
            live.placed.insert(id, agent);
        }
        Ok(())
    }

    /// Another replica has said what it changed.
    async fn hear(&mut self, news: Vec<News>, transaction: &mut Transaction) {
        let mut has_agents = false;
        for one in news {
            match one {
                News::Pipeline(id) => self.watchers.pipelines.wake(&id),
                News::Log(id) => self.watchers.logs.wake(&id),
                // Not before the commit: what it writes of the pipeline is to be held, or refused, with the rest.
                News::Taken(id) => drop(transaction.taken.insert(id)),
                News::Agents => has_agents = true,
            }
        }
        if has_agents && let Err(error) = self.read_agents(transaction).await {
            tracing::error!(error = %chain(&error), "the agents cannot be read");
        }
    }

    /// Looks for silence, closes logs that have no end, and takes up again what a failed commit made us forget.
    async fn tick(&mut self, transaction: &mut Transaction) {
        let now = self.now;
        self.keep_lease(now, transaction).await;
        self.remember_forgotten(transaction).await;
        let idle: Vec<PipelineId> = self
            .live
            .values()
            .filter(|live| live.pipeline.state == "finished" && now - live.touched > FINISHED_STAYS)
            .map(Live::id)
            .collect();
        idle.into_iter().for_each(|id| self.drop_live(id));
        let active =
            self.live.values().flat_map(|live| live.active_attempts().map(|(id, _)| (id, live.id())));
        let pipelines: BTreeMap<AttemptId, PipelineId> = active.collect();
        let lost = self.presence.lost(pipelines.keys().copied(), now, self.leases.tick());
        for id in lost {
            let seconds = self.config.lost_after.as_secs_f32();
            self.lose(
                pipelines[&id],
                id,
                &format!("nothing was heard of its agent for {seconds} s"),
                transaction,
            );
        }
        self.close_silent_logs(now, transaction).await;
    }

    async fn remember_forgotten(&mut self, transaction: &mut Transaction) {
        for id in std::mem::take(&mut self.forgotten) {
            match self.place(id, Take::Never).await {
                Ok(Place::Here(_)) => {
                    transaction.dirty.entry(id).or_default();
                    transaction.restated.insert(id);
                }
                Ok(Place::Nowhere | Place::Elsewhere) => {}
                Err(error) => {
                    tracing::error!(pipeline.id = %id, error = %chain(&error), "a pipeline cannot be read");
                    self.forgotten.insert(id);
                }
            }
        }
    }

    fn lose(&mut self, pipeline: PipelineId, id: AttemptId, message: &str, transaction: &mut Transaction) {
        let Some(live) = self.live.get_mut(&pipeline) else { return };
        let touched = live.state.lose(id.action, id.number, Cause::AgentLost, message);
        if !touched.is_empty() {
            tracing::warn!(attempt.id = %id, message, "an attempt is lost");
            transaction.touch(pipeline, touched);
            transaction.touch_attempt(pipeline, id);
            self.presence.forget(id);
        }
    }

    /// Opens a line with all there is to say. Its snapshot names everybody's pipelines: what it left out would be over. Of a
    /// pipeline that has gone to another replica unnoticed nothing is said.
    async fn line_is_up(&mut self, id: LineId, line: Line, transaction: &mut Transaction) {
        let epochs = match self.store.epochs().await {
            Ok(epochs) => epochs,
            Err(error) => {
                tracing::error!(error = %chain(&error), "a new line is given up: what is unfinished cannot be read");
                return;
            }
        };
        let named =
            |(id, epoch): (&PipelineId, &u64)| PipelineEpoch { pipeline_id: id.to_string(), epoch: *epoch };
        let snapshot = Snapshot { pipelines: epochs.iter().map(named).collect() };
        let mut opening = Post::default();
        opening.for_one(id, controller_message::Body::Directory(self.agents.complete_directory()));
        opening.for_one(id, controller_message::Body::Snapshot(snapshot));
        for live in self.live.values().filter(|live| live.pipeline.state != "finished") {
            // What this round changes, its commit finds out.
            let is_checked = !live.is_recorded() || transaction.dirty.contains_key(&live.id());
            if !is_checked && epochs.get(&live.id()) != Some(&live.epoch()) {
                transaction.taken.insert(live.id());
                continue;
            }
            opening.for_one(id, controller_message::Body::Wants(wants::complete(live, &self.config)));
        }
        tracing::info!(
            scheduler.endpoint = line.endpoint,
            pipelines = self.live.len(),
            "a scheduler is connected"
        );
        self.lines.open(id, line);
        self.presence.line_is_up(id, self.now);
        self.linked.send_replace(true);
        self.send(opening);
    }

    /// A line is gone, or is given up, to be made anew.
    fn line_is_down(&mut self, id: LineId) {
        if !self.lines.close(id) {
            return;
        }
        let is_last = self.lines.is_empty();
        self.presence.line_is_down(id, is_last);
        if is_last {
            self.closing.is_deaf();
            self.linked.send_replace(false);
        }
        self.no_answer_comes_by(id);
    }

    /// Has every line made anew, which repairs everything.
    pub(super) fn give_lines_up(&mut self) {
        let ids: Vec<LineId> = self.lines.ids().collect();
        ids.into_iter().for_each(|id| self.line_is_down(id));
    }

    pub(super) fn send(&mut self, post: Post) {
        for id in self.lines.send(post) {
            self.line_is_down(id);
        }
    }

    /// Takes no memory for truth after a failed commit: the database is.
    pub(super) fn forget(&mut self, ids: Vec<PipelineId>) {
        for id in ids {
            self.drop_live(id);
            self.forgotten.insert(id);
        }
    }

    /// The next fencing token; it stays the next until [`Driver::token_is_used`].
    pub(super) async fn next_token(&mut self) -> Result<FencingToken, StoreError> {
        if self.tokens.is_empty() {
            let first = self.store.take_numbers("token", TOKENS_AT_ONCE).await?.unsigned_abs();
            self.tokens = first..first + TOKENS_AT_ONCE.unsigned_abs();
        }
        Ok(FencingToken(self.tokens.start))
    }

    pub(super) fn token_is_used(&mut self) {
        self.tokens.start += 1;
    }
}

pub(super) fn refuse<T>(answer: oneshot::Sender<Result<T, Refusal>>, refusal: Refusal) {
    let _ = answer.send(Err(refusal)); // who asked may have gone away
}

pub(super) fn fail<T>(answer: oneshot::Sender<Result<T, Refusal>>, error: &StoreError) {
    tracing::error!(error = %chain(error), "the database failed");
    refuse(answer, Refusal::NotRecorded);
}

/// The wall clock, for showing only.
fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
