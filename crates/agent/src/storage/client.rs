//! Speaks with the controller's storage for one attempt, over HTTP, with the attempt's ticket.
//!
//! Every request may be made again: what is stored is named by its digest, and what is kept of an attempt is one thing of
//! each name. So whatever fails in a way that passes (no connection, a service that restarts, a store that is away) is tried
//! again, with growing waits, until the patience is at its end.

use std::io::{self, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, HeaderValue, RANGE, RETRY_AFTER};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Cause;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::time::Instant;
use tokio_util::io::ReaderStream;

use super::junit::TestReport;
use crate::backoff::Backoff;
use crate::causes::{is_disk_full, with_causes};

/// More than any answer that is no file.
const MAX_ANSWER_BYTES: usize = 4 << 20;
/// So long a connection may be silent in the middle of something.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// A download that brings fewer bytes than this in that time does not go on.
const LEAST_BYTES: u64 = 64 << 10;
const LEAST_WITHIN: Duration = if cfg!(test) { Duration::from_millis(300) } else { Duration::from_secs(60) };
const COPY_BYTES: usize = 128 << 10;

/// How long is waited for what passes.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// From the first failure of a request on.
    pub most: Duration,
    pub shortest_wait: Duration,
    pub longest_wait: Duration,
}

/// The way to the storage, as it comes sealed with a granted claim.
#[derive(Clone, Deserialize)]
pub struct Access {
    /// The root of the controller's REST interface.
    pub url: String,
    /// Only this attempt's.
    pub ticket: String,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Why something was not brought or not kept.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("the controller's storage cannot be used: {0}")]
    Access(String),
    #[error("cannot {doing}: {reason}; it was tried for {} s", tried.as_secs())]
    Away { doing: &'static str, reason: String, tried: Duration },
    #[error("cannot {doing}: {reason}")]
    Refused { doing: &'static str, status: StatusCode, reason: String },
    #[error("cannot {doing}: the controller's answer is not understood: {reason}")]
    Answer { doing: &'static str, reason: String },
    #[error("what the storage sent for {digest} is something else; it is damaged")]
    Damaged { digest: String },
    #[error("cannot write or read {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl StorageError {
    /// Whose fault it is.
    pub fn cause(&self) -> Cause {
        match self {
            Self::File { source, .. } if is_disk_full(source) => Cause::DiskFull,
            _ => Cause::Storage,
        }
    }

    /// The error and all that led to it, in one line.
    pub fn message(&self) -> String {
        with_causes(self)
    }
}

/// A cache's entry.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CacheEntry {
    pub key: String,
    /// Its key is the one asked for.
    pub exact: bool,
    pub digest: String,
    pub size_bytes: u64,
}

/// Something that is kept of another action.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct UsedArtifact {
    pub kind: String,
    pub digest: String,
    pub size_bytes: u64,
    pub files: u64,
}

impl UsedArtifact {
    /// Whether it is what the action's `artifacts` chose.
    pub fn is_files(&self) -> bool {
        self.kind == "files"
    }
}

/// An archive that was uploaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Uploaded {
    pub digest: String,
    pub unpacked_bytes: u64,
    pub files: u64,
}

/// What an artifact is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "name")]
pub enum Kept {
    Files,
    /// Of the service with this name.
    ServiceLog(String),
}

/// One attempt's storage.
#[derive(Debug, Clone)]
pub struct Storage {
    http: reqwest::Client,
    /// `…/api/v1/attempts/<attempt>`.
    root: Url,
    authorization: HeaderValue,
    patience: Patience,
}

impl Storage {
    pub fn new(
        http: reqwest::Client,
        access: &Access,
        attempt: AttemptId,
        patience: Patience,
    ) -> Result<Self, StorageError> {
        let refused = |why: &dyn std::fmt::Display| StorageError::Access(why.to_string());
        let root = format!("{}/api/v1/attempts/{attempt}", access.url.trim_end_matches('/'));
        let root = Url::parse(&root).map_err(|error| refused(&error))?;
        let mut authorization = HeaderValue::from_str(&format!("Bearer {}", access.ticket))
            .map_err(|_| refused(&"the ticket has characters that no header may hold"))?;
        authorization.set_sensitive(true);
        Ok(Self { http, root, authorization, patience })
    }

