//! Keeps and reads what actions leave, as agents and as people, on every database and every kind of object store.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::path::Path;
use std::time::Duration;

use sea_orm::ConnectionTrait as _;
use sealci_controller::storage::objects::ObjectsLocation;
use sealci_controller::storage::{Storage, Sweep, Swept};
use sealci_controller::store::Store;
use sealci_service::database::DatabaseUrl;
use sealci_service::testing::SmallDisk;
use serde_json::json;
use support::keeping::{Answer, Attempt, Keeper, Packed, digest};
use support::*;
use tokio::io::AsyncWriteExt as _;

const LONG: Duration = Duration::from_secs(600);
const DAY_MS: i64 = 24 * 60 * 60 * 1000;
const REPOSITORY: &str = "https://forge.example.org/o/r.git";
const OTHER: &str = "https://forge.example.org/o/other.git";
const MANIFEST: &str = "name: x
actions:
  build:
    commands: [\"true\"]
    services: {db: {container: postgres}}
    artifacts: {paths: [out]}
  plain:
    commands: [\"true\"]
  deploy:
    uses: [build]
    commands: [\"true\"]
";

/// Bytes that do not compress, others for each seed.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}

/// The files below a folder.
fn files_below(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let count = |entry: std::fs::DirEntry| {
        if entry.path().is_dir() { files_below(&entry.path()) } else { 1 }
    };
    entries.map(|entry| count(entry.unwrap())).sum()
}

fn objects_folder(world: &World) -> &Path {
    match &world.config.storage.objects.location {
        ObjectsLocation::Folder(path) => path,
        ObjectsLocation::S3 { .. } => panic!("it is a bucket"),
    }
}

async fn connected(world: &World) -> sea_orm::DatabaseConnection {
    let url = match &world.config.database {
        DatabaseUrl::Sqlite(path) | DatabaseUrl::Scratch(path) => format!("sqlite:{}", path.display()),
        DatabaseUrl::Postgres(url) => url.clone(),
    };
    sea_orm::Database::connect(url).await.unwrap()
}

/// Another replica, which sweeps.
async fn replica(
    world: &World,
    change: impl FnOnce(&mut sealci_controller::storage::StorageConfig),
) -> Storage {
    let connection = connected(world).await;
    let store = Store::open(connection.clone(), connection).await.unwrap();
    let mut config = world.config.storage.clone();
    change(&mut config);
    Storage::open(store, config).await.unwrap()
}

fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

async fn person(world: &World, path: &str) -> Answer {
    Answer::of(world.http.get(format!("{}{path}", world.url)).bearer_auth(world.read_token.expose())).await
}

#[tokio::test]
async fn a_ticket_is_one_attempts_and_ends_with_it() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let mut world = World::on(database, LONG).await;
        let mut keeper = Keeper::of(&world).await;
        let one = keeper.begin(&world, REPOSITORY, MANIFEST).await;
        assert_eq!(
            keeper.claimed(&one.pipeline, one.of.clone()).await.ticket,
            one.ticket,
            "a repeated grant"
        );
        let other = keeper.begin(&world, OTHER, MANIFEST).await;
        let status =
            async |attempt: &Attempt| attempt.post(&world, "/caches/find", json!({"key": "k"})).await.status;
        assert_eq!(status(&one).await, 200);
        assert_eq!(status(&Attempt { ticket: other.ticket.clone(), ..one.clone() }).await, 401, "another's");
        assert_eq!(
            status(&Attempt { ticket: world.token.expose().into(), ..one.clone() }).await,
            401,
            "no role's"
        );
        assert_eq!(status(&Attempt { ticket: String::new(), ..one.clone() }).await, 401);
        let mut later = one.clone();
        later.of.number = 2;
        assert_eq!(status(&later).await, 401, "another attempt's of the action");
        let nonsense = world.http.post(format!("{}/api/v1/attempts/x.y/caches/find", world.url));
        assert_eq!(Answer::of(nonsense).await.status, 404);
        keeper.fail(&one).await;
        let over = one.post(&world, "/caches/find", json!({"key": "k"})).await;
        assert_eq!(over.status, 403);
        assert!(over.json()["detail"].as_str().unwrap().contains("over"), "{over:?}");

        // A controller that starts again knows its own tickets.
        world.crash().await;
        world.start().await;
        let other = Attempt { url: world.url.clone(), ..other };
        assert_eq!(other.post(&world, "/caches/find", json!({"key": "k"})).await.status, 200);
    }
}

#[tokio::test]
async fn who_lost_its_action_keeps_nothing_more() {
    let (_folder, database) = sqlite();
    let world = World::on(database, Duration::from_millis(300)).await;
    let mut keeper = Keeper::of(&world).await;
    let lost = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    assert_eq!(lost.keep(&world, &Packed::of(&[("out", b"lost")])).await.status, 200);
    let again = keeper.line.queued().await;
    assert_eq!(again.number, 2);
    assert_eq!(lost.post(&world, "/caches/find", json!({"key": "k"})).await.status, 403);
    assert_eq!(lost.upload(&world, b"x").await.status, 403);
    let again = keeper.claimed(&lost.pipeline, again).await;
    assert_eq!(again.keep(&world, &Packed::of(&[("out", b"kept")])).await.status, 200);
    keeper.succeed(&again).await;
    let listed = world.get(&format!("/api/v1/pipelines/{}/artifacts", lost.pipeline)).await;
    let attempts: Vec<_> =
        listed["artifacts"].as_array().unwrap().iter().map(|one| one["attempt"].clone()).collect();
    assert_eq!(attempts, [2], "only what counted is there: {listed}");
}

#[tokio::test]
async fn an_address_that_is_not_known_is_refused_with_what_to_do() {
    let (_folder, database) = sqlite();
    let mut world = World::on(database, LONG).await;
    drop(world.line().await);
    world.crash().await;
    world.start_without_agents_url().await;
    let mut keeper = Keeper::of(&world).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    assert!(attempt.url.is_empty() && attempt.ticket.is_empty());
    assert!(attempt.refused.contains("--agents-url"), "{}", attempt.refused);
}

#[tokio::test]
async fn uploads_are_whole_or_nothing_and_stored_once() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let mut world = World::on(database, LONG).await;
        world.config.storage.max_upload_bytes = 20 << 20;
        drop(world.line().await);
        world.crash().await;
        world.start().await;
        let mut keeper = Keeper::of(&world).await;
        let one = keeper.begin(&world, REPOSITORY, MANIFEST).await;
        let other = keeper.begin(&world, OTHER, MANIFEST).await;
        let objects = objects_folder(&world).to_owned();

        for bytes in [&b"small"[..], &noise(9 << 20, 1)] {
            let wrong = one.upload_as(&world, &digest(b"something else"), bytes).await;
            assert_eq!(wrong.status, 422, "{wrong:?}");
            assert!(wrong.json()["detail"].as_str().unwrap().contains(&digest(bytes)));
        }
        assert_eq!(one.upload_as(&world, "sha256:no", b"x").await.status, 422);
        assert_eq!(one.upload(&world, &noise((20 << 20) + 1, 2)).await.status, 413);
        let chunked = reqwest::Body::wrap_stream(futures_util::stream::iter([Ok::<_, std::io::Error>("x")]));
        let unsized_upload = world.http.put(one.path(&format!("/blobs/{}", digest(b"x"))));
        assert_eq!(Answer::of(unsized_upload.bearer_auth(&one.ticket).body(chunked)).await.status, 411);
        cut_off(&world, &one).await;
        within(async {
            while files_below(&objects) > 0 || count(&world, "loose_objects").await > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await;

        let large = noise((9 << 20) + 17, 3);
        let uploads = (0..8).map(|number| if number % 2 == 0 { &one } else { &other }.upload(&world, &large));
        let statuses: Vec<u16> =
            futures_util::future::join_all(uploads).await.iter().map(|answer| answer.status).collect();
        assert!(statuses.iter().all(|status| matches!(status, 200 | 201)), "{statuses:?}");
        assert_eq!(one.upload(&world, &large).await.status, 200, "it is known by now");
        assert_eq!(files_below(&objects), 1);
        assert_eq!((count(&world, "blobs").await, count(&world, "loose_objects").await), (1, 0));

        // A digest alone is worth nothing to another repository: it has to bring the bytes.
        let secret = noise(1000, 4);
        assert_eq!(one.upload(&world, &secret).await.status, 201);
        let body = json!({"key": "k", "digest": digest(&secret), "unpacked_bytes": 1, "files": 1});
        assert_eq!(other.post(&world, "/caches", body.clone()).await.status, 409);
        assert_eq!(other.get(&world, &format!("/blobs/{}", digest(&secret))).await.status, 404);
        assert_eq!(other.upload(&world, &secret).await.status, 201);
        assert_eq!(other.post(&world, "/caches", body).await.status, 200);
        assert_eq!(files_below(&objects), 2);
    }
}

async fn count(world: &World, table: &str) -> i64 {
    let connection = connected(world).await;
    let question = format!("SELECT count(*) FROM {table}");
    let statement = sea_orm::Statement::from_string(connection.get_database_backend(), question);
    let row = connection.query_one_raw(statement).await.unwrap().unwrap();
    row.try_get_by_index(0).unwrap()
}

/// Sends half of an upload and hangs up.
async fn cut_off(world: &World, attempt: &Attempt) {
    let bytes = noise(18 << 20, 5);
    let address = world.url.strip_prefix("http://").unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let path = attempt.path(&format!("/blobs/{}", digest(&bytes)));
    let path = path.strip_prefix(&world.url).unwrap();
    let head = format!(
        "PUT {path} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n",
        attempt.ticket,
        bytes.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&bytes[..9 << 20]).await.unwrap();
    // It has begun to keep them.
    within(async {
        while count(world, "loose_objects").await == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn artifacts_are_kept_listed_read_used_and_deleted() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut keeper = Keeper::of(&world).await;
        artifacts_live(&world, &mut keeper).await;
    }
}

/// The life of an action's artifacts.
async fn artifacts_live(world: &World, keeper: &mut Keeper) {
    let large = noise(700_000, 6);
    let packed = Packed::of(&[("out/a.txt", b"hello"), ("out/large", &large), ("out/empty", b"")]);
    let build = keeper.begin(world, REPOSITORY, MANIFEST).await;
    let early = build.post(world, "/artifacts", packed.artifact()).await;
    assert_eq!(early.status, 409, "not uploaded yet: {early:?}");
    let kept = build.keep(world, &packed).await;
    assert_eq!(kept.status, 200, "{:?}", kept.json());
    let id = kept.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(build.post(world, "/artifacts", packed.artifact()).await.json()["id"], id, "a repeat");
    let second = Packed::of(&[("b", b"b")]);
    assert_eq!(build.keep(world, &second).await.status, 409, "there is one already");
    lies(world, &build).await;
    let log = Packed::of(&[("log", b"ready\n")]);
    let mut service = log.artifact();
    service["kind"] = json!("service_log");
    assert_eq!(build.upload(world, &log.bytes).await.status, 201);
    assert_eq!(build.post(world, "/artifacts", service.clone()).await.status, 422, "whose?");
    service["name"] = json!("stranger");
    assert_eq!(
        build.post(world, "/artifacts", service.clone()).await.status,
        422,
        "there is none of this name"
    );
    service["name"] = json!("db");
    assert_eq!(build.post(world, "/artifacts", service).await.status, 200);

    let list = format!("/api/v1/pipelines/{}/artifacts", build.pipeline);
    assert_eq!(world.get(&list).await["artifacts"], json!([]), "its attempt does not count yet");
    assert_eq!(person(world, &format!("/api/v1/artifacts/{id}")).await.status, 404);
    keeper.succeed(&build).await;
    let listed = world.get(&list).await;
    assert_eq!(listed["artifacts"][0]["id"], id, "{listed}");
    assert_eq!(listed["artifacts"][1]["name"], "db");
    let shown = world.get(&format!("/api/v1/pipelines/{}?verbose=true", build.pipeline)).await;
    let totals = &shown["actions"][0]["attempts"][0]["artifacts"];
    assert_eq!((totals["count"].as_i64(), totals["files"].as_i64()), (Some(2), Some(4)), "{shown}");

    read_by_people(world, &id, &packed, &large).await;

    // The next action does not use it; the one after does.
    let plain = keeper.line.queued().await;
    let plain_id = plain.action_id.clone();
    ScriptedAgent {
        token: keeper.line.granted(&plain).await.token,
        attempt: plain,
        sequence: 0,
        line: &mut keeper.line,
    }
    .succeed()
    .await;
    let deploy = keeper.line.queued().await;
    let deploy = keeper.claimed(&build.pipeline, deploy).await;
    let used = deploy.get(world, &format!("/uses/{}", build.of.action_id)).await;
    assert_eq!(used.json()["artifacts"][0]["digest"], digest(&packed.bytes), "{used:?}");
    assert_eq!(deploy.get(world, &format!("/uses/{plain_id}")).await.status, 404);
    let blob = format!("/blobs/{}", digest(&packed.bytes));
    assert_eq!(deploy.get(world, &blob).await.bytes, packed.bytes);
    let stranger = keeper.begin(world, REPOSITORY, MANIFEST).await;
    assert_eq!(stranger.get(world, &format!("/uses/{}", build.of.action_id)).await.status, 404);
    assert_eq!(stranger.get(world, &blob).await.status, 404, "of the same repository, but not told of it");

    let delete = |token: &sealci_service::auth::Token| {
        Answer::of(
            world.http.delete(format!("{}/api/v1/artifacts/{id}", world.url)).bearer_auth(token.expose()),
        )
    };
    assert_eq!(delete(&world.read_token).await.status, 403);
    assert_eq!(delete(&world.token).await.status, 204);
    assert_eq!(delete(&world.token).await.status, 404);
    assert_eq!(deploy.get(world, &blob).await.status, 404);
}

async fn read_by_people(world: &World, id: &str, packed: &Packed, large: &[u8]) {
    let of = |rest: &str| format!("/api/v1/artifacts/{id}{rest}");
    let whole = person(world, &of("/archive")).await;
    assert!(whole.status == 200 && whole.bytes == packed.bytes);
    let ranged = world.http.get(format!("{}{}", world.url, of("/archive")));
    let ranged =
        Answer::of(ranged.bearer_auth(world.read_token.expose()).header("range", "bytes=10-19")).await;
    assert_eq!((ranged.status, &ranged.bytes[..]), (206, &packed.bytes[10..20]));
    assert_eq!(ranged.headers["content-range"], format!("bytes 10-19/{}", packed.bytes.len()).as_str());
    let beyond =
        world.http.get(format!("{}{}", world.url, of("/archive"))).header("range", "bytes=99999999-");
    assert_eq!(Answer::of(beyond.bearer_auth(world.read_token.expose())).await.status, 416);

    let first = world.get(&of("/files?limit=2")).await;
    assert_eq!(first["files"][1]["size_bytes"], 700_000, "{first}");
    let rest = world.get(&of(&format!("/files?limit=2&cursor={}", first["next"].as_str().unwrap()))).await;
    assert_eq!(
        (rest["files"][0]["path"].as_str(), rest["next"].as_str()),
        (Some("out/empty"), None),
        "{rest}"
    );
    for (path, bytes) in [("out/a.txt", &b"hello"[..]), ("out%2Flarge", large), ("out/empty", b"")] {
        let file = person(world, &of(&format!("/files/{path}"))).await;
        assert!(file.status == 200 && file.bytes == bytes, "{path}: {}", file.status);
        assert_eq!(file.headers["content-type"], "application/octet-stream");
        assert_eq!(file.headers["x-content-type-options"], "nosniff");
        assert!(file.headers["content-disposition"].to_str().unwrap().starts_with("attachment"));
    }
    for path in ["nothing", "out", "..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd"] {
        assert_eq!(person(world, &of(&format!("/files/{path}"))).await.status, 404, "{path}");
    }
}

/// What an agent may say that is not so.
async fn lies(world: &World, attempt: &Attempt) {
    let packed = Packed::of(&[("c", b"content")]);
    assert_eq!(attempt.upload(world, &packed.bytes).await.status, 201);
    let with = |member: &str, value: serde_json::Value| {
        let mut body = packed.artifact();
        (body["kind"], body["name"]) = (json!("service_log"), json!("db"));
        body[member] = value;
        attempt.post(world, "/artifacts", body)
    };
    for (member, value) in [("files", json!(2)), ("unpacked_bytes", json!(1)), ("files", json!(-1))] {
        let refused = with(member, value).await;
        assert_eq!(refused.status, 422, "{member}: {refused:?}");
    }
    let no_archive = noise(1000, 7);
    assert_eq!(attempt.upload(world, &no_archive).await.status, 201);
    assert_eq!(with("digest", json!(digest(&no_archive))).await.status, 422);
    assert_eq!(with("surprise", json!(1)).await.status, 422);
}

#[tokio::test]
async fn caches_are_found_by_key_and_kept_apart_by_trust() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut keeper = Keeper::of(&world).await;
        let base = keeper.begin(&world, REPOSITORY, MANIFEST).await;
        assert_eq!(base.find(&world, "cargo-1", &["cargo-", ""]).await, None);
        assert_eq!(base.keep_cache(&world, "cargo-1", b"first").await.json()["stored"], true);
        assert_eq!(
            base.keep_cache(&world, "cargo-1", b"second").await.json()["stored"],
            false,
            "the first wins"
        );
        assert_eq!(base.keep_cache(&world, "cargo-2", b"newer").await.json()["stored"], true);
        let found = |key: &str, exact: bool| Some((key.to_owned(), exact));
        assert_eq!(base.find(&world, "cargo-1", &[]).await, found("cargo-1", true));
        assert_eq!(base.find(&world, "cargo-9", &["npm-", "cargo-"]).await, found("cargo-2", false));
        for prefix in ["CARGO-", "cargo%", "cargo_", "cargo-1-"] {
            assert_eq!(base.find(&world, "cargo-9", &[prefix]).await, None, "{prefix}");
        }
        let odd = "../../etc/passwd \u{1F980} '; --";
        assert_eq!(base.keep_cache(&world, odd, b"odd").await.json()["stored"], true);
        assert_eq!(base.find(&world, "x", &["../"]).await, found(odd, false));
        let long = base.post(&world, "/caches/find", json!({"key": "\u{e9}".repeat(600)})).await;
        assert_eq!(long.status, 422);
        let other = keeper.begin(&world, OTHER, MANIFEST).await;
        assert_eq!(other.find(&world, "cargo-1", &["cargo-"]).await, None, "another repository's");

        let fork = pull_request(&world, &mut keeper, "refs/pull/7/head").await;
        assert_eq!(fork.find(&world, "cargo-1", &[]).await, found("cargo-1", true), "it reads the base's");
        assert_eq!(fork.get(&world, &format!("/blobs/{}", digest(b"first"))).await.bytes, b"first");
        assert_eq!(fork.keep_cache(&world, "cargo-1", b"evil").await.json()["stored"], true, "for itself");
        assert_eq!(fork.keep_cache(&world, "cargo-3", b"evil").await.json()["stored"], true);
        assert_eq!(fork.find(&world, "cargo-9", &["cargo-"]).await, found("cargo-3", false));
        let answer = fork.post(&world, "/caches/find", json!({"key": "cargo-1"})).await.json();
        assert_eq!(answer["entry"]["digest"], digest(b"evil"), "its own comes first");
        assert_eq!(base.find(&world, "cargo-3", &[]).await, None, "the base never reads a pull request's");
        assert_eq!(base.get(&world, &format!("/blobs/{}", digest(b"evil"))).await.status, 404);
        let answer = base.post(&world, "/caches/find", json!({"key": "cargo-1"})).await.json();
        assert_eq!(answer["entry"]["digest"], digest(b"first"));
        let another = pull_request(&world, &mut keeper, "refs/pull/8/head").await;
        assert_eq!(another.find(&world, "cargo-3", &[]).await, None, "nor does another pull request");
        caches_are_listed(&world).await;
    }
}

