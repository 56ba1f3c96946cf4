//! The commands that run one service each: from flags and the environment to its configuration, and until a signal.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::exit::{Exit, Failure};

/// What every listener has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Listener")]
pub struct ListenArgs {
    /// The certificate chain, PEM; needed where --listen is not loopback
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Write the bound address to this file, once requests are answered
    #[arg(long, value_name = "FILE")]
    pub announce: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ControllerArgs {
    /// The address of the REST API
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8420", env = "SEALCI_CONTROLLER_LISTEN")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub listener: ListenArgs,
    /// The data folder [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    pub data: Option<PathBuf>,
    /// postgres://… [default: SQLite in the data folder]
    #[arg(long, value_name = "URL", env = "SEALCI_DATABASE", hide_env_values = true)]
    pub database: Option<String>,
    /// A scheduler to dispatch by; may be given several times
    #[arg(long, value_name = "URL", env = "SEALCI_SCHEDULER", default_value = "http://127.0.0.1:8422")]
    pub scheduler: Vec<String>,
    /// What proves a controller to the schedulers
    #[arg(long, value_name = "FILE", env = "SEALCI_CLUSTER_SECRET_FILE")]
    pub cluster_secret_file: Option<PathBuf>,
    /// A token of the REST API with its role: read=FILE, run=FILE or admin=FILE; may be given several times
    #[arg(long, value_name = "ROLE=FILE")]
    pub api_token: Vec<String>,
    /// What lets a new agent enrol
    #[arg(long, value_name = "FILE", env = "SEALCI_ENROLMENT_TOKEN_FILE")]
    pub enrolment_token_file: Option<PathBuf>,
    /// Read repositories of this machine's disk (file://) too
    #[arg(long)]
    pub allow_file: bool,
}

#[derive(Debug, Args)]
pub struct SchedulerArgs {
    /// The address for controllers and agents (gRPC)
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8422", env = "SEALCI_SCHEDULER_LISTEN")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub listener: ListenArgs,
    /// What a controller proves itself with
    #[arg(long, value_name = "FILE", env = "SEALCI_CLUSTER_SECRET_FILE")]
    pub cluster_secret_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct MonitorArgs {
    /// The address of the REST API
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8421", env = "SEALCI_MONITOR_LISTEN")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub listener: ListenArgs,
    /// The data folder [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    pub data: Option<PathBuf>,
    /// postgres://… [default: SQLite in the data folder]
    #[arg(long, value_name = "URL", env = "SEALCI_DATABASE", hide_env_values = true)]
    pub database: Option<String>,
    /// The controller that makes the pipelines
    #[arg(long, value_name = "URL", env = "SEALCI_CONTROLLER", default_value = "http://127.0.0.1:8420")]
    pub controller: String,
    /// The token for the controller (role run)
    #[arg(long, value_name = "FILE")]
    pub controller_token_file: Option<PathBuf>,
    /// A token of the REST API with its role: read=FILE, run=FILE or admin=FILE; may be given several times
    #[arg(long, value_name = "ROLE=FILE")]
    pub api_token: Vec<String>,
    /// How often each repository is asked, where its configuration says nothing
    #[arg(long, value_name = "SECONDS", default_value = "10")]
    pub poll_seconds: u64,
    /// Watch repositories of this machine's disk (file://) too
    #[arg(long)]
    pub allow_file: bool,
}

#[derive(Debug, Args)]
pub struct AgentServeArgs {
    /// Where it dials
    #[arg(long, value_name = "URL", env = "SEALCI_SCHEDULER", default_value = "http://127.0.0.1:8422")]
    pub scheduler: String,
    /// The authority of the scheduler's certificate, PEM
    #[arg(long, value_name = "FILE", env = "SEALCI_CA")]
    pub ca_file: Option<PathBuf>,
    /// The data folder: credential, spool, mirrors, workspaces [default: $XDG_DATA_HOME/sealci/agent]
    #[arg(long, value_name = "DIR", env = "SEALCI_AGENT_DATA")]
    pub data: Option<PathBuf>,
    /// What lets it enrol the first time
    #[arg(long, value_name = "FILE", env = "SEALCI_ENROLMENT_TOKEN_FILE")]
    pub enrolment_token_file: Option<PathBuf>,
    /// Its name for people [default: the host's]
    #[arg(long)]
    pub name: Option<String>,
    /// A label that it offers, name=value; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// CPUs for actions, in thousandths [default: all]
    #[arg(long, value_name = "MILLIS")]
    pub cpu_millis: Option<u64>,
    /// Memory for actions [default: all but a reserve]
    #[arg(long, value_name = "BYTES")]
    pub memory_bytes: Option<u64>,
    /// Offer the executor `process`: no isolation at all
    #[arg(long)]
    pub allow_process: bool,
    /// Fetch repositories of this machine's disk (file://) too
    #[arg(long)]
    pub allow_file: bool,
    /// Write this file once it is connected
    #[arg(long, value_name = "FILE")]
    pub announce: Option<PathBuf>,
}

fn not_yet(service: &str) -> Failure {
    Failure::infrastructure(format!("this build has no {service} yet"))
}

pub async fn controller(_args: ControllerArgs) -> Result<Exit, Failure> {
    Err(not_yet("controller"))
}

pub async fn scheduler(_args: SchedulerArgs) -> Result<Exit, Failure> {
    Err(not_yet("scheduler"))
}

pub async fn monitor(_args: MonitorArgs) -> Result<Exit, Failure> {
    Err(not_yet("monitor"))
}

pub async fn agent(_args: AgentServeArgs) -> Result<Exit, Failure> {
    Err(not_yet("agent"))
}
