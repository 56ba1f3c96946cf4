//! Knows what is to be said on one stream next, and what was said back. It does no I/O but reads of the spool.
//!
//! Nothing is queued: what is to be said follows from flags, sets of attempts and cursors, so a slow stream costs no
//! memory, and what changes twice is said once. Control messages go before events, events before log.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealci_core::ids::AttemptId;
use sealci_proto::agent::{
    self, AgentMessage, DesiredNumber, HeldState, SchedulerMessage, agent_message, claim_answer,
    scheduler_message,
};
use sealci_proto::{Malformed, PROTOCOLS, attempt_id};
use tokio::task::JoinSet;

use crate::agent::Agent;
use crate::delivery::{Cursor, ResendRules};
use crate::lease::{self, Leases};
use crate::reconcile::{self, Decision};
use crate::spool::{AttemptSpool, Piece, ReadPlace, failpoint};

/// As much log as one message carries.
const MESSAGE_LOG_BYTES: usize = 256 << 10;

/// When things are said again.
#[derive(Debug, Clone, Copy)]
pub struct Rhythm {
    pub resend: ResendRules,
    /// A claim that is not answered is asked again after so long.
    pub claim_again: Duration,
    /// Until `Welcome` says otherwise.
    pub held_interval: Duration,
}

/// A piece of log that is read and waits for credit.
struct Ready {
    attempt: AttemptId,
    piece: Piece,
}

/// The agent's side of one stream.
pub struct Stream {
    rhythm: Rhythm,
    welcomed: bool,
    held_interval: Duration,
    held_due: bool,
    held_at: Instant,
    /// The highest number heard.
    answers: Option<DesiredNumber>,
    /// The states as they were last told.
    told: BTreeMap<AttemptId, HeldState>,
    /// Why nothing new is taken, as it was last told.
    refusal_told: Option<String>,
    superseded: Option<String>,
    claims_due: BTreeSet<AttemptId>,
    claims_asked: BTreeMap<AttemptId, Instant>,
    leases: Leases,
    cursors: BTreeMap<AttemptId, Cursor>,
    events_due: BTreeSet<AttemptId>,
    log_due: BTreeSet<AttemptId>,
    /// Whose log was sent last: the next one's turn is next.
    log_turn: Option<AttemptId>,
    places: BTreeMap<AttemptId, ReadPlace>,
    reads: JoinSet<(AttemptId, ReadPlace, Option<Piece>)>,
    ready: Option<Ready>,
    credit_bytes: u64,
}

impl Stream {
    /// Begins a stream. Its first words are `Hello` and `Held`: a scheduler may answer nothing until it has both.
    pub fn open(agent: &mut Agent, rhythm: Rhythm, version: &str, now: Instant) -> (Self, Vec<AgentMessage>) {
        agent.look_for_room(now);
        let refusal = agent.refusal(None);
        let hello = agent::Hello {
            protocol_min: PROTOCOLS.min,
            protocol_max: PROTOCOLS.max,
            instance_id: agent.spool.instance().to_string(),
            version: version.to_owned(),
            offer: Some(agent.offering.offer(refusal.as_deref())),
        };
        let mut stream = Self::new(agent, rhythm, refusal, now);
        let hello = AgentMessage { body: Some(agent_message::Body::Hello(hello)) };
        let first = std::iter::once(hello).chain(stream.next_message(agent, now)).collect();
        (stream, first)
    }

    fn new(agent: &Agent, rhythm: Rhythm, refusal_told: Option<String>, now: Instant) -> Self {
        let mut stream = Self {
            rhythm,
            welcomed: false,
            held_interval: rhythm.held_interval,
            held_due: true,
            held_at: now,
            answers: None,
            told: BTreeMap::new(),
            refusal_told,
            superseded: None,
            claims_due: BTreeSet::new(),
            claims_asked: BTreeMap::new(),
            leases: Leases::default(),
            cursors: BTreeMap::new(),
            events_due: BTreeSet::new(),
            log_due: BTreeSet::new(),
            log_turn: None,
            places: BTreeMap::new(),
            reads: JoinSet::new(),
            ready: None,
            credit_bytes: 0,
        };
        for id in agent.ids() {
            stream.noticed(agent, id, now);
        }
        stream
    }

