//! A Docker daemon of the tests' own: one for all of this binary's tests, in a network and a mount namespace of its own, with
//! its socket, its images and its state in one folder that goes with it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use bollard::models::{ContainerConfig, ContainerCreateBody};
use bollard::query_parameters::{
    CommitContainerOptionsBuilder, CreateContainerOptionsBuilder, CreateImageOptionsBuilder,
    RemoveContainerOptionsBuilder,
};
use bollard::{ClientVersion, Docker};
use futures_util::StreamExt;
use sealci_agent::executor::docker::{DockerExecutor, DockerOptions};

use crate::images::{TestImages, tools_of};
use crate::lab::{Lab, PATIENCE, PIDS, eventually, random_action, skip};
use tempfile::TempDir;

/// Tells a process that a test starts where the daemon listens.
pub const GIVEN: &str = "SEALCI_TEST_DOCKER";

/// Ends with the process that holds its standard input, however that ends.
const KEEPER: &str = r#"
ip link set lo up 2>/dev/null
dockerd --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/pid" -H "unix://$1/docker.sock" --group root \
    >"$1/log" 2>&1 3>&- &
daemon=$!
cat >/dev/null
kill -TERM $daemon 2>/dev/null
wait $daemon
# What a daemon that was killed leaves: its helpers, and mounts of this namespace.
for process in /proc/[0-9]*; do
    if tr '\0' ' ' <"$process/cmdline" 2>/dev/null | grep -qF "$1/"; then kill -9 "${process#/proc/}"; fi
done 2>/dev/null
awk -v folder="$1/" 'index($5, folder) == 1 { print $5 }' /proc/self/mountinfo | sort -r | xargs -r -n 1 umount -l
rm -rf "$1"
"#;

/// A daemon, and what ends it.
pub struct TestDaemon {
    pub folder: PathBuf,
    keeper: Child,
}

impl TestDaemon {
    pub fn socket(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    /// Starts one with the image `tools`; none where this machine cannot.
    pub fn start() -> Option<Self> {
        let folder = TempDir::with_prefix("sealci-dockerd-").unwrap().keep();
        let keeper = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "slave", "sh", "-c", KEEPER, "sh"])
            .arg(&folder)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let daemon = Self { folder, keeper };
        daemon.await_start();
        futures(import_tools(&daemon.socket()));
        Some(daemon)
    }

    pub fn await_start(&self) {
        let until = std::time::Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            let log = || std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            assert!(std::time::Instant::now() < until, "dockerd does not come up: {}", log());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    pub fn pid(&self) -> i32 {
        std::fs::read_to_string(self.folder.join("pid")).unwrap().trim().parse().unwrap()
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        // With its standard input the keeper ends the daemon.
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Runs a future where there is no runtime, or another one.
fn futures<T: Send>(future: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| {
        let running =
            || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
        scope.spawn(running).join().unwrap()
    })
}

/// Where the daemon of this binary's tests listens; started when it is first asked for. It ends with this process.
pub fn socket() -> Option<PathBuf> {
    static DAEMON: Mutex<Option<TestDaemon>> = Mutex::new(None);
    if let Some(given) = std::env::var_os(GIVEN) {
        return Some(given.into());
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    if !nix::unistd::geteuid().is_root() {
        skip("docker", &name, "only root may start a Docker daemon");
        return None;
    }
    if Command::new("dockerd").arg("--version").stdout(Stdio::null()).status().is_err() {
        skip("docker", &name, "`dockerd` is missing (apt-get install docker.io)");
        return None;
    }
    let mut daemon = DAEMON.lock().unwrap_or_else(PoisonError::into_inner);
    if daemon.is_none() {
        *daemon = TestDaemon::start();
    }
    daemon.as_ref().map(TestDaemon::socket)
}

pub fn client(socket: &Path) -> Docker {
    let version = ClientVersion { major_version: 1, minor_version: 41 };
    Docker::connect_with_unix(&socket.to_string_lossy(), 60, &version).unwrap()
}

async fn import_tools(socket: &Path) {
    let tools = tools_of(0);
    let archive = Command::new("tar")
        .args(["--exclude=./removed", "--exclude=./etc/group", "-cf", "-", "-C"])
        .arg(tools.join("low"))
        .args(["--exclude=./etc/passwd", "."])
        .output()
        .unwrap();
    assert!(archive.status.success());
    // Two archives are one, but for the blocks of zeroes behind the first.
    let higher = Command::new("tar")
        .args(["-cf", "-", "-C"])
        .arg(tools.join("high"))
        .args(["./etc/passwd", "./etc/group"])
        .output();
    let mut bytes = archive.stdout;
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap() / 512 * 512 + 512;
    bytes.truncate(end);
    bytes.extend(higher.unwrap().stdout);
    let path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
    let options = CreateImageOptionsBuilder::new()
        .from_src("-")
        .repo(TestImages::TOOLS)
        .tag("latest")
        .changes(vec![path])
        .build();
    let docker = client(socket);
    let mut told = docker.create_image(Some(options), Some(bollard::body_full(bytes.into())), None);
    while let Some(piece) = told.next().await {
        piece.unwrap();
    }
}

/// Makes an image of `tools` with another configuration.
pub async fn derive(docker: &Docker, name: &str, config: ContainerConfig) {
    let body = ContainerCreateBody {
        image: Some(TestImages::TOOLS.to_owned()),
        cmd: Some(vec!["true".to_owned()]),
        ..ContainerCreateBody::default()
    };
    let made =
        docker.create_container(Some(CreateContainerOptionsBuilder::new().build()), body).await.unwrap();
    let options = CommitContainerOptionsBuilder::new().container(&made.id).repo(name).tag("latest").build();
    docker.commit_container(options, config).await.unwrap();
    let options = RemoveContainerOptionsBuilder::new().force(true).build();
    docker.remove_container(&made.id, Some(options)).await.unwrap();
}

impl Lab {
    /// `docker`, with a real daemon.
    pub fn docker() -> Option<Self> {
        Self::docker_at(&socket()?)
    }

    /// `docker`, for the tests of what is its own.
    pub fn docker_own() -> Option<Self> {
        Self::docker()
    }

    pub fn docker_at(socket: &Path) -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let instance = format!("test-{}", random_action());
        let options =
            DockerOptions { socket: socket.to_owned(), pids: PIDS, ..DockerOptions::of(instance.clone()) };
        let executor = Box::new(DockerExecutor::new(folder.path(), options).unwrap());
        let mut lab = Self::of(executor, folder, None);
        lab.limits = true;
        lab.instance = instance;
        lab.given = vec![(GIVEN, socket.display().to_string())];
        eventually("the daemon is there", || socket.exists());
        Some(lab)
    }
}
