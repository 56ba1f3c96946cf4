//! Answers agents about the attempts they run: what those keep, and what is brought to them.

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Response, StatusCode, header};
use sealci_api::controller::types;
use sealci_core::ids::{ActionId, AttemptId};
use sealci_service::problem::{self, Path, Problem};
use uuid::Uuid;

use super::error::ApiError;
use super::kept::{self, now_ms};
use super::{Api, view};
use crate::storage::{BlobDigest, Brought, StorageError, Visitor};
use crate::store::Referred;
use crate::store::entity::storage::{artifacts, blobs, caches, test_reports};

const MAX_KEY_BYTES: usize = 1024;
const MAX_RESTORE: usize = 32;
/// Nothing is kept for longer, whatever a manifest says.
const LONGEST_KEPT_MS: i64 = 10 * 365 * 24 * 60 * 60 * 1000;
const MAX_FAILING: usize = 100;

type Answer<T> = Result<Json<T>, ApiError>;

impl FromRequestParts<Api> for Visitor {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, api: &Api) -> Result<Self, ApiError> {
        let parameters = RawPathParams::from_request_parts(parts, api)
            .await
            .map_err(|_| Problem::not_found("there is no such attempt"))?;
        let attempt = parameters.iter().find(|(name, _)| *name == "attempt").map(|(_, text)| text);
        let attempt = attempt.and_then(|text| text.parse::<AttemptId>().ok());
        let attempt = attempt.ok_or_else(|| Problem::not_found("there is no such attempt"))?;
        let authorization = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        Ok(api.storage.admit(attempt, authorization).await?)
    }
}

/// Brings bytes to be kept.
pub async fn upload(
    State(api): State<Api>,
    visitor: Visitor,
    Path((_, digest)): Path<(String, String)>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<types::Blob>), ApiError> {
    let digest = read_digest(&digest)?;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let length: u64 = length.ok_or_else(|| {
        Problem::new(StatusCode::LENGTH_REQUIRED).detail("an upload says its length, in `Content-Length`")
    })?;
    let brought = api.storage.upload(&visitor, digest.clone(), length, body.into_data_stream()).await?;
    let (status, size_bytes) = match brought {
        Brought::Now { size_bytes } => (StatusCode::CREATED, size_bytes),
        Brought::Before { size_bytes } => (StatusCode::OK, size_bytes),
    };
    Ok((status, Json(types::Blob { digest: digest.to_string(), size_bytes: signed(size_bytes) })))
}

/// Reads what a cache's entry or a used artifact refers to.
pub async fn download(
    State(api): State<Api>,
    visitor: Visitor,
    Path((_, digest)): Path<(String, String)>,
    headers: HeaderMap,
) -> Result<Response<Body>, ApiError> {
    let digest = read_digest(&digest)?;
    let unknown =
        || Problem::not_found("no cache entry and no used artifact of this attempt has this digest");
    if !may_read(&api, &visitor, &digest).await? {
        return Err(unknown().into());
    }
    let blob = api.store.blob(digest.as_str()).await?.ok_or_else(unknown)?;
    kept::blob_response(&api, &blob, &headers, None).await
}

