//! Starts an installation to be measured: the real binary, every service a process of its own, on SQLite in a folder that
//! goes with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::build::Programs;
use super::client::{Connection, Server};

/// How long services have to be up, and to end when asked.
const PATIENCE: Duration = Duration::from_secs(20);

/// What each agent offers.
#[derive(Debug, Clone, Copy)]
pub struct AgentShape {
    /// How many actions of the default size it runs at once.
    pub at_once: u64,
}

/// What a process has spent.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    pub cpu: Duration,
    /// Bytes that it caused to be written to a disk.
    pub written: u64,
}

impl Cost {
    pub fn since(self, before: Self) -> Self {
        Self { cpu: self.cpu - before.cpu, written: self.written - before.written }
    }
}

/// A controller, a scheduler and agents.
#[derive(Debug)]
pub struct Fleet {
    /// First here, so that they end before the folder goes.
    agents: Vec<Service>,
    monitor: Option<Service>,
    controller: Service,
    scheduler: Service,
    scheduler_url: String,
    pub server: Server,
    pub repository: Repository,
    folder: Folder,
    requests: u32,
}

impl Fleet {
    pub fn start(binary: &Path, agents: usize, shape: AgentShape) -> Result<Self> {
        Self::start_with(binary, agents, shape, &[])
    }

    /// With more arguments for each agent.
    pub fn start_with(
        binary: &Path,
        agents: usize,
        shape: AgentShape,
        agent_arguments: &[String],
    ) -> Result<Self> {
        let mut fleet = Self::start_services(binary, None)?;
        let scheduler_url = fleet.scheduler_url.clone();
        let arguments: Vec<&str> = ["--scheduler", &scheduler_url, "--allow-file", "--allow-local-addresses"]
            .into_iter()
            .chain(agent_arguments.iter().map(String::as_str))
            .collect();
        for number in 0..agents {
            let agent = fleet.start_agent(binary, number, shape, &arguments)?;
            fleet.agents.push(agent);
        }
        fleet.wait_for_agents(agents)?;
        Ok(fleet)
    }

    /// A scheduler and a controller without agents; on SQLite where no database is named.
    fn start_services(binary: &Path, database: Option<&str>) -> Result<Self> {
        let folder = Folder::make()?;
        let data = folder.0.join("data");
        let (scheduler, scheduler_url) = Service::listening(binary, "scheduler", &folder.0, &[], &[])?;
        let arguments = ["--scheduler", scheduler_url.as_str(), "--allow-file", "--allow-local-addresses"];
        // Not among the arguments, which every user may read: its URL has a password.
        let environment: Vec<_> = database.map(|url| ("SEALCI_DATABASE", url)).into_iter().collect();
        let (controller, url) =
            Service::listening(binary, "controller", &folder.0, &arguments, &environment)?;
        let token = fs::read_to_string(data.join("admin.token")).context("the controller made no token")?;
        let address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
        let server = Server { address, token: token.trim().to_owned() };
        let repository = Repository::make(&folder.0.join("repository"))?;
        Ok(Self {
            agents: Vec::new(),
            monitor: None,
            controller,
            scheduler,
            scheduler_url,
            server,
            repository,
            requests: 0,
            folder,
        })
    }

    /// Many agents of one process, each with room for so many actions.
    pub fn start_many(
        programs: &Programs,
        agents: usize,
        at_once: usize,
        database: Option<&str>,
    ) -> Result<Self> {
        let mut fleet = Self::start_services(programs.path("sealci")?, database)?;
        if agents > 0 {
            fleet.add_many(programs, agents, at_once)?;
        }
        Ok(fleet)
    }

    /// Adds as many, once; returns when all take work.
    pub fn add_many(&mut self, programs: &Programs, agents: usize, at_once: usize) -> Result<()> {
        let mut command = Command::new(programs.path("many_agents")?);
        command.arg(&self.scheduler_url).arg(self.folder.0.join("data/enrolment.token"));
        command.arg(self.folder.0.join("many")).args([agents.to_string(), at_once.to_string()]);
        self.agents.push(Service::spawn(command, &self.folder.0.join("many.log"))?);
        self.wait_for_agents(agents)
    }

