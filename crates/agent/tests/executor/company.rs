//! Whom actions in machines run as, and what is beside them there.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use sealci_agent::executor::cgroup::{Cgroups, Layout};
use sealci_agent::executor::door::{ExecEnd, ExecRequest};
use sealci_agent::executor::{Execution, ExecutionRequest, Neighbourhood, ServiceRole};
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, Entrypoint, Network, Service};

use crate::doors::{archive_of, take, until_over};
use crate::ending::mentioned_in_any_mounts;
use crate::images::TestImages;
use crate::lab::{Lab, PATIENCE, Record, cgroup_folders, eventually, until_output};
use crate::machines::monitors;
use crate::network::links_of_sandboxes;

/// What a user may, and what it can do all the same.
const LOOK_AROUND: &str = "grep -E '^(CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs)' /proc/self/status | tr -d '\\t'; \
    cat /proc/self/oom_score_adj; \
    for try in 'cat /proc/1/environ' 'cat /dev/vda' 'touch /etc/mine' 'mount -t tmpfs none /mnt' 'chown 0 /workspace'; do \
    if $try >/dev/null 2>&1; then echo it can $try; fi; done";

pub async fn machines_have_users(lab: &Lab) {
    let mut request = ExecutionRequest {
        stays: true,
        ..lab.request([
            "echo $(id -u) $(id -g) $(id -G) $HOME",
            "cat given sub/given put/file; echo mine >given; rm sub/given; touch made; chmod 600 made",
            "test -O /workspace -a -O made -a -O put/file; touch /tmp/mine",
            LOOK_AROUND,
        ])
    };
    request.container.as_mut().unwrap().user = Some("build".to_owned());
    std::fs::write(request.workspace.join("given"), "given\n").unwrap();
    std::fs::create_dir(request.workspace.join("sub")).unwrap();
    std::fs::write(request.workspace.join("sub/given"), "below\n").unwrap();
    let standby = lab.executor.prepare(request).await.unwrap();
    let door = standby.door();
    door.put("put", &archive_of(&[("file", "put in\n", 0o600)])[..]).await.unwrap();
    let mut execution = standby.begin();
    let mut record = until_over(&mut execution).await;
    assert_eq!(record.over, Some(Outcome::Succeeded), "{}", record.text());
    assert_eq!(record.output_of(0), "1000 100 100 44 /home/build\n");
    assert_eq!(record.output_of(1), "given\nbelow\nput in\n");
    let none = "0000000000000000";
    let expected = format!(
        "CapInh:{none}\nCapPrm:{none}\nCapEff:{none}\nCapBnd:{none}\nCapAmb:{none}\nNoNewPrivs:1\n0\n"
    );
    assert_eq!(record.output_of(3), expected);
    // What comes out is packed as that user, who may read it, too.
    let (_, taken) = take(&door, &["made", "given", "put"], "").await.unwrap();
    assert!(taken.files >= 3 && taken.unreadable == 0 && taken.missing.is_empty(), "{taken:?}");
    execution.leave();
    finish(&mut execution, &mut record).await;

    let mut request = lab.request(["echo never"]);
    request.container.as_mut().unwrap().user = Some("none".to_owned());
    let record = lab.run(request).await;
    let Outcome::Errored { cause, message } = record.outcome() else { panic!("{:?}", record.outcome()) };
    assert!(message.contains("no user `none` in its /etc/passwd"), "{message}");
    // No other attempt would find that user.
    assert_eq!(*cause, Cause::Image, "{message}");
}

async fn finish(execution: &mut Execution, record: &mut Record) {
    while let Some(event) = tokio::time::timeout(PATIENCE, execution.next()).await.expect("it ends in time") {
        record.take(event);
    }
}

/// One that runs a line of the image's shell.
fn service(name: &str, line: &str, user: Option<&str>) -> Service {
    let mut container = Container::of(TestImages::TOOLS);
    container.entrypoint = Entrypoint::Words(["sh", "-c", line].map(str::to_owned).to_vec());
    container.user = user.map(str::to_owned);
    Service { name: name.to_owned(), container, command: None, env: Default::default(), ready: None }
}

/// As the agent makes it of what its action was prepared with.
fn request_of(lab: &Lab, action: &ExecutionRequest, service: &Service) -> ExecutionRequest {
    ExecutionRequest {
        attempt: action.attempt,
        neighbourhood: action.neighbourhood.clone(),
        container: Some(service.container.clone()),
        service: Some(ServiceRole { name: service.name.clone(), command: service.command.clone() }),
        names: action.names.clone(),
        commands: Vec::new(),
        ..lab.request([""])
    }
}

