//! The steps that the parts of the system can take, and what can happen to them.
//!
//! ```text
//!   owner ──states wants (epoch)──▶ scheduler ──places──▶ agent ──claim, events──▶ owner ──answers──▶ agent
//!     ▲                                                                              │
//!     └───────── takes over (epoch + 1) ◀── database: commits only at the row's epoch ◀┘
//! ```
//!
//! A step that changes nothing is none. Faults are paid from a budget; everything else is free.

use std::sync::Arc;

use sealci_core::ids::FencingToken;
use sealci_core::outcome::Cause;
use sealci_core::pipeline::{Granted, Pipeline, RerunScope};

use crate::explore::Model;
use crate::world::Books;
use crate::world::{Budget, End, Held, Memory, Message, Want, World, action_id, agent_of, claimant};

const REPLICAS: [usize; 2] = [0, 1];
const SCHEDULERS: [usize; 2] = [0, 1];
const AGENTS: [usize; 2] = [0, 1];

/// A part of the protocol that is left out, to see that the model notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeftOut {
    Nothing,
    /// A commit does not look at the row's epoch.
    EpochCheck,
    /// Answers go out before the commit.
    CommitBeforeAnswer,
    /// The agent starts without waiting for the grant.
    WaitForGrant,
    /// An owner takes an attempt that it does not have in memory for none.
    LookUp,
    /// Nobody says that an agent came back without what it claimed.
    Absence,
}

/// The protocol, and how much it is disturbed.
#[derive(Debug, Clone, Copy)]
pub struct Protocol {
    pub budget: Budget,
    pub left_out: LeftOut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    State { replica: usize, scheduler: usize },
    Place { scheduler: usize, agent: usize },
    Drop { scheduler: usize, agent: usize, number: u32 },
    AskToEnd { scheduler: usize, agent: usize },
    Absent { scheduler: usize, replica: usize },
    Silence { replica: usize },
    Deliver { message: Message, replica: usize },
    Start { agent: usize, number: u32 },
    End { agent: usize, number: u32 },
    Connect { agent: usize, scheduler: usize },
    ComeBack { agent: usize },
    TakeOver { replica: usize },
    Cancel { replica: usize },
    Rerun { replica: usize },
    Fault(Fault),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Between commit and answer.
    AfterCommit {
        message: Message,
        replica: usize,
        then: Then,
    },
    ReplicaDies {
        replica: usize,
    },
    /// The owner stands still for so long that another takes over; then it goes on.
    OwnerStalls {
        taken_by: usize,
    },
    SchedulerDies {
        scheduler: usize,
    },
    AgentDies {
        agent: usize,
    },
    AgentLosesItsDisk {
        agent: usize,
    },
    StreamBreaks {
        agent: usize,
    },
    /// An agent that lives is taken for dead.
    Suspicion {
        replica: usize,
    },
}

/// What an agent is answered.
#[derive(Clone, Copy)]
enum Answer {
    Granted { claim: u8, token: u64 },
    Refused { claim: u8 },
    Ack { token: u64, fenced: bool, closed: bool },
}

/// What a replica does after its commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    Answers,
    /// The answer is lost.
    IsUnheard,
    Dies,
}

impl Model for Protocol {
    type State = World;
    type Step = Step;

    fn start(&self) -> World {
        World::new(self.budget)
    }

    fn steps(&self, world: &World) -> Vec<(Step, World)> {
        let mut steps = Vec::new();
        self.controllers(world, &mut steps);
        self.schedulers(world, &mut steps);
        self.agents(world, &mut steps);
        self.messages(world, &mut steps);
        if world.budget.faults > 0 {
            self.faults(world, &mut steps);
        }
        steps
            .into_iter()
            .map(|(step, after)| (step, after.settle_names()))
            .filter(|(_, after)| after != world)
            .collect()
    }

    fn is_progress(&self, step: &Step) -> bool {
        !matches!(step, Step::Fault(_) | Step::Cancel { .. } | Step::Rerun { .. })
    }

    fn flaw(&self, world: &World) -> Option<String> {
        world.flaw()
    }

    fn is_end(&self, world: &World) -> bool {
        world.is_settled()
    }
}

type Steps = Vec<(Step, World)>;

