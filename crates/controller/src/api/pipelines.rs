//! Answers about pipelines and their actions.

use std::convert::Infallible;

use axum::Json;
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use futures_util::Stream;
use sealci_api::controller::types;
use sealci_core::event::EventKind;
use sealci_core::ids::{ActionId, PipelineId};
use sealci_core::pipeline::RerunScope;
use sealci_core::repository::RepositoryIdentity;
use sealci_service::problem::{self, Path, Problem, Query};
use serde::Deserialize;
use uuid::Uuid;

use super::error::ApiError;
use super::kept::now_ms;
use super::{Api, view};
use crate::dispatch::Created;
use crate::intake::{self, Request as IntakeRequest};
use crate::store::ListFilter;

type Answer<T> = Result<Json<T>, ApiError>;

/// Makes a pipeline of an event and a manifest.
pub async fn create(
    State(api): State<Api>,
    headers: HeaderMap,
    request: Request,
) -> Result<(StatusCode, Json<types::Pipeline>), ApiError> {
    let _place = api.gate.enter(&headers)?;
    let is_form = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.starts_with("multipart/form-data"));
    let mut wanted = if is_form { of_form(request).await? } else { of_json(request).await? };
    if let Some(key) = headers.get("idempotency-key") {
        let key = key.to_str().map_err(|_| Problem::bad_request("`Idempotency-Key` must be plain text"))?;
        wanted.request_id.get_or_insert_with(|| key.to_owned());
    }
    if wanted.request_id.as_ref().is_some_and(|id| id.is_empty() || id.len() > 128) {
        return Err(Problem::bad_request("a request id has 1 to 128 bytes").into());
    }
    let new = intake::prepare(wanted, api.repositories.as_ref()).await?;
    let (status, id) = match api.dispatch.create(new).await? {
        Created::Now(id) => (StatusCode::CREATED, id),
        Created::Before(id) => (StatusCode::OK, id),
    };
    Ok((status, Json(shown(&api, id, false).await?)))
}

async fn of_json(request: Request) -> Result<IntakeRequest, ApiError> {
    let problem::Json(wanted) = problem::Json::<types::CreatePipeline>::from_request(request, &()).await?;
    Ok(IntakeRequest {
        repo_url: wanted.repo_url.to_string(),
        r#ref: wanted.ref_,
        revision: wanted.revision,
        event: wanted.event.map(event_kind),
        body: wanted.body.map(|body| body.to_string()),
        manifest_path: Some(wanted.manifest_path),
        request_id: wanted.request_id.map(|id| id.to_string()),
    })
}

fn event_kind(event: types::CreatePipelineEvent) -> EventKind {
    match event {
        types::CreatePipelineEvent::Push => EventKind::Push,
        types::CreatePipelineEvent::Tag => EventKind::Tag,
        types::CreatePipelineEvent::Manual => EventKind::Manual,
    }
}

async fn of_form(request: Request) -> Result<IntakeRequest, ApiError> {
    let unreadable =
        |error: &dyn std::fmt::Display| Problem::bad_request(format!("the form cannot be read: {error}"));
    let mut form = Multipart::from_request(request, &()).await.map_err(|error| unreadable(&error))?;
    let mut wanted = IntakeRequest::default();
    while let Some(field) = form.next_field().await.map_err(|error| unreadable(&error.body_text()))? {
        let name = field.name().unwrap_or_default().to_owned();
        let text =
            field.text().await.map_err(|error| Problem::new(error.status()).detail(error.body_text()))?;
        match name.as_str() {
            "repo_url" => wanted.repo_url = text,
            "ref" => wanted.r#ref = Some(text),
            "revision" => wanted.revision = Some(text),
            "event" => {
                let event =
                    text.parse().map_err(|_| Problem::bad_request("`event` is push, tag or manual"))?;
                wanted.event = Some(event_kind(event));
            }
            "body" => wanted.body = Some(text),
            "manifest_path" => wanted.manifest_path = Some(text),
            "request_id" => wanted.request_id = Some(text),
            other => {
                let other: String = other.chars().take(64).flat_map(char::escape_default).collect();
                return Err(Problem::bad_request(format!("the form has an unknown field `{other}`")).into());
            }
        }
    }
    if wanted.repo_url.is_empty() {
        return Err(Problem::bad_request("the form needs `repo_url`").into());
    }
    Ok(wanted)
}

/// What a list may be narrowed by.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    limit: Option<u64>,
    cursor: Option<String>,
    number: Option<i64>,
    repository: Option<String>,
    r#ref: Option<String>,
    revision: Option<String>,
    name: Option<String>,
    state: Option<types::PipelineState>,
    outcome: Option<types::PipelineOutcome>,
}

/// Lists pipelines, newest first.
pub async fn list(State(api): State<Api>, Query(query): Query<ListQuery>) -> Answer<types::PipelinePage> {
    let limit = query.limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(Problem::bad_request("`limit` is 1 to 200").into());
    }
    let below = query.cursor.as_deref().map(read_cursor).transpose()?;
    let filter = ListFilter {
        number: query.number,
        repository: query.repository.map(|text| identity_of(&text)),
        refs: query.r#ref.map(|name| full_names(&name)).unwrap_or_default(),
        revision: query.revision,
        name: query.name,
        state: query.state.map(|state| state.to_string()),
        outcome: query.outcome.map(|outcome| outcome.to_string()),
    };
    let page = api.store.list(&filter, below, limit).await?;
    Ok(Json(types::PipelinePage {
        pipelines: page.pipelines.iter().map(view::pipeline).collect(),
        next: page.next.map(|number| format!("before-{number}")),
    }))
}

