//! What is different about an action in an image: whose files it sees, whom it runs as, and that the image is a stranger's.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use sealci_agent::executor::{ExecutionRequest, ExecutorError, Neighbourhood, ServiceRole, notes};
use sealci_agent::workspace;
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, Entrypoint, Service};

use crate::images::image;
use crate::lab::{Lab, PATIENCE, Record, until_output};

/// A folder for a layer of the lab's own.
fn layer(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.folder.path().join("layers").join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}

fn request(lab: &Lab, image: &str, command: &str) -> ExecutionRequest {
    let mut request = lab.request([command]);
    request.container = Some(Container::of(image));
    request
}

async fn run(lab: &Lab, image: &str, command: &str) -> Record {
    lab.run(request(lab, image, command)).await
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Sets a trap in a layer; `outside` must stay as it is.
type Trap = fn(layer: &Path, outside: &Path);

fn link(layer: &Path, name: &str, target: impl AsRef<Path>) {
    let path = layer.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    symlink(target, path).unwrap();
}

fn file(layer: &Path, name: &str) {
    let path = layer.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "the image's\n").unwrap();
}

fn pipe(layer: &Path, name: &str) {
    let path = layer.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

fn whiteout(path: &Path) {
    use nix::sys::stat::{Mode, SFlag, mknod};
    mknod(path, SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
}

const TRAPS: &[(&str, Trap)] = &[
    ("etc leads out", |layer, outside| link(layer, "etc", outside)),
    ("etc climbs out", |layer, outside| {
        link(layer, "etc", Path::new("../../../../../../../..").join(outside.strip_prefix("/").unwrap()));
    }),
    ("etc leads to itself", |layer, _| link(layer, "etc", "etc")),
    ("etc leads nowhere", |layer, _| link(layer, "etc", "/none/at/all")),
    ("etc is the root", |layer, _| link(layer, "etc", "/")),
    ("etc is a process's root", |layer, _| link(layer, "etc", "/proc/self/root/etc")),
    ("etc is the workspace", |layer, _| link(layer, "etc", "/workspace")),
    ("etc is dev", |layer, _| link(layer, "etc", "/dev")),
    ("etc is a file", |layer, _| file(layer, "etc")),
    ("etc is a pipe", |layer, _| pipe(layer, "etc")),
    ("hosts leads out", |layer, outside| link(layer, "etc/hosts", outside.join("file"))),
    ("resolv.conf leads out", |layer, outside| link(layer, "etc/resolv.conf", outside.join("none"))),
    ("hostname is a folder", |layer, _| std::fs::create_dir_all(layer.join("etc/hostname")).unwrap()),
    ("passwd never ends", |layer, _| link(layer, "etc/passwd", "/dev/zero")),
    ("passwd is a pipe", |layer, _| pipe(layer, "etc/passwd")),
    ("run leads out", |layer, outside| link(layer, "run", outside)),
    ("run is proc", |layer, _| link(layer, "run", "/proc")),
    ("run is var/run and the other way round", |layer, _| {
        link(layer, "run", "/var/run");
        link(layer, "var/run", "/run");
    }),
    ("run is a file", |layer, _| file(layer, "run")),
    ("the init's folder leads out", |layer, outside| link(layer, "run/sealci", outside)),
    ("the init's folder is a file", |layer, _| file(layer, "run/sealci")),
    ("the init is the image's", |layer, outside| {
        link(layer, "run/sealci/sealci-init", outside.join("file"));
        link(layer, "run/sealci/scratch", outside);
    }),
    ("workspace leads out", |layer, outside| link(layer, "workspace", outside)),
    ("workspace is etc", |layer, _| link(layer, "workspace", "/etc")),
    ("workspace is a process's root", |layer, _| link(layer, "workspace", "/proc/1/root")),
    ("workspace is a file", |layer, _| file(layer, "workspace")),
    ("workspace is full", |layer, _| file(layer, "workspace/made")),
    ("proc leads out", |layer, outside| link(layer, "proc", outside)),
    ("proc is etc", |layer, _| link(layer, "proc", "/etc")),
    ("proc is a file", |layer, _| file(layer, "proc")),
    ("proc is full of links", |layer, outside| {
        link(layer, "proc/sys", outside);
        link(layer, "proc/self", outside);
    }),
    ("dev leads out", |layer, outside| link(layer, "dev", outside)),
    ("dev is tmp", |layer, _| link(layer, "dev", "/tmp")),
    ("dev is a pipe", |layer, _| pipe(layer, "dev")),
    ("dev is full of links", |layer, outside| {
        for name in ["null", "pts", "ptmx", "shm", "fd", "kcore"] {
            link(layer, &format!("dev/{name}"), outside.join("file"));
        }
    }),
    ("sys leads out", |layer, outside| link(layer, "sys", outside)),
    ("tmp leads out", |layer, outside| link(layer, "tmp", outside)),
    ("tmp is proc", |layer, _| link(layer, "tmp", "/proc")),
    ("tmp is a file", |layer, _| file(layer, "tmp")),
    ("there is nothing", |layer, _| {
        for name in ["dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var"] {
            whiteout(&layer.join(name));
        }
    }),
];

pub async fn hostile_images_get_nowhere(lab: &Lab) {
    let outside = lab.folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "untouched").unwrap();
    let tools = lab.images.layers(crate::images::TestImages::TOOLS);
    for (number, (what, trap)) in TRAPS.iter().enumerate() {
        let name = format!("trap-{number}");
        let layer = layer(lab, &name);
        trap(&layer, &outside);
        lab.images.put(&name, image([&tools[..], &[layer]].concat()));
        let text = "test -d /proc/self/fd; test -c /dev/null; test -d /dev/pts; ls /dev/shm; test -d /sys; \
                    test -x /run/sealci/sealci-init; ! test -e /workspace/file; touch /workspace/made; \
                    readlink /proc/self/cwd; echo ran";
        let request = request(lab, &name, text);
        let workspace = request.workspace.clone();
        let record = lab.run(request).await;
        assert_eq!(record.text(), "/workspace\nran\n", "{what}: {:?}", record.outcome());
        assert_eq!(record.outcome(), &Outcome::Succeeded, "{what}");
        assert_eq!(std::fs::read(workspace.join("made")).unwrap(), b"", "{what}");
        let left: Vec<_> =
            std::fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["file"], "{what}");
        assert_eq!(std::fs::read_to_string(outside.join("file")).unwrap(), "untouched", "{what}");
    }
}

