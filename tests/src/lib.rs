//! Runs a whole installation for end-to-end tests: the real binary, each service a process of its own.
//!
//! - Every service listens on a port of its own choice and announces it in a file; a restart takes the same port again.
//! - What a test started ends with it, also when it fails; then the services' logs are printed.
//! - Nothing here knows a service from within: what a test sees is what a person sees.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

mod beside;
mod certificates;
pub mod host;
mod line;
mod network;
mod pipelines;
mod postgres;
mod proxy;
mod s3;
mod sshd;

pub use beside::{SmallDisk, signal};
pub use certificates::{Certificates, outward_address};
pub use line::{Cut, Line};
pub use network::{Direction, Network};
pub use pipelines::{Following, action, attempts, both, let_go};
pub use postgres::Postgres;
pub use proxy::{LosingWay, SlowWay};
pub use s3::S3;
pub use sshd::Sshd;

/// How long anything may take that is expected to happen at all.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    Scheduler,
    Controller,
    Monitor,
    Agent,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::Scheduler, Self::Controller, Self::Monitor, Self::Agent];

    fn command(self) -> &'static str {
        match self {
            Self::Scheduler => "scheduler",
            Self::Controller => "controller",
            Self::Monitor => "monitor",
            Self::Agent => "agent",
        }
    }
}

/// The real binary, built once for all tests of a program.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("SEALCI_BIN") {
            return path.into();
        }
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace");
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .current_dir(workspace)
            .args(["build", "--quiet", "--locked", "--bin", "sealci"])
            .status()
            .expect("cargo can be run");
        assert!(status.success(), "the binary does not build");
        // …/target/debug/deps/this-test → …/target/debug/sealci
        let test = std::env::current_exe().expect("a test has a path");
        test.ancestors().nth(2).expect("tests are in target/debug/deps").join("sealci")
    })
}

/// All services, on a data folder of their own.
pub struct Installation {
    folder: TempDir,
    processes: BTreeMap<Part, Process>,
    /// Where each service listens, kept over restarts.
    addresses: BTreeMap<Part, String>,
    starts: u32,
    /// Where all listen, behind TLS with these.
    tls: Option<(IpAddr, Certificates)>,
    /// Arguments that services get beside the usual ones.
    pub arguments: BTreeMap<Part, Vec<String>>,
    /// Words before a service's own command line, such as `nsenter --net=…`.
    pub prefixes: BTreeMap<Part, Vec<String>>,
    /// Environment that all services get beside the usual.
    pub environment: BTreeMap<String, String>,
    pub periods: Periods,
    /// Where agents dial, when it is not the scheduler itself.
    pub agents_dial: Option<String>,
    /// Where controllers dial, when it is not the scheduler itself or alone: a list with commas.
    pub controller_dials: Option<String>,
    /// Agents beside the one of [`Part::Agent`], by their names.
    beside: BTreeMap<String, Process>,
}

/// How long services wait for one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Periods {
    /// As they are for users, but for those that make a test slow for nothing: resending, and the grace of what is cancelled.
    Usual,
    /// A tenth of everything.
    Tenth,
    AsShipped,
}

impl Installation {
    /// Starts all four, and returns when the agent can be given work.
    pub fn start() -> Self {
        let mut installation = Self::none();
        installation.start_all();
        installation
    }

    /// Starts all four behind TLS, on an address of this machine that others can reach if it has one.
    pub fn start_behind_tls() -> Self {
        let mut installation = Self::none();
        let address = outward_address();
        let certificates = Certificates::make(&installation.scratch("certificates"), address);
        installation.tls = Some((address, certificates));
        installation.start_all();
        installation
    }

    /// Starts all four of one that was prepared; those that run already stay.
    pub fn start_all(&mut self) {
        for part in Part::ALL {
            if !self.processes.contains_key(&part) {
                self.start_part(part);
            }
        }
        self.started();
    }

    /// Says that all four were started one by one; returns when the agent can be given work.
    pub fn started(&self) {
        self.write_client_file();
        self.wait_for_agent();
    }

