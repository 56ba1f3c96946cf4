//! Holds the REST API against its document, and against those who call it wrongly.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use openapiv3::OpenAPI;
use sealci_controller::api::Access;
use sealci_service::auth::Role;
use serde_json::{Value, json};
use support::*;

const LONG: Duration = Duration::from_secs(600);
const GOOD: &str = "name: x\nactions:\n  a:\n    commands: [\"true\"]\n";
const NOWHERE: &str = "018f0000-0000-7000-8000-0000000000ff";

fn document() -> OpenAPI {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../api/openapi/controller.yaml");
    let value: Value = serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    serde_json::from_value(value).unwrap()
}

#[test]
fn what_is_served_is_what_is_documented() {
    let documented: BTreeSet<(String, String, String)> = document()
        .operations()
        .map(|(path, method, operation)| {
            let security = operation.security.as_deref();
            let has_ticket =
                security.is_some_and(|all| all.iter().any(|one| one.contains_key("attemptTicket")));
            let summary = operation.summary.clone().unwrap_or_default();
            let role = ["(role read)", "(role run)", "(role admin)", "(ticket)"]
                .into_iter()
                .find(|role| summary.contains(role));
            assert_eq!(has_ticket, role == Some("(ticket)"), "{path}");
            let is_open = security.is_some_and(<[_]>::is_empty);
            let role = if is_open { "anyone" } else { role.expect("a summary names who may call it") };
            (path.to_owned(), method.to_owned(), role.to_owned())
        })
        .collect();
    let served: BTreeSet<(String, String, String)> = sealci_controller::api::routes()
        .into_iter()
        .map(|route| {
            let role = match route.access {
                Access::Anyone => "anyone".to_owned(),
                Access::Role(role) => format!("(role {role})"),
                Access::Ticket => "(ticket)".to_owned(),
            };
            // The last part of a path may hold slashes, which the document cannot say.
            (route.path.replace("{*", "{"), route.method.to_owned(), role)
        })
        .collect();
    assert_eq!(served, documented);
}

/// A call, and the status and words that it must be answered with.
struct Wrong {
    method: &'static str,
    path: String,
    body: Body,
    status: u16,
    says: &'static str,
}

