//! Keeps one attempt: its journal and its log, on disk and in memory, until all of it is acknowledged.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use sealci_core::attempt::AttemptState;
use sealci_core::ids::{AttemptId, ClaimId};
use sealci_core::outcome::Outcome;
use sealci_core::plan::Resources;
use sealci_proto::agent::{self, HeldState, event};

use super::doorbell::Doorbell;
use super::journal::{Claim, JournalFile, Record};
use super::log::{Bounds, Log};
use super::{SpoolError, failpoint, journal_path};

/// One attempt in the spool. The attempt's task writes, the session reads and acknowledges.
#[derive(Debug)]
pub struct AttemptSpool {
    id: AttemptId,
    claim: Claim,
    folder: PathBuf,
    /// What was set aside for the journal when the attempt was taken on.
    journal_bytes: u64,
    bounds: Arc<Bounds>,
    pub log: Log,
    doorbell: Arc<Doorbell>,
    journal: Mutex<Journal>,
}

/// What an attempt has on disk.
pub(super) struct Files {
    pub folder: PathBuf,
    pub journal: JournalFile,
    pub journal_bytes: u64,
    pub log: Log,
}

#[derive(Debug)]
struct Journal {
    file: JournalFile,
    token: Option<u64>,
    events: Vec<agent::Event>,
    /// Events below this are recorded.
    acked: u64,
    finished: bool,
    /// The terminal event was not told by the attempt itself but made up for it, after a restart.
    made_up: bool,
}

impl AttemptSpool {
    pub(super) fn new(
        id: AttemptId,
        claim: Claim,
        files: Files,
        bounds: Arc<Bounds>,
        doorbell: Arc<Doorbell>,
    ) -> Self {
        let Files { folder, journal: file, journal_bytes, log } = files;
        let journal =
            Journal { file, token: None, events: Vec::new(), acked: 0, finished: false, made_up: false };
        Self { id, claim, folder, journal_bytes, bounds, log, doorbell, journal: Mutex::new(journal) }
    }

    /// Takes over what a former process journalled behind the claim.
    pub(super) fn restore(&self, records: Vec<Record>) {
        let mut journal = self.journal();
        for record in records {
            match record {
                Record::Claim(_) => {}
                Record::Token(token) => journal.token = Some(token),
                Record::Event(event) => journal.push(*event),
            }
        }
        if let Some(length) = journal.told_log_length() {
            self.log.lengthen(length);
        }
    }

    pub fn id(&self) -> AttemptId {
        self.id
    }

    pub fn claim_id(&self) -> ClaimId {
        self.claim.claim_id
    }

    pub fn reserved(&self) -> Resources {
        self.claim.reserved
    }

    /// The encoded `ActionSpec`.
    pub fn spec(&self) -> &Bytes {
        &self.claim.spec
    }

    /// The fencing token, once granted.
    pub fn token(&self) -> Option<u64> {
        self.journal().token
    }

    pub fn is_finished(&self) -> bool {
        self.journal().finished
    }

    /// What `Held` says of it.
    pub fn held_state(&self) -> HeldState {
        let journal = self.journal();
        if journal.finished {
            return HeldState::Finished;
        }
        let running = journal.events.iter().any(|event| matches!(event.body, Some(event::Body::Running(_))));
        HeldState::from(&match (journal.token, running) {
            (_, true) => AttemptState::Running,
            (Some(_), false) => AttemptState::Claimed,
            (None, false) => AttemptState::Assigned,
        })
    }

    /// Spools the token of the granted claim. Nothing may be started before.
    pub fn grant(&self, token: u64) -> Result<(), SpoolError> {
        let mut journal = self.journal();
        if journal.token.is_none() {
            journal.append(&self.folder, &Record::Token(token))?;
            journal.token = Some(token);
        }
        drop(journal);
        self.doorbell.ring(self.id);
        Ok(())
    }

    /// Spools an event; it is sent after that.
    pub fn record(&self, body: event::Body, at_unix_ms: u64) -> Result<(), SpoolError> {
        let mut journal = self.journal();
        debug_assert!(!journal.finished, "an event after the terminal one");
        let event = journal.next_event(self.id, body, at_unix_ms);
        journal.append(&self.folder, &Record::Event(Box::new(event.clone())))?;
        journal.push(event);
        drop(journal);
        self.doorbell.ring(self.id);
        Ok(())
    }

    /// Appends output to the log. Blocks on the disk, never on the network; what there is no room for is a gap.
    pub fn append_log(&self, output: Bytes) {
        self.log.append(output);
        self.doorbell.ring(self.id);
    }

