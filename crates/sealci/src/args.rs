//! Defines the command line as a whole; each command's own arguments stand beside it.

use clap::{Parser, Subcommand};

use crate::{
    agents, artifacts, caches, check, completion, doctor, exec, gc, logs, pipelines, repos, run, serve, up,
    vm,
};

/// A distributed CI that runs every action sealed.
#[derive(Debug, Parser)]
#[command(name = "sealci", version, propagate_version = true, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 passed, 1 failed, 2 usage or manifest error, 3 cancelled, 4 not allowed, \
5 infrastructure, 130 interrupted."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a working tree's pipeline here, uncommitted changes included, without a server
    Run(run::RunArgs),
    /// Make a pipeline of a repository's commit
    Submit(pipelines::SubmitArgs),
    /// List pipelines, newest first
    List(pipelines::ListArgs),
    /// Show one pipeline with its actions, attempts and commands
    Show(pipelines::ShowArgs),
    /// Print the logs of a pipeline or of one action
    Logs(logs::LogsArgs),
    /// Run a program in an action that runs on this machine, to look into it
    Exec(exec::ExecArgs),
    /// Wish a pipeline ended
    Cancel(pipelines::ShowArgs),
    /// Run a finished pipeline again, or what failed of it
    Rerun(pipelines::RerunArgs),
    /// Say why an action waits, was skipped, or ended as it did
    Why(pipelines::WhyArgs),
    /// What actions have kept for people
    #[command(subcommand)]
    Artifact(ArtifactCommand),
    /// What actions have kept for later ones
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Delete now what has had its time, which a server does by itself every hour
    Gc(gc::GcArgs),
    /// Watched repositories
    #[command(subcommand)]
    Repo(RepoCommand),
    /// Run an agent, or look after the agents of a server
    Agent(Box<AgentArgs>),
    /// Check the manifests of a repository, without a server
    Check(check::CheckArgs),
    /// Say what works on this machine, and how to get what is missing
    Doctor(doctor::DoctorArgs),
    /// Run everything in one process, on one data folder
    Up(up::UpArgs),
    /// Run the controller
    Controller(serve::ControllerArgs),
    /// Run the scheduler
    Scheduler(serve::SchedulerArgs),
    /// Run the monitor
    Monitor(serve::MonitorArgs),
    /// Run a machine of the monitor that agents carry
    #[command(subcommand)]
    Vm(VmCommand),
    /// Print a shell's completion script
    Completion(completion::CompletionArgs),
    /// Write the manual pages
    #[command(hide = true)]
    Man(completion::ManArgs),
}

impl Command {
    /// Whether it takes signals itself, to end in order.
    pub fn is_service(&self) -> bool {
        match self {
            Self::Run(_) | Self::Up(_) | Self::Controller(_) | Self::Scheduler(_) | Self::Monitor(_) => true,
            Self::Agent(args) => args.command.is_none(),
            _ => false,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum ArtifactCommand {
    /// List what a pipeline's actions have kept
    List(artifacts::ArtifactListArgs),
    /// Download and unpack what a pipeline's actions have kept
    Download(artifacts::ArtifactDownloadArgs),
    /// Delete artifacts
    Delete(artifacts::ArtifactDeleteArgs),
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// List the entries of caches, last used first
    List(caches::CacheListArgs),
    /// Delete entries of caches
    Delete(caches::CacheDeleteArgs),
}

#[derive(Debug, Subcommand)]
pub enum RepoCommand {
    /// List the watched repositories
    List(repos::RepoListArgs),
    /// Watch a repository
    Add(repos::RepoAddArgs),
    /// Watch a repository no longer
    Remove(repos::RepoRemoveArgs),
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Boot one Linux guest behind hardware virtualization (KVM)
    Run(vm::VmRunArgs),
}

/// `sealci agent` alone runs one.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct AgentArgs {
    #[command(subcommand)]
    pub command: Option<AgentCommand>,
    #[command(flatten)]
    pub serve: serve::AgentServeArgs,
}

#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// List the agents
    List(agents::AgentListArgs),
    /// Give an agent no new work
    Drain(agents::AgentDrainArgs),
    /// Give a drained agent work again
    Undrain(agents::AgentDrainArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn command_lines_are_understood() {
        for line in [
            "submit",
            "submit . --follow",
            "submit --repo https://example.org/x --ref main --file a.yaml",
            "list --state running -n 5 --json",
            "list --outcome timed_out",
            "show 7",
            "logs 7",
            "logs -f #7",
            "logs 7 build --attempt 2",
            "logs 7 --failed",
            "cancel 7",
            "rerun 7 --failed --follow",
            "why 7 test",
            "agent",
            "agent list --json",
            "agent drain a1",
            "repo add https://example.org/x",
            "repo list",
            "repo remove 1",
            "artifact list 7 --json",
            "artifact download 7 --action build out/a b --output /tmp/x --json",
            "artifact download 7 --archive -o x",
            "artifact delete 018f0000-0000-7000-8000-00000000000a",
            "cache list --repository https://example.org/x -n 500",
            "cache delete 018f0000-0000-7000-8000-00000000000a 018f0000-0000-7000-8000-00000000000b",
            "gc --dry-run --json",
            "up --objects s3://b/p --keep-artifacts 12h --cache-budget 5GiB --keep-logs 7d --logs-budget 1GiB",
            "controller --agents-url https://ci.example.org --max-upload 1GiB",
            "check --file x.yaml --json",
            "doctor",
            "completion bash",
            "run",
            "run .. --action a --action b --executor process --allow-process --json",
            "run --file x.yaml --sandbox-path /opt --sandbox-path /srv",
            "up --demo --exit",
            "up --workspace-bytes 1000 --disk-reserve-bytes 0",
            "up --data /tmp/x",
            "controller --data /tmp/x",
            "scheduler",
            "monitor",
        ] {
            let words = std::iter::once("sealci").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn wrong_command_lines_end_with_2() {
        for line in [
            "",
            "submit . --repo https://example.org/x",
            "list -n 0",
            "list -n 201",
            "list --state done",
            "logs",
            "logs 7 --failed -f",
            "logs 7 --attempt 2",
            "up --exit",
            "up --workspace-bytes 0",
            "run --executor nonsense",
            "agent drain",
            "artifact download 7 x --archive",
            "artifact delete",
            "cache delete 7",
            "up --keep-caches forever",
            "nonsense",
        ] {
            let words = std::iter::once("sealci").chain(line.split(' ').filter(|word| !word.is_empty()));
            let error = Cli::try_parse_from(words).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
            assert_ne!(error.kind(), ErrorKind::DisplayHelp);
        }
    }
}
