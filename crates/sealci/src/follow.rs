//! Follows one pipeline while it runs: its states and the logs of all its attempts, into a [`View`].
//!
//! One task per stream, all owned by the [`JoinSet`] of the follower: dropping it ends them. A stream that breaks is
//! opened again where it ended (logs by offset, states are whole anyway); what stays unreachable for a minute is given
//! up, and what is refused is not asked for again.

use std::collections::{BTreeSet, VecDeque};
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::TryStreamExt;
use sealci_api::controller::{ByteStream, Error, ResponseValue, types};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::connect::Server;
use crate::exit::{Exit, Failure};
use crate::screen::Screen;
use crate::sse;
use crate::terminal::Terminal;
use crate::view::{AttemptId, Style, Update, View};

/// How long a stream may stay broken.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// A pipeline of which nothing has moved for so long is asked about.
const STANDSTILL: Duration = Duration::from_secs(3);

/// Shows the pipeline until it ends; its outcome is the exit.
pub async fn pipeline(server: &Server, pipeline: Uuid, style: impl Into<Style>) -> Result<Exit, Failure> {
    let style = style.into();
    let mut view = View::new(style);
    let mut screen = Screen::new(match style {
        Style::Words(terminal) => terminal,
        Style::Json => Terminal::PLAIN,
    });
    let outcome = watch(server, pipeline, &mut view, &mut screen).await;
    screen.clear_status();
    if outcome.is_ok() {
        view.summary();
    }
    screen.write(&view.take())?;
    outcome.map(Exit::of_outcome)
}

async fn watch(
    server: &Server,
    pipeline: Uuid,
    view: &mut View,
    screen: &mut Screen,
) -> Result<types::PipelineOutcome, Failure> {
    // Bounded: a terminal that is slow to print slows the streams down instead of filling memory.
    let (updates, mut news) = mpsc::channel(256);
    let mut tasks = JoinSet::new();
    tasks.spawn(follow_states(server.clone(), pipeline, updates.clone()));
    let mut followed = BTreeSet::new();
    let mut standstill: Option<(Uuid, tokio::time::Instant)> = None;
    let mut asked = BTreeSet::new();
    loop {
        tokio::select! {
            Some(action) = long(standstill), if standstill.is_some() => {
                asked.insert(action);
                tasks.spawn(ask_why(server.clone(), action, updates.clone()));
            }
            Some(update) = news.recv() => {
                view.update(update);
                // What has gathered meanwhile is drawn in one go.
                while let Ok(update) = news.try_recv() {
                    view.update(update);
                }
            }
            Some(ended) = tasks.join_next() => {
                ended.map_err(|error| {
                    Failure::infrastructure(format!("following the pipeline broke off: {error}"))
                })??;
                while let Ok(update) = news.try_recv() {
                    view.update(update);
                }
            }
        }
        for attempt in view.to_follow() {
            if followed.insert(attempt) {
                tasks.spawn(follow_log(server.clone(), attempt, 0, updates.clone()));
            }
        }
        let waiting = view.standstill().filter(|action| !asked.contains(action));
        if waiting != standstill.map(|(action, _)| action) {
            standstill = waiting.map(|action| (action, tokio::time::Instant::now() + STANDSTILL));
        }
        screen.write(&view.take())?;
        screen.status(&view.status_line());
        if let Some(outcome) = view.outcome() {
            return Ok(outcome);
        }
        if tasks.is_empty() && news.is_empty() {
            return Err(Failure::infrastructure(format!(
                "{} ended a pipeline without an outcome",
                server.url
            )));
        }
    }
}

/// Waits until what stands still has done so for long.
async fn long(standstill: Option<(Uuid, tokio::time::Instant)>) -> Option<Uuid> {
    let (action, deadline) = standstill?;
    tokio::time::sleep_until(deadline).await;
    Some(action)
}

/// Has shown why an action waits. Whoever cannot be asked is found out about by the other streams.
async fn ask_why(server: Server, action: Uuid, updates: mpsc::Sender<Update>) -> Result<(), Failure> {
    if let Ok(why) = server.client.why_action().action_id(action).send().await {
        // Nobody listens any more: there is nothing left to do.
        let _ = updates.send(Update::Waits(action, why.into_inner().reasons)).await;
    }
    Ok(())
}