async fn caches_are_listed(world: &World) {
    let mut keys = Vec::new();
    let mut path = format!("/api/v1/caches?limit=2&repository={REPOSITORY}");
    loop {
        let page = world.get(&path).await;
        keys.extend(
            page["caches"].as_array().unwrap().iter().map(|row| (row["key"].clone(), row["id"].clone())),
        );
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/api/v1/caches?limit=2&repository={REPOSITORY}&cursor={next}");
    }
    assert_eq!(keys.len(), 5, "{keys:?}");
    assert_eq!(world.get("/api/v1/caches?repository=elsewhere/x").await["caches"], json!([]));
    assert_eq!(person(world, "/api/v1/caches?cursor=7").await.status, 400);
    let id = keys[0].1.as_str().unwrap();
    let deleted = world.call(reqwest::Method::DELETE, &format!("/api/v1/caches/{id}"), None).await;
    assert_eq!(deleted.0, 204);
    assert_eq!(world.get("/api/v1/caches").await["caches"].as_array().unwrap().len(), 4);
}

/// An attempt of a pull request, as the database has it: nothing makes them yet.
async fn pull_request(world: &World, keeper: &mut Keeper, name: &str) -> Attempt {
    let attempt = keeper.begin(world, REPOSITORY, MANIFEST).await;
    let id = uuid::Uuid::parse_str(&attempt.pipeline).unwrap();
    let change = sealci_controller::store::entity::pipelines::ActiveModel {
        id: sea_orm::Set(id),
        event: sea_orm::Set("pull_request".into()),
        r#ref: sea_orm::Set(Some(name.into())),
        ..Default::default()
    };
    sea_orm::ActiveModelTrait::update(change, &connected(world).await).await.unwrap();
    attempt
}

