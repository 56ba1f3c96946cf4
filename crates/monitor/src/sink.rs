//! Hands events to the controller. The one place that knows how the controller is asked.

use std::time::Duration;

use async_trait::async_trait;
use reqwest::{StatusCode, header};
use sealci_core::event::Event;
use sealci_service::problem::chain;
use serde_json::{Value, json};

use crate::ServeError;
use crate::config::ControllerAddress;

/// How long the controller has to answer. It may fetch from the repository meanwhile to read the manifest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// More of an answer than this is not read.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// An event with all that makes its identity: delivering the same value again is harmless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundEvent {
    pub repository_url: String,
    pub event: Event,
    pub manifest: WhichManifest,
}

/// The manifest of an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WhichManifest {
    /// At this path, at the event's revision.
    InRepository(String),
    /// This text.
    Given(String),
}

/// The controller's word on an event; it will not change by asking again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivered {
    /// There is a pipeline of it, new or from an earlier delivery.
    Accepted { pipeline_id: String },
    /// There will be none: the manifest is missing or invalid, say.
    Refused { reason: String },
}

/// Why an event could not be handed over. Later it may be.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct SinkError {
    pub reason: String,
    /// When the other side asked to be left alone until.
    pub retry_after: Option<Duration>,
}

/// Takes events.
///
/// An error means that nothing is known: the event may have been taken. It is delivered again, and whoever takes it
/// knows it by its identity.
#[async_trait]
pub trait EventSink: Send + Sync {
    async fn deliver(&self, event: &OutboundEvent) -> Result<Delivered, SinkError>;
}

/// The controller's `POST /api/v1/pipelines`.
#[derive(Debug)]
pub struct ControllerSink {
    client: reqwest::Client,
    url: reqwest::Url,
    authorization: header::HeaderValue,
}

impl ControllerSink {
    pub fn new(address: &ControllerAddress) -> Result<Self, ServeError> {
        let fail = |why: String| ServeError::Controller { url: address.url.clone(), why };
        let base = address.url.trim_end_matches('/');
        let url: reqwest::Url =
            format!("{base}/api/v1/pipelines").parse().map_err(|error| fail(format!("{error}")))?;
        let mut authorization = header::HeaderValue::from_str(&format!("Bearer {}", address.token.expose()))
            .map_err(|_| fail("its token has characters that no header may hold".to_owned()))?;
        authorization.set_sensitive(true);
        let mut client = reqwest::Client::builder()
            .timeout(ANSWER_TIMEOUT)
            .connect_timeout(Duration::from_secs(10))
            .redirect(reqwest::redirect::Policy::none());
        if let Some(pem) = &address.ca_pem {
            let trusted = reqwest::Certificate::from_pem_bundle(pem);
            client = client.tls_certs_only(trusted.map_err(|error| fail(chain(&error)))?);
        } else if url.scheme() == "http" {
            // This machine: no need of its certificate store, which a small image may lack.
            client = client.tls_certs_only([]);
        }
        let client = client.build().map_err(|error| fail(chain(&error)))?;
        Ok(Self { client, url, authorization })
    }
}

#[async_trait]
impl EventSink for ControllerSink {
    async fn deliver(&self, event: &OutboundEvent) -> Result<Delivered, SinkError> {
        let request = self.client.post(self.url.clone());
        let request = request.header(header::AUTHORIZATION, self.authorization.clone()).json(&body_of(event));
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let retry_after = response.headers().get(header::RETRY_AFTER);
        let retry_after =
            retry_after.and_then(|value| value.to_str().ok()?.parse().ok()).map(Duration::from_secs);
        let answer = read(response).await?;
        judge(status, &answer, retry_after)
    }
}

fn body_of(event: &OutboundEvent) -> Value {
    let mut body = json!({
        "repo_url": event.repository_url,
        "revision": event.event.revision,
        "event": event.event.kind.as_str(),
    });
    if let Some(name) = &event.event.r#ref {
        body["ref"] = json!(name);
    }
    match &event.manifest {
        WhichManifest::InRepository(path) => body["manifest_path"] = json!(path),
        WhichManifest::Given(text) => body["body"] = json!(text),
    }
    body
}

async fn read(mut response: reqwest::Response) -> Result<Value, SinkError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_ANSWER_BYTES {
            break;
        }
    }
    Ok(serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

fn unreachable(error: reqwest::Error) -> SinkError {
    let reason = chain(&error.without_url());
    SinkError { reason: format!("the controller cannot be reached: {reason}"), retry_after: None }
}

/// Tells a final word from a failure that passes. A wrong token or address is the operator's to mend, and the event must
/// not be lost by it.
fn judge(status: StatusCode, answer: &Value, retry_after: Option<Duration>) -> Result<Delivered, SinkError> {
    if status.is_success() {
        return match answer["id"].as_str() {
            Some(id) => Ok(Delivered::Accepted { pipeline_id: id.to_owned() }),
            None => {
                Err(SinkError { reason: "the controller's answer names no pipeline".to_owned(), retry_after })
            }
        };
    }
    let said =
        ["detail", "title"].iter().find_map(|member| answer[member].as_str()).unwrap_or("no reason given");
    let errors = answer["errors"].as_array().into_iter().flatten();
    let rendered: Vec<&str> = errors.take(10).filter_map(|error| error["rendered"].as_str()).collect();
    let reason = [&[said][..], &rendered].concat().join("\n");
    let passes = status.is_server_error()
        || status.is_redirection()
        || matches!(status.as_u16(), 401 | 403 | 404 | 405 | 408 | 421 | 425 | 429);
    if passes {
        return Err(SinkError { reason: format!("the controller answered {status}: {reason}"), retry_after });
    }
    Ok(Delivered::Refused { reason: reason.chars().take(8_000).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_controllers_final_word_ends_an_event() {
        let ok = json!({"id": "x"});
        for status in [200, 201] {
            let judged = judge(StatusCode::from_u16(status).unwrap(), &ok, None).unwrap();
            assert_eq!(judged, Delivered::Accepted { pipeline_id: "x".into() });
        }
        for status in [301, 401, 403, 404, 408, 429, 500, 502, 503] {
            assert!(judge(StatusCode::from_u16(status).unwrap(), &Value::Null, None).is_err(), "{status}");
        }
        assert!(judge(StatusCode::OK, &Value::Null, None).is_err());
        let problem = json!({"title": "t", "detail": "no manifest", "errors": [{"rendered": "a.yaml:1:2"}]});
        for status in [400, 409, 413, 422] {
            let judged = judge(StatusCode::from_u16(status).unwrap(), &problem, None).unwrap();
            assert_eq!(judged, Delivered::Refused { reason: "no manifest\na.yaml:1:2".into() });
        }
    }
}
