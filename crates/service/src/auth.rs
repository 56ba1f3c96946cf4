//! Knows who may do what: bearer tokens, each with a role.
//!
//! Only digests of tokens are kept. A token has 256 random bits, so its digest needs no salt, and comparing digests tells
//! nothing about tokens.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::problem::Problem;

/// What a token may do; each role may also do what the ones before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Look at everything.
    Read,
    /// Make, cancel and re-run pipelines.
    Run,
    /// Everything.
    Admin,
}

impl Role {
    /// The name in configurations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Run => "run",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "read" => Ok(Self::Read),
            "run" => Ok(Self::Run),
            "admin" => Ok(Self::Admin),
            _ => Err(format!("no role is called `{name}`; there are read, run and admin")),
        }
    }
}

/// A secret that lets one in. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

/// Why a token could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error("cannot read the token from {path}")]
    Read { path: String, source: std::io::Error },
    #[error("{path} holds no token: it is empty or has characters that no header may have")]
    Invalid { path: String },
}

impl Token {
    /// A new one: `sealci_` and 32 random bytes.
    pub fn random() -> Self {
        Self(format!("sealci_{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())))
    }

    /// Takes a token as it is written; blanks around it are left out.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic());
        (!text.is_empty() && is_plain).then(|| Self(text.to_owned()))
    }

    /// Reads a token from a file.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let shown = || path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| TokenError::Read { path: shown(), source })?;
        Self::parse(&text).ok_or_else(|| TokenError::Invalid { path: shown() })
    }

    /// The secret itself, for a header or a file.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// What may be kept of it.
    pub fn digest(&self) -> TokenDigest {
        TokenDigest(Sha256::digest(self.0.as_bytes()).into())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The SHA-256 of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenDigest(pub [u8; 32]);

/// The tokens that a service knows.
#[derive(Debug, Clone, Default)]
pub struct Tokens(Vec<(TokenDigest, Role)>);

impl Tokens {
    /// Knows these, and no others.
    pub fn new(tokens: impl IntoIterator<Item = (TokenDigest, Role)>) -> Self {
        Self(tokens.into_iter().collect())
    }

    /// The role of whoever sent these headers.
    fn role(&self, headers: &HeaderMap) -> Option<Role> {
        let digest = bearer(headers)?.digest();
        self.0.iter().find(|(known, _)| *known == digest).map(|(_, role)| *role)
    }
}

/// The bearer token of a request, if it has one.
pub fn bearer(headers: &HeaderMap) -> Option<Token> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| Token::parse(token)).flatten()
}

/// A middleware's state: which role is needed, and who has it.
#[derive(Debug, Clone)]
pub struct Guard {
    pub tokens: Tokens,
    pub role: Role,
}

/// Middleware: lets through who has the role, refuses others with 401 or 403.
pub async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    match guard.tokens.role(request.headers()) {
        Some(role) if role >= guard.role => next.run(request).await,
        Some(role) => {
            let detail =
                format!("this needs the role {}; the token has {}", guard.role.as_str(), role.as_str());
            Problem::new(StatusCode::FORBIDDEN, detail).into_response()
        }
        None => {
            let detail = "a known token is needed: `Authorization: Bearer <token>`";
            Problem::new(StatusCode::UNAUTHORIZED, detail).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn a_known_token_has_its_role_and_another_has_none() {
        let token = Token::random();
        let tokens = Tokens::new([(token.digest(), Role::Run)]);
        assert_eq!(tokens.role(&headers(&format!("Bearer {}", token.expose()))), Some(Role::Run));
        assert_eq!(tokens.role(&headers(&format!("bearer {}", token.expose()))), Some(Role::Run));
        for value in ["Bearer x", "Bearer ", token.expose(), "Basic YTpi"] {
            assert_eq!(tokens.role(&headers(value)), None, "{value}");
        }
        assert_eq!(tokens.role(&HeaderMap::new()), None);
    }

    #[test]
    fn a_token_is_never_shown() {
        let token = Token::random();
        assert!(!format!("{token:?}").contains(token.expose()));
    }

    #[test]
    fn roles_include_the_ones_before() {
        assert!(Role::Admin > Role::Run && Role::Run > Role::Read);
    }
}
