//! Says over HTTP what went wrong, as RFC 9457 problems, and keeps apart what the caller and what the log are told.
//!
//! An internal error shows the caller an incident id and nothing else; the log has the same id with the cause.

use std::error::Error;
use std::fmt::Write as _;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{self, HeaderName, HeaderValue};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt as _, Limited};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::auth::Denied;

/// The largest JSON body taken where a route does not say otherwise: a manifest of 1 MiB, escaped, fits.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// How long a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// One problem, to be answered with.
#[derive(Debug)]
pub struct Problem(Box<Members>);

/// Boxed, as a problem is the error of nearly every function around it.
#[derive(Debug)]
struct Members {
    status: StatusCode,
    /// A URI that names the kind of problem; `about:blank` says no more than the status does (RFC 9457, 4.2.1).
    kind: String,
    title: String,
    detail: Option<String>,
    extra: Map<String, Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
    /// For the log only.
    cause: Option<String>,
}

impl Problem {
    /// A problem of the kind that the status names.
    pub fn new(status: StatusCode) -> Self {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        Self(Box::new(Members {
            status,
            kind: "about:blank".to_owned(),
            title,
            detail: None,
            extra: Map::new(),
            headers: Vec::new(),
            cause: None,
        }))
    }

    /// 400, with what is wrong and how to mend it.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST).detail(detail)
    }

    /// 404.
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND).detail(detail)
    }

    /// 409.
    pub fn conflict(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT).detail(detail)
    }

    /// 422, for a well-formed request that cannot be fulfilled as it is.
    pub fn unprocessable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY).detail(detail)
    }

    /// 500: the cause goes to the log, under an incident id that is all the caller sees.
    pub fn internal(cause: &(dyn Error + 'static)) -> Self {
        Self::hidden(StatusCode::INTERNAL_SERVER_ERROR, cause)
    }

    /// 503, for what a later attempt can mend; the cause is hidden as in [`Problem::internal`].
    pub fn unavailable(cause: &(dyn Error + 'static)) -> Self {
        Self::hidden(StatusCode::SERVICE_UNAVAILABLE, cause).header(header::RETRY_AFTER, "5")
    }

    fn hidden(status: StatusCode, cause: &(dyn Error + 'static)) -> Self {
        let incident = format!("{:016x}", rand::random::<u64>());
        let mut problem = Self::new(status)
            .detail(format!(
                "The service could not do this. Its log has the cause under incident {incident}."
            ))
            .with("incident", incident);
        problem.0.cause = Some(chain(cause));
        problem
    }

    #[must_use]
    pub fn kind(mut self, uri: impl Into<String>) -> Self {
        self.0.kind = uri.into();
        self
    }

    #[must_use]
    pub fn title(mut self, title: impl Into<String>) -> Self {
        self.0.title = title.into();
        self
    }

    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.0.detail = Some(detail.into());
        self
    }

    /// Adds a member of its own (RFC 9457, 3.2), such as `errors`.
    #[must_use]
    pub fn with(mut self, member: &str, value: impl Into<Value>) -> Self {
        self.0.extra.insert(member.to_owned(), value.into());
        self
    }

    /// Adds a header to the answer; a value that no header may hold is left out.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: &str) -> Self {
        self.0.headers.extend(HeaderValue::from_str(value).ok().map(|value| (name, value)));
        self
    }

    pub fn status(&self) -> StatusCode {
        self.0.status
    }

    fn body(&self) -> Value {
        let mut members = Map::new();
        members.insert("type".to_owned(), json!(self.0.kind));
        members.insert("title".to_owned(), json!(self.0.title));
        members.insert("status".to_owned(), json!(self.0.status.as_u16()));
        if let Some(detail) = &self.0.detail {
            members.insert("detail".to_owned(), json!(detail));
        }
        for (name, value) in &self.0.extra {
            members.entry(name.clone()).or_insert_with(|| value.clone());
        }
        Value::Object(members)
    }
}

/// An error and its causes, in one line, each once: some messages hold their cause's text already.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            let _ = write!(text, ": {cause}");
        }
        source = error.source();
    }
    text
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        if let Some(cause) = &self.0.cause {
            let incident = self.0.extra.get("incident").and_then(Value::as_str).unwrap_or_default();
            tracing::error!(incident, status = self.0.status.as_u16(), cause, "a request failed");
        }
        let content_type = [(header::CONTENT_TYPE, "application/problem+json")];
        let mut response = (self.0.status, content_type, self.body().to_string()).into_response();
        for (name, value) in self.0.headers {
            response.headers_mut().append(name, value);
        }
        response
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::NoToken | Denied::UnknownToken => Self::new(StatusCode::UNAUTHORIZED)
                .detail(denied.to_string())
                .header(header::WWW_AUTHENTICATE, "Bearer"),
            Denied::WrongRole { .. } => Self::new(StatusCode::FORBIDDEN).detail(denied.to_string()),
        }
    }
}

