//! Kills controllers of one database, one by one and all services at random.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sealci_tests::{Installation, Part, Periods, Postgres, Repository, action};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::oracle::{Oracle, WAIT};
use crate::row::{Row, seconds, within};

fn a_replica_dies(periods: Periods, lease_ms: &str) {
    let row = Row::begin(
        "controller replica dies",
        periods,
        "kill -9 of one of two over PostgreSQL, with an action running and one that waits for it",
        "its pipelines go on at the other within 15 s",
    );
    let postgres = match Postgres::start() {
        Ok(postgres) => postgres,
        Err(why) => return row.skip("postgres", &why),
    };
    let mut installation = row.installation();
    let url = postgres.url();
    let more = ["--database", &url, "--lease-ms", lease_ms];
    installation.arguments.insert(Part::Controller, more.map(str::to_owned).to_vec());
    installation.start_all();
    let other = installation.start_controller_beside("other", &more);
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", &format!("seq 1 20000; {WAIT}; seq 20001 40000"));
    oracle.add_with("zafter", "echo after", "    needs: [long]\n");
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    installation.kill(Part::Controller);
    let died = Instant::now();
    oracle.open();
    let (pipeline, _) = within("the pipeline to go on", Duration::from_secs(60), || {
        oracle.open();
        let pipeline = installation.json_of(&other, &["show", &number]);
        (pipeline["state"] == "finished").then_some(pipeline)
    });
    let went_on = died.elapsed();
    assert!(went_on < Duration::from_secs(15), "finished only after {went_on:?}");
    assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
    // Read at the one that comes back, which owns nothing of it.
    installation.start_part(Part::Controller);
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(oracle.judge(&installation, &number, &pipeline), 2, "each ran once: {pipeline}");
    row.passed(&format!("both actions done {} after its death, each at its first attempt", seconds(went_on)));
}

#[test]
fn a_controller_replica_dies() {
    a_replica_dies(Periods::Tenth, "1000");
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_controller_replica_dies_as_shipped() {
    a_replica_dies(Periods::AsShipped, "10000");
}

const PIPELINES: usize = 20;
const ACTIONS: usize = 500;

/// What each action does, in a folder outside: it notes its begin, prints what depends on its name and attempt, and notes its end.
const SCRIPT: &str = "cd \"${0%/*}\"; n=${SEALCI_ATTEMPT##*.}\necho $n >>\"$1.begun\"\necho \"$1 $n\"\nseq 1 \"$2\"\necho $n >>\"$1.ended\"\n";

/// The REST API: a process for each of so many logs would take longer than all else.
struct Api {
    runtime: tokio::runtime::Runtime,
    client: reqwest::Client,
    url: String,
    token: String,
}

impl Api {
    fn of(installation: &Installation) -> Self {
        Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            client: reqwest::Client::new(),
            url: installation.url(Part::Controller).to_owned(),
            token: fs::read_to_string(installation.data().join("admin.token")).unwrap().trim().to_owned(),
        }
    }

    fn log(&self, action: &str, attempt: u64) -> Vec<u8> {
        let url = format!("{}/api/v1/actions/{action}/attempts/{attempt}/log", self.url);
        self.runtime.block_on(async {
            let answer = self.client.get(url).bearer_auth(&self.token).send().await.unwrap();
            answer.error_for_status().unwrap().bytes().await.unwrap().to_vec()
        })
    }
}

struct Storm {
    folder: PathBuf,
    /// By number: which pipeline it is of those made here.
    numbers: BTreeMap<String, usize>,
}

fn name_of(pipeline: usize, action: usize) -> String {
    format!("p{pipeline}a{action}")
}

/// How many lines an action prints: the same each time.
fn lines_of(pipeline: usize, action: usize) -> usize {
    (pipeline * 7919 + action * 104_729) % 400
}

