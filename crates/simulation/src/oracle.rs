//! Knows what each attempt prints, how often it began, and who was heard when; and says whether what is recorded in the end is
//! that.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sealci_controller::store::entity::{actions, attempts};
use sealci_controller::store::{ListFilter, LogPiece, PipelineStory, outcome_of_json};
use sealci_core::ids::{ActionId, AttemptId, PipelineId};
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::PlannedAction;
use sealci_proto::agent::scheduler_message as to_agent;
use sealci_proto::agent::{ClaimAnswer, Event as AgentEvent, agent_message, claim_answer, event};
use sealci_proto::attempt_id;
use sealci_proto::scheduler::{
    ControllerMessage, controller_message as to_scheduler, from_agent, scheduler_message as to_controller,
};

use crate::controllers::LOST_AFTER;
use crate::faults::Mood;
use crate::plans;
use crate::world::World;

/// What an agent says counts for the controller at the latest after so long: a round, and the tick after it.
const TAKEN_IN: Duration = Duration::from_millis(30);

/// In one round the infrastructure may lose so many attempts.
const MOST_LOST: usize = 3;

/// What was seen on the way.
#[derive(Debug, Default)]
pub struct Book {
    /// To which agent, under which claim and token.
    grants: BTreeMap<AttemptId, (usize, String, u64)>,
    /// The terminal event that the agent told.
    told: BTreeMap<AttemptId, AgentEvent>,
    /// When a controller was told of an attempt.
    heard: BTreeMap<AttemptId, Vec<Duration>>,
}

/// One action's end, as it is recorded.
struct End<'a> {
    planned: &'a PlannedAction,
    row: &'a actions::Model,
    attempts: Vec<(&'a attempts::Model, Outcome)>,
    is_cancelled: bool,
}

fn id_of(row: &attempts::Model) -> AttemptId {
    AttemptId { action: ActionId::from_uuid(row.action_id), number: row.number.unsigned_abs() }
}

fn is_lost(outcome: &Outcome) -> bool {
    matches!(outcome, Outcome::Errored { cause: Cause::AgentLost | Cause::AgentRestarted, .. })
}

impl World {
    // ---- what is seen on the way

    pub fn note_agent_message(&mut self, agent: usize, scheduler: usize, body: &agent_message::Body) {
        use agent_message::Body;
        let what = match body {
            Body::Hello(_) => "hello".to_owned(),
            Body::Offer(offer) => format!("offers, accepting {}", offer.accepting),
            Body::Held(held) => {
                let held: Vec<String> = held
                    .attempts
                    .iter()
                    .map(|held| {
                        let name = self.trace.attempt(attempt_id(&held.attempt).unwrap());
                        format!("{name} {:?}", held.state())
                    })
                    .collect();
                format!("holds {held:?}")
            }
            Body::Claim(claim) => {
                format!("claims {}", self.trace.attempt(attempt_id(&claim.attempt).unwrap()))
            }
            Body::Renew(_) => "renews".to_owned(),
            Body::Event(event) => {
                let id = attempt_id(&event.attempt).unwrap();
                self.note_event(id, event);
                format!("event {} of {}", event.sequence, self.trace.attempt(id))
            }
            Body::LogChunk(chunk) => {
                let name = self.trace.attempt(attempt_id(&chunk.attempt).unwrap());
                format!("log of {name} from {}, {} bytes", chunk.offset, chunk.data.len())
            }
        };
        self.note(&format!("agent {agent} to scheduler {scheduler}: {what}"));
    }

    fn note_event(&mut self, id: AttemptId, event: &AgentEvent) {
        if matches!(event.body, Some(event::Body::Finished(_))) {
            let told = self.book.told.entry(id).or_insert_with(|| event.clone());
            let outcome = |event: &AgentEvent| match &event.body {
                Some(event::Body::Finished(finished)) => finished.outcome.clone(),
                _ => None,
            };
            assert_eq!(outcome(told), outcome(event), "an attempt tells two ends");
        }
    }

