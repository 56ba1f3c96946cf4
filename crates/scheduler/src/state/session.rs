//! Keeps the books of one agent's stream: what the agent said it holds, what was asked of it under which number, and
//! what follows from comparing the two.
//!
//! Invariants: a number is never used twice; an attempt is concluded to be absent only from a `Held` that answers a
//! number of this stream up to which it was asked for; an entry that was never sent is taken back without a trace.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sealci_core::ids::{AgentId, AttemptId, InstanceId};
use sealci_core::plan::Resources;
use sealci_proto::agent::{self, HeldState, desired_entry};
use sealci_proto::{Malformed, attempt_id};

/// What is wanted of the agent for one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    Run { resources: Resources },
    Keep,
    Cancel { grace_ms: u64 },
    Drop,
}

#[derive(Debug)]
struct Asked {
    wish: Wish,
    /// The first number under which the agent was asked to have the attempt (or, for [`Wish::Drop`], not to have it).
    number: Option<u64>,
    /// What it takes from the agent until the agent has answered.
    room: Option<Resources>,
    /// The agent held it as finished: its absence afterwards is no loss.
    finished: bool,
    /// Its absence was reported.
    reported: bool,
}

/// What the agent said of an attempt.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub state: HeldState,
    pub wire: agent::HeldAttempt,
}

/// One stream of an agent.
#[derive(Debug)]
pub(super) struct Session {
    pub agent: AgentId,
    pub instance: InstanceId,
    pub version: String,
    pub offer: agent::Offer,
    pub held: BTreeMap<AttemptId, Held>,
    /// It has said what it holds.
    pub ready: bool,
    /// It was told that another instance gets the new work.
    pub superseded: bool,
    /// When its last `Held` came.
    pub heard_at: Duration,
    asked: BTreeMap<AttemptId, Asked>,
    unsent: BTreeSet<AttemptId>,
    /// The last number given.
    counter: u64,
    /// The highest number answered.
    answered: u64,
}

impl Session {
    pub fn new(
        agent: AgentId,
        instance: InstanceId,
        version: String,
        offer: agent::Offer,
        now: Duration,
    ) -> Self {
        Self {
            agent,
            instance,
            version,
            offer,
            held: BTreeMap::new(),
            ready: false,
            superseded: false,
            heard_at: now,
            asked: BTreeMap::new(),
            unsent: BTreeSet::new(),
            counter: 0,
            answered: 0,
        }
    }

    /// Everything that was asked of it and not settled, in order.
    pub fn asked(&self) -> impl Iterator<Item = AttemptId> {
        self.asked.keys().copied()
    }

    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Wants something of the agent. What changes nothing for the agent is not sent.
    pub fn ask(&mut self, attempt: AttemptId, wish: Wish) {
        let finished = self.held.get(&attempt).is_some_and(|held| held.state == HeldState::Finished);
        let room = match wish {
            Wish::Run { resources } => Some(resources),
            _ => None,
        };
        let Some(asked) = self.asked.get_mut(&attempt) else {
            self.asked.insert(attempt, Asked { wish, number: None, room, finished, reported: false });
            self.unsent.insert(attempt);
            return;
        };
        let before = std::mem::replace(&mut asked.wish, wish);
        if before == wish {
            return;
        }
        match (before, wish) {
            // The agent has it, or is about to: the claim of what it runs tells it nothing new.
            (Wish::Run { .. }, Wish::Keep) => return,
            (_, Wish::Drop) if asked.number.is_none() => {
                self.forget(attempt);
                return;
            }
            (_, Wish::Drop) => asked.number = None,
            // From here on its absence means something new.
            (Wish::Drop, _) | (_, Wish::Run { .. }) => {
                asked.number = None;
                asked.finished = finished;
                asked.reported = false;
                asked.room = room.or(asked.room);
            }
            _ => {}
        }
        self.unsent.insert(attempt);
    }

    /// Nothing more is concluded about the attempt.
    pub fn forget(&mut self, attempt: AttemptId) {
        self.asked.remove(&attempt);
        self.unsent.remove(&attempt);
    }

    /// The absence of the attempt shall be reported again.
    pub fn report_again(&mut self, attempt: AttemptId) {
        if let Some(asked) = self.asked.get_mut(&attempt) {
            asked.reported = false;
        }
    }

