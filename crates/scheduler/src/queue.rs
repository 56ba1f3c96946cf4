//! Keeps the attempts that wait for an agent, in the order in which they are served.
//!
//! The order is: priority, higher first; then the repository that uses the least CPU now; then arrival. A repository's
//! use changes with every placement, so the order is never stored over all attempts. Attempts of one priority that ask
//! the same of an agent form a *line*; what is ordered is only the first of each repository in each line (its *head*).
//!
//! A line of which no member can be placed now is *blocked* and is not looked at until an agent has room for its members;
//! then it is tried with the agents that got room meanwhile, and no others. One that no agent could ever take stands
//! *nowhere* and does not even ask for room to be kept.
//!
//! Invariants: `open` and `blocked` hold exactly the first heads of the lines of that standing; a line without members
//! does not exist; a repository without members and use does not exist. No operation looks at all attempts.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use sealci_core::ids::{AgentId, AttemptId};

use crate::requirements::Requirements;

/// What is known of an attempt that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    pub requirements: Arc<Requirements>,
    /// Higher first.
    pub priority: i32,
    /// Arrival: earlier first.
    pub order: u64,
    /// Fairness is between repositories.
    pub repository: Arc<str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ClassId(u64);

/// The attempts of one priority and one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineId {
    priority: Reverse<i32>,
    class: ClassId,
}

impl LineId {
    pub fn priority(self) -> i32 {
        self.priority.0
    }
}

/// The first attempt of a repository in a line. Heads compare in the order of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Head {
    priority: Reverse<i32>,
    usage_cpu_millis: u64,
    order: u64,
    pub attempt: AttemptId,
    class: ClassId,
}

impl Head {
    fn new(line: LineId, usage_cpu_millis: u64, (order, attempt): (u64, AttemptId)) -> Self {
        Self { priority: line.priority, usage_cpu_millis, order, attempt, class: line.class }
    }

    pub fn priority(&self) -> i32 {
        self.priority.0
    }

    pub fn line(&self) -> LineId {
        LineId { priority: self.priority, class: self.class }
    }
}

/// What is known of a line's chance to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Not tried yet with these agents.
    Open(Candidates),
    /// No agent has room for it now.
    Blocked,
    /// No agent that takes work could run it at all.
    Nowhere,
}

/// The agents that may have room for a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Candidates {
    Any,
    /// Those that got room since it was blocked.
    These(BTreeSet<AgentId>),
}

#[derive(Debug)]
struct Line {
    requirements: Arc<Requirements>,
    standing: Standing,
    heads: BTreeSet<Head>,
}

#[derive(Debug)]
struct Entry {
    line: LineId,
    order: u64,
    repository: Arc<str>,
}

#[derive(Debug, Default)]
struct Repository {
    /// Of its attempts that are placed or run.
    usage_cpu_millis: u64,
    lines: BTreeMap<LineId, BTreeSet<(u64, AttemptId)>>,
}

/// The waiting attempts.
#[derive(Debug, Default)]
pub struct Queue {
    entries: HashMap<AttemptId, Entry>,
    repositories: HashMap<Arc<str>, Repository>,
    lines: BTreeMap<LineId, Line>,
    open: BTreeSet<Head>,
    blocked: BTreeSet<Head>,
    classes: HashMap<Arc<Requirements>, ClassUse>,
    classes_made: u64,
}

#[derive(Debug)]
struct ClassUse {
    id: ClassId,
    /// Lines of this class that exist.
    lines: usize,
}

