//! Runs actions in containers of a daemon, Docker's or Podman's, with the same init and so the same events as everywhere.
//!
//! ```text
//! reach the daemon ──▶ have the image ──▶ create ──▶ attach ──▶ start ──▶ stands by ──▶ … ──▶ the daemon removes it
//! ```
//!
//! The daemon is asked over its unix socket and must be on this host: it mounts the workspace. Whoever may ask it is as good
//! as root, so what an action gets is no socket. Invariants: everything made bears the agent's label, so that a sweep
//! removes exactly what this agent left; a container ends with the connection to its init, also when this process is
//! killed, and is then removed by the daemon itself.

mod daemon;
mod environment;
mod giving;
mod image;
mod limits;
mod networks;
mod recipe;

pub use daemon::{DEFAULT_SOCKET, DaemonInfo, DockerError, Engine, probe, socket_of};
pub use image::PullOptions;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bollard::query_parameters::{
    AttachContainerOptionsBuilder, CreateContainerOptionsBuilder, DownloadFromContainerOptionsBuilder,
    EventsOptionsBuilder, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
};
use daemon::Daemon;
use environment::{Complaints, DockerEnvironment, bridge};
use futures_util::StreamExt;
use giving::{Courier, Giving, Owner};
use image::Facts;
use limits::LimitWatch;
use networks::AgentNetwork;
use recipe::{Ingredients, Net};
use sealci_core::plan::{Container, ExecutorKind, Network};
use sealci_guest::accounts::Account;
use sealci_guest::wire;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use super::container::{service_folder, service_program, stop_signal, wrapper};
use super::environment::{DEFAULT_PIDS, Running, stand_by};
use super::init::{self, Opening, Prepared};
use super::neighbourhood::{Home, Neighbourhood};
use super::programs;
use super::sealed::start_message;
use super::{ExecutionRequest, Executor, ExecutorError, Standby, all_of, gate};

/// More than any image's `/etc/passwd`.
const ACCOUNTS_BYTES: usize = 1 << 20;

/// What an installation may choose.
#[derive(Debug, Clone)]
pub struct DockerOptions {
    /// See [`socket_of`].
    pub socket: PathBuf,
    /// Whose containers are swept: of this agent alone.
    pub agent: String,
    /// Processes and threads of an action at a time.
    pub pids: u64,
    /// Whether actions that ask for it reach outwards.
    pub network: bool,
    pub pull: PullOptions,
}

impl DockerOptions {
    pub fn of(agent: impl Into<String>) -> Self {
        Self {
            socket: DEFAULT_SOCKET.into(),
            agent: agent.into(),
            pids: DEFAULT_PIDS,
            network: true,
            pull: PullOptions::default(),
        }
    }
}

/// The executor that runs images by a daemon.
#[derive(Debug)]
pub struct DockerExecutor {
    options: Arc<DockerOptions>,
    init: PathBuf,
    network: AgentNetwork,
    running: Running,
    tasks: TaskTracker,
}

impl DockerExecutor {
    /// `data_dir` takes the init, and must be to be seen by the daemon. Does not ask it anything: see [`probe`].
    pub fn new(data_dir: &Path, options: DockerOptions) -> Result<Self, ExecutorError> {
        let init = programs::install(data_dir, programs::INIT)?;
        let network = AgentNetwork::of(&options.agent);
        let (running, tasks) = (Running::default(), TaskTracker::new());
        Ok(Self { options: Arc::new(options), init, network, running, tasks })
    }

    async fn network(&self, daemon: &Daemon, request: &ExecutionRequest) -> Result<Net, ExecutorError> {
        if let Some(Home::Container(id)) = request.neighbourhood.as_ref().and_then(Neighbourhood::home) {
            return Ok(Net::Joined(id));
        }
        match &request.network {
            Network::Off => Ok(Net::Off),
            _ if !self.options.network => Err(ExecutorError::Unsupported(
                "this agent has no network for containers: its configuration does not allow it; an action that needs none says `network: off`".to_owned(),
            )),
            Network::On | Network::Allow(_) => Ok(Net::Of(self.network.have(daemon).await?)),
        }
    }
}

