//! Knows which agents are there, and when each claimed attempt was last heard of.
//!
//! Pure: the time comes in as an [`Instant`]. It is the controller's own monotonic time, never a wall clock's. Time in
//! which this process, or every line of it to a scheduler, was away does not count against an agent (I1).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use sealci_core::ids::{AgentId, AttemptId};
use sealci_proto::scheduler::AgentState;

use super::lines::{AgentStream, LineId};

/// A tick that comes so much late counts as having been away.
const LATE: Duration = Duration::from_secs(5);

/// Which agents are there, and which attempts were heard of when.
#[derive(Debug)]
pub struct Presence {
    /// Silence of this length makes an attempt lost.
    lost_after: Duration,
    agents: HashMap<AgentId, Seen>,
    heard: HashMap<AttemptId, Heard>,
    /// None while there is no line to any scheduler: nothing is judged then.
    judging_since: Option<Instant>,
    last_tick: Option<(Instant, Duration)>,
}

/// The last word of an attempt.
#[derive(Debug, Clone, Copy)]
struct Heard {
    at: Instant,
    /// The scheduler it came by; none if the attempt is only known.
    by: Option<usize>,
}

/// An agent as a scheduler told of it last.
#[derive(Debug)]
struct Seen {
    stream: AgentStream,
    state: AgentState,
}

impl Seen {
    /// Whether a word of this stream comes after what is known: of two streams at one scheduler the later one counts, of two
    /// at different ones whichever is there, or spoke last.
    fn is_before(&self, stream: AgentStream, is_connected: bool) -> bool {
        if self.stream.line == stream.line {
            return !self.state.connected || self.stream.session <= stream.session;
        }
        !self.state.connected || is_connected
    }
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

    /// A line to a scheduler stands (again). Who was heard by it last gets the whole time to be heard of; after the first
    /// line, everyone.
    pub fn line_is_up(&mut self, line: LineId, now: Instant) {
        self.judging_since.get_or_insert(now);
        let theirs = self.heard.values_mut().filter(|heard| heard.by == Some(line.scheduler));
        theirs.for_each(|heard| heard.at = heard.at.max(now));
    }

    /// A line is gone, and with it what was known of the agents at its other end. Who has others comes by those, and is
    /// judged; nobody is judged for our deafness, without any.
    pub fn line_is_down(&mut self, line: LineId, is_last: bool) {
        if is_last {
            self.judging_since = None;
        }
        let there = self.agents.values_mut().filter(|seen| seen.stream.line == line);
        there.for_each(|seen| seen.state.connected = false);
    }

    /// An attempt was heard of: a claim, an event, a log chunk, or its agent's word that it holds it.
    pub fn heard(&mut self, attempt: AttemptId, by: LineId, now: Instant) {
        self.heard.insert(attempt, Heard { at: now, by: Some(by.scheduler) });
    }

    /// An attempt is known from now on, if it was not: silence counts from here.
    pub fn heard_or_begin(&mut self, attempt: AttemptId, now: Instant) {
        self.heard.entry(attempt).or_insert(Heard { at: now, by: None });
    }

    /// An attempt is over.
    pub fn forget(&mut self, attempt: AttemptId) {
        self.heard.remove(&attempt);
    }

    /// Whether nothing was heard of the agent's stream since its line stands.
    pub fn is_first_word(&self, id: AgentId, stream: AgentStream) -> bool {
        self.agents.get(&id).is_none_or(|seen| !seen.state.connected || seen.stream != stream)
    }

    /// What a scheduler says of an agent. A word of an older stream does not undo a newer one's.
    pub fn agent_state(&mut self, id: AgentId, stream: AgentStream, state: AgentState) {
        if self.agents.get(&id).is_none_or(|seen| seen.is_before(stream, state.connected)) {
            self.agents.insert(id, Seen { stream, state });
        }
    }