    fn start_agent(
        &self,
        binary: &Path,
        number: usize,
        shape: AgentShape,
        arguments: &[&str],
    ) -> Result<Service> {
        let name = format!("agent-{number}");
        let mut command = Command::new(binary);
        command.arg("agent").arg("--data").arg(self.folder.0.join(&name)).args(arguments);
        command.arg("--enrolment-token-file").arg(self.folder.0.join("data/enrolment.token"));
        command.args(["--name", &name, "--allow-process", "--allow-fake"]);
        command.args(["--cpu-millis", &(shape.at_once * 1000).to_string()]);
        command.args(["--memory-bytes", &(shape.at_once << 30).to_string()]);
        Service::spawn(command, &self.folder.0.join(format!("{name}.log")))
    }

    /// Starts a monitor that polls so often; returns the way to it.
    pub fn start_monitor(&mut self, binary: &Path, poll_interval: Duration) -> Result<Server> {
        let controller = format!("http://{}", self.server.address);
        let poll_ms = poll_interval.as_millis().to_string();
        let arguments =
            ["--controller", &controller, "--poll-ms", &poll_ms, "--allow-file", "--allow-local-addresses"];
        let (monitor, url) = Service::listening(binary, "monitor", &self.folder.0, &arguments, &[])?;
        self.monitor = Some(monitor);
        let address = url.trim_start_matches("http://").trim_end_matches('/').to_owned();
        Ok(Server { address, token: self.server.token.clone() })
    }

