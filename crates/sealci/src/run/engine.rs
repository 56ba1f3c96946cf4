//! Starts the services of one run: a controller, a scheduler and an agent, as on machines of their own, but in this process
//! and on a temporary folder.
//!
//! Secrets are made for the run and are never written down. The agent dials once the controller and the scheduler have
//! found one another: before, nobody could let it in.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sealci_agent::executor::Executor;
use sealci_agent::workspace::Checkout;
use sealci_agent::{Opened, Persistence, RoomLimits, Shutdown};
use sealci_controller::Controller;
use sealci_controller::dispatch::Dispatch;
use sealci_controller::storage::StorageConfig;
use sealci_controller::storage::objects::{ObjectsConfig, ObjectsLocation};
use sealci_core::plan::Resources;
use sealci_git::AllowedTransports;
use sealci_service::auth::{Role, Token, TokenError, Tokens};
use sealci_service::database::DatabaseUrl;
use sealci_service::listen::Door;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::connect::Server;
use crate::data_folder::ClientFile;
use crate::exit::{Exit, Failure};
use crate::serve;
use crate::service::{self, Running, Service};

/// Free ports of this machine only.
const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// TERM → so long → KILL.
const GRACE: Duration = Duration::from_secs(10);
/// The parts can only be away from one another if this machine sleeps.
const LOST_AFTER: Duration = Duration::from_secs(60);

/// Services that run, and the ways to them.
pub struct Engine {
    pub running: Running,
    /// Makes pipelines of plans.
    pub dispatch: Dispatch,
    /// Shows what becomes of them.
    pub server: Server,
}

/// What a run's agent is made of.
pub struct AgentParts {
    pub executors: Vec<Arc<dyn Executor>>,
    pub checkout: Arc<dyn Checkout>,
    pub room: RoomLimits,
    pub capacity: Resources,
}

/// Starts all of it. `folder` is the run's own, and gone after it.
///
/// The agent opens its own folder while the controller makes its database.
pub async fn start(
    folder: &Path,
    parts: impl Future<Output = Result<AgentParts, Failure>> + Send + 'static,
) -> Result<Engine, Failure> {
    let stop = CancellationToken::new();
    let secret = || Token::generate().map_err(no_token);
    let (cluster, enrolment, api) = (secret()?, secret()?, secret()?);

    let (door, address) = service::bind("scheduler", ANY_PORT, None).await?;
    let config = sealci_scheduler::Config::new(cluster.expose().into());
    let serving = sealci_scheduler::serve(config, door.into_listener(), stop.clone());
    let serving = async move { service::ended("scheduler", serving.await) };
    let scheduler = Service::listening("scheduler", address, None, serving)?;

    let agent = open_agent(folder.join("agent"), scheduler.url.clone(), enrolment.clone(), parts);
    let agent = AbortOnDropHandle::new(tokio::spawn(agent));
    let controller = open_controller(folder, scheduler.url.clone(), cluster, enrolment, &api);
    let (agent, controller) = tokio::join!(agent, controller);
    // Both have ended here: what fails leaves nobody at work in the folder.
    let agent = agent.map_err(|error| Failure::infrastructure(format!("the agent broke off: {error}")))??;
    let (controller, door, address) = controller?;
    let dispatch = controller.dispatch().clone();

    let serving = controller.serve(door, stop.clone());
    let serving = async move {
        serving.await;
        Ok(())
    };
    let controller = Service::listening("controller", address, None, serving)?;
    let shutdown = Shutdown { drain: CancellationToken::new(), stop: stop.clone() };
    let inner_door = dispatch.clone();
    let agent = Service::dialling("agent", async move {
        // The only failure is that all of this is ending.
        if inner_door.linked().await.is_err() {
            return Ok(());
        }
        service::ended("agent", agent.run(shutdown).await)
    });
    let url = controller.url.clone();
    let client = ClientFile { monitor: url.clone(), controller: url, token: api.expose().to_owned() };
    let server = Server::local(&client)?;
    Ok(Engine { running: Running::start(vec![scheduler, controller, agent], stop), dispatch, server })
}

async fn open_agent(
    own: PathBuf,
    scheduler: String,
    enrolment: Token,
    parts: impl Future<Output = Result<AgentParts, Failure>>,
) -> Result<Opened, Failure> {
    let AgentParts { executors, checkout, room, capacity } = parts.await?;
    let mut config = sealci_agent::Config::new(serve::host_name(), own, vec![scheduler], executors, checkout);
    config.persistence = Persistence::Scratch;
    config.enrolment_token = Some(enrolment.expose().to_owned().into());
    config.room = room;
    config.capacity = Some(capacity);
    Opened::open(config).await.map_err(|error| Failure::of_error(Exit::Infrastructure, "the agent", &error))
}

/// The controller, its door, and its address.
async fn open_controller(
    folder: &Path,
    scheduler: String,
    cluster: Token,
    enrolment: Token,
    api: &Token,
) -> Result<(Controller, Door, String), Failure> {
    let (door, address) = service::bind("controller", ANY_PORT, None).await?;
    let location = ObjectsLocation::Folder(folder.join("objects"));
    let mut storage = StorageConfig::new(ObjectsConfig { location, aws: BTreeMap::new() });
    storage.agents_url = Some(address.clone());
    let config = sealci_controller::Config {
        database: DatabaseUrl::Scratch(folder.join("controller.db")),
        data: folder.join("controller"),
        tokens: Tokens::default().with(api, Role::Admin),
        enrolment_tokens: vec![enrolment],
        schedulers: vec![scheduler],
        cluster_secret: cluster,
        scheduler_ca_pem: None,
        transports: AllowedTransports { http: false, file: true },
        credentials: Arc::default(),
        allow_local_addresses: false,
        git_ca: None,
        git_known_hosts: None,
        lost_after: LOST_AFTER,
        lease: sealci_controller::LEASE,
        close_logs_after: sealci_controller::CLOSE_LOGS_AFTER,
        log_quota_bytes: sealci_controller::LOG_QUOTA_BYTES,
        grace: GRACE,
        storage,
    };
    let controller = Controller::open(config)
        .await
        .map_err(|error| Failure::of_error(Exit::Infrastructure, "the controller", &error))?;
    Ok((controller, door, address))
}

fn no_token(error: TokenError) -> Failure {
    Failure::of_error(Exit::Infrastructure, "cannot make a secret", &error)
}
