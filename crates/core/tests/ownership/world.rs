//! The world that the model moves in: a database, two controller replicas, two schedulers, two agents, and a network that
//! may deliver late, in any order, twice or never.
//!
//! What decides is the product's own [`Pipeline`] and `Attempt`; what stands here is who knows what, and who may write.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use sealci_core::attempt::{Attempt, Claimant, JournalEntry};
use sealci_core::ids::{ActionId, AgentId, ClaimId, InstanceId, PipelineId};
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::pipeline::{Action, ActionState, Pipeline};
use sealci_core::plan::AllowFailure;

/// Everything there is at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub stored: Stored,
    /// What each replica has in memory; nothing after its crash, and after a commit that was refused.
    pub replicas: [Option<Memory>; 2],
    /// What each scheduler was told, with its epoch; nothing after its restart.
    pub schedulers: [Option<(u64, Want)>; 2],
    pub agents: [Agent; 2],
    /// All that was ever sent.
    pub network: BTreeSet<Message>,
    pub history: History,
    pub budget: Budget,
}

/// The pipeline's rows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Books {
    pub pipeline: Pipeline,
    /// Attempts that are not their action's current one any more.
    pub older: BTreeMap<u32, Attempt>,
}

/// The database.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Stored {
    pub books: Arc<Books>,
    pub owner: usize,
    pub epoch: u64,
    pub next_token: u64,
}

/// A pipeline in the memory of a replica that owns it, or thinks so.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Memory {
    pub epoch: u64,
    pub books: Arc<Books>,
}

/// What is wanted of the one action's present attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Want {
    Queued { number: u32 },
    Claimed { number: u32, agent: usize, cancel: bool },
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Agent {
    pub is_up: bool,
    /// The scheduler it is connected to.
    pub stream: Option<usize>,
    /// How often it took an attempt on; claim ids are made of it. It stops at 2, to keep the world finite.
    pub taken: u8,
    /// Its spool: it outlives a crash.
    pub held: BTreeMap<u32, Held>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Held {
    Asked { claim: u8 },
    Granted { token: u64 },
    Running { token: u64 },
    Finished { token: u64, end: End },
}

/// How an attempt ends. Each agent's actions end in a way of their own, so that results cannot be confused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    Succeeded,
    Failed,
    Cancelled,
    Restarted,
}

/// What agents say: it is repeated until it is answered, and what was once sent may arrive at any time. Answers arrive at once
/// or never: one that comes late is like one that was lost and asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    Claim {
        agent: usize,
        number: u32,
        claim: u8,
    },
    /// `end` is none in the event `running`.
    Event {
        agent: usize,
        number: u32,
        token: u64,
        sequence: u64,
        end: Option<End>,
    },
}

/// What an onlooker who sees everything would have written down.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct History {
    /// Each outcome that became the action's: round, attempt.
    pub results: Vec<(u32, u32)>,
    /// Who ran commands under which attempt.
    pub ran: BTreeSet<(u32, usize)>,
    /// A result was acknowledged and is not recorded.
    pub lost_result: Option<u32>,
}

/// What may still happen to the system from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Budget {
    pub faults: u8,
    pub cancels: u8,
    pub reruns: u8,
}

impl World {
    /// One action, queued; the first replica owns it, and everybody is there.
    pub fn new(budget: Budget) -> Self {
        let action = Action::pending(
            action_id(),
            "a".into(),
            Vec::new(),
            AllowFailure::Never,
            sealci_core::retry::Rules::default(),
        );
        let id = PipelineId::from_parts(1, &[9; 10]);
        let mut pipeline = Pipeline { id, round: 1, cancel_wished: false, actions: vec![action] };
        pipeline.start();
        let books = Arc::new(Books { pipeline, older: BTreeMap::new() });
        let agent = |stream| Agent { is_up: true, stream: Some(stream), taken: 0, held: BTreeMap::new() };
        Self {
            stored: Stored { books: books.clone(), owner: 0, epoch: 1, next_token: 1 },
            replicas: [Some(Memory { epoch: 1, books }), None],
            schedulers: [None, None],
            agents: [agent(0), agent(1)],
            network: BTreeSet::new(),
            history: History::default(),
            budget,
        }
    }

