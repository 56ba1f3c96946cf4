//! What is different about an action in a daemon's container.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bollard::models::{ContainerConfig, ContainerCreateBody};
use bollard::query_parameters::{CreateContainerOptionsBuilder, ListContainersOptionsBuilder};
use sealci_agent::executor::docker::{
    DockerError, DockerExecutor, DockerOptions, Engine, PullOptions, probe,
};
use sealci_agent::executor::{ExecutionRequest, Executor, ShellKind, notes};
use sealci_agent::workspace;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, Entrypoint, Network, Pull};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::daemons::{TestDaemon, client, derive, socket};
use crate::lab::{Lab, PATIENCE, Record, eventually, processes_of, skip, until_output};

fn request(lab: &Lab, image: &str, command: &str) -> ExecutionRequest {
    let mut request = lab.request([command]);
    request.container = Some(Container::of(image));
    request
}

/// The names of an agent's containers.
async fn containers_of(agent: &str) -> Vec<String> {
    let filters: HashMap<String, Vec<String>> =
        [("label".to_owned(), vec![format!("sealci.agent={agent}")])].into();
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let listed = client(&socket().unwrap()).list_containers(Some(options)).await.unwrap();
    listed.into_iter().flat_map(|one| one.names.unwrap_or_default()).collect()
}

pub async fn a_daemon_says_what_it_is(_lab: &Lab) {
    let info = probe(&socket().unwrap()).await.unwrap();
    assert_eq!(info.engine, Engine::Docker);
    assert!(!info.version.is_empty() && info.api_version.starts_with("1."), "{info:?}");
    assert!(!info.is_rootless && ["amd64", "arm64"].contains(&info.architecture.as_str()), "{info:?}");
}

pub async fn it_is_sealed(lab: &Lab) {
    let request = lab.request([
        "id -u; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status /proc/1/status",
        "! test -e /var/run/docker.sock; ! echo x >>/run/sealci/sealci-init; ! rm /run/sealci/sealci-init; true",
        "! mount -t tmpfs none /mnt; ! unshare --mount true; ! chown 1 /workspace; ! cat /proc/1/environ; ! echo x >/proc/1/mem",
        "! echo x >/proc/sys/kernel/hostname; ! echo x >/proc/sysrq-trigger; kill -9 1; kill -STOP 1; echo alive",
        "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '",
        "ls /proc/self/fd | tr '\\n' ' '; cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null || true",
    ]);
    let workspace = request.workspace.clone();
    let mut execution = lab.start(request).await;
    let record = Record::of(&mut execution).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    let status = record.output_of(0);
    for process in ["self", "1"] {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(
                status.contains(&format!("/proc/{process}/status:{set}:\t0000000000000000\n")),
                "{status}"
            );
        }
        assert!(status.contains(&format!("/proc/{process}/status:NoNewPrivs:\t1\n")), "{status}");
        assert!(status.contains(&format!("/proc/{process}/status:Seccomp:\t2\n")), "{status}");
    }
    assert!(record.output_of(3).ends_with("alive\n"), "{}", record.text());
    assert_eq!(record.output_of(4), "lo\n");
    assert_eq!(record.output_of(5), format!("0 1 2 3 {}\n", crate::lab::PIDS));
    workspace::remove_tree(&workspace).unwrap();
}

pub async fn nothing_is_left_with_the_daemon(lab: &Lab) {
    let mut execution = lab.start(lab.request(["echo up; sleep 1000"])).await;
    until_output(&mut execution, "up\n").await;
    assert_eq!(containers_of(&lab.instance).await.len(), 1);
    execution.handle().kill();
    while execution.next().await.is_some() {}
    assert_eq!(containers_of(&lab.instance).await, Vec::<String>::new());
    // Also of what failed to start.
    let mut wrong = lab.request(["true"]);
    wrong.container.as_mut().unwrap().user = Some("nobody-there".to_owned());
    let error = lab.executor.prepare(wrong).await.unwrap_err();
    assert!(error.message().contains("no user `nobody-there`"), "{}", error.message());
    assert_eq!(containers_of(&lab.instance).await, Vec::<String>::new());
}

