//! Plays the people: they make pipelines, cancel and run them again, drain agents, and ask again where nobody answered.

use std::collections::BTreeMap;

use rand::Rng;
use rand::seq::IndexedRandom;
use sealci_controller::dispatch::{Created, NewPipeline, Refusal};
use sealci_core::ids::PipelineId;
use sealci_core::pipeline::RerunScope;

use crate::plans;
use crate::world::{Event, World};

/// What people wished so far.
#[derive(Debug, Default)]
pub struct Wishes {
    /// How many pipelines are to be made.
    pub wanted: usize,
    /// By their identities. The id is known once somebody answered.
    pub pipelines: BTreeMap<String, Wished>,
    pub drained: Vec<usize>,
    reruns: u64,
}

/// One pipeline as people know it.
#[derive(Debug)]
pub struct Wished {
    pub new: NewPipeline,
    pub id: Option<PipelineId>,
    /// Somebody asked for its end, answered or not.
    pub is_cancelled: bool,
    /// Somebody asked to run it again: the requests, and whether they were answered.
    pub reruns: BTreeMap<String, Option<bool>>,
}

impl World {
    /// People begin to wish: so many pipelines, over so long.
    pub fn people_wish(&mut self, pipelines: usize) {
        self.wishes.wanted = pipelines;
        for _ in 0..pipelines * 3 {
            let ms = self.dice.random_range(20..self.mood.wishes_ms());
            self.in_ms(ms, Event::Wish);
        }
    }

    pub fn wish(&mut self) {
        let kind = self.dice.random_range(0..10);
        let known: Vec<String> = self.wishes.pipelines.keys().cloned().collect();
        let chosen = known.choose(&mut self.dice).cloned();
        match (kind, chosen) {
            (0..5, _) | (_, None) if known.len() < self.wishes.wanted => {
                let identity = format!("pipeline {}", known.len() + 1);
                let new = plans::draw(&mut self.dice, &identity);
                let wished = Wished { new, id: None, is_cancelled: false, reruns: BTreeMap::new() };
                self.wishes.pipelines.insert(identity.clone(), wished);
                self.create(&identity);
            }
            // The same event comes again, by another road.
            (0..5, Some(identity)) => self.create(&identity),
            (5, Some(identity)) if self.mood.has_cancels() => self.cancel(&identity),
            (6..8, Some(identity)) => self.rerun(&identity),
            (8, _) => {
                let agent = self.dice.random_range(0..self.size.agents);
                self.drain(agent, true);
            }
            (_, _) => self.undrain_all(),
        }
    }

    fn any_controller(&mut self) -> usize {
        self.dice.random_range(0..self.size.controllers)
    }

    fn create(&mut self, identity: &str) {
        let controller = self.any_controller();
        self.create_by(identity, controller);
    }

    pub fn create_by(&mut self, identity: &str, controller: usize) {
        let new = self.wishes.pipelines[identity].new.clone();
        let answer = self.ask(controller, async |dispatch| dispatch.create(new).await);
        self.note(&format!("{identity} is wished of controller {controller}: {}", told(&answer)));
        let Some(Ok(Created::Now(id) | Created::Before(id))) = answer else { return };
        let wished = self.wishes.pipelines.get_mut(identity).unwrap();
        if let Some(before) = wished.id.replace(id) {
            assert_eq!(before, id, "one event made two pipelines");
        }
    }

    fn cancel(&mut self, identity: &str) {
        let controller = self.any_controller();
        self.cancel_by(identity, controller);
    }

    /// Whether it was answered.
    pub fn cancel_by(&mut self, identity: &str, controller: usize) -> bool {
        let Some(id) = self.wishes.pipelines[identity].id else { return false };
        self.wishes.pipelines.get_mut(identity).unwrap().is_cancelled = true;
        let answer = self.ask(controller, async |dispatch| dispatch.cancel(id).await);
        self.note(&format!("{identity} is to be cancelled by controller {controller}: {}", told(&answer)));
        answer.is_some()
    }

    fn rerun(&mut self, identity: &str) {
        let controller = self.any_controller();
        self.wishes.reruns += 1;
        let known: Vec<String> = self.wishes.pipelines[identity].reruns.keys().cloned().collect();
        // Now and then the same request again.
        let request = match known.choose(&mut self.dice) {
            Some(before) if self.dice.random_bool(0.3) => before.clone(),
            _ => format!("request {}", self.wishes.reruns),
        };
        let scope = if self.dice.random_bool(0.5) { RerunScope::All } else { RerunScope::Failed };
        self.rerun_by(identity, &request, scope, controller);
    }

    /// Whether it was answered.
    pub fn rerun_by(&mut self, identity: &str, request: &str, scope: RerunScope, controller: usize) -> bool {
        let Some(id) = self.wishes.pipelines[identity].id else { return false };
        let asked = request.to_owned();
        let answer = self.ask(controller, async |dispatch| dispatch.rerun(id, scope, asked).await);
        self.note(&format!(
            "{identity} is to run again by {request}, controller {controller}: {}",
            told(&answer)
        ));
        let answered = answer.map(|answer| answer.is_ok());
        let reruns = &mut self.wishes.pipelines.get_mut(identity).unwrap().reruns;
        let before = reruns.entry(request.to_owned()).or_default();
        // Refused now, it may have been done before, by a request whose answer was lost.
        *before = if *before == Some(true) { *before } else { answered.or(*before) };
        answered.is_some()
    }

    fn drain(&mut self, agent: usize, is_drained: bool) {
        let controller = self.any_controller();
        self.drain_by(agent, is_drained, controller);
    }

    /// Whether it was answered.
    pub fn drain_by(&mut self, agent: usize, is_drained: bool, controller: usize) -> bool {
        let id = self.agents[agent].id;
        let answer = self.ask(controller, async |dispatch| dispatch.drain(id, is_drained).await);
        self.note(&format!("agent {agent} drained {is_drained}, controller {controller}: {}", told(&answer)));
        let is_answered = answer.is_some();
        match (is_drained, answer) {
            (false, Some(Ok(_))) => self.wishes.drained.retain(|drained| *drained != agent),
            // Without an answer it may be drained all the same.
            (true, None | Some(Ok(_))) => self.wishes.drained.push(agent),
            _ => {}
        }
        is_answered
    }

    /// Has all drained agents take work again.
    pub fn undrain_all(&mut self) {
        for agent in self.wishes.drained.clone() {
            self.drain(agent, false);
        }
    }

    /// Asks again for what nobody has answered.
    pub fn ask_again(&mut self) {
        let unanswered = self.wishes.pipelines.iter().filter(|(_, wished)| wished.id.is_none());
        let unanswered: Vec<String> = unanswered.map(|(identity, _)| identity.clone()).collect();
        unanswered.iter().for_each(|identity| self.create(identity));
        self.undrain_all();
    }
}

fn told<T>(answer: &Option<Result<T, Refusal>>) -> &'static str {
    match answer {
        None => "no answer",
        Some(Ok(_)) => "done",
        Some(Err(_)) => "refused",
    }
}
