//! Says why an action is where it is, itself or after asking the schedulers.

use std::collections::{BTreeMap, BTreeSet};

use sealci_core::ids::{ActionId, AttemptId};
use sealci_core::pipeline::{Action, ActionState, Pipeline};
use sealci_proto::scheduler::{WhyAnswer, WhyQuestion, controller_message};

use super::commit::Transaction;
use super::driver::{Driver, fail, refuse};
use super::lines::{LineId, Lines};
use super::live::Live;
use super::{Answer, Refusal};
use crate::store::StoreError;

/// A why-question that every scheduler has been asked.
#[derive(Debug)]
pub(super) struct Question {
    answer: Answer<Vec<String>>,
    /// Why it is queued again.
    again: Option<String>,
    /// By whom it is not answered yet.
    open: BTreeSet<LineId>,
    /// What each has said.
    said: BTreeMap<LineId, Vec<String>>,
}

impl Question {
    /// All that was said; by whom, where several said different things.
    fn reasons(&self, lines: &Lines) -> Vec<String> {
        let mut said = self.said.values();
        let Some(first) = said.next() else { return vec![NO_SCHEDULER.into()] };
        if said.all(|reasons| reasons == first) {
            return first.clone();
        }
        let by = |(id, reasons): (&LineId, &Vec<String>)| {
            let endpoint = lines.endpoint(*id).unwrap_or("a scheduler").to_owned();
            reasons.iter().map(move |reason| format!("{endpoint}: {reason}")).collect::<Vec<_>>()
        };
        self.said.iter().flat_map(by).collect()
    }
}

const NO_SCHEDULER: &str = "no scheduler is connected";

impl Driver {
    pub(super) async fn why(
        &mut self,
        action: ActionId,
        answer: Answer<Vec<String>>,
        transaction: &mut Transaction,
    ) {
        let is_linked = !self.lines.is_empty();
        let stored;
        let live = match self.by_action.get(&action).and_then(|id| self.live.get(id)) {
            Some(live) => live,
            // It is finished, or another replica's: whose it is makes no difference to the answer.
            None => match self.stored(action).await {
                Ok(Some(live)) => {
                    stored = live;
                    &stored
                }
                Ok(None) => return refuse(answer, Refusal::UnknownAction),
                Err(error) => return fail(answer, &error),
            },
        };
        let placed = live.placed.clone();
        let Some(index) = live.state.position(action) else { return refuse(answer, Refusal::UnknownAction) };
        let about = &live.state.actions[index];
        let next = AttemptId { action, number: about.attempts + 1 };
        let again = why_again(about);
        let reasons = match &about.state {
            ActionState::Queued if !is_linked => [NO_SCHEDULER.to_owned()].into_iter().chain(again).collect(),
            ActionState::Queued => match placed.get(&next) {
                Some(agent) => {
                    let preparing = format!("agent {} is preparing it", self.agents.name(*agent));
                    [preparing].into_iter().chain(again).collect()
                }
                None => {
                    let request = self.next_question;
                    self.next_question += 1;
                    let open = self.lines.ids().collect();
                    self.questions.insert(request, Question { answer, again, open, said: BTreeMap::new() });
                    let question = WhyQuestion { request, attempt: Some(next.into()) };
                    transaction.post.for_all(controller_message::Body::WhyQuestion(question));
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

    async fn stored(&self, action: ActionId) -> Result<Option<Live>, StoreError> {
        let Some(id) = self.store.pipeline_of_action(action).await? else { return Ok(None) };
        let rows = self.store.pipeline(id).await?;
        Ok(rows.map(|rows| Live::of_rows(rows, self.now)).transpose()?)
    }

    pub(super) fn why_answered(&mut self, line: LineId, answer: WhyAnswer) {
        let Some(asked) = self.questions.get_mut(&answer.request) else { return };
        let mut reasons = answer.reasons;
        if reasons.is_empty() {
            reasons.push("the scheduler is about to place it".to_owned());
        }
        asked.said.insert(line, reasons);
        self.is_answered_by(answer.request, line);
    }

    /// Whoever is at the other end of a line that is gone answers nothing more.
    pub(super) fn no_answer_comes_by(&mut self, line: LineId) {
        let requests: Vec<u64> = self.questions.keys().copied().collect();
        requests.into_iter().for_each(|request| self.is_answered_by(request, line));
    }

    fn is_answered_by(&mut self, request: u64, line: LineId) {
        let Some(asked) = self.questions.get_mut(&request) else { return };
        asked.open.remove(&line);
        if asked.open.is_empty()
            && let Some(asked) = self.questions.remove(&request)
        {
            let mut reasons = asked.reasons(&self.lines);
            reasons.extend(asked.again);
            let _ = asked.answer.send(Ok(reasons)); // who asked may have gone away
        }
    }
}

/// Why an action is queued that was tried before in this round.
fn why_again(action: &Action) -> Option<String> {
    let before = action.current.as_ref().filter(|_| action.tries.attempts > 0)?;
    Some(format!("it is tried again: attempt {} {}", before.number, before.outcome()?))
}

/// The actions that a pending action waits for, as sentences.
fn waiting_for(pipeline: &Pipeline, action: &Action) -> Vec<String> {
    let needs = action.needs.iter().map(|need| &pipeline.actions[*need]);
    let unfinished = needs.filter(|need| need.outcome().is_none());
    unfinished.map(|need| format!("it needs `{}`, which is {}", need.name, need.state.as_str())).collect()
}
