//! Moves finished logs out of the database, reads them meanwhile, interrupts it at every step, and deletes them: on every
//! database and every kind of object store.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::PathBuf;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sealci_controller::storage::objects::{ObjectsConfig, ObjectsLocation};
use sealci_controller::storage::{Sweep, Swept};
use sealci_proto::agent::{AttemptRef, outcome};
use sealci_service::database::DatabaseUrl;
use support::emitted::{Emitted, Part};
use support::inside::Inside;
use support::keeping::Answer;
use support::proxy::Proxy;
use support::*;
use tokio_util::sync::CancellationToken;

const LONG: Duration = Duration::from_secs(600);
const HOUR_MS: i64 = 60 * 60 * 1000;
const MANIFEST: &str = "name: x\nactions:\n  one:\n    commands: [echo a]\n";

/// An attempt that has written its log, and has not ended.
struct Begun {
    attempt: AttemptRef,
    token: u64,
    length: u64,
}

async fn begin(world: &World, line: &mut Line, emitted: &Emitted) -> Begun {
    let mut body = push(MANIFEST);
    body["revision"] = serde_json::json!(format!("{:040x}", rand::random::<u128>()));
    let (status, made) = world.post("/api/v1/pipelines", body).await;
    assert_eq!(status, 201, "{made}");
    let attempt = line.queued().await;
    let mut agent = line.granted(&attempt).await;
    agent.running().await;
    for (offset, part) in &emitted.0 {
        match part {
            Part::Bytes(bytes) => agent.log(*offset, bytes).await,
            Part::Gap(length) => agent.gap(*offset, offset + length, "spool full").await,
        }
    }
    let (token, length) = (agent.token, emitted.length());
    acknowledged(line, &attempt, 1, length).await;
    Begun { attempt, token, length }
}

/// The log is whole when this returns.
async fn end(line: &mut Line, begun: &Begun) {
    let mut agent = ScriptedAgent { line, attempt: begun.attempt.clone(), token: begun.token, sequence: 1 };
    agent.finished(outcome::Kind::Succeeded(outcome::Succeeded {}), begun.length).await;
    acknowledged(line, &begun.attempt, 2, begun.length).await;
}

async fn acknowledged(line: &mut Line, attempt: &AttemptRef, sequence: u64, offset: u64) {
    use sealci_proto::scheduler::to_agent;
    line.until(|body| match to_agent_body(body)? {
        to_agent::Body::Ack(ack) => (ack.attempt.as_ref() == Some(attempt)
            && ack.next_sequence >= sequence
            && ack.next_offset >= offset)
            .then_some(()),
        _ => None,
    })
    .await;
}

async fn deliver(world: &World, line: &mut Line, emitted: &Emitted) -> AttemptRef {
    let begun = begin(world, line, emitted).await;
    end(line, &begun).await;
    begun.attempt
}

fn path(attempt: &AttemptRef) -> String {
    format!("/api/v1/actions/{}/attempts/{}/log", attempt.action_id, attempt.number)
}

async fn read(world: &World, attempt: &AttemptRef) -> Answer {
    let request = world.http.get(format!("{}{}", world.url, path(attempt)));
    Answer::of(request.bearer_auth(world.token.expose())).await
}

async fn reads_as(world: &World, attempt: &AttemptRef, emitted: &Emitted) {
    let whole = read(world, attempt).await;
    assert_eq!(whole.status, 200, "{}", String::from_utf8_lossy(&whole.bytes));
    assert_eq!(whole.headers["sealci-log-complete"], "true");
    assert!(whole.bytes == emitted.plain(), "{} bytes, not {}", whole.bytes.len(), emitted.plain().len());
}

/// One random range, which must be answered as it must.
async fn range_reads_as(world: &World, attempt: &AttemptRef, emitted: &Emitted, random: &mut StdRng) {
    let from = random.random_range(0..emitted.length());
    let to = (from + random.random_range(1..=emitted.length())).min(emitted.length());
    let request = world.http.get(format!("{}{}", world.url, path(attempt)));
    let request = request.header("range", format!("bytes={from}-{}", to - 1));
    let answer = Answer::of(request.bearer_auth(world.token.expose())).await;
    match emitted.range(from, to) {
        None => assert_eq!(answer.status, 416, "{from}..{to}"),
        Some(bytes) => {
            assert_eq!(answer.status, 206, "{from}..{to}");
            assert!(answer.bytes == bytes, "{from}..{to}: {} bytes, not {}", answer.bytes.len(), bytes.len());
            let says = format!("bytes {from}-{}/{}", from + bytes.len() as u64 - 1, emitted.length());
            assert_eq!(answer.headers["content-range"], says.as_str());
        }
    }
}