fn read_cursor(cursor: &str) -> Result<i64, Problem> {
    let number = cursor.strip_prefix("before-").and_then(|number| number.parse().ok());
    number.ok_or_else(|| Problem::bad_request("`cursor` must be the `next` of the page before"))
}

/// A URL in any form, or an identity as it is shown.
pub(super) fn identity_of(text: &str) -> String {
    RepositoryIdentity::of_url(text).map_or_else(|_| text.to_owned(), |identity| identity.to_string())
}

/// A short name may be a branch's or a tag's.
fn full_names(name: &str) -> Vec<String> {
    if name.starts_with("refs/") {
        vec![name.to_owned()]
    } else {
        vec![format!("refs/heads/{name}"), format!("refs/tags/{name}")]
    }
}

/// How much of a pipeline is wanted.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShowQuery {
    #[serde(default)]
    verbose: bool,
}

/// Shows one pipeline with its actions.
pub async fn show(
    State(api): State<Api>,
    Path(id): Path<Uuid>,
    Query(query): Query<ShowQuery>,
) -> Answer<types::Pipeline> {
    Ok(Json(shown(&api, PipelineId::from_uuid(id), query.verbose).await?))
}

/// The manifest as it was written.
pub async fn manifest(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::Manifest> {
    let row = api.store.pipeline_row(PipelineId::from_uuid(id)).await?.ok_or_else(no_such_pipeline)?;
    Ok(Json(types::Manifest { path: row.manifest_path, body: row.manifest }))
}

/// Wishes the pipeline's round ended.
pub async fn cancel(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::Pipeline> {
    let id = api.dispatch.cancel(PipelineId::from_uuid(id)).await?;
    Ok(Json(shown(&api, id, false).await?))
}

/// Opens the next round.
pub async fn rerun(
    State(api): State<Api>,
    Path(id): Path<Uuid>,
    problem::Json(wanted): problem::Json<types::Rerun>,
) -> Answer<types::Pipeline> {
    let scope = match wanted.scope {
        types::RerunScope::All => RerunScope::All,
        types::RerunScope::Failed => RerunScope::Failed,
    };
    let id = api.dispatch.rerun(PipelineId::from_uuid(id), scope, wanted.request_id.to_string()).await?;
    Ok(Json(shown(&api, id, false).await?))
}

/// The actions of a pipeline, with every attempt.
pub async fn actions(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::ActionList> {
    let actions = shown(&api, PipelineId::from_uuid(id), true).await?.actions;
    Ok(Json(types::ActionList { actions }))
}

/// One action, with every attempt.
pub async fn action(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::Action> {
    let row = api.store.action(ActionId::from_uuid(id)).await?.ok_or_else(no_such_action)?;
    let pipeline = shown(&api, PipelineId::from_uuid(row.pipeline_id), true).await?;
    let action = pipeline.actions.into_iter().find(|action| action.id == id);
    Ok(Json(action.ok_or_else(no_such_action)?))
}

/// Why is the action where it is?
pub async fn why(State(api): State<Api>, Path(id): Path<Uuid>) -> Answer<types::Why> {
    let id = ActionId::from_uuid(id);
    let row = api.store.action(id).await?.ok_or_else(no_such_action)?;
    let reasons = api.dispatch.why(id).await?;
    Ok(Json(types::Why { state: row.state.parse().unwrap_or(types::ActionState::Pending), reasons }))
}

/// Follows one pipeline: it as it stands, at once and after each change.
pub async fn watch(
    State(api): State<Api>,
    Path(id): Path<Uuid>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let id = PipelineId::from_uuid(id);
    let changes = api.watchers.pipelines.subscribe(id);
    shown(&api, id, false).await?; // an unknown one is a 404, not an empty stream
    let start = Some((api, changes, None::<String>));
    let stream = futures_util::stream::unfold(start, move |state| async move {
        let (api, mut changes, sent) = state?;
        loop {
            changes.mark_unchanged();
            let Ok(pipeline) = shown(&api, id, true).await else { return None };
            let is_over = is_settled(&pipeline);
            let text = serde_json::to_string(&pipeline).ok()?;
            if sent.as_ref() != Some(&text) {
                let event = Event::default().event("pipeline").data(&text);
                return Some((Ok(event), (!is_over).then_some((api, changes, Some(text)))));
            }
            tokio::select! {
                () = api.stop.cancelled() => return None,
                changed = changes.changed() => changed.ok()?,
            }
        }
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}

/// Whether the round has finished and every log that counts is whole.
fn is_settled(pipeline: &types::Pipeline) -> bool {
    let is_whole = |attempt: &types::Attempt| attempt.fenced || attempt.log_length == Some(attempt.log_end);
    pipeline.state == types::PipelineState::Finished
        && pipeline.actions.iter().filter_map(|action| action.attempts.last()).all(is_whole)
}

async fn shown(api: &Api, id: PipelineId, verbose: bool) -> Result<types::Pipeline, ApiError> {
    let story = api.store.story(id).await?.ok_or_else(no_such_pipeline)?;
    let names = if verbose { api.store.agent_names().await? } else { Default::default() };
    let mut shown = view::story(&story, &names, verbose)?;
    if verbose {
        let artifacts = api.store.artifacts_of_pipeline(id, now_ms()).await?;
        let reports = api.store.reports_of_pipeline(id).await?;
        view::add_kept(&mut shown, &story, &artifacts, &reports);
    }
    Ok(shown)
}

pub(super) fn no_such_pipeline() -> Problem {
    Problem::not_found("there is no such pipeline")
}

fn no_such_action() -> Problem {
    Problem::not_found("there is no such action")
}
