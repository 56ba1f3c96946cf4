//! Keeps an attempt's journal on disk: its claim, its fencing token, its events.
//!
//! ```text
//!   claim ── token ── event 0 ── event 1 ── … ── terminal event
//! ```
//!
//! Each record is one frame, written before what it says is acted on: the claim id before it is asked, the token before
//! anything starts, an event before it is sent. The file's blocks are set aside when it is made, so that a disk that
//! fills up later cannot keep an attempt from telling how it ended.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use bytes::Bytes;
use prost::Message;
use sealci_core::ids::ClaimId;
use sealci_core::plan::Resources;
use sealci_proto::agent;
use uuid::Uuid;

use super::frame;

const CLAIM: u8 = 1;
const TOKEN: u8 = 2;
const EVENT: u8 = 3;

/// What the agent took on, as it stands first in the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    pub claim_id: ClaimId,
    pub reserved: Resources,
    pub log_quota_bytes: u64,
    /// The encoded `ActionSpec`, as it came.
    pub spec: Bytes,
}

/// One record of a journal.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    Claim(Claim),
    Token(u64),
    Event(Box<agent::Event>),
}

impl Record {
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::new();
        match self {
            Self::Claim(claim) => {
                payload.push(CLAIM);
                payload.extend_from_slice(claim.claim_id.as_uuid().as_bytes());
                payload.extend_from_slice(&claim.reserved.cpu_millis.to_le_bytes());
                payload.extend_from_slice(&claim.reserved.memory_bytes.to_le_bytes());
                payload.extend_from_slice(&claim.log_quota_bytes.to_le_bytes());
                payload.extend_from_slice(&claim.spec);
            }
            Self::Token(token) => {
                payload.push(TOKEN);
                payload.extend_from_slice(&token.to_le_bytes());
            }
            Self::Event(event) => {
                payload.push(EVENT);
                payload.extend_from_slice(&event.encode_to_vec());
            }
        }
        payload
    }

    /// None: a whole frame whose payload means nothing to this version.
    pub fn decode(payload: &[u8]) -> Option<Self> {
        let (kind, rest) = payload.split_first()?;
        match *kind {
            CLAIM => {
                let (id, rest) = rest.split_first_chunk::<16>()?;
                let (cpu_millis, rest) = rest.split_first_chunk::<8>()?;
                let (memory_bytes, rest) = rest.split_first_chunk::<8>()?;
                let (log_quota_bytes, spec) = rest.split_first_chunk::<8>()?;
                Some(Self::Claim(Claim {
                    claim_id: ClaimId::from_uuid(Uuid::from_bytes(*id)),
                    reserved: Resources {
                        cpu_millis: u64::from_le_bytes(*cpu_millis),
                        memory_bytes: u64::from_le_bytes(*memory_bytes),
                    },
                    log_quota_bytes: u64::from_le_bytes(*log_quota_bytes),
                    spec: Bytes::copy_from_slice(spec),
                }))
            }
            TOKEN => Some(Self::Token(u64::from_le_bytes(rest.try_into().ok()?))),
            EVENT => Some(Self::Event(Box::new(agent::Event::decode(rest).ok()?))),
            _ => None,
        }
    }
}

/// The journal's file, open for appending.
#[derive(Debug)]
pub struct JournalFile {
    file: File,
    length: u64,
}

impl JournalFile {
    /// Makes the file, with room on disk for `reserve_bytes`.
    pub fn create(path: &Path, reserve_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        set_aside(&file, reserve_bytes)?;
        Ok(Self { file, length: 0 })
    }

    /// Reads the file up to its first record that is not whole, and cuts it there.
    pub fn open(path: &Path) -> io::Result<(Self, Vec<Record>)> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let (payloads, _) = frame::decode_all(&bytes);
        let mut length = 0;
        let mut records = Vec::new();
        for payload in payloads {
            let Some(record) = Record::decode(payload) else { break };
            records.push(record);
            length += (frame::HEADER_BYTES + payload.len()) as u64;
        }
        if length < bytes.len() as u64 {
            file.set_len(length)?;
        }
        io::Seek::seek(&mut file, io::SeekFrom::Start(length))?;
        Ok((Self { file, length }, records))
    }

    /// Appends one record; an append that fails leaves the file as it was.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        let bytes = frame::encode(&record.encode());
        if let Err(error) = self.file.write_all(&bytes) {
            self.file.set_len(self.length)?;
            io::Seek::seek(&mut self.file, io::SeekFrom::Start(self.length))?;
            return Err(error);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }
}

/// Sets blocks aside without changing the file's length. A file system that cannot do it is used without.
fn set_aside(file: &File, bytes: u64) -> io::Result<()> {
    use nix::errno::Errno;
    use nix::fcntl::{FallocateFlags, fallocate};
    let bytes = libc::off_t::try_from(bytes).unwrap_or(libc::off_t::MAX);
    match fallocate(file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, bytes) {
        Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn record() -> impl Strategy<Value = Record> {
        prop_oneof![
            (any::<u128>(), any::<[u64; 3]>(), vec(any::<u8>(), 0..100)).prop_map(
                |(id, [cpu_millis, memory_bytes, log_quota_bytes], spec)| Record::Claim(Claim {
                    claim_id: ClaimId::from_uuid(Uuid::from_u128(id)),
                    reserved: Resources { cpu_millis, memory_bytes },
                    log_quota_bytes,
                    spec: spec.into(),
                })
            ),
            any::<u64>().prop_map(Record::Token),
            (any::<u64>(), any::<u32>()).prop_map(|(sequence, index)| Record::Event(Box::new(
                agent::Event {
                    sequence,
                    body: Some(agent::event::Body::CommandStarted(agent::CommandStarted {
                        index,
                        log_offset: 3
                    })),
                    ..Default::default()
                }
            ))),
        ]
    }

    proptest! {
        #[test]
        fn a_journal_cut_anywhere_reads_its_whole_records(
            records in vec(record(), 1..10),
            cut in any::<prop::sample::Index>(),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("journal");
            let mut file = JournalFile::create(&path, 4096).unwrap();
            let mut ends = vec![0];
            for record in &records {
                file.append(record).unwrap();
                ends.push(file.length as usize);
            }
            let cut = cut.index(*ends.last().unwrap() + 1);
            let whole = std::fs::read(&path).unwrap();
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut file, read) = JournalFile::open(&path).unwrap();
            let expected = ends.iter().filter(|end| **end <= cut).count() - 1;
            prop_assert_eq!(&read, &records[..expected]);
            // It goes on where it was cut.
            file.append(&Record::Token(9)).unwrap();
            drop(file);
            let (_, read) = JournalFile::open(&path).unwrap();
            prop_assert_eq!(read.last(), Some(&Record::Token(9)));
            prop_assert_eq!(read.len(), expected + 1);
        }

        #[test]
        fn garbage_never_panics(bytes in vec(any::<u8>(), 0..300)) {
            let _ = Record::decode(&bytes);
        }
    }
}
