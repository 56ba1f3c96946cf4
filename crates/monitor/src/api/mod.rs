//! Answers over REST, as `api/openapi/monitor.yaml` says.

mod handlers;
mod shown;

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use axum::routing::{MethodRouter, delete, get, post, put};
use sealci_service::auth::Role;
use sealci_service::problem::{Problem, no_such_method, no_such_route};

use crate::watch::Watch;

/// One line of the table of contents below.
struct Route {
    method: Method,
    path: &'static str,
    /// Who may; anyone without a token where there is none.
    role: Option<Role>,
    handler: MethodRouter<Arc<Watch>>,
}

fn routes() -> Vec<Route> {
    use Role::{Admin, Read, Run};
    use handlers as h;
    const ALL: &str = "/api/v1/configurations";
    const ONE: &str = "/api/v1/configurations/{configuration_id}";
    const FILE: &str = "/api/v1/configurations/{configuration_id}/actions-file";
    const POLL: &str = "/api/v1/configurations/{configuration_id}/poll";
    let route = |method, path, role, handler| Route { method, path, role, handler };
    vec![
        route(Method::GET, ALL, Some(Read), get(h::list)),
        route(Method::POST, ALL, Some(Admin), post(h::add)),
        route(Method::GET, ONE, Some(Read), get(h::show)),
        route(Method::PUT, ONE, Some(Admin), put(h::update)),
        route(Method::DELETE, ONE, Some(Admin), delete(h::remove)),
        route(Method::GET, FILE, Some(Read), get(h::show_actions_file)),
        route(Method::PUT, FILE, Some(Admin), put(h::upload_actions_file)),
        route(Method::DELETE, FILE, Some(Admin), delete(h::delete_actions_file)),
        route(Method::POST, POLL, Some(Run), post(h::poll)),
        route(Method::GET, "/healthz", None, get(h::health)),
        route(Method::GET, "/readyz", None, get(h::readiness)),
    ]
}

/// Method, path, and whether a token is needed, of everything that is served: to be compared with the document.
pub fn route_table() -> Vec<(String, String, bool)> {
    let line = |route: Route| (route.method.to_string(), route.path.to_owned(), route.role.is_some());
    routes().into_iter().map(line).collect()
}

pub fn router(watch: Arc<Watch>) -> Router {
    let mut router = Router::new();
    for Route { path, role, handler, .. } in routes() {
        let handler = match role {
            Some(role) => handler.layer(from_fn_with_state((Arc::clone(&watch), role), authorize)),
            None => handler,
        };
        router = router.route(path, handler);
    }
    router.fallback(no_such_route).method_not_allowed_fallback(no_such_method).with_state(watch)
}

async fn authorize(
    State((watch, role)): State<(Arc<Watch>, Role)>,
    request: Request,
    next: Next,
) -> Result<Response, Problem> {
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    watch.config.tokens.authorize(authorization, role)?;
    Ok(next.run(request).await)
}
