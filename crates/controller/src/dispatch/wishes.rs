//! Takes what people and the monitor wish: new pipelines, ends, and new rounds.

use std::collections::HashMap;
use std::time::Instant;

use sealci_core::ids::{ActionId, PipelineId, ReplicaId};
use sealci_core::pipeline::{Action, Pipeline, RerunScope};
use uuid::Uuid;

use super::commit::Transaction;
use super::driver::Driver;
use super::live::{Dirty, Live};
use super::{Created, NewPipeline, Refusal};
use crate::store::StoreError;
use crate::store::entity::{actions, pipelines, rounds};

impl Driver {
    pub(super) async fn create(
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
        let mut live = new_live(&new, self.replica.id(), (self.now, transaction.now_ms));
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

    pub(super) async fn cancel(
        &mut self,
        id: PipelineId,
        transaction: &mut Transaction,
    ) -> Result<Option<()>, StoreError> {
        let Some(live) = self.own(id).await? else { return Ok(None) };
        let touched = live.state.cancel();
        let dirty = transaction.dirty.entry(id).or_default();
        dirty.pipeline = true;
        dirty.actions.extend(touched);
        transaction.restated.insert(id);
        Ok(Some(()))
    }

    pub(super) async fn rerun(
        &mut self,
        id: PipelineId,
        scope: RerunScope,
        request: String,
        transaction: &mut Transaction,
    ) -> Result<Result<(), Refusal>, StoreError> {
        // Owned first: then no other replica opens a round for the same request.
        if self.own(id).await?.is_none() {
            return Ok(Err(Refusal::UnknownPipeline));
        }
        if self.store.round_of_request(id, &request).await?.is_some() {
            return Ok(Ok(()));
        }
        let repeated = |row: &rounds::Model| row.pipeline_id == id.as_uuid() && row.request_id == request;
        if transaction.batch.rounds.iter().any(repeated) {
            return Ok(Ok(()));
        }
        let Some(live) = self.live.get_mut(&id) else { return Ok(Err(Refusal::UnknownPipeline)) };
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
}

fn new_live(new: &NewPipeline, owner: ReplicaId, (now, now_ms): (Instant, i64)) -> Live {
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
            plan.rules(),
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
            retries_in_round: 0,
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
        owner: owner.as_uuid(),
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
        touched: now,
    }
}