impl Protocol {
    fn controllers(&self, world: &World, steps: &mut Steps) {
        for replica in REPLICAS {
            let owner_lives = (world.replicas[world.stored.owner].as_ref())
                .is_some_and(|memory| memory.epoch == world.stored.epoch);
            if !owner_lives {
                steps.push((Step::TakeOver { replica }, take_over(world, replica)));
            }
            let Some(memory) = &world.replicas[replica] else { continue };
            for scheduler in SCHEDULERS {
                let mut after = world.clone();
                let statement = (memory.epoch, memory.books.want());
                if world.schedulers[scheduler].is_none_or(|(epoch, _)| epoch <= statement.0) {
                    after.schedulers[scheduler] = Some(statement);
                }
                steps.push((Step::State { replica, scheduler }, after));
            }
            let claimed_by_silent = match memory.books.want() {
                Want::Claimed { agent, .. } => world.agents[agent].stream.is_none(),
                _ => false,
            };
            if claimed_by_silent {
                steps.push((Step::Silence { replica }, self.lose(world, replica)));
            }
            if world.budget.cancels > 0 {
                let mut after = self.change(world, replica, |pipeline| drop(pipeline.cancel()));
                after.budget.cancels -= 1;
                steps.push((Step::Cancel { replica }, after));
            }
            if world.budget.reruns > 0 && memory.books.action().outcome().is_some() {
                let mut after = self.change(world, replica, |pipeline| drop(pipeline.rerun(RerunScope::All)));
                after.budget.reruns -= 1;
                steps.push((Step::Rerun { replica }, after));
            }
        }
    }

    fn schedulers(&self, world: &World, steps: &mut Steps) {
        for scheduler in SCHEDULERS {
            let Some((_, want)) = world.schedulers[scheduler] else { continue };
            let connected = |agent: &usize| world.agents[*agent].stream == Some(scheduler);
            for agent in AGENTS.into_iter().filter(connected) {
                let held = &world.agents[agent].held;
                match want {
                    Want::Queued { number } => {
                        let mut connected = AGENTS.into_iter().filter(connected);
                        if !connected.any(|agent| world.agents[agent].held.contains_key(&number)) {
                            steps.push((Step::Place { scheduler, agent }, self.place(world, agent, number)));
                        }
                    }
                    Want::Claimed { number, agent: claimant, cancel } if claimant == agent => {
                        if !held.contains_key(&number) && self.left_out != LeftOut::Absence {
                            for replica in REPLICAS {
                                let is_current = world.replicas[replica].as_ref().is_some_and(|memory| {
                                    memory.books.want() == Want::Claimed { number, agent, cancel }
                                });
                                if is_current {
                                    let after = self.lose(world, replica);
                                    steps.push((Step::Absent { scheduler, replica }, after));
                                }
                            }
                        } else if cancel {
                            let after = ask_to_end(world, agent, number);
                            steps.push((Step::AskToEnd { scheduler, agent }, after));
                        }
                    }
                    _ => {}
                }
                for (&number, held) in held {
                    let is_wanted = match want {
                        Want::Queued { number: wanted } => wanted <= number,
                        Want::Claimed { number: wanted, agent: claimant, .. } => {
                            wanted < number || (wanted == number && claimant == agent)
                        }
                        Want::Gone => false,
                    };
                    if matches!(held, Held::Asked { .. }) && !is_wanted {
                        let mut after = world.clone();
                        after.agents[agent].held.remove(&number);
                        steps.push((Step::Drop { scheduler, agent, number }, after));
                    }
                }
            }
        }
    }

    fn agents(&self, world: &World, steps: &mut Steps) {
        for agent in AGENTS {
            if !world.agents[agent].is_up {
                steps.push((Step::ComeBack { agent }, come_back(world, agent)));
                continue;
            }
            if world.agents[agent].stream.is_none() {
                for scheduler in SCHEDULERS {
                    let mut after = world.clone();
                    after.agents[agent].stream = Some(scheduler);
                    steps.push((Step::Connect { agent, scheduler }, after));
                }
            }
            for (&number, held) in &world.agents[agent].held {
                let mut after = world.clone();
                match *held {
                    Held::Granted { token } => {
                        after.agents[agent].held.insert(number, Held::Running { token });
                        after.history.ran.insert((number, agent));
                        after.network.insert(Message::Event { agent, number, token, sequence: 0, end: None });
                        steps.push((Step::Start { agent, number }, after));
                    }
                    Held::Running { token } => {
                        end(&mut after, agent, number, token, End::of_agent(agent));
                        steps.push((Step::End { agent, number }, after));
                    }
                    Held::Asked { .. } | Held::Finished { .. } => {}
                }
            }
        }
    }

    fn messages(&self, world: &World, steps: &mut Steps) {
        for &message in &world.network {
            for replica in REPLICAS {
                let after = self.deliver(world, message, replica, Then::Answers);
                steps.push((Step::Deliver { message, replica }, after));
            }
        }
    }

