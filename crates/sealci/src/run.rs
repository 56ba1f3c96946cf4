//! The command `run`: a working tree's pipeline, uncommitted changes included, with no server and no account.
//!
//! The engine is the server's: the same planner, controller, scheduler, agent and executors, in this process, over
//! loopback. Two things differ. The plan goes to the controller's [`Dispatch`] directly and not through its REST door,
//! which takes manifests: so a plan can be narrowed to some actions. And workspaces are filled from a snapshot of the
//! working tree.
//!
//! - Nothing is written to the working tree, and nothing in a workspace is linked to it.
//! - Nothing stays: all that a run makes lies in one temporary folder and its control groups, which go with it.
//! - `SEALCI_REVISION` is the commit that the tree is based on; where there is none, all zeros, as Git says it.
//!
//! [`Dispatch`]: sealci_controller::dispatch::Dispatch

mod engine;
mod fit;
mod selection;
mod tree;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use clap::Args;
use sealci_controller::dispatch::{Created, NewPipeline};
use sealci_core::event::{EventKind, Revision};
use sealci_core::manifest::{self, ManifestSource};
use sealci_core::plan::{ExecutorKind, Network, Plan, Resources};
use sealci_core::repository::RepositoryIdentity;
use sealci_git::WorktreeSnapshot;
use sealci_service::shutdown::Signals;
use tokio_util::task::AbortOnDropHandle;

use crate::check;
use crate::exit::{Exit, Failure};
use crate::follow;
use crate::serve::{self, ExecutorOffer, ImageArgs, RoomArgs};
use crate::service;
use crate::terminal::Terminal;
use crate::view::Style;
use engine::{AgentParts, Engine};
use tree::TreeCheckout;

#[derive(Debug, Args)]
pub struct RunArgs {
    /// The working tree; it need not be in Git
    #[arg(value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// The manifest [default: .sealci/pipeline.yaml, or the only one in .sealci]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Only this action and what it needs; may be given several times
    #[arg(long, short, value_name = "ACTION")]
    action: Vec<String>,
    /// What runs the actions that ask for nothing else: sandbox or process
    #[arg(long, value_name = "EXECUTOR", value_parser = executor)]
    executor: Option<ExecutorKind>,
    /// A folder or file of this machine that sealed actions see, read-only; may be given several times
    #[arg(long, value_name = "PATH")]
    sandbox_path: Vec<PathBuf>,
    /// Let actions run as this user, with no isolation at all
    #[arg(long)]
    allow_process: bool,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    room: RoomArgs,
    /// Print one JSON object for each thing that happens
    #[arg(long)]
    json: bool,
}

fn executor(text: &str) -> Result<ExecutorKind, String> {
    ExecutorKind::parse(text)
        .filter(|kind| matches!(kind, ExecutorKind::Process | ExecutorKind::Sandbox))
        .ok_or_else(|| "it is `sandbox` or `process`".to_owned())
}

pub async fn run(args: RunArgs, terminal: Terminal) -> Result<Exit, Failure> {
    service::start_log("error")?;
    let mut signals = service::signals()?;
    let dir = fs::canonicalize(&args.dir).map_err(|error| {
        Failure::of_error(Exit::Usage, format!("cannot find {}", args.dir.display()), &error)
    })?;
    let Some(manifest) = Manifest::read(&args, terminal)? else { return Ok(Exit::Usage) };
    let plan = wanted(&args, manifest.plan.clone())?;
    let sealing = serve::can_seal();
    if let (Err(why), false) = (&sealing, args.allow_process) {
        return Err(Failure::usage(format!("actions cannot be sealed here: {why}")).help(
            "`sealci doctor` says what is missing; run it as root; or say --allow-process, and actions run as this \
             user, with no isolation at all",
        ));
    }
    fit::check_executors(&plan, |kind| match kind {
        ExecutorKind::Process => args.allow_process,
        ExecutorKind::Sandbox | ExecutorKind::Container => sealing.is_ok(),
        ExecutorKind::Docker => args.images.docker_host.is_some(),
        ExecutorKind::Microvm => args.images.microvms,
        ExecutorKind::Fake => false,
    })?;
    let capacity = sealci_agent::machine_capacity();
    fit::check_machine(&plan, capacity, &BTreeMap::from(sealci_agent::machine_labels()))?;
    let folder = tempfile::Builder::new()
        .prefix("sealci-run-")
        .tempdir()
        .map_err(|error| Failure::of_error(Exit::Infrastructure, "cannot make a temporary folder", &error))?;
    let wanted = Wanted { dir, manifest, plan, capacity };
    let ended = run_in(folder.path(), &args, wanted, terminal, &mut signals).await;
    serve::leave(&folder.path().join("agent"));
    // Also where it failed; the failure is what counts then.
    let removed = folder.close();
    let exit = ended?;
    removed.map_err(|error| {
        Failure::of_error(Exit::Infrastructure, "cannot remove the temporary folder", &error)
    })?;
    Ok(exit)
}