    pub fn note_said_to_agent(&mut self, agent: usize, body: &to_agent::Body) {
        let what = match body {
            to_agent::Body::Desired(desired) => {
                let entries: Vec<String> = desired
                    .entries
                    .iter()
                    .map(|entry| {
                        let name = self.trace.attempt(attempt_id(&entry.attempt).unwrap());
                        let wish = format!("{:?}", entry.wish.as_ref().unwrap());
                        format!("{name} {}", wish.split('(').next().unwrap_or_default())
                    })
                    .collect();
                format!("desires {entries:?}")
            }
            to_agent::Body::ClaimAnswer(answer) => self.note_claim_answer(agent, answer),
            to_agent::Body::Ack(ack) => {
                let name = self.trace.attempt(attempt_id(&ack.attempt).unwrap());
                let (events, log) = (ack.next_sequence, ack.next_offset);
                let (fenced, closed) = (ack.fenced, ack.closed);
                format!("has {name} up to event {events}, log {log}, fenced {fenced}, closed {closed}")
            }
            to_agent::Body::Welcome(_) => "welcome".to_owned(),
            to_agent::Body::Renewed(_) => "renewed".to_owned(),
            to_agent::Body::Credit(credit) => format!("credit of {} bytes", credit.bytes),
            to_agent::Body::Superseded(_) => panic!("agent {agent} is superseded, and there is no other"),
        };
        self.note(&format!("to agent {agent}: {what}"));
    }

    /// A claim is granted to one agent only, however often, and always under one token.
    fn note_claim_answer(&mut self, agent: usize, answer: &ClaimAnswer) -> String {
        let id = attempt_id(&answer.attempt).unwrap();
        let name = self.trace.attempt(id);
        match &answer.answer {
            Some(claim_answer::Answer::Granted(granted)) => {
                let grant = (agent, answer.claim_id.clone(), granted.token);
                let before = self.book.grants.entry(id).or_insert_with(|| grant.clone());
                assert_eq!(*before, grant, "{name} is granted twice");
                format!("grants {name}")
            }
            _ => format!("refuses {name}"),
        }
    }

    pub fn note_heard(&mut self, controller: usize, message: &to_controller::Body) {
        let mut heard = BTreeSet::new();
        let what = match message {
            to_controller::Body::FromAgent(from) => {
                let id = match &from.body {
                    Some(from_agent::Body::Claim(claim)) => &claim.attempt,
                    Some(from_agent::Body::Event(event)) => &event.attempt,
                    Some(from_agent::Body::LogChunk(chunk)) => &chunk.attempt,
                    Some(from_agent::Body::Renew(renew)) => &renew.attempt,
                    None => &None,
                };
                let id = attempt_id(id).unwrap();
                if !matches!(from.body, Some(from_agent::Body::Claim(_))) {
                    heard.insert(id);
                }
                format!("report on {}", self.trace.attempt(id))
            }
            to_controller::Body::AgentState(state) => {
                let held = state.held.iter().filter(|held| held.token != 0);
                heard.extend(held.map(|held| attempt_id(&held.attempt).unwrap()));
                let agent = self.agents.iter().position(|agent| agent.id.to_string() == state.agent_id);
                format!("agent {agent:?} connected {}, holds {}", state.connected, state.held.len())
            }
            to_controller::Body::Absent(absent) => {
                format!("{} is absent", self.trace.attempt(attempt_id(&absent.attempt).unwrap()))
            }
            to_controller::Body::Placed(placed) => {
                format!("{} is placed", self.trace.attempt(attempt_id(&placed.attempt).unwrap()))
            }
            to_controller::Body::EnrolQuestion(_) => "who is that".to_owned(),
            to_controller::Body::WhyAnswer(_) => "why".to_owned(),
            to_controller::Body::Welcome(_) => "welcome".to_owned(),
        };
        for id in heard {
            self.book.heard.entry(id).or_default().push(self.now);
        }
        self.note(&format!("to controller {controller}: {what}"));
    }

    pub fn note_said(&mut self, controller: usize, said: &[ControllerMessage]) {
        if !said.is_empty() {
            let kinds: Vec<String> = said
                .iter()
                .map(|message| match message.body.as_ref().unwrap() {
                    to_scheduler::Body::Wants(wants) => {
                        let name = self.trace.pipeline(wants.pipeline_id.parse().unwrap());
                        format!("Wants {name}, epoch {}", wants.epoch)
                    }
                    body => format!("{body:?}").split('(').next().unwrap_or_default().to_owned(),
                })
                .collect();
            self.note(&format!("controller {controller} says {kinds:?}"));
        }
    }

    // ---- what is recorded in the end

    fn stories(&self) -> BTreeMap<String, PipelineStory> {
        let pipelines = self.wishes.pipelines.iter();
        let known = pipelines.filter_map(|(identity, wished)| Some((identity.clone(), wished.id?)));
        let story = |id: PipelineId| self.runtime.block_on(self.store.story(id)).unwrap().unwrap();
        known.map(|(identity, id)| (identity, story(id))).collect()
    }