pub async fn a_sweep_takes_what_is_its_own(lab: &Lab) {
    let docker = client(&socket().unwrap());
    let other = format!("{}-other", lab.instance);
    for (agent, name) in [(&lab.instance, "own"), (&other, "other")] {
        let body = ContainerCreateBody {
            image: Some("tools".to_owned()),
            cmd: Some(["sleep", "1000"].map(str::to_owned).to_vec()),
            labels: Some([("sealci.agent".to_owned(), agent.clone())].into()),
            ..ContainerCreateBody::default()
        };
        let options = CreateContainerOptionsBuilder::new().name(&format!("{name}-{}", lab.instance)).build();
        let made = docker.create_container(Some(options), body).await.unwrap();
        docker.start_container(&made.id, None).await.unwrap();
    }
    lab.executor.sweep().await.unwrap();
    lab.executor.sweep().await.unwrap();
    assert_eq!(containers_of(&lab.instance).await, Vec::<String>::new());
    assert_eq!(containers_of(&other).await, [format!("/other-{}", lab.instance)]);
    let options = DockerOptions { socket: socket().unwrap(), ..DockerOptions::of(other.clone()) };
    DockerExecutor::new(lab.folder.path(), options).unwrap().sweep().await.unwrap();
    assert_eq!(containers_of(&other).await, Vec::<String>::new());
}