/// What is to be run.
struct Wanted {
    dir: PathBuf,
    manifest: Manifest,
    plan: Plan,
    capacity: Resources,
}

/// Runs the plan with all that it needs in `folder`.
async fn run_in(
    folder: &Path,
    args: &RunArgs,
    wanted: Wanted,
    terminal: Terminal,
    signals: &mut Signals,
) -> Result<Exit, Failure> {
    let Wanted { dir, manifest, plan, capacity } = wanted;
    if folder.starts_with(&dir) {
        return Err(Failure::usage(format!("the temporary folder {} is part of it", folder.display()))
            .help("name another with TMPDIR=/somewhere/else, or run a folder further down"));
    }
    // A task of its own: to start a process stops the thread for a while.
    let snapshot = take_snapshot(folder.to_owned(), dir.clone());
    let snapshot = AbortOnDropHandle::new(tokio::spawn(snapshot));
    let parts = agent_parts(args, folder, plan.clone(), capacity)?;
    let mut starting = pin!(async { tokio::join!(engine::start(folder, parts), snapshot) });
    let started = tokio::select! {
        started = &mut starting => Some(started),
        _ = signals.next() => None,
    };
    let is_wanted = started.is_some();
    // Waited for in any case: nobody is left at work in the folder.
    let (engine, tree) = match started {
        Some(started) => started,
        None => starting.await,
    };
    let engine = engine?;
    let tree = tree.unwrap_or_else(|stopped| Err(no_tree(&stopped)));
    let new = match tree.and_then(|tree| new_pipeline(&dir, manifest, plan, tree)) {
        Ok(new) if is_wanted => new,
        Ok(_) => return service::end(engine.running, signals, Ok(Exit::Interrupted)).await,
        Err(failure) => return service::end(engine.running, signals, Err(failure)).await,
    };
    let style = if args.json { Style::Json } else { Style::Words(terminal) };
    let Engine { mut running, dispatch, server } = engine;
    let outcome = async {
        let refused = |refusal| Failure::of_error(Exit::Infrastructure, "the pipeline", &refusal);
        let (Created::Now(id) | Created::Before(id)) = dispatch.create(new).await.map_err(refused)?;
        let mut following = pin!(follow::pipeline(&server, id.as_uuid(), style));
        let mut interrupted = false;
        loop {
            tokio::select! {
                ended = &mut following => {
                    return ended.map(|exit| if interrupted { Exit::Interrupted } else { exit });
                }
                failure = running.broken() => return Err(failure),
                _ = signals.next() => {
                    if interrupted {
                        // What still runs is killed with its agent.
                        return Ok(Exit::Interrupted);
                    }
                    interrupted = true;
                    eprintln!("ending what runs; once more to end it at once");
                    dispatch.cancel(id).await.map_err(refused)?;
                }
            }
        }
    };
    let outcome = outcome.await;
    service::end(running, signals, outcome).await
}

/// A manifest of the working tree, and what it means.
#[derive(Debug)]
struct Manifest {
    name: String,
    text: String,
    plan: Plan,
}

impl Manifest {
    /// None, said what is wrong, where it is none.
    fn read(args: &RunArgs, terminal: Terminal) -> Result<Option<Self>, Failure> {
        let path = match &args.file {
            Some(path) => path.clone(),
            None => default_manifest(&args.dir)?,
        };
        let text = fs::read(&path).map_err(|error| {
            Failure::of_error(Exit::Usage, format!("cannot read {}", path.display()), &error)
        })?;
        let name = path.strip_prefix(&args.dir).unwrap_or(&path).display().to_string();
        match manifest::parse(&ManifestSource { name: &name, text: &text }) {
            Ok(plan) => Ok(Some(Self { name, text: String::from_utf8_lossy(&text).into_owned(), plan })),
            Err(errors) => {
                eprint!("{}", check::refusal(&errors, terminal));
                Ok(None)
            }
        }
    }
}

fn default_manifest(dir: &Path) -> Result<PathBuf, Failure> {
    let all = check::manifests_in(dir)?;
    let usual = all.iter().find(|path| path.file_name().is_some_and(|name| name == "pipeline.yaml"));
    match (usual, all.as_slice()) {
        (Some(path), _) | (None, [path]) => Ok(path.clone()),
        (None, several) => {
            let names: Vec<_> = several.iter().map(|path| path.display().to_string()).collect();
            Err(Failure::usage("there are several manifests, and none is .sealci/pipeline.yaml")
                .help(format!("name one with --file: {}", names.join(", "))))
        }
    }
}

