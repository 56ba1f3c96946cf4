//! The commands that run one service each: from flags and the environment to its configuration, and until a signal.
//!
//! Services that share a data folder find one another's secrets in it, so that on one machine they need no flags at all.

mod args;
mod images;
mod storage;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sealci_agent::Shutdown;
use sealci_agent::executor::cgroup::{CgroupError, Cgroups, Layout};
use sealci_agent::executor::docker::{DockerExecutor, DockerOptions, PullOptions};
use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::executor::helper::HelperCommand;
use sealci_agent::executor::process::ProcessExecutor;
use sealci_agent::executor::rootless;
use sealci_agent::executor::sandbox::SandboxExecutor;
use sealci_agent::executor::sealed::{Sealer, SealerOptions};
use sealci_agent::executor::{Executor, ExecutorError};
use sealci_agent::mirror::MirrorCheckout;
use sealci_core::plan::Resources;
use sealci_monitor::ControllerAddress;
use sealci_service::auth::{Role, Token, Tokens};
use sealci_service::database::DatabaseUrl;
use tokio_util::sync::CancellationToken;

use crate::connect::is_loopback;
use crate::data_folder::DataFolder;
use crate::exit::{Exit, Failure};
use crate::service::{self, Service};

pub use storage::StorageArgs;

pub use args::{
    AgentServeArgs, ControllerArgs, GitArgs, GitTrustArgs, HurryArgs, ListenArgs, MonitorArgs,
    RepositoriesArgs, RoomArgs, SchedulerArgs, TrustArgs,
};
pub use images::{ImageArgs, ImageOffer, cached_images};

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
    args.agents_url.iter().try_for_each(|url| check_dialled("--agents-url", url))?;
    let identity = args.listener.identity()?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let admin = folder.secret(ADMIN_TOKEN).map_err(DataFolder::failure)?;
    let monitor = folder.secret(MONITOR_TOKEN).map_err(DataFolder::failure)?;
    let (door, url) = service::bind("controller", args.listen, identity.as_ref()).await?;
    // Who listens on loopback is reached there; agents elsewhere need another address.
    let own = Some(url.clone()).filter(|_| args.listen.ip().is_loopback());
    let storage = args.storage.config(&folder, args.agents_url.clone().or(own))?;
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
        git_ca: args.git.trust.authority()?,
        git_known_hosts: args.git.trust.known_hosts()?,
        lost_after: Duration::from_millis(args.lost_after_ms),
        lease: Duration::from_millis(args.lease_ms),
        close_logs_after: sealci_controller::CLOSE_LOGS_AFTER,
        grace: Duration::from_millis(args.grace_ms),
        log_quota_bytes: args.log_quota_bytes,
        storage,
    };
    let run = async move { service::ended("controller", sealci_controller::serve(config, door, stop).await) };
    Service::listening("controller", url, args.listener.announce.as_deref(), run)
}

