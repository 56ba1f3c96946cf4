//! Encodes and decodes the frames between an agent (the host) and `sealci-init`, over one byte channel that keeps order
//! (a socket pair, two pipes, vsock).
//!
//! ```text
//! frame    length: u32 LE, of the payload alone | kind: u8 | payload
//! host     Hello  Wake?  (Put PutData* PutEnd)*  Lease?  Start  (Signal | Exec | Lease | Cancel)*  Take*  Leave?  Kill?
//! init     Hello  (PutRoom* Stored)*  Ready  (CommandStarted | Output | CommandFinished | ExecEnded)*
//!                                            OutOfMemory?  (Ended  (TakeData* Taken)*)?  Finished
//! ```
//!
//! `Ended` comes only where `Start` said that the init stays. `Refused` may stand in the place of `Stored` and `Taken`.
//! Of a `Put`'s archive the host sends at most [`PUT_WINDOW_BYTES`] at first, and then as much as each `PutRoom` says: so the
//! init reads its channel whatever becomes of the files, and hears a `Kill` among them.
//!
//! An `Exec` that streams has its input in `ExecInput` and its outputs in `ExecOutput`, as they come, until its `ExecEnded`. Of
//! either at most [`EXEC_WINDOW_PIECES`] are under way: for each that was passed on the other end says `ExecTaken`.
//!
//! A `Lease` is the deadline of an exclusive action. The init counts it alone, on the kernel's boot-time clock, which both ends
//! read: when it is reached everything is killed without grace. Only a later `Lease` moves it, so a host that is stopped, or
//! whose word is late, cannot. What has a lease never runs without one again.
//!
//! A `Wake` is for the first process of a machine, which knows neither the time nor anything that others could not guess: it comes
//! before all else where the init is one, and nowhere else. It also says what the host's boot-time clock reads, so that leases
//! hold: the init takes its own clock's reading of a moment before it called the host for the same, and so is never late. Each
//! service that it names has an init of its own, which calls a port of its own, and is nobody's but that port's.
//!
//! Invariants: a payload is never longer than its direction's bound, which is checked before a byte of it is kept;
//! bytes left over in a payload are an error; no decoder panics or reserves memory on a stranger's word. The channel's end
//! is a message too: it tells the init to end everything. Kinds from 0x20 up are kept free for messages to come, which raise
//! [`VERSION`].

mod fields;
pub mod machine;
mod requests;
mod start;
mod wake;

use std::fmt;

use fields::{Fields, put_bytes};
pub use requests::{Exec, ExecEnd, Put, Take, Taken};
pub use start::{DEFAULT_STOP_SIGNAL, Start, User};
pub use wake::{MAX_ENTROPY_BYTES, Network, Wake};

/// The protocol both ends speak; each says its own in `Hello` and refuses another.
pub const VERSION: u16 = 7;

/// What an init says of an agent of another version.
pub fn unlike(version: u16) -> String {
    format!("the agent speaks version {version} of the protocol, this sealci-init version {VERSION}")
}

/// Bytes in front of every payload.
pub const HEADER_BYTES: usize = 5;

/// The longest payload towards the init. A manifest is at most 1 MiB; this leaves room for its variables.
pub const MAX_TO_INIT_BYTES: usize = 8 << 20;

/// The longest payload towards the host: the largest `Output`.
pub const MAX_FROM_INIT_BYTES: usize = 256 << 10;

/// How many bytes of an archive may be on their way into the init.
pub const PUT_WINDOW_BYTES: usize = 1 << 20;

/// The longest payload of a `PutData`.
pub const MAX_PUT_DATA_BYTES: usize = 128 << 10;

/// How many pieces of a streaming program's input, and of its outputs, may be on their way.
pub const EXEC_WINDOW_PIECES: usize = 8;

/// The longest such piece.
pub const MAX_EXEC_PIECE_BYTES: usize = 16 << 10;

/// What a frame refuses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WireError {
    /// A payload past its direction's bound.
    TooLong { bytes: usize, limit: usize },
    /// A payload that ends in the middle of a field.
    Truncated,
    /// A payload with bytes behind its last field.
    TrailingBytes,
    /// A kind, tag or text that this version does not know; names the field.
    Invalid(&'static str),
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong { bytes, limit } => {
                write!(f, "a frame of {bytes} bytes is longer than the {limit} allowed")
            }
            Self::Truncated => f.write_str("a frame ends in the middle of a field"),
            Self::TrailingBytes => f.write_str("a frame has bytes behind its last field"),
            Self::Invalid(field) => write!(f, "a frame's {field} is not one this version knows"),
        }
    }
}

