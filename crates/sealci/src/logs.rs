//! The command `logs`: what actions wrote, as it was written, or while it is being written.

use std::io::{self, Write};
use std::num::NonZeroU32;

use clap::Args;
use futures_util::TryStreamExt;
use sealci_api::controller::types::{Action, Attempt, AttemptState, OutcomeKind, Pipeline};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::connect::{Server, ServerArgs};
use crate::exit::{Exit, Failure};
use crate::follow;
use crate::format;
use crate::pipelines;
use crate::terminal::{Harmless, Terminal, one_line};
use crate::view::{AttemptId, Lines, Update, missing};

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// The pipeline's number or id
    #[arg(value_name = "PIPELINE")]
    pipeline: String,
    /// One action, without prefixes [default: all of them]
    #[arg(value_name = "ACTION")]
    action: Option<String>,
    /// Go on while it runs; without ACTION, end with the pipeline's outcome
    #[arg(long, short)]
    follow: bool,
    /// Only of actions that did not succeed; on a terminal, from the first command that failed
    #[arg(long, conflicts_with = "follow")]
    failed: bool,
    /// An earlier attempt [default: the last]
    #[arg(long, value_name = "N", requires = "action")]
    attempt: Option<u32>,
    #[command(flatten)]
    server: ServerArgs,
}

pub async fn logs(args: LogsArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    if args.follow && args.action.is_none() {
        let pipeline = server.pipeline_id(&args.pipeline).await?;
        return follow::pipeline(&server, pipeline, terminal).await;
    }
    let pipeline = pipelines::verbose(&server, &args.pipeline).await?;
    let chosen = choose(&pipeline, &args)?;
    if chosen.is_empty() {
        let none = if args.failed { "nothing failed" } else { "no action has begun yet" };
        eprintln!("{} #{}: {none}", one_line(&pipeline.name), pipeline.number);
        return Ok(Exit::Passed);
    }
    if let (true, [(action, attempt)]) = (args.follow, chosen.as_slice()) {
        return follow_one(&server, id_of(action, attempt), terminal).await;
    }
    // Several logs in one output are told apart by prefixes; one alone stays as it was written.
    let width = chosen.iter().map(|(action, _)| action.name.chars().count()).max().unwrap_or(0);
    for (action, attempt) in &chosen {
        let mut writer = if chosen.len() > 1 {
            Writer::Prefixed(Lines::new(&action.name, width, terminal))
        } else {
            Writer::new(terminal)
        };
        let from =
            if args.failed && terminal.interactive { say_failure(action, attempt, terminal) } else { 0 };
        let name = one_line(&action.name);
        match copy(&server, id_of(action, attempt), from, &mut writer).await? {
            Copied::Part if attempt.state == AttemptState::Finished && !attempt.fenced => eprintln!(
                "`{name}` is finished, and the end of its log is still on its way: `sealci logs -f` waits for it"
            ),
            Copied::Gone(failure) if chosen.len() == 1 => return Err(failure),
            Copied::Gone(failure) => eprintln!("`{name}`: {}", failure.message),
            Copied::Part | Copied::Whole => {}
        }
    }
    Ok(Exit::Passed)
}

/// The attempts whose logs are wanted: the last of each action that has one.
fn choose<'p>(pipeline: &'p Pipeline, args: &LogsArgs) -> Result<Vec<(&'p Action, &'p Attempt)>, Failure> {
    let Some(name) = &args.action else {
        let wanted = pipeline.actions.iter().filter(|action| !args.failed || did_fail(action));
        return Ok(wanted.filter_map(|action| Some((action, action.attempts.last()?))).collect());
    };
    let action = pipelines::action_named(pipeline, name)?;
    let attempt = match args.attempt {
        Some(number) => action.attempts.iter().find(|attempt| u32::try_from(attempt.number) == Ok(number)),
        None => action.attempts.last(),
    };
    attempt.map(|attempt| vec![(action, attempt)]).ok_or_else(|| {
        let numbers: Vec<_> = action.attempts.iter().map(|attempt| attempt.number.to_string()).collect();
        if numbers.is_empty() {
            let state = format::action_state(action);
            Failure::usage(format!("`{}` has no log: {state}", one_line(&action.name))).help(format!(
                "`sealci why {} '{}'` says more",
                pipeline.number,
                one_line(&action.name)
            ))
        } else {
            Failure::usage(format!("`{}` has no such attempt", one_line(&action.name)))
                .help(format!("its attempts are: {}", numbers.join(", ")))
        }
    })
}

fn did_fail(action: &Action) -> bool {
    use OutcomeKind::{Errored, Failed, TimedOut};
    action.outcome.as_ref().is_some_and(|outcome| matches!(outcome.kind, Failed | Errored | TimedOut))
}