#[async_trait]
impl Executor for DockerExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Docker
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        let container = request.container.clone().ok_or_else(|| {
            ExecutorError::Unsupported(
                "the action names no image: it says `executor: docker` and has no `container`".to_owned(),
            )
        })?;
        gate::refuse(&request, self.kind())?;
        // A service's name is the plan's to keep apart.
        let is_action = request.service.is_none();
        let guard = is_action.then(|| self.running.enter(request.attempt)).transpose()?;
        let preparing = async {
            let (daemon, info) = Daemon::reach(&self.options.socket).await?;
            let image = image::obtain(&daemon, &info, &self.options.pull, &container, &request.notes).await?;
            let network = self.network(&daemon, &request).await?;
            Ok::<_, ExecutorError>((daemon, info, image, network))
        };
        let prepared = request.stop.run_until_cancelled(preparing).await.ok_or(ExecutorError::Stopped)??;
        let (daemon, info, image, network) = prepared;
        let mut env = image.env.clone();
        env.extend(request.env.clone());
        let start = start_message(&request, env);
        let start = init::encoded(match &request.service {
            Some(service) => wire::Start {
                program: service_program(service, &container, &image.entrypoint, &image.command)?,
                workdir: service_folder(&image.working_folder).into(),
                stop_signal: stop_signal(&image.stop_signal),
                ..start
            },
            None => wire::Start { wrapper: wrapper(&container, &image.entrypoint), ..start },
        })?;
        let (options, init) = (self.options.clone(), self.init.clone());
        let making = Making { daemon, info, options, init, image, container, network, request };
        stand_by(&self.tasks, making.make(start), guard).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        let (daemon, _) = Daemon::reach(&self.options.socket).await?;
        let filters = label_filter(&self.options.agent);
        let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
        let listed = daemon.docker.list_containers(Some(options)).await;
        let mut done = Vec::new();
        for id in listed.map_err(daemon.failed("list containers"))?.into_iter().filter_map(|one| one.id) {
            done.push(remove(&daemon, &id).await);
        }
        done.push(self.network.remove(&daemon).await);
        Ok(all_of(done)?)
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
        if let Err(error) = self.network.close(&self.options.socket).await {
            tracing::warn!(error = %ExecutorError::from(error).message(), "cannot remove the agent's network");
        }
    }
}

/// Removes a container, whatever state it is in.
async fn remove(daemon: &Daemon, id: &str) -> Result<(), DockerError> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
    match daemon
        .docker
        .remove_container(id, Some(options))
        .await
        .map_err(daemon.failed(format!("remove the container {id}")))
    {
        // It is gone, or about to go.
        Err(DockerError::Refused { status: 404 | 409, .. }) | Ok(()) => Ok(()),
        Err(error) => Err(error),
    }
}

fn label_filter(agent: &str) -> HashMap<String, Vec<String>> {
    [("label".to_owned(), vec![format!("{}={agent}", recipe::AGENT_LABEL)])].into()
}

/// All that a container is made of.
struct Making {
    daemon: Daemon,
    info: DaemonInfo,
    options: Arc<DockerOptions>,
    init: PathBuf,
    image: Facts,
    container: Container,
    network: Net,
    request: ExecutionRequest,
}

impl Making {
    /// Creates the container, and has its init wait. An error leaves nothing.
    async fn make(self, start: Opening) -> Result<Prepared, ExecutorError> {
        let name = format!("sealci-{}", self.request.environment_name());
        let options = CreateContainerOptionsBuilder::new().name(&name).build();
        let recipe = recipe::action(&self.request, &self.ingredients());
        let created = self.daemon.docker.create_container(Some(options), recipe).await;
        let id = created.map_err(self.daemon.failed(format!("create the container {name}")))?.id;
        match self.bring_up(&id, name).await {
            Ok((channel, environment)) => {
                if let (Some(neighbourhood), Net::Off | Net::Of(_)) =
                    (&self.request.neighbourhood, &self.network)
                {
                    neighbourhood.found(Home::Container(id));
                }
                let (timeout, grace) = (self.request.timeout, self.request.grace);
                Ok(Prepared { channel, start, environment: Box::new(environment), timeout, grace })
            }
            Err(error) => {
                // The first error is the one to tell; the next sweep takes what stays.
                let _ = remove(&self.daemon, &id).await;
                Err(error)
            }
        }
    }

    fn user(&self) -> &str {
        self.container.user.as_deref().unwrap_or(&self.image.user)
    }

