//! Speaks to registries (distribution-spec 1.1, "Pull"; token authentication as Docker's registry documents it).
//!
//! Not `oci-client`: it reads manifests of any size into memory, follows redirects wherever they lead, cannot tell a registry that
//! hangs from one that closes, and brings six crates (chrono, regex, …) for the five requests that a pull needs.
//!
//! - A login or token goes to the registry that asked for it, never along a redirect to another host.
//! - Plain HTTP is spoken only to those that the configuration names, also after a redirect.
//! - Everything read into memory is bounded; every wait has an end.

mod auth;
mod download;

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Method, Response, StatusCode};
use url::Url;

pub(crate) use download::{Blob, Partial};

use crate::digest::Digest;
use crate::error::{ImageError, root_cause};
use crate::manifest::ACCEPTED;
use crate::options::{Registries, Timeouts};
use crate::reference::{DEFAULT_REGISTRY, RegistryReference};

const REDIRECTS: usize = 5;
/// A registry that is busy may ask for this much patience at once.
const LONGEST_WAIT: Duration = Duration::from_secs(30);

pub(crate) struct RegistryClient {
    /// Made when it is needed: the system's certificates take some milliseconds, which an image on disk should not wait for.
    http: OnceLock<reqwest::Client>,
    registries: Registries,
    timeouts: Timeouts,
    tokens: Mutex<HashMap<String, auth::Token>>,
}

/// One place that serves a repository: the registry or a mirror of it.
#[derive(Debug, Clone)]
struct Endpoint {
    /// As logins and messages name it.
    name: String,
    /// `https://HOST[:PORT]/[PATH/]v2/REPOSITORY/`.
    base: Url,
    repository: String,
}

/// One try that failed.
pub(crate) struct Failure {
    error: ImageError,
    /// Whether another try may go better, and when the registry wants it.
    again: Option<Option<Duration>>,
}

impl Failure {
    fn last(error: ImageError) -> Self {
        Self { error, again: None }
    }

    fn passing(error: ImageError) -> Self {
        Self { error, again: Some(None) }
    }
}

/// What is asked for, for messages.
struct Ask<'a> {
    image: &'a str,
    what: &'a str,
    method: Method,
    path: String,
    from_byte: Option<u64>,
}

/// What is small enough for memory, wherever it is served.
struct Small<'a> {
    reference: &'a RegistryReference,
    what: &'a str,
    path: String,
    /// Its digest, where that is known before.
    expected: Option<Digest>,
    bound: u64,
    method: Method,
}

struct Answer {
    /// The digest that the registry says it has.
    stated: Option<Digest>,
    fetched: Fetched,
}

/// Bytes of this digest.
pub(crate) struct Fetched {
    pub bytes: Vec<u8>,
    pub digest: Digest,
}

impl RegistryClient {
    pub fn new(registries: Registries, timeouts: Timeouts) -> Result<Self, reqwest::Error> {
        let client = Self { http: OnceLock::new(), registries, timeouts, tokens: Mutex::default() };
        if !client.registries.authorities.is_empty() {
            // They may be wrong: that is told at once.
            client.build()?;
        }
        Ok(client)
    }

