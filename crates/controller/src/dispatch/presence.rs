//! Knows which agents are there, and when each claimed attempt was last heard of.
//!
//! Pure: the time comes in as an [`Instant`]. It is the controller's own monotonic time, never a wall clock's. Time in
//! which this process, or its line to the scheduler, was away does not count against an agent (I1).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sealci_core::ids::{AgentId, AttemptId};
use sealci_proto::scheduler::AgentState;

/// A tick that comes so much late counts as having been away.
const LATE: Duration = Duration::from_secs(5);

/// Which agents are there, and which attempts were heard of when.
#[derive(Debug)]
pub struct Presence {
    /// Silence of this length makes an attempt lost.
    lost_after: Duration,
    agents: HashMap<AgentId, AgentState>,
    heard: HashMap<AttemptId, Instant>,
    /// None while there is no line to a scheduler: nothing is judged then.
    judging_since: Option<Instant>,
    last_tick: Option<(Instant, Duration)>,
}

impl Presence {
    /// Nobody is there yet, and nothing is judged.
    pub fn new(lost_after: Duration) -> Self {
        Self {
            lost_after,
            agents: HashMap::new(),
            heard: HashMap::new(),
            judging_since: None,
            last_tick: None,
        }
    }

    /// The line to the scheduler stands (again): everyone gets the whole time to be heard of.
    pub fn line_is_up(&mut self, now: Instant) {
        self.judging_since = Some(now);
    }

    /// The line to the scheduler is gone: nobody is judged for our deafness.
    pub fn line_is_down(&mut self) {
        self.judging_since = None;
        self.agents.values_mut().for_each(|agent| agent.connected = false);
    }

    /// An attempt was heard of: a claim, an event, a log chunk, or its agent's word that it holds it.
    pub fn heard(&mut self, attempt: AttemptId, now: Instant) {
        self.heard.insert(attempt, now);
    }

    /// An attempt is known from now on, if it was not: silence counts from here.
    pub fn heard_or_begin(&mut self, attempt: AttemptId, now: Instant) {
        self.heard.entry(attempt).or_insert(now);
    }

    /// An attempt is over.
    pub fn forget(&mut self, attempt: AttemptId) {
        self.heard.remove(&attempt);
    }

    /// Whether nothing was heard of the agent's stream since the line stands.
    pub fn is_first_word(&self, id: AgentId, session: u64) -> bool {
        self.agents.get(&id).is_none_or(|known| !known.connected || known.session < session)
    }

    /// What the scheduler says of an agent. A word of an older stream does not undo a newer one's.
    pub fn agent_state(&mut self, id: AgentId, state: AgentState) {
        let outdated =
            self.agents.get(&id).is_some_and(|known| known.connected && known.session > state.session);
        if !outdated {
            self.agents.insert(id, state);
        }
    }

    /// What is known of an agent.
    pub fn agent(&self, id: AgentId) -> Option<&AgentState> {
        self.agents.get(&id)
    }

    /// The attempts that were silent for too long, of those given. `interval` is when the next tick is meant to come.
    pub fn lost(
        &mut self,
        active: impl Iterator<Item = AttemptId>,
        now: Instant,
        interval: Duration,
    ) -> Vec<AttemptId> {
        let was_away = self
            .last_tick
            .replace((now, interval))
            .is_some_and(|(last, interval)| now.saturating_duration_since(last) > interval + LATE);
        if was_away && self.judging_since.is_some() {
            self.judging_since = Some(now);
        }
        let Some(since) = self.judging_since else { return Vec::new() };
        active
            .filter(|attempt| {
                let heard = self.heard.get(attempt).copied().unwrap_or(since).max(since);
                now.saturating_duration_since(heard) > self.lost_after
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_core::ids::ActionId;

    const LOST_AFTER: Duration = Duration::from_secs(60);
    const TICK: Duration = Duration::from_secs(1);

    fn attempt() -> AttemptId {
        AttemptId { action: ActionId::from_parts(1, &[1; 10]), number: 1 }
    }

    /// Ticks every second up to `seconds` after `start`; what the last tick found.
    fn tick_until(presence: &mut Presence, start: Instant, from: u64, seconds: u64) -> Vec<AttemptId> {
        (from..=seconds).fold(Vec::new(), |_, second| {
            presence.lost([attempt()].into_iter(), start + Duration::from_secs(second), TICK)
        })
    }

    #[test]
    fn silence_makes_an_attempt_lost_and_a_word_does_not() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(start);
        presence.heard(attempt(), start);
        assert!(tick_until(&mut presence, start, 0, 60).is_empty());
        presence.heard(attempt(), start + Duration::from_secs(60));
        assert!(tick_until(&mut presence, start, 61, 120).is_empty());
        assert_eq!(tick_until(&mut presence, start, 121, 121), [attempt()]);
    }

    #[test]
    fn our_own_absence_is_nobodys_fault() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(start);
        presence.heard(attempt(), start);
        tick_until(&mut presence, start, 0, 10);
        // We were stopped for two minutes.
        assert!(tick_until(&mut presence, start, 130, 190).is_empty());
        assert_eq!(tick_until(&mut presence, start, 191, 191), [attempt()]);
    }

    #[test]
    fn without_a_line_nothing_is_judged() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(start);
        presence.line_is_down();
        assert!(tick_until(&mut presence, start, 0, 300).is_empty());
        presence.line_is_up(start + Duration::from_secs(300));
        assert!(tick_until(&mut presence, start, 301, 360).is_empty());
        assert_eq!(tick_until(&mut presence, start, 361, 361), [attempt()]);
    }
}