/// Opens the scheduler's door and makes it ready to run.
pub async fn prepare_scheduler(args: &SchedulerArgs, stop: CancellationToken) -> Result<Service, Failure> {
    let identity = args.listener.identity()?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let cluster_secret = secret(args.cluster_secret_file.as_ref(), &folder, CLUSTER_SECRET)?;
    let mut config = sealci_scheduler::Config::new(cluster_secret.expose().into()).hurried(args.hurry.hurry);
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
    let git = args.git.options(folder.path("monitor/git-home"))?;
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
    args.scheduler.iter().try_for_each(|url| check_dialled("--scheduler", url))?;
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
    let git = sealci_git::Git::new(args.git.options(own.join("git-home"))?)
        .map_err(|error| trouble("git", &error))?;
    let mirrors = sealci_git::Mirrors::new(git, own.join("mirrors"), MIRRORS_BUDGET_BYTES)
        .map_err(|error| trouble("mirrors", &error))?;
    let checkout = MirrorCheckout::new(mirrors, args.git.transports());
    let name = args.name.clone().unwrap_or_else(host_name);
    let offer = ExecutorOffer {
        sandbox_path: args.sandbox_path.clone(),
        allow_process: args.allow_process,
        allow_fake: args.allow_fake,
        network: true,
        images: Some(args.images.offer(own.join("images"))?),
        docker: args.images.docker_socket()?,
        docker_logins: args.images.logins_file(),
    };
    let mut config = sealci_agent::Config::new(
        name,
        own.clone(),
        args.scheduler.clone(),
        executors(&offer, &own)?,
        Arc::new(checkout),
    );
    config.enrolment_token = enrolment_token.map(|token| token.expose().to_owned().into());
    config.labels = labels(&args.label)?;
    config.room = args.room.limits();
    config.periods = config.periods.hurried(args.hurry.hurry);
    config.periods.resend = Duration::from_millis(args.resend_ms);
    config.min_free_disk_bytes = args.room.min_free_disk_bytes.unwrap_or(config.min_free_disk_bytes);
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
    /// Whether sealed actions that ask for it reach outwards.
    pub network: bool,
    /// Where images come from and are kept; none: no action runs in one.
    pub images: Option<ImageOffer>,
    /// The socket of a daemon that runs containers; none: no action runs by one.
    pub docker: Option<PathBuf>,
    /// What that daemon is given for registries that ask who pulls.
    pub docker_logins: Option<PathBuf>,
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
    let images = offer.images.as_ref().and_then(|images| match images.open() {
        Ok(store) => Some((images, store)),
        Err(why) => {
            tracing::warn!(%why, "actions cannot run in images");
            None
        }
    });
    let sealer = sealer(offer, own, &cgroups);
    if let Ok(sealer) = &sealer {
        if let Some(problem) = sealer.network_problem().filter(|_| offer.network) {
            tracing::warn!(problem, "actions in sandboxes and machines have no network");
        }
        executors.push(Arc::new(SandboxExecutor::new(sealer.clone(), offer.sandbox_path.clone())));
        if let Some((images, store)) = &images {
            match images.executor(sealer.clone(), store.clone()) {
                Ok(executor) => executors.push(executor),
                Err(why) => tracing::warn!(%why, "actions cannot run in images"),
            }
        }
    }
    if let Err(why) = &sealer {
        tracing::warn!(%why, "actions cannot be sealed here");
    }
    if let Some((images, store)) = images {
        let groups = cgroups.as_ref().ok().cloned();
        let machines = images.machines(own, store, groups, sealer.as_ref().ok().cloned());
        executors.extend(machines.map_err(|error| unusable("microvm", error))?);
    }
    if let Some(socket) = &offer.docker {
        let options = DockerOptions {
            socket: socket.clone(),
            network: offer.network,
            pull: PullOptions { credentials: offer.docker_logins.clone(), ..PullOptions::default() },
            ..DockerOptions::of(instance_name(own))
        };
        let docker = DockerExecutor::new(own, options).map_err(|error| unusable("docker", error))?;
        executors.push(Arc::new(docker));
    }
    if offer.allow_process {
        let process = ProcessExecutor::new(own, cgroups.ok()).map_err(|error| unusable("process", error))?;
        executors.push(Arc::new(process));
    }
    if offer.allow_fake {
        executors.push(Arc::new(FakeExecutor::new()));
    }
    if let (true, Err(why)) = (executors.is_empty(), sealer) {
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
    if let Ok(layout) = Layout::detect()
        && let Err(error) = Cgroups::clear_up_after(layout, &instance_name(own))
    {
        tracing::error!(%error, "something of an action is still there");
    }
}

/// Seals actions, with root's means or an ordinary user's; or why that cannot be.
fn sealer(
    offer: &ExecutorOffer,
    own: &Path,
    cgroups: &Result<Cgroups, CgroupError>,
) -> Result<Sealer, String> {
    let options = SealerOptions { network: offer.network, ..SealerOptions::default() };
    let made = match (nix::unistd::geteuid().is_root(), cgroups) {
        (true, Ok(cgroups)) => Sealer::new(own, cgroups.clone(), options),
        (true, Err(error)) => return Err(format!("there are no control groups to use: {error}")),
        (false, cgroups) => Sealer::rootless(own, cgroups.as_ref().ok().cloned(), options),
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