    fn ingredients(&self) -> Ingredients<'_> {
        Ingredients {
            image: &self.image.id,
            init: &self.init,
            agent: &self.options.agent,
            user: self.user(),
            pids: self.options.pids,
            network: &self.network,
        }
    }

    async fn bring_up(
        &self,
        id: &str,
        name: String,
    ) -> Result<(UnixStream, DockerEnvironment), ExecutorError> {
        let docker = &self.daemon.docker;
        let giving = self.giving(id).await?;
        let (channel, ours) = UnixStream::pair().map_err(ExecutorError::io("make a socket pair"))?;
        // Before it starts, so that nothing it says is missed.
        let options =
            AttachContainerOptionsBuilder::new().stdin(true).stdout(true).stderr(true).stream(true).build();
        let attached = docker
            .attach_container(id, Some(options))
            .await
            .map_err(self.daemon.failed(format!("attach to the container {name}")))?;
        let (mut tasks, mut news) = (JoinSet::new(), JoinSet::new());
        let (complaints, mut limits) = (Complaints::default(), LimitWatch::default());
        bridge(&mut tasks, ours, attached, complaints.clone());
        let (subscribed, is_subscribed) = oneshot::channel();
        news.spawn(hear_news(self.daemon.clone(), id.to_owned(), limits.clone(), subscribed));
        // Its end says the same: there will be no news.
        let _ = is_subscribed.await;
        docker
            .start_container(id, None)
            .await
            .map_err(self.daemon.failed(format!("start the container {name}")))?;
        let state = docker.inspect_container(id, None).await.ok().and_then(|container| container.state);
        if let Some(pid) = state.and_then(|state| state.pid).filter(|pid| *pid > 0) {
            limits.watch(pid, id);
        }
        let environment = DockerEnvironment {
            daemon: self.daemon.clone(),
            id: id.to_owned(),
            name,
            attempt: self.request.attempt.to_string(),
            limits,
            complaints,
            tasks,
            news,
            giving,
            workspace: self.request.workspace.clone(),
        };
        Ok((channel, environment))
    }

    /// To whom the workspace goes, if that is another than has it.
    async fn giving(&self, id: &str) -> Result<Option<Giving>, ExecutorError> {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        // As the container sees the agent.
        let own = if self.info.is_rootless { Owner { uid: 0, gid: 0 } } else { Owner { uid, gid } };
        let to = match self.user() {
            "" | "root" | "0" | "0:0" => Owner { uid: 0, gid: 0 },
            user => {
                let [passwd, group] = [self.read(id, "/etc/passwd").await, self.read(id, "/etc/group").await];
                let found = Account::find(user, &passwd, &group)
                    .map_err(|error| ExecutorError::Unsupported(error.to_string()))?;
                Owner { uid: found.uid, gid: found.gid }
            }
        };
        if to.uid == own.uid {
            return Ok(None);
        }
        let by_itself = own.uid == 0 && !self.info.is_rootless;
        let courier = (!by_itself)
            .then(|| Courier { recipe: recipe::courier(&self.request, &self.ingredients()), back_to: own });
        Ok(Some(Giving { to, courier }))
    }

    /// The beginning of a text file of the image; nothing where there is none.
    async fn read(&self, id: &str, path: &str) -> String {
        let options = DownloadFromContainerOptionsBuilder::new().path(path).build();
        let mut pieces = self.daemon.docker.download_from_container(id, Some(options));
        let mut archive = Vec::new();
        while let Some(Ok(piece)) = pieces.next().await {
            archive.extend_from_slice(&piece);
            if archive.len() > ACCOUNTS_BYTES {
                break;
            }
        }
        text_in(&archive)
    }
}

/// The text of the first regular file in an archive.
fn text_in(archive: &[u8]) -> String {
    use std::io::Read as _;
    let mut archive = tar::Archive::new(archive);
    let Ok(mut entries) = archive.entries() else { return String::new() };
    let Some(Ok(entry)) = entries.next() else { return String::new() };
    let mut bytes = Vec::new();
    if entry.header().entry_type().is_file() {
        // What is there of it.
        let _ = entry.take(ACCOUNTS_BYTES as u64).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Puts down what the daemon tells of a container, until that is removed.
async fn hear_news(daemon: Daemon, id: String, limits: LimitWatch, subscribed: oneshot::Sender<()>) {
    let filters: HashMap<String, Vec<String>> = [
        ("container".to_owned(), vec![id]),
        ("event".to_owned(), ["oom", "destroy", "remove"].map(str::to_owned).to_vec()),
    ]
    .into();
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    // What happens between now and the daemon's taking note is told as well.
    let options = EventsOptionsBuilder::new().filters(&filters).since(&since.as_secs().to_string()).build();
    let mut events = daemon.docker.events(Some(options));
    let memory_told = limits.memory_told();
    let _ = subscribed.send(());
    while let Some(Ok(event)) = events.next().await {
        match event.action.as_deref() {
            Some("oom") => memory_told.store(true, std::sync::atomic::Ordering::Release),
            _ => return,
        }
    }
}