    pub fn is_welcomed(&self) -> bool {
        self.welcomed
    }

    /// An attempt has something new: finds out what.
    pub fn noticed(&mut self, agent: &Agent, id: AttemptId, now: Instant) {
        let state = agent.state(id);
        if self.told.get(&id).copied() != state {
            self.held_due = true;
        }
        let (Some(attempt), Some(state)) = (agent.attempt(id), state) else { return self.gone(id) };
        if agent.is_settled(id) {
            return self.gone(id);
        }
        if state == HeldState::Assigned {
            if !self.claims_asked.contains_key(&id) {
                self.claims_due.insert(id);
            }
            return;
        }
        self.claims_due.remove(&id);
        self.claims_asked.remove(&id);
        match agent.lease(id).filter(|_| state != HeldState::Finished) {
            Some(length) => self.leases.keep(id, length, now),
            None => self.leases.forget(id),
        }
        let cursor = self.cursors.entry(id).or_insert_with(|| Cursor::new(attempt.acked(), now));
        if cursor.next_sequence() < attempt.next_sequence() {
            self.events_due.insert(id);
        }
        if cursor.next_offset() < attempt.log.sendable_end() {
            self.log_due.insert(id);
        }
    }

    /// Nothing of the attempt is to be said any more.
    fn gone(&mut self, id: AttemptId) {
        self.claims_due.remove(&id);
        self.claims_asked.remove(&id);
        self.leases.forget(id);
        self.cursors.remove(&id);
        self.events_due.remove(&id);
        self.log_due.remove(&id);
        self.places.remove(&id);
        if self.ready.as_ref().is_some_and(|ready| ready.attempt == id) {
            self.ready = None;
        }
    }

    /// Time has passed: finds out what is due for it.
    pub fn ticked(&mut self, agent: &mut Agent, now: Instant) {
        if now.saturating_duration_since(self.held_at) >= self.held_interval {
            self.held_due = true;
        }
        let claim_again = self.rhythm.claim_again;
        for (id, asked_at) in &mut self.claims_asked {
            if now.saturating_duration_since(*asked_at) >= claim_again {
                *asked_at = now;
                self.claims_due.insert(*id);
            }
        }
        let rules = self.rhythm.resend;
        let rewound: Vec<_> = (self.cursors.iter_mut())
            .filter_map(|(id, cursor)| cursor.rewind_if_due(&rules, now).then_some(*id))
            .collect();
        for id in rewound {
            tracing::debug!(attempt.id = %id, "unacknowledged; sending again");
            self.noticed(agent, id, now);
        }
        agent.look_for_room(now);
    }

    // ---- what is said --------------------------------------------------------------------------------------------

    /// The next message; none while there is nothing to say.
    pub fn next_message(&mut self, agent: &Agent, now: Instant) -> Option<AgentMessage> {
        let body = self
            .next_held(agent, now)
            .or_else(|| self.next_control(agent, now))
            .or_else(|| self.next_event(agent, now))
            .or_else(|| self.next_log(agent, now))?;
        Some(AgentMessage { body: Some(body) })
    }

    fn next_held(&mut self, agent: &Agent, now: Instant) -> Option<agent_message::Body> {
        if !std::mem::take(&mut self.held_due) {
            return None;
        }
        self.held_at = now;
        let attempts = agent.held();
        self.told = agent.ids().into_iter().filter_map(|id| Some((id, agent.state(id)?))).collect();
        Some(agent_message::Body::Held(agent::Held { answers: self.answers, attempts }))
    }

