//! Serves real repositories over smart HTTP on a free port of the loopback: `git http-backend` behind axum.
//!
//! It can ask for a password, hang, or fail, from one request to the next.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use base64::Engine as _;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::sync::Notify;

/// How the server answers from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Serve,
    /// Take the request and say nothing, until the mode changes.
    Hang,
    /// Answer every request with this status.
    Fail(u16),
    /// Answer every request with a redirect to the metadata address of a cloud.
    Redirect,
}

/// A running server. It ends when dropped.
#[derive(Debug)]
pub struct SmartHttp {
    /// `http://127.0.0.1:PORT`, without a slash at its end: a repository `<root>/a/b.git` is at `<url>/a/b.git`.
    pub url: String,
    state: Arc<Served>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Served {
    root: PathBuf,
    authorization: Option<String>,
    mode: Mutex<Mode>,
    mode_changed: Notify,
    requests: AtomicU64,
    fetches: AtomicU64,
}

impl SmartHttp {
    /// Serves the bare repositories below `root`, to anyone or to those with this user name and password. Pushing is
    /// allowed where a repository's own `http.receivepack` says so.
    pub async fn start(root: impl Into<PathBuf>, auth: Option<(&str, &str)>) -> std::io::Result<Self> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}", listener.local_addr()?);
        let encode = |(user, password)| {
            let pair = format!("{user}:{password}");
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
        };
        let state = Arc::new(Served {
            root: root.into(),
            authorization: auth.map(encode),
            mode: Mutex::new(Mode::Serve),
            mode_changed: Notify::new(),
            requests: AtomicU64::new(0),
            fetches: AtomicU64::new(0),
        });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&state));
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self { url, state, task })
    }

    pub fn set_mode(&self, mode: Mode) {
        *self.state.mode.lock().unwrap_or_else(PoisonError::into_inner) = mode;
        self.state.mode_changed.notify_waiters();
    }

    /// How many requests came so far.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }

    /// How many of them asked for objects (listing refs is not counted, though it is the same service).
    pub fn fetches(&self) -> u64 {
        self.state.fetches.load(Ordering::SeqCst)
    }
}

impl Drop for SmartHttp {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(state): State<Arc<Served>>, request: Request) -> Response<Body> {
    state.requests.fetch_add(1, Ordering::SeqCst);
    loop {
        let changed = state.mode_changed.notified();
        let mode = *state.mode.lock().unwrap_or_else(PoisonError::into_inner);
        match mode {
            Mode::Serve => break,
            Mode::Hang => changed.await,
            Mode::Fail(code) => {
                return plain(StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
            }
            Mode::Redirect => {
                let mut response = plain(StatusCode::FOUND);
                let elsewhere = header::HeaderValue::from_static("http://169.254.169.254/latest/meta-data/");
                response.headers_mut().insert(header::LOCATION, elsewhere);
                return response;
            }
        }
    }
    if let Some(expected) = &state.authorization {
        let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if given != Some(expected) {
            let mut response = plain(StatusCode::UNAUTHORIZED);
            let challenge = header::HeaderValue::from_static("Basic realm=\"tests\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
            return response;
        }
    }
    let (parts, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, 256 << 20).await else {
        return plain(StatusCode::PAYLOAD_TOO_LARGE);
    };
    // The command stands in the first lines of the body, which may be compressed only when it is long.
    if body.windows(13).any(|window| window == b"command=fetch") {
        state.fetches.fetch_add(1, Ordering::SeqCst);
    }
    match run_backend(&state, &parts.method, &parts.uri, &parts.headers, body).await {
        Ok(response) => response,
        Err(error) => {
            tracing::error!(%error, "git http-backend failed");
            plain(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

fn plain(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::from(status.to_string()));
    *response.status_mut() = status;
    response
}

/// One CGI call (RFC 3875) of `git http-backend`.
async fn run_backend(
    state: &Served,
    method: &axum::http::Method,
    uri: &axum::http::Uri,
    headers: &HeaderMap,
    body: Bytes,
) -> std::io::Result<Response<Body>> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", &state.root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("REQUEST_METHOD", method.as_str())
        .env("PATH_INFO", uri.path())
        .env("QUERY_STRING", uri.query().unwrap_or_default())
        .env("CONTENT_TYPE", text("content-type"))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", text("content-encoding"))
        .env("GIT_PROTOCOL", text("git-protocol"))
        .env("REMOTE_ADDR", "127.0.0.1")
        .env("REMOTE_USER", "tests")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    let mut child = command.spawn()?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(&body).await;
        }
    };
    let ((), output) = tokio::join!(feed, child.wait_with_output());
    Ok(parse_cgi(&output?.stdout))
}

fn parse_cgi(output: &[u8]) -> Response<Body> {
    let Some(end) = output.windows(4).position(|window| window == b"\r\n\r\n") else {
        return plain(StatusCode::BAD_GATEWAY);
    };
    let mut response = Response::new(Body::from(output[end + 4..].to_vec()));
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        if name.eq_ignore_ascii_case("status") {
            let code = value
                .get(..3)
                .and_then(|code| code.parse().ok())
                .and_then(|code| StatusCode::from_u16(code).ok());
            *response.status_mut() = code.unwrap_or(StatusCode::BAD_GATEWAY);
        } else if let (Ok(name), Ok(value)) =
            (name.parse::<header::HeaderName>(), value.parse::<header::HeaderValue>())
        {
            response.headers_mut().append(name, value);
        }
    }
    response
}
