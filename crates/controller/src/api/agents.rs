//! Answers about agents.

use axum::Json;
use axum::extract::State;
use sealci_api::controller::types;
use sealci_core::ids::AgentId;
use sealci_service::problem::{self, Path};
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
    Path(id): Path<Uuid>,
    problem::Json(wanted): problem::Json<types::Drain>,
) -> Result<Json<types::Agent>, ApiError> {
    let agent = api.dispatch.drain(AgentId::from_uuid(id), wanted.drained).await?;
    Ok(Json(view::agent(&agent)))
}