#[tokio::test]
async fn reports_are_bounded_and_shown() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut keeper = Keeper::of(&world).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    let case = |number: usize| json!({"name": format!("t{number}"), "kind": "failure", "message": "\u{e9}".repeat(4000)});
    let cases: Vec<_> = (0..150).map(case).collect();
    let report =
        json!({"tests": 200, "failures": 150, "errors": 0, "skipped": 1, "duration_ms": 5, "failing": cases});
    let kept = attempt.post(&world, "/reports", report.clone()).await;
    assert_eq!(kept.status, 200, "{kept:?}");
    assert_eq!(kept.json()["failing"].as_array().unwrap().len(), 100);
    let mut last = report.clone();
    last["tests"] = json!(-1);
    assert_eq!(attempt.post(&world, "/reports", last.clone()).await.status, 422);
    last["tests"] = json!(201);
    assert_eq!(attempt.post(&world, "/reports", last).await.status, 200);
    let shown = world.get(&format!("/api/v1/actions/{}", attempt.of.action_id)).await;
    let tests = &shown["attempts"][0]["tests"];
    assert_eq!((tests["tests"].as_i64(), tests["failing"][99]["name"].as_str()), (Some(201), Some("t99")));
    assert_eq!(tests["failing"][0]["message"].as_str().unwrap().len(), 1024);
}

