//! The commands about watched repositories: `repo list`, `repo add`, `repo remove`. They speak to the monitor.

use std::fs;
use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;
use jiff::Timestamp;
use sealci_api::monitor::types::{Configuration, ConfigurationSettings, EventKind, LastDeliveryOutcome};
use sealci_api::monitor::{self, Client};
use sealci_core::repository::RepositoryIdentity;
use serde_json::json;

use crate::connect::{Server, ServerArgs};
use crate::exit::{Exit, Failure};
use crate::format;
use crate::output;
use crate::terminal::{Terminal, one_line};

/// A server whose REST API is the monitor's.
pub type Monitor = Server<Client>;

#[derive(Debug, Args)]
pub struct RepoListArgs {
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct RepoAddArgs {
    /// The repository: https, ssh, or file where the server allows it
    #[arg(value_name = "URL")]
    url: String,
    /// Only these branches, `release/**` or `!wip/*`; may be given several times [default: all]
    #[arg(long, value_name = "PATTERN")]
    branch: Vec<String>,
    /// Tags too, those of this pattern; may be given several times
    #[arg(long, value_name = "PATTERN")]
    tag: Vec<String>,
    /// Where the manifest is in the repository [default: .sealci/pipeline.yaml]
    #[arg(long, value_name = "PATH", conflicts_with = "file")]
    manifest_path: Option<String>,
    /// A manifest of this machine that counts instead of the repository's
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
    /// How often it is looked at, in seconds [default: as the server is set up]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    poll: Option<u32>,
    /// The name of credentials in the monitor's configuration
    #[arg(long, value_name = "NAME")]
    credentials: Option<String>,
    /// Build at once what its branches hold now
    #[arg(long)]
    build_existing: bool,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct RepoRemoveArgs {
    /// Its URL or id, as `sealci repo list` shows them
    #[arg(value_name = "REPOSITORY")]
    repository: String,
    #[command(flatten)]
    server: ServerArgs,
}

pub async fn list(args: RepoListArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let watched = all(&args.server.monitor()?).await?;
    args.output.print(&watched, || {
        if watched.is_empty() {
            return "no repositories are watched\n".into();
        }
        let now = Timestamp::now();
        let rows: Vec<_> = watched.iter().map(|one| row(one, now)).collect();
        format::table(&["REPOSITORY", "EVENTS", "LOOKED AT", "LAST EVENT", "ID"], &rows, terminal)
    })?;
    Ok(Exit::Passed)
}

fn row(watched: &Configuration, now: Timestamp) -> Vec<String> {
    let patterns = |kind: &str, patterns: &[String]| {
        if patterns.is_empty() { kind.to_owned() } else { format!("{kind} {}", patterns.join(" ")) }
    };
    let events: Vec<_> = watched
        .events
        .iter()
        .map(|kind| match kind {
            EventKind::Push => patterns("push", &watched.branches),
            EventKind::Tag => patterns("tag", &watched.tags),
        })
        .collect();
    let looked_at = match &watched.last_poll {
        _ if !watched.enabled => "never: not enabled".to_owned(),
        None => "not yet".to_owned(),
        Some(poll) => match &poll.error {
            Some(error) => format!("failed {}: {}", format::ago(&poll.at, now), one_line(error)),
            None => format::ago(&poll.at, now),
        },
    };
    let mut last_event = watched.last_delivery.as_ref().map_or_else(String::new, |delivery| {
        let what =
            format!("{} {}", format::short_ref(&delivery.ref_), format::short_revision(&delivery.revision));
        match (delivery.outcome, &delivery.error) {
            (LastDeliveryOutcome::Accepted, _) | (_, None) => what,
            (outcome, Some(error)) => format!("{what} {outcome}: {}", one_line(error)),
        }
    });
    if watched.undelivered > 0 {
        last_event.push_str(&format!(" ({} waiting)", watched.undelivered));
    }
    vec![watched.repository_url.clone(), events.join(", "), looked_at, last_event, watched.id.to_string()]
}

pub async fn add(args: RepoAddArgs) -> Result<Exit, Failure> {
    let monitor = args.server.monitor()?;
    let watched = watch(&monitor, settings(&args)?).await?;
    args.output.print(&watched, || {
        format!("watching {}\n  sealci repo list\n", one_line(&watched.repository_url))
    })?;
    Ok(Exit::Passed)
}

/// The settings that the arguments ask for.
fn settings(args: &RepoAddArgs) -> Result<ConfigurationSettings, Failure> {
    let mut settings = json!({
        "repository_url": args.url,
        "branches": args.branch,
        "tags": args.tag,
        "events": if args.tag.is_empty() { vec!["push"] } else { vec!["push", "tag"] },
        "build_existing": args.build_existing,
    });
    if let Some(path) = &args.manifest_path {
        settings["manifest_path"] = json!(path);
    }
    if let Some(path) = &args.file {
        let text = fs::read_to_string(path).map_err(|error| {
            Failure::of_error(Exit::Usage, format!("cannot read {}", path.display()), &error)
        })?;
        settings["manifest"] = json!(text);
    }
    if let Some(seconds) = args.poll {
        settings["poll_interval_ms"] = json!(u64::from(seconds) * 1000);
    }
    if let Some(name) = &args.credentials {
        settings["credentials"] = json!(name);
    }
    serde_json::from_value(settings)
        .map_err(|error| Failure::of_error(Exit::Usage, "these settings cannot be sent", &error))
}

/// Watches a repository.
pub async fn watch(monitor: &Monitor, settings: ConfigurationSettings) -> Result<Configuration, Failure> {
    match monitor.client.add_configuration().body(settings).send().await {
        Ok(watched) => Ok(watched.into_inner()),
        Err(error) => Err(monitor.failure(error).await),
    }
}

pub async fn remove(args: RepoRemoveArgs) -> Result<Exit, Failure> {
    let monitor = args.server.monitor()?;
    let watched = all(&monitor).await?;
    let identity = RepositoryIdentity::of_url(&args.repository).ok();
    let is_meant = |one: &&Configuration| {
        one.id.to_string() == args.repository
            || one.repository_url == args.repository
            || identity.is_some() && RepositoryIdentity::of_url(&one.repository_url).ok() == identity
    };
    let meant: Vec<_> = watched.iter().filter(is_meant).collect();
    let one = match meant.as_slice() {
        [one] => one,
        [] => {
            return Err(Failure::usage(format!("`{}` is not watched", one_line(&args.repository)))
                .help("`sealci repo list` shows what is"));
        }
        several => {
            let ids: Vec<_> = several.iter().map(|one| one.id.to_string()).collect();
            return Err(Failure::usage(format!(
                "`{}` is watched more than once",
                one_line(&args.repository)
            ))
            .help(format!("give the id: {}", ids.join(", "))));
        }
    };
    match monitor.client.delete_configuration().configuration_id(one.id).send().await {
        Ok(_) => {
            println!("no longer watching {}", one_line(&one.repository_url));
            Ok(Exit::Passed)
        }
        Err(error) => Err(monitor.failure(error).await),
    }
}

/// Everything that is watched, over all pages.
pub async fn all(monitor: &Monitor) -> Result<Vec<Configuration>, Failure> {
    let mut watched = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let mut request = monitor.client.list_configurations();
        if let Some(limit) = NonZeroU32::new(200) {
            request = request.limit(limit);
        }
        if let Some(cursor) = cursor.take() {
            request = request.cursor(cursor);
        }
        let page = match request.send().await {
            Ok(page) => page.into_inner(),
            Err(error) => return Err(monitor.failure(error).await),
        };
        watched.extend(page.configurations);
        match page.next {
            Some(next) => cursor = Some(next),
            None => return Ok(watched),
        }
    }
}

/// Asks about one configuration.
pub async fn one(monitor: &Monitor, id: uuid::Uuid) -> Result<Configuration, Failure> {
    match monitor.client.show_configuration().configuration_id(id).send().await {
        Ok(watched) => Ok(watched.into_inner()),
        Err(error) => Err(monitor.failure(error).await),
    }
}

/// Makes the typed client.
pub fn client(url: &str, http: reqwest::Client) -> monitor::Client {
    Client::new_with_client(url, http)
}