    fn next_control(&mut self, agent: &Agent, now: Instant) -> Option<agent_message::Body> {
        if !self.welcomed {
            return None;
        }
        let refusal = agent.refusal(self.superseded.as_deref());
        if refusal != self.refusal_told {
            let offer = agent.offering.offer(refusal.as_deref());
            self.refusal_told = refusal;
            return Some(agent_message::Body::Offer(offer));
        }
        while let Some((id, number)) = self.leases.next_question(now, lease::boot_time()) {
            if let Some(attempt) = agent.attempt(id) {
                let token = attempt.token().unwrap_or_default();
                let renew = agent::Renew { attempt: Some(id.into()), token, number };
                return Some(agent_message::Body::Renew(renew));
            }
        }
        while let Some(id) = self.claims_due.pop_first() {
            if let Some(attempt) = agent.attempt(id) {
                self.claims_asked.insert(id, now);
                let claim_id = attempt.claim_id().to_string();
                return Some(agent_message::Body::Claim(agent::Claim { attempt: Some(id.into()), claim_id }));
            }
        }
        None
    }

    fn next_event(&mut self, agent: &Agent, now: Instant) -> Option<agent_message::Body> {
        if !self.welcomed {
            return None;
        }
        while let Some(id) = self.events_due.first().copied() {
            if let (Some(attempt), Some(cursor)) = (agent.attempt(id), self.cursors.get_mut(&id))
                && let Some(event) = attempt.event(cursor.next_sequence())
            {
                cursor.sent_event(now);
                return Some(agent_message::Body::Event(event));
            }
            self.events_due.remove(&id);
        }
        None
    }

    fn next_log(&mut self, agent: &Agent, now: Instant) -> Option<agent_message::Body> {
        self.fetch_log(agent);
        let Ready { attempt: id, piece } = self.ready.take()?;
        let (piece, rest) = within_credit(piece, self.credit_bytes);
        self.ready = rest.map(|piece| Ready { attempt: id, piece });
        let piece = piece?;
        let attempt = agent.attempt(id)?;
        self.cursors.get_mut(&id)?.sent_log(piece.to(), now);
        let mut chunk = agent::LogChunk {
            attempt: Some(id.into()),
            token: attempt.token().unwrap_or_default(),
            offset: piece.from(),
            ..agent::LogChunk::default()
        };
        match piece {
            Piece::Data { bytes, .. } => {
                self.credit_bytes = self.credit_bytes.saturating_sub(bytes.len() as u64);
                chunk.data = bytes;
            }
            Piece::Gap { to, reason, .. } => chunk.gap = Some(agent::LogGap { to, reason }),
        }
        Some(agent_message::Body::LogChunk(chunk))
    }

    /// Has the next piece of log read, from memory or, in the background, from disk; one at a time.
    fn fetch_log(&mut self, agent: &Agent) {
        if self.ready.as_ref().is_some_and(|ready| !self.is_next(ready.attempt, &ready.piece)) {
            self.ready = None;
        }
        if !self.welcomed || self.credit_bytes == 0 || self.ready.is_some() || !self.reads.is_empty() {
            return;
        }
        while let Some(id) = self.next_turn() {
            let found = agent.attempt(id).zip(self.cursors.get(&id));
            let Some((attempt, offset)) = found.map(|(attempt, cursor)| (attempt, cursor.next_offset()))
            else {
                self.log_due.remove(&id);
                continue;
            };
            if offset >= attempt.log.sendable_end() {
                self.log_due.remove(&id);
                continue;
            }
            self.log_turn = Some(id);
            if let Some(piece) = attempt.log.read_window(offset, MESSAGE_LOG_BYTES) {
                self.ready = Some(Ready { attempt: id, piece });
            } else {
                self.read_disk(attempt, offset);
            }
            return;
        }
    }

    fn read_disk(&mut self, attempt: &Arc<AttemptSpool>, offset: u64) {
        let (id, attempt) = (attempt.id(), attempt.clone());
        let mut place = self.places.remove(&id).unwrap_or_default();
        self.reads.spawn_blocking(move || {
            let piece = attempt.log.read_disk(&mut place, offset, MESSAGE_LOG_BYTES);
            (id, place, piece)
        });
    }

    /// Whose log comes next: attempts take turns.
    fn next_turn(&self) -> Option<AttemptId> {
        let after = self.log_turn.map_or(Bound::Unbounded, Bound::Excluded);
        self.log_due.range((after, Bound::Unbounded)).next().or_else(|| self.log_due.first()).copied()
    }