/// For `Router::fallback`.
pub async fn no_such_route(uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(200).collect();
    Problem::not_found(format!("There is nothing at `{path}`."))
}

/// For `Router::method_not_allowed_fallback`; axum adds the `Allow` header.
pub async fn no_such_method(method: Method, uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(200).collect();
    Problem::new(StatusCode::METHOD_NOT_ALLOWED).detail(format!("`{path}` does not take {method}."))
}

/// A JSON body of at most [`MAX_BODY_BYTES`], or the problem with it.
#[derive(Debug)]
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let essence = content_type.and_then(|text| text.split(';').next()).unwrap_or_default().trim();
        if !(essence.eq_ignore_ascii_case("application/json")
            || essence.to_ascii_lowercase().ends_with("+json"))
        {
            return Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE)
                .detail("The body must be JSON, with `Content-Type: application/json`."));
        }
        let body = read_body(request, MAX_BODY_BYTES).await?;
        let mut deserializer = serde_json::Deserializer::from_slice(&body);
        let value = T::deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
        value.map(Self).map_err(|error| match error.classify() {
            serde_json::error::Category::Data => {
                Problem::unprocessable(format!("The body does not fit: {error}."))
            }
            _ => Problem::bad_request(format!("The body is not JSON: {error}.")),
        })
    }
}

/// A path's parameters, or 404: a path that does not parse names nothing.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(_) => Err(no_such_route(parts.uri.clone()).await),
        }
    }
}

/// A query's parameters, or 400.
#[derive(Debug)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        query
            .map(|axum::extract::Query(value)| Self(value))
            .map_err(|rejection| Problem::bad_request(rejection.body_text()))
    }
}

/// Reads a body within a size and a time.
pub async fn read_body(request: Request, max_bytes: usize) -> Result<axum::body::Bytes, Problem> {
    let reading = Limited::new(request.into_body(), max_bytes).collect();
    match tokio::time::timeout(BODY_TIMEOUT, reading).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE)
                .detail(format!("The body is larger than {max_bytes} bytes.")))
        }
        Ok(Err(_)) => Err(Problem::bad_request("The body ended early.")),
        Err(_) => Err(Problem::new(StatusCode::REQUEST_TIMEOUT)
            .detail(format!("The body took longer than {} s.", BODY_TIMEOUT.as_secs()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    async fn shown(problem: Problem) -> (StatusCode, Value) {
        let response = problem.into_response();
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/problem+json");
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    #[test]
    fn each_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Sample(&'static str, #[source] Option<Box<Sample>>);
        let deep = Sample("deep", None);
        let middle = Sample("middle: deep", Some(Box::new(deep)));
        assert_eq!(chain(&Sample("top", Some(Box::new(middle)))), "top: middle: deep");
    }

    #[tokio::test]
    async fn a_problem_has_the_members_of_its_rfc_and_its_own() {
        let problem = Problem::unprocessable("line 3").with("errors", json!([1])).with("status", "no");
        let (status, body) = shown(problem).await;
        assert_eq!(status, 422);
        let expected = json!({
            "type": "about:blank", "title": "Unprocessable Entity", "status": 422, "detail": "line 3", "errors": [1],
        });
        assert_eq!(body, expected);
    }

    #[tokio::test]
    async fn an_internal_error_keeps_its_cause_to_itself() {
        let cause = std::io::Error::other("password hunter2 refused");
        let (status, body) = shown(Problem::internal(&cause)).await;
        assert_eq!(status, 500);
        assert!(!body.to_string().contains("hunter2"));
        assert_eq!(body["incident"].as_str().unwrap().len(), 16);
    }

    async fn take(content_type: &str, body: impl Into<Body>) -> Result<Vec<u32>, StatusCode> {
        let request = Request::post("/").header("content-type", content_type).body(body.into()).unwrap();
        let taken = Json::<Vec<u32>>::from_request(request, &()).await;
        taken.map(|Json(value)| value).map_err(|problem| problem.status())
    }

    #[tokio::test]
    async fn bodies_that_do_not_fit_are_refused_by_their_kind() {
        assert_eq!(take("application/json; charset=utf-8", "[1]").await, Ok(vec![1]));
        assert_eq!(take("text/plain", "[1]").await, Err(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        assert_eq!(take("application/json", "[1").await, Err(StatusCode::BAD_REQUEST));
        assert_eq!(take("application/json", "[1] x").await, Err(StatusCode::BAD_REQUEST));
        assert_eq!(take("application/json", "[\"x\"]").await, Err(StatusCode::UNPROCESSABLE_ENTITY));
        assert_eq!(
            take("application/json", "[".repeat(100_000)).await,
            Err(StatusCode::UNPROCESSABLE_ENTITY)
        );
        let huge = vec![b' '; MAX_BODY_BYTES + 1];
        assert_eq!(take("application/json", huge).await, Err(StatusCode::PAYLOAD_TOO_LARGE));
    }
}
