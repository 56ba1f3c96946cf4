//! The one binary of SealCI: every service is a subcommand, and so is everything a person asks of them.
//!
//! `main` reads the command line, runs one command until it ends or is interrupted, and ends with its exit code.

mod agents;
mod args;
mod artifacts;
mod caches;
mod check;
mod completion;
mod connect;
mod data_folder;
mod demo;
mod doctor;
mod exec;
mod exit;
mod follow;
mod format;
mod gc;
mod kept;
mod logs;
mod output;
mod pipelines;
mod repos;
mod run;
mod screen;
mod serve;
mod service;
mod show;
mod sse;
mod terminal;
mod unpack;
mod up;
mod view;
mod vm;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{AgentCommand, ArtifactCommand, CacheCommand, Cli, Command, RepoCommand, VmCommand};
use crate::exit::{Exit, Failure};
use crate::terminal::Terminal;

fn main() -> ExitCode {
    // Before any thread is started: the helper of a sandbox must not have any.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == sealci_sandbox::HELPER_COMMAND) {
        return sealci_sandbox::helper_main(arguments);
    }
    let cli = Cli::parse();
    match run(cli.command, Terminal::of_stdout()) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            if !failure.silent {
                eprintln!("{failure}");
            }
            failure.exit.into()
        }
    }
}

fn run(command: Command, terminal: Terminal) -> Result<Exit, Failure> {
    sealci_service::tls::choose_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::of_error(Exit::Infrastructure, "cannot start", &error))?;
    let ends_in_order = command.is_service();
    runtime.block_on(async {
        tokio::select! {
            ended = dispatch(command, terminal) => ended,
            _ = tokio::signal::ctrl_c(), if !ends_in_order => Ok(Exit::Interrupted),
        }
    })
}

async fn dispatch(command: Command, terminal: Terminal) -> Result<Exit, Failure> {
    match command {
        Command::Submit(args) => pipelines::submit(args, terminal).await,
        Command::List(args) => pipelines::list(args, terminal).await,
        Command::Show(args) => pipelines::show(args, terminal).await,
        Command::Logs(args) => logs::logs(args, terminal).await,
        Command::Exec(args) => exec::exec(args).await,
        Command::Cancel(args) => pipelines::cancel(args).await,
        Command::Rerun(args) => pipelines::rerun(args, terminal).await,
        Command::Why(args) => pipelines::why(args, terminal).await,
        Command::Artifact(ArtifactCommand::List(args)) => artifacts::list(args, terminal).await,
        Command::Artifact(ArtifactCommand::Download(args)) => artifacts::download(args).await,
        Command::Artifact(ArtifactCommand::Delete(args)) => artifacts::delete(args).await,
        Command::Cache(CacheCommand::List(args)) => caches::list(args, terminal).await,
        Command::Cache(CacheCommand::Delete(args)) => caches::delete(args).await,
        Command::Gc(args) => gc::gc(args).await,
        Command::Repo(RepoCommand::List(args)) => repos::list(args, terminal).await,
        Command::Repo(RepoCommand::Add(args)) => repos::add(args).await,
        Command::Repo(RepoCommand::Remove(args)) => repos::remove(args).await,
        Command::Agent(args) => match args.command {
            Some(AgentCommand::List(args)) => agents::list(args, terminal).await,
            Some(AgentCommand::Drain(args)) => agents::drain(args, true).await,
            Some(AgentCommand::Undrain(args)) => agents::drain(args, false).await,
            None => serve::agent(args.serve).await,
        },
        Command::Check(args) => check::check(&args, terminal),
        Command::Doctor(args) => doctor::doctor(&args, terminal).await,
        Command::Vm(VmCommand::Run(args)) => vm::run(args),
        Command::Completion(args) => completion::completion(&args, Cli::command()),
        Command::Man(args) => completion::man(&args, Cli::command()),
        Command::Run(args) => run::run(args, terminal).await,
        Command::Up(args) => up::up(args, terminal).await,
        Command::Controller(args) => serve::controller(args).await,
        Command::Scheduler(args) => serve::scheduler(args).await,
        Command::Monitor(args) => serve::monitor(args).await,
    }
}