    /// Starts all four if actions are sealed here; else says loudly that `test` is skipped.
    pub fn start_sealed(test: &str) -> Option<Self> {
        if !host::is_root() {
            skip("root", test, "the sandbox needs root");
            return None;
        }
        let installation = Self::start();
        let agents = installation.json(&["agent", "list"]);
        let executors = agents[0]["executors"].as_array().cloned().unwrap_or_default();
        if executors.first().is_none_or(|first| first != "sandbox") {
            skip("namespaces", test, "the agent offers no sandbox here (`sealci doctor` says more)");
            return None;
        }
        Some(installation)
    }

    /// Starts nothing: for command lines that need no server, or start their own.
    pub fn none() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        Self {
            folder,
            processes: BTreeMap::new(),
            addresses: BTreeMap::new(),
            starts: 0,
            tls: None,
            arguments: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            environment: BTreeMap::new(),
            periods: Periods::Usual,
            agents_dial: None,
            controller_dials: None,
            beside: BTreeMap::new(),
        }
    }

    /// The installation's data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// A path for the test's own use, outside of the data folder.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Starts one service; on its former address if it had one.
    pub fn start_part(&mut self, part: Part) {
        self.starts += 1;
        let log = self.folder.path().join(format!("{:02}-{}.log", self.starts, part.command()));
        let announce = self.folder.path().join(format!("{}.address", part.command()));
        let _ = fs::remove_file(&announce);
        let mut command = Command::new(binary());
        command.arg(part.command()).arg("--data").arg(self.data()).args([
            "--allow-file",
            "--allow-http",
            "--allow-local-addresses",
        ]);
        let address = |part: Part| self.addresses.get(&part).cloned().unwrap_or_default();
        let listen = match (address(part).split_once("://"), &self.tls) {
            (Some((_, former)), _) => former.to_owned(),
            (None, Some((address, _))) => SocketAddr::new(*address, 0).to_string(),
            (None, None) => "127.0.0.1:0".to_owned(),
        };
        match part {
            Part::Scheduler => {
                // It reads no repositories.
                command = Command::new(binary());
                command.arg("scheduler").arg("--data").arg(self.data()).args(["--listen", &listen]);
                if self.periods == Periods::Tenth {
                    command.args(["--hurry", "10"]);
                }
            }
            Part::Controller => {
                let scheduler = self.controller_dials.clone().unwrap_or(address(Part::Scheduler));
                command.args(["--listen", &listen, "--scheduler", &scheduler]);
                // A tenth of the usual, as for every period in quick tests.
                if self.periods != Periods::AsShipped {
                    command.args(["--grace-ms", "1000"]);
                }
                if self.periods == Periods::Tenth {
                    command.args(["--lost-after-ms", "6000"]);
                }
            }
            Part::Monitor => {
                command.args([
                    "--listen",
                    &listen,
                    "--controller",
                    &address(Part::Controller),
                    "--poll-ms",
                    "1000",
                ]);
            }
            Part::Agent => {
                command.args(self.agent_arguments("one"));
            }
        }
        if part != Part::Agent {
            command.arg("--announce").arg(&announce);
        }
        if let Some((_, certificates)) = &self.tls {
            if part != Part::Agent {
                command.arg("--tls-cert").arg(&certificates.certificate);
                command.arg("--tls-key").arg(&certificates.key);
            }
            if part != Part::Scheduler {
                command.arg("--ca").arg(&certificates.authority);
            }
        }
        command.args(self.arguments.get(&part).into_iter().flatten());
        let mut command = beside::under(self.prefixes.get(&part), command);
        command.envs(&self.environment);
        let mut process = Process::spawn(command, log);
        if part != Part::Agent {
            let address = eventually(&format!("the {} to announce itself", part.command()), || {
                process.assert_alive();
                fs::read_to_string(&announce).ok().map(|line| line.trim().to_owned())
            });
            self.addresses.insert(part, address);
        }
        self.processes.insert(part, process);
    }

    /// What every agent of an installation is told.
    fn agent_arguments(&self, name: &str) -> Vec<String> {
        let scheduler = self.agents_dial.as_ref().or(self.addresses.get(&Part::Scheduler));
        let scheduler = scheduler.cloned().unwrap_or_default();
        let mut arguments = vec!["--name", name, "--allow-process", "--allow-fake"];
        // A list would be added to.
        let own = self.arguments.get(&Part::Agent);
        if !own.is_some_and(|own| own.iter().any(|argument| argument == "--scheduler")) {
            arguments.extend(["--scheduler", &scheduler]);
        }
        match self.periods {
            Periods::Usual => arguments.extend(["--resend-ms", "1000"]),
            Periods::Tenth => arguments.extend(["--resend-ms", "1000", "--hurry", "10"]),
            Periods::AsShipped => {}
        }
        arguments.into_iter().map(str::to_owned).collect()
    }

    /// Starts another scheduler of the same installation.
    pub fn start_other_scheduler(&self) -> OtherScheduler {
        let announce = self.folder.path().join("other-scheduler.address");
        let mut command = Command::new(binary());
        command.arg("scheduler").arg("--data").arg(self.data()).args(["--listen", "127.0.0.1:0"]);
        if self.periods == Periods::Tenth {
            command.args(["--hurry", "10"]);
        }
        command.arg("--announce").arg(&announce);
        let process = Process::spawn(command, self.folder.path().join("other-scheduler.log"));
        let url = eventually("the other scheduler to announce itself", || {
            fs::read_to_string(&announce).ok().map(|line| line.trim().to_owned())
        });
        OtherScheduler { _process: process, url }
    }

    /// Starts another agent, on a folder of its own.
    pub fn start_other_agent(&self, name: &str, arguments: &[&str]) -> OtherAgent {
        let mut command = Command::new(binary());
        command.arg("agent").arg("--data").arg(self.folder.path().join(name)).args(["--name", name]);
        command.args(["--allow-file", "--allow-http", "--allow-local-addresses", "--allow-process"]);
        command.args(["--resend-ms", "1000", "--enrolment-token-file"]);
        command.arg(self.data().join("enrolment.token")).args(arguments);
        let process = Process::spawn(command, self.folder.path().join(format!("{name}.log")));
        eventually(&format!("agent {name} to take work"), || {
            let agents = self.json(&["agent", "list"]);
            let is_there = |agent: &&Value| agent["name"] == name && agent["accepting"] == true;
            agents.as_array()?.iter().find(is_there).map(|_| ())
        });
        OtherAgent { process, folder: self.folder.path().join(name).join("agent") }
    }

    /// Kills a service with SIGKILL: it gets no chance to put anything in order.
    pub fn kill(&mut self, part: Part) {
        let mut process = self.processes.remove(&part).expect("it runs");
        process.kill();
        // Its log is kept for a failure's report.
        self.processes.insert(part, process);
    }

    /// Kills a service, and starts it again.
    pub fn restart(&mut self, part: Part) {
        self.kill(part);
        self.start_part(part);
    }

    /// The process id of a service.
    pub fn pid(&self, part: Part) -> u32 {
        self.processes[&part].child.id()
    }

    /// What `sealci up` would leave for the other commands.
    fn write_client_file(&self) {
        let token =
            fs::read_to_string(self.data().join("admin.token")).expect("the controller makes its token");
        let url = |part: Part| self.addresses.get(&part).cloned().unwrap_or_default();
        let file = json!({
            "controller": url(Part::Controller), "monitor": url(Part::Monitor), "token": token.trim(),
        });
        fs::write(self.data().join("client.json"), file.to_string()).expect("the data folder can be written");
    }

    fn wait_for_agent(&self) {
        eventually("an agent that takes work", || {
            let agents = self.json(&["agent", "list"]);
            agents.as_array()?.iter().find(|agent| agent["accepting"] == true).map(|_| ())
        });
    }

    /// A command line of the installation's users, ready to run.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).env("SEALCI_DATA", self.data()).stdin(Stdio::null());
        for variable in ["SEALCI_SERVER", "SEALCI_MONITOR", "SEALCI_TOKEN", "SEALCI_CA"] {
            command.env_remove(variable);
        }
        if let Some((_, certificates)) = &self.tls {
            command.env("SEALCI_CA", &certificates.authority);
        }
        command
    }

    /// Where a service listens, as a URL.
    pub fn url(&self, part: Part) -> &str {
        &self.addresses[&part]
    }

    /// What a service has printed since it was last started.
    pub fn service_log(&self, part: Part) -> String {
        fs::read_to_string(&self.processes[&part].log).expect("a log can be read")
    }

    /// Runs a command line to its end.
    pub fn sealci(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary can be run")
    }

    /// What a command line prints with `--json`; null where it fails.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.sealci(&[arguments, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        for process in self.processes.values_mut().chain(self.beside.values_mut()) {
            process.kill();
        }
        host::remove_cgroups(&self.data().join("agent"));
        self.remove_groups_beside();
        if std::thread::panicking() {
            self.print_logs();
        }
    }
}

