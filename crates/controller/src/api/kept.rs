//! Answers people about what is kept: artifacts and caches, and what has had its time.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::response::IntoResponse;
use sealci_api::controller::types;
use sealci_core::ids::PipelineId;
use sealci_service::problem::{self, Path, Problem, Query};
use serde::Deserialize;
use uuid::Uuid;

use super::error::ApiError;
use super::logs::parse_range;
use super::pipelines::{identity_of, no_such_pipeline};
use super::{Api, view};
use crate::storage::Sweep;
use crate::store::counts;
use crate::store::entity::actions;
use crate::store::entity::storage::{artifacts, blobs};

type Answer<T> = Result<Json<T>, ApiError>;

/// What is kept of a pipeline's actions, in the manifest's order.
pub async fn artifacts(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::ArtifactList> {
    let id = PipelineId::from_uuid(id);
    let story = api.store.story(id).await?.ok_or_else(no_such_pipeline)?;
    let rows = api.store.artifacts_of_pipeline(id, now_ms()).await?;
    let mut shown = Vec::new();
    for action in &story.actions {
        let counting = story.attempts.iter().find(|attempt| counts(action, attempt));
        let Some(attempt) = counting else { continue };
        let own = rows.iter().filter(|row| row.action_id == action.id && row.number == attempt.number);
        shown.extend(own.map(|row| view::artifact(action, row)));
    }
    Ok(Json(types::ArtifactList { artifacts: shown }))
}

/// One artifact.
pub async fn artifact(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::Artifact> {
    let (action, row) = found(&api, id).await?;
    Ok(Json(view::artifact(&action, &row)))
}

/// Deletes an artifact, also one that does not count.
pub async fn delete_artifact(State(api): State<Api>, Path(id): Path<Uuid>) -> Result<StatusCode, ApiError> {
    match api.store.delete_artifact(id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(no_such_artifact().into()),
    }
}

/// The whole artifact.
pub async fn archive(
    State(api): State<Api>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response<Body>, ApiError> {
    let (action, row) = found(&api, id).await?;
    let blob = blob_of(&api, &row).await?;
    blob_response(&api, &blob, &headers, Some(&format!("{}.tar.zst", action.name))).await
}

/// How much of an artifact's files is wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesQuery {
    limit: Option<usize>,
    cursor: Option<String>,
}

/// The files of an artifact.
pub async fn files(
    State(api): State<Api>,
    Path(id): Path<Uuid>,
    Query(query): Query<FilesQuery>,
) -> Answer<types::ArtifactFilePage> {
    let limit = query.limit.unwrap_or(1000);
    if !(1..=10_000).contains(&limit) {
        return Err(Problem::bad_request("`limit` is 1 to 10000").into());
    }
    let from = query.cursor.as_deref().map_or(Some(0), |text| text.strip_prefix("from-")?.parse().ok());
    let from: usize = from.ok_or_else(bad_cursor)?;
    let (_, row) = found(&api, id).await?;
    let index = api.storage.index(&blob_of(&api, &row).await?).await?;
    let next = from.saturating_add(limit);
    let files = index.files.iter().skip(from).take(limit).map(view::artifact_file).collect();
    let next = (next < index.files.len()).then(|| format!("from-{next}"));
    Ok(Json(types::ArtifactFilePage { files, next }))
}

/// One file of an artifact.
pub async fn file(
    State(api): State<Api>,
    Path((id, path)): Path<(Uuid, String)>,
) -> Result<Response<Body>, ApiError> {
    let (_, row) = found(&api, id).await?;
    let (length, contents) = api.storage.file(&blob_of(&api, &row).await?, &path).await?;
    let name = path.rsplit('/').next().unwrap_or_default();
    let response = to_be_saved(Response::builder(), Some(name)).header(header::CONTENT_LENGTH, length);
    finished(response.body(Body::from_stream(contents)))
}

/// Which cache entries are wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CachesQuery {
    limit: Option<u64>,
    cursor: Option<String>,
    repository: Option<String>,
}

/// The entries of all caches, last used first.
pub async fn caches(State(api): State<Api>, Query(query): Query<CachesQuery>) -> Answer<types::CachePage> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::bad_request("`limit` is 1 to 200").into());
    }
    let below = query.cursor.as_deref().map(|text| read_cursor(text).ok_or_else(bad_cursor)).transpose()?;
    let repository = query.repository.map(|text| identity_of(&text));
    let mut rows = api.store.list_caches(repository.as_deref(), below, limit + 1).await?;
    let has_more = rows.len() as u64 > limit;
    rows.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let next = rows.last().filter(|_| has_more).map(|row| format!("{}-{}", row.last_used_at, row.id));
    Ok(Json(types::CachePage { caches: rows.iter().map(view::cache).collect(), next }))
}

