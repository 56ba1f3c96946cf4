//! Takes along what there is to say to people while an environment is made: how far a pull has come, what was done
//! otherwise than usual. The lines stand in the attempt's log before its first command.
//!
//! Bounded, and never in anybody's way: what nobody takes in time is counted instead, and told at the end.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::mpsc;

/// How many lines wait, until the attempt's claim is granted at the latest.
const CAPACITY: usize = 64;
/// Of a line, at most.
const MAX_CHARACTERS: usize = 400;
/// What every line of ours in a log begins with.
const PREFIX: &str = "sealci: ";

/// Where to say something. The default has no listener.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    lines: Option<mpsc::Sender<Bytes>>,
    left_out: Arc<AtomicU64>,
}

/// Hears what is said.
#[derive(Debug)]
pub struct NoteReader {
    lines: mpsc::Receiver<Bytes>,
    left_out: Arc<AtomicU64>,
}

/// Both ends.
pub fn notes() -> (Notes, NoteReader) {
    let (sender, lines) = mpsc::channel(CAPACITY);
    let left_out = Arc::new(AtomicU64::new(0));
    (Notes { lines: Some(sender), left_out: left_out.clone() }, NoteReader { lines, left_out })
}

impl Notes {
    /// Says one line. Characters that would do something to a terminal are left out.
    pub fn say(&self, text: impl Display) {
        let Some(lines) = &self.lines else { return };
        let text: String =
            text.to_string().chars().filter(|c| !c.is_control()).take(MAX_CHARACTERS).collect();
        if lines.try_send(format!("{PREFIX}{text}\n").into()).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl NoteReader {
    /// The next line, with its line feed; none when nobody can say anything any more. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.lines.recv().await
    }

    /// What has been said and not been heard yet.
    pub fn rest(&mut self) -> Vec<Bytes> {
        let mut rest: Vec<_> = std::iter::from_fn(|| self.lines.try_recv().ok()).collect();
        let left_out = self.left_out.swap(0, Ordering::Relaxed);
        if left_out > 0 {
            rest.push(format!("{PREFIX}{left_out} more lines are left out\n").into());
        }
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_heard_in_order_and_too_many_are_counted() {
        let (notes, mut reader) = notes();
        notes.say("pulling \x1b[31mx\n");
        assert_eq!(reader.next().await.unwrap(), "sealci: pulling [31mx\n");
        for number in 0..CAPACITY + 3 {
            notes.say(number);
        }
        let rest = reader.rest();
        assert_eq!(rest.len(), CAPACITY + 1);
        assert_eq!(rest[0], "sealci: 0\n");
        assert_eq!(rest[CAPACITY], "sealci: 3 more lines are left out\n");
        assert!(reader.rest().is_empty());
        notes.say("x".repeat(10_000));
        assert_eq!(reader.rest()[0].len(), PREFIX.len() + MAX_CHARACTERS + 1);
        drop(notes);
        assert_eq!(reader.next().await, None);
    }

    #[test]
    fn without_a_listener_nothing_happens() {
        Notes::default().say("x");
        let (notes, reader) = notes();
        drop(reader);
        notes.say("x");
    }
}
