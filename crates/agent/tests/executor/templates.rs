//! Machines that go on from one that was saved, instead of booting.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sealci_agent::executor::ExecutionRequest;
use sealci_core::outcome::Outcome;
use sealci_core::plan::{Network, Resources};

use crate::lab::{Lab, Record, eventually, roots_of, until_output};
use crate::machines::monitors;
use crate::network::the_outside_is_reached_and_nothing_else;

const ACTIONS: usize = 200;
const AT_A_TIME: usize = 20;
/// What an action of these writes at most.
const MOST_BYTES: usize = 20_000;

fn small<C: Into<String>>(lab: &Lab, commands: impl IntoIterator<Item = C>) -> ExecutionRequest {
    let mut request = lab.request(commands);
    request.resources = Resources { cpu_millis: 1000, memory_bytes: 128 << 20 };
    request
}

fn templates(lab: &Lab) -> Vec<PathBuf> {
    let entries = fs::read_dir(roots_of(lab.folder.path())).unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "template")).collect()
}

/// Runs the request to its end; whether its machine went on from another is the second.
async fn run(lab: &Lab, request: ExecutionRequest) -> (Record, bool) {
    let standby = lab.executor.prepare(request).await.unwrap();
    let restored = monitors(lab).iter().any(|line| line.contains("--restore"));
    let record = Record::of(&mut standby.begin()).await;
    assert_eq!(record.remains, None);
    (record, restored)
}

pub async fn the_second_of_a_kind_goes_on_from_another(lab: &Lab) {
    let commands = [
        "date +%s; head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/boot_id",
        "test ! -e /written && touch /written; uname -n; nproc",
    ];
    let (first, restored) = run(lab, small(lab, commands)).await;
    assert!(first.outcome() == &Outcome::Succeeded && !restored, "{}", first.text());
    eventually("a machine was saved", || templates(lab).len() == 1);

    // Two at once.
    let mut executions = Vec::new();
    for _ in 0..2 {
        let mut execution = lab.start(small(lab, ["echo up; sleep 1000"])).await;
        until_output(&mut execution, "up\n").await;
        executions.push(execution);
    }
    let lines = monitors(lab);
    assert!(lines.len() >= 2 && lines.iter().all(|line| line.contains("--restore")), "{lines:?}");
    drop(executions);
    eventually("both are gone", || monitors(lab).is_empty());

    let mut random = BTreeSet::from([first.output_of(0).lines().nth(1).unwrap().to_owned()]);
    for _ in 0..2 {
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let (record, restored) = run(lab, small(lab, commands)).await;
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(record.outcome() == &Outcome::Succeeded && restored, "{}", record.text());
        let text = record.output_of(0);
        let time: u64 = text.lines().next().unwrap().parse().unwrap();
        assert!((before..=after).contains(&time), "{before} {time} {after}");
        assert!(random.insert(text.lines().nth(1).unwrap().to_owned()), "two draw the same: {text}");
        assert_eq!(record.output_of(1), first.output_of(1));
    }

    // Another size is another kind.
    let mut larger = small(lab, commands);
    larger.resources.memory_bytes = 160 << 20;
    let (record, restored) = run(lab, larger).await;
    assert!(record.outcome() == &Outcome::Succeeded && !restored, "{}", record.text());
    eventually("another machine was saved", || templates(lab).len() == 2);
    assert_eq!(monitors(lab), Vec::<String>::new());
}

/// What is done to a snapshot, and how.
type Damage = (&'static str, fn(&Path));

pub async fn no_action_fails_by_a_template(lab: &Lab) {
    let damages: [Damage; 2] = [
        ("there is nothing in its memory", |snapshot| {
            let memory = fs::File::options().write(true).open(snapshot.join("memory")).unwrap();
            memory.set_len(0).unwrap();
            memory.set_len(128 << 20).unwrap();
        }),
        ("a byte of its state is another", |snapshot| {
            let path = snapshot.join("state");
            let mut state = fs::read(&path).unwrap();
            let middle = state.len() / 2;
            state[middle] ^= 1;
            fs::write(path, state).unwrap();
        }),
    ];
    let (record, restored) = run(lab, small(lab, ["echo booted"])).await;
    assert!(record.text() == "booted\n" && !restored);
    for (what, damage) in damages {
        eventually("a machine was saved", || templates(lab).len() == 1);
        damage(&templates(lab)[0].join("snapshot"));
        let (record, restored) = run(lab, small(lab, ["echo all the same; exit 3"])).await;
        assert!(record.text() == "all the same\n" && !restored, "{what}: {record:?}");
        assert!(matches!(record.outcome(), Outcome::Failed { exit_code: 3, limit: None }), "{what}");
    }
    // It was of no use twice, and is not made any more.
    lab.executor.close().await;
    assert_eq!(templates(lab), Vec::<PathBuf>::new());
    assert_eq!(monitors(lab), Vec::<String>::new());
}

pub async fn a_machine_that_goes_on_has_its_network(lab: &Lab) {
    let mut request = lab.request(["true"]);
    request.network = Network::On;
    let (record, restored) = run(lab, request.clone()).await;
    assert!(record.outcome() == &Outcome::Succeeded && !restored, "{}", record.text());
    eventually("a machine with a card was saved", || templates(lab).len() == 1);
    the_outside_is_reached_and_nothing_else(lab).await;
    let mut again = lab.request(["ls /sys/class/net"]);
    again.network = Network::On;
    let (record, restored) = run(lab, again).await;
    assert!(restored && record.text() == "eth0\nlo\n", "{}", record.text());
}

/// What an action is to come to.
struct Expected {
    output: Vec<u8>,
    exit_code: i32,
}

/// Commands that write random bytes, some of them a file's that they are given, and end with a random exit code.
fn draw(lab: &Lab, random: &mut StdRng) -> (ExecutionRequest, Expected) {
    let mut bytes = |most: usize| -> Vec<u8> {
        let length = random.random_range(0..most);
        (0..length).map(|_| random.random()).collect()
    };
    let (said, kept, put) = (bytes(100), bytes(MOST_BYTES), bytes(64));
    let exit_code = if random.random_bool(0.5) { 0 } else { random.random_range(1..=255) };
    let octal = |byte: &u8| if *byte == b'%' { "%%".to_owned() } else { format!("\\{byte:03o}") };
    let octal = |bytes: &[u8]| bytes.iter().map(octal).collect::<String>();
    let mut request = small(
        lab,
        [
            format!("printf '{}'", octal(&said)),
            "cat kept".to_owned(),
            format!("printf '{}' >/written; cat /written; exit {exit_code}", octal(&put)),
        ],
    );
    if random.random_bool(0.25) {
        request.network = Network::On;
    }
    fs::write(request.workspace.join("kept"), &kept).unwrap();
    (request, Expected { output: [said, kept, put].concat(), exit_code })
}

/// What is on this machine beside files that are an action's.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    monitors: Vec<String>,
    groups: Vec<PathBuf>,
    interfaces: BTreeSet<String>,
    network_namespaces: BTreeSet<PathBuf>,
    descriptors: BTreeMap<String, usize>,
    files: BTreeSet<PathBuf>,
}