impl Queue {
    /// How many wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn contains(&self, attempt: AttemptId) -> bool {
        self.entries.contains_key(&attempt)
    }

    /// Puts an attempt in its place; one that waits already is moved.
    pub fn insert(&mut self, attempt: AttemptId, waiting: Waiting) {
        self.remove(attempt);
        let line = self.line_for(waiting.requirements, waiting.priority);
        let order = waiting.order;
        self.entries.insert(attempt, Entry { line, order, repository: Arc::clone(&waiting.repository) });
        self.change_members(&waiting.repository, line, |members| {
            members.insert((order, attempt));
        });
    }

    /// Takes an attempt out; says which repository it was of.
    pub fn remove(&mut self, attempt: AttemptId) -> Option<Arc<str>> {
        let entry = self.entries.remove(&attempt)?;
        self.change_members(&entry.repository, entry.line, |members| {
            members.remove(&(entry.order, attempt));
        });
        if self.lines.get(&entry.line).is_some_and(|line| line.heads.is_empty())
            && let Some(line) = self.lines.remove(&entry.line)
            && let Some(class) = self.classes.get_mut(&line.requirements)
        {
            class.lines -= 1;
            if class.lines == 0 {
                self.classes.remove(&line.requirements);
            }
        }
        Some(entry.repository)
    }

    /// Changes what a repository uses; its waiting attempts move accordingly.
    pub fn change_usage(&mut self, repository: &Arc<str>, change: impl FnOnce(u64) -> u64) {
        let entry = self.repositories.entry(Arc::clone(repository)).or_default();
        let (before, after) = (entry.usage_cpu_millis, change(entry.usage_cpu_millis));
        entry.usage_cpu_millis = after;
        let firsts: Vec<_> =
            entry.lines.iter().filter_map(|(line, members)| Some((*line, *members.first()?))).collect();
        if after == 0 && entry.lines.is_empty() {
            self.repositories.remove(repository);
        }
        if before != after {
            for (line, first) in firsts {
                self.unlist(Head::new(line, before, first));
                self.list(Head::new(line, after, first));
            }
        }
    }

    /// What a repository uses.
    pub fn usage_cpu_millis(&self, repository: &str) -> u64 {
        self.repositories.get(repository).map_or(0, |repository| repository.usage_cpu_millis)
    }

    /// The next attempt to try.
    pub fn first_open(&self) -> Option<Head> {
        self.open.first().copied()
    }

    /// The first attempt that was tried in vain.
    pub fn first_blocked(&self) -> Option<Head> {
        self.blocked.first().copied()
    }

    /// What an attempt asks, and in which line it stands.
    pub fn line_of(&self, attempt: AttemptId) -> Option<(LineId, Arc<Requirements>)> {
        let line = self.entries.get(&attempt)?.line;
        Some((line, Arc::clone(&self.lines.get(&line)?.requirements)))
    }

    /// All lines, highest priority first.
    pub fn lines(&self) -> impl Iterator<Item = (LineId, &Requirements, &Standing)> {
        self.lines.iter().map(|(id, line)| (*id, &*line.requirements, &line.standing))
    }

    /// Which agents a line is to be tried with.
    pub fn candidates(&self, id: LineId) -> Option<&Candidates> {
        match &self.lines.get(&id)?.standing {
            Standing::Open(candidates) => Some(candidates),
            Standing::Blocked | Standing::Nowhere => None,
        }
    }

    /// The line is tried with this agent, too.
    pub fn open_for(&mut self, id: LineId, agent: AgentId) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        match &mut line.standing {
            Standing::Open(Candidates::Any) => {}
            Standing::Open(Candidates::These(agents)) => drop(agents.insert(agent)),
            Standing::Blocked | Standing::Nowhere => {
                self.set_standing(id, Standing::Open(Candidates::These([agent].into())));
            }
        }
    }

    pub fn set_standing(&mut self, id: LineId, standing: Standing) {
        self.change_line(id, |line| line.standing = standing);
    }

    /// How many attempts are served before this one, those that stand nowhere not counted. Looks at every line of
    /// every repository, and one by one only at the attempts of lines that are level with this one's.
    pub fn ahead_of(&self, attempt: AttemptId) -> usize {
        let Some(mine) = self.entries.get(&attempt) else { return 0 };
        let my_rank = (mine.line.priority, self.usage_cpu_millis(&mine.repository));
        let mut ahead = 0;
        for repository in self.repositories.values() {
            for (line, members) in &repository.lines {
                let counts =
                    self.lines.get(line).is_some_and(|line| !matches!(line.standing, Standing::Nowhere));
                ahead += match (line.priority, repository.usage_cpu_millis).cmp(&my_rank) {
                    Ordering::Less if counts => members.len(),
                    Ordering::Equal if counts => members.range(..(mine.order, attempt)).count(),
                    _ => 0,
                };
            }
        }
        ahead
    }

    fn line_for(&mut self, requirements: Arc<Requirements>, priority: i32) -> LineId {
        let made = &mut self.classes_made;
        let class = self.classes.entry(Arc::clone(&requirements)).or_insert_with(|| {
            *made += 1;
            ClassUse { id: ClassId(*made), lines: 0 }
        });
        let id = LineId { priority: Reverse(priority), class: class.id };
        self.lines.entry(id).or_insert_with(|| {
            class.lines += 1;
            Line { requirements, standing: Standing::Open(Candidates::Any), heads: BTreeSet::new() }
        });
        id
    }

    /// Changes who of a repository stands in a line, and with it the head, should that be another one then.
    fn change_members(
        &mut self,
        repository: &Arc<str>,
        line: LineId,
        change: impl FnOnce(&mut BTreeSet<(u64, AttemptId)>),
    ) {
        let entry = self.repositories.entry(Arc::clone(repository)).or_default();
        let usage = entry.usage_cpu_millis;
        let members = entry.lines.entry(line).or_default();
        let before = members.first().copied();
        change(members);
        let after = members.first().copied();
        if after.is_none() {
            entry.lines.remove(&line);
            if entry.lines.is_empty() && usage == 0 {
                self.repositories.remove(repository);
            }
        }
        if before != after {
            if let Some(first) = before {
                self.unlist(Head::new(line, usage, first));
            }
            if let Some(first) = after {
                self.list(Head::new(line, usage, first));
            }
        }
    }

    fn list(&mut self, head: Head) {
        self.change_line(head.line(), |line| {
            line.heads.insert(head);
        });
    }

    fn unlist(&mut self, head: Head) {
        self.change_line(head.line(), |line| {
            line.heads.remove(&head);
        });
    }

    /// Changes a line, and what is listed of it.
    fn change_line(&mut self, id: LineId, change: impl FnOnce(&mut Line)) {
        let Some(line) = self.lines.get_mut(&id) else { return };
        let listed = |line: &Line| {
            let is_open = match line.standing {
                Standing::Open(_) => true,
                Standing::Blocked => false,
                Standing::Nowhere => return None,
            };
            line.heads.first().map(|head| (is_open, *head))
        };
        let before = listed(line);
        change(line);
        let after = listed(line);
        if before == after {
            return;
        }
        if let Some((is_open, head)) = before {
            let list = if is_open { &mut self.open } else { &mut self.blocked };
            list.remove(&head);
        }
        if let Some((is_open, head)) = after {
            let list = if is_open { &mut self.open } else { &mut self.blocked };
            list.insert(head);
        }
    }
}

