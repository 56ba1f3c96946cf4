//! The flags of the commands that run one service each, and what they mean alone: files are read, values checked.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use sealci_agent::RoomLimits;
use sealci_git::{AllowedTransports, CredentialBook};
use sealci_service::tls::{self, Identity};

use super::images::ImageArgs;
use crate::exit::{Exit, Failure};
use crate::serve::StorageArgs;

/// What every listener has.
#[derive(Debug, Default, Args)]
pub struct ListenArgs {
    /// Write the bound address to this file, once requests are answered
    #[arg(long, value_name = "FILE")]
    pub announce: Option<PathBuf>,
    /// The certificate of the listener and those that lead to its authority, PEM; needed where other machines reach it
    #[arg(long, value_name = "FILE", env = "SEALCI_TLS_CERT", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// The certificate's private key, PEM
    #[arg(long, value_name = "FILE", env = "SEALCI_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

impl ListenArgs {
    pub(super) fn identity(&self) -> Result<Option<Identity>, Failure> {
        let (Some(certificate), Some(key)) = (&self.tls_cert, &self.tls_key) else { return Ok(None) };
        let identity = Identity::from_files(certificate, key);
        identity.map(Some).map_err(|error| Failure::of_error(Exit::Usage, "--tls-cert, --tls-key", &error))
    }
}

/// Whom a service trusts that dials another.
#[derive(Debug, Default, Clone, Args)]
pub struct TrustArgs {
    /// The authority of the certificates it is shown, PEM [default: those that this system trusts]
    #[arg(long = "ca", alias = "ca-file", value_name = "FILE", env = "SEALCI_CA")]
    pub ca: Option<PathBuf>,
}

impl TrustArgs {
    pub(super) fn authority(&self) -> Result<Option<Vec<u8>>, Failure> {
        let Some(path) = &self.ca else { return Ok(None) };
        tls::read_authority(path).map(Some).map_err(|error| Failure::of_error(Exit::Usage, "--ca", &error))
    }
}

/// Which repositories may be read, beyond those on public addresses by https and ssh.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Repositories")]
pub struct GitArgs {
    /// Also those on this machine's disk (file://)
    #[arg(long)]
    pub allow_file: bool,
    /// Also by http, which anyone on the way can change
    #[arg(long)]
    pub allow_http: bool,
    /// Also those on loopback and private addresses
    #[arg(long)]
    pub allow_local_addresses: bool,
    #[command(flatten)]
    pub trust: GitTrustArgs,
}

/// Which repositories' servers are believed.
#[derive(Debug, Default, Clone, Args)]
#[command(next_help_heading = "Repositories")]
pub struct GitTrustArgs {
    /// The authority of repositories' https servers, PEM [default: those that this system trusts]
    #[arg(long, value_name = "FILE", env = "SEALCI_GIT_CA")]
    pub git_ca: Option<PathBuf>,
    /// The only host keys to trust for ssh, as in known_hosts [default: the first that a host shows is remembered]
    #[arg(long, value_name = "FILE", env = "SEALCI_GIT_KNOWN_HOSTS")]
    pub git_known_hosts: Option<PathBuf>,
}

impl GitTrustArgs {
    /// Checked, and absolute: git runs elsewhere.
    pub(super) fn authority(&self) -> Result<Option<PathBuf>, Failure> {
        let Some(path) = &self.git_ca else { return Ok(None) };
        tls::read_authority(path).map_err(|error| Failure::of_error(Exit::Usage, "--git-ca", &error))?;
        absolute("--git-ca", path).map(Some)
    }

