//! Seals what one agent alone may know to its key: whoever passes it on cannot read it.

use crypto_box::PublicKey;
use crypto_box::aead::OsRng;
use sealci_git::{Credentials, SshKey};
use serde_json::json;

/// Why something cannot be handed over. It repeats nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("the agent has no key; enrol it anew")]
    NoKey,
    #[error("a private key that is a file of this machine cannot be handed over")]
    KeyFile,
    #[error("sealing failed")]
    Seal,
}

/// As `ClaimGranted.sealed_credentials` has it; empty for none.
pub fn sealed(credentials: &Credentials, public_key: Option<[u8; 32]>) -> Result<Vec<u8>, SealError> {
    let open = match credentials {
        Credentials::None => return Ok(Vec::new()),
        Credentials::Token { username, secret } => json!({"username": username, "secret": secret.expose()}),
        Credentials::SshKey(SshKey::Text(key)) => json!({"ssh_key": key.expose()}),
        Credentials::SshKey(SshKey::File(_)) => return Err(SealError::KeyFile),
    };
    sealed_json(&open, public_key)
}

/// JSON that only the owner of the key can read.
pub fn sealed_json(open: &serde_json::Value, public_key: Option<[u8; 32]>) -> Result<Vec<u8>, SealError> {
    let key = PublicKey::from(public_key.ok_or(SealError::NoKey)?);
    key.seal(&mut OsRng, open.to_string().as_bytes()).map_err(|_| SealError::Seal)
}