    fn wait_for_agents(&self, count: usize) -> Result<()> {
        let mut connection = self.server.connect()?;
        let begun = Instant::now();
        loop {
            let agents = connection.get("/api/v1/agents")?;
            let agents = agents["agents"].as_array().cloned().unwrap_or_default();
            if agents.iter().filter(|agent| agent["accepting"] == true).count() == count {
                return Ok(());
            }
            if begun.elapsed() > PATIENCE.max(Duration::from_millis(100) * count as u32) {
                bail!("not all of {count} agents take work:\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What makes a pipeline of the manifest, or of the repository's own without one.
    pub fn creation(&mut self, manifest: Option<&str>) -> Value {
        self.requests += 1;
        let mut wanted = json!({
            "repo_url": self.repository.url(),
            "ref": "refs/heads/main",
            "revision": self.repository.revision,
            "event": "manual",
            "request_id": format!("bench-{}", self.requests),
        });
        if let Some(manifest) = manifest {
            wanted["body"] = manifest.into();
        }
        wanted
    }

    pub fn connect(&self) -> Result<Connection> {
        self.server.connect()
    }

    /// The most memory that the controller and the scheduler ever had, in bytes.
    pub fn peaks(&self) -> Result<(u64, u64)> {
        Ok((self.controller.peak_memory_bytes()?, self.scheduler.peak_memory_bytes()?))
    }

    /// That of the simulation.
    pub fn agents_memory_bytes(&self) -> Result<u64> {
        self.agents.iter().map(Service::peak_memory_bytes).sum()
    }

    pub fn scheduler_cost(&self) -> Result<Cost> {
        self.scheduler.cost()
    }

    pub fn controller_cost(&self) -> Result<Cost> {
        self.controller.cost()
    }

    /// The most memory that the controller, and the hungriest agent, ever had, in bytes.
    pub fn peak_memory_bytes(&self) -> Result<(u64, u64)> {
        let agents: Result<Vec<u64>> = self.agents.iter().map(Service::peak_memory_bytes).collect();
        Ok((self.controller.peak_memory_bytes()?, agents?.into_iter().max().unwrap_or_default()))
    }

    /// What the services said, for a failure's report.
    pub fn logs(&self) -> String {
        let entries = fs::read_dir(&self.folder.0).into_iter().flatten().flatten().map(|entry| entry.path());
        let logs = entries.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
        let texts = logs.map(|path| {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            format!("--- {}\n{}\n", path.display(), lines[lines.len().saturating_sub(20)..].join("\n"))
        });
        texts.collect()
    }
}

/// A process that ends with its owner: asked first, so that it leaves no control group, and then killed.
#[derive(Debug)]
struct Service(Child);

impl Service {
    fn spawn(mut command: Command, log: &Path) -> Result<Self> {
        let file = File::create(log)?;
        let log_level = std::env::var("SEALCI_LOG").unwrap_or_else(|_| "warn".to_owned());
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).env("SEALCI_LOG", log_level);
        Ok(Self(command.spawn().context("cannot start a service")?))
    }

    /// Starts one that listens, and gives its URL.
    fn listening(
        binary: &Path,
        name: &str,
        folder: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<(Self, String)> {
        let announce = folder.join(format!("{name}.address"));
        let log = folder.join(format!("{name}.log"));
        let mut command = Command::new(binary);
        command.arg(name).arg("--data").arg(folder.join("data")).args([
            "--listen",
            "127.0.0.1:0",
            "--announce",
        ]);
        let mut service = Self::spawn(
            {
                command.arg(&announce).args(arguments).envs(environment.iter().copied());
                command
            },
            &log,
        )?;
        let begun = Instant::now();
        loop {
            if let Ok(line) = fs::read_to_string(&announce) {
                return Ok((service, line.trim().to_owned()));
            }
            if begun.elapsed() > PATIENCE || service.0.try_wait()?.is_some() {
                bail!("the {name} does not come up: {}", fs::read_to_string(&log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What it has spent since its start (proc_pid_stat(5), proc_pid_io(5)).
    fn cost(&self) -> Result<Cost> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        let after_name = stat.rsplit_once(')').context("a process without a name")?.1;
        let ticks: u64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        let io = fs::read_to_string(format!("/proc/{}/io", self.0.id()))?;
        let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
        let written =
            line.and_then(|bytes| bytes.parse().ok()).context("the kernel does not count writes")?;
        // A tick has been a hundredth of a second on every machine for long.
        Ok(Cost { cpu: Duration::from_millis(ticks * 10), written })
    }

    fn peak_memory_bytes(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        Ok(kib.context("the kernel does not tell a process's peak memory")? << 10)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A folder below the system's temporary one (`TMPDIR` chooses the disk), removed with its owner.
#[derive(Debug)]
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn make() -> Result<Self> {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // In a process namespace ours is no number of our own: an earlier run may have left a folder of the name.
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("sealci-bench-{}-{number}", std::process::id());
            let path = std::env::temp_dir().join(name);
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("cannot make {}", path.display())),
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A Git repository with one revision.
#[derive(Debug)]
pub struct Repository {
    pub path: PathBuf,
    pub revision: String,
}

impl Repository {
    /// One of ten files.
    pub fn make(path: &Path) -> Result<Self> {
        fs::create_dir_all(path.join(".sealci"))?;
        fs::create_dir_all(path.join("src"))?;
        fs::write(path.join(".sealci/pipeline.yaml"), super::latency::manifest("sandbox", "off"))?;
        for number in 1..10 {
            let folder = if number < 5 { "src/" } else { "" };
            fs::write(path.join(format!("{folder}file-{number}")), format!("{number}\n").repeat(200))?;
        }
        Self::of(path)
    }

    /// Of the files that are there.
    pub fn of(path: &Path) -> Result<Self> {
        let mut repository = Self { path: path.to_owned(), revision: String::new() };
        repository.git(&["init", "--quiet", "--initial-branch=main"])?;
        repository.git(&["add", "--all", "--force"])?;
        repository.git(&["commit", "--quiet", "-m", "The files"])?;
        repository.revision = repository.git(&["rev-parse", "HEAD"])?;
        Ok(repository)
    }

    pub fn url(&self) -> String {
        format!("file://{}", self.path.display())
    }

    pub fn git(&self, arguments: &[&str]) -> Result<String> {
        let output = Command::new("git")
            .arg("-C")
            .arg(&self.path)
            .args(["-c", "user.name=bench", "-c", "user.email=bench@sealci.invalid"])
            .args(arguments)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .output()
            .context("cannot run git")?;
        if !output.status.success() {
            bail!("git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }
}