pub async fn a_machine_has_room_for_services(lab: &Lab) {
    let linger = "trap 'echo stops; exit 3' TERM; touch /tmp/of-this-one; echo up as $(id -un); while :; do sleep 0.1; done";
    let services = [
        service("db", linger, Some("build")),
        service("short", "echo was here; exit 7", None),
        service("nobody", "echo never", Some("none")),
    ];
    let mut action = ExecutionRequest {
        stays: true,
        neighbourhood: Some(Neighbourhood::default()),
        services: services.to_vec(),
        names: services.iter().map(|service| service.name.clone()).collect(),
        ..lab.request([
            "grep -o 'localhost db.*' /etc/hosts; touch /tmp/of-the-action; ls /tmp | grep of-",
            "ps -e -o comm= | grep -c ^init",
        ])
    };
    let standby = lab.executor.prepare(action.clone()).await.unwrap();
    let [db, short, nobody] = services.each_ref().map(|service| request_of(lab, &action, service));
    let mut db = lab.executor.prepare(db).await.unwrap().begin();
    let mut lingering = until_output(&mut db, "\n").await;
    let short = Record::of(&mut lab.executor.prepare(short).await.unwrap().begin()).await;
    assert_eq!(short.text(), "was here\n");
    assert_eq!(short.outcome(), &Outcome::Failed { exit_code: 7, limit: None });
    let nobody = Record::of(&mut lab.executor.prepare(nobody).await.unwrap().begin()).await;
    assert!(
        matches!(nobody.outcome(), Outcome::Errored { cause: Cause::Image, .. }),
        "{:?}",
        nobody.outcome()
    );
    let door = db.door();
    let look =
        "grep -o 'localhost db.*' /etc/hosts; ls /tmp | grep of-; ps -e -o comm= | grep -c ^init; id -un";
    let seen = door.exec(ExecRequest::line(look, PATIENCE)).await.unwrap();
    assert_eq!(seen.end, ExecEnd::Exited { exit_code: 0 });
    let names = "localhost db short nobody sealci";
    assert_eq!(String::from_utf8(seen.output).unwrap(), format!("{names}\nof-this-one\n1\nbuild\n"));

    let mut execution = standby.begin();
    let mut record = until_over(&mut execution).await;
    assert_eq!(record.over, Some(Outcome::Succeeded), "{}", record.text());
    assert_eq!(record.text(), format!("{names}\nof-the-action\n1\n"));
    // The end of the commands is not that of what is beside them.
    db.handle().cancel(PATIENCE);
    finish(&mut db, &mut lingering).await;
    assert_eq!(lingering.text(), "up as build\nstops\n");
    execution.leave();
    finish(&mut execution, &mut record).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded);
    assert_eq!(monitors(lab), Vec::<String>::new());

    action.services = vec![service("db", linger, None); 14];
    let error = lab.executor.prepare(action).await.unwrap_err();
    assert!(error.message().contains("room for 13 services"), "{}", error.message());
}

/// What is beside an action ends with its machine.
pub async fn services_end_with_their_machine(lab: &Lab) {
    let beside = service("db", "echo up; while :; do sleep 1000; done", None);
    let action = ExecutionRequest {
        neighbourhood: Some(Neighbourhood::default()),
        services: vec![beside.clone()],
        ..lab.request(["echo on; sleep 1000"])
    };
    let standby = lab.executor.prepare(action.clone()).await.unwrap();
    let mut serving = lab.executor.prepare(request_of(lab, &action, &beside)).await.unwrap().begin();
    let mut served = until_output(&mut serving, "up\n").await;
    drop(standby);
    finish(&mut serving, &mut served).await;
    assert!(matches!(served.outcome(), Outcome::Errored { .. }), "{:?}", served.outcome());
    assert_eq!(monitors(lab), Vec::<String>::new());
    // Each is expected once.
    let late = lab.executor.prepare(request_of(lab, &action, &beside)).await.unwrap_err();
    assert!(late.message().contains("without room"), "{}", late.message());
}

/// An agent that is killed takes its machines along, with what is beside their actions, and their way outwards.
pub async fn no_machine_outlives_a_killed_agent(lab: &Lab) {
    const VICTIM: &str = "SEALCI_TEST_VICTIM";
    if std::env::var_os(VICTIM).is_some() {
        return be_killed(lab).await;
    }
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(VICTIM, "")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(victim.stderr.take().unwrap()));
    let told = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("VICTIM=").map(str::to_owned));
    let told = told.expect("the victim says where it is");
    let (instance, folder) = told.split_once(' ').unwrap();
    assert!(!processes_about(folder).is_empty() && !links_of_sandboxes().is_empty());
    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("its monitor ends with the agent", || processes_about(folder).is_empty());
    eventually("its link goes with it", || links_of_sandboxes().is_empty());
    eventually("all mounts go with it", || !mentioned_in_any_mounts(folder));
    let next = Cgroups::open(Layout::detect().unwrap(), instance).unwrap();
    next.sweep().unwrap();
    drop(next);
    assert_eq!(cgroup_folders(instance), Vec::<PathBuf>::new());
    std::fs::remove_dir_all(folder).unwrap();
}

/// Starts an action with a network and a service, says where, and waits.
async fn be_killed(lab: &Lab) {
    let beside = service("db", "trap '' TERM HUP; echo up; while :; do sleep 1000; done", None);
    let action = ExecutionRequest {
        network: Network::On,
        neighbourhood: Some(Neighbourhood::default()),
        services: vec![beside.clone()],
        ..lab.request(["trap '' TERM HUP; echo up; while :; do sleep 1000; done"])
    };
    let standby = lab.executor.prepare(action.clone()).await.unwrap();
    let mut serving = lab.executor.prepare(request_of(lab, &action, &beside)).await.unwrap().begin();
    until_output(&mut serving, "up\n").await;
    let mut execution = standby.begin();
    until_output(&mut execution, "up\n").await;
    eprintln!("VICTIM={} {}", lab.instance, lab.folder.path().display());
    while execution.next().await.is_some() {}
}

/// The command lines of all processes that name the folder.
fn processes_about(folder: &str) -> Vec<String> {
    let words = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(words);
    let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    lines.filter(|line| line.contains(folder)).collect()
}
