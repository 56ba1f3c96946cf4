//! Turns what happens to one pipeline into lines for a person: its logs, each line behind its action's name, what became
//! of each action, and at the end a summary. For a program the same comes as one JSON object a line.
//!
//! Pure: updates go in, bytes to write come out. `build | text` is what the action wrote; `build > text` is what SealCI
//! says about it.
//!
//! States and logs arrive on streams of their own, in any order between them; what is shown keeps this one:
//!
//! ```text
//! needs' ends ──▶ running ──▶ the log, line by line ──▶ the end ──▶ what needed it
//! ```
//! So a log is followed only once its attempt was said to run ([`View::to_follow`]), an end waits for the end of the log,
//! and news of an action wait for the ends of what it needs.

use std::collections::{BTreeMap, BTreeSet};

use sealci_api::controller::types::{
    Action, ActionState, Attempt, AttemptState, Pipeline, PipelineOutcome, PipelineState,
};
use uuid::Uuid;

use crate::format;
use crate::terminal::{Terminal, one_line};

pub mod json;
mod lines;

use lines::remark_prefix;
pub use lines::{Lines, missing};

/// An attempt of an action: what a log belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttemptId {
    pub action: Uuid,
    /// From 1.
    pub number: u32,
}

/// What may happen, in any order between attempts and in its own order within one.
#[derive(Debug)]
pub enum Update {
    /// The whole verbose pipeline as it stands.
    Pipeline(Box<Pipeline>),
    Log(AttemptId, Vec<u8>),
    Gap(AttemptId, u64, String),
    LogEnd(AttemptId),
    /// Why an action still waits for an agent.
    Waits(Uuid, Vec<String>),
}

/// For whom it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A person.
    Words(Terminal),
    /// A program: see [`json`].
    Json,
}

impl From<Terminal> for Style {
    fn from(terminal: Terminal) -> Self {
        Self::Words(terminal)
    }
}

/// What is said about an action only once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Said {
    Running(AttemptId),
    Retried(AttemptId),
    Ended { action: Uuid, round: i32 },
}

/// One pipeline as it is shown.
pub struct View {
    style: Style,
    pipeline: Option<Pipeline>,
    logs: BTreeMap<AttemptId, Lines>,
    ended_logs: BTreeSet<AttemptId>,
    /// What has its turn to be shown.
    open_logs: BTreeSet<AttemptId>,
    said: BTreeSet<Said>,
    out: Vec<u8>,
}

impl View {
    pub fn new(style: impl Into<Style>) -> Self {
        Self {
            style: style.into(),
            pipeline: None,
            logs: BTreeMap::new(),
            ended_logs: BTreeSet::new(),
            open_logs: BTreeSet::new(),
            said: BTreeSet::new(),
            out: Vec::new(),
        }
    }

    /// Takes in what happened.
    pub fn update(&mut self, update: Update) {
        match update {
            Update::Pipeline(pipeline) => {
                if self.pipeline.is_none() {
                    self.say_heading(&pipeline);
                }
                self.pipeline = Some(*pipeline);
            }
            Update::Log(attempt, bytes) => {
                let mut lines = self.take_lines(attempt);
                lines.push(&bytes, &mut self.out);
                self.logs.insert(attempt, lines);
            }
            Update::Gap(attempt, missing_bytes, reason) => {
                let mut lines = self.take_lines(attempt);
                lines.finish(&mut self.out);
                lines.gap(missing_bytes, &reason, &mut self.out);
                self.logs.insert(attempt, lines);
            }
            Update::LogEnd(attempt) => {
                if let Some(mut lines) = self.logs.remove(&attempt) {
                    lines.finish(&mut self.out);
                }
                self.ended_logs.insert(attempt);
            }
            Update::Waits(action, reasons) => self.say_waits(action, &reasons),
        }
        self.say_news();
    }

    /// What is to be written now.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// The outcome, once the pipeline is finished and every log that counts has been shown to its end.
    pub fn outcome(&self) -> Option<PipelineOutcome> {
        let pipeline = self.pipeline.as_ref().filter(|pipeline| pipeline.state == PipelineState::Finished)?;
        let shown =
            self.attempts().into_iter().all(|(id, attempt)| attempt.fenced || self.ended_logs.contains(&id));
        pipeline.outcome.filter(|_| shown)
    }

    /// Those whose logs have their turn to be shown, and are to be followed now.
    pub fn to_follow(&self) -> impl Iterator<Item = AttemptId> {
        self.open_logs.iter().copied()
    }

    /// The first action that waits for an agent, while none is with one: nothing moves until this one does.
    pub fn standstill(&self) -> Option<Uuid> {
        let actions = &self.pipeline.as_ref()?.actions;
        let is_moving = actions.iter().any(|action| action.state == ActionState::Active);
        let waiting = actions.iter().find(|action| action.state == ActionState::Queued)?;
        (!is_moving).then_some(waiting.id)
    }

