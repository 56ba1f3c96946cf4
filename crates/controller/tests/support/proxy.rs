//! Stands between a controller and its S3 server, and refuses what a test wants refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, Method, Response, StatusCode, Uri};

pub struct Proxy {
    pub url: String,
    state: Arc<Behaviour>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Behaviour {
    target: String,
    http: reqwest::Client,
    is_away: AtomicBool,
    /// Requests until the one that is refused.
    countdown: AtomicI64,
}

impl Proxy {
    pub async fn before(target: &str) -> Self {
        let state = Arc::new(Behaviour {
            target: target.to_owned(),
            http: reqwest::Client::new(),
            is_away: AtomicBool::new(false),
            countdown: AtomicI64::new(i64::MAX),
        });
        let router = axum::Router::new()
            .fallback(forward)
            .layer(DefaultBodyLimit::disable())
            .with_state(Arc::clone(&state));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, state, task }
    }

    /// Refuses everything from now on, or nothing any more.
    pub fn is_away(&self, is_away: bool) {
        self.state.is_away.store(is_away, Ordering::SeqCst);
    }

    /// Refuses one request, after so many others.
    pub fn refuse_after(&self, others: i64) {
        self.state.countdown.store(others, Ordering::SeqCst);
    }

    /// Whether the request that was to be refused has come.
    pub fn has_refused(&self) -> bool {
        self.state.countdown.load(Ordering::SeqCst) < 0
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(
    State(state): State<Arc<Behaviour>>,
    method: Method,
    uri: Uri,
    mut headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let is_the_one = state.countdown.fetch_sub(1, Ordering::SeqCst) == 0;
    if is_the_one || state.is_away.load(Ordering::SeqCst) {
        // One that is not asked again at once.
        return Response::builder().status(StatusCode::FORBIDDEN).body(Body::empty()).unwrap();
    }
    for name in ["host", "content-length", "transfer-encoding"] {
        headers.remove(name);
    }
    let is_head = method == Method::HEAD;
    let answer = state.http.request(method, format!("{}{uri}", state.target)).headers(headers).body(body);
    let answer = answer.send().await.unwrap();
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        if name != "transfer-encoding" && (is_head || name != "content-length") {
            response = response.header(name, value);
        }
    }
    response.body(Body::from(answer.bytes().await.unwrap())).unwrap()
}