#[tokio::test]
async fn what_had_its_time_is_deleted_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let mut keeper = Keeper::of(&world).await;
        sweeping(&world, &mut keeper).await;
        assert_eq!(files_below(objects_folder(&world)), 0);
    }
}

/// The end of all that is kept.
async fn sweeping(world: &World, keeper: &mut Keeper) {
    let attempt = keeper.begin(world, REPOSITORY, MANIFEST).await;
    let mut short = Packed::of(&[("a", b"a")]).artifact();
    let packed = Packed::of(&[("a", b"a")]);
    assert_eq!(attempt.upload(world, &packed.bytes).await.status, 201);
    short["keep_ms"] = json!(DAY_MS / 2);
    assert_eq!(attempt.post(world, "/artifacts", short).await.status, 200);
    assert_eq!(attempt.upload(world, b"nobody refers to it").await.status, 201);
    for (key, bytes) in [("one", noise(3000, 8)), ("two", noise(3000, 9)), ("three", noise(3000, 10))] {
        attempt.keep_cache(world, key, &bytes).await;
    }
    assert!(attempt.find(world, "one", &[]).await.is_some(), "it is used now");
    let storage = replica(world, |_| ()).await;
    let nothing = Swept::default();
    assert_eq!(storage.sweep(now_ms(), Sweep::Delete).await.unwrap(), nothing, "all of it is young");
    let later = now_ms() + DAY_MS + 60_000;
    let would_go = storage.sweep(later, Sweep::Dry).await.unwrap();
    let day_later = storage.sweep(later, Sweep::Delete).await.unwrap();
    assert_eq!(would_go, day_later, "a dry run says what goes");
    let freed_bytes = (packed.bytes.len() + b"nobody refers to it".len()) as u64;
    assert_eq!(day_later, Swept { artifacts: 1, blobs: 2, objects: 2, freed_bytes, ..nothing });
    assert_eq!(attempt.upload(world, &packed.bytes).await.status, 201, "it is gone, and can come again");

    let tight = replica(world, |config| config.cache_budget_bytes = 7000).await;
    assert_eq!(tight.sweep(now_ms(), Sweep::Dry).await.unwrap().cache_entries, 1);
    let fitted = tight.sweep(now_ms(), Sweep::Delete).await.unwrap();
    assert_eq!(fitted, Swept { cache_entries: 1, ..nothing });
    assert_eq!(attempt.find(world, "two", &[]).await, None, "the longest unused went");
    assert!(attempt.find(world, "one", &[]).await.is_some());

    let (first, second) = (replica(world, |_| ()).await, replica(world, |_| ()).await);
    let month_later = now_ms() + 32 * DAY_MS;
    let (first, second) =
        tokio::join!(first.sweep(month_later, Sweep::Delete), second.sweep(month_later, Sweep::Delete));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first.cache_entries + second.cache_entries, 2, "two replicas at once: {first:?} {second:?}");
    assert_eq!(first.blobs + second.blobs, 4);
    storage.sweep(month_later, Sweep::Delete).await.unwrap();
    for table in ["artifacts", "caches", "blobs", "blob_owners", "loose_objects"] {
        assert_eq!(count(world, table).await, 0, "{table}");
    }
}

