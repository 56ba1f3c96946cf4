//! Takes the database away, floods the controller, turns the clock, and lets servers hang.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use sealci_tests::{Installation, Part, Periods, Postgres, Repository, action, attempts, both};
use serde_json::{Value, json};

use crate::oracle::{Oracle, WAIT};
use crate::row::{Row, seconds, within};

const FINE: &str = "name: fine\nactions:\n  fine:\n    configuration: {executor: fake, resources: {cpu: 0.1, memory: 1MiB}}\n    \
                    commands: ['print fine']\n";

#[test]
fn postgres_is_restarted() {
    let row = Row::begin(
        "PostgreSQL restarts",
        Periods::Usual,
        "pg_ctl -m immediate stop, start 2 s later, with actions running and pipelines asked for",
        "I2, I3, I4; going again 5 s after it is back",
    );
    let postgres = match Postgres::start() {
        Ok(postgres) => postgres,
        Err(why) => return row.skip("postgres", &why),
    };
    let mut installation = row.installation();
    installation.arguments.insert(Part::Controller, vec!["--database".to_owned(), postgres.url()]);
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    for number in 0..4 {
        let chatter = "i=0; while ! test -e $O/open; do i=$((i+1)); echo line $i; sleep 0.01; done";
        oracle.add(&format!("a{number}"), chatter);
    }
    let number = oracle.submit(&installation);
    oracle.wait_all_begun();
    postgres.stop_immediately();
    let stopped = Instant::now();
    // Whoever asks meanwhile may have to wait for an answer, and asks again with the same id.
    let repository = Repository::with_manifest(installation.scratch("fine"), FINE);
    let answered = std::thread::scope(|scope| {
        let first = scope.spawn(|| submit_body(&installation, &repository.url(), FINE, "once").2);
        std::thread::sleep(Duration::from_secs(2).saturating_sub(stopped.elapsed()));
        postgres.begin().unwrap();
        first.join().unwrap()
    });
    let back = Instant::now();
    let (new, _) = within("the controller to take work", Duration::from_secs(5), || {
        let (status, body, _) = submit_body(&installation, &repository.url(), FINE, "once");
        (200..300).contains(&status).then(|| body["number"].to_string())
    });
    assert_eq!(installation.finished(&new)["outcome"], "succeeded");
    let going = back.elapsed();
    assert!(going < Duration::from_secs(5), "going only after {going:?}");
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(oracle.judge(&installation, &number, &pipeline), 4, "nothing is tried again: {pipeline}");
    let all = installation.json(&["list"]);
    assert_eq!(all["pipelines"].as_array().unwrap().len(), 2, "I4: one event, one pipeline");
    row.passed(&format!(
        "a new action done {} after it is back; 4 of 4 at their first attempt; who asked meanwhile was answered after {}",
        seconds(going),
        seconds(answered)
    ));
}

/// Sends one request over a connection of its own: status, body and how long it took.
fn post(address: &str, token: &str, body: &str) -> (u16, Value, Duration) {
    let begun = Instant::now();
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!(
        "POST /api/v1/pipelines HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("an HTTP response");
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body).unwrap_or_default();
    (status, serde_json::from_str(body).unwrap_or(Value::Null), begun.elapsed())
}