impl Installation {
    fn print_logs(&self) {
        let Ok(entries) = fs::read_dir(self.folder.path()) else { return };
        let mut logs: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        for log in logs {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let name = log.file_stem().unwrap_or_default().to_string_lossy();
            eprintln!("--- {name}");
            // The end tells the most.
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(200)..] {
                eprintln!("{line}");
            }
        }
    }
}

/// A scheduler beside the installation's own.
pub struct OtherScheduler {
    _process: Process,
    pub url: String,
}

/// An agent beside the installation's own.
pub struct OtherAgent {
    process: Process,
    folder: PathBuf,
}

impl Drop for OtherAgent {
    fn drop(&mut self) {
        self.process.kill();
        host::remove_cgroups(&self.folder);
    }
}

/// A child process that does not outlive its owner.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn spawn(mut command: Command, log: PathBuf) -> Self {
        let file = File::create(&log).expect("the log can be written");
        let errors = file.try_clone().expect("a file can be duplicated");
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .env("SEALCI_LOG", std::env::var("SEALCI_LOG").unwrap_or_else(|_| "info".to_owned()))
            .spawn()
            .expect("the binary can be run");
        Self { child, log }
    }

    fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child can be asked") {
            panic!("it ended with {status}: {}", fs::read_to_string(&self.log).unwrap_or_default());
        }
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Asks until there is an answer. For what only can be asked for; where an event exists, tests wait for it instead.
///
/// # Panics
/// When there is none within [`PATIENCE`].
pub fn eventually<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(begun.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A Git repository with one commit and a working tree.
pub struct Repository {
    pub path: PathBuf,
}

impl Repository {
    /// Makes one whose `.sealci/pipeline.yaml` is `manifest`.
    pub fn with_manifest(path: PathBuf, manifest: &str) -> Self {
        fs::create_dir_all(path.join(".sealci")).expect("a folder can be made");
        let repository = Self { path };
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository.write(".sealci/pipeline.yaml", manifest);
        repository.commit("Begin");
        repository
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path.join(name), text).expect("the working tree can be written");
    }

    /// Commits everything; gives the revision.
    pub fn commit(&self, subject: &str) -> String {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "-m", subject]);
        self.git(&["rev-parse", "HEAD"])
    }

    pub fn url(&self) -> String {
        format!("file://{}", self.path.display())
    }

    /// Runs git in the working tree.
    pub fn git(&self, arguments: &[&str]) -> String {
        let output = Command::new("git")
            .arg("-C")
            .arg(&self.path)
            .args(["-c", "user.name=test", "-c", "user.email=test@sealci.invalid"])
            .args(arguments)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .output()
            .expect("git can be run");
        assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

/// Says loudly what was not tested, and why; `cargo xtask test` lists it at its end. Fails where `SEALCI_REQUIRE` names
/// the capability.
pub fn skip(capability: &str, test: &str, why: &str) {
    let required = std::env::var("SEALCI_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name.trim() == capability), "{test} needs {capability}: {why}");
    eprintln!("SKIPPED: {test}: {why}");
    if let Some(path) = std::env::var_os("SEALCI_SKIPS") {
        use std::io::Write;
        let file = fs::OpenOptions::new().append(true).create(true).open(path);
        writeln!(file.expect("the list of skips can be written"), "{test}: {why}")
            .expect("it can be appended to");
    }
}
