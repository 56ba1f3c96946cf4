//! Serves the REST API, as `api/openapi/controller.yaml` says.

mod agents;
mod attempts;
mod error;
mod gate;
mod kept;
mod logs;
mod pipelines;
mod view;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{MethodRouter, delete, get, post, put};
use axum::{Json, Router, middleware};
use sealci_api::controller::types;
use sealci_service::auth::{Guard, Role, Tokens, guard};
use sealci_service::problem::{Problem, no_such_method, no_such_route};
use tokio_util::sync::CancellationToken;

use crate::dispatch::Dispatch;
use crate::intake::Repositories;
use crate::storage::Storage;
use crate::store::Store;
use crate::watchers::Watchers;

pub use gate::Gate;

/// A manifest has at most 1 MiB; JSON may need twice as much for it.
const MAX_BODY_BYTES: usize = 2 << 20;

/// What every handler has.
#[derive(Debug, Clone)]
pub struct Api {
    pub store: Store,
    pub storage: Storage,
    pub dispatch: Dispatch,
    pub watchers: Watchers,
    pub repositories: Arc<dyn Repositories>,
    /// Where requests that make pipelines come in.
    pub gate: Gate,
    /// Ends the streams that would never end by themselves.
    pub stop: CancellationToken,
}

/// A path of the API, its method, and who may call it.
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    pub access: Access,
    handler: MethodRouter<Api>,
}

/// Who may call a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Anyone,
    /// Who has a token with this role.
    Role(Role),
    /// The agent of the attempt that the path names; the handler asks for its ticket.
    Ticket,
}

/// The table of contents.
pub fn routes() -> Vec<Route> {
    let get = |path, handler| Route { method: "get", path, access: Access::Role(Role::Read), handler };
    let post = |path, role, handler| Route { method: "post", path, access: Access::Role(role), handler };
    let remove = |path, handler| Route { method: "delete", path, access: Access::Role(Role::Admin), handler };
    let open = |path, handler| Route { method: "get", path, access: Access::Anyone, handler };
    let ticket = |method, path, handler| Route { method, path, access: Access::Ticket, handler };
    vec![
        post("/api/v1/pipelines", Role::Run, self::post(pipelines::create)),
        get("/api/v1/pipelines", self::get(pipelines::list)),
        get("/api/v1/pipelines/{pipeline_id}", self::get(pipelines::show)),
        get("/api/v1/pipelines/{pipeline_id}/manifest", self::get(pipelines::manifest)),
        get("/api/v1/pipelines/{pipeline_id}/watch", self::get(pipelines::watch)),
        post("/api/v1/pipelines/{pipeline_id}/cancel", Role::Run, self::post(pipelines::cancel)),
        post("/api/v1/pipelines/{pipeline_id}/rerun", Role::Run, self::post(pipelines::rerun)),
        get("/api/v1/pipelines/{pipeline_id}/actions", self::get(pipelines::actions)),
        get("/api/v1/actions/{action_id}", self::get(pipelines::action)),
        get("/api/v1/actions/{action_id}/why", self::get(pipelines::why)),
        get("/api/v1/actions/{action_id}/attempts/{number}/log", self::get(logs::read)),
        get("/api/v1/actions/{action_id}/attempts/{number}/log/follow", self::get(logs::follow)),
        get("/api/v1/pipelines/{pipeline_id}/artifacts", self::get(kept::artifacts)),
        get("/api/v1/artifacts/{artifact_id}", self::get(kept::artifact)),
        remove("/api/v1/artifacts/{artifact_id}", delete(kept::delete_artifact)),
        get("/api/v1/artifacts/{artifact_id}/archive", self::get(kept::archive)),
        get("/api/v1/artifacts/{artifact_id}/files", self::get(kept::files)),
        get("/api/v1/artifacts/{artifact_id}/files/{*path}", self::get(kept::file)),
        get("/api/v1/caches", self::get(kept::caches)),
        remove("/api/v1/caches/{cache_id}", delete(kept::delete_cache)),
        post("/api/v1/gc", Role::Admin, self::post(kept::collect_garbage)),
        ticket("put", "/api/v1/attempts/{attempt}/blobs/{digest}", put(attempts::upload)),
        ticket("get", "/api/v1/attempts/{attempt}/blobs/{digest}", self::get(attempts::download)),
        ticket("post", "/api/v1/attempts/{attempt}/artifacts", self::post(attempts::keep_artifact)),
        ticket("get", "/api/v1/attempts/{attempt}/uses/{action_id}", self::get(attempts::used)),
        ticket("post", "/api/v1/attempts/{attempt}/caches/find", self::post(attempts::find_cache)),
        ticket("post", "/api/v1/attempts/{attempt}/caches", self::post(attempts::keep_cache)),
        ticket("post", "/api/v1/attempts/{attempt}/reports", self::post(attempts::keep_report)),
        get("/api/v1/agents", self::get(agents::list)),
        post("/api/v1/agents/{agent_id}/drain", Role::Admin, self::post(agents::drain)),
        open("/healthz", self::get(health)),
        open("/readyz", self::get(readiness)),
    ]
}

/// The router of the table above.
pub fn router(api: Api, tokens: &Tokens) -> Router {
    let router = routes().into_iter().fold(Router::new(), |router, route| {
        let handler = match route.access {
            Access::Role(role) => {
                let guarded = Guard { tokens: tokens.clone(), needed: role };
                route.handler.route_layer(middleware::from_fn_with_state(guarded, guard))
            }
            Access::Anyone | Access::Ticket => route.handler,
        };
        router.route(route.path, handler)
    });
    router
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(api)
}

async fn health() -> Json<types::Health> {
    Json(types::Health { status: "alive".into() })
}

async fn readiness(State(api): State<Api>) -> Result<Json<types::Health>, Problem> {
    api.store.ping().await.map_err(|error| Problem::unavailable(&error))?;
    if !api.dispatch.is_linked() {
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE).detail("no scheduler is connected"));
    }
    Ok(Json(types::Health { status: "ready".into() }))
}
