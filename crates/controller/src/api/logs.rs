//! Answers with logs: by byte range, and live.

use std::convert::Infallible;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::response::IntoResponse;
use axum::response::sse::{Event, KeepAlive, Sse};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use sealci_api::controller::types;
use sealci_core::ids::{ActionId, AttemptId};
use sealci_service::problem::{Path, Problem, Query};
use serde::Deserialize;
use tokio::sync::watch;
use uuid::Uuid;

use super::Api;
use super::error::ApiError;
use crate::storage::{LogReader, StorageError};
use crate::store::{LogExtent, LogPiece};

/// The log so far, or a part of it.
pub async fn read(
    State(api): State<Api>,
    Path(id): Path<(Uuid, u32)>,
    headers: HeaderMap,
) -> Result<Response<Body>, ApiError> {
    let (log, extent) = open(&api, attempt_id(id)).await?;
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let response = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::ACCEPT_RANGES, "bytes")
        .header("sealci-log-complete", extent.is_whole().to_string());
    let Some(range) = range.and_then(|text| parse_range(text, extent.end)) else {
        let cut = if extent.is_whole() { log.closed_because(extent.end).await? } else { None };
        let cut = cut.map(|reason| {
            Ok(Bytes::from(format!("\n[SealCI: the rest of this log is missing: {reason}]\n")))
        });
        return finish(response.body(begun(bytes_of(log, 0, extent.end).chain(stream::iter(cut))).await?));
    };
    let refuse = |detail: String| {
        Problem::new(StatusCode::RANGE_NOT_SATISFIABLE)
            .detail(detail)
            .header(header::CONTENT_RANGE, &format!("bytes */{}", extent.end))
    };
    if range.from >= extent.end {
        return Ok(refuse(format!("the log has {} bytes so far", extent.end)).into_response());
    }
    let mut to = range.to.min(extent.end);
    if let Some((gap_from, gap_to, reason)) = log.next_gap(range.from).await? {
        if gap_from <= range.from {
            let detail = format!("bytes {gap_from} to {gap_to} were not kept: {reason}. Go on at {gap_to}");
            return Ok(refuse(detail).into_response());
        }
        to = to.min(gap_from);
    }
    let response = response
        .status(StatusCode::PARTIAL_CONTENT)
        .header(header::CONTENT_RANGE, format!("bytes {}-{}/{}", range.from, to - 1, extent.end))
        .header(header::CONTENT_LENGTH, to - range.from);
    finish(response.body(begun(bytes_of(log, range.from, to)).await?))
}

/// A body whose beginning has been read: what cannot be read is answered with the reason, not with an end in the middle.
async fn begun(
    bytes: impl Stream<Item = Result<Bytes, StorageError>> + Send + 'static,
) -> Result<Body, ApiError> {
    let mut bytes = Box::pin(bytes);
    let first = bytes.next().await.transpose()?;
    Ok(Body::from_stream(stream::iter(first.map(Ok)).chain(bytes)))
}

fn finish(response: Result<Response<Body>, axum::http::Error>) -> Result<Response<Body>, ApiError> {
    response.map_err(|error| Problem::internal(&error).into())
}

/// Bytes `from..to`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ByteRange {
    pub from: u64,
    pub to: u64,
}

/// Reads one range of RFC 9110, section 14.1.2. Several ranges, or another unit, are answered with the whole, as the RFC
/// allows.
pub(super) fn parse_range(text: &str, end: u64) -> Option<ByteRange> {
    let range = text.strip_prefix("bytes=")?.trim();
    let (first, last) = range.split_once('-')?;
    match (first, last) {
        ("", last) => {
            let suffix: u64 = last.parse().ok()?;
            Some(ByteRange { from: end.saturating_sub(suffix), to: end })
        }
        (first, "") => Some(ByteRange { from: first.parse().ok()?, to: u64::MAX }),
        (first, last) => {
            let (from, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            (from <= last).then_some(ByteRange { from, to: last.saturating_add(1) })
        }
    }
}

/// Bytes `from..to`, piece by piece; a gap is one line that says so.
fn bytes_of(log: LogReader, from: u64, to: u64) -> impl Stream<Item = Result<Bytes, StorageError>> {
    futures_util::stream::try_unfold((log, from), move |(log, offset)| async move {
        if offset >= to {
            return Ok(None);
        }
        Ok(match log.piece(offset).await? {
            None => None,
            Some(LogPiece::Bytes { bytes, .. }) => {
                let wanted = usize::try_from(to - offset).unwrap_or(usize::MAX).min(bytes.len());
                Some((bytes.slice(..wanted), (log, offset + wanted as u64)))
            }
            Some(LogPiece::Gap { from, to, reason }) => {
                let line = format!("\n[SealCI: {} bytes of this log were not kept: {reason}]\n", to - from);
                Some((Bytes::from(line), (log, to)))
            }
        })
    })
}

/// Where to begin.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FollowQuery {
    #[serde(default)]
    from: u64,
}