pub async fn images_have_users(lab: &Lab) {
    for (user, expected) in [
        ("", "0 0 0"),
        ("root", "0 0 0"),
        ("0:0", "0 0 0"),
        ("build", "1000 100 100 44"),
        ("1000", "1000 100 100 44"),
        ("build:video", "1000 44 44"),
        ("1234:5678", "1234 5678 5678"),
        ("65535", "65535 0 0"),
    ] {
        let mut request = lab.request([
            "echo $(id -u) $(id -g) $(id -G)",
            "cat given; echo mine >given; touch made; mkdir folder; echo x >folder/x; rm given",
            "touch /tmp/x && test -O /workspace -a -O made -a -O /tmp/x",
        ]);
        request.container.as_mut().unwrap().user = Some(user.to_owned());
        let workspace = request.workspace.clone();
        std::fs::write(workspace.join("given"), "given\n").unwrap();
        let record = lab.run(request).await;
        if !is_root() && !expected.starts_with('0') {
            let Outcome::Errored { message, .. } = record.outcome() else { panic!("{:?}", record.outcome()) };
            assert!(message.contains("say `user: root`"), "{message}");
            continue;
        }
        assert_eq!(record.outcome(), &Outcome::Succeeded, "{user}: {}", record.text());
        assert_eq!(record.text(), format!("{expected}\ngiven\n"), "{user}");
        // What was made is the agent's again, but where mounts cannot map owners.
        if sealci_sandbox::maps_owners(lab.folder.path(), 1 << 20) || !is_root() {
            let own = std::fs::metadata(&workspace).unwrap().uid();
            for name in ["made", "folder", "folder/x"] {
                assert_eq!(std::fs::metadata(workspace.join(name)).unwrap().uid(), own, "{user}: {name}");
            }
        }
    }
    for (user, complaint) in
        [("none", "no user `none`"), ("build:none", "no group `none`"), ("70000", "70000")]
    {
        let mut request = lab.request(["echo never"]);
        request.container.as_mut().unwrap().user = Some(user.to_owned());
        // Where the tree is made beforehand that is found out beforehand.
        let (cause, message) = match lab.executor.prepare(request).await {
            Ok(standby) => match Record::of(&mut standby.begin()).await.outcome() {
                Outcome::Errored { cause, message } => (*cause, message.clone()),
                other => panic!("{other:?}"),
            },
            Err(error) => (error.cause(), error.message()),
        };
        assert!(message.contains(complaint), "{message}");
        // No other attempt would find that user.
        assert_eq!(cause, Cause::Image, "{message}");
    }
}