async fn may_read(api: &Api, visitor: &Visitor, digest: &BlobDigest) -> Result<bool, ApiError> {
    let repository = &visitor.rows.pipeline.repository;
    let scopes = visitor.readable_scopes();
    if api.store.cache_has_digest(repository, &scopes, digest.as_str()).await? {
        return Ok(true);
    }
    let pipeline = sealci_core::ids::PipelineId::from_uuid(visitor.rows.pipeline.id);
    for artifact in api.store.artifacts_of_pipeline(pipeline, now_ms()).await? {
        let action = ActionId::from_uuid(artifact.action_id);
        if artifact.digest == digest.as_str() && visitor.uses(&api.storage, action).await? {
            let counting = api.store.artifacts_that_count(action, now_ms()).await?;
            if counting.is_some_and(|(_, all)| all.iter().any(|row| row.id == artifact.id)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Keeps an uploaded archive as an artifact.
pub async fn keep_artifact(
    State(api): State<Api>,
    visitor: Visitor,
    problem::Json(new): problem::Json<types::NewArtifact>,
) -> Answer<types::Artifact> {
    let digest = read_digest(&new.digest)?;
    let name = new.name.as_ref().map(|name| name.as_str()).unwrap_or_default();
    let has_name = !name.is_empty();
    if has_name != (new.kind == types::ArtifactKind::ServiceLog) {
        let said = "a service's log has its service's name, and nothing else has one";
        return Err(Problem::unprocessable(said).into());
    }
    // So there are no more than the manifest has services.
    if has_name && !visitor.planned.services.iter().any(|service| service.name == name) {
        return Err(Problem::unprocessable("the action has no service of this name").into());
    }
    let owner = visitor.owner();
    let now_ms = now_ms();
    let blob = api.store.touch_owned(digest.as_str(), &owner, now_ms).await?;
    let blob = blob.ok_or_else(|| not_uploaded(&digest))?;
    check_archive(&api, &blob, &new).await?;
    let kept_for = match new.keep_ms {
        Some(wanted) => i64::try_from(wanted.get()).unwrap_or(i64::MAX),
        None => i64::try_from(api.storage.keep_artifacts().as_millis()).unwrap_or(i64::MAX),
    };
    let row = artifacts::Model {
        id: Uuid::now_v7(),
        pipeline_id: visitor.rows.pipeline.id,
        action_id: visitor.rows.action.id,
        number: visitor.rows.attempt.number,
        kind: new.kind.to_string(),
        name: name.to_owned(),
        digest: digest.to_string(),
        size_bytes: blob.size_bytes,
        unpacked_bytes: new.unpacked_bytes,
        files: new.files,
        created_at: now_ms,
        expires_at: now_ms.saturating_add(kept_for.min(LONGEST_KEPT_MS)),
    };
    match api.store.keep_artifact(row, &owner).await? {
        Referred::To(stands) if stands.digest == digest.as_str() => {
            Ok(Json(view::artifact(&visitor.rows.action, &stands)))
        }
        Referred::To(_) => Err(StorageError::KeptBefore.into()),
        Referred::NotUploaded => Err(not_uploaded(&digest).into()),
    }
}

/// What is shown to people is looked at first: agents may be wrong, or lie.
async fn check_archive(api: &Api, blob: &blobs::Model, new: &types::NewArtifact) -> Result<(), ApiError> {
    let index = api.storage.index(blob).await?;
    let (files, unpacked) = (index.files.len(), index.unpacked_bytes());
    if i64::try_from(files) != Ok(new.files) || i64::try_from(unpacked) != Ok(new.unpacked_bytes) {
        let found = format!("it holds {files} files of {unpacked} bytes");
        return Err(StorageError::NotAsSaid(found).into());
    }
    Ok(())
}

/// The artifacts of an action that this one uses.
pub async fn used(
    State(api): State<Api>,
    visitor: Visitor,
    Path((_, action)): Path<(String, Uuid)>,
) -> Answer<types::ArtifactList> {
    let action = ActionId::from_uuid(action);
    let not_used = || Problem::not_found("the action does not use that one, as its manifest says");
    if !visitor.uses(&api.storage, action).await? {
        return Err(not_used().into());
    }
    let (action, rows) = api.store.artifacts_that_count(action, now_ms()).await?.ok_or_else(not_used)?;
    Ok(Json(types::ArtifactList { artifacts: rows.iter().map(|row| view::artifact(&action, row)).collect() }))
}

/// Finds the entry for a key.
pub async fn find_cache(
    State(api): State<Api>,
    visitor: Visitor,
    problem::Json(asked): problem::Json<types::CacheQuestion>,
) -> Answer<types::CacheAnswer> {
    check_key(asked.key.as_str())?;
    if asked.restore.len() > MAX_RESTORE {
        return Err(Problem::unprocessable(format!("`restore` has at most {MAX_RESTORE} beginnings")).into());
    }
    asked.restore.iter().try_for_each(|prefix| check_key(prefix))?;
    let found = found_cache(&api, &visitor, &asked).await?;
    if let Some(row) = &found {
        api.store.cache_used(row, now_ms()).await?;
    }
    let entry = found.map(|row| types::CacheEntry {
        exact: row.key == asked.key.as_str(),
        key: row.key,
        digest: row.digest,
        size_bytes: row.size_bytes,
        unpacked_bytes: row.unpacked_bytes,
        files: row.files,
    });
    Ok(Json(types::CacheAnswer { entry }))
}

async fn found_cache(
    api: &Api,
    visitor: &Visitor,
    asked: &types::CacheQuestion,
) -> Result<Option<caches::Model>, ApiError> {
    let scopes = visitor.readable_scopes();
    for scope in &scopes {
        let identity = visitor.cache_identity(scope, asked.key.as_str());
        if let Some(row) = api.store.cache_with_identity(&identity).await? {
            return Ok(Some(row));
        }
    }
    let repository = &visitor.rows.pipeline.repository;
    for prefix in &asked.restore {
        for scope in &scopes {
            if let Some(row) = api.store.cache_with_prefix(repository, scope, prefix).await? {
                return Ok(Some(row));
            }
        }
    }
    Ok(None)
}

/// Keeps an uploaded archive as the entry for a key.
pub async fn keep_cache(
    State(api): State<Api>,
    visitor: Visitor,
    problem::Json(new): problem::Json<types::NewCache>,
) -> Answer<types::CacheKept> {
    let digest = read_digest(&new.digest)?;
    check_key(new.key.as_str())?;
    if new.files < 0 || new.unpacked_bytes < 0 {
        return Err(Problem::unprocessable("sizes are not negative").into());
    }
    let owner = visitor.owner();
    let now_ms = now_ms();
    let blob = api.store.touch_owned(digest.as_str(), &owner, now_ms).await?;
    let blob = blob.ok_or_else(|| not_uploaded(&digest))?;
    let scope = visitor.scope();
    let row = caches::Model {
        id: Uuid::now_v7(),
        identity: visitor.cache_identity(&scope, new.key.as_str()),
        repository: visitor.rows.pipeline.repository.clone(),
        scope,
        key: new.key.to_string(),
        digest: digest.to_string(),
        size_bytes: blob.size_bytes,
        unpacked_bytes: new.unpacked_bytes,
        files: new.files,
        created_at: now_ms,
        last_used_at: now_ms,
    };
    match api.store.keep_cache(row, &owner).await? {
        Referred::To(stored) => {
            api.storage.cache_grew();
            Ok(Json(types::CacheKept { stored }))
        }
        Referred::NotUploaded => Err(not_uploaded(&digest).into()),
    }
}

/// Keeps what the attempt's tests did.
pub async fn keep_report(
    State(api): State<Api>,
    visitor: Visitor,
    problem::Json(mut report): problem::Json<types::TestReport>,
) -> Answer<types::TestReport> {
    let counts = [report.tests, report.failures, report.errors, report.skipped, report.duration_ms];
    if counts.iter().any(|count| *count < 0) {
        return Err(Problem::unprocessable("counts are not negative").into());
    }
    bound(&mut report);
    let text = serde_json::to_string(&report).map_err(|error| Problem::internal(&error))?;
    let (action_id, number) = (visitor.rows.action.id, visitor.rows.attempt.number);
    api.store.keep_report(test_reports::Model { action_id, number, report: text }).await?;
    Ok(Json(report))
}

/// Cuts what is too long, as the document says.
fn bound(report: &mut types::TestReport) {
    report.failing.truncate(MAX_FAILING);
    cut_some(&mut report.note, 1 << 10);
    for case in &mut report.failing {
        cut(&mut case.name, 512);
        cut_some(&mut case.suite, 512);
        cut_some(&mut case.class, 512);
        cut_some(&mut case.message, 1 << 10);
        cut_some(&mut case.text, 4 << 10);
    }
}

fn cut_some(text: &mut Option<String>, bytes: usize) {
    if let Some(text) = text {
        cut(text, bytes);
    }
}

fn cut(text: &mut String, bytes: usize) {
    // PostgreSQL has no text with a NUL in it, and JSON's escape of one is refused by what reads it as JSON there.
    text.retain(|letter| letter != '\0');
    text.truncate(text.floor_char_boundary(bytes));
}

fn check_key(key: &str) -> Result<(), Problem> {
    if key.len() > MAX_KEY_BYTES || key.contains('\0') {
        return Err(Problem::unprocessable(format!("a key has at most {MAX_KEY_BYTES} bytes, and no NUL")));
    }
    Ok(())
}

fn read_digest(text: &str) -> Result<BlobDigest, Problem> {
    text.parse().map_err(|error: crate::storage::InvalidDigest| Problem::unprocessable(error.to_string()))
}

fn not_uploaded(digest: &BlobDigest) -> StorageError {
    StorageError::NotUploaded { digest: digest.to_string() }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
