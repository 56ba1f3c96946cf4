//! Decides who may do what: bearer tokens (RFC 6750), each with a role.
//!
//! A service keeps only the SHA-256 of a token. Tokens carry 256 random bits, so a plain hash is enough: there is
//! nothing to guess, and nothing to slow down.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use rand::TryRngCore as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::problem::Problem;

/// What a token allows. Each role may do all that those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Read,
    Run,
    Admin,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        })
    }
}

/// A bearer token in the clear. `Debug` does not show it.
#[derive(Clone, Deserialize)]
#[serde(transparent)]
pub struct Token(String);

/// Why a token could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("cannot read the token file {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the token file {} holds no token: it should hold one line of 20 to 512 letters, digits or `-._~+/=`", path.display())]
    NoToken { path: PathBuf },
    #[error("the system gives no random numbers")]
    Random { source: rand::rand_core::OsError },
}

impl Token {
    /// What every token made here begins with, so that secret scanners can know one.
    pub const PREFIX: &str = "sealci_";

    /// Makes a new one from 32 random bytes.
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = [0; 32];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes).map_err(|source| TokenError::Random { source })?;
        let text = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes);
        Ok(Self(format!("{}{text}", Self::PREFIX)))
    }

    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Reads the one line of a file.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| TokenError::Read { path: path.to_owned(), source })?;
        let text = text.trim();
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/=".contains(&byte);
        if !(20..=512).contains(&text.len()) || !text.bytes().all(allowed) {
            return Err(TokenError::NoToken { path: path.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }

    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn digest(&self) -> TokenDigest {
        TokenDigest::of(&self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

/// What is kept of a token: enough to know it again.
#[derive(Clone, Copy)]
pub struct TokenDigest([u8; 32]);

impl TokenDigest {
    fn of(text: &str) -> Self {
        Self(Sha256::digest(text).into())
    }

    /// Compares in a time that does not depend on where the two differ.
    fn is(&self, other: &Self) -> bool {
        self.0.iter().zip(other.0).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenDigest(***)")
    }
}

/// The tokens a service knows. Empty, it lets nobody in.
#[derive(Debug, Clone, Default)]
pub struct Tokens {
    known: Vec<(TokenDigest, Role)>,
}

/// Why a request may not do what it asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("no bearer token was given, in `Authorization: Bearer <token>`")]
    NoToken,
    #[error("the bearer token is not known")]
    UnknownToken,
    #[error("this needs the role `{needed}`; the token has `{has}`")]
    WrongRole { needed: Role, has: Role },
}

impl Tokens {
    #[must_use]
    pub fn with(mut self, token: &Token, role: Role) -> Self {
        self.known.push((token.digest(), role));
        self
    }

    /// The role of the token in an `Authorization` header, if it suffices.
    pub fn authorize(&self, authorization: Option<&str>, needed: Role) -> Result<Role, Denied> {
        let given = authorization.and_then(|header| header.split_once(' '));
        let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let given = TokenDigest::of(given.ok_or(Denied::NoToken)?.1.trim());
        // Every known token is compared, whichever fits.
        let roles = self.known.iter().filter(|(known, _)| known.is(&given)).map(|(_, role)| *role);
        match roles.max().ok_or(Denied::UnknownToken)? {
            has if has >= needed => Ok(has),
            has => Err(Denied::WrongRole { needed, has }),
        }
    }
}

/// A middleware's state: who is known, and which role is needed.
#[derive(Debug, Clone)]
pub struct Guard {
    pub tokens: Tokens,
    pub needed: Role,
}

/// Middleware: lets through who has the role, and answers others with 401 or 403.
pub async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    match guard.tokens.authorize(authorization, guard.needed) {
        Ok(_) => next.run(request).await,
        Err(denied) => Problem::from(denied).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_what_its_role_may() {
        let (reader, admin) = (Token::generate().unwrap(), Token::generate().unwrap());
        let tokens = Tokens::default().with(&reader, Role::Read).with(&admin, Role::Admin);
        let bearer = |token: &Token| format!("Bearer {}", token.expose());
        assert_eq!(tokens.authorize(Some(&bearer(&reader)), Role::Read), Ok(Role::Read));
        assert_eq!(tokens.authorize(Some(&bearer(&admin)), Role::Run), Ok(Role::Admin));
        let wrong = tokens.authorize(Some(&bearer(&reader)), Role::Run);
        assert_eq!(wrong, Err(Denied::WrongRole { needed: Role::Run, has: Role::Read }));
        assert_eq!(tokens.authorize(None, Role::Read), Err(Denied::NoToken));
        assert_eq!(tokens.authorize(Some("Basic abc"), Role::Read), Err(Denied::NoToken));
        assert_eq!(tokens.authorize(Some("Bearer nonsense"), Role::Read), Err(Denied::UnknownToken));
        assert_eq!(Tokens::default().authorize(Some(&bearer(&admin)), Role::Read), Err(Denied::UnknownToken));
    }

    #[test]
    fn a_token_is_read_from_a_file_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let token = Token::generate().unwrap();
        assert!(token.expose().starts_with("sealci_") && token.expose().len() == 7 + 43);
        std::fs::write(file.path(), format!("{}\n", token.expose())).unwrap();
        let read = Token::from_file(file.path()).unwrap();
        assert_eq!(read.expose(), token.expose());
        assert!(!format!("{read:?} {:?}", read.digest()).contains(&token.expose()[7..]));
        std::fs::write(file.path(), "\n").unwrap();
        assert!(matches!(Token::from_file(file.path()), Err(TokenError::NoToken { .. })));
    }
}