impl std::error::Error for WireError {}

/// The kind of a frame and how many bytes follow its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    pub payload_bytes: usize,
}

impl Header {
    /// Reads a header and holds it against the bound of its direction.
    pub fn parse(bytes: [u8; HEADER_BYTES], limit: usize) -> Result<Self, WireError> {
        let [a, b, c, d, kind] = bytes;
        let payload_bytes = u32::from_le_bytes([a, b, c, d]) as usize;
        if payload_bytes > limit {
            return Err(WireError::TooLong { bytes: payload_bytes, limit });
        }
        Ok(Self { kind, payload_bytes })
    }

    fn to_bytes(self) -> [u8; HEADER_BYTES] {
        // Every caller has checked `payload_bytes` against a bound far below 4 GiB.
        let [a, b, c, d] = (self.payload_bytes as u32).to_le_bytes();
        [a, b, c, d, self.kind]
    }
}

/// Host → init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToInit {
    Hello {
        version: u16,
    },
    Wake(Wake),
    Start(Start),
    /// Passed on to the shell and what stands in its process group.
    Signal {
        number: u8,
    },
    /// TERM to all, KILL to what lives after the grace. A later one may only shorten it.
    Cancel {
        grace_ms: u64,
    },
    /// KILL to all, at once.
    Kill,
    Lease(Lease),
    Put(Put),
    /// The archive is whole.
    PutEnd,
    Take(Take),
    Exec(Exec),
    /// A piece of a streaming program's input, at most [`MAX_EXEC_PIECE_BYTES`]; an empty one: it ends.
    ExecInput {
        id: u32,
        bytes: Vec<u8>,
    },
    /// An `ExecOutput` was passed on.
    ExecTaken {
        id: u32,
    },
    /// This request is to end, whatever it has come to; it is answered all the same.
    Stop {
        id: u32,
    },
    /// After `Ended`: nothing else is wanted.
    Leave,
}

/// How long what runs may run without a further word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lease {
    /// `CLOCK_BOOTTIME` (clock_gettime(2)) at its end.
    pub until_boot_ms: u64,
    /// No lease is ever longer. One that reads as longer comes from a host with another clock, and is refused.
    pub longest_ms: u64,
}

/// What a command took. 0 where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub memory_peak_bytes: u64,
    /// Read from storage; what the page cache had is not in it.
    pub read_bytes: u64,
    /// Written, or to be written, to storage.
    pub write_bytes: u64,
}

/// How the whole ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Succeeded,
    /// The shell's exit code; 128 + n for signal n.
    Failed {
        exit_code: i32,
    },
    TimedOut,
    /// By `Cancel` or `Kill`.
    Cancelled,
    /// Its lease ended.
    Expired,
    /// The init could not do its part.
    Error(String),
}

