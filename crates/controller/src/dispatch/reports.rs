//! Takes what agents say: claims, events and log chunks. Each is answered after the commit, whatever became of it.

use sealci_core::attempt::{Attempt, AttemptState, Claimant, JournalEntry, Recorded};
use sealci_core::ids::{AgentId, AttemptId, ClaimId, FencingToken, InstanceId};
use sealci_core::pipeline::{Granted, ReportRefusal};
use sealci_git::Credentials;
use sealci_proto::agent::{
    Ack, Claim, ClaimAnswer, ClaimGranted, ClaimRefused, Event, LogChunk, Renew, Renewed, claim_answer, event,
};
use sealci_proto::scheduler::{FromAgent, from_agent, to_agent};
use sealci_proto::{Malformed, attempt_id, log_range};

use super::commit::Transaction;
use super::driver::Driver;
use super::lines::{AgentStream, LineId};
use super::live::Live;
use super::places::{Place, Take};
use super::sealing;
use crate::store::StoreError;
use crate::store::entity::{commands, log_chunks};

/// Who sent something.
#[derive(Debug, Clone, Copy)]
struct Sender {
    stream: AgentStream,
    agent: AgentId,
    instance: InstanceId,
}

/// Why a report was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Driver {
    /// Takes one message of an agent.
    pub(super) async fn report(
        &mut self,
        line: LineId,
        from: FromAgent,
        packed: Option<Vec<u8>>,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let sender = Sender {
            stream: AgentStream { line, session: from.session },
            agent: from.agent_id.parse().map_err(Malformed::from)?,
            instance: from.instance_id.parse().map_err(Malformed::from)?,
        };
        match from.body.ok_or_else(|| Malformed::missing("from_agent.body"))? {
            from_agent::Body::Claim(claim) => self.claim(sender, claim, transaction).await,
            from_agent::Body::Renew(renew) => self.renew(sender, renew, transaction).await,
            from_agent::Body::Event(event) => self.event(sender, event, transaction).await,
            from_agent::Body::LogChunk(chunk) => {
                transaction.release(sender.stream, chunk.data.len());
                self.log_chunk(sender, chunk, packed, transaction).await
            }
        }
    }

    async fn claim(
        &mut self,
        sender: Sender,
        claim: Claim,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let id = attempt_id(&claim.attempt)?;
        let claim_id: ClaimId = claim.claim_id.parse().map_err(Malformed::from)?;
        let claimant = Claimant { claim: claim_id, agent: sender.agent, instance: sender.instance };
        let token = self.next_token().await?;
        let granted = match self.place_of_action(id.action, Take::IfDue).await? {
            // Its owner answers; the agent asks again.
            Place::Elsewhere => return Ok(()),
            Place::Nowhere => Err("there is no such action".to_owned()),
            Place::Here(live) => {
                transaction.check(live.id());
                match live.claim(id, claimant, token, transaction.now_ms) {
                    Ok(Granted::Now { token, touched }) => {
                        let source = source_to_fetch(live, id);
                        let keeps = uses_storage(live, id);
                        transaction.touch(live.id(), touched);
                        transaction.touch_attempt(live.id(), id);
                        self.token_is_used();
                        self.presence.heard(id, sender.stream.line, self.now);
                        Ok((token, source, keeps))
                    }
                    Ok(Granted::Before { token }) => {
                        Ok((token, source_to_fetch(live, id), uses_storage(live, id)))
                    }
                    Err(refusal) => Err(refusal.to_string()),
                }
            }
        };
        let answer = match granted {
            Ok((token, url, keeps)) => {
                let storage = keeps.then(|| self.config.storage.open_for(id, token));
                self.granted(sender.agent, token, url.as_deref(), storage.as_ref())
            }
            Err(reason) => refused(&reason),
        };
        let answer =
            ClaimAnswer { attempt: claim.attempt, claim_id: claim_id.to_string(), answer: Some(answer) };
        transaction.post.for_agent(sender.stream, to_agent::Body::ClaimAnswer(answer));
        Ok(())
    }

    /// The grant, with what opens the source and the storage for this agent alone.
    fn granted(
        &self,
        agent: AgentId,
        token: FencingToken,
        source_url: Option<&str>,
        storage: Option<&serde_json::Value>,
    ) -> claim_answer::Answer {
        let credentials = source_url.map_or(Credentials::None, |url| self.config.credentials.of(url));
        let sealed = sealing::sealed(&credentials, self.agents.public_key(agent));
        // The agent says what it lacks, where people see it.
        let sealed_credentials = sealed.unwrap_or_else(|error| {
            tracing::error!(agent.id = %agent, %error, "cannot hand over a repository's credentials");
            Vec::new()
        });
        let key = self.agents.public_key(agent);
        let sealed = storage.map_or(Ok(Vec::new()), |storage| sealing::sealed_json(storage, key));
        let sealed_storage = sealed.unwrap_or_else(|error| {
            tracing::error!(agent.id = %agent, %error, "cannot hand over the way to the storage");
            Vec::new()
        });
        let granted =
            ClaimGranted { token: token.0, sealed_credentials, sealed_storage, ..Default::default() };
        claim_answer::Answer::Granted(granted)
    }

    /// An exclusive attempt may go on as long as it is its action's. The answer waits for the commit like all others, which
    /// finds out, though it writes nothing, whether the pipeline is another replica's by now.
    async fn renew(
        &mut self,
        sender: Sender,
        renew: Renew,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let id = attempt_id(&renew.attempt)?;
        let token = FencingToken(renew.token);
        let Some(live) = self.place_of_attempt(id, Take::IfDue).await?.here() else { return Ok(()) };
        let is_current =
            live.current(id).is_some_and(|attempt| attempt.token == token && attempt.outcome().is_none());
        if is_current && is_claimants(live, id, sender) {
            transaction.check(live.id());
            self.presence.heard(id, sender.stream.line, self.now);
            let renewed = Renewed { attempt: renew.attempt, token: renew.token, number: renew.number };
            transaction.post.for_agent(sender.stream, to_agent::Body::Renewed(renewed));
        }
        Ok(())
    }

    async fn event(
        &mut self,
        sender: Sender,
        event: Event,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let id = attempt_id(&event.attempt)?;
        let token = FencingToken(event.token);
        let entry = JournalEntry::try_from(&event)?;
        let live = match self.place_of_attempt(id, Take::IfDue).await? {
            Place::Here(live) => live,
            Place::Elsewhere => return Ok(()),
            Place::Nowhere => {
                transaction.post.for_agent(sender.stream, unknown(id, token));
                return Ok(());
            }
        };
        if !is_claimants(live, id, sender) {
            return Ok(());
        }
        // Also where nothing new is recorded: the answer is from memory.
        transaction.acknowledge(sender.stream, live.id(), id, token);
        let recorded = match live.stale.get_mut(&id) {
            Some(stale) => stale.record_event(token, event.sequence, &entry).map_err(ReportRefusal::from),
            None => live.state.record_event(id.action, id.number, token, event.sequence, &entry).map(
                |(recorded, touched)| {
                    transaction.touch(live.id(), touched);
                    recorded
                },
            ),
        };
        match recorded {
            Ok(Recorded::Now) => {
                transaction.touch_attempt(live.id(), id);
                keep_details(live, id, &event, transaction);
                let is_over = live.attempt(id).is_none_or(Attempt::journal_ended);
                if is_over {
                    self.presence.forget(id);
                } else {
                    self.presence.heard(id, sender.stream.line, self.now);
                }
            }
            Ok(Recorded::Before) => {}
            Err(refusal) => note_refusal(sender, id, &refusal),
        }
        Ok(())
    }

    async fn log_chunk(
        &mut self,
        sender: Sender,
        chunk: LogChunk,
        packed: Option<Vec<u8>>,
        transaction: &mut Transaction,
    ) -> Result<(), ReportError> {
        let id = attempt_id(&chunk.attempt)?;
        let token = FencingToken(chunk.token);
        let to = log_range(&chunk)?.end;
        let live = match self.place_of_attempt(id, Take::IfDue).await? {
            Place::Here(live) => live,
            Place::Elsewhere => return Ok(()),
            Place::Nowhere => {
                transaction.post.for_agent(sender.stream, unknown(id, token));
                return Ok(());
            }
        };
        if !is_claimants(live, id, sender) {
            return Ok(());
        }
        // Also where nothing new is recorded: the answer is from memory.
        transaction.acknowledge(sender.stream, live.id(), id, token);
        let recorded = match live.stale.get_mut(&id) {
            Some(stale) => stale.record_log(token, chunk.offset, to).map_err(ReportRefusal::from),
            None => live.state.record_log(id.action, id.number, token, chunk.offset, to),
        };
        match recorded {
            Ok(Recorded::Now) => {
                transaction.touch_attempt(live.id(), id);
                transaction.log_grew(id);
                transaction.batch.log_chunks.push(log_chunks::Model {
                    action_id: id.action.as_uuid(),
                    number: small(id.number),
                    start: big(chunk.offset),
                    end: big(to),
                    data: packed,
                    gap: chunk.gap.map(|gap| gap.reason),
                });
                if live.attempt(id).is_some_and(|attempt| attempt.outcome().is_none()) {
                    self.presence.heard(id, sender.stream.line, self.now);
                }
            }
            Ok(Recorded::Before) => {}
            Err(refusal) => note_refusal(sender, id, &refusal),
        }
        Ok(())
    }
}

