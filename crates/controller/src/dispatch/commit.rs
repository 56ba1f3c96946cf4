//! Commits what a round of inputs decided, and answers after it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sealci_core::ids::{AttemptId, FencingToken, PipelineId};
use sealci_core::pipeline::Touched;
use sealci_proto::scheduler::{controller_message, to_agent};
use sealci_service::problem::chain;

use super::driver::Driver;
use super::lines::{AgentStream, Post};
use super::live::{Dirty, Live};
use super::reports::acknowledgement;
use super::{Answer, Refusal, wants};
use crate::store::{Batch, StoreError};

/// What one commit does: what it writes, and whom it answers afterwards.
#[derive(Default)]
pub(super) struct Transaction {
    pub now_ms: i64,
    pub batch: Batch,
    pub dirty: BTreeMap<PipelineId, Dirty>,
    /// Pipelines whose wants are stated whole after the commit.
    pub restated: BTreeSet<PipelineId>,
    /// Pipelines that are said to be another replica's by now.
    pub taken: BTreeSet<PipelineId>,
    /// Pipelines made by this commit, by their identities.
    pub created: HashMap<String, PipelineId>,
    logs: BTreeSet<AttemptId>,
    acknowledgements: BTreeSet<(AgentStream, AttemptId, u64)>,
    released: BTreeMap<AgentStream, u64>,
    /// What is said to schedulers, and through them to agents, besides what is wanted.
    pub post: Post,
    /// Told whether the commit succeeded.
    after: Vec<Box<dyn FnOnce(bool) + Send>>,
}

impl std::fmt::Debug for Transaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Transaction").field("batch", &self.batch).finish_non_exhaustive()
    }
}

impl Transaction {
    /// Nothing yet. `now_ms` is the wall clock's time, for showing.
    pub fn at(now_ms: i64) -> Self {
        Self { now_ms, ..Self::default() }
    }

    pub fn touch(&mut self, pipeline: PipelineId, actions: Touched) {
        self.dirty.entry(pipeline).or_default().actions.extend(actions);
    }

    pub fn touch_attempt(&mut self, pipeline: PipelineId, attempt: AttemptId) {
        self.dirty.entry(pipeline).or_default().attempts.insert(attempt);
    }

    pub fn log_grew(&mut self, attempt: AttemptId) {
        self.logs.insert(attempt);
    }

    /// Has the commit find out, though it may write nothing of it, whether a pipeline is this replica's still: what is said of
    /// it from memory is else what it was before another one took it over.
    pub fn check(&mut self, pipeline: PipelineId) {
        self.dirty.entry(pipeline).or_default();
    }

    /// Asks for one cumulative acknowledgement after the commit, however many writes it covers.
    pub fn acknowledge(
        &mut self,
        stream: AgentStream,
        pipeline: PipelineId,
        attempt: AttemptId,
        token: FencingToken,
    ) {
        self.check(pipeline);
        self.acknowledgements.insert((stream, attempt, token.0));
    }

    pub fn release(&mut self, stream: AgentStream, bytes: usize) {
        *self.released.entry(stream).or_default() += bytes as u64;
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
    /// Commits, then answers; or, if the commit failed, forgets what it changed in memory.
    pub(super) async fn finish(&mut self, mut transaction: Transaction) {
        let taken = std::mem::take(&mut transaction.taken);
        self.commit(transaction).await;
        for id in taken {
            self.taken(id);
            // This replica may have taken it back since: the next tick looks.
            self.forgotten.insert(id);
        }
    }

    async fn commit(&mut self, mut transaction: Transaction) {
        let mut moved = Vec::new();
        for (id, dirty) in &transaction.dirty {
            if let Some(live) = self.live.get_mut(id) {
                live.touched = self.now;
                moved.push((*id, live.write(dirty, transaction.now_ms, &mut transaction.batch)));
            }
        }
        transaction.batch.held = self.held(transaction.dirty.keys().copied());
        if let Err(error) = self.store.commit(&mut transaction.batch).await {
            match &error {
                StoreError::TakenOver => {
                    tracing::info!("a commit came too late: its pipelines are another replica's")
                }
                StoreError::LeaseLost => self.lease_is_lost().await,
                _ => tracing::error!(error = %chain(&error), "a commit failed; nothing of it was answered"),
            }
            self.forget(transaction.dirty.keys().copied().collect());
            // Schedulers may have been told of what is not: a new line starts with what is.
            self.give_lines_up();
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
        let mut post = transaction.post;
        for (id, actions) in moved {
            let Some(live) = self.live.get(&id) else { continue };
            if transaction.restated.contains(&id) {
                post.for_all(controller_message::Body::Wants(wants::complete(live, &self.config)));
            } else if !actions.is_empty() {
                post.for_all(controller_message::Body::Wants(wants::changed(live, actions, &self.config)));
            }
        }
        for (stream, id, token) in transaction.acknowledgements {
            let live = self.by_action.get(&id.action).and_then(|pipeline| self.live.get(pipeline));
            post.for_agent(stream, acknowledgement(live, id, FencingToken(token)));
        }
        for (stream, bytes) in transaction.released {
            post.for_agent(stream, to_agent::Body::ReleasedBytes(bytes));
        }
        self.send(post);
        transaction.after.into_iter().for_each(|after| after(true));
        for id in transaction.dirty.keys() {
            self.watchers.pipelines.wake(id);
            if self.live.get(id).is_some_and(Live::is_settled) {
                self.drop_live(*id);
            }
        }
        for id in transaction.logs {
            self.watchers.logs.wake(&id);
            if has_whole_log(&transaction.batch, id) {
                self.config.storage.log_is_whole(id, self.now);
            }
        }
    }
}

/// Whether a batch makes an attempt's log whole, and there is something in it.
fn has_whole_log(batch: &Batch, id: AttemptId) -> bool {
    let key = (id.action.as_uuid(), i32::try_from(id.number).unwrap_or(i32::MAX));
    batch.attempts.get(&key).is_some_and(|row| row.log_end > 0 && row.log_length == Some(row.log_end))
}