    pub(super) fn known_hosts(&self) -> Result<Option<PathBuf>, Failure> {
        self.git_known_hosts.as_ref().map(|path| absolute("--git-known-hosts", path)).transpose()
    }
}

/// The path of a file that is there, from anywhere.
fn absolute(flag: &str, path: &Path) -> Result<PathBuf, Failure> {
    fs::canonicalize(path)
        .map_err(|error| Failure::of_error(Exit::Usage, format!("{flag} {}", path.display()), &error))
}

/// What opens private repositories.
#[derive(Debug, Default, Clone, Args)]
#[command(next_help_heading = "Repositories")]
pub struct RepositoriesArgs {
    /// A JSON file that says which credentials open which private repository
    #[arg(long, value_name = "FILE", env = "SEALCI_REPOSITORIES")]
    pub repositories: Option<PathBuf>,
}

impl RepositoriesArgs {
    pub(super) fn credentials(&self) -> Result<Arc<CredentialBook>, Failure> {
        let Some(path) = &self.repositories else { return Ok(Arc::default()) };
        let book = CredentialBook::from_file(path);
        book.map(Arc::new).map_err(|error| Failure::of_error(Exit::Usage, "--repositories", &error))
    }
}

/// What running actions may take of the disk.
#[derive(Debug, Clone, Copy, Args)]
pub struct RoomArgs {
    /// What an action may write to the disk: its workspace and scratch folder together [default: 32 GiB]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(1..))]
    pub workspace_bytes: Option<u64>,
    /// Stop actions that grow, the largest first, when less than this is free; 0: never [default: 512 MiB]
    #[arg(long, value_name = "BYTES")]
    pub disk_reserve_bytes: Option<u64>,
    /// Take no new action when less than this is free [default: 1 GiB]
    #[arg(long, value_name = "BYTES")]
    pub min_free_disk_bytes: Option<u64>,
}

/// How patient a service is with others. Tests of faults are not.
#[derive(Debug, Clone, Copy, Args)]
pub struct HurryArgs {
    /// Every period after which it takes another for silent or tries again is divided by this
    #[arg(long, value_name = "FACTOR", default_value = "1", hide = true, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub hurry: u32,
}

impl Default for HurryArgs {
    fn default() -> Self {
        Self { hurry: 1 }
    }
}

impl RoomArgs {
    pub fn limits(self) -> RoomLimits {
        let usual = RoomLimits::default();
        RoomLimits {
            workspace_bytes: self.workspace_bytes.unwrap_or(usual.workspace_bytes),
            reserve_bytes: self.disk_reserve_bytes.unwrap_or(usual.reserve_bytes),
        }
    }
}

impl GitArgs {
    /// What is right where only this machine's owner says what is built.
    pub fn all(trust: GitTrustArgs) -> Self {
        Self { allow_file: true, allow_http: true, allow_local_addresses: true, trust }
    }

    /// How git is run with the home folder `home`.
    pub(super) fn options(&self, home: PathBuf) -> Result<sealci_git::Options, Failure> {
        let mut options = sealci_git::Options::new(home);
        options.allow_local_addresses = self.allow_local_addresses;
        options.tls_ca = self.trust.authority()?;
        options.known_hosts = self.trust.known_hosts()?;
        Ok(options)
    }

    pub(super) fn transports(&self) -> AllowedTransports {
        AllowedTransports { http: self.allow_http, file: self.allow_file }
    }
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
    /// A scheduler to dispatch by; may be given several times, or as a list with commas: it has a line to each
    #[arg(
        long,
        value_name = "URL",
        env = "SEALCI_SCHEDULER",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8422"
    )]
    pub scheduler: Vec<String>,
    #[command(flatten)]
    pub trust: TrustArgs,
    /// What proves a controller to the schedulers [default: of the data folder]
    #[arg(long, value_name = "FILE", env = "SEALCI_CLUSTER_SECRET_FILE")]
    pub cluster_secret_file: Option<PathBuf>,
    /// A token of the REST API with its role: read=FILE, run=FILE or admin=FILE; may be given several times
    #[arg(long, value_name = "ROLE=FILE")]
    pub api_token: Vec<String>,
    /// What lets a new agent enrol [default: of the data folder]
    #[arg(long, value_name = "FILE", env = "SEALCI_ENROLMENT_TOKEN_FILE")]
    pub enrolment_token_file: Option<PathBuf>,
    #[command(flatten)]
    pub git: GitArgs,
    #[command(flatten)]
    pub repositories: RepositoriesArgs,
    #[command(flatten)]
    pub storage: StorageArgs,
    /// Where agents reach this REST API, https://ci.example.org:8420 [default: --listen, where that is loopback]
    #[arg(long, value_name = "URL", env = "SEALCI_AGENTS_URL")]
    pub agents_url: Option<String>,
    /// How long an agent may be silent before its attempts are lost
    #[arg(long, value_name = "MILLISECONDS", default_value = "60000", hide = true)]
    pub lost_after_ms: u64,
    /// How long a replica of the controller may be silent before the others take over what it owned
    #[arg(long, value_name = "MILLISECONDS", default_value = "10000", hide = true)]
    pub lease_ms: u64,
    /// Cut an action's log, visibly, past this length
    #[arg(long, value_name = "BYTES", default_value = "1073741824", value_parser = clap::value_parser!(u64).range(1..))]
    pub log_quota_bytes: u64,
    /// How long what is cancelled has between TERM and KILL
    #[arg(long, value_name = "MILLISECONDS", default_value = "10000", hide = true)]
    pub grace_ms: u64,
}

