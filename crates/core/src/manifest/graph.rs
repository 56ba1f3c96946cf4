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
    let index: HashMap<&str, usize> =
        actions.iter().enumerate().map(|(i, action)| (action.name, i)).collect();
    let mut suggestions = 0;
    let mut edges: Vec<Vec<Edge>> = Vec::with_capacity(actions.len());
    for (this, action) in actions.iter().enumerate() {
        edges.push(match &action.needs {
            Needs::Previous => this.checked_sub(1).map(|to| Edge { to, written: None }).into_iter().collect(),
            Needs::Unreadable => Vec::new(),
            Needs::Listed(names) => {
                let mut found = Vec::with_capacity(names.len());
                let mut first: HashMap<&str, Span> = HashMap::with_capacity(names.len());
                for (name, span) in names {
                    if let Some(before) = first.insert(name, *span) {
                        first.insert(name, before);
                        let message = format!("{} is needed twice", quoted(name));
                        let mend = "name it once";
                        complaints.add_with_first(
                            ManifestErrorKind::Duplicate,
                            *span,
                            Some(before),
                            message,
                            mend,
                        );
                    } else if *name == action.name {
                        let message = format!("{} needs itself", quoted(name));
                        let mend = "remove it, or name the action that was meant";
                        complaints.add(ManifestErrorKind::Cycle, *span, message, mend);
                    } else if let Some(to) = index.get(name) {
                        found.push(Edge { to: *to, written: Some(*span) });
                    } else {
                        suggestions += 1;
                        let others =
                            actions.iter().map(|other| other.name).filter(|other| *other != action.name);
                        let near = if suggestions <= MAX_SUGGESTIONS { nearest(name, others) } else { None };
                        let mend = match near {
                            Some(near) => format!("did you mean {}?", quoted(near)),
                            None => "name an action of this manifest".to_owned(),
                        };
                        let message = format!("there is no action {}", quoted(name));
                        complaints.add(ManifestErrorKind::UnknownAction, *span, message, mend);
                    }
                }
                found
            }
        });
    }
    refuse_cycles(actions, &edges, complaints);
    edges
        .into_iter()
        .map(|edges| {
            let mut needs: Vec<usize> = edges.into_iter().map(|edge| edge.to).collect();
            needs.sort_unstable();
            needs
        })
        .collect()
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