pub async fn an_image_is_its_layers(lab: &Lab) {
    const LAYERS: usize = 120;
    let tools = lab.images.layers(crate::images::TestImages::TOOLS);
    let (mut layers, mut expected) = (tools, Vec::<String>::new());
    for number in 0..LAYERS {
        let layer = layer(lab, &format!("many-{number}"));
        let folder = layer.join("many");
        std::fs::create_dir(&folder).unwrap();
        let mut put = |name: String| {
            std::fs::write(folder.join(&name), number.to_string()).unwrap();
            expected.retain(|known| !known.starts_with(&format!("{name}=")));
            expected.push(format!("{name}={number}"));
        };
        put(format!("file-{number}"));
        put(format!("file-{}", number / 2));
        if number % 7 == 6 {
            let hidden = number - 2;
            whiteout(&folder.join(format!("file-{hidden}")));
            expected.retain(|known| !known.starts_with(&format!("file-{hidden}=")));
        }
        if number == 60 && hides_what_is_below(&folder) {
            expected.retain(|known| known.ends_with("=60"));
        }
        layers.push(layer);
    }
    lab.images.put("many", image(layers));
    let text = "cd /many; for name in *; do echo \"$name=$(cat $name)\"; done; ! test -e /removed; \
                rm -r /many; mkdir /many; ls /many; grep -c build /etc/passwd";
    let record = run(lab, "many", text).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    let text = record.text();
    let mut seen: Vec<&str> = text.lines().collect();
    assert_eq!(seen.pop(), Some("1"));
    seen.sort_unstable();
    expected.sort_unstable();
    assert_eq!(seen, expected);
    // Nothing of it is in the layers.
    let record = run(lab, "many", "ls /many | wc -l").await;
    assert_eq!(record.text().trim(), expected.len().to_string());
}

/// Where the file system has attributes.
fn hides_what_is_below(folder: &Path) -> bool {
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(folder, "user.overlay.opaque", b"y", flags).is_ok()
}

pub async fn an_image_says_how_it_is_run(lab: &Lab) {
    let tools = lab.images.layers(crate::images::TestImages::TOOLS);
    let mut own = image(tools);
    own.config.env.insert("FROM_IMAGE".into(), "image".into());
    own.config.env.insert("BOTH".into(), "image".into());
    own.config.working_folder = "/var".into();
    own.config.user = "build".into();
    lab.images.put("own", own);
    let mut request = request(lab, "own", "echo $FROM_IMAGE $BOTH $SEALCI_WORKSPACE $(pwd) $TMPDIR; whoami");
    request.env.insert("BOTH".into(), "manifest".into());
    // Without root there is one user, and the manifest has the last word.
    let user = if is_root() { "build" } else { "root" };
    request.container.as_mut().unwrap().user = (!is_root()).then(|| "root".to_owned());
    let record = lab.run(request).await;
    assert_eq!(record.text(), format!("image manifest /workspace /workspace /tmp\n{user}\n"));

    let record = run(lab, "tools", "cat /etc/hosts; cat /etc/hostname; hostname").await;
    let text = record.text();
    assert!(text.starts_with("127.0.0.1 localhost "), "{text}");
    let names: Vec<&str> = text.lines().skip(2).collect();
    assert!(names.len() == 2 && names[0] == names[1], "{text}");
}