pub async fn a_killed_agents_containers_go_by_themselves(lab: &Lab) {
    const TEST: &str = "SEALCI_TEST_DOCKER_VICTIM";
    if std::env::var_os(TEST).is_some() {
        let request = lab.request(["trap '' TERM HUP; echo up; sleep 1000"]);
        let mut execution = lab.start(ExecutionRequest { network: Network::On, ..request }).await;
        until_output(&mut execution, "up\n").await;
        eprintln!("VICTIM={}", lab.instance);
        while execution.next().await.is_some() {}
        return;
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(TEST, "1")
        .envs(lab.given.iter().cloned())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = std::io::BufReader::new(victim.stderr.take().unwrap());
    let agent = std::io::BufRead::lines(stderr)
        .map_while(Result::ok)
        .find_map(|line| Some(line.strip_prefix("VICTIM=")?.to_owned()))
        .expect("the victim names its agent");
    assert_eq!((containers_of(&agent).await.len(), networks_of(&agent).await), (1, 1));
    victim.kill().unwrap();
    victim.wait().unwrap();
    let until = tokio::time::Instant::now() + PATIENCE;
    while !containers_of(&agent).await.is_empty() {
        assert!(tokio::time::Instant::now() < until, "the container outlives its agent");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // A network ends with no process: the agent's next start takes it away.
    assert_eq!(networks_of(&agent).await, 1);
    let options = DockerOptions { socket: socket().unwrap(), ..DockerOptions::of(agent.clone()) };
    DockerExecutor::new(lab.folder.path(), options).unwrap().sweep().await.unwrap();
    assert_eq!(networks_of(&agent).await, 0);
}

pub async fn images_have_users(lab: &Lab) {
    let docker = client(&socket().unwrap());
    let config = ContainerConfig { user: Some("build".to_owned()), ..ContainerConfig::default() };
    derive(&docker, "of-build", config).await;
    for (image, user, expected) in [
        ("tools", None, "0 0"),
        ("tools", Some("root"), "0 0"),
        ("tools", Some("build"), "1000 100"),
        ("tools", Some("1000"), "1000 100"),
        ("tools", Some("build:video"), "1000 44"),
        ("tools", Some("1234:5678"), "1234 5678"),
        ("of-build", None, "1000 100"),
        ("of-build", Some("0"), "0 0"),
    ] {
        let mut request = lab.request([
            "echo $(id -u) $(id -g)",
            "cat given; echo mine >given; touch made; mkdir -m 700 folder; echo x >folder/x; touch /tmp/x",
        ]);
        *request.container.as_mut().unwrap() =
            Container { user: user.map(str::to_owned), ..Container::of(image) };
        let workspace = request.workspace.clone();
        std::fs::write(workspace.join("given"), "given\n").unwrap();
        let record = lab.run(request).await;
        assert_eq!(record.outcome(), &Outcome::Succeeded, "{user:?}: {}", record.text());
        assert_eq!(record.text(), format!("{expected}\ngiven\n"), "{user:?}");
        // An agent that is not root's has all of it back; root's can delete it in any case.
        let own = nix::unistd::geteuid();
        if !own.is_root() {
            for name in ["", "given", "made", "folder", "folder/x"] {
                let owner = std::fs::metadata(workspace.join(name)).unwrap().uid();
                assert_eq!(owner, own.as_raw(), "{user:?}: {name}");
            }
        }
        workspace::remove_tree(&workspace).unwrap();
    }
}

pub async fn an_image_says_how_it_is_run(lab: &Lab) {
    let docker = client(&socket().unwrap());
    let words = |text: &str| Some(text.split(' ').map(str::to_owned).collect::<Vec<_>>());
    let config = ContainerConfig {
        entrypoint: words("env FROM=image"),
        cmd: words("false"),
        env: words("FROM_IMAGE=image BOTH=image"),
        working_dir: Some("/var".to_owned()),
        ..ContainerConfig::default()
    };
    derive(&docker, "own", config).await;
    let manifests = words("env FROM=manifest").unwrap();
    for (entrypoint, expected) in [
        (Entrypoint::Default, "none"),
        (Entrypoint::Image, "image"),
        (Entrypoint::Words(manifests), "manifest"),
        (Entrypoint::Words(Vec::new()), "none"),
    ] {
        let mut request = request(lab, "own", "echo ${FROM:-none} $FROM_IMAGE $BOTH $(pwd) $TMPDIR");
        request.container.as_mut().unwrap().entrypoint = entrypoint;
        request.env.insert("BOTH".into(), "manifest".into());
        request.names = vec!["db".into(), "bad name\n1.2.3.4 evil".into()];
        assert_eq!(lab.run(request).await.text(), format!("{expected} image manifest /workspace /tmp\n"));
    }
    let mut named = request(lab, "own", "getent hosts db; grep -c evil /etc/hosts || true");
    named.names = vec!["db".into(), "bad name\n1.2.3.4 evil".into()];
    let text = lab.run(named).await.text();
    assert!(text.starts_with("127.0.0.1 ") && text.ends_with("db\n0\n"), "{text}");
}

pub async fn an_image_that_is_not_to_be_had_is_told(lab: &Lab) {
    let mut never = request(lab, "not-there", "true");
    never.container.as_mut().unwrap().pull = Pull::Never;
    let error = lab.executor.prepare(never).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Image);
    assert!(error.message().contains("`pull: never`"), "{}", error.message());

    // Nobody listens there.
    let mut unreachable = request(lab, "127.0.0.1:9/team/image:1", "true");
    let (said, mut heard) = notes();
    unreachable.notes = said;
    let error = lab.executor.prepare(unreachable).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Registry, "it may be there again in a moment");
    assert!(
        error.message().contains("could not pull it") && error.message().contains("refused"),
        "{error:?}"
    );
    assert_eq!(heard.next().await.unwrap(), "sealci: pulling 127.0.0.1:9/team/image:1\n");

    for (name, complaint) in
        [("Upper", "upper-case"), ("oci:folder", "registries alone"), ("https://x/y", "https://")]
    {
        let error = lab.executor.prepare(request(lab, name, "true")).await.unwrap_err();
        assert_eq!(error.cause(), Cause::Unsupported);
        assert!(error.message().contains(complaint), "{}", error.message());
    }
    let mut none = lab.request(["true"]);
    none.container = None;
    let error = lab.executor.prepare(none).await.unwrap_err();
    assert!(error.message().contains("names no image"), "{}", error.message());
}

/// Debian's registry on the loopback of the daemon, which asks for a login.
struct PrivateRegistry {
    server: std::process::Child,
    folder: tempfile::TempDir,
    daemon: String,
}

impl PrivateRegistry {
    const ADDRESS: &str = "127.0.0.1:5123";