/// The log as it grows.
pub async fn follow(
    State(api): State<Api>,
    Path(id): Path<(Uuid, u32)>,
    Query(query): Query<FollowQuery>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let id = attempt_id(id);
    let resumed = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let news = api.watchers.logs.subscribe(id);
    let from = resumed.unwrap_or(query.from);
    let (log, extent) = open(&api, id).await?;
    if extent.is_whole() {
        // What cannot be read is answered with the reason.
        log.piece(from).await?;
    }
    let follower = Follower { log, news, api, told_of_cut: false };
    let start = Some((follower, from));
    let stream = futures_util::stream::unfold(start, |state| async move {
        let (mut follower, offset) = state?;
        let (event, next) = follower.next(offset).await?;
        Some((Ok(event), next.map(|next| (follower, next))))
    });
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}

struct Follower {
    log: LogReader,
    news: watch::Receiver<()>,
    api: Api,
    /// The reader knows by now that the log ends without its end.
    told_of_cut: bool,
}

impl Follower {
    /// The next event and the offset after it; no offset after the last. It reads at its reader's pace: a slow one slows
    /// nobody else.
    async fn next(&mut self, offset: u64) -> Option<(Event, Option<u64>)> {
        loop {
            self.news.mark_unchanged();
            let extent = self.log.extent().await.ok()??;
            match self.log.piece(offset).await.ok()? {
                Some(LogPiece::Bytes { offset, bytes }) => {
                    let next = offset + bytes.len() as u64;
                    let chunk = types::LogChunk { offset: signed(offset), data: STANDARD.encode(&bytes) };
                    return Some((event("chunk", next, &chunk)?, Some(next)));
                }
                Some(LogPiece::Gap { from, to, reason }) => {
                    let gap = types::LogGap { offset: signed(from), to: signed(to), reason };
                    return Some((event("gap", to, &gap)?, Some(to)));
                }
                None if extent.is_whole() => {
                    if !std::mem::replace(&mut self.told_of_cut, true)
                        && let Some(reason) = self.log.closed_because(extent.end).await.ok()?
                    {
                        let (offset, to) = (signed(extent.end), signed(extent.end));
                        let gap = types::LogGap { offset, to, reason };
                        return Some((event("gap", extent.end, &gap)?, Some(extent.end)));
                    }
                    let end = types::LogEnd { length: signed(extent.end) };
                    return Some((event("end", extent.end, &end)?, None));
                }
                None => tokio::select! {
                    () = self.api.stop.cancelled() => return None,
                    changed = self.news.changed() => changed.ok()?,
                },
            }
        }
    }
}

fn event(kind: &str, next: u64, data: &impl serde::Serialize) -> Option<Event> {
    Event::default().event(kind).id(next.to_string()).json_data(data).ok()
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

async fn open(api: &Api, id: AttemptId) -> Result<(LogReader, LogExtent), ApiError> {
    let log = api.storage.log(id);
    match log.extent().await? {
        Some(extent) => Ok((log, extent)),
        None => Err(Problem::not_found("there is no such attempt").into()),
    }
}

fn attempt_id((action, number): (Uuid, u32)) -> AttemptId {
    AttemptId { action: ActionId::from_uuid(action), number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_as_the_rfc_says() {
        let range = |from, to| Some(ByteRange { from, to });
        assert_eq!(parse_range("bytes=0-9", 100), range(0, 10));
        assert_eq!(parse_range("bytes=90-", 100), range(90, u64::MAX));
        assert_eq!(parse_range("bytes=-10", 100), range(90, 100));
        assert_eq!(parse_range("bytes=-1000", 100), range(0, 100));
        for other in ["bytes=9-0", "bytes=0-1,3-4", "lines=0-1", "bytes=", "bytes=a-b", "bytes=-", ""] {
            assert_eq!(parse_range(other, 100), None, "{other}");
        }
    }
}