pub async fn an_image_that_is_not_to_be_had_is_told(lab: &Lab) {
    let error = lab.executor.prepare(request(lab, "none", "true")).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Image);
    assert!(error.message().contains("cannot have the image none: there is no such image"), "{error:?}");
    let mut request = request(lab, "none", "true");
    request.container = None;
    let error = lab.executor.prepare(request).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Unsupported);
    assert!(error.message().contains("names no image"), "{error:?}");
}

pub async fn what_is_not_wanted_any_more_is_not_waited_for(lab: &Lab) {
    let mut request = request(lab, "never", "true");
    let (said, mut heard) = notes();
    request.notes = said;
    let stop = request.stop.clone();
    let again = request.clone();
    let preparing = lab.executor.prepare(request);
    let stopping = async {
        assert_eq!(heard.next().await.unwrap(), "sealci: this one never comes\n");
        stop.cancel();
    };
    let (prepared, ()) = tokio::join!(preparing, stopping);
    assert!(matches!(prepared, Err(ExecutorError::Stopped)), "{prepared:?}");
    // Nothing of it is left.
    assert!(matches!(lab.executor.prepare(again).await, Err(ExecutorError::Stopped)));
}

pub async fn what_is_written_is_measured_and_goes(lab: &Lab) {
    const SIZE: u64 = 5 << 20;
    let request = request(
        lab,
        "tools",
        "head -c 5242880 /dev/zero >/var/lib/large; chmod 0 /var/lib; mkdir -m 0 /x; echo up; sleep 1000",
    );
    let scratch = request.scratch.clone();
    let mut execution = lab.start(request).await;
    until_output(&mut execution, "up\n").await;
    if is_root() {
        let found = Command::new("du").args(["-xsb"]).arg(&scratch).output().unwrap();
        let text = String::from_utf8(found.stdout).unwrap();
        let size: u64 = text.split_whitespace().next().unwrap().parse().unwrap();
        assert!(size >= SIZE, "{text}");
    }
    execution.handle().kill();
    while execution.next().await.is_some() {}
    workspace::remove_tree(&scratch).unwrap();
    assert!(!scratch.exists());
}

/// With a real store: what is asked for is unpacked, used twice, and what is not there is told.
pub async fn images_come_from_the_store(lab: &Lab) {
    let archive = "docker-archive:tools.tar";
    for _ in 0..2 {
        let record = run(lab, archive, "echo $FROM_IMAGE; touch /mine; test -x /usr/bin/env").await;
        assert_eq!(record.text(), "archive\n", "{:?}", record.outcome());
        assert_eq!(record.outcome(), &Outcome::Succeeded);
    }
    let error = lab.executor.prepare(request(lab, "docker-archive:none.tar", "true")).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Image, "{}", error.message());
    assert!(error.message().contains("none.tar"), "{}", error.message());
    let error = lab.executor.prepare(request(lab, "No Such: name", "true")).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Unsupported, "{}", error.message());
}

/// Where layers are copied, the log says so and why.
pub async fn copying_is_told(lab: &Lab) {
    let mut request = request(lab, "tools", "echo copied");
    let (said, mut heard) = notes();
    request.notes = said;
    let record = lab.run(request).await;
    assert_eq!(record.text(), "copied\n");
    let lines: Vec<String> =
        heard.rest().iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    assert_eq!(lines.len(), 1);
    assert!(
        lines[0].starts_with("sealci: copying the image's layers, for they cannot be stacked: "),
        "{lines:?}"
    );
}

