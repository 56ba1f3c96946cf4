//! What the tests of the monitor share: a controller that records what it is sent, and a monitor served for real on
//! port 0, over real repositories.

#![allow(dead_code, clippy::unwrap_used)] // each test file uses its part; what fails here should fail the test

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Json, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use sealci_git::AllowedTransports;
use sealci_git::testing::Repository;
use sealci_monitor::{Backoff, Config, ControllerAddress, serve};
use sealci_service::auth::{Role, Token};
use sealci_service::database::DatabaseUrl;
use sealci_service::listen::{Security, bind};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes; whoever waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How the controller answers from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Accept,
    /// 503, taking nothing.
    Down,
    /// 422 with a reason.
    Refuse,
    /// Take the event and go away without an answer.
    TakeAndDie,
}

/// Stands in for the controller: knows events again by their identity, as the real one does.
pub struct Controller {
    pub address: ControllerAddress,
    state: Arc<Recording>,
    task: JoinHandle<()>,
}

struct Recording {
    mode: Mutex<Mode>,
    /// Every request's body that was taken, in order, repeats included.
    taken: watch::Sender<Vec<Value>>,
    requests: watch::Sender<usize>,
    authorization: String,
}

impl Controller {
    pub async fn start() -> Self {
        let token = Token::generate().unwrap();
        let state = Arc::new(Recording {
            mode: Mutex::new(Mode::Accept),
            taken: watch::Sender::new(Vec::new()),
            requests: watch::Sender::new(0),
            authorization: format!("Bearer {}", token.expose()),
        });
        let router = Router::new()
            .route("/api/v1/pipelines", axum::routing::post(take))
            .with_state(Arc::clone(&state));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let address = ControllerAddress { url, ca_pem: None, token };
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, state, task }
    }

    pub fn set_mode(&self, mode: Mode) {
        *self.state.mode.lock().unwrap() = mode;
    }

    /// All that was taken so far, repeats included.
    pub fn taken(&self) -> Vec<Value> {
        self.state.taken.borrow().clone()
    }

    /// Waits until so many events were taken.
    pub async fn wait_for(&self, count: usize) -> Vec<Value> {
        let mut taken = self.state.taken.subscribe();
        let waiting = taken.wait_for(|taken| taken.len() >= count);
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(taken) => taken.unwrap().clone(),
            Err(_) => panic!("only {:?} came instead of {count} events", self.taken()),
        }
    }

    /// Waits until so many more requests came, answered or not.
    pub async fn wait_for_requests(&self, more: usize) {
        let mut requests = self.state.requests.subscribe();
        let target = *requests.borrow() + more;
        tokio::time::timeout(PATIENCE, requests.wait_for(|count| *count >= target)).await.unwrap().unwrap();
    }

    /// Refs and the first digits of revisions, in the order of delivery.
    pub fn refs(&self) -> Vec<(String, String)> {
        self.taken().iter().map(|event| (text(event, "ref"), text(event, "revision"))).collect()
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn text(value: &Value, member: &str) -> String {
    value[member].as_str().unwrap_or_default().to_owned()
}

async fn take(State(state): State<Arc<Recording>>, headers: HeaderMap, Json(event): Json<Value>) -> Response {
    state.requests.send_modify(|count| *count += 1);
    assert_eq!(headers["authorization"].to_str().unwrap(), state.authorization);
    let mode = *state.mode.lock().unwrap();
    match mode {
        Mode::Down => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Mode::Refuse => {
            let problem =
                json!({"title": "Unprocessable Entity", "detail": "there is no .sealci/pipeline.yaml"});
            return (StatusCode::UNPROCESSABLE_ENTITY, axum::Json(problem)).into_response();
        }
        Mode::Accept | Mode::TakeAndDie => {}
    }
    let known = state.taken.borrow().iter().position(|taken| *taken == event);
    let place = known.unwrap_or_else(|| state.taken.borrow().len());
    state.taken.send_modify(|taken| taken.push(event));
    if mode == Mode::TakeAndDie {
        // The connection breaks off: what the client sees when the other side is killed after its commit.
        return Response::new(broken_body());
    }
    let status = if known.is_some() { StatusCode::OK } else { StatusCode::CREATED };
    (status, axum::Json(json!({"id": format!("pipeline-{place}")}))).into_response()
}

/// A body that fails at once, so that the connection is cut before the answer is whole.
fn broken_body() -> axum::body::Body {
    axum::body::Body::from_stream(tokio_stream::once(Err::<Vec<u8>, _>(std::io::Error::other("gone"))))
}

/// Repositories, a controller, and what a monitor needs.
pub struct Bench {
    pub folder: TempDir,
    database: DatabaseUrl,
    pub controller: Controller,
    pub admin: Token,
    pub run: Token,
    pub read: Token,
}

impl Bench {
    /// On SQLite.
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let database = DatabaseUrl::Sqlite(folder.path().join("monitor.sqlite"));
        Self::with(folder, database).await
    }

    /// On the given database.
    pub async fn on(database: DatabaseUrl) -> Self {
        Self::with(tempfile::tempdir().unwrap(), database).await
    }

    /// On SQLite always, and on PostgreSQL where there is a server.
    pub async fn on_each_database() -> Vec<Self> {
        let mut benches = vec![Self::new().await];
        if let Some(database) = sealci_service::testing::postgres("monitor").await {
            benches.push(Self::on(database).await);
        }
        benches
    }

    async fn with(folder: TempDir, database: DatabaseUrl) -> Self {
        let [admin, run, read] = [(); 3].map(|()| Token::generate().unwrap());
        Self { folder, database, controller: Controller::start().await, admin, run, read }
    }

    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    pub fn repository(&self, name: &str) -> Repository {
        Repository::create(self.root(), name)
    }

    pub fn config(&self) -> Config {
        let mut git = sealci_git::Options::new(self.root().join("home"));
        git.allow_local_addresses = true;
        git.limits.query_timeout = Duration::from_secs(10);
        let mut config = Config::new(self.database.clone(), self.controller.address.clone(), git);
        config.tokens = config
            .tokens
            .with(&self.admin, Role::Admin)
            .with(&self.run, Role::Run)
            .with(&self.read, Role::Read);
        config.transports = AllowedTransports { http: true, file: true };
        config.poll_interval = Duration::from_millis(150);
        config.retry = Backoff { first: Duration::from_millis(50), longest: Duration::from_millis(200) };
        config.http.drain_deadline = Duration::from_millis(500);
        config
    }

    pub async fn start(&self) -> Monitor {
        self.start_with(|_| {}).await
    }

    pub async fn start_with(&self, change: impl FnOnce(&mut Config)) -> Monitor {
        let mut config = self.config();
        change(&mut config);
        let (door, address) = bind(([127, 0, 0, 1], 0).into(), Security::PlainLoopback).await.unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { serve(config, door, shutdown).await.unwrap() }
        });
        sealci_service::tls::choose_provider();
        let client = reqwest::Client::new();
        Monitor { address, client, token: self.admin.expose().to_owned(), shutdown, task }
    }
}

