//! A registry that does what a test tells it: it counts, hangs, lies, closes and leads elsewhere.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt as _;
use sealci_image::{Digest, StoreOptions};
use serde_json::json;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::lab::{Blob, INDEX_TYPE, MANIFEST_TYPE, MadeImage, options_for};

/// What is done to one request for a blob.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The connection breaks after so many bytes.
    CloseAfter(usize),
    /// Nothing more comes after so many bytes.
    HangAfter(usize),
    /// A byte now and then.
    Crawl,
    /// It ends after so many bytes as if that were all.
    EndAfter(usize),
    /// So many bytes, then the rest once the test says so.
    WaitAfter(usize, Arc<Notify>),
    NoAnswer,
    Status(u16),
    /// The whole, although a part was asked for.
    IgnoreRange,
    /// Another part than asked for.
    WrongRange,
    Redirect(String),
    /// Bytes of its own.
    Instead(Vec<u8>),
}

/// One request that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    pub body: String,
}

#[derive(Default)]
struct Content {
    manifests: HashMap<String, (Vec<u8>, &'static str)>,
    blobs: HashMap<String, Vec<u8>>,
    faults: VecDeque<Fault>,
    seen: Vec<Seen>,
    sent_bytes: u64,
    /// What opens it, and what opens the token server.
    token: Option<Guard>,
}

#[derive(Clone)]
pub struct Guard {
    pub token: &'static str,
    /// `Basic …`, or a refresh token; none if anybody gets a token.
    pub login: Option<String>,
}

pub struct Scripted {
    content: Arc<Mutex<Content>>,
    /// Told once a fault has begun to hold.
    pub reached: Arc<Notify>,
    pub host: String,
    task: JoinHandle<()>,
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Shared {
    content: Arc<Mutex<Content>>,
    reached: Arc<Notify>,
    host: String,
}

impl Scripted {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (content, reached) = (Arc::<Mutex<Content>>::default(), Arc::new(Notify::new()));
        let shared = Shared { content: content.clone(), reached: reached.clone(), host: host.clone() };
        let app = axum::Router::new().fallback(answer).with_state(shared);
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { content, reached, host, task }
    }

    pub fn options(&self) -> StoreOptions {
        options_for(&self.host)
    }

    pub fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    /// Serves an image as `repository:tag`.
    pub fn serve(&self, repository: &str, tag: &str, image: &MadeImage) {
        for blob in image.layers.iter().chain([&image.config]) {
            self.serve_blob(repository, blob);
        }
        self.serve_manifest(repository, tag, &image.manifest, MANIFEST_TYPE);
    }

    pub fn serve_blob(&self, repository: &str, blob: &Blob) {
        let path = format!("/v2/{repository}/blobs/{}", blob.digest);
        self.content.lock().unwrap().blobs.insert(path, blob.bytes.clone());
    }

    pub fn serve_manifest(&self, repository: &str, tag: &str, manifest: &Blob, kind: &'static str) {
        let mut content = self.content.lock().unwrap();
        for version in [tag.to_owned(), manifest.digest.to_string()] {
            let path = format!("/v2/{repository}/manifests/{version}");
            content.manifests.insert(path, (manifest.bytes.clone(), kind));
        }
    }

    /// Serves an index of these images and what they are made for.
    pub fn serve_index(&self, repository: &str, tag: &str, images: &[(&str, &MadeImage)]) -> Digest {
        let mut entries = Vec::new();
        for (architecture, image) in images {
            self.serve(repository, &format!("{tag}-{architecture}"), image);
            let mut entry = crate::lab::descriptor(&image.manifest, MANIFEST_TYPE);
            entry["platform"] = json!({"os": "linux", "architecture": architecture});
            entries.push(entry);
        }
        let index = Blob::json(&json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}));
        self.serve_manifest(repository, tag, &index, INDEX_TYPE);
        index.digest
    }

    /// Has nothing any more.
    pub fn forget(&self) {
        let mut content = self.content.lock().unwrap();
        content.manifests.clear();
        content.blobs.clear();
    }

    /// What happens to the next requests for blobs.
    pub fn faults(&self, faults: impl IntoIterator<Item = Fault>) {
        self.content.lock().unwrap().faults = faults.into_iter().collect();
    }

    pub fn guard(&self, guard: Guard) {
        self.content.lock().unwrap().token = Some(guard);
    }

    /// All requests so far; the next answer begins anew.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.content.lock().unwrap().seen)
    }

    /// Bytes of blobs' bodies so far.
    pub fn sent_bytes(&self) -> u64 {
        self.content.lock().unwrap().sent_bytes
    }
}

