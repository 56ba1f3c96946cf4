//! The commands about pipelines: `submit`, `list`, `show`, `cancel`, `rerun`, `why`.

use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use jiff::Timestamp;
use sealci_api::controller::types::{
    Action, CreatePipeline, CreatePipelineEvent, Pipeline, PipelineOutcome, PipelineState, Rerun, RerunScope,
};
use serde::Serialize;
use uuid::Uuid;

use crate::connect::{Server, ServerArgs};
use crate::exit::{Exit, Failure};
use crate::follow;
use crate::format;
use crate::output;
use crate::show;
use crate::terminal::{Terminal, one_line};

#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// A Git working tree: its last commit is built
    #[arg(value_name = "DIR", default_value = ".", conflicts_with = "repo")]
    dir: PathBuf,
    /// Another repository
    #[arg(long, value_name = "URL")]
    repo: Option<String>,
    /// A manifest of this machine, instead of the repository's .sealci/pipeline.yaml
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// The ref, `refs/heads/main` or `main` [default: the checked-out branch, or the repository's default]
    #[arg(long, value_name = "REF")]
    r#ref: Option<String>,
    /// The full commit id [default: the last commit, or the ref's newest]
    #[arg(long, value_name = "COMMIT")]
    revision: Option<String>,
    /// Makes a repetition of this command answer with the same pipeline
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    /// Show the logs while it runs, and end with its outcome
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only this repository's, by any form of its URL
    #[arg(long, value_name = "URL")]
    repo: Option<String>,
    #[arg(long, value_name = "REF")]
    r#ref: Option<String>,
    #[arg(long, value_name = "COMMIT")]
    revision: Option<String>,
    /// Only those whose manifest has this name
    #[arg(long)]
    name: Option<String>,
    #[arg(long, value_name = "STATE", value_parser = parse::<PipelineState>)]
    state: Option<PipelineState>,
    #[arg(long, value_name = "OUTCOME", value_parser = parse::<PipelineOutcome>)]
    outcome: Option<PipelineOutcome>,
    /// How many, newest first (1 to 200)
    #[arg(long, short = 'n', default_value = "20", value_parser = clap::value_parser!(u32).range(1..=200))]
    limit: u32,
    /// The next page: what the page before printed
    #[arg(long)]
    cursor: Option<String>,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ShowArgs {
    /// The pipeline's number or id
    #[arg(value_name = "PIPELINE")]
    pipeline: String,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct RerunArgs {
    /// The pipeline's number or id
    #[arg(value_name = "PIPELINE")]
    pipeline: String,
    /// Only what did not succeed, and what was skipped because of it
    #[arg(long)]
    failed: bool,
    /// Show the logs while it runs, and end with its outcome
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct WhyArgs {
    /// The pipeline's number or id
    #[arg(value_name = "PIPELINE")]
    pipeline: String,
    /// One action [default: all that are not finished, or did not succeed]
    #[arg(value_name = "ACTION")]
    action: Option<String>,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

/// Reads one of a generated enum's words.
fn parse<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "no such word; see `sealci list --help`".to_owned())
}

pub async fn submit(args: SubmitArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let wanted = match &args.repo {
        Some(url) => Wanted { url: url.clone(), r#ref: None, revision: None, uncommitted: false },
        None => Wanted::of_working_tree(&args.dir, &server)?,
    };
    if wanted.uncommitted && args.revision.is_none() {
        eprintln!("note: uncommitted changes are not part of what is built (`sealci run` takes them along)");
    }
    let body = args.file.as_deref().map(read_manifest).transpose()?;
    let request_id = args.request_id.clone().unwrap_or_else(|| Uuid::now_v7().to_string());
    // A ref or revision that is asked for replaces the working tree's, both together.
    let (r#ref, revision) = match (&args.r#ref, &args.revision) {
        (None, None) => (wanted.r#ref, wanted.revision),
        (r#ref, revision) => (r#ref.as_deref().map(full_ref), revision.clone()),
    };
    let request = CreatePipeline::builder()
        .repo_url(wanted.url)
        .ref_(r#ref)
        .revision(revision)
        .event(CreatePipelineEvent::Manual)
        .body(
            body.map(TryInto::try_into)
                .transpose()
                .map_err(|error| Failure::usage(format!("the manifest cannot be sent: {error}")))?,
        )
        .request_id(Some(
            request_id.parse().map_err(|error| Failure::usage(format!("--request-id: {error}")))?,
        ));
    let pipeline = match server.client.create_pipeline().body(request).send().await {
        Ok(pipeline) => pipeline.into_inner(),
        Err(error) => return Err(server.failure(error).await),
    };
    begun(&server, pipeline, args.follow, args.output, terminal).await
}

/// What follows on a pipeline that was just asked for.
async fn begun(
    server: &Server,
    pipeline: Pipeline,
    follow: bool,
    output: output::Args,
    terminal: Terminal,
) -> Result<Exit, Failure> {
    if follow {
        return follow::pipeline(server, pipeline.id, terminal).await;
    }
    output.print(&pipeline, || {
        format!("{} #{}\n  sealci logs -f {}\n", one_line(&pipeline.name), pipeline.number, pipeline.number)
    })?;
    Ok(Exit::Passed)
}

/// What a working tree stands for.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    url: String,
    r#ref: Option<String>,
    revision: Option<String>,
    uncommitted: bool,
}

impl Wanted {
    /// A server on this machine reads the working tree's own repository, so nothing needs to be pushed; another one is
    /// sent to the remote `origin`.
    fn of_working_tree(dir: &Path, server: &Server) -> Result<Self, Failure> {
        let Some(top) = git(dir, &["rev-parse", "--show-toplevel"])? else {
            return Err(Failure::usage(format!("{} is in no Git working tree", dir.display()))
                .help("go into one, or name a repository with --repo URL"));
        };
        let Some(revision) = git(dir, &["rev-parse", "--verify", "--quiet", "HEAD"])? else {
            return Err(Failure::usage(format!("{top} has no commit yet")).help("commit something first"));
        };
        let is_local = reqwest::Url::parse(&server.url).is_ok_and(|url| crate::connect::is_loopback(&url));
        let url = if is_local {
            reqwest::Url::from_file_path(&top)
                .map_err(|()| Failure::usage(format!("{top} is no path that a URL can hold")))?
                .to_string()
        } else {
            git(dir, &["remote", "get-url", "origin"])?.ok_or_else(|| {
                Failure::usage(format!("{top} has no remote `origin`, so {} cannot reach it", server.url))
                    .help("push it somewhere, and name that with --repo URL")
            })?
        };
        Ok(Self {
            url,
            r#ref: git(dir, &["symbolic-ref", "--quiet", "HEAD"])?,
            revision: Some(revision),
            uncommitted: git(dir, &["status", "--porcelain"])?.is_some_and(|text| !text.is_empty()),
        })
    }
}

/// What git prints; none where it exits with an error.
fn git(dir: &Path, arguments: &[&str]) -> Result<Option<String>, Failure> {
    let output = Command::new("git")
        .arg("-C")
        .arg(dir)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|error| {
            Failure::of_error(Exit::Infrastructure, "cannot run git", &error).help("apt-get install git")
        })?;
    Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim_end().to_owned()))
}

/// `main` → `refs/heads/main`; full names stay.
fn full_ref(name: &str) -> String {
    if name.starts_with("refs/") { name.to_owned() } else { format!("refs/heads/{name}") }
}

fn read_manifest(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| {
        Failure::of_error(Exit::Usage, format!("cannot read the manifest {}", path.display()), &error)
    })
}