fn id_of(action: &Action, attempt: &Attempt) -> AttemptId {
    AttemptId { action: action.id, number: u32::try_from(attempt.number).unwrap_or(0) }
}

/// Says which command failed and how; gives the offset at which its output begins.
fn say_failure(action: &Action, attempt: &Attempt, terminal: Terminal) -> u64 {
    let outcome = attempt.outcome.as_ref().map(format::outcome).unwrap_or_default();
    eprintln!("{}", terminal.red(&format!("{}: {outcome}", one_line(&action.name))));
    let Some(command) =
        attempt.commands.iter().find(|command| command.exit_code.is_some_and(|code| code != 0))
    else {
        return 0;
    };
    eprintln!("{}", terminal.dim(&format!("$ {}", one_line(&command.text))));
    u64::try_from(command.log_offset).unwrap_or(0)
}

/// Writes one log as it is, or prefixed.
enum Writer {
    /// Not a terminal: byte for byte.
    Raw,
    Harmless(Harmless),
    Prefixed(Lines),
}

impl Writer {
    fn new(terminal: Terminal) -> Self {
        if terminal.interactive { Self::Harmless(Harmless::new(terminal.colours)) } else { Self::Raw }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut text = String::new();
        let mut lines = Vec::new();
        let shown = match self {
            Self::Raw => bytes,
            Self::Harmless(filter) => {
                filter.push(bytes, &mut text);
                text.as_bytes()
            }
            Self::Prefixed(prefixed) => {
                prefixed.push(bytes, &mut lines);
                &lines
            }
        };
        let mut stdout = io::stdout().lock();
        stdout.write_all(shown)?;
        stdout.flush()
    }

    fn finish(&mut self) -> io::Result<()> {
        let mut rest = Vec::new();
        match self {
            Self::Raw => {}
            Self::Harmless(filter) => {
                let mut text = String::new();
                filter.finish(&mut text);
                text.push_str("\x1b[0m");
                rest = text.into_bytes();
            }
            Self::Prefixed(prefixed) => prefixed.finish(&mut rest),
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(&rest)?;
        stdout.flush()
    }
}

/// What there was of a log.
enum Copied {
    Whole,
    /// There will be more of it.
    Part,
    /// It has been deleted, or is lost.
    Gone(Failure),
}

/// Copies the log as it stands.
async fn copy(server: &Server, id: AttemptId, from: u64, writer: &mut Writer) -> Result<Copied, Failure> {
    let mut request = server
        .client
        .read_log()
        .action_id(id.action)
        .number(NonZeroU32::new(id.number).unwrap_or(NonZeroU32::MIN));
    if from > 0 {
        request = request.range(format!("bytes={from}-"));
    }
    let response = match request.send().await {
        Ok(response) => response,
        // The failing command wrote nothing: there is nothing at its offset.
        Err(error) if from > 0 && error.status().is_some_and(|status| status.as_u16() == 416) => {
            return Ok(Copied::Whole);
        }
        Err(error) if error.status().is_some_and(|status| status.as_u16() == 410) => {
            return Ok(Copied::Gone(server.failure(error).await));
        }
        Err(error) => return Err(server.failure(error).await),
    };
    let is_whole = response.headers().get("sealci-log-complete").is_none_or(|value| value == "true");
    let mut stream = response.into_inner_stream();
    while let Some(bytes) = stream.try_next().await.map_err(|error| server.unreachable(&error))? {
        writer.write(&bytes)?;
    }
    writer.finish()?;
    Ok(if is_whole { Copied::Whole } else { Copied::Part })
}

/// Follows one action's log, without prefixes, to its end.
async fn follow_one(server: &Server, id: AttemptId, terminal: Terminal) -> Result<Exit, Failure> {
    let (updates, mut news) = mpsc::channel(64);
    let mut tasks = JoinSet::new();
    tasks.spawn(follow::follow_log(server.clone(), id, 0, updates));
    let mut writer = Writer::new(terminal);
    while let Some(update) = news.recv().await {
        match update {
            Update::Log(_, bytes) => writer.write(&bytes)?,
            Update::Gap(_, missing_bytes, reason) => {
                eprintln!("[{}]", missing(missing_bytes, &reason));
            }
            Update::LogEnd(_) | Update::Pipeline(_) | Update::Waits(..) => {}
        }
    }
    writer.finish()?;
    match tasks.join_next().await {
        Some(Ok(Err(failure))) => Err(failure),
        Some(Err(error)) => Err(Failure::infrastructure(format!("following the log broke off: {error}"))),
        _ => Ok(Exit::Passed),
    }
}
