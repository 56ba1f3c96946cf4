//! Knows the agents that exist: enrols them, tells the scheduler of them, and hears from it what they hold.

use std::collections::BTreeMap;

use sealci_core::ids::{AgentId, FencingToken, InstanceId};
use sealci_proto::agent::{HeldAttempt, HeldState};
use sealci_proto::scheduler::{
    AgentState, Directory, DirectoryEntry, EnrolAnswer, EnrolQuestion, EnrolRefusal, controller_message,
};
use sealci_proto::{Malformed, attempt_id};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::commit::Transaction;
use super::driver::Driver;
use super::lines::{AgentStream, LineId};
use super::places::{Place, Take};
use super::reports::{ReportError, unknown};
use super::{AgentView, Answer, Refusal};
use crate::store::StoreError;
use crate::store::entity::{agent_instances, agents};

/// A name that people see has at most so many bytes.
const MAX_NAME_BYTES: usize = 128;

/// The agents' rows, with what the commit under way changes.
#[derive(Debug)]
pub(super) struct AgentBook {
    kept: BTreeMap<AgentId, agents::Model>,
    changed: BTreeMap<AgentId, agents::Model>,
}

/// What becomes of an agent's row.
enum Change {
    New,
    Instance,
    Drained,
}

impl AgentBook {
    pub fn new(rows: Vec<agents::Model>) -> Self {
        let kept = rows.into_iter().map(|row| (AgentId::from_uuid(row.id), row)).collect();
        Self { kept, changed: BTreeMap::new() }
    }

    fn row(&self, id: AgentId) -> Option<&agents::Model> {
        self.changed.get(&id).or_else(|| self.kept.get(&id))
    }

    /// The agent's name; its id if it has none.
    pub fn name(&self, id: AgentId) -> String {
        self.row(id).map_or_else(|| id.to_string(), |row| row.name.clone())
    }

    /// All agents, for a scheduler that knows none.
    pub fn complete_directory(&self) -> Directory {
        Directory { complete: true, agents: self.kept.values().map(entry).collect() }
    }

    /// What is meant for an agent alone is sealed to this key.
    pub fn public_key(&self, id: AgentId) -> Option<[u8; 32]> {
        self.row(id)?.public_key.as_slice().try_into().ok()
    }

    /// The commit succeeded.
    pub fn keep_changes(&mut self) {
        self.kept.append(&mut self.changed);
    }

    /// The commit failed.
    pub fn forget_changes(&mut self) {
        self.changed.clear();
    }

    /// Takes the rows as the database has them; what is new of them, for a scheduler that knows the others.
    fn replace(&mut self, rows: Vec<agents::Model>) -> Option<Directory> {
        let rows: BTreeMap<_, _> = rows.into_iter().map(|row| (AgentId::from_uuid(row.id), row)).collect();
        let is_new = |(id, row): &(&AgentId, &agents::Model)| self.kept.get(id) != Some(*row);
        let agents: Vec<_> = rows.iter().filter(is_new).map(|(_, row)| entry(row)).collect();
        self.kept = rows;
        (!agents.is_empty()).then_some(Directory { complete: false, agents })
    }

    fn change(&mut self, row: agents::Model, change: Change, transaction: &mut Transaction) {
        let directory = Directory { complete: false, agents: vec![entry(&row)] };
        transaction.post.for_all(controller_message::Body::Directory(directory));
        match change {
            Change::New => drop(transaction.batch.new_agents.insert(row.id, row.clone())),
            Change::Drained => drop(transaction.batch.drained.insert(row.id, row.drained)),
            // Its row in `agent_instances` says so.
            Change::Instance => {}
        }
        self.changed.insert(AgentId::from_uuid(row.id), row);
    }
}

fn entry(row: &agents::Model) -> DirectoryEntry {
    DirectoryEntry {
        agent_id: row.id.to_string(),
        name: row.name.clone(),
        credential_sha256: row.credential_sha256.clone(),
        current_instance_id: row.current_instance.map(|id| id.to_string()).unwrap_or_default(),
        drained: row.drained,
        removed: false,
    }
}

impl Driver {
    /// Lets an agent in, or says why not. A repeat is answered the same.
    pub(super) fn enrol(&mut self, line: LineId, question: EnrolQuestion, transaction: &mut Transaction) {
        let refused = match self.enrolled_row(&question, transaction.now_ms) {
            Ok(Some(row)) => {
                tracing::info!(agent.id = %row.id, agent.name = row.name, "an agent is enrolled");
                self.agents.change(row, Change::New, transaction);
                None
            }
            Ok(None) => None,
            Err(refused) => Some(refused),
        };
        let (refusal, reason) = refused.unwrap_or((EnrolRefusal::Unspecified, ""));
        let answer = EnrolAnswer {
            request: question.request,
            refused_because: reason.to_owned(),
            refusal: refusal.into(),
        };
        transaction.post.for_one(line, controller_message::Body::EnrolAnswer(answer));
    }

