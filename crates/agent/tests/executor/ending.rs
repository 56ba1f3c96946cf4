//! How executions end, and that nothing of them is left.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sealci_agent::executor::cgroup::{Cgroups, Layout};
use sealci_agent::executor::{Execution, ExecutionEvent, ExecutionRequest};
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Outcome;
use sealci_core::plan::Network;

use crate::allowed::{allow, gatekeepers_of};
use crate::lab::{Lab, PATIENCE, Record, cgroup_folders, eventually, processes_of, until_output};

/// What daemons do: a session of its own, a parent that is gone, no terminal, no outputs.
const DAEMONS: &str = "\
setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 1000; done' >/dev/null 2>&1 &
(setsid sh -c '(trap \"\" TERM; sleep 1001 & sleep 1002) &' &) >/dev/null 2>&1
(sleep 1003 &)
nohup sleep 1004 >/dev/null 2>&1 &
";

pub async fn what_is_left_behind_is_gone(lab: &Lab) {
    let started_at = Instant::now();
    let record = lab.run_commands([DAEMONS, "sleep 0.1; echo over"]).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.output_of(1), "over\n");
    // `run` has looked for processes already.
    assert!(started_at.elapsed() < Duration::from_secs(20));
    for folder in &lab.cgroup_folders {
        let left: Vec<_> =
            std::fs::read_dir(folder).unwrap().flatten().filter(|e| e.path().is_dir()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

pub async fn cancel_ends_with_grace(lab: &Lab) {
    let request = lab.request([
        "trap 'echo cleaning up; sleep 0.2; echo clean; exit 3' TERM",
        "echo up; sleep 1000 & wait",
        "echo never",
    ]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    // A shell that has forked, but not yet become `sleep`, would take the TERM for its own.
    eventually("it sleeps", || processes_of(attempt).iter().any(|line| line.contains(" sleep 1000")));
    execution.handle().cancel(PATIENCE);
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert_eq!(record.outcome(), &Outcome::Cancelled);
    assert_eq!(record.text(), "up\ncleaning up\nclean\n");
    assert_eq!(record.commands[1].exit_code, Some(3));
    assert_eq!(processes_of(attempt), Vec::<String>::new());

    // Between two commands: the second never starts, the shell's exit is still its own.
    let request =
        lab.request(["trap 'echo bye' EXIT; trap '' TERM; echo up; sleep 0.5; echo done", "echo never"]);
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    execution.handle().cancel(PATIENCE);
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert_eq!(record.outcome(), &Outcome::Cancelled);
    assert!(record.text().ends_with("bye\n") && !record.text().contains("never"), "{}", record.text());
}

/// Takes the rest of a cancelled execution, which is over long before its grace.
async fn ends_soon(execution: &mut Execution, mut record: Record) -> Record {
    let cancelled_at = Instant::now();
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert!(cancelled_at.elapsed() < PATIENCE / 3, "the grace was waited for: {record:?}");
    assert_eq!(record.outcome(), &Outcome::Cancelled);
    record
}

pub async fn what_forks_while_it_is_cancelled_hears_of_it(lab: &Lab) {
    // Each child is forked after some scan has begun.
    let storm = "echo up; i=0; while [ $i -lt 200 ]; do sleep 1000 & i=$((i+1)); done; wait";
    for _ in 0..10 {
        let request = lab.request([storm]);
        let attempt = request.attempt;
        let mut execution = lab.start(request).await;
        let record = until_output(&mut execution, "up\n").await;
        execution.handle().cancel(PATIENCE);
        ends_soon(&mut execution, record).await;
        assert_eq!(processes_of(attempt), Vec::<String>::new());
    }
    // What a handler starts to clean up is not what was cancelled.
    let handler =
        "trap '(sleep 0.2; echo cleaned) & wait; exit 0' TERM; echo up; while :; do sleep 0.001; done";
    let mut execution = lab.start(lab.request([handler])).await;
    let record = until_output(&mut execution, "up\n").await;
    execution.handle().cancel(PATIENCE);
    let record = ends_soon(&mut execution, record).await;
    assert!(record.text().ends_with("cleaned\n"), "{}", record.text());
}

pub async fn a_cancel_between_commands_starts_no_other(lab: &Lab) {
    for trap in ["trap '' TERM", "trap 'echo caught' TERM"] {
        for millis in 0..10 {
            let next = (0..400).map(|_| "sleep 0.001".to_owned());
            let first = format!("{trap}; echo up");
            let mut execution = lab.start(lab.request([first].into_iter().chain(next))).await;
            let mut record = until_output(&mut execution, "up\n").await;
            let later = tokio::time::sleep(Duration::from_millis(millis));
            tokio::pin!(later);
            loop {
                tokio::select! {
                    () = &mut later => break,
                    Some(event) = execution.next() => record.take(event),
                }
            }
            execution.handle().cancel(PATIENCE);
            let record = ends_soon(&mut execution, record).await;
            let text = record.text();
            assert!(!text.contains("open"), "{text}");
            let codes = record.exit_codes();
            assert!(codes.len() < 400, "{text}");
            let (last, before) = codes.split_last().unwrap();
            assert!(before.iter().all(|code| *code == Some(0)), "{codes:?}");
            assert!([Some(0), Some(143)].contains(last), "{codes:?}: {text}");
        }
    }
}

pub async fn ignoring_term_does_not_help(lab: &Lab) {
    let grace = Duration::from_millis(300);
    let request =
        lab.request([format!("trap '' TERM HUP INT\n{DAEMONS}echo up; while :; do sleep 1000; done")]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    let cancelled_at = Instant::now();
    execution.handle().cancel(grace);
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert!(cancelled_at.elapsed() >= grace);
    assert!(cancelled_at.elapsed() < grace + Duration::from_secs(5));
    assert_eq!(record.outcome(), &Outcome::Cancelled);
    assert_eq!(record.commands[0].exit_code, Some(137));
    assert_eq!(processes_of(attempt), Vec::<String>::new());
}

pub async fn kill_ends_at_once(lab: &Lab) {
    let request = lab.request(["trap 'echo no; sleep 1000' TERM; echo up; sleep 1000 & wait"]);
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    let handle = execution.handle();
    handle.cancel(PATIENCE);
    handle.kill();
    let killed_at = Instant::now();
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    handle.kill();
    assert!(killed_at.elapsed() < Duration::from_secs(5));
    assert_eq!(record.outcome(), &Outcome::Cancelled);
}

pub async fn a_timeout_counts_and_ends(lab: &Lab) {
    for command in ["sleep 1000", "trap '' TERM; sleep 1000; while :; do sleep 1000; done"] {
        let mut request = lab.request(["echo up", command]);
        request.timeout = Duration::from_millis(500);
        request.grace = Duration::from_millis(200);
        let started_at = Instant::now();
        let record = lab.run(request).await;
        assert_eq!(record.outcome(), &Outcome::TimedOut, "{command}");
        assert!(started_at.elapsed() >= Duration::from_millis(500), "{command}");
        assert!(started_at.elapsed() < Duration::from_secs(6), "{command}");
        assert_eq!(record.text().lines().next(), Some("up"), "{command}");
    }
}

pub async fn a_dropped_execution_is_killed(lab: &Lab) {
    let request = lab.request([format!("{DAEMONS}echo up; sleep 1000")]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    until_output(&mut execution, "up\n").await;
    assert!(!processes_of(attempt).is_empty());
    drop(execution);
    lab.executor.close().await;
    assert_eq!(processes_of(attempt), Vec::<String>::new());
}

pub async fn a_fork_bomb_ends(lab: &Lab) {
    if !lab.limits {
        // Without control groups it is the host's own limits that hold it.
        return;
    }
    let mut request = lab.request(["bomb() { bomb & bomb; }; echo up; bomb 2>/dev/null"]);
    request.timeout = Duration::from_millis(700);
    request.grace = Duration::from_millis(100);
    let record = lab.run(request).await;
    match record.outcome() {
        Outcome::TimedOut | Outcome::Failed { .. } => {}
        other => panic!("{other:?}"),
    }
}

pub async fn a_reader_that_stops_does_not_stop_the_ending(lab: &Lab) {
    let mut request = lab.request(["yes", "echo never"]);
    request.timeout = Duration::from_millis(300);
    request.grace = Duration::from_millis(100);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    assert_eq!(execution.next().await, Some(ExecutionEvent::Started));
    // Nothing is taken; all the same it ends, and what it had written comes afterwards.
    eventually("it runs", || processes_of(attempt).iter().any(|line| line.contains("yes")));
    eventually("it ends", || processes_of(attempt).is_empty());
    let record = Record::of(&mut execution).await;
    assert_eq!(record.outcome(), &Outcome::TimedOut);
    assert!(record.output.len() > 64 << 10, "{}", record.output.len());
    assert!(record.output.len() < 16 << 20, "{}", record.output.len());
}

pub async fn nothing_outlives_a_killed_agent(lab: &Lab) {
    nothing_outlives(lab, Network::Off).await;
}

/// With a link to the host, whose own end is no process's.
pub async fn no_link_outlives_a_killed_agent(lab: &Lab) {
    nothing_outlives(lab, Network::On).await;
}

/// With a gatekeeper, which is in the host's network.
pub async fn no_gatekeeper_outlives_a_killed_agent(lab: &Lab) {
    nothing_outlives(lab, allow(["good.example"])).await;
}

/// Kills a process that holds an execution, as an agent is killed. That process is this test binary once more.
async fn nothing_outlives(lab: &Lab, network: Network) {
    const TEST: &str = "SEALCI_TEST_VICTIM";
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    if let Ok(command) = std::env::var(TEST) {
        // The victim: starts an action, says which, and waits.
        let request = ExecutionRequest { network, ..lab.request([command]) };
        let attempt = request.attempt;
        let mut execution = lab.start(request).await;
        until_output(&mut execution, "up\n").await;
        eprintln!("VICTIM={attempt}/{}", lab.instance);
        while execution.next().await.is_some() {}
        return;
    }
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .envs(lab.given.iter().cloned())
        .env(TEST, format!("trap '' TERM HUP\n{DAEMONS}echo up; while :; do sleep 1000; done"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = std::io::BufReader::new(victim.stderr.take().unwrap());
    let (attempt, instance) = std::io::BufRead::lines(stderr)
        .map_while(Result::ok)
        .find_map(|line| {
            let (attempt, instance) = line.strip_prefix("VICTIM=")?.split_once('/')?;
            Some((attempt.parse::<AttemptId>().unwrap(), instance.to_owned()))
        })
        .expect("the victim names its attempt");
    assert!(!processes_of(attempt).is_empty());
    let networks = networks_of(attempt);
    let link = (network != Network::Off).then(|| link_of(attempt));
    assert_eq!(gatekeepers_of(attempt).len(), usize::from(matches!(network, Network::Allow(_))));
    assert!(link.as_ref().is_none_or(|link| links().contains(link)), "{link:?} of {:?}", links());
    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("everything ends with the agent", || processes_of(attempt).is_empty());
    eventually("its gatekeeper ends with it", || gatekeepers_of(attempt).is_empty());
    eventually("its network namespaces go with it", || {
        let left = all_networks();
        !networks.iter().any(|one| left.contains(one) || mentioned_in_any_mounts(one))
    });
    eventually("its link goes with it", || link.as_ref().is_none_or(|link| !links().contains(link)));
    eventually("all mounts go with it", || !mentioned_in_any_mounts(&attempt.to_string()));
    if !lab.cgroup_folders.is_empty() {
        // Another agent that starts meanwhile may clear up as well.
        let next = Cgroups::open(Layout::detect().unwrap(), &instance).unwrap();
        next.sweep().unwrap();
        drop(next);
        assert_eq!(cgroup_folders(&instance), Vec::<std::path::PathBuf>::new());
    }
}

/// The network namespaces of an attempt's processes that are not the host's, as `net:[4026531840]`.
fn networks_of(attempt: AttemptId) -> BTreeSet<String> {
    let own = network_of("self");
    let pids = processes_of(attempt).into_iter().filter_map(|line| Some(line.split_once(' ')?.0.to_owned()));
    pids.filter_map(|pid| network_of(&pid)).filter(|network| Some(network) != own.as_ref()).collect()
}

fn network_of(process: &str) -> Option<String> {
    Some(std::fs::read_link(format!("/proc/{process}/ns/net")).ok()?.display().to_string())
}

/// All that some process is in.
fn all_networks() -> BTreeSet<String> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| network_of(&entry.file_name().to_string_lossy())).collect()
}

/// The number of the host's end of an attempt's link.
fn link_of(attempt: AttemptId) -> String {
    let process = processes_of(attempt).into_iter().next().expect("it runs");
    let pid = process.split(' ').next().unwrap().to_owned();
    let shown = Command::new("nsenter").args(["-n", "-t", &pid, "ip", "-o", "link", "show", "eth0"]).output();
    let shown = String::from_utf8(shown.unwrap().stdout).unwrap();
    let peer = shown.split_once("eth0@if").unwrap_or_else(|| panic!("a link to the host: {shown}")).1;
    peer.split(':').next().unwrap().to_owned()
}

/// The numbers of the host's links.
fn links() -> BTreeSet<String> {
    let folders = std::fs::read_dir("/sys/class/net").unwrap().flatten();
    let numbers = folders.filter_map(|entry| std::fs::read_to_string(entry.path().join("ifindex")).ok());
    numbers.map(|number| number.trim().to_owned()).collect()
}

/// Whether a mount of any process bears the text.
pub fn mentioned_in_any_mounts(text: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        std::fs::read_to_string(entry.path().join("mountinfo")).is_ok_and(|mounts| mounts.contains(text))
    })
}