pub async fn list(args: ListArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let mut request =
        server.client.list_pipelines().limit(NonZeroU32::new(args.limit).unwrap_or(NonZeroU32::MIN));
    if let Some(value) = &args.repo {
        request = request.repository(value.as_str());
    }
    if let Some(value) = &args.r#ref {
        request = request.ref_(value.as_str());
    }
    if let Some(value) = &args.revision {
        request = request.revision(value.as_str());
    }
    if let Some(value) = &args.name {
        request = request.name(value.as_str());
    }
    if let Some(value) = &args.cursor {
        request = request.cursor(value.as_str());
    }
    if let Some(value) = args.state {
        request = request.state(value);
    }
    if let Some(value) = args.outcome {
        request = request.outcome(value);
    }
    let page = match request.send().await {
        Ok(page) => page.into_inner(),
        Err(error) => return Err(server.failure(error).await),
    };
    args.output.print(&page, || {
        if page.pipelines.is_empty() {
            return "no pipelines\n".into();
        }
        let now = Timestamp::now();
        let rows: Vec<_> = page.pipelines.iter().map(|pipeline| row(pipeline, now)).collect();
        let mut text = format::table(
            &["#", "STATE", "NAME", "REPOSITORY", "REF", "REVISION", "EVENT", "CREATED"],
            &rows,
            terminal,
        );
        if let Some(next) = &page.next {
            text.push_str(&format!("more: sealci list --cursor {}\n", one_line(next)));
        }
        text
    })?;
    Ok(Exit::Passed)
}