#[cfg(test)]
mod tests {
    use sealci_core::ids::ActionId;
    use sealci_core::plan::Resources;

    use super::*;

    fn attempt(n: u8) -> AttemptId {
        AttemptId { action: ActionId::from_parts(u64::from(n), &[0; 10]), number: 1 }
    }

    fn waiting(repository: &str, priority: i32, order: u64, cpu_millis: u64) -> Waiting {
        Waiting {
            requirements: Arc::new(Requirements {
                resources: Resources { cpu_millis, memory_bytes: 0 },
                labels: BTreeMap::new(),
                executor: None,
            }),
            priority,
            order,
            repository: repository.into(),
        }
    }

    fn drain(queue: &mut Queue) -> Vec<AttemptId> {
        let mut served = Vec::new();
        while let Some(head) = queue.first_open() {
            queue.remove(head.attempt);
            served.push(head.attempt);
        }
        served
    }

    #[test]
    fn priority_comes_before_arrival() {
        let mut queue = Queue::default();
        queue.insert(attempt(1), waiting("a", 0, 1, 1));
        queue.insert(attempt(2), waiting("a", 1, 2, 2));
        queue.insert(attempt(3), waiting("a", -1, 0, 1));
        assert_eq!(drain(&mut queue), [attempt(2), attempt(1), attempt(3)]);
    }

    #[test]
    fn the_repository_that_uses_least_comes_first_and_moves_with_its_use() {
        let mut queue = Queue::default();
        let (busy, idle): (Arc<str>, Arc<str>) = ("busy".into(), "idle".into());
        queue.insert(attempt(1), waiting("busy", 0, 1, 1));
        queue.insert(attempt(2), waiting("idle", 0, 2, 1));
        assert_eq!(queue.first_open().map(|head| head.attempt), Some(attempt(1)), "a tie goes by arrival");
        queue.change_usage(&busy, |usage| usage + 1000);
        assert_eq!(queue.first_open().map(|head| head.attempt), Some(attempt(2)));
        queue.change_usage(&idle, |usage| usage + 2000);
        assert_eq!(queue.first_open().map(|head| head.attempt), Some(attempt(1)));
        assert_eq!(queue.ahead_of(attempt(2)), 1);
    }

    #[test]
    fn a_blocked_line_is_passed_over_and_comes_back() {
        let mut queue = Queue::default();
        queue.insert(attempt(1), waiting("a", 0, 1, 8));
        queue.insert(attempt(2), waiting("b", 0, 2, 8));
        queue.insert(attempt(3), waiting("a", 0, 3, 1));
        let line = queue.first_open().map(|head| head.line());
        queue.set_standing(line.unwrap(), Standing::Blocked);
        assert_eq!(queue.first_open().map(|head| head.attempt), Some(attempt(3)));
        assert_eq!(queue.first_blocked().map(|head| head.attempt), Some(attempt(1)));
        queue.set_standing(line.unwrap(), Standing::Nowhere);
        assert_eq!(queue.first_blocked(), None);
        queue.open_for(line.unwrap(), AgentId::from_parts(1, &[0; 10]));
        assert_eq!(drain(&mut queue), [attempt(1), attempt(2), attempt(3)]);
    }

    #[test]
    fn nothing_is_left_behind_when_all_are_gone() {
        let mut queue = Queue::default();
        let repository: Arc<str> = "a".into();
        for n in 0..20 {
            queue.insert(attempt(n), waiting("a", i32::from(n % 3), u64::from(n), u64::from(n % 4)));
        }
        queue.change_usage(&repository, |usage| usage + 5);
        queue.change_usage(&repository, |usage| usage - 5);
        for n in 0..20 {
            queue.remove(attempt(n));
        }
        assert!(queue.is_empty() && queue.open.is_empty() && queue.blocked.is_empty());
        assert!(queue.lines.is_empty() && queue.classes.is_empty() && queue.repositories.is_empty());
    }
}
