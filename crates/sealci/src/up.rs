//! The command `up`: all services in one process, on one data folder. They meet over loopback, through the same contracts
//! as on machines of their own.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use clap::Args;
use sealci_agent::Shutdown;
use tokio_util::sync::CancellationToken;

use crate::data_folder::{ClientFile, DataFolder};
use crate::demo;
use crate::exit::{Exit, Failure};
use crate::serve::{
    ADMIN_TOKEN, AgentServeArgs, ControllerArgs, GitArgs, GitTrustArgs, HurryArgs, ImageArgs, ListenArgs,
    MonitorArgs, RepositoriesArgs, RoomArgs, SchedulerArgs, StorageArgs, TrustArgs, prepare_agent,
    prepare_controller, prepare_monitor, prepare_scheduler,
};
use crate::service::{self, Running};
use crate::terminal::Terminal;

#[derive(Debug, Args)]
pub struct UpArgs {
    /// The data folder [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    data: Option<PathBuf>,
    /// The controller's address [default: 127.0.0.1:8420]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// The monitor's address [default: 127.0.0.1:8421]
    #[arg(long, value_name = "ADDRESS")]
    monitor_listen: Option<SocketAddr>,
    /// The scheduler's address, for further agents [default: 127.0.0.1:8422]
    #[arg(long, value_name = "ADDRESS")]
    scheduler_listen: Option<SocketAddr>,
    #[command(flatten)]
    repositories: RepositoriesArgs,
    #[command(flatten)]
    git_trust: GitTrustArgs,
    /// A folder or file of this machine that sealed actions see, read-only; may be given several times
    #[arg(long, value_name = "PATH")]
    sandbox_path: Vec<PathBuf>,
    /// Let actions run as this user, with no isolation at all
    #[arg(long)]
    allow_process: bool,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    room: RoomArgs,
    #[command(flatten)]
    storage: StorageArgs,
    /// Make a sample repository, push a commit to it, and show what happens
    #[arg(long)]
    demo: bool,
    /// End with the demo's pipeline [default: where standard output is no terminal]
    #[arg(long, requires = "demo")]
    exit: bool,
}

impl UpArgs {
    /// Asked for; or for a demo that cannot seal its actions here, which is said.
    fn allows_process(&self) -> bool {
        self.allow_process || (self.demo && crate::serve::can_seal().is_err())
    }

    /// An address that was asked for, the usual one, or for a demo beside another server any free one.
    fn address(&self, asked: Option<SocketAddr>, usual_port: u16) -> SocketAddr {
        let usual = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), usual_port);
        let taken = || self.demo && std::net::TcpListener::bind(usual).is_err();
        asked.unwrap_or_else(|| if taken() { SocketAddr::new(usual.ip(), 0) } else { usual })
    }
}

pub async fn up(args: UpArgs, terminal: Terminal) -> Result<Exit, Failure> {
    service::start_log(if args.demo { "error" } else { "warn" })?;
    let mut signals = service::signals()?;
    let folder = DataFolder::open(args.data.as_deref())?;
    let (mut running, client) = start(&args, &folder).await?;
    say_where(&client, &folder, &args);

    let demo = async {
        if !args.demo {
            return std::future::pending().await;
        }
        let ended = demo::show(&folder, &client, terminal).await;
        match ended {
            Ok(_) if terminal.interactive && !args.exit => {
                println!("\nStill up: go on with `sealci list`, or end it with Ctrl-C.");
                std::future::pending().await
            }
            ended => ended,
        }
    };
    let outcome = tokio::select! {
        ended = demo => ended,
        failure = running.broken() => Err(failure),
        name = signals.next() => Ok(if name == "SIGINT" && args.demo { Exit::Interrupted } else { Exit::Passed }),
    };
    service::end(running, &mut signals, outcome).await
}

/// Starts all services, and writes down where they are.
async fn start(args: &UpArgs, folder: &DataFolder) -> Result<(Running, ClientFile), Failure> {
    let stop = CancellationToken::new();
    let data = Some(folder.root().to_owned());
    let scheduler = SchedulerArgs {
        listen: args.address(args.scheduler_listen, 8422),
        listener: ListenArgs::default(),
        data: data.clone(),
        cluster_secret_file: None,
        hurry: HurryArgs::default(),
    };
    let scheduler = prepare_scheduler(&scheduler, stop.clone()).await?;
    let controller = ControllerArgs {
        listen: args.address(args.listen, 8420),
        listener: ListenArgs::default(),
        data: data.clone(),
        database: None,
        scheduler: vec![scheduler.url.clone()],
        trust: TrustArgs::default(),
        cluster_secret_file: None,
        api_token: Vec::new(),
        enrolment_token_file: None,
        git: GitArgs::all(args.git_trust.clone()),
        repositories: args.repositories.clone(),
        storage: args.storage.clone(),
        agents_url: None,
        lost_after_ms: 60_000,
        lease_ms: 10_000,
        log_quota_bytes: sealci_controller::LOG_QUOTA_BYTES,
        grace_ms: 10_000,
    };
    let controller = prepare_controller(&controller, stop.clone()).await?;
    let monitor = MonitorArgs {
        listen: args.address(args.monitor_listen, 8421),
        listener: ListenArgs::default(),
        data: data.clone(),
        database: None,
        controller: controller.url.clone(),
        trust: TrustArgs::default(),
        controller_token_file: None,
        api_token: Vec::new(),
        poll_ms: if args.demo { 1_000 } else { 10_000 },
        git: GitArgs::all(args.git_trust.clone()),
        repositories: args.repositories.clone(),
    };
    let monitor = prepare_monitor(&monitor, stop.clone()).await?;
    let agent = AgentServeArgs {
        scheduler: vec![scheduler.url.clone()],
        trust: TrustArgs::default(),
        data,
        enrolment_token_file: None,
        name: None,
        label: Vec::new(),
        cpu_millis: None,
        memory_bytes: None,
        room: args.room,
        sandbox_path: args.sandbox_path.clone(),
        allow_process: args.allows_process(),
        allow_fake: false,
        resend_ms: 10_000,
        hurry: HurryArgs::default(),
        images: args.images.clone(),
        git: GitArgs::all(args.git_trust.clone()),
    };
    let shutdown = Shutdown { drain: CancellationToken::new(), stop: stop.clone() };
    let agent = prepare_agent(&agent, shutdown)?;
    let token = folder.secret(ADMIN_TOKEN).map_err(DataFolder::failure)?;
    let client = ClientFile {
        controller: controller.url.clone(),
        monitor: monitor.url.clone(),
        token: token.expose().to_owned(),
    };
    folder.write_client_file(&client).map_err(DataFolder::failure)?;
    Ok((Running::start(vec![scheduler, controller, monitor, agent], stop), client))
}

fn say_where(client: &ClientFile, folder: &DataFolder, args: &UpArgs) {
    println!("SealCI is up: controller {}, monitor {}", client.controller, client.monitor);
    println!("data and token in {}", folder.root().display());
    if args.allows_process() {
        println!("note: the executor `process` is allowed: actions run as this user, with no isolation");
    }
    if !args.demo {
        println!("next: sealci repo add URL, or sealci submit --follow in a repository");
    }
}