    /// What is still to come to an end; none if nothing is.
    pub fn unsettled(&self) -> Option<String> {
        if let Some((identity, _)) = self.wishes.pipelines.iter().find(|(_, wished)| wished.id.is_none()) {
            return Some(format!("{identity} was not made"));
        }
        if let Some(index) = self.agents.iter().position(|agent| !agent.is_done()) {
            return Some(format!("agent {index} still owes something"));
        }
        for (index, scheduler) in self.schedulers.iter().enumerate() {
            let Some(process) = &scheduler.process else { return Some("a scheduler is dead".into()) };
            let placement = process.placement();
            if !placement.queue().is_empty() {
                return Some(format!("something waits at scheduler {index}"));
            }
            if placement.pool().agents().values().any(|agent| !agent.reservations().is_empty()) {
                return Some(format!("scheduler {index} keeps something reserved"));
            }
        }
        let stories = self.stories();
        let open = stories.iter().find(|(_, story)| story.pipeline.state != "finished");
        open.map(|(identity, _)| format!("{identity} is unfinished"))
    }

    /// Everything that must hold once nothing more is to come.
    pub fn check(&mut self) {
        let stories = self.stories();
        let page = self.runtime.block_on(self.store.list(&ListFilter::default(), None, 100)).unwrap();
        assert_eq!(page.pipelines.len(), stories.len(), "one event makes one pipeline");
        let mut claimed = BTreeSet::new();
        let wishes = std::mem::take(&mut self.wishes);
        for (identity, story) in &stories {
            let wished = &wishes.pipelines[identity];
            for (planned, row) in wished.new.plan.actions.iter().zip(&story.actions) {
                let of_action = story.attempts.iter().filter(|attempt| attempt.action_id == row.id);
                let attempts: Vec<_> = of_action.map(|attempt| (attempt, self.outcome_of(attempt))).collect();
                claimed.extend(attempts.iter().map(|(attempt, _)| id_of(attempt)));
                let end = End { planned, row, attempts, is_cancelled: wished.is_cancelled };
                self.check_action(identity, &end);
            }
            let rounds = wished.reruns.values().filter(|answered| **answered == Some(true)).count();
            assert!(
                story.pipeline.round as usize > rounds,
                "{identity}: a re-run that was answered is missing"
            );
        }
        self.wishes = wishes;
        for agent in &self.agents {
            for id in agent.begun.lock().unwrap().iter() {
                assert!(claimed.contains(id), "{id} began without a claim");
            }
        }
    }

    fn outcome_of(&self, attempt: &attempts::Model) -> Outcome {
        assert_eq!(attempt.state, "finished", "{} has no end", id_of(attempt));
        outcome_of_json(attempt.outcome.as_deref().unwrap()).unwrap()
    }

    fn check_action(&mut self, identity: &str, end: &End<'_>) {
        let name = format!("{identity}, {}", end.planned.name);
        assert_eq!(end.row.state, "finished", "{name}");
        let outcome = outcome_of_json(end.row.outcome.as_deref().unwrap()).unwrap();
        let numbers: Vec<i32> = end.attempts.iter().map(|(attempt, _)| attempt.number).collect();
        assert_eq!(numbers, (1..=end.row.attempts).collect::<Vec<_>>(), "{name}: attempts are missing");
        for (attempt, ended) in &end.attempts {
            self.check_attempt(&name, end.planned, attempt, ended);
        }
        let last_round = end.attempts.last().map(|(attempt, _)| attempt.round);
        let rounds: BTreeSet<i32> = end.attempts.iter().map(|(attempt, _)| attempt.round).collect();
        for round in rounds {
            let of_round: Vec<&Outcome> =
                end.attempts.iter().filter(|(row, _)| row.round == round).map(|(_, ended)| ended).collect();
            self.check_round(&name, end, &of_round);
        }
        match &outcome {
            Outcome::Skipped { .. } => {}
            Outcome::Cancelled => assert!(end.is_cancelled, "{name}: nobody wished it cancelled"),
            _ => {
                assert!(last_round.is_some(), "{name}: an end without an attempt");
                assert_eq!(Some(&outcome), end.attempts.last().map(|(_, ended)| ended), "{name}");
            }
        }
    }

    /// The attempts of a round: each but the last is one that another may follow.
    fn check_round(&self, name: &str, end: &End<'_>, outcomes: &[&Outcome]) {
        let lost = outcomes.iter().filter(|outcome| is_lost(outcome)).count();
        assert!(lost <= MOST_LOST, "{name}: {lost} attempts of a round were lost, and it was tried again");
        let Some((_, others)) = outcomes.split_last() else { return };
        let retried = others.iter().filter(|outcome| !is_lost(outcome)).count();
        assert!(
            retried <= end.planned.retry.times as usize,
            "{name}: tried again {retried} times: {outcomes:?}"
        );
        for outcome in others {
            assert!(
                is_lost(outcome) || end.planned.retry.covers(outcome),
                "{name}: tried again after {outcome:?}"
            );
        }
    }

