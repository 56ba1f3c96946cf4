//! Makes and keeps what proves that this agent is itself: its id, its credential, its key pair.
//!
//! All three are made before the agent first asks to be enrolled, so that a lost answer changes nothing: the agent asks
//! again with the same ones. The file is readable by its owner alone, and is either whole or not there.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crypto_box::SecretKey;
use rand::RngCore;
use sealci_core::ids::{AgentId, ClaimId, InstanceId};
use serde::{Deserialize, Serialize};

use crate::private::{Persistence, write_private};

/// Why there is no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("cannot read the agent's identity {path}: {source}; check that the agent may read it")]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "cannot write the agent's identity {path}: {source}; check its permissions and the room on its disk"
    )]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "the agent's identity {path} cannot be understood: {why}; restore it, or move it away and enrol this machine anew"
    )]
    Malformed { path: PathBuf, why: String },
}

/// A sealed box that does not open: it was sealed to another key, or changed on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it was not sealed for this agent, or was changed on its way")]
pub struct NotForUs;

/// Who this agent is.
pub struct Identity {
    path: PathBuf,
    persistence: Persistence,
    pub agent: AgentId,
    /// 32 random bytes; the other side keeps only their SHA-256.
    pub credential: Credential,
    secret_key: SecretKey,
    enrolled: bool,
}

/// The agent's credential. It is never shown.
#[derive(Clone)]
pub struct Credential([u8; 32]);

impl Credential {
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// In hexadecimal, as it stands in `authorization: Bearer …`.
    pub fn bearer(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(***)")
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("agent", &self.agent)
            .field("enrolled", &self.enrolled)
            .finish_non_exhaustive()
    }
}

/// The file's content.
#[derive(Serialize, Deserialize)]
struct Stored {
    agent_id: AgentId,
    credential: String,
    secret_key: String,
    enrolled: bool,
}

impl Identity {
    /// Reads the identity in the data folder, or makes one.
    pub fn load_or_make(data_folder: &Path, persistence: Persistence) -> Result<Self, IdentityError> {
        let path = data_folder.join("identity.json");
        match fs::read(&path) {
            Ok(text) => Self::read(path, persistence, &text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(data_folder)
                    .map_err(|source| IdentityError::Write { path: data_folder.to_owned(), source })?;
                let identity = Self {
                    path,
                    persistence,
                    agent: new_agent_id(),
                    credential: Credential(random()),
                    secret_key: SecretKey::from(random::<32>()),
                    enrolled: false,
                };
                identity.store()?;
                Ok(identity)
            }
            Err(source) => Err(IdentityError::Read { path, source }),
        }
    }

    /// Makes an identity of numbers that are given, where none is yet.
    #[cfg(feature = "testing")]
    pub fn make_of(data_folder: &Path, agent: AgentId, bytes: [u8; 32]) -> Result<(), IdentityError> {
        let path = data_folder.join("identity.json");
        let (credential, secret_key) = (Credential(bytes), SecretKey::from(bytes));
        Self { path, persistence: Persistence::Scratch, agent, credential, secret_key, enrolled: false }
            .store()
    }

    fn read(path: PathBuf, persistence: Persistence, text: &[u8]) -> Result<Self, IdentityError> {
        let malformed = |why: String| IdentityError::Malformed { path: path.clone(), why };
        // The parser's own message could repeat what it read.
        let stored: Stored = serde_json::from_slice(text)
            .map_err(|error| malformed(format!("line {}, column {}", error.line(), error.column())))?;
        let key = |name, text| {
            unhex(text).ok_or_else(|| malformed(format!("`{name}` is not 64 hexadecimal digits")))
        };
        let credential = Credential(key("credential", &stored.credential)?);
        let secret_key = SecretKey::from(key("secret_key", &stored.secret_key)?);
        let Stored { agent_id: agent, enrolled, .. } = stored;
        Ok(Self { path, persistence, agent, credential, secret_key, enrolled })
    }

    fn store(&self) -> Result<(), IdentityError> {
        let stored = Stored {
            agent_id: self.agent,
            credential: self.credential.bearer(),
            secret_key: hex(&self.secret_key.to_bytes()),
            enrolled: self.enrolled,
        };
        let text = serde_json::to_vec_pretty(&stored)
            .map_err(|error| IdentityError::Malformed { path: self.path.clone(), why: error.to_string() })?;
        write_private(&self.path, &text, self.persistence)
            .map_err(|source| IdentityError::Write { path: self.path.clone(), source })
    }

    /// The X25519 public key: what is meant for this agent alone is sealed to it.
    pub fn public_key(&self) -> [u8; 32] {
        *self.secret_key.public_key().as_bytes()
    }

    /// Opens a sealed box (libsodium's `crypto_box_seal`).
    pub fn open(&self, sealed: &[u8]) -> Result<Vec<u8>, NotForUs> {
        self.secret_key.unseal(sealed).map_err(|_| NotForUs)
    }

    pub fn is_enrolled(&self) -> bool {
        self.enrolled
    }

    /// Notes that the installation knows this agent.
    pub fn enrolled(&mut self) -> Result<(), IdentityError> {
        self.enrolled = true;
        self.store()
    }
}

/// A new id for an agent, by this machine's clock.
pub fn new_agent_id() -> AgentId {
    AgentId::from_parts(unix_ms(), &random())
}

/// A new id for a spool.
pub fn new_instance_id() -> InstanceId {
    InstanceId::from_parts(unix_ms(), &random())
}

/// A new id for a claim.
pub fn new_claim_id() -> ClaimId {
    ClaimId::from_parts(unix_ms(), &random())
}

/// The wall clock: for ids and for showing, never for deciding.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::rng().fill_bytes(&mut bytes);
    bytes
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_identity_survives_a_restart_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let mut made = Identity::load_or_make(folder.path(), Persistence::Durable).unwrap();
        assert!(!made.is_enrolled());
        made.enrolled().unwrap();
        let read = Identity::load_or_make(folder.path(), Persistence::Durable).unwrap();
        assert_eq!(
            (read.agent, read.credential.bearer(), read.public_key(), read.is_enrolled()),
            (made.agent, made.credential.bearer(), made.public_key(), true)
        );
        let mode = fs::metadata(folder.path().join("identity.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn only_the_agent_opens_what_is_sealed_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let ours = Identity::load_or_make(&folder.path().join("a"), Persistence::Scratch).unwrap();
        let other = Identity::load_or_make(&folder.path().join("b"), Persistence::Scratch).unwrap();
        let public_key = crypto_box::PublicKey::from(ours.public_key());
        let mut sealed = public_key.seal(&mut crypto_box::aead::OsRng, b"for you alone").unwrap();
        assert_eq!(ours.open(&sealed).unwrap(), b"for you alone");
        assert_eq!(other.open(&sealed), Err(NotForUs));
        sealed[40] ^= 1;
        assert_eq!(ours.open(&sealed), Err(NotForUs));
        assert_eq!(ours.open(b""), Err(NotForUs));
    }

    #[test]
    fn a_damaged_identity_is_told_without_repeating_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("identity.json");
        fs::write(&path, r#"{"agent_id": "hunter2"}"#).unwrap();
        let error = Identity::load_or_make(folder.path(), Persistence::Durable).unwrap_err().to_string();
        assert!(error.contains("identity.json") && !error.contains("hunter2"), "{error}");
    }
}