/// Init → host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromInit<'a> {
    Hello {
        version: u16,
    },
    /// `Start` is understood and the shell is about to start.
    Ready,
    CommandStarted {
        index: u32,
        log_offset: u64,
    },
    /// Both standard output and standard error, in the order in which they were written.
    Output(&'a [u8]),
    CommandFinished {
        index: u32,
        exit_code: i32,
        duration_us: u64,
        log_offset: u64,
        usage: Usage,
    },
    /// Of a machine: its memory ran out, and its kernel has killed processes for it. Said once.
    OutOfMemory,
    /// The commands are over, nothing of them lives, and the log is complete; the init waits for `Take` and `Leave`.
    Ended {
        ending: Ending,
        survivors: u32,
    },
    /// The last frame. `survivors` counts processes that even KILL did not end.
    Finished {
        ending: Ending,
        survivors: u32,
    },
    /// So many bytes more of the archive may be sent. 0 is a sign of life.
    PutRoom {
        bytes: u32,
    },
    /// A `Put` is done: so many entries, and bytes of content.
    Stored {
        id: u32,
        files: u64,
        bytes: u64,
    },
    /// A `Put` or `Take` is not done, or not to its end; says why, for a person.
    Refused {
        id: u32,
        why: String,
    },
    /// A piece of the archive that was asked for. An empty one is a sign of life.
    TakeData(&'a [u8]),
    Taken(Taken),
    /// What a streaming program wrote, at most [`MAX_EXEC_PIECE_BYTES`].
    ExecOutput {
        id: u32,
        /// To standard error; else to standard output.
        is_error: bool,
        bytes: Vec<u8>,
    },
    /// An `ExecInput` was passed on, or is nobody's any more.
    ExecTaken {
        id: u32,
    },
    ExecEnded {
        id: u32,
        end: ExecEnd,
        /// The last of what it wrote to either of its outputs; nothing where it streams.
        output: Vec<u8>,
    },
}

mod kind {
    pub const HELLO: u8 = 0x01;
    pub const START: u8 = 0x02;
    pub const SIGNAL: u8 = 0x03;
    pub const CANCEL: u8 = 0x04;
    pub const KILL: u8 = 0x05;
    pub const PUT: u8 = 0x10;
    pub const PUT_DATA: u8 = 0x11;
    pub const PUT_END: u8 = 0x12;
    pub const TAKE: u8 = 0x13;
    pub const EXEC: u8 = 0x14;
    pub const STOP: u8 = 0x15;
    pub const LEAVE: u8 = 0x16;
    pub const EXEC_INPUT: u8 = 0x17;
    pub const EXEC_TAKEN: u8 = 0x18;
    pub const LEASE: u8 = 0x20;
    pub const WAKE: u8 = 0x21;

    pub const INIT_HELLO: u8 = 0x81;
    pub const READY: u8 = 0x82;
    pub const COMMAND_STARTED: u8 = 0x83;
    pub const OUTPUT: u8 = 0x84;
    pub const COMMAND_FINISHED: u8 = 0x85;
    pub const FINISHED: u8 = 0x86;
    pub const ENDED: u8 = 0x90;
    pub const PUT_ROOM: u8 = 0x91;
    pub const STORED: u8 = 0x92;
    pub const REFUSED: u8 = 0x93;
    pub const TAKE_DATA: u8 = 0x94;
    pub const TAKEN: u8 = 0x95;
    pub const EXEC_ENDED: u8 = 0x96;
    pub const EXEC_OUTPUT: u8 = 0x97;
    pub const INIT_EXEC_TAKEN: u8 = 0x98;
    pub const OUT_OF_MEMORY: u8 = 0x99;
}

/// The kind of an `Output` frame: its payload is the output and nothing else, so that both ends can move it without
/// copying it through [`FromInit`].
pub const OUTPUT_KIND: u8 = kind::OUTPUT;

/// The kind of a frame with a piece of the archive that was asked for: nothing else, as [`OUTPUT_KIND`].
pub const TAKE_DATA_KIND: u8 = kind::TAKE_DATA;

/// The kind of a frame with a piece of an archive for the init: at most [`MAX_PUT_DATA_BYTES`], and nothing else. [`ToInit`]
/// has no part in it.
pub const PUT_DATA_KIND: u8 = kind::PUT_DATA;

/// The header of a `PutData` frame of `payload_bytes`, at most [`MAX_PUT_DATA_BYTES`].
pub fn put_data_header(payload_bytes: usize) -> [u8; HEADER_BYTES] {
    debug_assert!(payload_bytes <= MAX_PUT_DATA_BYTES);
    Header { kind: kind::PUT_DATA, payload_bytes }.to_bytes()
}

/// The header of a `TakeData` frame of `payload_bytes`, at most [`MAX_FROM_INIT_BYTES`].
pub fn take_data_header(payload_bytes: usize) -> [u8; HEADER_BYTES] {
    debug_assert!(payload_bytes <= MAX_FROM_INIT_BYTES);
    Header { kind: kind::TAKE_DATA, payload_bytes }.to_bytes()
}

/// The header of an `Output` frame of `payload_bytes`, at most [`MAX_FROM_INIT_BYTES`].
pub fn output_header(payload_bytes: usize) -> [u8; HEADER_BYTES] {
    debug_assert!(payload_bytes <= MAX_FROM_INIT_BYTES);
    Header { kind: kind::OUTPUT, payload_bytes }.to_bytes()
}

impl ToInit {
    /// Appends the whole frame to `out`; leaves `out` as it was when the frame would be too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        frame(out, MAX_TO_INIT_BYTES, |out| match self {
            Self::Hello { version } => {
                out.extend(version.to_le_bytes());
                kind::HELLO
            }
            Self::Wake(wake) => {
                wake.encode(out);
                kind::WAKE
            }
            Self::Start(start) => {
                start.encode(out);
                kind::START
            }
            Self::Signal { number } => {
                out.push(*number);
                kind::SIGNAL
            }
            Self::Cancel { grace_ms } => {
                out.extend(grace_ms.to_le_bytes());
                kind::CANCEL
            }
            Self::Kill => kind::KILL,
            Self::Lease(lease) => {
                out.extend(lease.until_boot_ms.to_le_bytes());
                out.extend(lease.longest_ms.to_le_bytes());
                kind::LEASE
            }
            Self::Put(put) => {
                put.encode(out);
                kind::PUT
            }
            Self::PutEnd => kind::PUT_END,
            Self::Take(take) => {
                take.encode(out);
                kind::TAKE
            }
            Self::Exec(exec) => {
                exec.encode(out);
                kind::EXEC
            }
            Self::ExecInput { id, bytes } => {
                out.extend(id.to_le_bytes());
                put_bytes(out, bytes);
                kind::EXEC_INPUT
            }
            Self::ExecTaken { id } => {
                out.extend(id.to_le_bytes());
                kind::EXEC_TAKEN
            }
            Self::Stop { id } => {
                out.extend(id.to_le_bytes());
                kind::STOP
            }
            Self::Leave => kind::LEAVE,
        })
    }

    /// Reads a frame's payload.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(payload);
        let message = match kind {
            kind::HELLO => Self::Hello { version: fields.u16()? },
            kind::WAKE => Self::Wake(Wake::decode(&mut fields)?),
            kind::START => Self::Start(Start::decode(&mut fields)?),
            kind::SIGNAL => Self::Signal { number: fields.u8()? },
            kind::CANCEL => Self::Cancel { grace_ms: fields.u64()? },
            kind::KILL => Self::Kill,
            kind::LEASE => Self::Lease(Lease { until_boot_ms: fields.u64()?, longest_ms: fields.u64()? }),
            kind::PUT => Self::Put(Put::decode(&mut fields)?),
            kind::PUT_END => Self::PutEnd,
            kind::TAKE => Self::Take(Take::decode(&mut fields)?),
            kind::EXEC => Self::Exec(Exec::decode(&mut fields)?),
            kind::EXEC_INPUT => Self::ExecInput { id: fields.u32()?, bytes: fields.bytes()?.to_vec() },
            kind::EXEC_TAKEN => Self::ExecTaken { id: fields.u32()? },
            kind::STOP => Self::Stop { id: fields.u32()? },
            kind::LEAVE => Self::Leave,
            _ => return Err(WireError::Invalid("kind")),
        };
        fields.end()?;
        Ok(message)
    }
}

