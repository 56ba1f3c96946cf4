//! Says what became of a request that came to nothing.

use axum::http::{StatusCode, header};
use sealci_core::manifest::ManifestErrors;
use sealci_service::problem::{Problem, chain};

use crate::dispatch::Refusal;
use crate::intake::{IntakeError, RepositoryError};
use crate::storage::objects::ObjectsError;
use crate::storage::{NotAdmitted, StorageError};
use crate::store::StoreError;

/// Why a request came to nothing.
#[derive(Debug)]
pub enum ApiError {
    Problem(Problem),
    Intake(IntakeError),
    Refusal(Refusal),
    Store(StoreError),
    Storage(StorageError),
    NotAdmitted(NotAdmitted),
}

impl axum::response::IntoResponse for ApiError {
    fn into_response(self) -> axum::response::Response {
        match self {
            Self::Problem(problem) => problem,
            Self::Intake(error) => of_intake(error),
            Self::Refusal(refusal) => of_refusal(&refusal),
            Self::Store(error) => Problem::internal(&error),
            Self::Storage(error) => of_storage(error),
            Self::NotAdmitted(error) => of_not_admitted(error),
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

/// A store that is away now is asked again after so many seconds.
const STORE_RETRY_SECONDS: &str = "5";

fn of_storage(error: StorageError) -> Problem {
    let detail = chain(&error);
    let of = |status: StatusCode| Problem::new(status).detail(detail.clone());
    match error {
        // On most machines the database and the objects share a disk.
        StorageError::Store(_) if tells_of_a_full_disk(&detail) => of(StatusCode::INSUFFICIENT_STORAGE),
        StorageError::Store(error) => Problem::internal(&error),
        StorageError::Objects(error) => of_objects(&error, detail),
        StorageError::TooLarge { .. } => of(StatusCode::PAYLOAD_TOO_LARGE),
        StorageError::BrokenOff(_) => Problem::bad_request(detail),
        StorageError::WrongDigest { .. }
        | StorageError::NotAsSaid(_)
        | StorageError::Index(_)
        | StorageError::Extract(_)
        | StorageError::NoContents { .. } => Problem::unprocessable(detail),
        StorageError::NotUploaded { .. } | StorageError::KeptBefore => Problem::conflict(detail),
        StorageError::NoSuchFile => Problem::not_found(detail),
        StorageError::Lost { .. } | StorageError::LogDeleted { .. } => of(StatusCode::GONE),
        StorageError::LogAway { source, .. } => of_objects(&source, detail),
        StorageError::ShuttingDown => of(StatusCode::SERVICE_UNAVAILABLE),
    }
}

/// Databases say so in words alone: SQLite's and PostgreSQL's.
fn tells_of_a_full_disk(error: &str) -> bool {
    error.contains("disk is full") || error.contains("No space left on device")
}

fn of_objects(error: &ObjectsError, detail: String) -> Problem {
    tracing::warn!(error = detail, "the object store");
    match error {
        ObjectsError::Full(_) => Problem::new(StatusCode::INSUFFICIENT_STORAGE).detail(detail),
        ObjectsError::Missing(_) | ObjectsError::Damaged { .. } | ObjectsError::Open { .. } => {
            Problem::internal(error)
        }
        ObjectsError::Down(_) | ObjectsError::Slow => Problem::new(StatusCode::SERVICE_UNAVAILABLE)
            .detail(detail)
            .header(header::RETRY_AFTER, STORE_RETRY_SECONDS),
    }
}

fn of_not_admitted(error: NotAdmitted) -> Problem {
    let detail = error.to_string();
    match error {
        NotAdmitted::NoTicket | NotAdmitted::NotItsTicket => {
            Problem::new(StatusCode::UNAUTHORIZED).detail(detail).header(header::WWW_AUTHENTICATE, "Bearer")
        }
        NotAdmitted::Over => Problem::new(StatusCode::FORBIDDEN).detail(detail),
        NotAdmitted::Store(error) => Problem::internal(&error),
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

impl From<StorageError> for ApiError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

impl From<NotAdmitted> for ApiError {
    fn from(error: NotAdmitted) -> Self {
        Self::NotAdmitted(error)
    }
}
