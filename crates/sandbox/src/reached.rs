//! Says what an environment behind a gate has reached, and what it was refused.
//!
//! The record is a file of lines of one length, each an entry as JSON that is written over whenever it is counted up. So it is
//! whole at any moment, however the one who keeps it ends. It is bounded: what comes when it is full is counted together.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A name of 253 characters and all that stands beside it.
const LINE_BYTES: usize = 512;
/// Of each verdict: so that nothing that was refused takes the room of what was reached.
const MAX_ENTRIES: usize = 256;

/// What became of something that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It was let through; whether anybody answered is not said.
    Reached,
    Refused,
    /// The name leads to where nobody may go, whatever the list says.
    Misled,
    /// No name server told where the name leads.
    Unanswered,
    /// More than there is room for.
    LeftOut,
    /// The kernel had more to tell than was heard in time.
    Missed,
}

/// What a packet carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
    Other,
}

/// One destination: a name, or an address that a name may have led to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Destination {
    pub verdict: Verdict,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
}

impl Destination {
    pub(crate) fn of(verdict: Verdict) -> Self {
        Self { verdict, name: None, address: None, port: None, protocol: None }
    }
}

/// A destination, and how often it was asked for: new connections, or questions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    #[serde(flatten)]
    pub destination: Destination,
    pub count: u64,
}

impl Reached {
    /// What was written down so far, in the order in which it came first.
    pub fn read(path: &Path) -> io::Result<Vec<Self>> {
        let text = std::fs::read_to_string(path)?;
        text.lines().map(|line| serde_json::from_str(line).map_err(io::Error::from)).collect()
    }
}

/// Writes it down.
#[derive(Debug)]
pub(crate) struct Record {
    file: File,
    entries: BTreeMap<Destination, Entry>,
}

#[derive(Debug)]
struct Entry {
    line: u64,
    count: u64,
}

impl Record {
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::create(path)?, entries: BTreeMap::new() })
    }

    /// Counts it.
    pub fn add(&mut self, destination: Destination) -> io::Result<()> {
        let has_room = self.entries.contains_key(&destination) || self.has_room(destination.verdict);
        let destination = if has_room { destination } else { Destination::of(Verdict::LeftOut) };
        let line = self.entries.len() as u64;
        let entry = self.entries.entry(destination.clone()).or_insert(Entry { line, count: 0 });
        entry.count += 1;
        let (line, count) = (entry.line, entry.count);
        let mut text = serde_json::to_string(&Reached { destination, count })?;
        while text.len() < LINE_BYTES - 1 {
            text.push(' ');
        }
        text.push('\n');
        self.file.write_all_at(text.as_bytes(), line * LINE_BYTES as u64)
    }

    fn has_room(&self, verdict: Verdict) -> bool {
        self.entries.keys().filter(|destination| destination.verdict == verdict).count() < MAX_ENTRIES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_and_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        let mut record = Record::create(&path).unwrap();
        assert_eq!(Reached::read(&path).unwrap(), []);
        let named = Destination {
            name: Some("x".repeat(253)),
            address: Some(Ipv4Addr::BROADCAST),
            port: Some(65_535),
            protocol: Some(Protocol::Other),
            ..Destination::of(Verdict::Unanswered)
        };
        for _ in 0..3 {
            record.add(named.clone()).unwrap();
        }
        for number in 0..1000 {
            let port = Some(number);
            record.add(Destination { port, ..Destination::of(Verdict::Refused) }).unwrap();
        }
        record.add(Destination::of(Verdict::Missed)).unwrap();
        let read = Reached::read(&path).unwrap();
        assert_eq!(read.len(), MAX_ENTRIES + 3);
        assert_eq!(read[0], Reached { destination: named, count: 3 });
        assert_eq!(read[1].destination.port, Some(0));
        let left_out = &read[MAX_ENTRIES + 1];
        assert_eq!(
            (left_out.destination.verdict, left_out.count),
            (Verdict::LeftOut, 1000 - MAX_ENTRIES as u64)
        );
        assert_eq!(std::fs::metadata(&path).unwrap().len(), ((MAX_ENTRIES + 3) * LINE_BYTES) as u64);
    }
}