#[test]
fn two_hundred_deliver_at_once() {
    const EVENTS: usize = 20;
    const TIMES: usize = 10;
    let row = Row::begin(
        "SQLite busy",
        Periods::Usual,
        "200 parallel deliveries: 20 events, ten times each",
        "I4: 20 pipelines; no 5xx",
    );
    let mut installation = row.installation();
    installation.start_all();
    let repository = Repository::with_manifest(installation.scratch("repository"), FINE);
    let revision = repository.git(&["rev-parse", "HEAD"]);
    let token = fs::read_to_string(installation.data().join("admin.token")).unwrap();
    let address =
        installation.url(Part::Controller).trim_start_matches("http://").trim_end_matches('/').to_owned();
    let bodies: Vec<String> = (0..EVENTS)
        .map(|number| {
            json!({
                "repo_url": repository.url(), "ref": "refs/heads/main", "revision": revision, "event": "manual",
                "request_id": format!("event-{number}"), "body": FINE,
            })
            .to_string()
        })
        .collect();
    let begun = Instant::now();
    let answers: Vec<(u16, Value, Duration)> = std::thread::scope(|scope| {
        let (address, token, bodies) = (&address, token.trim(), &bodies);
        let askers: Vec<_> = (0..EVENTS * TIMES)
            .map(|number| scope.spawn(move || post(address, token, &bodies[number % EVENTS])))
            .collect();
        askers.into_iter().map(|asker| asker.join().unwrap()).collect()
    });
    let took = begun.elapsed();
    let bad: Vec<_> = answers.iter().filter(|(status, ..)| !(200..300).contains(status)).collect();
    assert!(bad.is_empty(), "{bad:?}");
    let numbers: BTreeSet<String> = answers.iter().map(|(_, body, _)| body["number"].to_string()).collect();
    assert_eq!(numbers.len(), EVENTS, "one event, one pipeline");
    assert_eq!(installation.pipelines_of(&revision).len(), EVENTS);
    for number in &numbers {
        assert_eq!(installation.finished(number)["outcome"], "succeeded");
    }
    let slowest = answers.iter().map(|(_, _, time)| *time).max().unwrap();
    row.passed(&format!(
        "20 pipelines, no refusal; slowest answer {} ms of {} in all",
        slowest.as_millis(),
        seconds(took)
    ));
}

/// Builds the library that shifts a program's wall clock; none where there is no compiler.
fn clock_shift(folder: &Path) -> Option<String> {
    let library = folder.join("clock.so");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/faults/clock.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).status();
    built.is_ok_and(|status| status.success()).then(|| library.display().to_string())
}

#[test]
fn the_wall_clock_jumps() {
    let row = Row::begin(
        "wall clock jumps by an hour",
        Periods::Tenth,
        "a preloaded clock of all services goes an hour ahead, later two hours back",
        "no lease lost, no order changed",
    );
    let mut installation = row.installation();
    fs::create_dir_all(installation.scratch("clock")).unwrap();
    let Some(library) = clock_shift(&installation.scratch("clock")) else {
        return row.skip("cc", "there is no C compiler");
    };
    let shift = installation.scratch("clock").join("shift");
    fs::write(&shift, "0").unwrap();
    installation.environment.insert("LD_PRELOAD".to_owned(), library);
    installation.environment.insert("CLOCK_SHIFT".to_owned(), shift.display().to_string());
    installation.start_all();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", &format!("seq 1 1000; {WAIT}; seq 1 1000"));
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    let mut numbers = vec![number.clone()];
    let mut days = BTreeSet::new();
    for (round, seconds) in ["3600", "-3600"].into_iter().enumerate() {
        fs::write(&shift, seconds).unwrap();
        // Longer than silence may be.
        let jumped = Instant::now();
        within("silence to be judged", row.period(90), || (jumped.elapsed() > row.period(70)).then_some(()));
        let new = installation.submit_manifest(&format!("fine-{round}"), FINE);
        let pipeline = installation.finished(&new);
        assert_eq!(pipeline["outcome"], "succeeded");
        days.insert(pipeline["created_at"].as_str().unwrap_or_default().to_owned());
        numbers.push(new);
    }
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(oracle.judge(&installation, &number, &pipeline), 1, "{pipeline}");
    let listed = installation.json(&["list"]);
    let listed: Vec<String> =
        listed["pipelines"].as_array().unwrap().iter().rev().map(|one| one["number"].to_string()).collect();
    assert_eq!(listed, numbers, "the order is the database's");
    assert_eq!(days.len(), 2, "the services saw the clock jump: {days:?}");
    row.passed("one attempt of one; 3 pipelines in their order");
}

/// A server that takes connections and says nothing.
fn silent_server() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

