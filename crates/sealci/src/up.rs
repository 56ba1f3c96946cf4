//! The command `up`: all services in one process, on one data folder.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use crate::data_folder::{ClientFile, DataFolder};
use crate::demo;
use crate::exit::{Exit, Failure};
use crate::terminal::Terminal;

#[derive(Debug, Args)]
pub struct UpArgs {
    /// The data folder [default: $XDG_DATA_HOME/sealci]
    #[arg(long, value_name = "DIR", env = "SEALCI_DATA")]
    data: Option<PathBuf>,
    /// The controller's address
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8420")]
    listen: SocketAddr,
    /// The monitor's address
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8421")]
    monitor_listen: SocketAddr,
    /// The scheduler's address, for further agents
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8422")]
    scheduler_listen: SocketAddr,
    /// Make a sample repository, push a commit to it, and show what happens
    #[arg(long)]
    demo: bool,
    /// End with the demo's pipeline [default: where standard output is no terminal]
    #[arg(long, requires = "demo")]
    exit: bool,
}

pub async fn up(args: UpArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let _ = (args.listen, args.monitor_listen, args.scheduler_listen, args.exit, terminal);
    let mut folder = DataFolder::locate(args.data.as_deref())
        .map_err(|error| Failure::of_error(Exit::Usage, "cannot begin", &error))?;
    folder.create().map_err(|error| Failure::of_error(Exit::Infrastructure, "cannot begin", &error))?;
    let token = folder
        .secret("admin.token")
        .map_err(|error| Failure::of_error(Exit::Infrastructure, "cannot begin", &error))?;
    let file = ClientFile { controller: String::new(), monitor: String::new(), token };
    if args.demo {
        demo::SampleRepository::make(&folder.path("demo"))?.push()?;
    }
    folder
        .write_client_file(&file)
        .map_err(|error| Failure::of_error(Exit::Infrastructure, "cannot begin", &error))?;
    Err(Failure::infrastructure("this build has no services yet"))
}