/// The pipeline's states, one after the other, until it is finished.
async fn follow_states(server: Server, pipeline: Uuid, updates: mpsc::Sender<Update>) -> Result<(), Failure> {
    let mut patience = Patience::new();
    while let Err(broken) = stream_states(&server, pipeline, &updates, &mut patience).await {
        patience.wait(&server, broken).await?;
    }
    Ok(())
}

async fn stream_states(
    server: &Server,
    pipeline: Uuid,
    updates: &mpsc::Sender<Update>,
    patience: &mut Patience,
) -> Result<(), Broken> {
    let answer = server.client.watch_pipeline().pipeline_id(pipeline).send().await;
    let mut events = Events::open(server, answer).await?;
    loop {
        let event = events.next(patience).await?;
        if event.kind != "pipeline" {
            continue;
        }
        let state: types::Pipeline =
            serde_json::from_str(&event.data).map_err(|error| malformed(server, &error))?;
        let finished = state.state == types::PipelineState::Finished;
        // Nobody listens any more: there is nothing left to do.
        if updates.send(Update::Pipeline(Box::new(state))).await.is_err() || finished {
            return Ok(());
        }
    }
}

/// One attempt's log from an offset to its end.
pub async fn follow_log(
    server: Server,
    attempt: AttemptId,
    from: u64,
    updates: mpsc::Sender<Update>,
) -> Result<(), Failure> {
    let mut offset = from;
    let mut patience = Patience::new();
    while let Err(broken) = stream_log(&server, attempt, &mut offset, &updates, &mut patience).await {
        patience.wait(&server, broken).await?;
    }
    Ok(())
}

async fn stream_log(
    server: &Server,
    attempt: AttemptId,
    offset: &mut u64,
    updates: &mpsc::Sender<Update>,
    patience: &mut Patience,
) -> Result<(), Broken> {
    let from = i64::try_from(*offset).unwrap_or(i64::MAX);
    let number = NonZeroU32::new(attempt.number)
        .ok_or_else(|| Failure::infrastructure(format!("{} named an attempt 0", server.url)))?;
    let answer = server.client.follow_log().action_id(attempt.action).number(number).from(from).send().await;
    let answer = match answer {
        // It has been deleted: its pipeline has an outcome all the same.
        Err(error) if error.status().is_some_and(|status| status.as_u16() == 410) => {
            let reason = server.failure(error).await.message;
            for update in [Update::Gap(attempt, 0, reason), Update::LogEnd(attempt)] {
                if updates.send(update).await.is_err() {
                    break;
                }
            }
            return Ok(());
        }
        answer => answer,
    };
    let mut events = Events::open(server, answer).await?;
    loop {
        let event = events.next(patience).await?;
        let update = match log_event(&event, offset).map_err(|error| malformed(server, &error))? {
            Some(LogEvent::Bytes(bytes)) => Update::Log(attempt, bytes),
            Some(LogEvent::Gap { missing_bytes, reason }) => Update::Gap(attempt, missing_bytes, reason),
            Some(LogEvent::End) => Update::LogEnd(attempt),
            None => continue,
        };
        let ended = matches!(update, Update::LogEnd(_));
        if updates.send(update).await.is_err() || ended {
            return Ok(());
        }
    }
}

#[derive(Debug, PartialEq)]
enum LogEvent {
    Bytes(Vec<u8>),
    Gap { missing_bytes: u64, reason: String },
    End,
}