    /// Closes the log and spools the terminal event. Blocks on the disk.
    ///
    /// A terminal event that the disk does not take is told all the same: should this process die before it is
    /// acknowledged, the attempt counts as interrupted.
    pub fn finish(&self, outcome: &Outcome, at_unix_ms: u64) {
        self.log.seal();
        let mut journal = self.journal();
        if journal.finished {
            return;
        }
        let body = event::Body::Finished(agent::Finished {
            outcome: Some(outcome.into()),
            log_length: self.log.end(),
        });
        let event = journal.next_event(self.id, body, at_unix_ms);
        if let Err(error) = journal.append(&self.folder, &Record::Event(Box::new(event.clone()))) {
            tracing::error!(attempt.id = %self.id, %error, "the result is in memory only");
        }
        journal.push(event);
        drop(journal);
        self.doorbell.ring(self.id);
    }

    /// Finishes an attempt that a former process left unfinished.
    pub fn make_up_end(&self, outcome: &Outcome, at_unix_ms: u64) {
        self.finish(outcome, at_unix_ms);
        self.journal().made_up = true;
    }

    /// The event with this sequence, as it is to be sent.
    pub fn event(&self, sequence: u64) -> Option<agent::Event> {
        let journal = self.journal();
        let first = journal.events.first()?.sequence;
        let found = journal.events.get(usize::try_from(sequence.checked_sub(first)?).ok()?);
        // A made-up terminal event may have been moved behind what the controller knows and the spool lost.
        let found = found.filter(|event| event.sequence == sequence);
        let found = found.or_else(|| journal.events.last().filter(|event| event.sequence == sequence));
        let mut event = found?.clone();
        event.token = journal.token.unwrap_or_default();
        if let Some(event::Body::Finished(finished)) = &mut event.body {
            finished.log_length = finished.log_length.max(self.log.end());
        }
        Some(event)
    }

    /// Sequences below this exist.
    pub fn next_sequence(&self) -> u64 {
        self.journal().next_sequence()
    }

    /// Events below the first and log bytes below the second are recorded.
    pub fn acked(&self) -> (u64, u64) {
        (self.journal().acked, self.log.acked())
    }

    /// Takes note of how far the attempt is recorded. Returns the files that are not needed any more.
    #[must_use = "the files are to be removed"]
    pub fn acknowledge(&self, next_sequence: u64, next_offset: u64) -> Vec<PathBuf> {
        let mut journal = self.journal();
        if journal.made_up {
            // A crash of the machine can lose what was acknowledged before. The made-up end goes behind it.
            self.log.lengthen(next_offset);
            if let Some(last) = journal.events.last_mut()
                && last.sequence < next_sequence
                && next_offset >= self.log.end()
            {
                last.sequence = next_sequence;
            }
        }
        journal.acked = journal.acked.max(next_sequence.min(journal.next_sequence()));
        drop(journal);
        self.log.acknowledge(next_offset)
    }

    /// Takes the attempt out of the spool, at once for whoever looks next. The files themselves go with
    /// [`Leftover::remove`].
    pub fn forget(&self) -> Leftover {
        let gone = super::gone_path(&self.folder);
        failpoint::reached(&self.folder);
        match std::fs::rename(&self.folder, &gone) {
            Ok(()) => {
                failpoint::reached(&self.folder);
                Leftover(gone)
            }
            Err(error) => {
                tracing::warn!(attempt.id = %self.id, %error, "cannot move the spooled attempt away");
                Leftover(self.folder.clone())
            }
        }
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AttemptSpool {
    fn drop(&mut self) {
        self.bounds.disk.give_back(self.journal_bytes);
    }
}

impl Journal {
    fn next_event(&self, id: AttemptId, body: event::Body, at_unix_ms: u64) -> agent::Event {
        agent::Event {
            attempt: Some(id.into()),
            token: 0,
            sequence: self.next_sequence(),
            at_unix_ms,
            body: Some(body),
        }
    }

    fn next_sequence(&self) -> u64 {
        self.events.last().map_or(0, |event| event.sequence + 1)
    }

    fn append(&mut self, folder: &std::path::Path, record: &Record) -> Result<(), SpoolError> {
        failpoint::reached(folder);
        self.file
            .append(record)
            .map_err(|source| SpoolError::Write { path: journal_path(folder), source })
            .inspect(|()| failpoint::reached(folder))
    }

    fn push(&mut self, event: agent::Event) {
        self.finished |= matches!(event.body, Some(event::Body::Finished(_)));
        self.events.push(event);
    }

    fn told_log_length(&self) -> Option<u64> {
        self.events.iter().find_map(|event| match &event.body {
            Some(event::Body::Finished(finished)) => Some(finished.log_length),
            _ => None,
        })
    }
}

/// A folder that nobody needs any more.
#[derive(Debug)]
#[must_use = "the folder is to be removed"]
pub struct Leftover(PathBuf);

impl Leftover {
    /// Removes it. Blocks. What stays is removed at the next start.
    pub fn remove(self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "cannot remove a spooled attempt");
        }
    }
}