impl<'a> FromInit<'a> {
    /// Appends the whole frame to `out`; leaves `out` as it was when the frame would be too long.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        frame(out, MAX_FROM_INIT_BYTES, |out| match self {
            Self::Hello { version } => {
                out.extend(version.to_le_bytes());
                kind::INIT_HELLO
            }
            Self::Ready => kind::READY,
            Self::OutOfMemory => kind::OUT_OF_MEMORY,
            Self::CommandStarted { index, log_offset } => {
                out.extend(index.to_le_bytes());
                out.extend(log_offset.to_le_bytes());
                kind::COMMAND_STARTED
            }
            Self::Output(bytes) => {
                out.extend_from_slice(bytes);
                kind::OUTPUT
            }
            Self::CommandFinished { index, exit_code, duration_us, log_offset, usage } => {
                out.extend(index.to_le_bytes());
                out.extend(exit_code.to_le_bytes());
                out.extend(duration_us.to_le_bytes());
                out.extend(log_offset.to_le_bytes());
                out.extend(usage.cpu_user_us.to_le_bytes());
                out.extend(usage.cpu_system_us.to_le_bytes());
                out.extend(usage.memory_peak_bytes.to_le_bytes());
                out.extend(usage.read_bytes.to_le_bytes());
                out.extend(usage.write_bytes.to_le_bytes());
                kind::COMMAND_FINISHED
            }
            Self::Ended { ending, survivors } | Self::Finished { ending, survivors } => {
                out.extend(survivors.to_le_bytes());
                ending.encode(out);
                if matches!(self, Self::Ended { .. }) { kind::ENDED } else { kind::FINISHED }
            }
            Self::PutRoom { bytes } => {
                out.extend(bytes.to_le_bytes());
                kind::PUT_ROOM
            }
            Self::Stored { id, files, bytes } => {
                out.extend(id.to_le_bytes());
                out.extend(files.to_le_bytes());
                out.extend(bytes.to_le_bytes());
                kind::STORED
            }
            Self::Refused { id, why } => {
                out.extend(id.to_le_bytes());
                put_bytes(out, why.as_bytes());
                kind::REFUSED
            }
            Self::TakeData(bytes) => {
                out.extend_from_slice(bytes);
                kind::TAKE_DATA
            }
            Self::Taken(taken) => {
                taken.encode(out);
                kind::TAKEN
            }
            Self::ExecOutput { id, is_error, bytes } => {
                out.extend(id.to_le_bytes());
                out.push(u8::from(*is_error));
                put_bytes(out, bytes);
                kind::EXEC_OUTPUT
            }
            Self::ExecTaken { id } => {
                out.extend(id.to_le_bytes());
                kind::INIT_EXEC_TAKEN
            }
            Self::ExecEnded { id, end, output } => {
                out.extend(id.to_le_bytes());
                end.encode(out);
                put_bytes(out, output);
                kind::EXEC_ENDED
            }
        })
    }

    /// Reads a frame's payload; `Output` and `TakeData` borrow from it.
    pub fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields(payload);
        let message = match kind {
            kind::INIT_HELLO => Self::Hello { version: fields.u16()? },
            kind::READY => Self::Ready,
            kind::OUT_OF_MEMORY => Self::OutOfMemory,
            kind::COMMAND_STARTED => Self::CommandStarted { index: fields.u32()?, log_offset: fields.u64()? },
            kind::OUTPUT => return Ok(Self::Output(payload)),
            kind::COMMAND_FINISHED => Self::CommandFinished {
                index: fields.u32()?,
                exit_code: fields.i32()?,
                duration_us: fields.u64()?,
                log_offset: fields.u64()?,
                usage: Usage {
                    cpu_user_us: fields.u64()?,
                    cpu_system_us: fields.u64()?,
                    memory_peak_bytes: fields.u64()?,
                    read_bytes: fields.u64()?,
                    write_bytes: fields.u64()?,
                },
            },
            kind::ENDED => Self::Ended { survivors: fields.u32()?, ending: Ending::decode(&mut fields)? },
            kind::FINISHED => {
                Self::Finished { survivors: fields.u32()?, ending: Ending::decode(&mut fields)? }
            }
            kind::PUT_ROOM => Self::PutRoom { bytes: fields.u32()? },
            kind::STORED => Self::Stored { id: fields.u32()?, files: fields.u64()?, bytes: fields.u64()? },
            kind::REFUSED => Self::Refused { id: fields.u32()?, why: fields.text()? },
            kind::TAKE_DATA => return Ok(Self::TakeData(payload)),
            kind::TAKEN => Self::Taken(Taken::decode(&mut fields)?),
            kind::EXEC_OUTPUT => Self::ExecOutput {
                id: fields.u32()?,
                is_error: fields.flag()?,
                bytes: fields.bytes()?.to_vec(),
            },
            kind::INIT_EXEC_TAKEN => Self::ExecTaken { id: fields.u32()? },
            kind::EXEC_ENDED => Self::ExecEnded {
                id: fields.u32()?,
                end: ExecEnd::decode(&mut fields)?,
                output: fields.bytes()?.to_vec(),
            },
            _ => return Err(WireError::Invalid("kind")),
        };
        fields.end()?;
        Ok(message)
    }
}