    /// The absence of the attempt was reported.
    pub fn reported(&mut self, attempt: AttemptId) {
        if let Some(asked) = self.asked.get_mut(&attempt) {
            asked.reported = true;
        }
    }

    /// Takes in a `Held`; `answered` is its number, if that is of this stream.
    pub fn take_held(
        &mut self,
        attempts: Vec<agent::HeldAttempt>,
        answers: Option<u64>,
    ) -> Result<(), Malformed> {
        if let Some(number) = answers {
            if number > self.counter {
                return Err(Malformed(format!(
                    "`held` answers number {number}, the last one sent is {}",
                    self.counter
                )));
            }
            self.answered = self.answered.max(number);
        }
        self.held.clear();
        for wire in attempts {
            let attempt = attempt_id(&wire.attempt)?;
            let state = wire.state();
            if state == HeldState::Finished
                && let Some(asked) = self.asked.get_mut(&attempt)
            {
                asked.finished = true;
            }
            self.held.insert(attempt, Held { state, wire });
        }
        let (held, answered) = (&self.held, self.answered);
        self.asked.retain(|attempt, asked| {
            asked.wish != Wish::Drop || held.contains_key(attempt) || !is_answered(asked, answered)
        });
        self.ready = true;
        Ok(())
    }

    /// What the agent was asked to have, has answered for and does not hold, and what of that is not yet reported.
    /// What it held as finished before is not among them.
    pub fn absent(&self) -> Vec<AttemptId> {
        self.asked
            .iter()
            .filter(|(attempt, asked)| {
                asked.wish != Wish::Drop
                    && !asked.finished
                    && !asked.reported
                    && is_answered(asked, self.answered)
                    && !self.held.contains_key(attempt)
            })
            .map(|(attempt, _)| *attempt)
            .collect()
    }

    /// What is reserved on the agent: what it holds, and what it was asked to take on and has not answered for.
    pub fn reserved(&self) -> BTreeMap<AttemptId, Resources> {
        let held = self.held.iter().map(|(attempt, held)| {
            let asked = self.asked.get(attempt).and_then(|asked| asked.room);
            let said = held.wire.reserved.as_ref().map(|wire| Resources::from(*wire));
            (*attempt, said.or(asked).unwrap_or_default())
        });
        let under_way = self.asked.iter().filter_map(|(attempt, asked)| {
            let open = !self.held.contains_key(attempt) && !is_answered(asked, self.answered);
            asked.room.filter(|_| open).map(|room| (*attempt, room))
        });
        held.chain(under_way).collect()
    }

    /// Numbers what was not sent yet. `spec` gives what a run needs; a run whose spec is not to be had any more is
    /// forgotten. Of `max_bytes` at most each, but for a single entry that is larger by itself.
    pub fn unsent_desired(
        &mut self,
        max_bytes: usize,
        mut spec: impl FnMut(AttemptId) -> Option<Vec<u8>>,
    ) -> Vec<(u64, Vec<agent::DesiredEntry>)> {
        let mut all = Vec::new();
        let mut entries = Vec::new();
        let mut size = 0;
        for attempt in std::mem::take(&mut self.unsent) {
            let Some(asked) = self.asked.get_mut(&attempt) else { continue };
            let wish = match asked.wish {
                Wish::Run { resources } => {
                    let Some(spec) = spec(attempt) else {
                        self.asked.remove(&attempt);
                        continue;
                    };
                    desired_entry::Wish::Run(agent::Run { spec, reserved: Some(resources.into()) })
                }
                Wish::Keep => desired_entry::Wish::Keep(agent::Keep {}),
                Wish::Cancel { grace_ms } => desired_entry::Wish::Cancel(agent::Cancel { grace_ms }),
                Wish::Drop => desired_entry::Wish::Drop(agent::Drop {}),
            };
            let bytes = ENTRY_BYTES
                + match &wish {
                    desired_entry::Wish::Run(run) => run.spec.len(),
                    _ => 0,
                };
            if size + bytes > max_bytes && !entries.is_empty() {
                self.counter += 1;
                all.push((self.counter, std::mem::take(&mut entries)));
                size = 0;
            }
            size += bytes;
            // Of the message that this entry goes into.
            asked.number.get_or_insert(self.counter + 1);
            entries.push(agent::DesiredEntry { attempt: Some(attempt.into()), wish: Some(wish) });
        }
        if !entries.is_empty() {
            self.counter += 1;
            all.push((self.counter, entries));
        }
        all
    }
}