    /// The entry for a key, or for the first of `restore` that any begins with.
    pub async fn find_cache(
        &self,
        key: &str,
        restore: &[String],
    ) -> Result<Option<CacheEntry>, StorageError> {
        #[derive(Deserialize)]
        struct Found {
            entry: Option<CacheEntry>,
        }
        let question = serde_json::json!({"key": key, "restore": restore});
        let found: Found = self.post("look for a cache", "caches/find", &question).await?;
        Ok(found.entry)
    }

    /// Whether it is this one that is kept under the key; the first one is.
    pub async fn keep_cache(&self, key: &str, uploaded: &Uploaded) -> Result<bool, StorageError> {
        #[derive(Serialize)]
        struct New<'a> {
            key: &'a str,
            #[serde(flatten)]
            uploaded: &'a Uploaded,
        }
        #[derive(Deserialize)]
        struct Answer {
            stored: bool,
        }
        let answer: Answer = self.post("keep a cache", "caches", &New { key, uploaded }).await?;
        Ok(answer.stored)
    }

    /// Has an uploaded archive count as the attempt's.
    pub async fn keep_artifact(
        &self,
        kept: &Kept,
        uploaded: &Uploaded,
        keep: Option<Duration>,
    ) -> Result<(), StorageError> {
        #[derive(Serialize)]
        struct New<'a> {
            #[serde(flatten)]
            kept: &'a Kept,
            #[serde(flatten)]
            uploaded: &'a Uploaded,
            #[serde(skip_serializing_if = "Option::is_none")]
            keep_ms: Option<u64>,
        }
        let keep_ms = keep.map(|keep| u64::try_from(keep.as_millis()).unwrap_or(u64::MAX));
        let _: serde_json::Value =
            self.post("keep the artifacts", "artifacts", &New { kept, uploaded, keep_ms }).await?;
        Ok(())
    }

    /// What is kept of an action that this one uses.
    pub async fn used(&self, action_id: &str) -> Result<Vec<UsedArtifact>, StorageError> {
        #[derive(Deserialize)]
        struct List {
            artifacts: Vec<UsedArtifact>,
        }
        let doing = "look for the artifacts of another action";
        let path = format!("uses/{action_id}");
        let response = self.send(doing, Method::GET, &path, Ok).await?;
        let list: List = read(doing, response).await?;
        Ok(list.artifacts)
    }

    pub async fn keep_report(&self, report: &TestReport) -> Result<(), StorageError> {
        let _: serde_json::Value = self.post("keep the test report", "reports", report).await?;
        Ok(())
    }

    /// Brings a file there. `digest` is its: `sha256:…`.
    pub async fn upload(&self, digest: &str, path: &Path) -> Result<(), StorageError> {
        let file_error = |source| StorageError::File { path: path.to_owned(), source };
        let size = tokio::fs::metadata(path).await.map_err(file_error)?.len();
        let body = |request: RequestBuilder| {
            let file = std::fs::File::open(path).map_err(file_error)?;
            let body =
                reqwest::Body::wrap_stream(ReaderStream::with_capacity(File::from_std(file), COPY_BYTES));
            Ok(request.header(CONTENT_LENGTH, size).body(body))
        };
        self.send("upload files to the storage", Method::PUT, &format!("blobs/{digest}"), body).await?;
        Ok(())
    }

    /// Brings the bytes of a digest into a new file; goes on where it broke off. Nothing but those bytes is ever left there.
    pub async fn download(&self, digest: &str, size_bytes: u64, path: &Path) -> Result<(), StorageError> {
        let doing = "download files from the storage";
        let file_error = |source| StorageError::File { path: path.to_owned(), source };
        let opening = File::options().create(true).truncate(true).read(true).write(true).open(path).await;
        let mut file = opening.map_err(file_error)?;
        let mut got = 0;
        let mut tries = Tries::new(doing, self.patience);
        while got < size_bytes {
            let from = got;
            let part = |request: RequestBuilder| Ok(request.header(RANGE, format!("bytes={from}-")));
            let mut response = self.send(doing, Method::GET, &format!("blobs/{digest}"), part).await?;
            if response.status() != StatusCode::PARTIAL_CONTENT && got > 0 {
                got = 0;
                file.seek(SeekFrom::Start(0)).await.map_err(file_error)?;
            }
            let (mut since, mut counted) = (Instant::now(), got);
            loop {
                match response.chunk().await {
                    Ok(Some(chunk)) => {
                        got += chunk.len() as u64;
                        if got > size_bytes {
                            return Err(StorageError::Damaged { digest: digest.to_owned() });
                        }
                        file.write_all(&chunk).await.map_err(file_error)?;
                        if got - counted >= LEAST_BYTES {
                            (since, counted) = (Instant::now(), got);
                            tries.succeeded();
                        } else if got < size_bytes && since.elapsed() >= LEAST_WITHIN {
                            let reason =
                                format!("less than {LEAST_BYTES} bytes in {} s", LEAST_WITHIN.as_secs_f32());
                            tries.failed(reason, None).await?;
                            break;
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tries.failed(transport(error), None).await?;
                        break;
                    }
                }
            }
            if got < size_bytes {
                tries.failed("the connection ended early".to_owned(), None).await?;
            }
        }
        file.flush().await.map_err(file_error)?;
        file.seek(SeekFrom::Start(0)).await.map_err(file_error)?;
        let is_right = sha256(&mut file).await.map_err(file_error)? == digest;
        if is_right { Ok(()) } else { Err(StorageError::Damaged { digest: digest.to_owned() }) }
    }

    async fn post<T: for<'de> Deserialize<'de>>(
        &self,
        doing: &'static str,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, StorageError> {
        let response = self.send(doing, Method::POST, path, |request| Ok(request.json(body))).await?;
        read(doing, response).await
    }

    /// Sends a request until it is answered with a final word; that is an answer only if it is a success.
    async fn send(
        &self,
        doing: &'static str,
        method: Method,
        path: &str,
        body: impl Fn(RequestBuilder) -> Result<RequestBuilder, StorageError>,
    ) -> Result<Response, StorageError> {
        let url = format!("{}/{path}", self.root);
        let mut tries = Tries::new(doing, self.patience);
        loop {
            let request = self.http.request(method.clone(), &url);
            let request = body(request.header(AUTHORIZATION, self.authorization.clone()))?;
            let response = match request.send().await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) => response,
                Err(error) => {
                    tries.failed(transport(error), None).await?;
                    continue;
                }
            };
            let status = response.status();
            let wait =
                response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let reason = reason(status, response).await;
            let passes = matches!(
                status,
                StatusCode::REQUEST_TIMEOUT
                    | StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::INTERNAL_SERVER_ERROR
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            );
            if !passes {
                return Err(StorageError::Refused { doing, status, reason });
            }
            tries.failed(reason, wait.map(Duration::from_secs)).await?;
        }
    }
}

