//! Does what each route says, between the store and the watch.

use std::sync::Arc;

use axum::Json as Answer;
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use sealci_core::ids::ConfigurationId;
use sealci_service::problem::{Json, Path, Problem, Query, read_body};
use serde::Deserialize;

use super::shown::{ShownConfiguration, ShownHealth, ShownManifest, ShownPage};
use crate::configuration::{MAX_MANIFEST_BYTES, Settings, SettingsInput, check_manifest};
use crate::status::now;
use crate::store::{StoreError, Stored};
use crate::watch::Watch;

type Shared = State<Arc<Watch>>;
type Shown = Result<Answer<ShownConfiguration>, Problem>;

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Database(_) => Self::unavailable(&error),
            StoreError::Unreadable { .. } | StoreError::Superseded => Self::internal(&error),
        }
    }
}

#[derive(Debug, Deserialize)]
pub struct PageQuery {
    limit: Option<u64>,
    cursor: Option<String>,
}

pub async fn list(
    State(watch): Shared,
    Query(query): Query<PageQuery>,
) -> Result<Answer<ShownPage>, Problem> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::bad_request("`limit` must be between 1 and 200."));
    }
    let before = query.cursor.map(|cursor| cursor.parse::<i64>()).transpose();
    let before =
        before.map_err(|_| Problem::bad_request("`cursor` is not one that a page gave as `next`."))?;
    let mut stored = watch.store.page(limit + 1, before).await?;
    let more = stored.len() as u64 > limit;
    stored.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let next = stored.last().filter(|_| more).map(|last| last.number.to_string());
    let mut configurations = Vec::with_capacity(stored.len());
    for stored in stored {
        configurations.push(ShownConfiguration::of(&watch, stored).await?);
    }
    Ok(Answer(ShownPage { configurations, next }))
}

pub async fn add(
    State(watch): Shared,
    Json(input): Json<SettingsInput>,
) -> Result<impl IntoResponse, Problem> {
    let (settings, manifest) = validate(&watch, input)?;
    let unix_ms = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or_default();
    let id = ConfigurationId::from_parts(unix_ms, &rand::random());
    let stored = watch.store.add(id, &settings, manifest.as_deref(), now()).await?;
    watch.configurations_changed();
    let location = HeaderValue::from_str(&format!("/api/v1/configurations/{id}")).ok();
    let location = location.map(|location| [(header::LOCATION, location)]);
    Ok((StatusCode::CREATED, location, Answer(ShownConfiguration::of(&watch, stored).await?)).into_response())
}

pub async fn show(State(watch): Shared, Path(id): Path<ConfigurationId>) -> Shown {
    let stored = watch.store.find(id).await?;
    answer(&watch, stored, id).await
}

pub async fn update(
    State(watch): Shared,
    Path(id): Path<ConfigurationId>,
    Json(input): Json<SettingsInput>,
) -> Shown {
    let (settings, manifest) = validate(&watch, input)?;
    let stored = watch.store.update(id, &settings, manifest.as_deref()).await?;
    watch.configurations_changed();
    answer(&watch, stored, id).await
}

pub async fn remove(State(watch): Shared, Path(id): Path<ConfigurationId>) -> Result<StatusCode, Problem> {
    let deleted = watch.store.delete(id).await?;
    watch.configurations_changed();
    if deleted { Ok(StatusCode::NO_CONTENT) } else { Err(unknown(id)) }
}

pub async fn show_actions_file(
    State(watch): Shared,
    Path(id): Path<ConfigurationId>,
) -> Result<Answer<ShownManifest>, Problem> {
    let stored = watch.store.find(id).await?.ok_or_else(|| unknown(id))?;
    let none = || Problem::not_found("No manifest is uploaded: the one in the repository counts.");
    let digest = stored.manifest_digest.ok_or_else(none)?;
    let body = watch.store.manifest(&digest).await?.ok_or_else(none)?;
    Ok(Answer(ShownManifest { body }))
}

pub async fn upload_actions_file(
    State(watch): Shared,
    Path(id): Path<ConfigurationId>,
    request: Request,
) -> Shown {
    let body = read_manifest(request).await?;
    check_manifest(&body).map_err(|why| Problem::unprocessable(format!("This is no manifest: {why}.")))?;
    let stored = watch.store.set_manifest(id, Some(&body)).await?;
    answer(&watch, stored, id).await
}

pub async fn delete_actions_file(State(watch): Shared, Path(id): Path<ConfigurationId>) -> Shown {
    let stored = watch.store.set_manifest(id, None).await?;
    answer(&watch, stored, id).await
}

pub async fn poll(
    State(watch): Shared,
    Path(id): Path<ConfigurationId>,
) -> Result<(StatusCode, Answer<ShownConfiguration>), Problem> {
    let stored = watch.store.find(id).await?.ok_or_else(|| unknown(id))?;
    if !stored.settings.enabled {
        return Err(Problem::conflict("The configuration is not enabled, so its repository is left alone."));
    }
    watch.poke(id);
    Ok((StatusCode::ACCEPTED, Answer(ShownConfiguration::of(&watch, stored).await?)))
}

pub async fn health() -> Answer<ShownHealth> {
    Answer(ShownHealth { status: "ok" })
}

pub async fn readiness(State(watch): Shared) -> Result<Answer<ShownHealth>, Problem> {
    watch.store.ping().await.map_err(|error| Problem::unavailable(&error))?;
    Ok(Answer(ShownHealth { status: "ok" }))
}

fn validate(watch: &Watch, input: SettingsInput) -> Result<(Settings, Option<String>), Problem> {
    let knows = |name: &str| watch.config.credentials.contains_key(name);
    input.validate(&watch.config.transports, &knows).map_err(|errors| {
        let all: Vec<String> =
            errors.iter().map(|error| format!("{}: {}", error.setting, error.message)).collect();
        Problem::unprocessable(all.join("; ")).with("errors", serde_json::json!(errors))
    })
}

/// A manifest as it is, or in JSON.
async fn read_manifest(request: Request) -> Result<String, Problem> {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = content_type.and_then(|text| text.split(';').next()).unwrap_or_default().trim();
    const PLAIN: [&str; 4] = ["text/yaml", "application/yaml", "application/x-yaml", "text/x-yaml"];
    if PLAIN.iter().any(|plain| essence.eq_ignore_ascii_case(plain)) {
        let bytes = read_body(request, MAX_MANIFEST_BYTES).await?;
        return String::from_utf8(bytes.into())
            .map_err(|_| Problem::unprocessable("A manifest is UTF-8 text, which this is not."));
    }
    let Json(manifest) = Json::<ShownManifest>::from_request(request, &()).await?;
    Ok(manifest.body)
}

async fn answer(watch: &Watch, stored: Option<Stored>, id: ConfigurationId) -> Shown {
    let stored = stored.ok_or_else(|| unknown(id))?;
    Ok(Answer(ShownConfiguration::of(watch, stored).await?))
}

fn unknown(id: ConfigurationId) -> Problem {
    Problem::not_found(format!("There is no configuration {id}."))
}