/// What root in an image may do by the agent's configuration, and what not all the same.
pub async fn a_few_privileges_can_be_given(lab: &Lab) {
    let text = "touch x; chown 1000:100 x; stat -c %u:%g x; chmod 0 x; cat x; \
                setpriv --reuid 1000 --regid 100 --clear-groups id -u; \
                grep -E '^(CapPrm|CapEff|CapBnd|CapInh|CapAmb|NoNewPrivs)' /proc/self/status";
    let record = run(lab, "tools", text).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    let given = "00000000000000eb";
    let none = "0000000000000000";
    let expected = format!(
        "1000:100\n1000\nCapInh:\t{none}\nCapPrm:\t{given}\nCapEff:\t{given}\nCapBnd:\t{given}\nCapAmb:\t{none}\nNoNewPrivs:\t1\n"
    );
    assert_eq!(record.text(), expected);
    for forbidden in [
        "mount -t tmpfs none /mnt",
        "unshare --user true",
        "chroot / true",
        "mknod /tmp/sda b 8 0",
        "hostname other",
        "cat /proc/1/environ",
        "readlink /proc/1/exe",
        "echo x >/proc/sys/kernel/hostname",
        "echo x >/proc/sysrq-trigger",
        "chown 70000 /tmp",
        "setpriv --reuid 70000 true",
        "kill -0 1 && cat /proc/1/mem",
        "echo x >/run/sealci/sealci-init",
        "rm /run/sealci/sealci-init",
    ] {
        let record = run(lab, "tools", forbidden).await;
        assert!(matches!(record.outcome(), Outcome::Failed { .. }), "{forbidden}: {}", record.text());
    }
    // Another user has none of them, and gets none.
    let mut request = request(lab, "tools", "grep CapPrm /proc/self/status; ! chown 0 /workspace");
    request.container.as_mut().unwrap().user = Some("build".to_owned());
    let record = lab.run(request).await;
    assert_eq!(record.text().lines().next(), Some(format!("CapPrm:\t{none}").as_str()));
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
}

/// A port that is privileged on a host is nobody's privilege in a network of one's own.
pub async fn low_ports_are_everybodys(lab: &Lab) {
    let listen = "perl -MIO::Socket::INET -e 'IO::Socket::INET->new(Listen => 1, LocalAddr => q(127.0.0.1), LocalPort => 80) or die $!; print qq(listens\\n)'";
    let record = run(lab, "tools", listen).await;
    assert_eq!(record.text(), "listens\n");
}

pub async fn neighbours_meet_at_localhost(lab: &Lab) {
    let neighbourhood = Neighbourhood::default();
    let serve = "perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(Listen => 1, LocalAddr => q(127.0.0.1), LocalPort => 80) or die $!; \
        $| = 1; print qq(up\n); while ($c = $l->accept) { print $c qq(hello\n); close $c }'";
    let ask = "readlink /proc/self/ns/net; getent hosts db; \
        perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(PeerAddr => q(db), PeerPort => 80); print $s ? <$s> : qq(nothing\n)'";
    let neighbour = |command: &str| {
        let mut request = request(lab, "tools", command);
        request.neighbourhood = Some(neighbourhood.clone());
        request.names = vec!["db".into(), "bad name\n1.2.3.4 evil".into()];
        request
    };
    // At once, before the first can have made its network: the host's is never taken for it.
    let first = neighbour(&format!("readlink /proc/self/ns/net; {serve}"));
    let mut serving = lab.executor.prepare(first).await.unwrap().begin();
    let second = lab.executor.prepare(neighbour(ask)).await.unwrap();
    let record = until_output(&mut serving, "up\n").await;
    let network = record.text().lines().next().unwrap().to_owned();
    // And later, when it has become what it will be.
    let third = lab.executor.prepare(neighbour(ask)).await.unwrap();
    for standby in [second, third] {
        let asked = Record::of(&mut standby.begin()).await;
        assert_eq!(asked.outcome(), &Outcome::Succeeded, "{}", asked.text());
        let text = asked.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], network);
        assert!(lines[1].starts_with("127.0.0.1 ") && lines[1].ends_with(" db"), "{text}");
        assert_eq!(lines[2..], ["hello"], "{text}");
    }
    // Whoever does not live there does not hear of it.
    let mut stranger =
        request(lab, "tools", ask.split_once("; ").unwrap().1.trim_start_matches("getent hosts db; "));
    stranger.names = vec!["db".into()];
    assert_eq!(lab.run(stranger).await.text().lines().last(), Some("nothing"));
    serving.handle().kill();
    while serving.next().await.is_some() {}
}