    /// The attempts of the current round.
    pub fn attempts(&self) -> Vec<(AttemptId, &Attempt)> {
        let Some(pipeline) = &self.pipeline else { return Vec::new() };
        let of_action = |action: &'_ Action| action.id;
        pipeline
            .actions
            .iter()
            .flat_map(|action| action.attempts.iter().map(move |attempt| (of_action(action), attempt)))
            .filter(|(_, attempt)| attempt.round == pipeline.round)
            .map(|(action, attempt)| (AttemptId { action, number: number(attempt) }, attempt))
            .collect()
    }

    /// One line about the whole, for the foot of a terminal.
    pub fn status_line(&self) -> String {
        let Some(pipeline) = &self.pipeline else { return "waiting for the pipeline".into() };
        let names = |state| {
            let names: Vec<_> =
                pipeline.actions.iter().filter(|a| a.state == state).map(|a| one_line(&a.name)).collect();
            match names.len() {
                0..=3 => names.join(", "),
                more => format!("{}, {} and {} more", names[0], names[1], more - 2),
            }
        };
        let done = pipeline.actions.iter().filter(|action| action.state == ActionState::Finished).count();
        let mut parts = vec![format!("{} #{}", one_line(&pipeline.name), pipeline.number)];
        for (state, word) in [(ActionState::Active, "running"), (ActionState::Queued, "queued")] {
            let names = names(state);
            if !names.is_empty() {
                parts.push(format!("{word}: {names}"));
            }
        }
        parts.push(format!("{done} of {} done", pipeline.actions.len()));
        parts.join(" · ")
    }

    /// Ends the view with one line for each action and one for the pipeline.
    pub fn summary(&mut self) {
        let unfinished: Vec<AttemptId> = self.logs.keys().copied().collect();
        for attempt in unfinished {
            if let Some(mut lines) = self.logs.remove(&attempt) {
                lines.finish(&mut self.out);
            }
        }
        let Some(pipeline) = self.pipeline.take() else { return };
        let Style::Words(terminal) = self.style else {
            json::line(&json::end(&pipeline), &mut self.out);
            self.pipeline = Some(pipeline);
            return;
        };
        let width = names_width(&pipeline);
        self.out.push(b'\n');
        for action in &pipeline.actions {
            let mut text = format::coloured(terminal, &format::action_state(action));
            if let Some(seconds) = seconds_of(action) {
                text.push_str(&format!(" in {}", format::duration(seconds)));
            }
            if let Some(command) = first_failing_command(action) {
                text.push_str(&terminal.dim(&format!(" at `{}`", shortened(command))));
            }
            self.out.extend(format!("  {:width$}  {text}\n", one_line(&action.name)).bytes());
        }
        let state = format::pipeline_state(&pipeline);
        let took = format::seconds_between(Some(&pipeline.created_at), pipeline.finished_at.as_deref())
            .map(|seconds| format!(" in {}", format::duration(seconds)))
            .unwrap_or_default();
        let name = terminal.bold(&format!("{} #{}", one_line(&pipeline.name), pipeline.number));
        self.out.extend(format!("{name} {}{took}\n", format::coloured(terminal, &state)).bytes());
        self.pipeline = Some(pipeline);
    }

    fn say_heading(&mut self, pipeline: &Pipeline) {
        let Style::Words(terminal) = self.style else {
            return json::line(&json::beginning(pipeline), &mut self.out);
        };
        let place =
            pipeline.ref_.as_deref().map(|name| format!(" {}", format::short_ref(name))).unwrap_or_default();
        // Git's own way to say that there is no commit.
        let revision = if pipeline.revision.bytes().all(|digit| digit == b'0') {
            String::new()
        } else {
            format!(" at {}", format::short_revision(&pipeline.revision))
        };
        let text = format!(
            "{} {} of {}{place}{revision}\n",
            terminal.bold(&format!("{} #{}", one_line(&pipeline.name), pipeline.number)),
            pipeline.event,
            one_line(&pipeline.repository),
        );
        self.out.extend(text.bytes());
    }

    fn say_waits(&mut self, action: Uuid, reasons: &[String]) {
        let Some(pipeline) = self.pipeline.take() else { return };
        // It may have moved on since it was asked about.
        let waiting = |other: &&Action| other.id == action && other.state == ActionState::Queued;
        if let Some(action) = pipeline.actions.iter().find(waiting) {
            let text: Vec<_> = reasons.iter().map(|reason| one_line(reason)).collect();
            let text = format!("waiting: {}", text.join("; "));
            self.say(action, &pipeline, &text, || json::waits(action, reasons));
        }
        self.pipeline = Some(pipeline);
    }

    /// Says what is new, each thing in its turn.
    fn say_news(&mut self) {
        let Some(pipeline) = self.pipeline.take() else { return };
        loop {
            let known = self.said.len();
            for action in &pipeline.actions {
                self.say_news_of(action, &pipeline);
            }
            // An end that was said may be what others, declared before it, waited for.
            if self.said.len() == known {
                break;
            }
        }
        self.pipeline = Some(pipeline);
    }

