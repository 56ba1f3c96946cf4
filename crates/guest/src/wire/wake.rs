//! Tells the init of a machine what a machine cannot know by itself.

use std::fmt;

use super::WireError;
use super::fields::{Fields, put_bytes, put_texts};

/// The kernel's generator is whole with 32 bytes; more do no harm, and bound a frame.
pub const MAX_ENTROPY_BYTES: usize = 512;

/// What time it is, and what no other machine has.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Wake {
    /// Since 1970; 0 leaves the clock as it is.
    pub unix_time_us: u64,
    /// The host's `CLOCK_BOOTTIME` (clock_gettime(2)), read after the init called.
    pub host_boot_ms: u64,
    /// Secret, and of this machine alone: what was copied from a snapshot would draw the same numbers as its siblings otherwise.
    pub entropy: Vec<u8>,
    pub host_name: String,
    /// More names for `localhost`.
    pub names: Vec<String>,
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wake")
            .field("unix_time_us", &self.unix_time_us)
            .field("host_name", &self.host_name)
            .finish_non_exhaustive()
    }
}

impl Wake {
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.unix_time_us.to_le_bytes());
        out.extend(self.host_boot_ms.to_le_bytes());
        put_bytes(out, &self.entropy);
        put_bytes(out, self.host_name.as_bytes());
        put_texts(out, &self.names);
    }

    pub(super) fn decode(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        Ok(Self {
            unix_time_us: fields.u64()?,
            host_boot_ms: fields.u64()?,
            entropy: match fields.bytes()? {
                bytes if bytes.len() <= MAX_ENTROPY_BYTES => bytes.to_vec(),
                _ => return Err(WireError::Invalid("entropy")),
            },
            host_name: fields.text()?,
            names: fields.texts()?,
        })
    }
}