    fn faults(&self, world: &World, steps: &mut Steps) {
        let mut fault = |fault, mut after: World| {
            after.budget = world.budget;
            let changes = after != *world;
            after.budget.faults -= 1;
            if changes {
                steps.push((Step::Fault(fault), after));
            }
        };
        for replica in REPLICAS {
            let owns = |memory: &Memory| memory.epoch == world.stored.epoch;
            let mut after = world.clone();
            after.replicas[replica] = None;
            fault(Fault::ReplicaDies { replica }, after);
            if world.replicas[1 - replica].as_ref().is_some_and(owns) {
                fault(Fault::OwnerStalls { taken_by: replica }, take_over(world, replica));
            }
            fault(Fault::Suspicion { replica }, self.lose(world, replica));
            for &message in &world.network {
                for then in [Then::IsUnheard, Then::Dies] {
                    let after = self.deliver(world, message, replica, then);
                    fault(Fault::AfterCommit { message, replica, then }, after);
                }
            }
        }
        for scheduler in SCHEDULERS {
            let mut after = world.clone();
            after.schedulers[scheduler] = None;
            for agent in after.agents.iter_mut().filter(|agent| agent.stream == Some(scheduler)) {
                agent.stream = None;
            }
            fault(Fault::SchedulerDies { scheduler }, after);
        }
        for agent in AGENTS {
            let mut after = world.clone();
            after.agents[agent].stream = None;
            fault(Fault::StreamBreaks { agent }, after.clone());
            after.agents[agent].is_up = false;
            fault(Fault::AgentDies { agent }, after.clone());
            after.agents[agent].held.clear();
            fault(Fault::AgentLosesItsDisk { agent }, after);
        }
    }

    fn place(&self, world: &World, agent: usize, number: u32) -> World {
        let mut after = world.clone();
        let taker = &mut after.agents[agent];
        taker.taken = (taker.taken + 1).min(2);
        let claim = taker.taken;
        taker.held.insert(number, Held::Asked { claim });
        after.network.insert(Message::Claim { agent, number, claim });
        if self.left_out == LeftOut::WaitForGrant {
            after.history.ran.insert((number, agent));
        }
        after
    }

    /// A replica takes in what an agent says: it decides in memory, commits, and answers.
    fn deliver(&self, world: &World, message: Message, replica: usize, then: Then) -> World {
        let Some(memory) = &world.replicas[replica] else { return world.clone() };
        let mut books = (*memory.books).clone();
        let answer = match message {
            Message::Claim { agent, number, claim } => {
                let token = FencingToken(world.stored.next_token);
                let before = books.action().current.clone();
                match books.pipeline.claim(action_id(), number, claimant(agent, claim), token) {
                    Ok(Granted::Now { token, .. }) => {
                        books.older.extend(before.map(|before| (before.number, before)));
                        Answer::Granted { claim, token: token.0 }
                    }
                    Ok(Granted::Before { token }) => Answer::Granted { claim, token: token.0 },
                    Err(_) => Answer::Refused { claim },
                }
            }
            Message::Event { agent, number, token, sequence, end } => {
                if books.attempt(number).is_none() && self.left_out != LeftOut::LookUp {
                    // Whoever does not know an attempt asks the database: his memory may be an outdated owner's.
                    let stored = world.stored.books.attempt(number);
                    books.older.extend(stored.map(|attempt| (number, attempt.clone())));
                }
                let known = books.clone();
                let claimant = books.attempt(number).map(|attempt| agent_of(&attempt.claimant));
                if claimant.is_some_and(|claimant| claimant != agent) {
                    return world.clone();
                }
                record(&mut books, number, token, sequence, end);
                let answer = acknowledgement(&books, number, token);
                if books == known {
                    books = (*memory.books).clone();
                }
                answer
            }
        };
        let mut after = world.clone();
        if self.left_out == LeftOut::CommitBeforeAnswer && then == Then::Dies {
            receive(&mut after, message, answer);
            after.replicas[replica] = None;
            return after;
        }
        let is_committed = books == *memory.books || self.commit(&mut after, replica, books);
        match then {
            Then::Answers if is_committed => receive(&mut after, message, answer),
            Then::Dies => after.replicas[replica] = None,
            Then::Answers | Then::IsUnheard => {}
        }
        after
    }

    fn lose(&self, world: &World, replica: usize) -> World {
        self.change(world, replica, |pipeline| {
            if let Some(number) = pipeline.actions[0].current.as_ref().map(|current| current.number) {
                pipeline.lose(action_id(), number, Cause::AgentLost, "silent");
            }
        })
    }

    fn change(&self, world: &World, replica: usize, change: impl FnOnce(&mut Pipeline)) -> World {
        let Some(memory) = &world.replicas[replica] else { return world.clone() };
        let mut books = (*memory.books).clone();
        change(&mut books.pipeline);
        let mut after = world.clone();
        if books != *memory.books {
            self.commit(&mut after, replica, books);
        }
        after
    }

