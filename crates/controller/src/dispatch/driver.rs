//! The task that owns every unfinished pipeline.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealci_core::ids::{ActionId, AgentId, AttemptId, FencingToken, PipelineId};
use sealci_core::outcome::Cause;
use sealci_core::pipeline::{Action, ActionState, Pipeline, RerunScope, Touched};
use sealci_git::CredentialBook;
use sealci_proto::scheduler::{
    ControllerMessage, PipelineEpoch, Snapshot, ToAgent, controller_message, scheduler_message, to_agent,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::agents::AgentBook;
use super::link::{FromLink, Incoming};
use super::live::{Dirty, Live};
use super::presence::Presence;
use super::reports::{ReportError, acknowledgement};
use super::wants::{self, ActionLimits};
use super::{Answer, Created, Dispatch, INBOX, Input, NewPipeline, Refusal, TICK};
use crate::store::entity::{actions, pipelines, rounds};
use crate::store::{Batch, Store, StoreError};
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
    pub limits: ActionLimits,
    /// What opens private repositories.
    pub credentials: Arc<CredentialBook>,
    /// SHA-256 of the tokens that let an agent enrol.
    pub enrolment_tokens: Vec<[u8; 32]>,
}

/// The owner of all unfinished pipelines.
#[derive(Debug)]
pub struct Driver {
    pub(super) store: Store,
    pub(super) config: Config,
    inbox: mpsc::Receiver<Input>,
    watchers: Watchers,
    linked: watch::Sender<bool>,
    live: HashMap<PipelineId, Live>,
    by_action: HashMap<ActionId, PipelineId>,
    pub(super) agents: AgentBook,
    pub(super) presence: Presence,
    line: Option<mpsc::Sender<Vec<ControllerMessage>>>,
    /// Why-questions under way at the scheduler.
    questions: HashMap<u64, Answer<Vec<String>>>,
    next_question: u64,
    /// Tokens taken from the database and not given out: `start..end`.
    tokens: std::ops::Range<u64>,
    /// Pipelines that a failed commit made unknown; read again at the next tick.
    forgotten: HashSet<PipelineId>,
}

/// What one commit does: what it writes, and whom it answers afterwards.
#[derive(Default)]
pub(super) struct Transaction {
    pub now_ms: i64,
    pub batch: Batch,
    dirty: HashMap<PipelineId, Dirty>,
    /// Pipelines whose wants are stated whole after the commit.
    restated: HashSet<PipelineId>,
    created: HashMap<String, PipelineId>,
    logs: HashSet<AttemptId>,
    answers: Vec<(u64, to_agent::Body)>,
    acknowledgements: HashSet<(u64, AttemptId, u64)>,
    released: BTreeMap<u64, u64>,
    pub messages: Vec<controller_message::Body>,
    /// Told whether the commit succeeded.
    after: Vec<Box<dyn FnOnce(bool) + Send>>,
}

impl std::fmt::Debug for Transaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transaction").field("batch", &self.batch).finish_non_exhaustive()
    }
}

impl Transaction {
    pub fn touch(&mut self, pipeline: PipelineId, actions: Touched) {
        self.dirty.entry(pipeline).or_default().actions.extend(actions);
    }

    pub fn touch_attempt(&mut self, pipeline: PipelineId, attempt: AttemptId) {
        self.dirty.entry(pipeline).or_default().attempts.insert(attempt);
    }

    pub fn log_grew(&mut self, attempt: AttemptId) {
        self.logs.insert(attempt);
    }

    pub fn answer(&mut self, session: u64, body: to_agent::Body) {
        self.answers.push((session, body));
    }

    /// Asks for one cumulative acknowledgement after the commit, however many writes it covers.
    pub fn acknowledge(&mut self, session: u64, attempt: AttemptId, token: FencingToken) {
        self.acknowledgements.insert((session, attempt, token.0));
    }

    pub fn release(&mut self, session: u64, bytes: usize) {
        *self.released.entry(session).or_default() += bytes as u64;
    }

    /// Answers after the commit, or says that it failed.
    pub fn reply<T: Send + 'static>(&mut self, answer: Answer<T>, value: T) {
        self.after.push(Box::new(move |committed| {
            // Who asked may have gone away meanwhile: what they wished is recorded all the same.
            let _ = answer.send(if committed { Ok(value) } else { Err(Refusal::NotRecorded) });
        }));
    }
}