impl Ending {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Succeeded => out.push(0),
            Self::Failed { exit_code } => {
                out.push(1);
                out.extend(exit_code.to_le_bytes());
            }
            Self::TimedOut => out.push(2),
            Self::Cancelled => out.push(3),
            Self::Error(text) => {
                out.push(4);
                put_bytes(out, text.as_bytes());
            }
            Self::Expired => out.push(5),
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(match fields.u8()? {
            0 => Self::Succeeded,
            1 => Self::Failed { exit_code: fields.i32()? },
            2 => Self::TimedOut,
            3 => Self::Cancelled,
            4 => Self::Error(fields.text()?),
            5 => Self::Expired,
            _ => return Err(WireError::Invalid("ending")),
        })
    }
}

/// Appends a frame whose payload `write` appends, returning its kind.
fn frame(out: &mut Vec<u8>, limit: usize, write: impl FnOnce(&mut Vec<u8>) -> u8) -> Result<(), WireError> {
    let start = out.len();
    out.extend([0; HEADER_BYTES]);
    let kind = write(out);
    let payload_bytes = out.len() - start - HEADER_BYTES;
    if payload_bytes > limit {
        out.truncate(start);
        return Err(WireError::TooLong { bytes: payload_bytes, limit });
    }
    out[start..start + HEADER_BYTES].copy_from_slice(&Header { kind, payload_bytes }.to_bytes());
    Ok(())
}

#[cfg(test)]
mod tests;