/// What of an event is new behind `offset`, which moves on. A server that repeats bytes after a reconnect is tolerated.
fn log_event(event: &sse::Event, offset: &mut u64) -> Result<Option<LogEvent>, serde_json::Error> {
    use serde::de::Error as _;
    let unsigned = |value: i64| u64::try_from(value).map_err(serde_json::Error::custom);
    match event.kind.as_str() {
        "chunk" => {
            let chunk: types::LogChunk = serde_json::from_str(&event.data)?;
            let mut bytes = STANDARD.decode(chunk.data).map_err(serde_json::Error::custom)?;
            let start = unsigned(chunk.offset)?;
            let known = usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
            *offset = (*offset).max(start + bytes.len() as u64);
            if known >= bytes.len() {
                return Ok(None);
            }
            bytes.drain(..known);
            Ok(Some(LogEvent::Bytes(bytes)))
        }
        "gap" => {
            let gap: types::LogGap = serde_json::from_str(&event.data)?;
            let to = unsigned(gap.to)?;
            let missing_bytes = to.saturating_sub(unsigned(gap.offset)?.max(*offset));
            // An empty gap is where a log ends whose rest nobody knows.
            let is_new = to > *offset || (to == *offset && gap.offset == gap.to);
            if !is_new {
                return Ok(None);
            }
            *offset = to;
            Ok(Some(LogEvent::Gap { missing_bytes, reason: gap.reason }))
        }
        "end" => Ok(Some(LogEvent::End)),
        _ => Ok(None),
    }
}

/// Why a stream ended too early.
enum Broken {
    /// The server refused it, or sent what cannot be read: asking again would change nothing.
    ForGood(Failure),
    /// It may be there again; none where the server simply closed the stream.
    ForNow(Option<Failure>),
}

impl From<Failure> for Broken {
    fn from(failure: Failure) -> Self {
        Self::ForGood(failure)
    }
}

/// An open stream of events.
struct Events<'s> {
    server: &'s Server,
    stream: ByteStream,
    parser: sse::Parser,
    /// Read, and not taken yet.
    ready: VecDeque<sse::Event>,
}

impl<'s> Events<'s> {
    async fn open(
        server: &'s Server,
        answer: Result<ResponseValue<ByteStream>, Error<ByteStream>>,
    ) -> Result<Self, Broken> {
        match answer {
            Ok(response) => {
                let stream = response.into_inner();
                Ok(Self { server, stream, parser: sse::Parser::default(), ready: VecDeque::new() })
            }
            Err(error) => {
                let may_pass =
                    error.is_retryable() || error.status().is_some_and(|status| status.is_server_error());
                let failure = server.failure(error).await;
                Err(if may_pass { Broken::ForNow(Some(failure)) } else { Broken::ForGood(failure) })
            }
        }
    }

    async fn next(&mut self, patience: &mut Patience) -> Result<sse::Event, Broken> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            match self.stream.try_next().await {
                Ok(Some(bytes)) => {
                    patience.reset();
                    let events = self
                        .parser
                        .push(&bytes)
                        .map_err(|error| Failure::of_error(Exit::Infrastructure, &self.server.url, &error))?;
                    self.ready.extend(events);
                }
                Ok(None) => return Err(Broken::ForNow(None)),
                Err(error) => return Err(Broken::ForNow(Some(self.server.unreachable(&error)))),
            }
        }
    }
}

fn malformed(server: &Server, error: &serde_json::Error) -> Failure {
    Failure::of_error(
        Exit::Infrastructure,
        format!("{} sent an event that cannot be read", server.url),
        error,
    )
}

/// How long to go on trying: pauses that grow, until nothing came for [`GIVE_UP_AFTER`].
struct Patience {
    broken_since: Option<Instant>,
    pause: Duration,
}

impl Patience {
    const FIRST_PAUSE: Duration = Duration::from_millis(100);
    const LONGEST_PAUSE: Duration = Duration::from_secs(5);

    fn new() -> Self {
        Self { broken_since: None, pause: Self::FIRST_PAUSE }
    }

    fn reset(&mut self) {
        *self = Self::new();
    }

    async fn wait(&mut self, server: &Server, broken: Broken) -> Result<(), Failure> {
        let ended = match broken {
            Broken::ForGood(failure) => return Err(failure),
            Broken::ForNow(ended) => ended,
        };
        let since = *self.broken_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= GIVE_UP_AFTER {
            let failure = ended.unwrap_or_else(|| {
                Failure::infrastructure(format!(
                    "{} keeps ending the stream before the pipeline's end",
                    server.url
                ))
            });
            return Err(failure);
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(Self::LONGEST_PAUSE);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
