//! Says what else an agent asks of an init, beside running commands, and what it hears of it.
//!
//! A request bears a number of the agent's choice, which its one answer repeats. Of files one request is under way at a time;
//! the bytes between a `Put` and its end, or a `Take` and its answer, are a tar archive.

use super::WireError;
use super::fields::{Fields, put_bytes, put_count, put_pairs, put_texts};

/// Files are coming: the archive in the `PutData` frames that follow, until `PutEnd`. Only before `Start`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Put {
    pub id: u32,
    /// Below which folder they are unpacked: `~`, `~/…`, absolute, or else below `workdir`. Made where it is absent.
    pub root: Vec<u8>,
    /// What `Start` will say of it.
    pub workdir: Vec<u8>,
    /// The `HOME` of the commands, where `Start` will say one.
    pub home: Option<Vec<u8>>,
}

/// Files are wanted: the archive in `TakeData` frames, then `Taken`. Only after `Ended`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Take {
    pub id: u32,
    /// Paths and globs, `~/…`, absolute, or else below the working folder; folders with all that is in them. What begins
    /// with `!` leaves out what the others choose.
    pub paths: Vec<String>,
    /// To which folder the archive's names are relative; read as a path. Whatever is chosen lies below it.
    pub base: Vec<u8>,
    /// Of the files' content, together.
    pub max_bytes: u64,
    /// Entries of the archive.
    pub max_files: u64,
}

/// One more program beside the commands, while they run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Exec {
    pub id: u32,
    /// A program and its arguments.
    pub program: Vec<String>,
    /// What is added to the commands' environment, or replaced in it.
    pub env: Vec<(String, String)>,
    /// When it is killed.
    pub timeout_ms: u64,
    /// Its input and outputs are passed on as they come; else it has no input, and the last of its outputs is told at its end.
    pub streams: bool,
}

/// What was packed, and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Taken {
    pub id: u32,
    /// Entries of the archive.
    pub files: u64,
    /// Of content.
    pub bytes: u64,
    /// Which of the patterns, by their place in `paths`, chose nothing.
    pub missing: Vec<u32>,
    /// Devices, sockets and FIFOs that were left out.
    pub specials: u64,
    /// What could not be read, or not to its end, which is filled up with zeros then.
    pub unreadable: u64,
    /// The first of those, for a person.
    pub unreadable_names: Vec<String>,
}

/// How a program beside the commands ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEnd {
    /// As a shell reports it: 128 + n for signal n.
    Exited {
        exit_code: i32,
    },
    TimedOut,
    /// By `Stop`, or with the commands.
    Stopped,
    /// It could not be started, or not now.
    Refused {
        why: String,
    },
}

impl Put {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        put_bytes(out, &self.root);
        put_bytes(out, &self.workdir);
        match &self.home {
            None => out.push(0),
            Some(home) => {
                out.push(1);
                put_bytes(out, home);
            }
        }
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            id: fields.u32()?,
            root: fields.bytes()?.to_vec(),
            workdir: fields.bytes()?.to_vec(),
            home: if fields.flag()? { Some(fields.bytes()?.to_vec()) } else { None },
        })
    }
}

impl Take {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        put_texts(out, &self.paths);
        put_bytes(out, &self.base);
        out.extend(self.max_bytes.to_le_bytes());
        out.extend(self.max_files.to_le_bytes());
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            id: fields.u32()?,
            paths: fields.texts()?,
            base: fields.bytes()?.to_vec(),
            max_bytes: fields.u64()?,
            max_files: fields.u64()?,
        })
    }
}

impl Exec {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        put_texts(out, &self.program);
        put_pairs(out, &self.env);
        out.extend(self.timeout_ms.to_le_bytes());
        out.push(u8::from(self.streams));
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            id: fields.u32()?,
            program: fields.texts()?,
            env: fields.pairs()?,
            timeout_ms: fields.u64()?,
            streams: fields.flag()?,
        })
    }
}

impl Taken {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.id.to_le_bytes());
        out.extend(self.files.to_le_bytes());
        out.extend(self.bytes.to_le_bytes());
        put_count(out, self.missing.len());
        for place in &self.missing {
            out.extend(place.to_le_bytes());
        }
        out.extend(self.specials.to_le_bytes());
        out.extend(self.unreadable.to_le_bytes());
        put_texts(out, &self.unreadable_names);
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            id: fields.u32()?,
            files: fields.u64()?,
            bytes: fields.u64()?,
            missing: (0..fields.count()?).map(|_| fields.u32()).collect::<Result<_, _>>()?,
            specials: fields.u64()?,
            unreadable: fields.u64()?,
            unreadable_names: fields.texts()?,
        })
    }
}

impl ExecEnd {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Exited { exit_code } => {
                out.push(0);
                out.extend(exit_code.to_le_bytes());
            }
            Self::TimedOut => out.push(1),
            Self::Stopped => out.push(2),
            Self::Refused { why } => {
                out.push(3);
                put_bytes(out, why.as_bytes());
            }
        }
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(match fields.u8()? {
            0 => Self::Exited { exit_code: fields.i32()? },
            1 => Self::TimedOut,
            2 => Self::Stopped,
            3 => Self::Refused { why: fields.text()? },
            _ => return Err(WireError::Invalid("end of a program")),
        })
    }
}