/// Whether the sender is the agent that claimed the attempt. Tokens are numbers that can be guessed; who sends is proved by
/// its credential. One that reports for another's attempt gets no answer.
fn is_claimants(live: &Live, id: AttemptId, sender: Sender) -> bool {
    let is_theirs = live.attempt(id).is_some_and(|attempt| attempt.claimant.agent == sender.agent);
    if !is_theirs {
        tracing::warn!(attempt.id = %id, agent.id = %sender.agent, "an agent reports for an attempt that is another's");
    }
    is_theirs
}

/// How far an attempt is recorded, for its agent. A token that is not the attempt's has nothing to report any more.
pub(super) fn acknowledgement(live: Option<&Live>, id: AttemptId, token: FencingToken) -> to_agent::Body {
    match live.and_then(|live| live.attempt(id)) {
        Some(attempt) if attempt.token == token => to_agent::Body::Ack(Ack {
            attempt: Some(id.into()),
            token: token.0,
            next_sequence: attempt.next_sequence,
            next_offset: attempt.log_end,
            fenced: attempt.fenced,
            closed: attempt.is_closed(),
        }),
        _ => unknown(id, token),
    }
}

/// The answer to one who reports for what we do not know: kill it, forget it.
pub(super) fn unknown(id: AttemptId, token: FencingToken) -> to_agent::Body {
    to_agent::Body::Ack(Ack {
        attempt: Some(id.into()),
        token: token.0,
        next_sequence: 0,
        next_offset: 0,
        fenced: true,
        closed: true,
    })
}