    /// With the tests' image as `tools:1`.
    fn start(socket: &Path) -> Option<Self> {
        let name = std::thread::current().name().unwrap_or_default().to_owned();
        for program in ["docker-registry", "skopeo", "nsenter"] {
            if std::process::Command::new(program).arg("--version").output().is_err() {
                skip("registry", &name, &format!("`{program}` is missing"));
                return None;
            }
        }
        let folder = tempfile::TempDir::new().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let path = folder.path().display().to_string();
        // `user` and `hunter2`, by bcrypt.
        write("htpasswd", "user:$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8.\n");
        write(
            "config.yml",
            &format!(
                "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\nhttp: {{addr: \"{}\"}}\n\
                 auth: {{htpasswd: {{realm: test, path: {path}/htpasswd}}}}\n",
                Self::ADDRESS
            ),
        );
        let daemon = std::fs::read_to_string(socket.with_file_name("pid")).unwrap().trim().to_owned();
        let mut server = std::process::Command::new("nsenter")
            .args(["--target", &daemon, "--net", "docker-registry", "serve"])
            .arg(folder.path().join("config.yml"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = std::io::BufReader::new(server.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert!(
                std::io::BufRead::read_line(&mut log, &mut line).unwrap() > 0,
                "the registry server ended"
            );
        }
        // Its log is read to the end, so that it never waits.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let registry = Self { server, folder, daemon };
        let pushed = std::process::Command::new("nsenter")
            .args(["--target", &registry.daemon, "--net", "skopeo", "--insecure-policy", "copy", "--quiet"])
            .args(["--dest-tls-verify=false", "--dest-creds", "user:hunter2", "--src-daemon-host"])
            .arg(format!("unix://{}", socket.display()))
            .args(["docker-daemon:tools:latest", &format!("docker://{}/tools:1", Self::ADDRESS)])
            .output()
            .unwrap();
        assert!(pushed.status.success(), "{}", String::from_utf8_lossy(&pushed.stderr));
        Some(registry)
    }

    /// As `docker login` writes it.
    fn logins(&self, password: &str) -> std::path::PathBuf {
        use base64::Engine as _;
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("user:{password}"));
        let file = self.folder.path().join(format!("logins-{password}.json"));
        let text = serde_json::json!({"auths": {Self::ADDRESS: {"auth": auth}}}).to_string();
        std::fs::write(&file, text).unwrap();
        file
    }
}

impl Drop for PrivateRegistry {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

pub async fn a_private_registry_opens_with_its_login_only(lab: &Lab) {
    let socket = socket().unwrap();
    let Some(registry) = PrivateRegistry::start(&socket) else { return };
    let name = format!("{}/tools:1", PrivateRegistry::ADDRESS);
    let executor = |credentials| {
        let pull = PullOptions { credentials, ..PullOptions::default() };
        let agent = format!("{}-logins", lab.instance);
        let options = DockerOptions { socket: socket.clone(), pull, ..DockerOptions::of(agent) };
        DockerExecutor::new(lab.folder.path(), options).unwrap()
    };
    for credentials in [None, Some(registry.logins("hunter3"))] {
        let error = executor(credentials).prepare(request(lab, &name, "true")).await.unwrap_err();
        assert_eq!(error.cause(), Cause::Image);
        assert!(error.message().contains("could not pull it"), "{}", error.message());
        assert!(!error.message().contains("hunter"), "{}", error.message());
    }
    let knowing = executor(Some(registry.logins("hunter2")));
    let mut execution = knowing.prepare(request(lab, &name, "echo pulled")).await.unwrap().begin();
    assert_eq!(Record::of(&mut execution).await.text(), "pulled\n");
    // Who has it needs no registry; who is to ask each time does.
    let mut held = executor(None).prepare(request(lab, &name, "echo held")).await.unwrap().begin();
    assert_eq!(Record::of(&mut held).await.text(), "held\n");
    let mut always = request(lab, &name, "true");
    always.container.as_mut().unwrap().pull = Pull::Always;
    let error = executor(None).prepare(always.clone()).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Image, "{}", error.message());
    let mut execution = knowing
        .prepare(ExecutionRequest { attempt: lab.request(["true"]).attempt, ..always })
        .await
        .unwrap()
        .begin();
    assert_eq!(Record::of(&mut execution).await.outcome(), &Outcome::Succeeded);
}

/// Fails to reach a daemon, and says so.
async fn unreached(lab: &Lab, socket: &Path) -> String {
    let options = DockerOptions { socket: socket.to_owned(), ..DockerOptions::of("nobody") };
    let executor = DockerExecutor::new(lab.folder.path(), options).unwrap();
    let error = executor.prepare(lab.request(["true"])).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Executor);
    assert!(executor.sweep().await.is_err());
    executor.close().await;
    error.message()
}