enum Body {
    None,
    Json(Value),
    Raw(&'static str, Vec<u8>),
}

fn wrong(
    method: &'static str,
    path: impl Into<String>,
    body: Body,
    status: u16,
    says: &'static str,
) -> Wrong {
    Wrong { method, path: path.into(), body, status, says }
}

/// A push with one member changed.
fn but(member: &str, value: Value) -> Body {
    let mut body = push(GOOD);
    body[member] = value;
    Body::Json(body)
}

fn wrong_creates() -> Vec<Wrong> {
    let create = |body, status, says| wrong("POST", "/api/v1/pipelines", body, status, says);
    let manifest = |text: &str| but("body", json!(text));
    vec![
        create(Body::None, 415, "content-type"),
        create(Body::Raw("application/json", b"{".to_vec()), 400, "not json"),
        create(Body::Raw("application/json", b"[]".to_vec()), 422, "invalid"),
        create(Body::Raw("text/plain", b"{}".to_vec()), 415, "content-type"),
        create(Body::Raw("application/json", vec![b'['; 200_000]), 422, "invalid type"),
        create(Body::Raw("application/json", vec![b' '; 5 << 20]), 413, "larger"),
        create(Body::Json(json!({})), 422, "repo_url"),
        create(but("surprise", json!(1)), 422, "surprise"),
        create(but("repo_url", json!("nonsense")), 400, "no repository URL"),
        create(but("repo_url", json!("-u/x:y")), 400, "begins with"),
        create(but("repo_url", json!("ext::sh -c touch% /tmp/x")), 400, "no repository URL"),
        create(but("repo_url", json!("ftp://host/path")), 400, "only https"),
        create(but("repo_url", json!("git://host/path")), 403, "not allowed"),
        create(but("repo_url", json!(7)), 422, "string"),
        create(but("ref", json!("main")), 400, "not a full ref name"),
        create(but("ref", json!("refs/heads/a..b")), 400, "not a full ref name"),
        create(but("revision", json!("HEAD")), 400, "not a full commit id"),
        create(but("revision", json!("--upload-pack=x")), 400, "not a full commit id"),
        create(but("event", json!("tag")), 400, "cannot be about"),
        create(but("event", json!("earthquake")), 422, "unknown"),
        create(but("request_id", json!("x".repeat(129))), 422, "128"),
        create(but("request_id", json!("")), 400, "1 to 128"),
        create(manifest(""), 422, "empty"),
        create(manifest("name: x\n"), 422, "actions"),
        create(manifest("name: x\nactions:\n  a:\n    comands: [x]\n"), 422, "commands"),
        create(manifest("name: x\nactions:\n  a:\n    needs: [b]\n    commands: [x]\n"), 422, "manifest:4"),
        create(manifest("a: &a [*a]\n"), 422, "manifest:1"),
        create(
            manifest("name: x\nactions:\n  a:\n    matrix: {}\n    commands: [x]\n"),
            422,
            "not offered yet",
        ),
        create(Body::Raw("multipart/form-data; boundary=x", b"--x\r\n".to_vec()), 400, "form"),
        create(
            Body::Raw(
                "multipart/form-data; boundary=x",
                b"--x\r\ncontent-disposition: form-data; name=\"odd\"\r\n\r\n1\r\n--x--\r\n".to_vec(),
            ),
            400,
            "unknown field",
        ),
    ]
}

fn other_wrong_calls() -> Vec<Wrong> {
    let get = |path: &str, status, says| wrong("GET", path, Body::None, status, says);
    let of = |rest: &str| format!("/api/v1/pipelines/{NOWHERE}{rest}");
    let rerun = |body, status, says| wrong("POST", of("/rerun"), body, status, says);
    vec![
        get("/api/v1/pipelines?limit=0", 400, "1 to 200"),
        get("/api/v1/pipelines?limit=201", 400, "1 to 200"),
        get("/api/v1/pipelines?limit=many", 400, "limit"),
        get("/api/v1/pipelines?cursor=7", 400, "cursor"),
        get("/api/v1/pipelines?cursor=before-x", 400, "cursor"),
        get("/api/v1/pipelines?state=lost", 400, "state"),
        get("/api/v1/pipelines?surprise=1", 400, "surprise"),
        get("/api/v1/pipelines/7", 404, "there is nothing at"),
        get("/api/v1/pipelines/..%2f..%2fetc%2fpasswd", 404, "there is nothing at"),
        get(&of(""), 404, "no such pipeline"),
        get(&of("/watch"), 404, "no such pipeline"),
        get(&of("/actions"), 404, "no such pipeline"),
        get(&of("/manifest"), 404, "no such pipeline"),
        wrong("POST", of("/cancel"), Body::None, 404, "no such pipeline"),
        rerun(Body::Json(json!({"request_id": "1", "scope": "all"})), 404, "no such pipeline"),
        rerun(Body::Json(json!({"request_id": "1", "scope": "some"})), 422, "some"),
        rerun(Body::Json(json!({"scope": "all"})), 422, "request_id"),
        rerun(Body::Json(json!({"request_id": "", "scope": "all"})), 422, "shorter"),
        get(&format!("/api/v1/actions/{NOWHERE}"), 404, "no such action"),
        get(&format!("/api/v1/actions/{NOWHERE}/why"), 404, "no such action"),
        get(&format!("/api/v1/actions/{NOWHERE}/attempts/1/log"), 404, "no such attempt"),
        get(&format!("/api/v1/actions/{NOWHERE}/attempts/-1/log"), 404, "there is nothing at"),
        get(&format!("/api/v1/actions/{NOWHERE}/attempts/1/log/follow?from=x"), 400, "from"),
        wrong(
            "POST",
            format!("/api/v1/agents/{NOWHERE}/drain"),
            Body::Json(json!({"drained": true})),
            404,
            "no such agent",
        ),
        get("/api/v1/nothing", 404, "there is nothing at"),
        get("/", 404, "there is nothing at"),
        wrong("DELETE", "/api/v1/pipelines", Body::None, 405, "does not take"),
        wrong("PUT", "/healthz", Body::None, 405, "does not take"),
    ]
}

#[tokio::test]
async fn wrong_calls_get_the_right_answer() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let calls: Vec<Wrong> = wrong_creates().into_iter().chain(other_wrong_calls()).collect();
    assert!(calls.len() >= 40);
    let mut unexpected = Vec::new();
    for (index, call) in calls.into_iter().enumerate() {
        let method: reqwest::Method = call.method.parse().unwrap();
        let mut request = world
            .http
            .request(method, format!("{}{}", world.url, call.path))
            .bearer_auth(world.token.expose());
        request = match call.body {
            Body::None => request,
            Body::Json(body) => request.json(&body),
            Body::Raw(kind, bytes) => request.header("content-type", kind).body(bytes),
        };
        let response = request.send().await.unwrap();
        let (status, kind) = (response.status().as_u16(), response.headers().get("content-type").cloned());
        let text = response.text().await.unwrap();
        let shown = format!("call {index}, {} {}: {status} {text}", call.method, call.path);
        let problem: Value = serde_json::from_str(&text).unwrap_or_default();
        let said = format!("{} {}", problem["title"], problem["detail"]).to_lowercase();
        let is_right = status == call.status
            && kind.is_some_and(|kind| kind == "application/problem+json")
            && said.contains(&call.says.to_lowercase())
            && problem["status"] == call.status;
        if !is_right {
            unexpected.push(format!("{shown}: it is not {} with `{}`", call.status, call.says));
        }
    }
    assert!(unexpected.is_empty(), "{}", unexpected.join("\n"));
    world.create(GOOD).await; // and it goes on
}