/// Where an attempt's source is to be fetched from, while it may still have to be.
fn source_to_fetch(live: &Live, id: AttemptId) -> Option<String> {
    let may_fetch = live.current(id).is_some_and(|attempt| attempt.state == AttemptState::Claimed);
    may_fetch.then(|| live.pipeline.repository_url.clone())
}

/// Whether an attempt keeps or brings anything.
fn uses_storage(live: &Live, id: AttemptId) -> bool {
    live.state.position(id.action).is_some_and(|index| live.plans[index].uses_storage())
}

fn refused(reason: &str) -> claim_answer::Answer {
    claim_answer::Answer::Refused(ClaimRefused { reason: reason.to_owned() })
}

fn note_refusal(sender: Sender, id: AttemptId, refusal: &ReportRefusal) {
    tracing::debug!(attempt.id = %id, agent.id = %sender.agent, %refusal, "a report was not recorded");
}

/// Keeps what an event tells for showing: times, the executor, each command's figures.
fn keep_details(live: &mut Live, id: AttemptId, event: &Event, transaction: &mut Transaction) {
    let at = big(event.at_unix_ms);
    let index_of_action = live.state.position(id.action).filter(|_| live.current(id).is_some());
    match &event.body {
        Some(event::Body::Running(running)) => {
            if let Some(row) = live.attempts.get_mut(&id) {
                row.started_at = Some(at);
                row.executor = Some(running.executor.clone());
            }
            if let Some(index) = index_of_action {
                live.actions[index].started_at = Some(at);
            }
        }
        Some(event::Body::CommandStarted(started)) => {
            let row = commands::Model {
                action_id: id.action.as_uuid(),
                number: small(id.number),
                index: small(started.index),
                log_offset: big(started.log_offset),
                log_end: None,
                exit_code: None,
                duration_us: None,
                cpu_user_us: None,
                cpu_system_us: None,
                memory_peak_bytes: None,
                read_bytes: None,
                write_bytes: None,
            };
            live.commands.insert((id, started.index), row.clone());
            transaction.batch.commands.insert((row.action_id, row.number, row.index), row);
        }
        Some(event::Body::CommandFinished(finished)) => {
            if let Some(mut row) = live.commands.remove(&(id, finished.index)) {
                let used = finished.resource_use.unwrap_or_default();
                row.log_end = Some(big(finished.log_offset));
                row.exit_code = Some(finished.exit_code);
                row.duration_us = Some(big(finished.duration_us));
                row.cpu_user_us = Some(big(used.cpu_user_us));
                row.cpu_system_us = Some(big(used.cpu_system_us));
                row.memory_peak_bytes = Some(big(used.memory_peak_bytes));
                row.read_bytes = Some(big(used.read_bytes));
                row.write_bytes = Some(big(used.write_bytes));
                transaction.batch.commands.insert((row.action_id, row.number, row.index), row);
            }
        }
        Some(event::Body::Finished(_)) => {
            if let Some(row) = live.attempts.get_mut(&id) {
                row.finished_at = Some(at);
            }
            transaction.log_grew(id);
        }
        None => {}
    }
}

/// A figure as a column holds it; one that is too large is shown as the largest.
fn big(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn small(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
