//! The commands about watched repositories: `repo list`, `repo add`, `repo remove`. They speak to the monitor.

use clap::Args;

use crate::connect::ServerArgs;
use crate::exit::{Exit, Failure};
use crate::output;
use crate::terminal::Terminal;

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

pub async fn list(args: RepoListArgs, _terminal: Terminal) -> Result<Exit, Failure> {
    let _ = (args.output, args.server.monitor()?);
    Err(Failure::infrastructure("this build cannot speak to a monitor yet"))
}

pub async fn add(args: RepoAddArgs) -> Result<Exit, Failure> {
    let _ = (args.url, args.output, args.server.monitor()?);
    Err(Failure::infrastructure("this build cannot speak to a monitor yet"))
}

pub async fn remove(args: RepoRemoveArgs) -> Result<Exit, Failure> {
    let _ = (args.repository, args.server.monitor()?);
    Err(Failure::infrastructure("this build cannot speak to a monitor yet"))
}