/// Deletes an entry of a cache.
pub async fn delete_cache(State(api): State<Api>, Path(id): Path<Uuid>) -> Result<StatusCode, ApiError> {
    match api.store.delete_cache(id).await? {
        true => Ok(StatusCode::NO_CONTENT),
        false => Err(Problem::not_found("there is no such cache entry").into()),
    }
}

/// Deletes now what has had its time, or says what that is.
pub async fn collect_garbage(
    State(api): State<Api>,
    problem::Json(wanted): problem::Json<types::CollectGarbage>,
) -> Answer<types::Garbage> {
    let sweep = if wanted.dry_run { Sweep::Dry } else { Sweep::Delete };
    let swept = api.storage.sweep(now_ms(), sweep).await?;
    Ok(Json(view::garbage(&swept, wanted.dry_run)))
}

fn read_cursor(text: &str) -> Option<(i64, Uuid)> {
    let (used, id) = text.split_once('-')?;
    Some((used.parse().ok()?, id.parse().ok()?))
}

fn bad_cursor() -> Problem {
    Problem::bad_request("`cursor` must be the `next` of the page before")
}

async fn found(api: &Api, id: Uuid) -> Result<(actions::Model, artifacts::Model), ApiError> {
    Ok(api.store.artifact(id, now_ms()).await?.ok_or_else(no_such_artifact)?)
}

fn no_such_artifact() -> Problem {
    Problem::not_found("there is no such artifact, or it has expired, or its attempt did not count")
}

async fn blob_of(api: &Api, row: &artifacts::Model) -> Result<blobs::Model, ApiError> {
    let blob = api.store.blob(&row.digest).await?;
    Ok(blob
        .ok_or_else(|| crate::store::Malformed::new("artifacts", row.id, "its blob is missing"))
        .map_err(crate::store::StoreError::from)?)
}

/// A blob's bytes, or the range of them that was asked for.
pub(super) async fn blob_response(
    api: &Api,
    blob: &blobs::Model,
    headers: &HeaderMap,
    name: Option<&str>,
) -> Result<Response<Body>, ApiError> {
    let size = blob.size_bytes.unsigned_abs();
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let range = range.and_then(|text| parse_range(text, size));
    let response = to_be_saved(Response::builder(), name).header(header::ACCEPT_RANGES, "bytes");
    let (response, bounds) = match range {
        None => (response, 0..size),
        Some(range) if range.from >= size || range.from >= range.to => {
            let problem = Problem::new(StatusCode::RANGE_NOT_SATISFIABLE)
                .detail(format!("there are {size} bytes"))
                .header(header::CONTENT_RANGE, &format!("bytes */{size}"));
            return Ok(problem.into_response());
        }
        Some(range) => {
            let to = range.to.min(size);
            let says = format!("bytes {}-{}/{size}", range.from, to - 1);
            let response = response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, says);
            (response, range.from..to)
        }
    };
    let response = response.header(header::CONTENT_LENGTH, bounds.end - bounds.start);
    finished(response.body(Body::from_stream(api.storage.read(blob, bounds).await?)))
}

/// What actions made is never shown by a browser as if it were ours.
fn to_be_saved(response: axum::http::response::Builder, name: Option<&str>) -> axum::http::response::Builder {
    let safe = |letter: char| letter.is_ascii_alphanumeric() || "._-+ ".contains(letter);
    let name: String =
        name.unwrap_or("blob").chars().map(|letter| if safe(letter) { letter } else { '_' }).collect();
    response
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
        .header(header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\""))
}

fn finished(response: Result<Response<Body>, axum::http::Error>) -> Result<Response<Body>, ApiError> {
    response.map_err(|error| Problem::internal(&error).into())
}

/// The wall clock, by which things expire.
pub(super) fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}