/// Follows a log to its end: the bytes and the gaps.
async fn follow(url: String, token: String) -> (Vec<u8>, Vec<(u64, u64)>) {
    use base64::Engine as _;
    let text = reqwest::Client::new().get(format!("{url}/follow")).bearer_auth(token).send().await.unwrap();
    let text = text.text().await.unwrap();
    assert!(text.contains("event: end"), "it broke off");
    let (mut bytes, mut gaps) = (Vec::new(), Vec::new());
    for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
        let event: serde_json::Value = serde_json::from_str(data).unwrap();
        if let Some(data) = event["data"].as_str() {
            bytes.extend(base64::engine::general_purpose::STANDARD.decode(data).unwrap());
        } else if event["reason"].is_string() {
            gaps.push((event["offset"].as_u64().unwrap(), event["to"].as_u64().unwrap()));
        }
    }
    (bytes, gaps)
}

/// The places to test on: each database with a folder, and with a bucket where there is a server.
struct Places {
    folder: tempfile::TempDir,
    server: Option<s3::Server>,
}

impl Places {
    async fn all() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), server: s3::Server::start().await }
    }

    async fn worlds(&self) -> Vec<World> {
        let mut objects = vec![None];
        objects.extend(self.server.as_ref().map(|server| Some(s3::config(&server.url))));
        let mut worlds = Vec::new();
        for (number, objects) in objects.into_iter().enumerate() {
            let folder = self.folder.path().join(number.to_string());
            std::fs::create_dir(&folder).unwrap();
            for database in databases(&folder).await {
                let objects = objects.clone();
                worlds.push(world_with(database, objects).await);
            }
        }
        worlds
    }
}

async fn world_with(database: DatabaseUrl, objects: Option<ObjectsConfig>) -> World {
    let change = |config: &mut sealci_controller::Config| {
        config.storage.objects = objects.unwrap_or_else(|| config.storage.objects.clone());
    };
    World::with(database, LONG, change).await
}