    /// The row to be written; none if it stands already.
    fn enrolled_row(
        &self,
        question: &EnrolQuestion,
        now_ms: i64,
    ) -> Result<Option<agents::Model>, (EnrolRefusal, &'static str)> {
        let enrol = question.enrol.as_ref().ok_or((EnrolRefusal::Invalid, "the request is empty"))?;
        let digest: [u8; 32] = Sha256::digest(enrol.token.as_bytes()).into();
        // Digests of secrets may be compared in any time: they tell nothing of what they are made of.
        if !self.config.enrolment_tokens.contains(&digest) {
            return Err((EnrolRefusal::Unauthenticated, "the enrolment token is unknown or revoked"));
        }
        let id: AgentId =
            enrol.agent_id.parse().map_err(|_| (EnrolRefusal::Invalid, "the agent id is no UUID"))?;
        if enrol.credential.len() != 32 || enrol.public_key.len() != 32 {
            return Err((EnrolRefusal::Invalid, "credential and public key have 32 bytes each"));
        }
        if enrol.name.is_empty()
            || enrol.name.len() > MAX_NAME_BYTES
            || enrol.name.chars().any(char::is_control)
        {
            return Err((EnrolRefusal::Invalid, "a name has 1 to 128 bytes and no control characters"));
        }
        let credential_sha256 = Sha256::digest(&enrol.credential).to_vec();
        match self.agents.row(id) {
            Some(row) if row.credential_sha256 == credential_sha256 && row.public_key == enrol.public_key => {
                Ok(None)
            }
            Some(_) => Err((EnrolRefusal::AlreadyExists, "the agent id is taken")),
            None => Ok(Some(agents::Model {
                id: id.as_uuid(),
                name: enrol.name.clone(),
                credential_sha256,
                public_key: enrol.public_key.clone(),
                current_instance: None,
                drained: false,
                created_at: now_ms,
            })),
        }
    }

    /// Takes a scheduler's word on an agent: who it is, what it holds.
    pub(super) async fn agent_state(
        &mut self,
        line: LineId,
        state: AgentState,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let id: AgentId = state.agent_id.parse().map_err(Malformed::from)?;
        let instance: InstanceId = state.instance_id.parse().map_err(Malformed::from)?;
        let stream = AgentStream { line, session: state.session };
        if state.connected {
            self.note_instance(id, instance.as_uuid(), transaction).await?;
            // What it said while no controller was there is lost: it hears where each attempt stands, and says the rest again.
            let is_first_word = self.presence.is_first_word(id, stream);
            for held in &state.held {
                self.note_held(stream, held, is_first_word, transaction).await?;
            }
        }
        self.presence.agent_state(id, stream, state);
        Ok(())
    }

    /// Takes up what other replicas have changed.
    pub(super) async fn read_agents(&mut self, transaction: &mut Transaction) -> Result<(), StoreError> {
        let news = self.agents.replace(self.store.agents().await?);
        news.into_iter().for_each(|news| transaction.post.for_all(controller_message::Body::Directory(news)));
        Ok(())
    }

    /// The instance that is first seen last gets the new work.
    async fn note_instance(
        &mut self,
        id: AgentId,
        instance: Uuid,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let Some(row) = self.agents.row(id) else { return Ok(()) };
        let is_current = row.current_instance == Some(instance);
        let is_noted = transaction.batch.agent_instances.iter().any(|row| row.id == instance);
        if is_current || is_noted || self.store.instance_was_seen(instance).await? {
            return Ok(());
        }
        let row = agents::Model { current_instance: Some(instance), ..row.clone() };
        transaction.batch.agent_instances.push(agent_instances::Model {
            id: instance,
            agent_id: id.as_uuid(),
            seen_at: transaction.now_ms,
        });
        self.agents.change(row, Change::Instance, transaction);
        Ok(())
    }

    /// What an agent says it holds is heard of; what it holds in vain it is told to end. With its first word it is told how
    /// far each is recorded.
    async fn note_held(
        &mut self,
        stream: AgentStream,
        held: &HeldAttempt,
        is_first_word: bool,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        if held.token == 0 {
            return Ok(());
        }
        let id = attempt_id(&held.attempt)?;
        let token = FencingToken(held.token);
        let is_finished = held.state() == HeldState::Finished;
        let live = match self.place_of_attempt(id, Take::Never).await? {
            Place::Here(live) => live,
            Place::Elsewhere => return Ok(()),
            Place::Nowhere => {
                if is_first_word || !is_finished {
                    transaction.post.for_agent(stream, unknown(id, token));
                }
                return Ok(());
            }
        };
        let is_wanted =
            live.current(id).is_some_and(|attempt| attempt.token == token && attempt.outcome().is_none());
        if is_first_word || !(is_wanted || is_finished) {
            transaction.acknowledge(stream, live.id(), id, token);
        }
        if is_wanted {
            self.presence.heard(id, stream.line, self.now);
        }
        Ok(())
    }

    /// Gives an agent no new work, or gives it work again.
    pub(super) fn drain(
        &mut self,
        id: AgentId,
        drained: bool,
        answer: Answer<AgentView>,
        transaction: &mut Transaction,
    ) {
        let Some(row) = self.agents.row(id) else {
            let _ = answer.send(Err(Refusal::UnknownAgent)); // who asked may have gone away
            return;
        };
        let row = agents::Model { drained, ..row.clone() };
        let view = AgentView { row: row.clone(), state: self.presence.agent(id).cloned() };
        self.agents.change(row, Change::Drained, transaction);
        transaction.reply(answer, view);
    }

    /// All agents, by name.
    pub(super) fn agent_views(&self) -> Vec<AgentView> {
        let mut views: Vec<AgentView> = self
            .agents
            .kept
            .iter()
            .map(|(id, row)| AgentView { row: row.clone(), state: self.presence.agent(*id).cloned() })
            .collect();
        views.sort_by(|one, other| (&one.row.name, one.row.id).cmp(&(&other.row.name, other.row.id)));
        views
    }
}