/// A monitor that runs.
pub struct Monitor {
    pub address: SocketAddr,
    client: reqwest::Client,
    token: String,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Monitor {
    /// Ends it in order.
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.unwrap().unwrap();
    }

    /// Ends it where it stands: everything is dropped at its next await.
    pub async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let url = format!("http://{}{path}", self.address);
        self.client.request(method.parse().unwrap(), url)
    }

    /// A request with the admin token; the status and the JSON of the answer.
    pub async fn ask(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    /// Adds a configuration and returns its path, without waiting for its first poll.
    pub async fn add(&self, settings: Value) -> String {
        let (status, answer) = self.ask("POST", "/api/v1/configurations", Some(settings)).await;
        assert_eq!(status, 201, "{answer}");
        format!("/api/v1/configurations/{}", text(&answer, "id"))
    }

    /// Adds a configuration and waits until its first poll is over.
    pub async fn add_and_wait(&self, settings: Value) -> String {
        let path = self.add(settings).await;
        self.wait_until(&path, |shown| !shown["last_poll"].is_null()).await;
        path
    }

    pub async fn show(&self, path: &str) -> Value {
        let (status, answer) = self.ask("GET", path, None).await;
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Asks until the configuration shows it; the API has nothing that tells when it does.
    pub async fn wait_until(&self, path: &str, holds: impl Fn(&Value) -> bool) -> Value {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let shown = self.show(path).await;
            if holds(&shown) {
                return shown;
            }
            assert!(tokio::time::Instant::now() < deadline, "never came to be: {shown}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Has the repository looked at twice from here on: whatever was there before has been seen then.
    pub async fn settle(&self, path: &str) {
        for _ in 0..2 {
            let before = self.show(path).await["last_poll"]["at"].clone();
            assert_eq!(self.ask("POST", &format!("{path}/poll"), None).await.0, 202);
            self.wait_until(path, |shown| shown["last_poll"]["at"] != before).await;
        }
        self.wait_until(path, |shown| shown["undelivered"] == 0).await;
    }
}