fn row(pipeline: &Pipeline, now: Timestamp) -> Vec<String> {
    vec![
        pipeline.number.to_string(),
        format::pipeline_state(pipeline),
        pipeline.name.clone(),
        pipeline.repository.clone(),
        pipeline.ref_.as_deref().map(format::short_ref).unwrap_or_default(),
        format::short_revision(&pipeline.revision),
        pipeline.event.to_string(),
        format::ago(&pipeline.created_at, now),
    ]
}

pub async fn show(args: ShowArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let pipeline = verbose(&server, &args.pipeline).await?;
    args.output.print(&pipeline, || show::pipeline(&pipeline, terminal))?;
    Ok(Exit::Passed)
}

/// The pipeline with every attempt of every action.
pub async fn verbose(server: &Server, pipeline: &str) -> Result<Pipeline, Failure> {
    let id = server.pipeline_id(pipeline).await?;
    match server.client.show_pipeline().pipeline_id(id).verbose(true).send().await {
        Ok(pipeline) => Ok(pipeline.into_inner()),
        Err(error) => Err(server.failure(error).await),
    }
}

/// The action of this name, or all the names there are.
pub fn action_named<'p>(pipeline: &'p Pipeline, name: &str) -> Result<&'p Action, Failure> {
    pipeline.actions.iter().find(|action| action.name == name || action.id.to_string() == name).ok_or_else(
        || {
            let names: Vec<_> = pipeline.actions.iter().map(|action| one_line(&action.name)).collect();
            Failure::usage(format!("#{} has no action `{}`", pipeline.number, one_line(name)))
                .help(format!("its actions are: {}", names.join(", ")))
        },
    )
}

pub async fn cancel(args: ShowArgs) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let id = server.pipeline_id(&args.pipeline).await?;
    let pipeline = match server.client.cancel_pipeline().pipeline_id(id).send().await {
        Ok(pipeline) => pipeline.into_inner(),
        Err(error) => return Err(server.failure(error).await),
    };
    args.output.print(&pipeline, || {
        format!("{} #{}: {}\n", one_line(&pipeline.name), pipeline.number, format::pipeline_state(&pipeline))
    })?;
    Ok(Exit::Passed)
}

pub async fn rerun(args: RerunArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let id = server.pipeline_id(&args.pipeline).await?;
    let scope = if args.failed { RerunScope::Failed } else { RerunScope::All };
    let request_id = Uuid::now_v7().to_string();
    let request = Rerun::builder().request_id(request_id).scope(scope);
    let pipeline = match server.client.rerun_pipeline().pipeline_id(id).body(request).send().await {
        Ok(pipeline) => pipeline.into_inner(),
        Err(error) => return Err(server.failure(error).await),
    };
    begun(&server, pipeline, args.follow, args.output, terminal).await
}

/// Why one action is where it is.
#[derive(Debug, Serialize)]
struct Because {
    action: String,
    state: String,
    reasons: Vec<String>,
}

pub async fn why(args: WhyArgs, terminal: Terminal) -> Result<Exit, Failure> {
    use sealci_api::controller::types::{ActionState, OutcomeKind};
    let server = args.server.controller()?;
    let pipeline = verbose(&server, &args.pipeline).await?;
    let succeeded = |action: &Action| {
        action.state == ActionState::Finished
            && action.outcome.as_ref().is_some_and(|outcome| outcome.kind == OutcomeKind::Succeeded)
    };
    let chosen: Vec<&Action> = match &args.action {
        Some(name) => vec![action_named(&pipeline, name)?],
        None => pipeline.actions.iter().filter(|action| !succeeded(action)).collect(),
    };
    let mut answers = Vec::new();
    for action in chosen {
        let why = match server.client.why_action().action_id(action.id).send().await {
            Ok(why) => why.into_inner(),
            Err(error) => return Err(server.failure(error).await),
        };
        answers.push(Because {
            action: action.name.clone(),
            state: format::action_state(action),
            reasons: why.reasons,
        });
    }
    args.output.print(&answers, || {
        if answers.is_empty() {
            return "every action succeeded\n".into();
        }
        let mut text = String::new();
        for answer in &answers {
            let state = format::coloured(terminal, &answer.state);
            text.push_str(&format!("{}: {state}\n", terminal.bold(&one_line(&answer.action))));
            for reason in &answer.reasons {
                text.push_str(&format!("  {}\n", one_line(reason)));
            }
        }
        text
    })?;
    Ok(Exit::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_refs_are_branches() {
        assert_eq!(full_ref("main"), "refs/heads/main");
        assert_eq!(full_ref("refs/tags/v1"), "refs/tags/v1");
    }

    #[test]
    fn states_and_outcomes_are_the_contracts_words() {
        assert_eq!(parse::<PipelineOutcome>("timed_out"), Ok(PipelineOutcome::TimedOut));
        assert!(parse::<PipelineState>("done").is_err());
    }
}
