//! Proves to a registry who asks: tokens (`Bearer`) and passwords (`Basic`).

use std::net::IpAddr;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::HeaderValue;
use secrecy::ExposeSecret as _;
use serde::Deserialize;
use url::Url;

use super::{Endpoint, Failure, RegistryClient, broken_off, host_of, refused};
use crate::credentials::Login;
use crate::error::ImageError;

const TOKEN_BYTES: u64 = 1 << 20;
/// Where the answer does not say, by the specification.
const TOKEN_LIFE: Duration = Duration::from_secs(60);

pub(super) struct Token {
    value: HeaderValue,
    until: Instant,
}

/// What a registry wants to see.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl RegistryClient {
    /// What opened the repository a moment ago.
    pub(super) fn known_authorization(&self, endpoint: &Endpoint) -> Option<HeaderValue> {
        let tokens = self.tokens.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        tokens
            .get(&endpoint.key())
            .filter(|token| token.until > Instant::now())
            .map(|token| token.value.clone())
    }

    pub(super) fn forget_token(&self, endpoint: &Endpoint) {
        self.tokens.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&endpoint.key());
    }

    /// Answers a registry's challenge.
    pub(super) async fn authorize(
        &self,
        endpoint: &Endpoint,
        image: &str,
        challenges: &[HeaderValue],
    ) -> Result<HeaderValue, Failure> {
        let unauthorized = |reason: &str| {
            Failure::last(ImageError::Unauthorized {
                image: image.to_owned(),
                registry: endpoint.name.clone(),
                reason: reason.to_owned(),
            })
        };
        let login = match self.registries.credentials.login(&endpoint.name, &endpoint.repository) {
            Some(Login::Helper(helper)) => {
                return Err(Failure::last(ImageError::CredentialHelper {
                    registry: endpoint.name.clone(),
                    helper: helper.clone(),
                }));
            }
            login => login,
        };
        let challenges: Vec<_> = challenges.iter().filter_map(|value| parse(value.to_str().ok()?)).collect();
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let (value, life) = match bearer.or(challenges.first()) {
            None => return Err(unauthorized("it asks for no login that is known (Basic or Bearer)")),
            Some(Challenge::Bearer { realm, service, scope }) => {
                let url = token_url(realm, service.as_deref(), scope.as_deref(), endpoint)
                    .ok_or_else(|| unauthorized("where it gives out tokens is no address"))?;
                self.check_scheme(&url, "the registry gives out its tokens there")?;
                self.token(endpoint, image, url, service.as_deref(), login).await?
            }
            Some(Challenge::Basic) => match login {
                Some(login @ Login::Password { .. }) => {
                    self.check_may_log_in(&endpoint.base)?;
                    (basic(login), Duration::from_secs(3600))
                }
                _ => return Err(unauthorized("it wants a user and a password")),
            },
        };
        let mut value = HeaderValue::from_str(&value).map_err(|_| unauthorized("its token is no text"))?;
        value.set_sensitive(true);
        // Not until the very last moment: it has to arrive.
        let until = Instant::now() + life.mul_f64(0.8);
        let token = Token { value: value.clone(), until };
        self.tokens.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(endpoint.key(), token);
        Ok(value)
    }

    async fn token(
        &self,
        endpoint: &Endpoint,
        image: &str,
        url: Url,
        service: Option<&str>,
        login: Option<&Login>,
    ) -> Result<(String, Duration), Failure> {
        if login.is_some() {
            self.check_may_log_in(&url)?;
        }
        let what = "a token";
        let http = self.http(endpoint)?;
        let request = match login {
            Some(Login::IdentityToken(token)) => {
                let scope = url.query_pairs().find(|(name, _)| name == "scope");
                let form = url::form_urlencoded::Serializer::new(String::new())
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", "sealci")
                    .append_pair("service", service.unwrap_or_default())
                    .append_pair("scope", scope.as_ref().map_or("", |(_, scope)| scope))
                    .append_pair("refresh_token", token.expose_secret())
                    .finish();
                let mut bare = url.clone();
                bare.set_query(None);
                let form_type = "application/x-www-form-urlencoded";
                http.post(bare).header(reqwest::header::CONTENT_TYPE, form_type).body(form)
            }
            Some(login) => http.get(url.clone()).header(reqwest::header::AUTHORIZATION, basic(login)),
            None => http.get(url.clone()),
        };
        let response = self.send(endpoint, what, &url, request).await?;
        let status = response.status();
        if !status.is_success() {
            let error = if status.is_client_error() && status.as_u16() != 429 {
                let reason = match login {
                    Some(_) => format!("{} does not take the login ({})", host_of(&url), status.as_u16()),
                    None => format!("{} gives no token without a login ({})", host_of(&url), status.as_u16()),
                };
                let (image, registry) = (image.to_owned(), endpoint.name.clone());
                Failure::last(ImageError::Unauthorized { image, registry, reason })
            } else {
                Failure::passing(refused(endpoint, what, status, ""))
            };
            return Err(error);
        }
        let body = self.body(endpoint, what, response, TOKEN_BYTES).await?;
        let odd = || Failure::last(broken_off(endpoint, what, "the answer holds none".to_owned()));
        let answer: Answer = serde_json::from_slice(&body).map_err(|_| odd())?;
        let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty()).ok_or_else(odd)?;
        let life =
            answer.expires_in.map_or(TOKEN_LIFE, |seconds| Duration::from_secs(seconds.clamp(10, 3600)));
        Ok((format!("Bearer {token}"), life))
    }

    /// A password goes out encrypted, or not out of this machine.
    fn check_may_log_in(&self, url: &Url) -> Result<(), Failure> {
        if url.scheme() == "https" || is_loopback(url) {
            return Ok(());
        }
        Err(Failure::last(self.insecure(
            url,
            &host_of(url),
            "a login would travel in the open; it has to use https",
        )))
    }
}