#[tokio::test]
async fn a_full_disk_takes_nothing_until_there_is_room() {
    let Some(disk) = SmallDisk::mount("20m") else { return };
    let (_folder, database) = sqlite();
    let mut world = World::on(database, LONG).await;
    world.config.storage.objects.location = ObjectsLocation::Folder(disk.path().join("objects"));
    drop(world.line().await);
    world.crash().await;
    world.start().await;
    let mut keeper = Keeper::of(&world).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    let filler = disk.fill();
    for bytes in [noise(100_000, 11), noise(10 << 20, 12)] {
        let refused = attempt.upload(&world, &bytes).await;
        assert_eq!(refused.status, 507, "{refused:?}");
    }
    std::fs::remove_file(filler).unwrap();
    assert_eq!(files_below(objects_folder(&world)), 0);
    assert_eq!(attempt.upload(&world, &noise(10 << 20, 12)).await.status, 201);
}

#[tokio::test]
async fn a_disk_that_is_full_under_both_is_said_to_be() {
    let Some(disk) = SmallDisk::mount("20m") else { return };
    let world = World::on(DatabaseUrl::Sqlite(disk.path().join("c.sqlite")), LONG).await;
    let mut keeper = Keeper::of(&world).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    let filler = disk.fill();
    // What little room is left in the file's pages may take a few more.
    let refused = within(async {
        for seed in 100.. {
            let answer = attempt.upload(&world, &noise(1000, seed)).await;
            if answer.status != 201 {
                return answer;
            }
        }
        unreachable!()
    })
    .await;
    assert_eq!(refused.status, 507, "{refused:?}");
    std::fs::remove_file(filler).unwrap();
    assert_eq!(attempt.upload(&world, b"there is room again").await.status, 201);
}