    fn check_attempt(&mut self, name: &str, planned: &PlannedAction, row: &attempts::Model, ended: &Outcome) {
        let id = id_of(row);
        let name = format!("{name}, attempt {} ({})", row.number, self.trace.attempt(id));
        let begun: Vec<usize> = (self.agents.iter().enumerate())
            .flat_map(|(index, agent)| {
                let begun = agent.begun.lock().unwrap();
                let times = begun.iter().filter(|begun| **begun == id).count();
                std::iter::repeat_n(index, times)
            })
            .collect();
        assert!(begun.len() <= 1, "{name} began {} times", begun.len());
        for index in &begun {
            assert_eq!(
                self.agents[*index].id.as_uuid(),
                row.agent_id,
                "{name} began where it was not granted"
            );
        }
        let (printed, by_itself) = plans::undisturbed(&planned.commands, id);
        let (log, gaps) = self.log_of(id, row.log_end.unsigned_abs());
        assert!(gaps.is_empty(), "{name} has gaps: {gaps:?}");
        assert!(printed.starts_with(&log), "{name}: its log has other bytes than it printed");
        self.check_end(&name, id, row, ended);
        match ended {
            Outcome::Succeeded | Outcome::Failed { .. } => {
                assert_eq!(Some(ended), by_itself.as_ref(), "{name}");
                assert_eq!(begun.len(), 1, "{name} ended and never began");
                assert_eq!(log.len(), printed.len(), "{name}: its log is not whole");
            }
            Outcome::TimedOut => {
                assert_eq!(begun.len(), 1, "{name} ended and never began");
                assert_eq!(by_itself, None, "{name} had the time it needs");
            }
            Outcome::Cancelled => {}
            _ => assert!(is_lost(ended), "{name}: {ended:?}"),
        }
    }

    /// The end is what the agent told, or its loss, of which the agent gave cause; and the log is whole.
    fn check_end(&self, name: &str, id: AttemptId, row: &attempts::Model, ended: &Outcome) {
        let Outcome::Errored { cause: Cause::AgentLost, message } = ended else {
            let told = self.book.told.get(&id).and_then(|event| match &event.body {
                Some(event::Body::Finished(finished)) => finished.outcome.clone(),
                _ => None,
            });
            let told = told.unwrap_or_else(|| panic!("{name}: nobody told of its end {ended:?}"));
            assert_eq!(&Outcome::try_from(&told).unwrap(), ended, "{name}");
            assert_eq!(row.log_length, Some(row.log_end), "{name}: its log is not whole");
            if let Outcome::Errored { cause: Cause::AgentRestarted, .. } = ended {
                let index = self.agents.iter().position(|agent| agent.id.as_uuid() == row.agent_id).unwrap();
                assert!(self.agents[index].deaths > 0, "{name}: its agent never died");
            }
            return;
        };
        assert_eq!(self.mood, Mood::Wild, "{name} is taken for lost: {message}");
        if self.size.controllers == 1 && message.starts_with("nothing was heard") {
            let lost_at =
                Duration::from_millis((row.finished_at.unwrap() - crate::controllers::WALL_MS) as u64);
            let silent_since = lost_at.saturating_sub(LOST_AFTER) + TAKEN_IN;
            let heard = self.book.heard.get(&id).into_iter().flatten();
            let heard: Vec<&Duration> =
                heard.filter(|at| **at > silent_since && **at + TAKEN_IN < lost_at).collect();
            assert!(heard.is_empty(), "{name} was taken for lost at {lost_at:?}, and heard at {heard:?}");
        }
    }

    fn log_of(&self, id: AttemptId, end: u64) -> (Vec<u8>, Vec<String>) {
        let (mut log, mut gaps, mut offset) = (Vec::new(), Vec::new(), 0);
        let reader = self.storage.log(id);
        while offset < end {
            let piece = self.runtime.block_on(reader.piece(offset)).unwrap();
            match piece.unwrap_or_else(|| panic!("the log of {id} has nothing at {offset} of {end}")) {
                LogPiece::Bytes { offset: at, bytes } => {
                    assert_eq!(at, offset);
                    offset += bytes.len() as u64;
                    log.extend_from_slice(&bytes);
                }
                LogPiece::Gap { from, to, reason } => {
                    gaps.push(format!("{from}..{to} {reason}"));
                    offset = to;
                }
            }
        }
        (log, gaps)
    }
}