/// The part of the plan that was asked for.
fn wanted(args: &RunArgs, plan: Plan) -> Result<Plan, Failure> {
    let names: Vec<_> = plan.actions.iter().map(|action| action.name.clone()).collect();
    let mut plan = selection::keep(plan, &args.action).map_err(|unknown| {
        Failure::usage(format!("there is no action `{unknown}`"))
            .help(format!("the actions are: {}", names.join(", ")))
    })?;
    if let Some(executor) = args.executor {
        selection::run_by(&mut plan, executor);
    }
    Ok(plan)
}

/// Makes the agent's parts, what runs the plan's actions above all.
fn agent_parts(
    args: &RunArgs,
    folder: &Path,
    plan: Plan,
    capacity: Resources,
) -> Result<impl Future<Output = Result<AgentParts, Failure>> + Send + 'static, Failure> {
    let has_images = plan.actions.iter().any(|action| {
        let executor = action.environment.required_executor();
        matches!(executor, Some(ExecutorKind::Container | ExecutorKind::Microvm))
            || !action.services.is_empty()
    });
    let offer = ExecutorOffer {
        // The way outwards is only made where somebody will go it.
        network: plan.actions.iter().any(|action| action.environment.network != Network::Off),
        sandbox_path: args.sandbox_path.clone(),
        allow_process: args.allow_process,
        allow_fake: false,
        // They outlive the run; a store is only opened where somebody needs it.
        images: if has_images { Some(args.images.offer(serve::cached_images()?)?) } else { None },
        docker: args.images.docker_socket()?,
        docker_logins: args.images.logins_file(),
    };
    let (own, checkout, room) =
        (folder.join("agent"), TreeCheckout::new(snapshot_folder(folder)), args.room.limits());
    let trouble = |error: &(dyn std::error::Error + 'static)| {
        Failure::of_error(Exit::Infrastructure, "the executors", error)
    };
    // The kernel takes its time over control groups.
    let making = move || {
        fs::create_dir_all(&own).map_err(|error| trouble(&error))?;
        let executors = serve::executors(&offer, &own)?;
        fit::check_executors(&plan, |kind| executors.iter().any(|offered| offered.kind() == kind))?;
        Ok(AgentParts { executors, checkout: Arc::new(checkout), room, capacity })
    };
    Ok(
        async move { tokio::task::spawn_blocking(making).await.unwrap_or_else(|stopped| Err(trouble(&stopped))) },
    )
}

/// Where the run keeps the working tree as it was.
fn snapshot_folder(folder: &Path) -> PathBuf {
    folder.join("tree")
}

async fn take_snapshot(folder: PathBuf, dir: PathBuf) -> Result<WorktreeSnapshot, Failure> {
    let into = snapshot_folder(&folder);
    fs::create_dir(&into).map_err(|error| no_tree(&error))?;
    let git = sealci_git::Git::new(sealci_git::Options::new(folder.join("git-home")))
        .map_err(|error| no_tree(&error))?;
    git.snapshot_worktree(&dir, &into).await.map_err(|error| no_tree(&error))
}

fn no_tree(error: &(dyn std::error::Error + 'static)) -> Failure {
    Failure::of_error(Exit::Infrastructure, "the working tree", error)
}

fn new_pipeline(
    dir: &Path,
    manifest: Manifest,
    plan: Plan,
    tree: WorktreeSnapshot,
) -> Result<NewPipeline, Failure> {
    let no_url = || Failure::usage(format!("{} is no path that a URL can hold", dir.display()));
    let url = reqwest::Url::from_file_path(dir).map_err(|()| no_url())?.to_string();
    let repository = RepositoryIdentity::of_url(&url).map_err(|_| no_url())?;
    let none = || "0".repeat(40).parse::<Revision>();
    let revision = tree.head.map_or_else(none, Ok);
    let revision = revision.map_err(|error| Failure::of_error(Exit::Infrastructure, "the commit", &error))?;
    Ok(NewPipeline {
        // The database is this run's own: there is nothing to tell it from.
        identity: "run".to_owned(),
        repository: repository.to_string(),
        repository_url: url,
        event: EventKind::Manual,
        r#ref: tree.r#ref,
        revision,
        manifest_path: Some(manifest.name),
        manifest: manifest.text,
        plan,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_manifest_is_found_or_the_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| fs::write(dir.path().join(".sealci").join(name), "x").unwrap();
        assert_eq!(default_manifest(dir.path()).unwrap_err().exit, Exit::Usage);
        fs::create_dir(dir.path().join(".sealci")).unwrap();
        write("only.yaml");
        assert!(default_manifest(dir.path()).unwrap().ends_with("only.yaml"));
        write("another.yaml");
        let failure = default_manifest(dir.path()).unwrap_err();
        assert!(failure.help.unwrap().contains("another.yaml"));
        write("pipeline.yaml");
        assert!(default_manifest(dir.path()).unwrap().ends_with("pipeline.yaml"));
    }
}