#[derive(Debug, Args)]
pub struct SchedulerArgs {
    /// The address for controllers and agents (gRPC)
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8422", env = "SEALCI_SCHEDULER_LISTEN")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub listener: ListenArgs,
    /// The data folder [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    pub data: Option<PathBuf>,
    /// What a controller proves itself with [default: of the data folder]
    #[arg(long, value_name = "FILE", env = "SEALCI_CLUSTER_SECRET_FILE")]
    pub cluster_secret_file: Option<PathBuf>,
    #[command(flatten)]
    pub hurry: HurryArgs,
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
    #[command(flatten)]
    pub trust: TrustArgs,
    /// The token for the controller, role run [default: of the data folder]
    #[arg(long, value_name = "FILE")]
    pub controller_token_file: Option<PathBuf>,
    /// A token of the REST API with its role: read=FILE, run=FILE or admin=FILE; may be given several times
    #[arg(long, value_name = "ROLE=FILE")]
    pub api_token: Vec<String>,
    /// How often each repository is asked, where its configuration says nothing
    #[arg(long, value_name = "MILLISECONDS", default_value = "10000")]
    pub poll_ms: u64,
    #[command(flatten)]
    pub git: GitArgs,
    #[command(flatten)]
    pub repositories: RepositoriesArgs,
}

#[derive(Debug, Args)]
pub struct AgentServeArgs {
    /// A scheduler that it dials; may be given several times, or as a list with commas: when one is gone, the next is tried
    #[arg(
        long,
        value_name = "URL",
        env = "SEALCI_SCHEDULER",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:8422"
    )]
    pub scheduler: Vec<String>,
    #[command(flatten)]
    pub trust: TrustArgs,
    /// The data folder; the agent's own is `agent` in it [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    pub data: Option<PathBuf>,
    /// What lets it enrol the first time [default: of the data folder]
    #[arg(long, value_name = "FILE", env = "SEALCI_ENROLMENT_TOKEN_FILE")]
    pub enrolment_token_file: Option<PathBuf>,
    /// Its name for people [default: the host's]
    #[arg(long)]
    pub name: Option<String>,
    /// A label that it offers, name=value; may be given several times
    #[arg(long, value_name = "NAME=VALUE")]
    pub label: Vec<String>,
    /// CPUs for actions, in thousandths [default: all]
    #[arg(long, value_name = "MILLIS", requires = "memory_bytes")]
    pub cpu_millis: Option<u64>,
    /// Memory for actions [default: all but a reserve]
    #[arg(long, value_name = "BYTES", requires = "cpu_millis")]
    pub memory_bytes: Option<u64>,
    #[command(flatten)]
    pub room: RoomArgs,
    /// A folder or file of this machine that actions in the sandbox see, read-only; may be given several times
    #[arg(long, value_name = "PATH")]
    pub sandbox_path: Vec<PathBuf>,
    /// Offer the executor `process`: no isolation at all
    #[arg(long)]
    pub allow_process: bool,
    /// Offer the executor `fake`, which plays a script
    #[arg(long, hide = true)]
    pub allow_fake: bool,
    /// What is not acknowledged for so long is sent again
    #[arg(long, value_name = "MILLISECONDS", default_value = "10000", hide = true)]
    pub resend_ms: u64,
    #[command(flatten)]
    pub hurry: HurryArgs,
    #[command(flatten)]
    pub images: ImageArgs,
    #[command(flatten)]
    pub git: GitArgs,
}