async fn answer(State(shared): State<Shared>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let (method, path) = (head.method, head.uri.path().to_owned());
    let text = |name| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let seen = Seen {
        method: method.to_string(),
        path: path.clone(),
        range: text(header::RANGE),
        authorization: text(header::AUTHORIZATION),
        body: String::from_utf8(body.to_vec()).unwrap(),
    };
    let (found, fault) = {
        let mut content = shared.content.lock().unwrap();
        content.seen.push(seen.clone());
        if let Some(refusal) = guarded(&content, &shared.host, &seen) {
            return refusal;
        }
        if let Some((bytes, kind)) = content.manifests.get(&path) {
            return manifest(&method, bytes.clone(), kind);
        }
        let Some(bytes) = content.blobs.get(&path).cloned() else {
            return StatusCode::NOT_FOUND.into_response();
        };
        (bytes, content.faults.pop_front())
    };
    blob(&shared, found, seen.range.as_deref(), fault).await
}

fn guarded(content: &Content, host: &str, seen: &Seen) -> Option<Response> {
    let guard = content.token.as_ref()?;
    if seen.path == "/token" {
        let refreshes = |token: &String| seen.body.ends_with(&format!("&refresh_token={token}"));
        let opens = guard.login.as_ref().is_none_or(refreshes) || guard.login == seen.authorization;
        return Some(if opens {
            json!({"token": guard.token, "expires_in": 300}).to_string().into_response()
        } else {
            StatusCode::UNAUTHORIZED.into_response()
        });
    }
    if seen.authorization.as_deref() == Some(&format!("Bearer {}", guard.token)) {
        return None;
    }
    let challenge = format!(r#"Bearer realm="http://{host}/token",service="test",scope="repository:a:pull""#);
    Some((StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, challenge)]).into_response())
}

fn manifest(method: &Method, bytes: Vec<u8>, kind: &'static str) -> Response {
    let digest = Digest::of(&bytes).to_string();
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, kind.parse().unwrap());
    headers.insert("docker-content-digest", digest.parse().unwrap());
    let body = if method == Method::HEAD { Body::empty() } else { Body::from(bytes) };
    (headers, body).into_response()
}

async fn blob(shared: &Shared, mut bytes: Vec<u8>, range: Option<&str>, fault: Option<Fault>) -> Response {
    if let Some(Fault::Instead(other)) = &fault {
        bytes = other.clone();
    }
    let all = bytes.len();
    let from = range.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let mut from = from.filter(|_| !matches!(fault, Some(Fault::IgnoreRange)));
    if let (Some(Fault::WrongRange), Some(from)) = (&fault, &mut from) {
        *from += 1;
    }
    let part = bytes.split_off(from.unwrap_or_default().min(all));
    let mut head = Response::builder().header(header::CONTENT_LENGTH, part.len());
    if let Some(from) = from {
        head = head
            .status(StatusCode::PARTIAL_CONTENT)
            .header(header::CONTENT_RANGE, format!("bytes {from}-{}/{all}", all - 1));
    }
    let (first, rest) = match &fault {
        Some(
            Fault::CloseAfter(end) | Fault::HangAfter(end) | Fault::EndAfter(end) | Fault::WaitAfter(end, _),
        ) => part.split_at((*end).min(part.len())),
        _ => (&part[..], &[][..]),
    };
    let (first, rest) = (Bytes::copy_from_slice(first), Bytes::copy_from_slice(rest));
    let sent = if matches!(fault, Some(Fault::WaitAfter(..))) { part.len() } else { first.len() };
    shared.content.lock().unwrap().sent_bytes += sent as u64;
    let begin = futures_util::stream::iter([Ok::<_, std::io::Error>(first)]);
    match fault {
        Some(Fault::NoAnswer) => std::future::pending().await,
        Some(Fault::Status(code)) => StatusCode::from_u16(code).unwrap().into_response(),
        Some(Fault::Redirect(to)) => {
            (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, to)]).into_response()
        }
        Some(Fault::CloseAfter(_)) => {
            let broken = futures_util::stream::iter([Err(std::io::Error::other("broken"))]);
            head.body(Body::from_stream(begin.chain(broken))).unwrap()
        }
        Some(Fault::HangAfter(_)) => {
            shared.reached.notify_one();
            head.body(Body::from_stream(begin.chain(futures_util::stream::pending()))).unwrap()
        }
        Some(Fault::Crawl) => {
            let crawling = futures_util::stream::unfold(Bytes::from(part), |mut rest| async move {
                tokio::time::sleep(Duration::from_millis(10)).await;
                let next = rest.split_to(rest.len().min(10));
                (!next.is_empty()).then_some((Ok::<_, Infallible>(next), rest))
            });
            head.body(Body::from_stream(crawling)).unwrap()
        }
        Some(Fault::EndAfter(_)) => {
            let (first, _) = begin.into_future().await;
            let plain = futures_util::stream::iter([Ok::<_, Infallible>(first.unwrap().unwrap())]);
            Response::new(Body::from_stream(plain))
        }
        Some(Fault::WaitAfter(_, go)) => {
            let reached = shared.reached.clone();
            let end = futures_util::stream::once(async move {
                reached.notify_one();
                go.notified().await;
                Ok(rest)
            });
            head.body(Body::from_stream(begin.chain(end))).unwrap()
        }
        _ => head.body(Body::from_stream(begin)).unwrap(),
    }
}