/// Makes the client that all attempts of an agent share, when the first of them needs it: to read the machine's authorities
/// takes a while.
#[derive(Debug)]
pub struct HttpSource {
    ca_pem: Option<Vec<u8>>,
    /// For `https`, and for this machine's loopback.
    clients: [tokio::sync::OnceCell<reqwest::Client>; 2],
}

impl HttpSource {
    /// `ca_pem`: whom to trust for `https`, besides the public authorities.
    pub fn new(ca_pem: Option<Vec<u8>>) -> Self {
        Self { ca_pem, clients: Default::default() }
    }

    /// The client for an address.
    pub async fn client(&self, url: &str) -> Result<reqwest::Client, StorageError> {
        let is_plain = url.starts_with("http://");
        let client = self.clients[usize::from(is_plain)].get_or_try_init(|| async {
            let ca_pem = self.ca_pem.clone();
            let building = tokio::task::spawn_blocking(move || http_client(ca_pem.as_deref(), is_plain));
            let built = building.await.map_err(|error| StorageError::Access(error.to_string()))?;
            built.map_err(|error| StorageError::Access(with_causes(&error)))
        });
        client.await.cloned()
    }
}

fn http_client(ca_pem: Option<&[u8]>, is_plain: bool) -> Result<reqwest::Client, reqwest::Error> {
    let mut builder = reqwest::Client::builder()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(READ_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none());
    if is_plain {
        // Loopback: no proxy, and no need of the machine's authorities.
        builder = builder.no_proxy().tls_certs_only([]);
    } else if let Some(pem) = ca_pem {
        builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(pem)?);
    }
    builder.build()
}

