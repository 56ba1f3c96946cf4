//! Answers about agents.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use sealci_api::controller::types;
use sealci_core::ids::AgentId;
use sealci_service::problem::Problem;
use uuid::Uuid;

use super::error::ApiError;
use super::{Api, view};

/// All agents, by name.
pub async fn list(State(api): State<Api>) -> Result<Json<types::AgentList>, ApiError> {
    let agents = api.dispatch.agents().await?;
    Ok(Json(types::AgentList { agents: agents.iter().map(view::agent).collect() }))
}

/// Gives an agent no new work, or gives it work again.
pub async fn drain(
    State(api): State<Api>,
    id: Result<Path<Uuid>, PathRejection>,
    body: Result<Json<types::Drain>, JsonRejection>,
) -> Result<Json<types::Agent>, ApiError> {
    let Path(id) = id.map_err(Problem::from)?;
    let Json(wanted) = body.map_err(Problem::from)?;
    let agent = api.dispatch.drain(AgentId::from_uuid(id), wanted.drained).await?;
    Ok(Json(view::agent(&agent)))
}