    /// Makes one of all states that differ only in names, or in messages that nobody will ever heed again.
    pub fn settle_names(mut self) -> Self {
        if self.stored.owner != 0 {
            self.stored.owner = 0;
            self.replicas.swap(0, 1);
        }
        let streams = |world: &Self| world.agents.each_ref().map(|agent| agent.stream);
        let other = |stream: Option<usize>| stream.map(|scheduler| 1 - scheduler);
        let swapped = ([self.schedulers[1], self.schedulers[0]], streams(&self).map(other));
        if swapped < (self.schedulers, streams(&self)) {
            self.schedulers = swapped.0;
            for (agent, stream) in self.agents.iter_mut().zip(swapped.1) {
                agent.stream = stream;
            }
        }
        let (stored, agents) = (&self.stored.books, &self.agents);
        self.network.retain(|message| match *message {
            Message::Claim { agent, number, claim } => {
                stored.action().attempts < number
                    || agents[agent].held.get(&number) == Some(&Held::Asked { claim })
            }
            Message::Event { agent, number, sequence, .. } => {
                agents[agent].held.contains_key(&number)
                    || stored.attempt(number).is_none_or(|attempt| sequence >= attempt.next_sequence)
            }
        });
        self
    }

    /// Whether the action is over and nobody owes anything.
    pub fn is_settled(&self) -> bool {
        self.stored.books.action().outcome().is_some()
            && self.agents.iter().all(|agent| agent.is_up && agent.held.is_empty())
    }

    /// What must never be.
    pub fn flaw(&self) -> Option<String> {
        let rounds: Vec<u32> = self.history.results.iter().map(|(round, _)| *round).collect();
        if rounds.windows(2).any(|pair| pair[0] >= pair[1]) {
            return Some(format!("I2: a round has two results: {:?}", self.history.results));
        }
        let numbers: Vec<u32> = self.history.ran.iter().map(|(number, _)| *number).collect();
        if numbers.windows(2).any(|pair| pair[0] == pair[1]) {
            return Some(format!("two agents ran one attempt: {:?}", self.history.ran));
        }
        if let Some(number) = self.history.lost_result {
            return Some(format!("the result of attempt {number} was acknowledged and is not recorded"));
        }
        let action = self.stored.books.action();
        let has_run = matches!(action.outcome(), Some(Outcome::Succeeded | Outcome::Failed { .. }));
        let current = action.current.as_ref();
        if has_run && current.is_none_or(|current| current.fenced || current.outcome() != action.outcome()) {
            return Some("I2: the action's result is not its current attempt's".into());
        }
        None
    }
}

impl Books {
    pub fn action(&self) -> &Action {
        &self.pipeline.actions[0]
    }

    pub fn attempt(&self, number: u32) -> Option<&Attempt> {
        let current = self.action().current.as_ref().filter(|current| current.number == number);
        current.or_else(|| self.older.get(&number))
    }

    /// What its owner states to schedulers.
    pub fn want(&self) -> Want {
        let action = self.action();
        match (&action.state, &action.current) {
            (ActionState::Queued, _) => Want::Queued { number: action.attempts + 1 },
            (ActionState::Active, Some(current)) => Want::Claimed {
                number: current.number,
                agent: agent_of(&current.claimant),
                cancel: self.pipeline.cancel_wished,
            },
            _ => Want::Gone,
        }
    }
}

impl End {
    pub fn of_agent(agent: usize) -> Self {
        if agent == 0 { Self::Succeeded } else { Self::Failed }
    }

    pub fn outcome(self) -> Outcome {
        match self {
            Self::Succeeded => Outcome::Succeeded,
            Self::Failed => Outcome::Failed { exit_code: 1, limit: None },
            Self::Cancelled => Outcome::Cancelled,
            Self::Restarted => Outcome::Errored { cause: Cause::AgentRestarted, message: "restarted".into() },
        }
    }

    pub fn entry(end: Option<Self>) -> JournalEntry {
        end.map_or(JournalEntry::Running, |end| JournalEntry::Finished {
            outcome: end.outcome(),
            log_length: 0,
        })
    }
}

pub fn action_id() -> ActionId {
    ActionId::from_parts(1, &[7; 10])
}

pub fn claimant(agent: usize, claim: u8) -> Claimant {
    let byte = agent as u8 + 1;
    Claimant {
        claim: ClaimId::from_parts(1, &[byte * 16 + claim; 10]),
        agent: agent_id(agent),
        instance: InstanceId::from_parts(1, &[byte; 10]),
    }
}

pub fn agent_of(claimant: &Claimant) -> usize {
    usize::from(claimant.agent != agent_id(0))
}

fn agent_id(agent: usize) -> AgentId {
    AgentId::from_parts(1, &[agent as u8 + 1; 10])
}
