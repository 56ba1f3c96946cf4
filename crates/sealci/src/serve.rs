//! The commands that run one service each: from flags and the environment to its configuration, and until a signal.
//!
//! Services that share a data folder find one another's secrets in it, so that on one machine they need no flags at all.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use sealci_agent::Shutdown;
use sealci_agent::executor::cgroup::{CgroupError, Cgroups, Layout};
use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::executor::process::ProcessExecutor;
use sealci_agent::executor::rootless;
use sealci_agent::executor::sandbox::{HelperCommand, SandboxExecutor, SandboxOptions};
use sealci_agent::executor::{Executor, ExecutorError};
use sealci_agent::mirror::MirrorCheckout;
use sealci_core::plan::Resources;
use sealci_git::{AllowedTransports, CredentialBook};
use sealci_monitor::ControllerAddress;
use sealci_service::auth::{Role, Token, Tokens};
use sealci_service::database::DatabaseUrl;
use sealci_service::tls::{self, Identity};
use tokio_util::sync::CancellationToken;

use crate::connect::is_loopback;
use crate::data_folder::DataFolder;
use crate::exit::{Exit, Failure};
use crate::service::{self, Service};

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
    fn identity(&self) -> Result<Option<Identity>, Failure> {
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
    fn authority(&self) -> Result<Option<Vec<u8>>, Failure> {
        let Some(path) = &self.ca else { return Ok(None) };
        tls::read_authority(path).map(Some).map_err(|error| Failure::of_error(Exit::Usage, "--ca", &error))
    }
}

/// Refuses an address at which a secret would travel unencrypted between machines.
fn check_dialled(flag: &str, url: &str) -> Result<(), Failure> {
    let parsed = reqwest::Url::parse(url)
        .map_err(|error| Failure::usage(format!("{flag} `{url}` is no address: {error}")))?;
    match parsed.scheme() {
        "https" => Ok(()),
        "http" if is_loopback(&parsed) => Ok(()),
        "http" => Err(Failure::usage(format!("{flag} {url}: secrets would travel there unencrypted"))
            .help("name it with https://; plain http is for this machine only")),
        _ => Err(Failure::usage(format!("{flag} `{url}` is neither http nor https"))),
    }
}

/// Which repositories may be read, beyond those on public addresses by https and ssh.
#[derive(Debug, Clone, Copy, Args)]
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
    fn credentials(&self) -> Result<Arc<CredentialBook>, Failure> {
        let Some(path) = &self.repositories else { return Ok(Arc::default()) };
        let book = CredentialBook::from_file(path);
        book.map(Arc::new).map_err(|error| Failure::of_error(Exit::Usage, "--repositories", &error))
    }
}

impl GitArgs {
    /// What is right where only this machine's owner says what is built.
    pub const ALL: Self = Self { allow_file: true, allow_http: true, allow_local_addresses: true };

