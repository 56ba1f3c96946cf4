//! Holds the lines to the schedulers that stand, and what one round of the driver sends over them.

use std::collections::BTreeMap;

use sealci_proto::scheduler::{ControllerMessage, ToAgent, controller_message, to_agent};
use tokio::sync::mpsc;
use tokio_util::sync::DropGuard;

/// One line, from when it stands until it is given up: the scheduler's place in the list, and the how manieth line to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LineId {
    pub scheduler: usize,
    pub session: u64,
}

/// One agent's stream at the scheduler at the other end of a line: where answers go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct AgentStream {
    pub line: LineId,
    pub session: u64,
}

/// A line that stands: what is sent goes to the scheduler, in order. Dropped, it is given up, whatever the scheduler does.
#[derive(Debug)]
pub(super) struct Line {
    pub endpoint: String,
    pub outgoing: mpsc::Sender<Vec<ControllerMessage>>,
    pub _given_up: DropGuard,
}

/// What is to be sent: first what every scheduler is told, then what is one's alone.
#[derive(Debug, Default)]
pub(super) struct Post {
    to_all: Vec<controller_message::Body>,
    to_one: BTreeMap<LineId, Vec<controller_message::Body>>,
}

impl Post {
    pub fn for_all(&mut self, body: controller_message::Body) {
        self.to_all.push(body);
    }

    pub fn for_one(&mut self, line: LineId, body: controller_message::Body) {
        self.to_one.entry(line).or_default().push(body);
    }

    pub fn for_agent(&mut self, stream: AgentStream, body: to_agent::Body) {
        let message = ToAgent { session: stream.session, body: Some(body) };
        self.for_one(stream.line, controller_message::Body::ToAgent(message));
    }
}

/// All lines that stand.
#[derive(Debug, Default)]
pub(super) struct Lines(BTreeMap<LineId, Line>);

impl Lines {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn stands(&self, id: LineId) -> bool {
        self.0.contains_key(&id)
    }

    pub fn ids(&self) -> impl Iterator<Item = LineId> {
        self.0.keys().copied()
    }

    /// Where the scheduler at a line's other end is; none if the line is gone.
    pub fn endpoint(&self, id: LineId) -> Option<&str> {
        self.0.get(&id).map(|line| &*line.endpoint)
    }

    pub fn open(&mut self, id: LineId, line: Line) {
        self.0.insert(id, line);
    }

    /// Gives a line up. Whether it stood.
    pub fn close(&mut self, id: LineId) -> bool {
        self.0.remove(&id).is_some()
    }

    /// Sends over every line, and names those that are so far behind that they have to be made anew, which repairs
    /// everything. What is for a line that is gone goes with it.
    pub fn send(&self, mut post: Post) -> Vec<LineId> {
        let mut behind = Vec::new();
        let last = self.0.len().saturating_sub(1);
        for (index, (id, line)) in self.0.iter().enumerate() {
            let mut bodies =
                if index == last { std::mem::take(&mut post.to_all) } else { post.to_all.clone() };
            bodies.append(&mut post.to_one.remove(id).unwrap_or_default());
            if bodies.is_empty() {
                continue;
            }
            let messages = bodies.into_iter().map(|body| ControllerMessage { body: Some(body) }).collect();
            if line.outgoing.try_send(messages).is_err() {
                behind.push(*id);
            }
        }
        behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sealci_proto::agent::Ack;
    use sealci_proto::scheduler::Snapshot;
    use tokio_util::sync::CancellationToken;

    fn line(capacity: usize) -> (Line, mpsc::Receiver<Vec<ControllerMessage>>) {
        let (outgoing, batches) = mpsc::channel(capacity);
        let line =
            Line { endpoint: String::new(), outgoing, _given_up: CancellationToken::new().drop_guard() };
        (line, batches)
    }

    fn id(scheduler: usize) -> LineId {
        LineId { scheduler, session: 1 }
    }

    #[test]
    fn all_are_told_before_one_and_nobody_gets_what_is_anothers() {
        let (mut lines, mut ends) = (Lines::default(), Vec::new());
        for scheduler in 0..2 {
            let (line, batches) = line(1);
            lines.open(id(scheduler), line);
            ends.push(batches);
        }
        let mut post = Post::default();
        post.for_agent(AgentStream { line: id(0), session: 7 }, to_agent::Body::Ack(Ack::default()));
        let of_a_former_line = LineId { scheduler: 1, session: 0 };
        post.for_agent(
            AgentStream { line: of_a_former_line, session: 7 },
            to_agent::Body::Ack(Ack::default()),
        );
        post.for_all(controller_message::Body::Snapshot(Snapshot::default()));
        assert!(lines.send(post).is_empty());
        let kinds = |batch: Vec<ControllerMessage>| -> Vec<_> {
            batch
                .into_iter()
                .map(|message| matches!(message.body, Some(controller_message::Body::ToAgent(_))))
                .collect()
        };
        assert_eq!(ends[0].try_recv().map(kinds), Ok(vec![false, true]));
        assert_eq!(ends[1].try_recv().map(kinds), Ok(vec![false]));
    }

    #[test]
    fn a_line_that_is_behind_is_named_and_holds_up_no_other() {
        let mut lines = Lines::default();
        let (slow, _unread) = line(1);
        let (fast, mut batches) = line(2);
        lines.open(id(0), slow);
        lines.open(id(1), fast);
        let post = || {
            let mut post = Post::default();
            post.for_all(controller_message::Body::Snapshot(Snapshot::default()));
            post
        };
        assert!(lines.send(post()).is_empty());
        assert_eq!(lines.send(post()), [id(0)]);
        assert!(batches.try_recv().is_ok() && batches.try_recv().is_ok());
    }
}
