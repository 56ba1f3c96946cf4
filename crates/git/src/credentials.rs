//! Holds what opens a private repository, so that it cannot be printed by accident.

use std::fmt;
use std::path::PathBuf;

use base64::Engine as _;

/// A text that is never shown: `Debug` gives `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What is shown to the repository's server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Credentials {
    #[default]
    None,
    /// For `https` (and `http`): a user name and a token or password, as HTTP Basic authentication. Forges take any
    /// user name beside a token; `git` will do.
    Token { username: String, secret: Secret },
    /// For `ssh`: a private key without a passphrase (a deploy key).
    SshKey(SshKey),
}

/// Where a private key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SshKey {
    File(PathBuf),
    /// The key itself, in OpenSSH's format. It is written to a file only its owner can read, for as long as one call
    /// takes.
    Text(Secret),
}

impl Credentials {
    /// The value of an `Authorization` header, if these are credentials for HTTP.
    pub(crate) fn basic_authorization(&self) -> Option<String> {
        let Self::Token { username, secret } = self else { return None };
        let pair = format!("{username}:{}", secret.expose());
        Some(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
    }

    /// Replaces the secret in a text, in the forms in which it was given to git.
    pub(crate) fn redact(&self, text: &str) -> String {
        let mut text = text.to_owned();
        if let Self::Token { secret, username } = self {
            let header = self.basic_authorization().unwrap_or_default();
            let encoded = header.trim_start_matches("Basic ");
            // A token can stand where the user name does (`https://TOKEN@host/`).
            let hidden_name = if secret.expose().is_empty() { username.as_str() } else { "" };
            for part in [secret.expose(), encoded, hidden_name] {
                if !part.is_empty() {
                    text = text.replace(part, "***");
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown_in_any_form() {
        let credentials = Credentials::Token { username: "git".into(), secret: Secret::new("hunter2") };
        assert!(!format!("{credentials:?}").contains("hunter2"));
        let said = format!("fatal: hunter2 and {}", credentials.basic_authorization().unwrap());
        assert_eq!(credentials.redact(&said), "fatal: *** and Basic ***");
    }
}