    /// What is known of an agent.
    pub fn agent(&self, id: AgentId) -> Option<&AgentState> {
        self.agents.get(&id).map(|seen| &seen.state)
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
                let heard = self.heard.get(attempt).map_or(since, |heard| heard.at.max(since));
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

    fn line(scheduler: usize) -> LineId {
        LineId { scheduler, session: 1 }
    }

    fn state(session: u64, connected: bool) -> AgentState {
        AgentState { session, connected, ..AgentState::default() }
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
        presence.line_is_up(line(0), start);
        presence.heard(attempt(), line(0), start);
        assert!(tick_until(&mut presence, start, 0, 60).is_empty());
        presence.heard(attempt(), line(0), start + Duration::from_secs(60));
        assert!(tick_until(&mut presence, start, 61, 120).is_empty());
        assert_eq!(tick_until(&mut presence, start, 121, 121), [attempt()]);
    }

    #[test]
    fn our_own_absence_is_nobodys_fault() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(line(0), start);
        presence.heard(attempt(), line(0), start);
        tick_until(&mut presence, start, 0, 10);
        // We were stopped for two minutes.
        assert!(tick_until(&mut presence, start, 130, 190).is_empty());
        assert_eq!(tick_until(&mut presence, start, 191, 191), [attempt()]);
    }

    #[test]
    fn without_a_line_nothing_is_judged() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(line(0), start);
        presence.line_is_down(line(0), true);
        assert!(tick_until(&mut presence, start, 0, 300).is_empty());
        presence.line_is_up(line(0), start + Duration::from_secs(300));
        assert!(tick_until(&mut presence, start, 301, 360).is_empty());
        assert_eq!(tick_until(&mut presence, start, 361, 361), [attempt()]);
    }

    #[test]
    fn a_second_line_that_comes_and_goes_postpones_no_judgement() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(line(0), start);
        presence.heard(attempt(), line(0), start);
        for second in (0..60).step_by(10) {
            presence.line_is_up(line(1), start + Duration::from_secs(second));
            assert!(tick_until(&mut presence, start, second, second + 9).is_empty());
            presence.line_is_down(line(1), false);
        }
        assert_eq!(tick_until(&mut presence, start, 60, 61), [attempt()]);
    }

    #[test]
    fn who_was_heard_by_a_line_that_comes_back_gets_the_whole_time() {
        let start = Instant::now();
        let mut presence = Presence::new(LOST_AFTER);
        presence.line_is_up(line(0), start);
        presence.line_is_up(line(1), start);
        presence.heard(attempt(), line(0), start);
        presence.line_is_down(line(0), false);
        assert!(tick_until(&mut presence, start, 0, 59).is_empty());
        presence.line_is_up(LineId { scheduler: 0, session: 2 }, start + Duration::from_secs(59));
        assert!(tick_until(&mut presence, start, 60, 119).is_empty());
        assert_eq!(tick_until(&mut presence, start, 120, 120), [attempt()]);
    }

    #[test]
    fn an_agent_is_where_it_was_heard_last_and_its_former_stream_undoes_nothing() {
        let agent = AgentId::from_parts(1, &[7; 10]);
        let mut presence = Presence::new(LOST_AFTER);
        let at = |scheduler, session| AgentStream { line: line(scheduler), session };
        let tell = |presence: &mut Presence, scheduler, session, connected| {
            presence.agent_state(agent, at(scheduler, session), state(session, connected));
            presence.agent(agent).map(|state| (state.session, state.connected))
        };
        assert_eq!(tell(&mut presence, 0, 5, true), Some((5, true)));
        // It came again, before its former stream was found to be dead.
        assert_eq!(tell(&mut presence, 0, 6, true), Some((6, true)));
        assert_eq!(tell(&mut presence, 0, 5, false), Some((6, true)));
        // It went over to another scheduler, which numbers its streams otherwise.
        assert!(presence.is_first_word(agent, at(1, 2)));
        assert_eq!(tell(&mut presence, 1, 2, true), Some((2, true)));
        assert_eq!(tell(&mut presence, 0, 6, false), Some((2, true)));
        // The line of the former one says nothing of it, its own does.
        presence.line_is_down(line(0), false);
        assert!(!presence.is_first_word(agent, at(1, 2)));
        presence.line_is_down(line(1), true);
        assert!(presence.is_first_word(agent, at(1, 2)));
    }
}