    fn say_news_of(&mut self, action: &Action, pipeline: &Pipeline) {
        let needed = |other: &&Action| action.needs.contains(&other.name);
        if pipeline.actions.iter().filter(needed).any(|need| self.owes_end(need, pipeline.round)) {
            return;
        }
        let attempts = || action.attempts.iter().filter(|attempt| attempt.round == pipeline.round);
        for attempt in attempts() {
            let id = AttemptId { action: action.id, number: number(attempt) };
            if has_run(attempt) {
                self.open_logs.insert(id);
                if self.said.insert(Said::Running(id)) {
                    self.say(action, pipeline, &running(attempt), || json::running(action, attempt));
                }
            } else if attempt.state == AttemptState::Finished {
                self.open_logs.insert(id);
            }
            if let Some(why) = &attempt.retried_because
                && self.log_ended(action, attempt)
                && self.said.insert(Said::Retried(id))
            {
                let text = format!("attempt {} is retried because {}", attempt.number, one_line(why));
                self.say(action, pipeline, &text, || json::retried(action, attempt));
            }
        }
        if self.owes_end(action, pipeline.round) && attempts().all(|attempt| self.log_ended(action, attempt))
        {
            self.said.insert(Said::Ended { action: action.id, round: pipeline.round });
            let took = seconds_of(action).map(|s| format!(" in {}", format::duration(s))).unwrap_or_default();
            let text = format!("{}{took}", format::action_state(action));
            self.say(action, pipeline, &text, || json::ended(action));
        }
    }

    /// Whether the action has ended in this round, and that is still to be said.
    fn owes_end(&self, action: &Action, round: i32) -> bool {
        let in_this_round =
            action.attempts.is_empty() || action.attempts.iter().any(|attempt| attempt.round == round);
        action.state == ActionState::Finished
            && in_this_round
            && !self.said.contains(&Said::Ended { action: action.id, round })
    }

    fn log_ended(&self, action: &Action, attempt: &Attempt) -> bool {
        attempt.fenced || self.ended_logs.contains(&AttemptId { action: action.id, number: number(attempt) })
    }

    /// Says something about an action, in words or as what `object` makes.
    fn say(
        &mut self,
        action: &Action,
        pipeline: &Pipeline,
        text: &str,
        object: impl FnOnce() -> serde_json::Value,
    ) {
        match self.style {
            Style::Words(terminal) => {
                let prefix = remark_prefix(&action.name, names_width(pipeline), terminal);
                self.out.extend(format!("{prefix}{}\n", format::coloured(terminal, text)).bytes());
            }
            Style::Json => json::line(&object(), &mut self.out),
        }
    }

    fn take_lines(&mut self, id: AttemptId) -> Lines {
        if let Some(lines) = self.logs.remove(&id) {
            return lines;
        }
        let action = self.pipeline.iter().flat_map(|p| &p.actions).find(|action| action.id == id.action);
        let name = action.map_or_else(|| id.action.to_string(), |action| action.name.clone());
        match self.style {
            Style::Json => Lines::json(name, id.number),
            Style::Words(terminal) => {
                let name = if id.number > 1 { format!("{name}#{}", id.number) } else { name };
                Lines::new(&name, self.pipeline.as_ref().map_or(0, names_width), terminal)
            }
        }
    }
}

/// Whether its commands were started.
fn has_run(attempt: &Attempt) -> bool {
    match attempt.state {
        AttemptState::Running => true,
        AttemptState::Finished => attempt.executor.is_some(),
        _ => false,
    }
}

fn running(attempt: &Attempt) -> String {
    let agent = attempt.agent_name.as_deref().map(one_line);
    let agent = agent.unwrap_or_else(|| attempt.agent_id.to_string());
    let executor = attempt.executor.as_deref().map(|e| format!(" ({})", one_line(e))).unwrap_or_default();
    format!("running on {agent}{executor}")
}

/// An attempt's number, which the contract keeps above zero.
fn number(attempt: &Attempt) -> u32 {
    u32::try_from(attempt.number).unwrap_or(0)
}

fn names_width(pipeline: &Pipeline) -> usize {
    pipeline.actions.iter().map(|action| one_line(&action.name).chars().count()).max().unwrap_or(0).min(32)
}

fn seconds_of(action: &Action) -> Option<f64> {
    format::seconds_between(action.started_at.as_deref(), action.finished_at.as_deref())
}

/// The text of the first command that failed in the action's last attempt.
pub fn first_failing_command(action: &Action) -> Option<&str> {
    let last = action.attempts.last()?;
    last.commands
        .iter()
        .find(|command| command.exit_code.is_some_and(|code| code != 0))
        .map(|c| c.text.as_str())
}

/// A command's first line, at most 60 characters of it.
pub fn shortened(command: &str) -> String {
    let first = one_line(command.lines().next().unwrap_or_default());
    if first.chars().count() > 60 || command.lines().count() > 1 {
        format!("{}…", first.chars().take(60).collect::<String>())
    } else {
        first
    }
}

#[cfg(test)]
mod tests;