#[tokio::test]
async fn who_may_not_is_told_so() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    for route in sealci_controller::api::routes() {
        let needed = match route.access {
            Access::Anyone => continue,
            Access::Role(role) => Some(role),
            Access::Ticket => None,
        };
        let path = ["pipeline_id", "action_id", "agent_id", "artifact_id", "cache_id", "*path"]
            .iter()
            .fold(route.path.to_owned(), |path, name| path.replace(&format!("{{{name}}}"), NOWHERE))
            .replace("{number}", "1")
            .replace("{attempt}", &format!("{NOWHERE}.1"))
            .replace("{digest}", "sha256:0");
        let method: reqwest::Method = route.method.to_uppercase().parse().unwrap();
        let call = || world.http.request(method.clone(), format!("{}{path}", world.url));
        let without = call().send().await.unwrap();
        assert_eq!(without.status(), 401, "{path}");
        assert_eq!(without.headers()["www-authenticate"], "Bearer");
        assert_eq!(call().bearer_auth("guess").send().await.unwrap().status(), 401, "{path}");
        let reader = call().bearer_auth(world.read_token.expose()).send().await.unwrap();
        match needed {
            Some(needed) => assert_eq!(reader.status() == 403, needed > Role::Read, "{path}"),
            None => assert_eq!(reader.status(), 401, "no role opens what a ticket opens: {path}"),
        }
    }
}

#[tokio::test]
async fn a_form_makes_a_pipeline_too() {
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let form = || {
        reqwest::multipart::Form::new()
            .text("repo_url", "https://forge.example.org/o/r.git")
            .part("body", reqwest::multipart::Part::text(GOOD).file_name("pipeline.yaml"))
            .text("revision", REVISION)
            .text("ref", "refs/heads/main")
    };
    let url = format!("{}/api/v1/pipelines", world.url);
    let send = || world.http.post(&url).bearer_auth(world.token.expose()).multipart(form()).send();
    assert_eq!(send().await.unwrap().status(), 201);
    assert_eq!(send().await.unwrap().status(), 200);
    let with_key = || {
        let request = world.http.post(&url).bearer_auth(world.token.expose()).multipart(form());
        request.header("idempotency-key", "by hand").send()
    };
    assert_eq!(with_key().await.unwrap().status(), 201, "by hand it is another event");
    assert_eq!(with_key().await.unwrap().status(), 200);
}

