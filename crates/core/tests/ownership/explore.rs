//! Explores every state that a model can reach, breadth first, so that the shortest way to a bad one is found first.
//!
//! It answers what checkers of single paths cannot: whether from *every* state a good end can still be reached by the
//! steps of a system that nobody disturbs any more. States are known by a 64-bit fingerprint; a way is found again by
//! taking its steps again.

use std::collections::HashMap;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::fmt::Debug;
use std::hash::{Hash, Hasher};

/// What can be explored.
pub trait Model {
    type State: Clone + Eq + Hash;
    type Step: Clone + Debug;

    fn start(&self) -> Self::State;

    /// Every step that can be taken here, and where it leads.
    fn steps(&self, state: &Self::State) -> Vec<(Self::Step, Self::State)>;

    /// Whether a step is nobody's doing but the system's own: one that may be hoped for.
    fn is_progress(&self, step: &Self::Step) -> bool;

    /// What is wrong with this state, if something is.
    fn flaw(&self, state: &Self::State) -> Option<String>;

    /// Whether everything has come to its end here.
    fn is_end(&self, state: &Self::State) -> bool;
}

/// What an exploration found.
#[derive(Debug)]
pub struct Explored<S> {
    pub states: usize,
    pub transitions: usize,
    /// The longest of the shortest ways from the start.
    pub depth: usize,
    pub ends: usize,
    /// The first flaw found, and the shortest way to it.
    pub flaw: Option<(String, Vec<S>)>,
    /// The shortest way to a state from which no end can be reached by progress alone.
    pub stuck: Option<Vec<S>>,
}

struct Seen {
    parent: usize,
    fingerprint: u64,
    depth: usize,
    is_end: bool,
}

/// Explores a model wholly, or up to its first flaw.
pub fn explore<M: Model>(model: &M) -> Explored<M::Step> {
    let start = model.start();
    let mut seen =
        vec![Seen { parent: 0, fingerprint: fingerprint(&start), depth: 0, is_end: model.is_end(&start) }];
    let mut known = HashMap::from([(seen[0].fingerprint, 0)]);
    // Only the states of the present depth and the next are kept whole.
    let mut frontier = vec![(0, start)];
    let mut came_from: Vec<Vec<u32>> = vec![Vec::new()];
    let mut transitions = 0;
    while !frontier.is_empty() {
        let mut next = Vec::new();
        for (index, state) in frontier {
            if let Some(flaw) = model.flaw(&state) {
                let way = way_to(model, &seen, index);
                return report(&seen, transitions, Some((flaw, way)), None);
            }
            for (step, after) in model.steps(&state) {
                transitions += 1;
                let found = match known.entry(fingerprint(&after)) {
                    Entry::Occupied(entry) => *entry.get(),
                    Entry::Vacant(entry) => {
                        let is_end = model.is_end(&after);
                        let depth = seen[index].depth + 1;
                        seen.push(Seen { parent: index, fingerprint: *entry.key(), depth, is_end });
                        came_from.push(Vec::new());
                        entry.insert(seen.len() - 1);
                        next.push((seen.len() - 1, after));
                        seen.len() - 1
                    }
                };
                if model.is_progress(&step) && found != index {
                    came_from[found].push(u32::try_from(index).expect("fewer than 2³² states"));
                }
            }
        }
        frontier = next;
    }
    let stuck = first_without_end(&seen, &came_from).map(|index| way_to(model, &seen, index));
    report(&seen, transitions, None, stuck)
}

fn report<S>(
    seen: &[Seen],
    transitions: usize,
    flaw: Option<(String, Vec<S>)>,
    stuck: Option<Vec<S>>,
) -> Explored<S> {
    let depth = seen.last().map_or(0, |last| last.depth);
    let ends = seen.iter().filter(|seen| seen.is_end).count();
    Explored { states: seen.len(), transitions, depth, ends, flaw, stuck }
}

/// Walks back from all ends; what is not met cannot reach one.
fn first_without_end(seen: &[Seen], came_from: &[Vec<u32>]) -> Option<usize> {
    let mut reaches: Vec<bool> = seen.iter().map(|seen| seen.is_end).collect();
    let mut open: Vec<usize> = (0..seen.len()).filter(|index| reaches[*index]).collect();
    while let Some(index) = open.pop() {
        for before in came_from[index].iter().map(|before| *before as usize) {
            if !reaches[before] {
                reaches[before] = true;
                open.push(before);
            }
        }
    }
    reaches.iter().position(|reaches| !reaches)
}

fn way_to<M: Model>(model: &M, seen: &[Seen], index: usize) -> Vec<M::Step> {
    let mut prints = Vec::new();
    let mut at = index;
    while at != 0 {
        prints.push(seen[at].fingerprint);
        at = seen[at].parent;
    }
    let (mut state, mut way) = (model.start(), Vec::new());
    for print in prints.into_iter().rev() {
        let taken = model.steps(&state).into_iter().find(|(_, after)| fingerprint(after) == print);
        let (step, after) = taken.expect("a step that was taken can be taken again");
        way.push(step);
        state = after;
    }
    way
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}