    /// Whether a piece is what its attempt's cursor waits for; an acknowledgement may have moved that.
    fn is_next(&self, id: AttemptId, piece: &Piece) -> bool {
        self.cursors.get(&id).is_some_and(|cursor| cursor.next_offset() == piece.from())
    }

    /// Whether a read from disk is under way.
    #[cfg(feature = "testing")]
    pub fn is_reading(&self) -> bool {
        !self.reads.is_empty()
    }

    /// Waits for a read from disk. Never comes back while there is none.
    pub async fn read(&mut self) {
        match self.reads.join_next().await {
            Some(Ok((id, place, piece))) => {
                if self.cursors.contains_key(&id) {
                    self.places.insert(id, place);
                }
                self.ready =
                    piece.filter(|piece| self.is_next(id, piece)).map(|piece| Ready { attempt: id, piece });
            }
            Some(Err(error)) => tracing::error!(%error, "cannot read the spool"),
            None => std::future::pending().await,
        }
    }

    // ---- what is heard -------------------------------------------------------------------------------------------

    /// Takes in what the scheduler says.
    pub fn heard(
        &mut self,
        agent: &mut Agent,
        message: SchedulerMessage,
        now: Instant,
    ) -> Result<(), Malformed> {
        use scheduler_message::Body;
        match message.body {
            Some(Body::Welcome(welcome)) => self.heard_welcome(&welcome)?,
            Some(Body::Desired(desired)) => self.heard_desired(agent, desired, now)?,
            Some(Body::ClaimAnswer(answer)) => self.heard_answer(agent, answer, now)?,
            Some(Body::Ack(ack)) => self.heard_ack(agent, &ack, now)?,
            Some(Body::Renewed(renewed)) => self.heard_renewed(agent, &renewed)?,
            Some(Body::Credit(credit)) => {
                self.credit_bytes = self.credit_bytes.saturating_add(credit.bytes);
            }
            Some(Body::Superseded(superseded)) => self.heard_superseded(agent, superseded.reason, now),
            // Said by a newer scheduler; what it wants is level-triggered and will be said otherwise.
            None => tracing::debug!("a message of a kind this agent does not know"),
        }
        Ok(())
    }

    fn heard_welcome(&mut self, welcome: &agent::Welcome) -> Result<(), Malformed> {
        if !PROTOCOLS.contains(welcome.protocol) {
            let (theirs, ours) = (welcome.protocol, PROTOCOLS);
            return Err(Malformed(format!(
                "the scheduler chose version {theirs} of the protocol, this agent speaks {ours}"
            )));
        }
        tracing::info!(
            scheduler.incarnation = welcome.incarnation,
            scheduler.stream = welcome.stream,
            "the scheduler knows this agent"
        );
        self.welcomed = true;
        if welcome.held_interval_ms > 0 {
            // A little sooner than asked, so that a slow moment is no silence.
            self.held_interval = Duration::from_millis(welcome.held_interval_ms) * 9 / 10;
        }
        Ok(())
    }

    fn heard_desired(
        &mut self,
        agent: &mut Agent,
        desired: agent::Desired,
        now: Instant,
    ) -> Result<(), Malformed> {
        let number = desired.number.ok_or_else(|| Malformed::missing("desired.number"))?;
        for entry in desired.entries {
            let (Ok(id), Some(wish)) = (attempt_id(&entry.attempt), entry.wish) else {
                tracing::warn!("a desired entry cannot be understood and is left out");
                continue;
            };
            let takes_new = agent.takes_new(self.superseded.as_deref(), now);
            match reconcile::decide(&wish, agent.state(id), takes_new) {
                Decision::TakeOn => {
                    if let agent::desired_entry::Wish::Run(run) = &wish {
                        agent.take_on(id, run, now);
                    }
                }
                Decision::AskAgain => {
                    self.claims_due.insert(id);
                }
                Decision::Cancel { grace } => agent.cancel(id, grace),
                Decision::Forget => agent.forget(id),
                Decision::ForgetUnasked if !self.claims_asked.contains_key(&id) => agent.forget(id),
                Decision::ForgetUnasked | Decision::Leave => {}
            }
            self.noticed(agent, id, now);
        }
        if self.answers.is_none_or(|before| before.counter <= number.counter) {
            self.answers = Some(number);
        }
        self.held_due = true;
        Ok(())
    }