#[tokio::test]
async fn lists_are_paged_and_filtered() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        for number in 0..5 {
            let mut body = push(GOOD);
            body["revision"] = json!(format!("{number:040x}"));
            body["ref"] = json!(if number % 2 == 0 { "refs/heads/even" } else { "refs/heads/odd" });
            assert_eq!(world.post("/api/v1/pipelines", body).await.0, 201);
        }
        let mut numbers = Vec::new();
        let mut path = "/api/v1/pipelines?limit=2".to_owned();
        loop {
            let page = world.get(&path).await;
            numbers.extend(
                page["pipelines"].as_array().unwrap().iter().map(|row| row["number"].as_i64().unwrap()),
            );
            match page["next"].as_str() {
                Some(next) => path = format!("/api/v1/pipelines?limit=2&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(numbers, [5, 4, 3, 2, 1]);
        let count = async |query: &str| {
            world.get(&format!("/api/v1/pipelines?{query}")).await["pipelines"].as_array().unwrap().len()
        };
        let fourth = world.get("/api/v1/pipelines?number=4").await;
        assert_eq!(fourth["pipelines"][0]["number"], 4);
        assert!(fourth["next"].is_null() && fourth["pipelines"].as_array().unwrap().len() == 1, "{fourth}");
        assert_eq!(count("number=6").await, 0);
        assert_eq!(count("ref=even").await, 3);
        assert_eq!(count("ref=refs/heads/odd").await, 2);
        assert_eq!(count("repository=git@forge.example.org:o/r").await, 5);
        assert_eq!(count("repository=elsewhere/x").await, 0);
        assert_eq!(count("state=queued").await, 5);
        assert_eq!(count("outcome=failed").await, 0);
    }
}

/// 200 deliveries of 20 events side by side: 20 pipelines, and nobody is turned away (I4).
#[tokio::test]
async fn deliveries_side_by_side_make_one_pipeline_each() {
    let folder = tempfile::tempdir().unwrap();
    for database in databases(folder.path()).await {
        let world = World::on(database, LONG).await;
        let deliveries = (0..200).map(|number| {
            let mut body = push(GOOD);
            body["revision"] = json!(format!("{:040x}", number % 20));
            world.post("/api/v1/pipelines", body)
        });
        let answers = futures_util::future::join_all(deliveries).await;
        let made = answers.iter().filter(|(status, _)| *status == 201).count();
        let stood = answers.iter().filter(|(status, _)| *status == 200).count();
        assert_eq!((made, stood), (20, 180));
    }
}

#[tokio::test]
async fn too_many_creates_at_once_are_told_to_come_again() {
    use tokio::io::AsyncWriteExt;
    let (_folder, database) = sqlite();
    let world = World::on(database, LONG).await;
    let _line = world.line().await;
    let address = world.url.trim_start_matches("http://").to_owned();
    // Sixteen bodies of 2 MiB that do not come are all that is let in.
    let mut slow = Vec::new();
    for _ in 0..16 {
        let mut connection = tokio::net::TcpStream::connect(&address).await.unwrap();
        let head = format!(
            "POST /api/v1/pipelines HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n",
            world.token.expose(),
            2 << 20
        );
        connection.write_all(head.as_bytes()).await.unwrap();
        slow.push(connection);
    }
    let create = || {
        let request = world.http.post(format!("{}/api/v1/pipelines", world.url)).json(&push(GOOD));
        request.bearer_auth(world.token.expose()).send()
    };
    let refused = within(async {
        loop {
            let response = create().await.unwrap();
            if response.status() == 429 {
                return response;
            }
        }
    });
    let refused = refused.await;
    assert_eq!(refused.headers()["retry-after"], "1");
    let problem: Value = refused.json().await.unwrap();
    assert!(problem["detail"].as_str().unwrap().contains("too many"), "{problem}");
    // Reading is not in its way.
    assert!(world.get("/api/v1/pipelines").await["pipelines"].is_array());
    drop(slow);
    let taken = within(async { while create().await.unwrap().status() == 429 {} });
    taken.await;
}