/// Makes a pipeline of a given manifest for a repository that cannot be read.
pub fn submit_body(installation: &Installation, url: &str, body: &str, id: &str) -> (u16, Value, Duration) {
    let token = fs::read_to_string(installation.data().join("admin.token")).unwrap();
    let address =
        installation.url(Part::Controller).trim_start_matches("http://").trim_end_matches('/').to_owned();
    let mut wanted = json!({
        "repo_url": url, "ref": "refs/heads/main", "revision": "0123456789012345678901234567890123456789",
        "event": "manual", "request_id": id,
    });
    if !body.is_empty() {
        wanted["body"] = body.into();
    }
    post(&address, token.trim(), &wanted.to_string())
}

#[test]
fn servers_hang_and_others_go_on() {
    let row = Row::begin(
        "a forge or registry that hangs: others",
        Periods::Usual,
        "a git server and a registry that take connections and say nothing",
        "other repositories unaffected; what hangs can be cancelled",
    );
    let mut installation = row.installation();
    installation.start_all();
    let (_git, git) = silent_server();
    let (_registry, registry) = silent_server();
    let hang = "name: hang\nactions:\n  one:\n    configuration: {executor: process, resources: {cpu: 0.1, memory: 16MiB}}\n    commands: [echo never]\n";
    let (status, first, _) = submit_body(&installation, &format!("{git}/x.git"), hang, "first");
    assert!((200..300).contains(&status), "{first}");
    let image = format!(
        "name: pull\nactions:\n  one:\n    configuration: {{container: \"{}/x:1\", executor: container, resources: {{cpu: 0.1, memory: 16MiB}}}}\n    commands: [echo never]\n",
        registry.trim_start_matches("http://")
    );
    let second = installation.submit_manifest("pull", &image);
    let begun = Instant::now();
    let mut slowest = Duration::ZERO;
    for number in 0..5 {
        let asked = Instant::now();
        let fine = installation.submit_manifest(&format!("fine-{number}"), FINE);
        assert_eq!(installation.finished(&fine)["outcome"], "succeeded");
        slowest = slowest.max(asked.elapsed());
    }
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    let first = first["number"].to_string();
    assert_ne!(installation.json(&["show", &first])["state"], "finished", "it hangs");
    for number in [&first, &second] {
        let cancelled = installation.sealci(&["cancel", number]);
        assert!(cancelled.status.success(), "{}", both(&cancelled));
        assert_eq!(installation.finished(number)["outcome"], "cancelled");
    }
    row.passed(&format!(
        "5 others, the slowest in {}; both hanging ones cancelled after {}",
        seconds(slowest),
        seconds(begun.elapsed())
    ));
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_server_that_hangs_is_given_up() {
    let row = Row::begin(
        "a forge or registry that hangs",
        Periods::AsShipped,
        "a git server that takes connections and says nothing: a manifest read from it, and a checkout",
        "bounded by its timeout: refused, or errored with the reason",
    );
    let mut installation = row.installation();
    installation.start_all();
    let (_git, git) = silent_server();
    // The manifest is to be read from it.
    let (status, body, refused) = submit_body(&installation, &format!("{git}/x.git"), "", "manifest");
    assert!((400..600).contains(&status), "{status} {body}");
    let hang = "name: hang\nactions:\n  one:\n    timeout: 45s\n    configuration: {executor: process}\n    commands: [echo never]\n";
    let (status, first, _) = submit_body(&installation, &format!("{git}/y.git"), hang, "checkout");
    assert!((200..300).contains(&status), "{first}");
    let number = first["number"].to_string();
    let begun = Instant::now();
    let pipeline = loop {
        let pipeline = installation.json(&["show", &number]);
        if pipeline["state"] == "finished" {
            break pipeline;
        }
        assert!(begun.elapsed() < Duration::from_secs(2000), "{pipeline}");
        std::thread::sleep(Duration::from_millis(200));
    };
    let one = action(&pipeline, "one");
    let reason = one["outcome"].to_string();
    row.passed(&format!(
        "manifest: {status_text} after {}; checkout: {reason}, {} attempts in {}",
        seconds(refused),
        attempts(one).len(),
        seconds(begun.elapsed()),
        status_text = body["title"].as_str().unwrap_or("refused"),
    ));
}