fn noted(folder: &Path, name: &str, what: &str) -> Vec<u64> {
    let text = fs::read_to_string(folder.join(format!("{name}.{what}"))).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

impl Storm {
    fn submit(installation: &Installation) -> Self {
        let folder = installation.scratch("storm");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("act.sh"), SCRIPT).unwrap();
        let numbers = (0..PIPELINES)
            .map(|pipeline| {
                let mut manifest = format!("name: storm {pipeline}\nactions:\n");
                for action in 0..ACTIONS {
                    let (name, lines) = (name_of(pipeline, action), lines_of(pipeline, action));
                    manifest += &format!(
                        "  {name}:\n    needs: []\n    configuration: {{executor: process, resources: {{cpu: 0.1, memory: 16MiB}}}}\n    \
                         commands: [\"exec sh {}/act.sh {name} {lines}\"]\n",
                        folder.display()
                    );
                }
                let place = installation.scratch(&format!("repository-{pipeline}"));
                (installation.submit(&Repository::with_manifest(place, &manifest)), pipeline)
            })
            .collect();
        Self { folder, numbers }
    }

    /// I2 and I3 for every action: how many attempts there were, and how many actions were given up.
    fn judge(&self, installation: &Installation) -> (usize, usize) {
        let (mut attempts, mut given_up) = (0, 0);
        let api = Api::of(installation);
        for (number, pipeline) in &self.numbers {
            let shown = installation.json(&["show", number]);
            for index in 0..ACTIONS {
                let name = name_of(*pipeline, index);
                let one = action(&shown, &name);
                let all = one["attempts"].as_array().unwrap();
                attempts += all.len();
                let (begun, ended) =
                    (noted(&self.folder, &name, "begun"), noted(&self.folder, &name, "ended"));
                if one["outcome"]["kind"] == "errored" {
                    assert!(all.len() == 3, "given up before three attempts died: {one}");
                    given_up += 1;
                    continue;
                }
                assert_eq!(one["outcome"]["kind"], "succeeded", "{one}");
                let counts = |one: &&Value| one["fenced"] != true && one["outcome"]["kind"] == "succeeded";
                let finals: Vec<&Value> = all.iter().filter(counts).collect();
                assert_eq!(finals.len(), 1, "exactly one result: {one}");
                let result_of = finals[0]["number"].as_u64().unwrap();
                for noted in [&begun, &ended] {
                    assert_eq!(
                        noted.iter().filter(|number| **number == result_of).count(),
                        1,
                        "{name}: {noted:?}"
                    );
                }
                let mut text = format!("{name} {result_of}\n");
                (1..=lines_of(*pipeline, index)).for_each(|line| text += &format!("{line}\n"));
                let stored = api.log(one["id"].as_str().unwrap(), result_of);
                assert_eq!(Sha256::digest(stored), Sha256::digest(&text), "the log of {name}");
            }
        }
        (attempts, given_up)
    }
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn everything_is_killed_at_random_for_five_minutes() {
    let row = Row::begin(
        "any service, at random",
        Periods::AsShipped,
        "PostgreSQL, two controllers, a scheduler and two agents; kill -9 of one of them every 2 s for 5 minutes, while 10,000 actions run",
        "10,000 results, every log's hash right, given up only after three attempts died, no operator",
    );
    let seed = std::env::var("SEALCI_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random::<u64>);
    eprintln!("SEALCI_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let postgres = match Postgres::start() {
        Ok(postgres) => postgres,
        Err(why) => return row.skip("postgres", &why),
    };
    let mut installation = row.installation();
    let url = postgres.url();
    installation.arguments.insert(Part::Controller, vec!["--database".to_owned(), url.clone()]);
    installation.start_all();
    installation.start_beside("second", &[]);
    installation.start_controller_beside("other", &["--database", &url]);
    let storm = Storm::submit(&installation);
    let begun = Instant::now();
    let (mut kills, mut next) = (0, Instant::now());
    while begun.elapsed() < Duration::from_secs(300) {
        next += Duration::from_secs(2);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        kills += 1;
        match random.random_range(0..5) {
            0 => installation.restart(Part::Controller),
            1 => installation.restart(Part::Scheduler),
            2 => installation.restart(Part::Agent),
            3 => {
                installation.kill_beside("second");
                installation.start_beside("second", &[]);
            }
            _ => {
                installation.kill_beside("other");
                installation.start_controller_beside("other", &["--database", &url]);
            }
        }
    }
    let (_, after) = within("all to be finished", Duration::from_secs(1200), || {
        let is_over = |number: &String| installation.json(&["show", number])["state"] == "finished";
        storm.numbers.keys().all(is_over).then_some(())
    });
    let (attempts, given_up) = storm.judge(&installation);
    row.passed(&format!(
        "{} results from {attempts} attempts, {given_up} given up after three; {kills} kills; finished {} after the last (seed {seed})",
        PIPELINES * ACTIONS,
        seconds(after)
    ));
}