impl Left {
    fn by(lab: &Lab) -> Self {
        let names = |folder: &Path| -> Vec<PathBuf> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.map(|entry| entry.path()).collect()
        };
        let groups = lab.cgroup_folders.iter().flat_map(|folder| names(folder));
        let namespaces = names(Path::new("/proc")).into_iter();
        let mut descriptors = BTreeMap::new();
        for descriptor in names(Path::new("/proc/self/fd")) {
            // Of a socket or a pipe without its number.
            let leads_to = fs::read_link(descriptor).unwrap_or_default().to_string_lossy().into_owned();
            let kind = leads_to.split(':').next().unwrap_or_default().to_owned();
            *descriptors.entry(kind).or_default() += 1;
        }
        let folders = [lab.folder.path().join("machines"), roots_of(lab.folder.path())];
        Self {
            monitors: monitors(lab),
            groups: groups.filter(|path| path.is_dir()).collect(),
            interfaces: names(Path::new("/sys/class/net"))
                .iter()
                .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
                .collect(),
            network_namespaces: namespaces
                .filter_map(|path| fs::read_link(path.join("ns/net")).ok())
                .collect(),
            descriptors,
            files: folders.iter().flat_map(|folder| names(folder)).collect(),
        }
    }
}

pub async fn two_hundred_actions_leave_nothing(lab: &Lab) {
    let seed = std::env::var("SEALCI_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    eprintln!("SEALCI_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    for (network, count) in [(Network::Off, 1), (Network::On, 2)] {
        let mut request = small(lab, ["true"]);
        request.network = network;
        run(lab, request).await;
        eventually("a machine was saved", || templates(lab).len() == count);
    }
    let before = Left::by(lab);
    let drawn: Vec<_> = (0..ACTIONS).map(|_| draw(lab, &mut random)).collect();
    let begun = Instant::now();
    let runs = drawn.into_iter().enumerate().map(|(index, (request, expected))| async move {
        let (workspace, scratch) = (request.workspace.clone(), request.scratch.clone());
        let begun = Instant::now();
        let standby = lab.executor.prepare(request).await.unwrap();
        let ready = begun.elapsed();
        let record = Record::of(&mut standby.begin()).await;
        let exit_code = match record.outcome() {
            Outcome::Succeeded => 0,
            Outcome::Failed { exit_code, limit: None } => *exit_code,
            other => panic!("action {index}: {other:?}: {}", record.text()),
        };
        assert_eq!(exit_code, expected.exit_code, "of action {index}");
        assert!(record.output == expected.output, "the output of action {index} is another");
        assert_eq!(record.remains, None);
        fs::remove_dir_all(workspace).unwrap();
        fs::remove_dir_all(scratch).unwrap();
        (ready, begun.elapsed())
    });
    let mut ends = futures_util::stream::iter(runs).buffer_unordered(AT_A_TIME);
    let (mut ready, mut whole, mut most) = (Vec::new(), Vec::new(), 0);
    while let Some((is_ready, is_over)) = ends.next().await {
        most = most.max(monitors(lab).len());
        ready.push(is_ready);
        whole.push(is_over);
        if ready.len() % AT_A_TIME == 0 {
            eprintln!("{} actions after {:.1?}", ready.len(), begun.elapsed());
        }
    }
    drop(ends);
    ready.sort_unstable();
    whole.sort_unstable();
    eprintln!(
        "{ACTIONS} actions, {AT_A_TIME} at a time ({most} machines at once): {:.1?}; until the machine called {:.2?} (median), \
         {:.2?} (most); until its end {:.2?}, {:.2?}",
        begun.elapsed(),
        ready[ACTIONS / 2],
        ready[ACTIONS - 1],
        whole[ACTIONS / 2],
        whole[ACTIONS - 1],
    );
    assert_eq!(Left::by(lab), before);
    assert_eq!((&before.monitors, &before.groups), (&Vec::new(), &Vec::new()));
}
