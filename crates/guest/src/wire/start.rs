//! Says what an init is to run.

use super::WireError;
use super::fields::{Fields, put_bytes, put_pairs, put_texts};

/// The signal that asks a program to end, where nothing else is said.
pub const DEFAULT_STOP_SIGNAL: u8 = 15;

/// Which user the commands run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// What the init shall run. Paths are as seen from inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Start {
    /// Run in order, in one shell.
    pub commands: Vec<String>,
    /// Where it is not empty: one program and its arguments, run instead of any commands, and without a shell.
    pub program: Vec<String>,
    /// Words in front of the shell: an image's entrypoint. It is to become what it is given, as by `exec "$@"`.
    pub wrapper: Vec<String>,
    /// Name or path of a shell that takes `-e` and `-c`: "sh", "bash".
    pub shell: String,
    /// The whole environment of the commands. `PATH` and `HOME` are filled in where they are absent.
    pub env: Vec<(String, String)>,
    /// Where the first command starts.
    pub workdir: Vec<u8>,
    /// An existing folder for what init and shell pass to each other; nobody else's.
    pub scratch: Vec<u8>,
    /// From the first command's start; none: without end.
    pub timeout_ms: Option<u64>,
    /// TERM → so long → KILL, when the timeout is reached.
    pub grace_ms: u64,
    /// What asks a `program` to end, in TERM's place. Commands hear TERM.
    pub stop_signal: u8,
    /// None: as the init itself.
    pub user: Option<User>,
    /// Whether the init waits for `Take` and `Leave` when the commands are over.
    pub stays: bool,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            commands: Vec::new(),
            program: Vec::new(),
            wrapper: Vec::new(),
            shell: String::new(),
            env: Vec::new(),
            workdir: Vec::new(),
            scratch: Vec::new(),
            timeout_ms: None,
            grace_ms: 0,
            stop_signal: DEFAULT_STOP_SIGNAL,
            user: None,
            stays: false,
        }
    }
}

impl Start {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_texts(out, &self.commands);
        put_texts(out, &self.program);
        put_texts(out, &self.wrapper);
        put_bytes(out, self.shell.as_bytes());
        put_pairs(out, &self.env);
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
        out.push(self.stop_signal);
        match self.user {
            None => out.push(0),
            Some(user) => {
                out.push(1);
                out.extend(user.uid.to_le_bytes());
                out.extend(user.gid.to_le_bytes());
            }
        }
        out.push(u8::from(self.stays));
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            commands: fields.texts()?,
            program: fields.texts()?,
            wrapper: fields.texts()?,
            shell: fields.text()?,
            env: fields.pairs()?,
            workdir: fields.bytes()?.to_vec(),
            scratch: fields.bytes()?.to_vec(),
            timeout_ms: if fields.flag()? { Some(fields.u64()?) } else { None },
            grace_ms: fields.u64()?,
            stop_signal: match fields.u8()? {
                number @ 1..=64 => number,
                _ => return Err(WireError::Invalid("stop signal")),
            },
            user: if fields.flag()? { Some(User { uid: fields.u32()?, gid: fields.u32()? }) } else { None },
            stays: fields.flag()?,
        })
    }
}