    fn transports(self) -> AllowedTransports {
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
    /// A scheduler to dispatch by; may be given several times
    #[arg(long, value_name = "URL", env = "SEALCI_SCHEDULER", default_value = "http://127.0.0.1:8422")]
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
    /// How long an agent may be silent before its attempts are lost
    #[arg(long, value_name = "MILLISECONDS", default_value = "60000", hide = true)]
    pub lost_after_ms: u64,
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
    /// Where it dials
    #[arg(long, value_name = "URL", env = "SEALCI_SCHEDULER", default_value = "http://127.0.0.1:8422")]
    pub scheduler: String,
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
    pub git: GitArgs,
}

/// The names of the data folder's secrets.
pub const ADMIN_TOKEN: &str = "admin.token";
const MONITOR_TOKEN: &str = "monitor.token";
const CLUSTER_SECRET: &str = "cluster.secret";
const ENROLMENT_TOKEN: &str = "enrolment.token";

/// Takes a setting from its file if one is named, else from the data folder.
fn secret(given: Option<&PathBuf>, folder: &DataFolder, name: &str) -> Result<Token, Failure> {
    match given {
        Some(path) => {
            Token::from_file(path).map_err(|error| Failure::of_error(Exit::Usage, "bad secret", &error))
        }
        None => folder.secret(name).map_err(DataFolder::failure),
    }
}

/// The data folder's own tokens, and `ROLE=FILE`s.
fn api_tokens(own: &[(&Token, Role)], given: &[String]) -> Result<Tokens, Failure> {
    let mut tokens = own.iter().fold(Tokens::default(), |tokens, (token, role)| tokens.with(token, *role));
    for text in given {
        let (role, path) = text.split_once('=').ok_or_else(|| {
            Failure::usage(format!("--api-token {text}: say ROLE=FILE, such as read=/etc/sealci/read.token"))
        })?;
        let role = match role {
            "read" => Role::Read,
            "run" => Role::Run,
            "admin" => Role::Admin,
            _ => {
                return Err(Failure::usage(format!("--api-token {text}: the roles are read, run and admin")));
            }
        };
        let token = Token::from_file(path.as_ref())
            .map_err(|error| Failure::of_error(Exit::Usage, "--api-token", &error))?;
        tokens = tokens.with(&token, role);
    }
    Ok(tokens)
}

fn database(given: Option<&String>, folder: &DataFolder, file: &str) -> Result<DatabaseUrl, Failure> {
    let has_password = |url: &&String| {
        let parsed = reqwest::Url::parse(url);
        parsed.is_ok_and(|url| {
            url.password().is_some() || url.query_pairs().any(|(name, _)| name == "password")
        })
    };
    let in_environment = |url: &String| std::env::var("SEALCI_DATABASE").is_ok_and(|given| given == *url);
    if given.filter(has_password).is_some_and(|url| !in_environment(url)) {
        return Err(Failure::usage("--database: every user of this machine could read the password")
            .help("give the address in $SEALCI_DATABASE, or the password in a file that $PGPASSFILE names"));
    }
    match given {
        Some(url) => url.parse().map_err(|error| Failure::of_error(Exit::Usage, "--database", &error)),
        None => Ok(DatabaseUrl::Sqlite(folder.path(file))),
    }
}

/// Opens the controller's door and makes it ready to run.
pub async fn prepare_controller(args: &ControllerArgs, stop: CancellationToken) -> Result<Service, Failure> {
    args.scheduler.iter().try_for_each(|url| check_dialled("--scheduler", url))?;
    let identity = args.listener.identity()?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let admin = folder.secret(ADMIN_TOKEN).map_err(DataFolder::failure)?;
    let monitor = folder.secret(MONITOR_TOKEN).map_err(DataFolder::failure)?;
    let config = sealci_controller::Config {
        database: database(args.database.as_ref(), &folder, "controller.db")?,
        data: folder.path("controller"),
        tokens: api_tokens(&[(&admin, Role::Admin), (&monitor, Role::Run)], &args.api_token)?,
        enrolment_tokens: vec![secret(args.enrolment_token_file.as_ref(), &folder, ENROLMENT_TOKEN)?],
        schedulers: args.scheduler.clone(),
        scheduler_ca_pem: args.trust.authority()?,
        cluster_secret: secret(args.cluster_secret_file.as_ref(), &folder, CLUSTER_SECRET)?,
        transports: args.git.transports(),
        credentials: args.repositories.credentials()?,
        allow_local_addresses: args.git.allow_local_addresses,
        lost_after: Duration::from_millis(args.lost_after_ms),
        grace: Duration::from_millis(args.grace_ms),
    };
    let (door, url) = service::bind("controller", args.listen, identity.as_ref()).await?;
    let run = async move { service::ended("controller", sealci_controller::serve(config, door, stop).await) };
    Service::listening("controller", url, args.listener.announce.as_deref(), run)
}

/// Opens the scheduler's door and makes it ready to run.
pub async fn prepare_scheduler(args: &SchedulerArgs, stop: CancellationToken) -> Result<Service, Failure> {
    let identity = args.listener.identity()?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let cluster_secret = secret(args.cluster_secret_file.as_ref(), &folder, CLUSTER_SECRET)?;
    let mut config = sealci_scheduler::Config::new(cluster_secret.expose().into());
    config.tls = identity.as_ref().map(|identity| sealci_scheduler::Tls {
        certificates_pem: identity.certificates_pem().to_vec(),
        key_pem: identity.key_pem().to_vec().into(),
    });
    let (door, url) = service::bind("scheduler", args.listen, identity.as_ref()).await?;
    let listener = door.into_listener();
    let run =
        async move { service::ended("scheduler", sealci_scheduler::serve(config, listener, stop).await) };
    Service::listening("scheduler", url, args.listener.announce.as_deref(), run)
}

pub async fn controller(args: ControllerArgs) -> Result<Exit, Failure> {
    service::start_log("info")?;
    let stop = CancellationToken::new();
    service::run(vec![prepare_controller(&args, stop.clone()).await?], stop).await
}

pub async fn scheduler(args: SchedulerArgs) -> Result<Exit, Failure> {
    service::start_log("info")?;
    let stop = CancellationToken::new();
    service::run(vec![prepare_scheduler(&args, stop.clone()).await?], stop).await
}

/// Opens the monitor's door and makes it ready to run.
pub async fn prepare_monitor(args: &MonitorArgs, stop: CancellationToken) -> Result<Service, Failure> {
    check_dialled("--controller", &args.controller)?;
    let identity = args.listener.identity()?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let admin = folder.secret(ADMIN_TOKEN).map_err(DataFolder::failure)?;
    let controller = ControllerAddress {
        url: args.controller.clone(),
        ca_pem: args.trust.authority()?,
        token: secret(args.controller_token_file.as_ref(), &folder, MONITOR_TOKEN)?,
    };
    let mut git = sealci_git::Options::new(folder.path("monitor/git-home"));
    git.allow_local_addresses = args.git.allow_local_addresses;
    let database = database(args.database.as_ref(), &folder, "monitor.db")?;
    let mut config = sealci_monitor::Config::new(database, controller, git);
    config.tokens = api_tokens(&[(&admin, Role::Admin)], &args.api_token)?;
    config.transports = args.git.transports();
    config.repositories = args.repositories.credentials()?;
    config.poll_interval = Duration::from_millis(args.poll_ms);
    let (door, url) = service::bind("monitor", args.listen, identity.as_ref()).await?;
    let run = async move { service::ended("monitor", sealci_monitor::serve(config, door, stop).await) };
    Service::listening("monitor", url, args.listener.announce.as_deref(), run)
}

pub async fn monitor(args: MonitorArgs) -> Result<Exit, Failure> {
    service::start_log("info")?;
    let stop = CancellationToken::new();
    service::run(vec![prepare_monitor(&args, stop.clone()).await?], stop).await
}

/// The first signal drains: nothing new is taken, what runs is finished. The second ends the agent now.
pub async fn agent(args: AgentServeArgs) -> Result<Exit, Failure> {
    service::start_log("info")?;
    let shutdown = Shutdown { drain: CancellationToken::new(), stop: CancellationToken::new() };
    let mut signals = service::signals()?;
    let mut running = std::pin::pin!(prepare_agent(&args, shutdown.clone())?.run());
    for token in [&shutdown.drain, &shutdown.stop] {
        tokio::select! {
            ended = &mut running => return ended.map(|()| Exit::Passed),
            name = signals.next() => {
                tracing::info!(signal = name, "asked to end");
                token.cancel();
            }
        }
    }
    tokio::select! {
        ended = running => ended.map(|()| Exit::Passed),
        _ = signals.next() => Ok(Exit::Interrupted),
    }
}

/// The agent's mirrors are thrown away, longest unused first, over this.
const MIRRORS_BUDGET_BYTES: u64 = 20 << 30;

/// Makes an agent ready to run.
pub fn prepare_agent(args: &AgentServeArgs, shutdown: Shutdown) -> Result<Service, Failure> {
    check_dialled("--scheduler", &args.scheduler)?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let own = folder.path("agent");
    let trouble = |what: &str, error: &dyn std::fmt::Display| {
        Failure::infrastructure(format!("the agent's {what}: {error}"))
    };
    fs::create_dir_all(&own).map_err(|error| trouble("data folder", &error))?;
    let enrolment_token = match &args.enrolment_token_file {
        Some(path) => Some(
            Token::from_file(path).map_err(|error| Failure::of_error(Exit::Usage, "bad secret", &error))?,
        ),
        // Another process on this machine may be about to make it; an agent that is enrolled needs none.
        None => Some(folder.secret(ENROLMENT_TOKEN).map_err(DataFolder::failure)?),
    };
    let mut options = sealci_git::Options::new(own.join("git-home"));
    options.allow_local_addresses = args.git.allow_local_addresses;
    let git = sealci_git::Git::new(options).map_err(|error| trouble("git", &error))?;
    let mirrors = sealci_git::Mirrors::new(git, own.join("mirrors"), MIRRORS_BUDGET_BYTES)
        .map_err(|error| trouble("mirrors", &error))?;
    let checkout = MirrorCheckout::new(mirrors, args.git.transports());
    let name = args.name.clone().unwrap_or_else(host_name);
    let offer = ExecutorOffer {
        sandbox_path: args.sandbox_path.clone(),
        allow_process: args.allow_process,
        allow_fake: args.allow_fake,
    };
    let mut config = sealci_agent::Config::new(
        name,
        own.clone(),
        vec![args.scheduler.clone()],
        executors(&offer, &own)?,
        Arc::new(checkout),
    );
    config.enrolment_token = enrolment_token.map(|token| token.expose().to_owned().into());
    config.labels = labels(&args.label)?;
    config.periods.resend = Duration::from_millis(args.resend_ms);
    config.capacity = match (args.cpu_millis, args.memory_bytes) {
        (Some(cpu_millis), Some(memory_bytes)) => Some(Resources { cpu_millis, memory_bytes }),
        _ => None,
    };
    config.scheduler_ca_pem = args.trust.authority()?;
    let run = async move { service::ended("agent", sealci_agent::run(config, shutdown).await) };
    Ok(Service::dialling("agent", run))
}

/// What may be offered to run actions.
#[derive(Debug, Default)]
pub struct ExecutorOffer {
    /// What sealed actions see of this machine besides its programs.
    pub sandbox_path: Vec<PathBuf>,
    pub allow_process: bool,
    pub allow_fake: bool,
}

/// What runs actions, the default first: sealed where this machine lets us, else only what was allowed.
pub fn executors(offer: &ExecutorOffer, own: &Path) -> Result<Vec<Arc<dyn Executor>>, Failure> {
    let unusable = |name: &str, error: ExecutorError| {
        Failure::of_error(Exit::Infrastructure, format!("the executor `{name}` cannot be offered"), &error)
    };
    let cgroups = cgroups(own);
    let mut executors: Vec<Arc<dyn Executor>> = Vec::new();
    if let Err(error) = &cgroups {
        tracing::warn!(%error, "no limits of CPU and memory will hold: there are no control groups to use (`sealci doctor` says more)");
    }
    let sandbox = sandbox(offer, own, &cgroups).map(|sandbox| {
        if let Some(problem) = sandbox.network_problem() {
            tracing::warn!(problem, "actions in the sandbox have no network");
        }
        executors.push(Arc::new(sandbox));
    });
    if let Err(why) = &sandbox {
        tracing::warn!(%why, "actions cannot be sealed here");
    }
    if offer.allow_process {
        let process = ProcessExecutor::new(own, cgroups.ok()).map_err(|error| unusable("process", error))?;
        executors.push(Arc::new(process));
    }
    if offer.allow_fake {
        executors.push(Arc::new(FakeExecutor::new()));
    }
    if let (true, Err(why)) = (executors.is_empty(), sandbox) {
        return Err(Failure::usage(format!("this agent would offer no executor: no sandbox, because {why}")).help(
            "`sealci doctor` says what is missing; run it as root, or allow another executor: --allow-process runs \
             actions as this user, with no isolation",
        ));
    }
    Ok(executors)
}

fn cgroups(own: &Path) -> Result<Cgroups, CgroupError> {
    Cgroups::open(Layout::detect()?, &instance_name(own))
}

/// Ends and removes what [`executors`] made outside of the agent's folder `own`, for an agent that never comes again.
pub fn leave(own: &Path) {
    // Without control groups there is nothing to remove.
    if let Ok(cgroups) = cgroups(own) {
        if let Err(error) = cgroups.sweep() {
            tracing::error!(%error, "something of an action is still there");
        }
        cgroups.close();
    }
}

/// Seals actions, with root's means or an ordinary user's; or why that cannot be.
fn sandbox(
    offer: &ExecutorOffer,
    own: &Path,
    cgroups: &Result<Cgroups, CgroupError>,
) -> Result<SandboxExecutor, String> {
    let options = SandboxOptions { extra_paths: offer.sandbox_path.clone(), ..SandboxOptions::default() };
    let made = match (nix::unistd::geteuid().is_root(), cgroups) {
        (true, Ok(cgroups)) => SandboxExecutor::new(own, cgroups.clone(), options),
        (true, Err(error)) => return Err(format!("there are no control groups to use: {error}")),
        (false, cgroups) => SandboxExecutor::rootless(own, cgroups.as_ref().ok().cloned(), options),
    };
    made.map_err(|error| error.message())
}

/// Whether this user can seal actions here; for a decision that has to be made before there is a data folder.
pub fn can_seal() -> Result<(), String> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    rootless::probe(&HelperCommand::of_this_program()).map(drop).map_err(|error| error.message())
}