pub async fn a_daemon_that_is_not_there_is_told(lab: &Lab) {
    let socket = lab.folder.path().join("no.sock");
    let message = unreached(lab, &socket).await;
    for words in
        ["is Docker running?", &format!("unix://{}", socket.display()), "--docker-host", "No such file"]
    {
        assert!(message.contains(words), "{message}");
    }
    // Somebody else, and too old a daemon.
    for (name, answer, complaint) in [
        ("web.sock", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "is no container daemon"),
        (
            "old.sock",
            "HTTP/1.1 200 OK\r\nApi-Version: 1.24\r\n\r\nOK",
            "up to version 1.24, and 1.40 is needed",
        ),
        ("mute.sock", "", "is no container daemon"),
    ] {
        let socket = lab.folder.path().join(name);
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let serving = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 1024]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        let message = unreached(lab, &socket).await;
        assert!(message.contains(complaint), "{message}");
        serving.abort();
    }
    assert!(matches!(probe(&socket).await, Err(DockerError::Unreachable { .. })));
}

pub async fn the_network_is_the_agents_own(lab: &Lab) {
    let online = |commands: &[&str]| {
        let mut request = lab.request(commands.iter().copied());
        request.network = Network::On;
        request.shell = ShellKind::Bash;
        request
    };
    let serve = "perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(Listen => 1, LocalPort => 8213) or die; \
         $| = 1; print qq(up\\n); print qq(heard\\n) while $l->accept'";
    let address = "awk '/32 host LOCAL/ { print f } { f = $2 }' /proc/net/fib_trie | grep -v ^127 | head -1";
    let mut execution = lab.start(online(&[address, serve])).await;
    let record = until_output(&mut execution, "up\n").await;
    let first = record.text().lines().next().unwrap().to_owned();
    let reach = format!("timeout 1 bash -c 'cat </dev/tcp/{first}/8213' 2>/dev/null || echo nothing");
    let interfaces = "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort | xargs";
    let other = lab.run(online(&[interfaces, &reach])).await;
    assert_eq!(other.text(), "eth0 lo\nnothing\n");
    execution.handle().kill();
    while execution.next().await.is_some() {}
    // It goes with the agent.
    assert_eq!(networks_of(&lab.instance).await, 1);
    lab.executor.close().await;
    assert_eq!(networks_of(&lab.instance).await, 0);
}

/// How many networks an agent has with the daemon.
async fn networks_of(agent: &str) -> usize {
    let listed = client(&socket().unwrap()).list_networks(None).await.unwrap();
    listed.into_iter().filter_map(|one| one.name).filter(|name| name.contains(agent)).count()
}

/// A daemon of its own, since it is killed.
pub async fn a_daemon_that_dies_takes_nobody_along(_lab: &Lab) {
    let daemon = tokio::task::spawn_blocking(TestDaemon::start).await.unwrap().unwrap();
    let lab = Lab::docker_at(&daemon.socket()).unwrap();
    let request = lab.request(["trap '' TERM HUP; echo up; sleep 1000; sleep 1000"]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(daemon.pid()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    match record.outcome() {
        Outcome::Errored { cause: Cause::Executor, message } => {
            assert!(message.contains("sealci-init ended without a report"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    let remains = record.remains.clone().expect("the container could not be removed");
    assert!(
        remains.contains("is Docker running?") && remains.contains("the agent's next start"),
        "{remains}"
    );
    eventually("the action ends all the same", || processes_of(attempt).is_empty());
    let message = lab.executor.prepare(lab.request(["true"])).await.unwrap_err().message();
    assert!(message.contains("is Docker running?"), "{message}");
    lab.executor.close().await;
}
