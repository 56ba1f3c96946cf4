//! Encodes and decodes the frames between an agent (the host) and `sealci-init`, over one byte channel that keeps order
//! (a socket pair, later vsock).
//!
//! ```text
//! frame    length: u32 LE, of the payload alone | kind: u8 | payload
//! host     Hello  Start  (Signal | Cancel)*  Kill?
//! init     Hello  Ready  (CommandStarted | Output | CommandFinished)*  Finished
//! ```
//!
//! Invariants: a payload is never longer than its direction's bound, which is checked before a byte of it is kept;
//! bytes left over in a payload are an error; no decoder panics or reserves memory on a stranger's word. The channel's end
//! is a message too: it tells the init to end everything. Kinds from 0x10 up are kept free for messages to come (the
//! renewed deadline of exclusive actions is one), which raise [`VERSION`].

use std::fmt;

/// The protocol both ends speak; each says its own in `Hello` and refuses another.
pub const VERSION: u16 = 1;

/// Bytes in front of every payload.
pub const HEADER_BYTES: usize = 5;

/// The longest payload towards the init. A manifest is at most 1 MiB; this leaves room for its variables.
pub const MAX_TO_INIT_BYTES: usize = 8 << 20;

/// The longest payload towards the host: the largest `Output`.
pub const MAX_FROM_INIT_BYTES: usize = 256 << 10;

/// Commands of one action, and variables of one environment, at most.
const MAX_ITEMS: usize = 16 << 10;

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

/// Which user the commands run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// What the init shall run. Paths are as seen from inside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Start {
    /// Run in order, in one shell.
    pub commands: Vec<String>,
    /// Name or path of a shell that takes `-e` and `-c`: "sh", "bash".
    pub shell: String,
    /// The whole environment of the commands.
    pub env: Vec<(String, String)>,
    /// Where the first command starts.
    pub workdir: Vec<u8>,
    /// An existing folder for what init and shell pass to each other; nobody else's.
    pub scratch: Vec<u8>,
    /// From the first command's start; none: without end.
    pub timeout_ms: Option<u64>,
    /// TERM → so long → KILL, when the timeout is reached.
    pub grace_ms: u64,
    /// None: as the init itself.
    pub user: Option<User>,
}

/// Host → init.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToInit {
    Hello {
        version: u16,
    },
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
}

/// What a command took. 0 where unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub memory_peak_bytes: u64,
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
    /// The last frame. `survivors` counts processes that even KILL did not end.
    Finished {
        ending: Ending,
        survivors: u32,
    },
}

mod kind {
    pub const HELLO: u8 = 0x01;
    pub const START: u8 = 0x02;
    pub const SIGNAL: u8 = 0x03;
    pub const CANCEL: u8 = 0x04;
    pub const KILL: u8 = 0x05;

    pub const INIT_HELLO: u8 = 0x81;
    pub const READY: u8 = 0x82;
    pub const COMMAND_STARTED: u8 = 0x83;
    pub const OUTPUT: u8 = 0x84;
    pub const COMMAND_FINISHED: u8 = 0x85;
    pub const FINISHED: u8 = 0x86;
}

/// The kind of an `Output` frame: its payload is the output and nothing else, so that both ends can move it without
/// copying it through [`FromInit`].
pub const OUTPUT_KIND: u8 = kind::OUTPUT;

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
        })
    }

    /// Reads a frame's payload.
    pub fn decode(kind: u8, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields(payload);
        let message = match kind {
            kind::HELLO => Self::Hello { version: fields.u16()? },
            kind::START => Self::Start(Start::decode(&mut fields)?),
            kind::SIGNAL => Self::Signal { number: fields.u8()? },
            kind::CANCEL => Self::Cancel { grace_ms: fields.u64()? },
            kind::KILL => Self::Kill,
            _ => return Err(WireError::Invalid("kind")),
        };
        fields.end()?;
        Ok(message)
    }
}

