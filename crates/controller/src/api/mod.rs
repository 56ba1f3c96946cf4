//! Serves the REST API, as `api/openapi/controller.yaml` says.

mod agents;
mod error;
mod logs;
mod pipelines;
mod view;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{MethodRouter, get, post};
use axum::{Json, Router, middleware};
use sealci_api::controller::types;
use sealci_service::auth::{Guard, Role, Tokens, guard};
use sealci_service::problem::{Problem, no_such_method, no_such_route};
use tokio_util::sync::CancellationToken;

use crate::dispatch::Dispatch;
use crate::intake::Repositories;
use crate::store::Store;
use crate::watchers::Watchers;

/// A manifest has at most 1 MiB; JSON may need twice as much for it.
const MAX_BODY_BYTES: usize = 2 << 20;

/// What every handler has.
#[derive(Debug, Clone)]
pub struct Api {
    pub store: Store,
    pub dispatch: Dispatch,
    pub watchers: Watchers,
    pub repositories: Arc<dyn Repositories>,
    /// Ends the streams that would never end by themselves.
    pub stop: CancellationToken,
}

/// A path of the API, its method, and who may call it.
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    /// None: anyone.
    pub role: Option<Role>,
    handler: MethodRouter<Api>,
}

/// The table of contents.
pub fn routes() -> Vec<Route> {
    let get = |path, handler| Route { method: "get", path, role: Some(Role::Read), handler };
    let post = |path, role, handler| Route { method: "post", path, role: Some(role), handler };
    let open = |path, handler| Route { method: "get", path, role: None, handler };
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
        get("/api/v1/agents", self::get(agents::list)),
        post("/api/v1/agents/{agent_id}/drain", Role::Admin, self::post(agents::drain)),
        open("/healthz", self::get(health)),
        open("/readyz", self::get(readiness)),
    ]
}

/// The router of the table above.
pub fn router(api: Api, tokens: &Tokens) -> Router {
    let router = routes().into_iter().fold(Router::new(), |router, route| {
        let handler = match route.role {
            Some(role) => {
                let guarded = Guard { tokens: tokens.clone(), needed: role };
                route.handler.route_layer(middleware::from_fn_with_state(guarded, guard))
            }
            None => route.handler,
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