#[tokio::test]
async fn a_store_that_is_away_says_so_and_when_to_come_again() {
    let (_folder, database) = sqlite();
    let mut world = World::on(database, LONG).await;
    world.config.storage.objects = s3::config("http://127.0.0.1:9");
    drop(world.line().await);
    world.crash().await;
    world.start().await;
    let mut keeper = Keeper::of(&world).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    let away = attempt.upload(&world, b"x").await;
    assert_eq!(away.status, 503, "{away:?}");
    assert!(away.headers.contains_key("retry-after"));
    assert!(away.json()["detail"].as_str().unwrap().contains("object store"), "{away:?}");
}

#[tokio::test]
async fn all_of_it_works_on_an_s3_server() {
    let Some(server) = s3::Server::start().await else { return };
    let (_folder, database) = sqlite();
    let mut world = World::on(database, LONG).await;
    world.config.storage.objects = s3::config(&server.url);
    drop(world.line().await);
    world.crash().await;
    world.start().await;
    let mut keeper = Keeper::of(&world).await;
    artifacts_live(&world, &mut keeper).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    let large = noise((17 << 20) + 5, 13);
    let wrong = attempt.upload_as(&world, &digest(b"something else"), &large).await;
    assert_eq!(wrong.status, 422, "{wrong:?}");
    cut_off(&world, &attempt).await;
    within(async {
        while count(&world, "loose_objects").await > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(server.unfinished_uploads().await, 0);
    assert_eq!(attempt.keep_cache(&world, "large", &large).await.json()["stored"], true);
    assert!(attempt.get(&world, &format!("/blobs/{}", digest(&large))).await.bytes == large);
    let storage = replica(&world, |_| ()).await;
    storage.sweep(now_ms() + 40 * DAY_MS, Sweep::Delete).await.unwrap();
    storage.sweep(now_ms() + 40 * DAY_MS, Sweep::Delete).await.unwrap();
    assert_eq!(server.objects().await, 0);
}

#[tokio::test]
async fn the_typed_client_streams_both_ways() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let mut keeper = Keeper::of(&world).await;
    let attempt = keeper.begin(&world, REPOSITORY, MANIFEST).await;
    let bytes = noise(3 << 20, 14);
    let mut headers = reqwest::header::HeaderMap::new();
    headers.insert("authorization", format!("Bearer {}", attempt.ticket).parse().unwrap());
    let http = reqwest::Client::builder().default_headers(headers).build().unwrap();
    let client = sealci_api::controller::Client::new_with_client(&attempt.url, http);
    let pieces: Vec<_> = bytes.chunks(65_536).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    let name = format!("{}.{}", attempt.of.action_id, attempt.of.number);
    let uploaded = client
        .upload_blob()
        .attempt(&name)
        .digest(digest(&bytes))
        .content_length(i64::try_from(bytes.len()).unwrap())
        .body(reqwest::Body::wrap_stream(futures_util::stream::iter(pieces)))
        .send()
        .await
        .unwrap();
    assert_eq!(uploaded.status(), 201);
    let body = json!({"key": "k", "digest": digest(&bytes), "unpacked_bytes": 1, "files": 1});
    assert_eq!(attempt.post(&world, "/caches", body).await.status, 200);
    let read = client.download_blob().attempt(&name).digest(digest(&bytes)).send().await.unwrap();
    let read: Vec<_> = futures_util::TryStreamExt::try_collect(read.into_inner_stream()).await.unwrap();
    assert!(read.concat() == bytes);
}