    fn build(&self) -> Result<&reqwest::Client, reqwest::Error> {
        if let Some(http) = self.http.get() {
            return Ok(http);
        }
        let mut builder = reqwest::Client::builder()
            .user_agent(concat!("sealci/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(self.timeouts.connect);
        if !self.registries.authorities.is_empty() {
            let authorities = reqwest::Certificate::from_pem_bundle(&self.registries.authorities)?;
            builder = builder.tls_certs_merge(authorities);
        }
        let http = builder.build()?;
        Ok(self.http.get_or_init(|| http))
    }

    fn http(&self, endpoint: &Endpoint) -> Result<&reqwest::Client, Failure> {
        self.build().map_err(|error| {
            let (registry, reason) = (endpoint.name.clone(), root_cause(&error));
            Failure::last(ImageError::Unreachable { registry, attempts: 0, reason })
        })
    }

    /// The digest that a tag has now, by a request without a body; none where the registry does not say.
    pub async fn head(&self, reference: &RegistryReference) -> Result<Option<Digest>, ImageError> {
        let path = format!("manifests/{}", reference.version());
        let small =
            Small { reference, what: "its manifest", path, expected: None, bound: 0, method: Method::HEAD };
        match self.anywhere(&small).await {
            Ok(answer) => Ok(answer.stated),
            // Some know no such request; the manifest itself is asked for then.
            Err(ImageError::Refused { status: 400 | 405 | 501, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A manifest or index by `version`: a tag, or a digest, which it then has.
    pub async fn manifest(
        &self,
        reference: &RegistryReference,
        version: &str,
        bound: u64,
    ) -> Result<Fetched, ImageError> {
        let (path, expected) = (format!("manifests/{version}"), version.parse().ok());
        let small = Small { reference, what: "its manifest", path, expected, bound, method: Method::GET };
        Ok(self.anywhere(&small).await?.fetched)
    }

    /// A small blob: a configuration.
    pub async fn blob(
        &self,
        reference: &RegistryReference,
        digest: &Digest,
        bound: u64,
    ) -> Result<Fetched, ImageError> {
        let (path, expected) = (format!("blobs/{digest}"), Some(digest.clone()));
        let small =
            Small { reference, what: "its configuration", path, expected, bound, method: Method::GET };
        Ok(self.anywhere(&small).await?.fetched)
    }

    /// Tries mirrors, then the registry; each several times where that may help. The registry's own error is the one to tell.
    async fn anywhere(&self, small: &Small<'_>) -> Result<Answer, ImageError> {
        let mut endpoints = self.endpoints(small.reference)?.into_iter().peekable();
        loop {
            let Some(endpoint) = endpoints.next() else { return Err(ImageError::Closed) };
            match self.retried(&endpoint, small).await {
                Err(error) if endpoints.peek().is_some() => {
                    tracing::warn!(mirror = endpoint.name, error = %error, "a mirror does not help");
                }
                result => return result,
            }
        }
    }

    /// Tries again after what may pass.
    async fn retried(&self, endpoint: &Endpoint, small: &Small<'_>) -> Result<Answer, ImageError> {
        let mut tries = 1;
        loop {
            match self.small(endpoint, small).await {
                Ok(answer) => return Ok(answer),
                Err(Failure { error, again: Some(asked) }) if tries <= self.timeouts.retries => {
                    tracing::debug!(error = %error, tries, "a registry is asked again");
                    self.pause(tries, asked).await;
                    tries += 1;
                }
                Err(Failure { error, .. }) => return Err(with_attempts(error, tries)),
            }
        }
    }

    async fn small(&self, endpoint: &Endpoint, small: &Small<'_>) -> Result<Answer, Failure> {
        let image = small.reference.to_string();
        let ask = Ask::of(&image, small.what, small.method.clone(), small.path.clone());
        let response = self.ask(endpoint, &ask).await?;
        let stated = content_digest(response.headers());
        let bytes = self.body(endpoint, small.what, response, small.bound).await?;
        let digest = Digest::of(&bytes);
        let wrong = small.expected.as_ref().or(stated.as_ref()).filter(|expected| **expected != digest);
        if let Some(expected) = wrong.filter(|_| small.method == Method::GET) {
            return Err(Failure::last(ImageError::WrongDigest {
                what: format!("{} ({image})", small.what),
                place: endpoint.name.clone(),
                expected: expected.clone(),
                found: digest,
            }));
        }
        Ok(Answer { stated, fetched: Fetched { bytes, digest } })
    }

    /// Grows with the tries, and differs from one process to the other.
    async fn pause(&self, tries: u32, asked: Option<Duration>) {
        let grown = self.timeouts.retry_after.saturating_mul(1 << (tries - 1).min(10));
        let wait = asked.unwrap_or(grown).max(grown).min(LONGEST_WAIT);
        tokio::time::sleep(wait.mul_f64(rand::random_range(0.75..1.25))).await;
    }

    fn endpoints(&self, reference: &RegistryReference) -> Result<Vec<Endpoint>, ImageError> {
        let mirrors = self.registries.mirrors.get(&reference.registry).into_iter().flatten();
        mirrors
            .map(String::as_str)
            .chain([reference.registry.as_str()])
            .map(|place| self.endpoint(place, &reference.repository))
            .collect()
    }

    fn endpoint(&self, place: &str, repository: &str) -> Result<Endpoint, ImageError> {
        let bad = || ImageError::Unreachable {
            registry: place.to_owned(),
            attempts: 0,
            reason: "this is no registry's address".to_owned(),
        };
        let bare = place.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        let (name, path) = bare.split_once('/').unwrap_or((bare, ""));
        let host = if name == DEFAULT_REGISTRY { "registry-1.docker.io" } else { name };
        let scheme = if self.registries.insecure.contains(name) { "http" } else { "https" };
        let separator = if path.is_empty() { "" } else { "/" };
        let base = format!("{scheme}://{host}/{path}{separator}v2/{repository}/");
        let base = Url::parse(&base).map_err(|_| bad())?;
        if place.starts_with("http://") && scheme == "https" {
            return Err(self.insecure(&base, name, "it is not allowed to be"));
        }
        Ok(Endpoint { name: name.to_owned(), base, repository: repository.to_owned() })
    }

    /// Sends a request, with a login where one is asked for, along redirects. `Ok` is an answer of 2xx, or 416.
    async fn ask(&self, endpoint: &Endpoint, ask: &Ask<'_>) -> Result<Response, Failure> {
        let url = endpoint.base.join(&ask.path).map_err(|_| {
            Failure::last(ImageError::Malformed {
                image: ask.image.to_owned(),
                reason: "its name makes no address".to_owned(),
            })
        })?;
        let known = self.known_authorization(endpoint);
        let first = self.follow(endpoint, ask, url.clone(), known.as_ref()).await?;
        if first.status() != StatusCode::UNAUTHORIZED {
            return self.judge(endpoint, ask, first).await;
        }
        let challenges: Vec<_> = first.headers().get_all(WWW_AUTHENTICATE).iter().cloned().collect();
        drop(first);
        let authorization = self.authorize(endpoint, ask.image, &challenges).await?;
        let second = self.follow(endpoint, ask, url, Some(&authorization)).await?;
        self.judge(endpoint, ask, second).await
    }

    async fn follow(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        mut url: Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        for _ in 0..=REDIRECTS {
            let mut request = self.http(endpoint)?.request(ask.method.clone(), url.clone());
            for accepted in ACCEPTED {
                request = request.header(ACCEPT, accepted);
            }
            if let Some(from) = ask.from_byte {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            if let Some(value) = authorization.filter(|_| url.origin() == endpoint.base.origin()) {
                request = request.header(AUTHORIZATION, value.clone());
            }
            let response = self.send(endpoint, ask.what, &url, request).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let to = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
            url = to.and_then(|to| url.join(to).ok()).ok_or_else(|| {
                Failure::last(refused(endpoint, ask.what, response.status(), ", but not where it went"))
            })?;
            self.check_scheme(&url, "the registry leads there")?;
        }
        let status = StatusCode::FOUND;
        Err(Failure::last(refused(endpoint, ask.what, status, " again and again")))
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        what: &str,
        url: &Url,
        request: reqwest::RequestBuilder,
    ) -> Result<Response, Failure> {
        match tokio::time::timeout(self.timeouts.stall, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(self.unsent(endpoint, what, url, &error)),
            Err(_) => Err(self.hangs(endpoint, what)),
        }
    }

    fn unsent(&self, endpoint: &Endpoint, what: &str, url: &Url, error: &reqwest::Error) -> Failure {
        let reason = root_cause(error);
        // A server without TLS answers the handshake with text.
        if url.scheme() == "https" && reason.contains("InvalidContentType") {
            let host = host_of(url);
            return Failure::last(self.insecure(
                &http(url),
                &host,
                "only encrypted registries are used unless they are named",
            ));
        }
        if error.is_connect() {
            let reason = if error.is_timeout() { "it does not answer".to_owned() } else { reason };
            let registry = host_of(url);
            return Failure::passing(ImageError::Unreachable { registry, attempts: 1, reason });
        }
        if error.is_timeout() {
            return self.hangs(endpoint, what);
        }
        Failure::passing(broken_off(endpoint, what, reason))
    }

    fn hangs(&self, endpoint: &Endpoint, what: &str) -> Failure {
        let (registry, what) = (endpoint.name.clone(), what.to_owned());
        Failure::passing(ImageError::Hangs { registry, what, silence: self.timeouts.stall, attempts: 1 })
    }

    async fn judge(
        &self,
        endpoint: &Endpoint,
        ask: &Ask<'_>,
        response: Response,
    ) -> Result<Response, Failure> {
        let status = response.status();
        if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
        // What it says about it is for people, so it may be missing.
        let said = self.body(endpoint, ask.what, response, 16 << 10).await.unwrap_or_default();
        let detail = detail(&said);
        let (image, registry) = (ask.image.to_owned(), endpoint.name.clone());
        Err(match status {
            StatusCode::NOT_FOUND => Failure::last(ImageError::NotFound { image, place: registry }),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                self.forget_token(endpoint);
                let reason = format!("{}{detail}", status.as_u16());
                Failure::last(ImageError::Unauthorized { image, registry, reason })
            }
            _ => {
                let error = refused(endpoint, ask.what, status, &detail);
                let passes = status.is_server_error()
                    || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
                Failure { error, again: passes.then(|| wait.map(Duration::from_secs)) }
            }
        })
    }

    /// A whole body, if it is no larger.
    async fn body(
        &self,
        endpoint: &Endpoint,
        what: &str,
        mut response: Response,
        bound: u64,
    ) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk(endpoint, what, &mut response).await? {
            if (bytes.len() + chunk.len()) as u64 > bound {
                let bytes = response.content_length().unwrap_or(bound + 1).max(bound + 1);
                return Err(Failure::last(ImageError::TooLarge { what: what.to_owned(), bytes, bound }));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    async fn chunk(
        &self,
        endpoint: &Endpoint,
        what: &str,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, Failure> {
        match tokio::time::timeout(self.timeouts.stall, response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(error)) => Err(Failure::passing(broken_off(endpoint, what, root_cause(&error)))),
            Err(_) => Err(self.hangs(endpoint, what)),
        }
    }

    /// Refuses plain HTTP to whoever is not named.
    fn check_scheme(&self, url: &Url, why: &'static str) -> Result<(), Failure> {
        let host = host_of(url);
        match url.scheme() {
            "https" => Ok(()),
            "http" if self.registries.insecure.contains(&host) => Ok(()),
            _ => Err(Failure::last(self.insecure(url, &host, why))),
        }
    }

    fn insecure(&self, url: &Url, host: &str, why: &'static str) -> ImageError {
        ImageError::Insecure { address: shown(url), host: host.to_owned(), why }
    }
}

impl<'a> Ask<'a> {
    fn of(image: &'a str, what: &'a str, method: Method, path: String) -> Self {
        Self { image, what, method, path, from_byte: None }
    }
}

/// Without what may open something: a user, a password, a signature.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string().chars().take(200).collect()
}

fn http(url: &Url) -> Url {
    let mut url = url.clone();
    let _ = url.set_scheme("http");
    url.set_path("/");
    url
}

/// `host` or `host:port`, as the list of insecure registries has it.
fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    headers.get("docker-content-digest")?.to_str().ok()?.parse().ok()
}

fn broken_off(endpoint: &Endpoint, what: &str, reason: String) -> ImageError {
    ImageError::BrokenOff { registry: endpoint.name.clone(), what: what.to_owned(), attempts: 1, reason }
}

fn refused(endpoint: &Endpoint, what: &str, status: StatusCode, detail: &str) -> ImageError {
    ImageError::Refused {
        registry: endpoint.name.clone(),
        what: format!("the request for {what}"),
        status: status.as_u16(),
        detail: detail.to_owned(),
    }
}

/// The registry's own words (distribution-spec, "Error codes"), where it has some.
fn detail(body: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let error = &value["errors"][0];
    let said = error["message"].as_str().or(error["code"].as_str()).unwrap_or_default();
    let said: String = said.chars().filter(|c| !c.is_control()).take(200).collect();
    if said.is_empty() { String::new() } else { format!(": {said}") }
}

fn with_attempts(mut error: ImageError, tries: u32) -> ImageError {
    match &mut error {
        ImageError::Unreachable { attempts, .. }
        | ImageError::Hangs { attempts, .. }
        | ImageError::Crawls { attempts, .. }
        | ImageError::BrokenOff { attempts, .. } => *attempts = tries,
        _ => {}
    }
    error
}
