//! Decides what each action waits for, and refuses what could never start.

use std::collections::HashMap;

use super::error::{Complaints, ManifestErrorKind};
use super::keys::nearest;
use super::read::{DraftAction, Needs};
use super::source::{Span, quoted};

/// Names that are shown of a cycle before the rest is counted.
const SHOWN_OF_CYCLE: usize = 24;
/// Suggestions that are looked for in one manifest: each compares with every action.
const MAX_SUGGESTIONS: usize = 16;

/// Something that an action waits for.
#[derive(Debug, Clone, Copy)]
struct Edge {
    to: usize,
    /// Where it was written; none where it follows from the order.
    written: Option<Span>,
}

/// The needs of each action, as indices, ascending. With complaints they are no more than a guess.
pub(super) fn resolve(actions: &[DraftAction<'_>], complaints: &mut Complaints) -> Vec<Vec<usize>> {
    let index = actions.iter().enumerate().map(|(index, action)| (action.name, index)).collect();
    let mut names = Names { actions, index, suggestions: 0 };
    let edges_of = |(this, action): (usize, &DraftAction<'_>)| match &action.needs {
        Needs::Previous => this.checked_sub(1).map(|to| Edge { to, written: None }).into_iter().collect(),
        Needs::Unreadable => Vec::new(),
        Needs::Listed(listed) => names.edges(action.name, listed, complaints),
    };
    let edges: Vec<Vec<Edge>> = actions.iter().enumerate().map(edges_of).collect();
    refuse_cycles(actions, &edges, complaints);
    let needs_of = |edges: Vec<Edge>| {
        let mut needs: Vec<usize> = edges.into_iter().map(|edge| edge.to).collect();
        needs.sort_unstable();
        needs
    };
    edges.into_iter().map(needs_of).collect()
}

/// Whose artifacts each action uses, as indices, ascending. What it uses must be over before it starts, so it must need it,
/// if by others; and have artifacts.
pub(super) fn resolve_uses(
    actions: &[DraftAction<'_>],
    needs: &[Vec<usize>],
    complaints: &mut Complaints,
) -> Vec<Vec<usize>> {
    let index = actions.iter().enumerate().map(|(index, action)| (action.name, index)).collect();
    let mut names = Names { actions, index, suggestions: 0 };
    let mut uses = Vec::with_capacity(actions.len());
    for (this, action) in actions.iter().enumerate() {
        let ancestors = if action.uses.is_empty() { Vec::new() } else { ancestors_of(this, needs) };
        let mut used = Vec::with_capacity(action.uses.len());
        for (name, span) in &action.uses {
            let Some(&to) = names.index.get(name) else {
                let message = format!("there is no action {}", quoted(name));
                let mend = names.suggest(name, action.name);
                complaints.add(ManifestErrorKind::UnknownAction, *span, message, mend);
                continue;
            };
            if used.contains(&to) {
                let message = format!("{} is used twice", quoted(name));
                complaints.add(ManifestErrorKind::Duplicate, *span, message, "name it once");
            } else if to == this || !ancestors[to] {
                let message =
                    format!("{} uses {}, and does not wait for it", quoted(action.name), quoted(name));
                let mend = format!("add {} to its `needs`", quoted(name));
                complaints.add(ManifestErrorKind::Value, *span, message, mend);
            } else if !actions[to].has_artifacts() {
                let message = format!("{} has no `artifacts`", quoted(name));
                let mend = "say there what it keeps: `artifacts: {paths: [target/report]}`";
                complaints.add(ManifestErrorKind::Value, *span, message, mend);
            } else {
                used.push(to);
            }
        }
        used.sort_unstable();
        uses.push(used);
    }
    uses
}

/// Which actions are over before this one starts.
fn ancestors_of(this: usize, needs: &[Vec<usize>]) -> Vec<bool> {
    let mut found = vec![false; needs.len()];
    let mut left = needs[this].clone();
    while let Some(next) = left.pop() {
        if !std::mem::replace(&mut found[next], true) {
            left.extend(&needs[next]);
        }
    }
    found
}

/// What the actions are called.
struct Names<'a, 'n> {
    actions: &'a [DraftAction<'n>],
    index: HashMap<&'n str, usize>,
    suggestions: usize,
}

impl Names<'_, '_> {
    /// What the action of this `name` waits for, without itself, doubles, and what there is not.
    fn edges(&mut self, name: &str, listed: &[(&str, Span)], complaints: &mut Complaints) -> Vec<Edge> {
        let mut edges = Vec::with_capacity(listed.len());
        let mut seen: HashMap<&str, Span> = HashMap::with_capacity(listed.len());
        for (needed, span) in listed {
            if let Some(first) = seen.get(needed) {
                let message = format!("{} is needed twice", quoted(needed));
                let kind = ManifestErrorKind::Duplicate;
                complaints.add_with_first(kind, *span, Some(*first), message, "name it once");
                continue;
            }
            seen.insert(needed, *span);
            if *needed == name {
                let message = format!("{} needs itself", quoted(needed));
                let mend = "remove it, or name the action that was meant";
                complaints.add(ManifestErrorKind::Cycle, *span, message, mend);
            } else if let Some(to) = self.index.get(needed) {
                edges.push(Edge { to: *to, written: Some(*span) });
            } else {
                let message = format!("there is no action {}", quoted(needed));
                let mend = self.suggest(needed, name);
                complaints.add(ManifestErrorKind::UnknownAction, *span, message, mend);
            }
        }
        edges
    }

    fn suggest(&mut self, needed: &str, by: &str) -> String {
        self.suggestions += 1;
        let others = self.actions.iter().map(|other| other.name).filter(|other| *other != by);
        let near = if self.suggestions <= MAX_SUGGESTIONS { nearest(needed, others) } else { None };
        match near {
            Some(near) => format!("did you mean {}?", quoted(near)),
            None => "name an action of this manifest".to_owned(),
        }
    }
}

/// Takes away whatever can start until nothing is left, or only what waits on a cycle: then each action left has a need
/// that is left too, so that walking along needs must come round. That cycle is reported and taken away, and so on.
fn refuse_cycles(actions: &[DraftAction<'_>], edges: &[Vec<Edge>], complaints: &mut Complaints) {
    let mut waits_for: Vec<usize> = edges.iter().map(Vec::len).collect();
    let mut needed_by: Vec<Vec<usize>> = vec![Vec::new(); edges.len()];
    for (this, edges) in edges.iter().enumerate() {
        for edge in edges {
            needed_by[edge.to].push(this);
        }
    }
    let mut gone = vec![false; edges.len()];
    let mut ready: Vec<usize> = (0..edges.len()).filter(|this| waits_for[*this] == 0).collect();
    let mut lowest_left = 0;
    loop {
        while let Some(this) = ready.pop() {
            if std::mem::replace(&mut gone[this], true) {
                continue;
            }
            for dependent in &needed_by[this] {
                waits_for[*dependent] -= 1;
                if waits_for[*dependent] == 0 {
                    ready.push(*dependent);
                }
            }
        }
        while gone.get(lowest_left) == Some(&true) {
            lowest_left += 1;
        }
        if lowest_left >= edges.len() {
            return;
        }
        let cycle = cycle_from(lowest_left, edges, &gone);
        refuse_cycle(actions, &cycle, complaints);
        ready.extend(cycle.iter().map(|(this, _)| *this));
    }
}

/// The cycle that one comes to from `start`, each action with the edge that leads on; it begins with the action that
/// was declared first.
fn cycle_from(start: usize, edges: &[Vec<Edge>], gone: &[bool]) -> Vec<(usize, Edge)> {
    let mut path: Vec<(usize, Edge)> = Vec::new();
    let mut position: Vec<Option<usize>> = vec![None; edges.len()];
    let mut this = start;
    loop {
        if let Some(round) = position[this] {
            path.drain(..round);
            let first =
                path.iter().enumerate().min_by_key(|(_, (action, _))| *action).map_or(0, |(at, _)| at);
            path.rotate_left(first);
            return path;
        }
        position[this] = Some(path.len());
        let Some(edge) = edges[this].iter().find(|edge| !gone[edge.to]) else {
            debug_assert!(false, "what is left needs something that is left");
            return path;
        };
        path.push((this, *edge));
        this = edge.to;
    }
}

fn refuse_cycle(actions: &[DraftAction<'_>], cycle: &[(usize, Edge)], complaints: &mut Complaints) {
    let name = |action: usize| quoted(actions[action].name);
    let Some((first, _)) = cycle.first() else { return };
    let mut way: Vec<String> =
        cycle.iter().take(SHOWN_OF_CYCLE).map(|(action, _)| name(*action).into_owned()).collect();
    if cycle.len() > SHOWN_OF_CYCLE {
        way.push(format!("… {} more …", cycle.len() - SHOWN_OF_CYCLE));
    }
    way.push(name(*first).into_owned());
    let message = format!("these actions need one another in a circle: {}", way.join(" → "));
    // What follows from the order leads back only, so a cycle has at least one need that was written.
    let written = cycle.iter().find_map(|(_, edge)| edge.written).unwrap_or(actions[*first].name_span);
    let mend = match cycle.iter().find(|(_, edge)| edge.written.is_none()) {
        Some((action, edge)) => format!(
            "{} has no `needs`, so it needs the action before it, {}: give it `needs: []`, or break the circle elsewhere",
            name(*action),
            name(edge.to)
        ),
        None => "remove one of these needs".to_owned(),
    };
    complaints.add(ManifestErrorKind::Cycle, written, message, mend);
}