/// Counts the failures of one thing that is done.
struct Tries {
    doing: &'static str,
    patience: Patience,
    backoff: Backoff,
    since: Option<Instant>,
}

impl Tries {
    fn new(doing: &'static str, patience: Patience) -> Self {
        let backoff = Backoff::new(patience.shortest_wait, patience.longest_wait);
        Self { doing, patience, backoff, since: None }
    }

    fn succeeded(&mut self) {
        self.since = None;
        self.backoff.reset();
    }

    /// Waits before the next try, at least as long as was asked for; the error says that there is none.
    async fn failed(&mut self, reason: String, at_least: Option<Duration>) -> Result<(), StorageError> {
        let since = *self.since.get_or_insert_with(Instant::now);
        let tried = since.elapsed();
        if tried >= self.patience.most {
            return Err(StorageError::Away { doing: self.doing, reason, tried });
        }
        tracing::warn!(doing = self.doing, reason, "will be tried again");
        let wait = self.backoff.wait(rand::random());
        tokio::time::sleep(wait.max(at_least.unwrap_or_default()).min(self.patience.most)).await;
        Ok(())
    }
}

fn transport(error: reqwest::Error) -> String {
    // The URL is known, and long.
    with_causes(&error.without_url())
}

/// What a problem document says.
async fn reason(status: StatusCode, response: Response) -> String {
    #[derive(Deserialize)]
    struct Problem {
        title: String,
        detail: Option<String>,
    }
    let bytes = bounded(response).await.unwrap_or_default();
    match serde_json::from_slice::<Problem>(&bytes) {
        Ok(problem) => problem.detail.unwrap_or(problem.title),
        Err(_) => format!("the answer was {status}"),
    }
}

async fn read<T: for<'de> Deserialize<'de>>(
    doing: &'static str,
    response: Response,
) -> Result<T, StorageError> {
    let bytes = bounded(response).await.map_err(|reason| StorageError::Answer { doing, reason })?;
    serde_json::from_slice(&bytes).map_err(|error| StorageError::Answer { doing, reason: error.to_string() })
}

async fn bounded(mut response: Response) -> Result<Bytes, String> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(transport)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_ANSWER_BYTES {
            return Err("it is too long".to_owned());
        }
    }
    Ok(bytes.into())
}

async fn sha256(file: &mut File) -> io::Result<String> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        match file.read(&mut buffer).await? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(hash.finalize().iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}")))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn a_storage_that_crawls_is_given_up_with_the_reason() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = async move {
            let mut connections = JoinSet::new();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                connections.spawn(async move {
                    let mut request = [0; 4096];
                    let asked = stream.read(&mut request).await.unwrap();
                    assert!(asked > 0);
                    let head = "HTTP/1.1 206 Partial Content\r\ncontent-length: 1000000\r\n\r\n";
                    stream.write_all(head.as_bytes()).await.unwrap();
                    while stream.write_all(b"x").await.is_ok() {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                });
            }
        };
        let (shortest_wait, longest_wait) = (Duration::from_millis(10), Duration::from_millis(20));
        let patience = Patience { most: LEAST_WITHIN * 2, shortest_wait, longest_wait };
        let access = Access { url, ticket: "t".to_owned() };
        let attempt = "00000000-0000-0000-0000-000000000000.1".parse().unwrap();
        let http = http_client(None, true).unwrap();
        let storage = Storage::new(http, &access, attempt, patience).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let error = tokio::select! {
            downloaded = storage.download("sha256:0", 1_000_000, &path) => downloaded.unwrap_err(),
            () = serving => unreachable!(),
        };
        assert!(error.message().contains("less than 65536 bytes in"), "{error}");
    }
}