/// A service is a program of an image, in the network of its action: here one that answers until it is told to stop.
pub async fn services_are_programs_beside_an_action(lab: &Lab) {
    let neighbourhood = Neighbourhood::default();
    let ask = "perl -MIO::Socket::INET -e 'for (1 .. 500) { $s = IO::Socket::INET->new(PeerAddr => q(db), PeerPort => 80) and last; \
        select undef, undef, undef, 0.02 } print $s ? <$s> : qq(nothing\n)'; sleep 1000";
    let mut action = request(lab, "tools", ask);
    action.neighbourhood = Some(neighbourhood.clone());
    action.names = vec!["db".into()];
    let serve = "$SIG{TERM} = sub { print qq(stops\n); exit 3 }; $| = 1; print qq(in $ENV{PWD_OF}\n); \
        $l = IO::Socket::INET->new(Listen => 1, LocalAddr => q(127.0.0.1), LocalPort => 80) or die $!; \
        while (1) { $c = $l->accept or next; print $c qq(served\n); close $c }";
    let mut service = ExecutionRequest { commands: Vec::new(), ..request(lab, "tools", "") };
    service.attempt = action.attempt;
    service.neighbourhood = Some(neighbourhood);
    service.env.insert("PWD_OF".to_owned(), "a service".to_owned());
    let words = ["perl", "-MIO::Socket::INET", "-e"].map(str::to_owned).to_vec();
    service.container.as_mut().unwrap().entrypoint = Entrypoint::Words(words);
    let role = ServiceRole { name: "db".to_owned(), command: Some(vec![serve.to_owned()]) };
    action.services = vec![Service {
        name: role.name.clone(),
        container: service.container.clone().unwrap(),
        command: role.command.clone(),
        env: service.env.clone(),
        ready: None,
    }];
    service.service = Some(role);
    let standby = lab.executor.prepare(action).await.unwrap();
    let mut serving = lab.executor.prepare(service).await.unwrap().begin();
    let mut served = until_output(&mut serving, "in a service\n").await;
    // It outlives its services.
    let mut asking = standby.begin();
    until_output(&mut asking, "served\n").await;
    serving.handle().cancel(PATIENCE);
    while let Some(event) = serving.next().await {
        served.take(event);
    }
    assert_eq!(served.text(), "in a service\nstops\n");
    asking.handle().kill();
    while asking.next().await.is_some() {}
}

pub async fn an_entrypoint_is_run_when_asked_for(lab: &Lab) {
    let tools = lab.images.layers(crate::images::TestImages::TOOLS);
    let mut own = image(tools);
    own.config.entrypoint = vec!["env".into(), "FROM=image".into()];
    lab.images.put("entrypoint", own);
    let words = ["env", "FROM=manifest"].map(str::to_owned).to_vec();
    for (entrypoint, expected) in [
        (Entrypoint::Default, "none"),
        (Entrypoint::Image, "image"),
        (Entrypoint::Words(words), "manifest"),
        (Entrypoint::Words(Vec::new()), "none"),
    ] {
        let mut request = request(lab, "entrypoint", "echo ${FROM:-none}");
        request.container.as_mut().unwrap().entrypoint = entrypoint;
        assert_eq!(lab.run(request).await.text(), format!("{expected}\n"));
    }
}