/// Tells this agent's control groups from another one's on the same machine, and is the same after a restart: the data
/// folder's place, as 64 bits in hexadecimal (FNV-1a).
fn instance_name(own: &Path) -> String {
    let hash = own.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

fn labels(given: &[String]) -> Result<BTreeMap<String, String>, Failure> {
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty())?;
        Some((name.to_owned(), value.to_owned()))
    };
    given
        .iter()
        .map(|text| pair(text).ok_or_else(|| Failure::usage(format!("--label {text}: say NAME=VALUE"))))
        .collect()
}

/// What people know this machine by.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "agent".to_owned() } else { name.chars().take(128).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_and_labels_are_pairs() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        fs::write(&file, Token::generate().unwrap().expose()).unwrap();
        assert!(api_tokens(&[], &[format!("read={}", file.display())]).is_ok());
        for bad in ["read".to_owned(), format!("root={}", file.display()), "run=/nowhere".to_owned()] {
            assert_eq!(api_tokens(&[], &[bad]).err().map(|failure| failure.exit), Some(Exit::Usage));
        }
        assert_eq!(
            labels(&["a=b=c".to_owned()]).unwrap(),
            BTreeMap::from([("a".to_owned(), "b=c".to_owned())])
        );
        assert!(labels(&["a".to_owned()]).is_err() && labels(&["=a".to_owned()]).is_err());
    }

    #[test]
    fn secrets_neither_travel_in_the_clear_nor_stand_in_process_lists() {
        for good in
            ["http://127.0.0.1:8422", "http://[::1]:1", "http://localhost:1", "https://ci.example.org:8422"]
        {
            assert!(check_dialled("--scheduler", good).is_ok(), "{good}");
        }
        for bad in ["http://ci.example.org:8422", "http://10.0.0.1:1", "http://0.0.0.0:1", "ci:1", "ci"] {
            assert_eq!(
                check_dialled("--scheduler", bad).err().map(|failure| failure.exit),
                Some(Exit::Usage)
            );
        }
        let dir = tempfile::tempdir().unwrap();
        let folder = DataFolder::open(Some(dir.path())).unwrap();
        for (url, is_fine) in [
            ("postgres://sealci@db/sealci", true),
            ("postgres://sealci:secret@db/sealci", false),
            ("postgres://db/sealci?password=secret", false),
        ] {
            let opened = database(Some(&url.to_owned()), &folder, "controller.db");
            assert_eq!(opened.is_ok(), is_fine, "{url}");
            assert!(!format!("{opened:?}").contains("secret"));
        }
    }

    #[test]
    fn an_instance_keeps_its_name() {
        assert_eq!(instance_name(Path::new("/a")), instance_name(Path::new("/a")));
        assert_ne!(instance_name(Path::new("/a")), instance_name(Path::new("/b")));
    }
}