/// An entry's size on the wire without its spec, generously.
const ENTRY_BYTES: usize = 96;

fn is_answered(asked: &Asked, answered: u64) -> bool {
    asked.number.is_some_and(|number| number <= answered)
}

#[cfg(test)]
mod tests {
    use sealci_core::ids::ActionId;

    use super::*;

    const RUN: Wish = Wish::Run { resources: Resources::DEFAULT };

    fn attempt(n: u64) -> AttemptId {
        AttemptId { action: ActionId::from_parts(n, &[0; 10]), number: 1 }
    }

    fn session() -> Session {
        let (agent, instance) = (AgentId::from_parts(1, &[0; 10]), InstanceId::from_parts(1, &[0; 10]));
        Session::new(agent, instance, String::new(), agent::Offer::default(), Duration::ZERO)
    }

    fn held(attempt: AttemptId, state: HeldState) -> agent::HeldAttempt {
        agent::HeldAttempt {
            attempt: Some(attempt.into()),
            state: state.into(),
            reserved: Some(Resources::DEFAULT.into()),
            ..Default::default()
        }
    }

    fn send(session: &mut Session) -> Vec<(u64, usize)> {
        let all = session.unsent_desired(1000, |_| Some(vec![0; 400]));
        all.into_iter().map(|(number, entries)| (number, entries.len())).collect()
    }

    #[test]
    fn absence_counts_only_in_an_answer() {
        let mut session = session();
        session.ask(attempt(1), RUN);
        assert_eq!(send(&mut session), [(1, 1)]);
        session.take_held(vec![], None).unwrap();
        assert!(session.absent().is_empty(), "it crossed the question");
        assert_eq!(session.reserved().len(), 1);
        session.take_held(vec![], Some(1)).unwrap();
        assert_eq!(session.absent(), [attempt(1)]);
        assert!(session.reserved().is_empty());
        session.reported(attempt(1));
        assert!(session.absent().is_empty());
        session.report_again(attempt(1));
        assert_eq!(session.absent(), [attempt(1)]);
    }

    #[test]
    fn what_was_finished_is_not_lost() {
        let mut session = session();
        session.ask(attempt(1), Wish::Keep);
        send(&mut session);
        session.take_held(vec![held(attempt(1), HeldState::Finished)], Some(1)).unwrap();
        session.take_held(vec![], Some(1)).unwrap();
        assert!(session.absent().is_empty());
    }

    #[test]
    fn a_claim_and_a_cancel_keep_the_number_of_the_run() {
        let mut session = session();
        session.ask(attempt(1), RUN);
        send(&mut session);
        session.ask(attempt(1), Wish::Keep);
        assert!(!session.has_unsent());
        session.ask(attempt(1), Wish::Cancel { grace_ms: 5 });
        assert_eq!(send(&mut session), [(2, 1)]);
        session.take_held(vec![], Some(1)).unwrap();
        assert_eq!(session.absent(), [attempt(1)]);
    }

    #[test]
    fn a_drop_frees_the_room_once_it_is_answered() {
        let mut session = session();
        session.ask(attempt(1), RUN);
        session.ask(attempt(1), Wish::Drop);
        assert!(!session.has_unsent() && session.reserved().is_empty(), "never sent, nothing to drop");
        session.ask(attempt(1), RUN);
        send(&mut session);
        session.ask(attempt(1), Wish::Drop);
        send(&mut session);
        session.take_held(vec![], Some(1)).unwrap();
        assert_eq!(session.reserved().len(), 1, "the drop is still under way");
        session.take_held(vec![held(attempt(1), HeldState::Assigned)], Some(2)).unwrap();
        assert_eq!(session.reserved().len(), 1, "still being cleaned up");
        session.take_held(vec![], Some(2)).unwrap();
        assert!(session.reserved().is_empty() && session.asked().next().is_none());
    }

    #[test]
    fn large_specs_are_spread_over_messages() {
        let mut session = session();
        for n in 0..5 {
            session.ask(attempt(n), RUN);
        }
        assert_eq!(send(&mut session), [(1, 2), (2, 2), (3, 1)]);
        session.take_held(vec![], Some(2)).unwrap();
        assert_eq!(session.absent().len(), 4);
    }

    #[test]
    fn a_number_that_was_never_given_is_refused() {
        assert!(session().take_held(vec![], Some(1)).is_err());
    }
}