    fn heard_answer(
        &mut self,
        agent: &mut Agent,
        answer: agent::ClaimAnswer,
        now: Instant,
    ) -> Result<(), Malformed> {
        let id = attempt_id(&answer.attempt)?;
        let ours = agent.attempt(id).is_some_and(|attempt| attempt.claim_id().to_string() == answer.claim_id);
        if !ours || agent.state(id) != Some(HeldState::Assigned) {
            return Ok(());
        }
        match answer.answer {
            Some(claim_answer::Answer::Granted(granted)) if granted.token != 0 => {
                self.claims_due.remove(&id);
                self.claims_asked.remove(&id);
                agent.grant(id, granted);
            }
            Some(claim_answer::Answer::Refused(refused)) => {
                tracing::info!(attempt.id = %id, reason = refused.reason, "the claim is refused");
                agent.forget(id);
                self.noticed(agent, id, now);
            }
            _ => return Err(Malformed::missing("claim_answer.answer")),
        }
        Ok(())
    }

    fn heard_ack(&mut self, agent: &mut Agent, ack: &agent::Ack, now: Instant) -> Result<(), Malformed> {
        let id = attempt_id(&ack.attempt)?;
        let Some(attempt) = agent.attempt(id).filter(|attempt| attempt.token() == Some(ack.token)) else {
            return Ok(());
        };
        if let Some(cursor) = self.cursors.get_mut(&id) {
            cursor.acknowledged(ack.next_sequence, ack.next_offset, now);
        }
        let done = attempt.acknowledge(ack.next_sequence, ack.next_offset);
        if !done.is_empty() {
            agent.removals.spawn_blocking(move || remove(done));
        }
        if ack.fenced {
            agent.fence(id);
        }
        if ack.closed {
            match agent.state(id) {
                Some(HeldState::Finished) => agent.settle(id),
                // Nobody wants the rest of it: it is not even to finish.
                _ => agent.forget(id),
            }
        }
        self.noticed(agent, id, now);
        Ok(())
    }

    fn heard_renewed(&mut self, agent: &Agent, renewed: &agent::Renewed) -> Result<(), Malformed> {
        let id = attempt_id(&renewed.attempt)?;
        let is_ours = agent.attempt(id).is_some_and(|attempt| attempt.token() == Some(renewed.token));
        if is_ours && let Some(lease) = self.leases.answered(id, renewed.number) {
            agent.renew(id, lease);
        }
        Ok(())
    }

    fn heard_superseded(&mut self, agent: &mut Agent, reason: String, now: Instant) {
        tracing::error!(
            reason,
            "another agent with this agent's identity was seen later and gets the new work; give each machine its own identity by enrolling it"
        );
        self.superseded = Some(reason);
        for id in agent.ids() {
            if agent.state(id).is_some_and(|state| !reconcile::survives_superseding(state)) {
                agent.forget(id);
                self.noticed(agent, id, now);
            }
        }
    }
}

/// What of a piece may be sent on so much credit, and what stays.
fn within_credit(piece: Piece, credit_bytes: u64) -> (Option<Piece>, Option<Piece>) {
    match piece {
        Piece::Data { offset, mut bytes } if bytes.len() as u64 > credit_bytes => {
            if credit_bytes == 0 {
                return (None, Some(Piece::Data { offset, bytes }));
            }
            let first = bytes.split_to(credit_bytes as usize);
            let rest = Piece::Data { offset: offset + credit_bytes, bytes };
            (Some(Piece::Data { offset, bytes: first }), Some(rest))
        }
        piece => (Some(piece), None),
    }
}

fn remove(files: Vec<std::path::PathBuf>) {
    for file in files {
        // A forgotten attempt takes its files with it.
        if let Err(error) = std::fs::remove_file(&file)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(file = %file.display(), %error, "cannot remove a delivered part of a log");
        }
        failpoint::reached(&file);
    }
}
