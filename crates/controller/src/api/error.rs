//! Says what became of a request that came to nothing.

use axum::http::StatusCode;
use sealci_core::manifest::ManifestErrors;
use sealci_service::problem::Problem;

use crate::dispatch::Refusal;
use crate::intake::{IntakeError, RepositoryError};
use crate::store::StoreError;

/// Why a request came to nothing.
#[derive(Debug)]
pub enum ApiError {
    Problem(Problem),
    Intake(IntakeError),
    Refusal(Refusal),
    Store(StoreError),
}

impl axum::response::IntoResponse for ApiError {
    fn into_response(self) -> axum::response::Response {
        match self {
            Self::Problem(problem) => problem,
            Self::Intake(error) => of_intake(error),
            Self::Refusal(refusal) => of_refusal(&refusal),
            Self::Store(error) => Problem::internal(&error),
        }
        .into_response()
    }
}

fn of_intake(error: IntakeError) -> Problem {
    match error {
        IntakeError::Manifest(errors) => of_manifest(&errors),
        IntakeError::Repository(error @ RepositoryError::NotAllowed(_)) => {
            Problem::new(StatusCode::FORBIDDEN).detail(error.to_string())
        }
        IntakeError::Repository(error @ RepositoryError::NotFound(_)) => {
            Problem::unprocessable(error.to_string())
        }
        IntakeError::Repository(error @ RepositoryError::Unreachable(_)) => {
            Problem::new(StatusCode::BAD_GATEWAY).detail(error.to_string())
        }
        error => Problem::bad_request(error.to_string()),
    }
}

fn of_manifest(errors: &ManifestErrors) -> Problem {
    let views = serde_json::to_value(errors.views()).unwrap_or_default();
    Problem::unprocessable(errors.to_string()).with("errors", views)
}

fn of_refusal(refusal: &Refusal) -> Problem {
    let detail = refusal.to_string();
    match refusal {
        Refusal::UnknownPipeline | Refusal::UnknownAction | Refusal::UnknownAgent => {
            Problem::not_found(detail)
        }
        Refusal::Rerun(_) => Problem::conflict(detail),
        Refusal::NotRecorded | Refusal::ShuttingDown => {
            Problem::new(StatusCode::SERVICE_UNAVAILABLE).detail(detail)
        }
    }
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<IntakeError> for ApiError {
    fn from(error: IntakeError) -> Self {
        Self::Intake(error)
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}