impl Driver {
    /// Takes over what the database holds. The driver does nothing until it is [run](Driver::run).
    pub async fn open(
        store: Store,
        config: Config,
        watchers: Watchers,
    ) -> Result<(Self, Dispatch), StoreError> {
        let (sender, inbox) = mpsc::channel(INBOX);
        let (linked, is_linked) = watch::channel(false);
        let mut driver = Self {
            agents: AgentBook::new(store.agents().await?),
            presence: Presence::new(config.lost_after),
            config,
            inbox,
            watchers,
            linked,
            live: HashMap::new(),
            by_action: HashMap::new(),
            line: None,
            questions: HashMap::new(),
            next_question: 1,
            tokens: 0..0,
            forgotten: HashSet::new(),
            store,
        };
        for id in driver.store.unfinished().await? {
            driver.live(id).await?;
        }
        Ok((driver, Dispatch { inbox: sender, linked: is_linked }))
    }

    /// Works until told to stop; what is in the inbox then is answered by nobody.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let first = tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => None,
                input = self.inbox.recv() => match input {
                    Some(input) => Some(input),
                    None => return,
                },
            };
            let mut transaction = Transaction { now_ms: now_ms(), ..Transaction::default() };
            match first {
                Some(input) => self.take_all(input, &mut transaction).await,
                None => self.tick(&mut transaction).await,
            }
            self.finish(transaction).await;
        }
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
            Input::Link(FromLink::Up { outgoing }) => self.line_is_up(outgoing),
            Input::Link(FromLink::Down) => self.line_is_down(),
            Input::Link(FromLink::Message(incoming)) => self.incoming(*incoming, transaction).await,
        }
    }

    async fn create(
        &mut self,
        new: NewPipeline,
        transaction: &mut Transaction,
    ) -> Result<Created, StoreError> {
        if let Some(id) = transaction.created.get(&new.identity) {
            return Ok(Created::Before(*id));
        }
        if let Some(id) = self.store.pipeline_with_identity(&new.identity).await? {
            return Ok(Created::Before(id));
        }
        let mut live = new_live(&new, transaction.now_ms);
        let id = live.id();
        let touched = live.state.start();
        let mut dirty = Dirty { pipeline: true, ..Dirty::default() };
        dirty.actions.extend(0..live.actions.len());
        dirty.actions.extend(touched);
        transaction.dirty.insert(id, dirty);
        transaction.restated.insert(id);
        transaction.created.insert(new.identity, id);
        self.adopt(live);
        Ok(Created::Now(id))
    }

    async fn cancel(
        &mut self,
        id: PipelineId,
        transaction: &mut Transaction,
    ) -> Result<Option<()>, StoreError> {
        let Some(live) = self.live(id).await? else { return Ok(None) };
        let touched = live.state.cancel();
        let dirty = transaction.dirty.entry(id).or_default();
        dirty.pipeline = true;
        dirty.actions.extend(touched);
        transaction.restated.insert(id);
        Ok(Some(()))
    }

    async fn rerun(
        &mut self,
        id: PipelineId,
        scope: RerunScope,
        request: String,
        transaction: &mut Transaction,
    ) -> Result<Result<(), Refusal>, StoreError> {
        if self.store.round_of_request(id, &request).await?.is_some() {
            return Ok(Ok(()));
        }
        let repeated = |row: &rounds::Model| row.pipeline_id == id.as_uuid() && row.request_id == request;
        if transaction.batch.rounds.iter().any(repeated) {
            return Ok(Ok(()));
        }
        let Some(live) = self.live(id).await? else { return Ok(Err(Refusal::UnknownPipeline)) };
        let touched = match live.state.rerun(scope) {
            Ok(touched) => touched,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        transaction.batch.rounds.push(rounds::Model {
            pipeline_id: id.as_uuid(),
            request_id: request,
            round: i32::try_from(live.state.round).unwrap_or(i32::MAX),
            created_at: transaction.now_ms,
        });
        let dirty = transaction.dirty.entry(id).or_default();
        dirty.pipeline = true;
        dirty.actions.extend(touched);
        // Every action's attempts in this round count from 0 again.
        dirty.actions.extend(0..live.actions.len());
        transaction.restated.insert(id);
        Ok(Ok(()))
    }

    async fn incoming(&mut self, incoming: Incoming, transaction: &mut Transaction) {
        use scheduler_message::Body;
        let result = match incoming.message {
            Body::FromAgent(from) => self.report(from, incoming.packed, transaction).await,
            Body::AgentState(state) => self.agent_state(state, transaction).await,
            Body::Absent(absent) => self.absent(&absent, transaction).await,
            Body::EnrolQuestion(question) => {
                self.enrol(question, transaction);
                Ok(())
            }
            Body::WhyAnswer(answer) => {
                self.why_answered(answer);
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
        let Some(live) = self.live_of_action(id.action).await? else { return Ok(()) };
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
        if let Some(live) = self.live_of_action(id.action).await? {
            live.placed.insert(id, agent);
        }
        Ok(())
    }

    /// Looks for silence, and takes up again what a failed commit made us forget.
    async fn tick(&mut self, transaction: &mut Transaction) {
        self.remember_forgotten(transaction).await;
        let now = Instant::now();
        let idle: Vec<PipelineId> = self
            .live
            .values()
            .filter(|live| live.pipeline.state == "finished" && now - live.touched > FINISHED_STAYS)
            .map(Live::id)
            .collect();
        idle.into_iter().for_each(|id| self.drop_live(id));
        let active =
            self.live.values().flat_map(|live| live.active_attempts().map(|(id, _)| (id, live.id())));
        let pipelines: HashMap<AttemptId, PipelineId> = active.collect();
        let lost = self.presence.lost(pipelines.keys().copied(), Instant::now(), TICK);
        for id in lost {
            let seconds = self.config.lost_after.as_secs_f32();
            self.lose(
                pipelines[&id],
                id,
                &format!("nothing was heard of its agent for {seconds} s"),
                transaction,
            );
        }
    }

    async fn remember_forgotten(&mut self, transaction: &mut Transaction) {
        for id in std::mem::take(&mut self.forgotten) {
            match self.live(id).await {
                Ok(_) => {
                    transaction.dirty.entry(id).or_default();
                    transaction.restated.insert(id);
                }
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

    fn line_is_up(&mut self, outgoing: mpsc::Sender<Vec<ControllerMessage>>) {
        let unfinished = || self.live.values().filter(|live| live.pipeline.state != "finished");
        let epoch = |live: &Live| PipelineEpoch {
            pipeline_id: live.id().to_string(),
            epoch: live.pipeline.epoch.unsigned_abs(),
        };
        let mut opening = vec![
            controller_message::Body::Directory(self.agents.complete_directory()),
            controller_message::Body::Snapshot(Snapshot { pipelines: unfinished().map(epoch).collect() }),
        ];
        let stated = unfinished().map(|live| wants::complete(live, &self.config));
        opening.extend(stated.map(controller_message::Body::Wants));
        self.line = Some(outgoing);
        self.presence.line_is_up(Instant::now());
        self.linked.send_replace(true);
        self.send(opening);
        tracing::info!(pipelines = self.live.len(), "the scheduler is connected");
    }

    fn line_is_down(&mut self) {
        self.line = None;
        self.presence.line_is_down();
        self.linked.send_replace(false);
        for (_, answer) in self.questions.drain() {
            let _ = answer.send(Ok(vec!["no scheduler is connected".into()])); // who asked may have gone away
        }
    }

    /// Sends, unless the line is so far behind that it has to be made anew, which repairs everything.
    fn send(&mut self, bodies: Vec<controller_message::Body>) {
        if bodies.is_empty() {
            return;
        }
        let messages = bodies.into_iter().map(|body| ControllerMessage { body: Some(body) }).collect();
        if self.line.as_ref().is_some_and(|line| line.try_send(messages).is_err()) {
            self.line_is_down();
        }
    }

    async fn why(&mut self, action: ActionId, answer: Answer<Vec<String>>, transaction: &mut Transaction) {
        let is_linked = self.line.is_some();
        let live = match self.live_of_action(action).await {
            Ok(Some(live)) => live,
            Ok(None) => return refuse(answer, Refusal::UnknownAction),
            Err(error) => return fail(answer, &error),
        };
        let placed = live.placed.clone();
        let Some(index) = live.state.position(action) else { return refuse(answer, Refusal::UnknownAction) };
        let about = &live.state.actions[index];
        let next = AttemptId { action, number: about.attempts + 1 };
        let reasons = match &about.state {
            ActionState::Queued if !is_linked => vec!["no scheduler is connected".to_owned()],
            ActionState::Queued => match placed.get(&next) {
                Some(agent) => vec![format!("agent {} is preparing it", self.agents.name(*agent))],
                None => {
                    let request = self.next_question;
                    self.next_question += 1;
                    self.questions.insert(request, answer);
                    let question =
                        sealci_proto::scheduler::WhyQuestion { request, attempt: Some(next.into()) };
                    transaction.messages.push(controller_message::Body::WhyQuestion(question));
                    return;
                }
            },
            ActionState::Pending => waiting_for(&live.state, about),
            ActionState::Active => {
                let agent = about.current.as_ref().map(|current| current.claimant.agent);
                let agent = agent.map(|agent| self.agents.name(agent)).unwrap_or_default();
                vec![format!("it runs on agent {agent}")]
            }
            ActionState::Finished(outcome) => vec![format!("it is finished: {outcome}")],
        };
        let _ = answer.send(Ok(reasons)); // who asked may have gone away
    }

    fn why_answered(&mut self, answer: sealci_proto::scheduler::WhyAnswer) {
        if let Some(asked) = self.questions.remove(&answer.request) {
            let reasons = if answer.reasons.is_empty() {
                vec!["the scheduler is about to place it".to_owned()]
            } else {
                answer.reasons
            };
            let _ = asked.send(Ok(reasons)); // who asked may have gone away
        }
    }

    /// Commits, then answers; or, if the commit failed, forgets what it changed in memory.
    async fn finish(&mut self, mut transaction: Transaction) {
        let mut moved = Vec::new();
        for (id, dirty) in &transaction.dirty {
            if let Some(live) = self.live.get_mut(id) {
                live.touched = Instant::now();
                moved.push((*id, live.write(dirty, transaction.now_ms, &mut transaction.batch)));
            }
        }
        if let Err(error) = self.store.commit(&mut transaction.batch).await {
            tracing::error!(error = %chain(&error), "a commit failed; nothing of it was answered");
            self.forget(transaction.dirty.keys().copied().collect());
            // The scheduler may have been told of what is not: a new line starts with what is.
            self.line_is_down();
            self.agents.forget_changes();
            transaction.after.into_iter().for_each(|after| after(false));
            return;
        }
        self.agents.keep_changes();
        for row in transaction.batch.pipelines.values() {
            if let Some(live) = self.live.get_mut(&PipelineId::from_uuid(row.id)) {
                live.pipeline.number = row.number;
            }
        }
        self.answer(transaction, moved);
    }

    fn answer(&mut self, transaction: Transaction, moved: Vec<(PipelineId, Vec<usize>)>) {
        let mut bodies = transaction.messages;
        for (id, actions) in moved {
            let Some(live) = self.live.get(&id) else { continue };
            if transaction.restated.contains(&id) {
                bodies.push(controller_message::Body::Wants(wants::complete(live, &self.config)));
            } else if !actions.is_empty() {
                bodies.push(controller_message::Body::Wants(wants::changed(live, actions, &self.config)));
            }
        }
        let to_agent =
            |session, body| controller_message::Body::ToAgent(ToAgent { session, body: Some(body) });
        bodies.extend(transaction.answers.into_iter().map(|(session, body)| to_agent(session, body)));
        for (session, id, token) in transaction.acknowledgements {
            let live = self.by_action.get(&id.action).and_then(|pipeline| self.live.get(pipeline));
            bodies.push(to_agent(session, acknowledgement(live, id, FencingToken(token))));
        }
        for (session, bytes) in transaction.released {
            bodies.push(to_agent(session, to_agent::Body::ReleasedBytes(bytes)));
        }
        self.send(bodies);
        transaction.after.into_iter().for_each(|after| after(true));
        for id in transaction.dirty.keys() {
            self.watchers.pipelines.wake(id);
            if self.live.get(id).is_some_and(Live::is_settled) {
                self.drop_live(*id);
            }
        }
        transaction.logs.iter().for_each(|id| self.watchers.logs.wake(id));
    }

    /// The pipeline in memory, read from the database where it is not.
    pub(super) async fn live(&mut self, id: PipelineId) -> Result<Option<&mut Live>, StoreError> {
        if !self.live.contains_key(&id) {
            let Some(rows) = self.store.pipeline(id).await? else { return Ok(None) };
            self.adopt(Live::of_rows(rows)?);
        }
        Ok(self.live.get_mut(&id))
    }

    pub(super) async fn live_of_action(&mut self, action: ActionId) -> Result<Option<&mut Live>, StoreError> {
        let id = match self.by_action.get(&action) {
            Some(id) => *id,
            None => match self.store.pipeline_of_action(action).await? {
                Some(id) => id,
                None => return Ok(None),
            },
        };
        self.live(id).await
    }

    /// The pipeline with this attempt in memory, also if it is an older one; none if it never was claimed.
    pub(super) async fn live_of_attempt(&mut self, id: AttemptId) -> Result<Option<&mut Live>, StoreError> {
        let Some(live) = self.live_of_action(id.action).await? else { return Ok(None) };
        let pipeline = live.id();
        if live.attempt(id).is_none() {
            let Some(row) = self.store.attempt(id).await? else { return Ok(None) };
            if let Some(live) = self.live.get_mut(&pipeline) {
                live.remember_stale(row)?;
            }
        }
        Ok(self.live.get_mut(&pipeline))
    }

    fn adopt(&mut self, live: Live) {
        let id = live.id();
        self.by_action.extend(live.state.actions.iter().map(|action| (action.id, id)));
        self.live.insert(id, live);
    }

    fn drop_live(&mut self, id: PipelineId) {
        if let Some(live) = self.live.remove(&id) {
            for action in &live.state.actions {
                self.by_action.remove(&action.id);
            }
        }
    }

    /// Takes no memory for truth after a failed commit: the database is.
    fn forget(&mut self, ids: Vec<PipelineId>) {
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

/// The actions that a pending action waits for, as sentences.
fn waiting_for(pipeline: &Pipeline, action: &Action) -> Vec<String> {
    let needs = action.needs.iter().map(|need| &pipeline.actions[*need]);
    let unfinished = needs.filter(|need| need.outcome().is_none());
    unfinished.map(|need| format!("it needs `{}`, which is {}", need.name, need.state.as_str())).collect()
}

fn new_live(new: &NewPipeline, now_ms: i64) -> Live {
    let id = PipelineId::from_uuid(Uuid::now_v7());
    let mut state = Pipeline { id, round: 1, cancel_wished: false, actions: Vec::new() };
    let mut rows = Vec::new();
    for (ordinal, plan) in new.plan.actions.iter().enumerate() {
        let action = ActionId::from_uuid(Uuid::now_v7());
        state.actions.push(Action::pending(
            action,
            plan.name.clone(),
            plan.needs.clone(),
            plan.allow_failure.clone(),
        ));
        rows.push(actions::Model {
            id: action.as_uuid(),
            pipeline_id: id.as_uuid(),
            ordinal: i32::try_from(ordinal).unwrap_or(i32::MAX),
            name: plan.name.clone(),
            planned: serde_json::to_string(plan).unwrap_or_default(),
            state: "pending".into(),
            outcome: None,
            attempts: 0,
            attempts_in_round: 0,
            queued_at: None,
            started_at: None,
            finished_at: None,
        });
    }
    let pipeline = pipelines::Model {
        id: id.as_uuid(),
        number: 0,
        identity: new.identity.clone(),
        name: new.plan.name.clone(),
        repository: new.repository.clone(),
        repository_url: new.repository_url.clone(),
        event: new.event.as_str().into(),
        r#ref: new.r#ref.as_ref().map(ToString::to_string),
        revision: new.revision.to_string(),
        manifest_path: new.manifest_path.clone(),
        manifest: new.manifest.clone(),
        round: 1,
        cancel_wished: false,
        state: "queued".into(),
        outcome: None,
        epoch: 1,
        created_at: now_ms,
        finished_at: None,
    };
    Live {
        pipeline,
        actions: rows,
        plans: new.plan.actions.clone(),
        state,
        attempts: HashMap::new(),
        stale: HashMap::new(),
        commands: HashMap::new(),
        placed: HashMap::new(),
        touched: Instant::now(),
    }
}

fn refuse<T>(answer: oneshot::Sender<Result<T, Refusal>>, refusal: Refusal) {
    let _ = answer.send(Err(refusal)); // who asked may have gone away
}

fn fail<T>(answer: oneshot::Sender<Result<T, Refusal>>, error: &StoreError) {
    tracing::error!(error = %chain(error), "the database failed");
    refuse(answer, Refusal::NotRecorded);
}

/// An error with all its sources, for the log.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// The wall clock, for showing only.
fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