    /// Writes whole rows, as the product does, if the row is still at the writer's epoch. Else the writer forgets.
    fn commit(&self, world: &mut World, replica: usize, books: Books) -> bool {
        let epoch = world.replicas[replica].as_ref().map(|memory| memory.epoch);
        if epoch != Some(world.stored.epoch) && self.left_out != LeftOut::EpochCheck {
            world.replicas[replica] = None;
            return false;
        }
        let (before, action) = (world.stored.books.action(), books.action());
        if action.outcome().is_some() && before.outcome() != action.outcome() {
            world.history.results.push((books.pipeline.round, action.attempts));
        }
        let tokens = books.action().current.as_ref().map_or(0, |current| current.token.0);
        world.stored.next_token = world.stored.next_token.max(tokens + 1);
        let books = Arc::new(books);
        world.stored.books = books.clone();
        world.replicas[replica] = epoch.map(|epoch| Memory { epoch, books });
        true
    }
}

fn take_over(world: &World, replica: usize) -> World {
    let mut after = world.clone();
    after.stored.epoch += 1;
    after.stored.owner = replica;
    after.replicas[replica] = Some(Memory { epoch: after.stored.epoch, books: world.stored.books.clone() });
    after
}

fn record(books: &mut Books, number: u32, token: u64, sequence: u64, end: Option<End>) {
    let (token, entry) = (FencingToken(token), End::entry(end));
    // What is refused changes nothing, and is answered with how far the record is.
    let _ = match books.older.get_mut(&number) {
        Some(older) => older.record_event(token, sequence, &entry).is_ok(),
        None => books.pipeline.record_event(action_id(), number, token, sequence, &entry).is_ok(),
    };
}

fn acknowledgement(books: &Books, number: u32, token: u64) -> Answer {
    let (fenced, closed) = match books.attempt(number).filter(|attempt| attempt.token.0 == token) {
        Some(attempt) => (attempt.fenced, attempt.is_closed()),
        None => (true, true),
    };
    Answer::Ack { token, fenced, closed }
}

/// An agent takes in the answer to what it said.
fn receive(world: &mut World, said: Message, answer: Answer) {
    let (Message::Claim { agent, number, .. } | Message::Event { agent, number, .. }) = said;
    let receiver = &mut world.agents[agent];
    let Some(held) = receiver.held.get(&number).copied().filter(|_| receiver.is_up) else { return };
    match (answer, held) {
        (Answer::Granted { claim, token }, Held::Asked { claim: mine }) if mine == claim => {
            receiver.held.insert(number, Held::Granted { token });
        }
        (Answer::Refused { claim }, Held::Asked { claim: mine }) if mine == claim => {
            receiver.held.remove(&number);
        }
        (
            Answer::Ack { token, fenced: true, .. },
            Held::Granted { token: mine } | Held::Running { token: mine },
        ) if mine == token => end(world, agent, number, token, End::Cancelled),
        (Answer::Ack { token, fenced, closed: true }, Held::Finished { token: mine, end })
            if mine == token =>
        {
            receiver.held.remove(&number);
            let recorded = world.stored.books.attempt(number).and_then(|attempt| attempt.outcome());
            if !fenced && recorded != Some(&end.outcome()) {
                world.history.lost_result = Some(number);
            }
        }
        _ => {}
    }
}

/// The result is spooled, and sent from then on.
fn end(world: &mut World, agent: usize, number: u32, token: u64, end: End) {
    let has_run = matches!(world.agents[agent].held.get(&number), Some(Held::Running { .. }));
    world.agents[agent].held.insert(number, Held::Finished { token, end });
    let sequence = u64::from(has_run);
    world.network.insert(Message::Event { agent, number, token, sequence, end: Some(end) });
}

fn ask_to_end(world: &World, agent: usize, number: u32) -> World {
    let mut after = world.clone();
    match world.agents[agent].held.get(&number) {
        Some(Held::Asked { .. }) => drop(after.agents[agent].held.remove(&number)),
        Some(&Held::Granted { token } | &Held::Running { token }) => {
            end(&mut after, agent, number, token, End::Cancelled);
        }
        _ => {}
    }
    after
}

/// Results stand; what was granted and did not end is over; what was not granted goes on under its claim id.
fn come_back(world: &World, agent: usize) -> World {
    let mut after = world.clone();
    after.agents[agent].is_up = true;
    for (&number, held) in &world.agents[agent].held {
        if let Held::Granted { token } | Held::Running { token } = *held {
            end(&mut after, agent, number, token, End::Restarted);
        }
    }
    after
}