fn seeded() -> StdRng {
    let seed = std::env::var("SEALCI_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(rand::random);
    println!("SEALCI_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

#[tokio::test]
async fn a_log_reads_the_same_before_during_and_after_its_move() {
    let mut random = seeded();
    let places = Places::all().await;
    for world in places.worlds().await {
        let mut line = world.line().await;
        let inside = Inside::of(&world).await;
        let empty = deliver(&world, &mut line, &Emitted::of(Vec::new())).await;
        let mut logs = vec![
            Emitted::of(vec![Part::Bytes(b"\0\xff short".to_vec())]),
            Emitted::of(vec![Part::Gap(7)]),
            Emitted::random(&mut random, 60, 200),
            Emitted::random(&mut random, 20, 300_000),
            Emitted::noise(&mut random, (9 << 20) + 3),
        ];
        let large = [Part::Gap(5), Part::Bytes(vec![b'x'; 1 << 20])];
        logs.push(Emitted::of([&large[..], &large[1..], &large[1..], &large[..1]].concat()));
        for (number, emitted) in logs.iter().enumerate() {
            let begun = begin(&world, &mut line, emitted).await;
            let attempt = begun.attempt.clone();
            for _ in 0..10 {
                range_reads_as(&world, &attempt, emitted, &mut random).await;
            }
            let url = format!("{}{}", world.url, path(&attempt));
            let follower = tokio::spawn(follow(url.clone(), world.token.expose().to_owned()));
            end(&mut line, &begun).await;
            let moved = inside.moved(number as i64 + 1);
            let mut moved = std::pin::pin!(moved);
            loop {
                tokio::select! {
                    biased;
                    () = range_reads_as(&world, &attempt, emitted, &mut random) => {}
                    () = &mut moved => break,
                }
                if futures_util::poll!(&mut moved).is_ready() {
                    break;
                }
            }
            assert!(follower.await.unwrap() == emitted.followed(), "who followed it meanwhile");
            reads_as(&world, &attempt, emitted).await;
            for _ in 0..20 {
                range_reads_as(&world, &attempt, emitted, &mut random).await;
            }
            assert!(follow(url, world.token.expose().to_owned()).await == emitted.followed());
        }
        reads_as(&world, &empty, &Emitted::of(Vec::new())).await;
        if let ObjectsLocation::Folder(folder) = &world.config.storage.objects.location {
            let objects = inside.objects().await;
            let largest = std::fs::read(folder.join(&objects[4])).unwrap();
            assert!(zstd::decode_all(&largest[..]).unwrap() == logs[4].plain(), "as `zstd -d` reads it");
        }
    }
}

#[tokio::test]
async fn a_crash_at_any_moment_loses_nothing_and_leaves_nothing() {
    let mut random = seeded();
    let places = Places::all().await;
    for mut world in places.worlds().await {
        let inside = Inside::of(&world).await;
        let mut logs = Vec::new();
        for _ in 0..8 {
            let mut line = world.standing_line().await;
            for _ in 0..3 {
                let largest = [100, 100_000][random.random_range(0..2)];
                let emitted = Emitted::random(&mut random, 12, largest);
                logs.push((deliver(&world, &mut line, &emitted).await, emitted));
            }
            for _ in 0..random.random_range(0..3000) {
                tokio::task::yield_now().await;
            }
            world.crash().await;
            drop(line);
            world.start().await;
        }
        let all = async {
            while inside.count("finished_logs").await < logs.len() as i64
                || inside.count("log_chunks WHERE data IS NOT NULL").await > 0
            {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), all).await.expect("they do not move");
        for (attempt, emitted) in &logs {
            reads_as(&world, attempt, emitted).await;
        }
        let storage = inside.replica(&world.config.storage, |_| ()).await;
        storage.sweep(now_ms() + 25 * HOUR_MS, Sweep::Delete).await.unwrap();
        assert_eq!(inside.count("loose_objects").await, 0);
        let stored = match &world.config.storage.objects.location {
            ObjectsLocation::Folder(folder) => files_below(folder),
            ObjectsLocation::S3 { .. } => places.server.as_ref().unwrap().objects().await,
        };
        assert_eq!(stored, logs.len(), "of each log one object, and no other");
        for (attempt, emitted) in &logs {
            reads_as(&world, attempt, emitted).await;
        }
        // The bucket is the next world's as well.
        storage.sweep(now_ms() + 100 * 24 * HOUR_MS, Sweep::Delete).await.unwrap();
    }
}

fn files_below(folder: &std::path::Path) -> usize {
    let count = |entry: std::fs::DirEntry| match entry.path().is_dir() {
        true => files_below(&entry.path()),
        false => 1,
    };
    std::fs::read_dir(folder).map_or(0, |entries| entries.map(|entry| count(entry.unwrap())).sum())
}

#[tokio::test]
async fn each_request_to_the_store_may_fail() {
    let mut random = seeded();
    let Some(server) = s3::Server::start().await else { return };
    let proxy = Proxy::before(&server.url).await;
    let (_folder, database) = sqlite();
    let world = world_with(database, Some(s3::config(&proxy.url))).await;
    let mut line = world.line().await;
    let inside = Inside::of(&world).await;
    // One in a single request, and one in parts.
    let logs = [Emitted::random(&mut random, 5, 1000), Emitted::noise(&mut random, 9 << 20)];
    let mut moved = 0;
    for emitted in &logs {
        for refused in 0.. {
            proxy.refuse_after(refused);
            let attempt = deliver(&world, &mut line, emitted).await;
            moved += 1;
            within(inside.moved(moved)).await;
            let all_came = !proxy.has_refused();
            proxy.refuse_after(i64::MAX);
            reads_as(&world, &attempt, emitted).await;
            if all_came {
                break;
            }
        }
    }
    assert_eq!(server.objects().await as i64, moved);
    assert_eq!(server.unfinished_uploads().await, 0);
    assert!(moved >= 2 + 1 + 4, "it took {moved} logs to have each request refused once");
}

#[tokio::test]
async fn a_long_log_is_read_in_few_requests() {
    let mut random = seeded();
    let Some(server) = s3::Server::start().await else { return };
    let proxy = Proxy::before(&server.url).await;
    let (_folder, database) = sqlite();
    let world = world_with(database, Some(s3::config(&proxy.url))).await;
    let mut line = world.line().await;
    let inside = Inside::of(&world).await;
    let line_of =
        |_| format!("{:08x} a line that is much like the others of this log\n", random.random::<u32>());
    let text: String = (0..400_000).map(line_of).collect();
    let pieces = text.as_bytes().chunks(1 << 20).map(|piece| Part::Bytes(piece.to_vec())).collect();
    let emitted = Emitted::of(pieces);
    let attempt = deliver(&world, &mut line, &emitted).await;
    within(inside.moved(1)).await;
    // It has 24 frames of a MiB, of which each takes a sixth: the table's end, the first, and some windows.
    proxy.refuse_after(9);
    reads_as(&world, &attempt, &emitted).await;
    assert!(!proxy.has_refused());
}

#[tokio::test]
async fn a_store_that_is_away_gets_the_logs_later() {
    let mut random = seeded();
    let Some(server) = s3::Server::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let proxy = Proxy::before(&server.url).await;
        let world = world_with(database, Some(s3::config(&proxy.url))).await;
        let mut line = world.line().await;
        let inside = Inside::of(&world).await;
        proxy.is_away(true);
        proxy.refuse_after(0);
        let mut logs = Vec::new();
        for _ in 0..5 {
            // What is in the database, a gap at the beginning, must not hide that the rest is away.
            let mut parts = vec![Part::Gap(3), Part::Bytes(b"bytes".to_vec())];
            parts.extend(Emitted::random(&mut random, 10, 5000).0.into_iter().map(|(_, part)| part));
            let emitted = Emitted::of(parts);
            logs.push((deliver(&world, &mut line, &emitted).await, emitted));
        }
        within(async {
            while !proxy.has_refused() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        for (attempt, emitted) in &logs {
            reads_as(&world, attempt, emitted).await;
        }
        assert_eq!(inside.count("finished_logs").await, 0);
        proxy.is_away(false);
        let all = async {
            while inside.count("finished_logs").await < 5 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), all).await.expect("they do not move");
        for (attempt, emitted) in &logs {
            reads_as(&world, attempt, emitted).await;
        }

        // It is away again: what is there is said to be there, and where.
        proxy.is_away(true);
        let (attempt, emitted) = &logs[0];
        for rest in ["", "/follow"] {
            let request = world.http.get(format!("{}{}{rest}", world.url, path(attempt)));
            let away = Answer::of(request.bearer_auth(world.token.expose())).await;
            assert_eq!(away.status, 503, "{away:?}");
            assert!(away.headers.contains_key("retry-after"));
            let detail = away.json()["detail"].as_str().unwrap().to_owned();
            assert!(detail.contains("s3://sealci/some/prefix") && detail.contains("logs/"), "{detail}");
        }
        proxy.is_away(false);
        reads_as(&world, attempt, emitted).await;
    }
}

#[tokio::test]
async fn replicas_that_move_the_same_logs_keep_each_once() {
    let mut random = seeded();
    let folder = tempfile::tempdir().unwrap();
    // SQLite has one process only.
    if let Some(database) = sealci_service::testing::postgres("controller").await {
        // It cannot move them itself.
        let mut world = world_with(database, Some(s3::config("http://127.0.0.1:9"))).await;
        let mut line = world.line().await;
        let inside = Inside::of(&world).await;
        let mut logs = Vec::new();
        for _ in 0..40 {
            let emitted = Emitted::random(&mut random, 6, 3000);
            logs.push((deliver(&world, &mut line, &emitted).await, emitted));
        }
        world.crash().await;
        inside.execute("DELETE FROM loose_objects").await;
        let objects = folder.path().join(format!("objects-{}", logs[0].0.action_id));
        world.config.storage.objects.location = ObjectsLocation::Folder(objects.clone());
        let stop = CancellationToken::new();
        let mut replicas = tokio::task::JoinSet::new();
        for _ in 0..3 {
            let storage = Inside::of(&world).await.replica(&world.config.storage, |_| ()).await;
            replicas.spawn(storage.keep_moving(stop.clone()));
        }
        inside.moved(logs.len() as i64).await;
        stop.cancel();
        replicas.join_all().await;
        assert_eq!(files_below(&objects), logs.len());
        world.start().await;
        for (attempt, emitted) in &logs {
            reads_as(&world, attempt, emitted).await;
        }
    }
}

#[tokio::test]
async fn old_logs_go_and_are_said_to_be_gone() {
    let mut random = seeded();
    let places = Places::all().await;
    for world in places.worlds().await {
        let mut line = world.line().await;
        let inside = Inside::of(&world).await;
        let mut logs = Vec::new();
        for number in 1..=4 {
            let emitted = Emitted::noise(&mut random, 1000 * number + 5000);
            logs.push(deliver(&world, &mut line, &emitted).await);
            inside.moved(number as i64).await;
        }
        // They fit within a budget of the last two, and not within less.
        let two = format!("finished_logs WHERE size_bytes > {}", 5000 + 2500);
        assert_eq!(inside.count(&two).await, 2);
        let nothing = Swept::default();
        let storage = inside.replica(&world.config.storage, |_| ()).await;
        assert_eq!(storage.sweep(now_ms(), Sweep::Delete).await.unwrap(), nothing);
        let tight = inside.replica(&world.config.storage, |config| config.logs_budget_bytes = 18_000).await;
        let would_go = tight.sweep(now_ms(), Sweep::Dry).await.unwrap();
        assert_eq!(read(&world, &logs[0]).await.status, 200, "a dry run deletes nothing");
        let went = tight.sweep(now_ms(), Sweep::Delete).await.unwrap();
        assert_eq!(would_go, went);
        assert!((13_000..14_000).contains(&went.freed_bytes), "{went:?}");
        assert_eq!(went, Swept { logs: 2, objects: 2, freed_bytes: went.freed_bytes, ..nothing });
        let reason = async |attempt: &AttemptRef| {
            let gone = read(&world, attempt).await;
            assert_eq!(gone.status, 410, "{gone:?}");
            gone.json()["detail"].as_str().unwrap().to_owned()
        };
        for attempt in &logs[..2] {
            assert!(reason(attempt).await.contains("--logs-budget"));
        }
        assert_eq!(read(&world, &logs[2]).await.status, 200);

        let month_later = now_ms() + 91 * 24 * HOUR_MS;
        let (one, other) = (storage.clone(), inside.replica(&world.config.storage, |_| ()).await);
        let (one, other) =
            tokio::join!(one.sweep(month_later, Sweep::Delete), other.sweep(month_later, Sweep::Delete));
        assert_eq!(one.unwrap().logs + other.unwrap().logs, 2, "two replicas at once");
        assert!(reason(&logs[3]).await.contains("kept for 90d here (--keep-logs)"));
        assert!(reason(&logs[0]).await.contains("--logs-budget"), "that went before");
        let follow = world.http.get(format!("{}{}/follow", world.url, path(&logs[3])));
        assert_eq!(Answer::of(follow.bearer_auth(world.token.expose())).await.status, 410);
        for table in ["log_chunks", "loose_objects"] {
            assert_eq!(inside.count(table).await, 0, "{table}");
        }
        if let ObjectsLocation::Folder(folder) = &world.config.storage.objects.location {
            assert_eq!(files_below(folder), 0);
        }
    }
    if let Some(server) = &places.server {
        assert_eq!(server.objects().await, 0);
    }
}

#[tokio::test]
async fn a_budget_is_kept_while_logs_grow() {
    let mut random = seeded();
    let (_folder, database) = sqlite();
    let world = World::with(database, LONG, |config| config.storage.logs_budget_bytes = 20_000).await;
    let mut line = world.line().await;
    let inside = Inside::of(&world).await;
    for _ in 0..8 {
        deliver(&world, &mut line, &Emitted::noise(&mut random, 6000)).await;
    }
    let fitting = async {
        while inside.count("finished_logs").await < 8
            || inside.count("finished_logs WHERE deleted_at IS NULL").await > 3
        {
            tokio::task::yield_now().await;
        }
    };
    within(fitting).await;
}

#[tokio::test]
async fn an_object_that_somebody_removed_or_changed_is_said_to_be_so() {
    let mut random = seeded();
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut line = world.line().await;
    let inside = Inside::of(&world).await;
    let attempt = deliver(&world, &mut line, &Emitted::noise(&mut random, 200_000)).await;
    inside.moved(1).await;
    let ObjectsLocation::Folder(folder) = &world.config.storage.objects.location else { panic!() };
    let file: PathBuf = folder.join(&inside.objects().await[0]);
    let bytes = std::fs::read(&file).unwrap();
    let refused = async |how: &str| {
        let lost = read(&world, &attempt).await;
        assert_eq!(lost.status, 410, "{how}: {lost:?}");
        let detail = lost.json()["detail"].as_str().unwrap().to_owned();
        assert!(detail.contains(how) && detail.contains(&folder.display().to_string()), "{detail}");
    };
    let mut changed = bytes.clone();
    changed[100_000] ^= 1;
    for (damaged, how) in [(&changed[..], "damaged in"), (&bytes[..100_000], "damaged in")] {
        std::fs::write(&file, damaged).unwrap();
        refused(how).await;
    }
    std::fs::remove_file(&file).unwrap();
    refused("gone from").await;
    std::fs::write(&file, &bytes).unwrap();
    assert_eq!(read(&world, &attempt).await.status, 200, "it is there again");
}