impl Endpoint {
    fn key(&self) -> String {
        format!("{} {}", self.base, self.repository)
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => {
            host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
        }
        None => false,
    }
}

fn basic(login: &Login) -> String {
    match login {
        Login::Password { user, password } => {
            format!("Basic {}", STANDARD.encode(format!("{user}:{}", password.expose_secret())))
        }
        Login::IdentityToken(_) | Login::Helper(_) => String::new(),
    }
}

fn token_url(realm: &str, service: Option<&str>, scope: Option<&str>, endpoint: &Endpoint) -> Option<Url> {
    let mut url = endpoint.base.join(realm).ok()?;
    let own = format!("repository:{}:pull", endpoint.repository);
    let mut query = url.query_pairs_mut();
    if let Some(service) = service {
        query.append_pair("service", service);
    }
    query.append_pair("scope", scope.filter(|scope| scope.len() < 1000).unwrap_or(&own));
    drop(query);
    Some(url)
}

/// `Bearer realm="…",service="…",scope="…"` (RFC 9110, 11.6.1; one challenge in a header, as all registries do).
fn parse(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    let mut rest = rest.trim_start();
    while let Some((name, after)) = rest.split_once('=') {
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted_text(quoted)?,
            None => {
                let end = after.find(',').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        match name.trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => scope = Some(value),
            _ => {}
        }
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    Some(Challenge::Bearer { realm: realm?, service, scope })
}

/// Up to the closing quote, and what is behind it.
fn quoted_text(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((index, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[index + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| {
            let owned = |text: Option<&str>| text.map(str::to_owned);
            Some(Challenge::Bearer { realm: realm.to_owned(), service: owned(service), scope: owned(scope) })
        };
        for (text, expected) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                r#"Bearer realm="https://auth.example.org/token",service="registry",scope="repository:a/b:pull,push""#,
                bearer("https://auth.example.org/token", Some("registry"), Some("repository:a/b:pull,push")),
            ),
            (r#"bearer  service=x , realm="a\"b""#, bearer("a\"b", Some("x"), None)),
            (r#"Bearer service="x""#, None),
            (r#"Bearer realm="x"#, None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
    }

    #[test]
    fn loopback_is_told_from_what_looks_like_it() {
        for (url, expected) in [
            ("http://localhost:1/", true),
            ("http://127.9.9.9/", true),
            ("http://[::1]:5000/", true),
            ("http://127.0.0.1.example.org/", false),
            ("http://10.0.0.1/", false),
        ] {
            assert_eq!(is_loopback(&url.parse().unwrap()), expected, "{url}");
        }
    }
}