impl Start {
    fn encode(&self, out: &mut Vec<u8>) {
        put_count(out, self.commands.len());
        for command in &self.commands {
            put_bytes(out, command.as_bytes());
        }
        put_bytes(out, self.shell.as_bytes());
        put_count(out, self.env.len());
        for (name, value) in &self.env {
            put_bytes(out, name.as_bytes());
            put_bytes(out, value.as_bytes());
        }
        put_bytes(out, &self.workdir);
        put_bytes(out, &self.scratch);
        match self.timeout_ms {
            None => out.push(0),
            Some(timeout_ms) => {
                out.push(1);
                out.extend(timeout_ms.to_le_bytes());
            }
        }
        out.extend(self.grace_ms.to_le_bytes());
        match self.user {
            None => out.push(0),
            Some(user) => {
                out.push(1);
                out.extend(user.uid.to_le_bytes());
                out.extend(user.gid.to_le_bytes());
            }
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        let mut start = Self::default();
        for _ in 0..fields.count()? {
            start.commands.push(fields.text()?);
        }
        start.shell = fields.text()?;
        for _ in 0..fields.count()? {
            start.env.push((fields.text()?, fields.text()?));
        }
        start.workdir = fields.bytes()?.to_vec();
        start.scratch = fields.bytes()?.to_vec();
        start.timeout_ms = if fields.flag()? { Some(fields.u64()?) } else { None };
        start.grace_ms = fields.u64()?;
        start.user =
            if fields.flag()? { Some(User { uid: fields.u32()?, gid: fields.u32()? }) } else { None };
        Ok(start)
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
                kind::COMMAND_FINISHED
            }
            Self::Finished { ending, survivors } => {
                out.extend(survivors.to_le_bytes());
                ending.encode(out);
                kind::FINISHED
            }
        })
    }

    /// Reads a frame's payload; `Output` borrows from it.
    pub fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields(payload);
        let message = match kind {
            kind::INIT_HELLO => Self::Hello { version: fields.u16()? },
            kind::READY => Self::Ready,
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
                },
            },
            kind::FINISHED => {
                Self::Finished { survivors: fields.u32()?, ending: Ending::decode(&mut fields)? }
            }
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
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(match fields.u8()? {
            0 => Self::Succeeded,
            1 => Self::Failed { exit_code: fields.i32()? },
            2 => Self::TimedOut,
            3 => Self::Cancelled,
            4 => Self::Error(fields.text()?),
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

// Lengths that do not fit in 32 bits make a frame that `frame` refuses for its size.
fn put_count(out: &mut Vec<u8>, count: usize) {
    out.extend((count as u32).to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_count(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// What is left to read of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self.0.split_at_checked(count).ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(WireError::Truncated)?;
        self.0 = tail;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn i32(&mut self) -> Result<i32, WireError> {
        self.array().map(i32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(WireError::Invalid("flag")),
        }
    }

    fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let count = self.u32()? as usize;
        self.take(count)
    }

    fn text(&mut self) -> Result<String, WireError> {
        let bytes = self.bytes()?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| WireError::Invalid("text"))
    }

    fn count(&mut self) -> Result<usize, WireError> {
        let count = self.u32()? as usize;
        if count > MAX_ITEMS { Err(WireError::Invalid("count")) } else { Ok(count) }
    }

    fn end(&self) -> Result<(), WireError> {
        if self.0.is_empty() { Ok(()) } else { Err(WireError::TrailingBytes) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header_of(frame: &[u8], limit: usize) -> (Header, &[u8]) {
        let (head, payload) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::parse(*head, limit).unwrap();
        assert_eq!(header.payload_bytes, payload.len());
        (header, payload)
    }

    fn start() -> impl Strategy<Value = Start> {
        (
            prop::collection::vec(any::<String>(), 0..5),
            any::<String>(),
            prop::collection::vec(any::<(String, String)>(), 0..5),
            any::<Vec<u8>>(),
            any::<Vec<u8>>(),
            any::<Option<u64>>(),
            any::<u64>(),
            any::<Option<(u32, u32)>>(),
        )
            .prop_map(|(commands, shell, env, workdir, scratch, timeout_ms, grace_ms, user)| Start {
                commands,
                shell,
                env,
                workdir,
                scratch,
                timeout_ms,
                grace_ms,
                user: user.map(|(uid, gid)| User { uid, gid }),
            })
    }

    fn to_init() -> impl Strategy<Value = ToInit> {
        prop_oneof![
            any::<u16>().prop_map(|version| ToInit::Hello { version }),
            start().prop_map(ToInit::Start),
            any::<u8>().prop_map(|number| ToInit::Signal { number }),
            any::<u64>().prop_map(|grace_ms| ToInit::Cancel { grace_ms }),
            Just(ToInit::Kill),
        ]
    }

    fn ending() -> impl Strategy<Value = Ending> {
        prop_oneof![
            Just(Ending::Succeeded),
            any::<i32>().prop_map(|exit_code| Ending::Failed { exit_code }),
            Just(Ending::TimedOut),
            Just(Ending::Cancelled),
            any::<String>().prop_map(Ending::Error),
        ]
    }

    proptest! {
        #[test]
        fn what_is_said_to_the_init_is_what_it_hears(message in to_init()) {
            let mut frame = vec![9];
            message.encode(&mut frame).unwrap();
            let (header, payload) = header_of(&frame[1..], MAX_TO_INIT_BYTES);
            prop_assert_eq!(ToInit::decode(header.kind, payload), Ok(message));
        }

        #[test]
        fn what_the_init_says_is_what_is_heard(
            index: u32, exit_code: i32, numbers: [u64; 5], output: Vec<u8>, ending in ending(), survivors: u32,
        ) {
            let [duration_us, log_offset, cpu_user_us, cpu_system_us, memory_peak_bytes] = numbers;
            let usage = Usage { cpu_user_us, cpu_system_us, memory_peak_bytes };
            for message in [
                FromInit::Hello { version: 3 },
                FromInit::Ready,
                FromInit::CommandStarted { index, log_offset },
                FromInit::Output(&output),
                FromInit::CommandFinished { index, exit_code, duration_us, log_offset, usage },
                FromInit::Finished { ending: ending.clone(), survivors },
            ] {
                let mut frame = Vec::new();
                message.encode(&mut frame).unwrap();
                let (header, payload) = header_of(&frame, MAX_FROM_INIT_BYTES);
                prop_assert_eq!(FromInit::decode(header.kind, payload), Ok(message));
            }
        }

        #[test]
        fn garbage_is_refused_or_read_but_never_panics(kind: u8, payload: Vec<u8>) {
            let _ = ToInit::decode(kind, &payload);
            let _ = FromInit::decode(kind, &payload);
        }

        #[test]
        fn a_cut_or_lengthened_frame_is_refused(message in to_init(), cut: prop::sample::Index) {
            let mut frame = Vec::new();
            message.encode(&mut frame).unwrap();
            let (header, payload) = header_of(&frame, MAX_TO_INIT_BYTES);
            if !payload.is_empty() {
                let shorter = &payload[..cut.index(payload.len())];
                prop_assert!(ToInit::decode(header.kind, shorter).is_err());
            }
            let longer = [payload, &[0]].concat();
            prop_assert_eq!(ToInit::decode(header.kind, &longer), Err(WireError::TrailingBytes));
        }
    }

    #[test]
    fn bounds_hold_on_both_ends() {
        let huge = ToInit::Start(Start { commands: vec!["x".repeat(MAX_TO_INIT_BYTES)], ..Start::default() });
        let mut frame = vec![1, 2];
        assert!(matches!(huge.encode(&mut frame), Err(WireError::TooLong { .. })));
        assert_eq!(frame, [1, 2]);
        let header = Header { kind: 2, payload_bytes: MAX_TO_INIT_BYTES + 1 }.to_bytes();
        assert!(matches!(Header::parse(header, MAX_TO_INIT_BYTES), Err(WireError::TooLong { .. })));
        assert!(Header::parse(output_header(MAX_FROM_INIT_BYTES), MAX_FROM_INIT_BYTES).is_ok());
    }

    #[test]
    fn a_count_that_lies_reserves_nothing() {
        let mut payload = u32::MAX.to_le_bytes().to_vec();
        payload.extend([0; 64]);
        assert_eq!(ToInit::decode(kind::START, &payload), Err(WireError::Invalid("count")));
    }
}
