//! The API as a client meets it, and as its document says it is.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test

mod support;

use std::collections::BTreeSet;

use sealci_monitor::route_table;
use serde_json::{Value, json};
use support::{Bench, text};

fn document() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../api/openapi/monitor.yaml");
    serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_routes_are_those_of_the_document() {
    let document = document();
    let mut written = BTreeSet::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            assert!(operation["operationId"].is_string(), "{method} {path}");
            let open = operation["security"].as_array().is_some_and(Vec::is_empty);
            written.insert((method.to_uppercase(), path.clone(), !open));
        }
    }
    let served: BTreeSet<_> = route_table().into_iter().collect();
    assert_eq!(served, written);
}

/// Checks an answer's members against a schema of the document: all required, none unknown.
fn assert_fits(schema: &Value, answer: &Value, what: &str) {
    let document = document();
    let schema = schema["$ref"].as_str().map_or(schema.clone(), |name| {
        document["components"]["schemas"][name.rsplit('/').next().unwrap()].clone()
    });
    if let Some(properties) = schema["properties"].as_object() {
        for required in schema["required"].as_array().into_iter().flatten() {
            assert!(!answer[required.as_str().unwrap()].is_null(), "{what} lacks {required}");
        }
        for (member, value) in answer.as_object().unwrap() {
            let property = properties.get(member).unwrap_or_else(|| panic!("{what} has an unknown {member}"));
            assert_fits(property, value, &format!("{what}.{member}"));
        }
    }
    if let (Some(items), Some(values)) = (schema.get("items"), answer.as_array()) {
        values.iter().for_each(|value| assert_fits(items, value, &format!("{what}[]")));
    }
    if let Some(allowed) = schema["enum"].as_array() {
        assert!(allowed.contains(answer), "{what} is {answer}");
    }
    let fits = match schema["type"].as_str() {
        Some("string") => answer.is_string(),
        Some("integer") => answer.is_i64() || answer.is_u64(),
        Some("boolean") => answer.is_boolean(),
        Some("array") => answer.is_array(),
        Some("object") => answer.is_object(),
        _ => true,
    };
    assert!(fits, "{what} is {answer}");
}

fn schema(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

#[tokio::test]
async fn answers_have_the_form_of_the_document() {
    for bench in Bench::on_each_database().await {
        let repository = bench.repository("a");
        let monitor = bench.start().await;
        let everything = json!({
            "repository_url": repository.file_url(), "events": ["tag", "push"], "branches": ["**", "!x"],
            "tags": ["v*"], "manifest_path": "ci.yaml", "manifest": "name: x\n", "poll_interval_ms": 60_000,
            "enabled": true, "build_existing": true,
        });
        for settings in [json!({"repository_url": repository.file_url()}), everything.clone()] {
            let (status, answer) = monitor.ask("POST", "/api/v1/configurations", Some(settings)).await;
            assert_eq!(status, 201);
            assert_fits(&schema("Configuration"), &answer, "the new configuration");
        }
        repository.push_file("main", "a", "1");
        bench.controller.wait_for(1).await;
        let (_, page) = monitor.ask("GET", "/api/v1/configurations", None).await;
        assert_fits(&schema("ConfigurationPage"), &page, "the page");
        let newest = &page["configurations"][0];
        for member in ["repository_url", "events", "branches", "tags", "manifest_path", "poll_interval_ms"] {
            assert_eq!(newest[member], everything[member], "{member}");
        }
        assert_eq!(newest["uploaded_manifest"], true);
        for path in ["/healthz", "/readyz"] {
            let response = monitor.request("GET", path).send().await.unwrap();
            assert_eq!(response.status(), 200);
            assert_fits(&schema("Health"), &response.json().await.unwrap(), path);
        }
        monitor.stop().await;
    }
}

#[tokio::test]
async fn pages_hold_everything_once() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    let mut added = Vec::new();
    for _ in 0..5 {
        added.push(monitor.add(json!({"repository_url": repository.file_url(), "enabled": false})).await);
    }
    added.reverse();
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let (status, page) =
            monitor.ask("GET", &format!("/api/v1/configurations?limit=2{cursor}"), None).await;
        assert_eq!(status, 200);
        let shown = page["configurations"].as_array().unwrap();
        seen.extend(shown.iter().map(|shown| format!("/api/v1/configurations/{}", text(shown, "id"))));
        match page["next"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(seen, added);
    monitor.stop().await;
}

#[tokio::test]
async fn a_manifest_is_uploaded_shown_and_taken_away() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    let path = monitor.add_and_wait(json!({"repository_url": repository.file_url()})).await;
    let file = format!("{path}/actions-file");
    assert_eq!(monitor.ask("GET", &file, None).await.0, 404);
    let plain = monitor.request("PUT", &file).bearer_auth(bench.admin.expose());
    let plain =
        plain.header("content-type", "text/yaml; charset=utf-8").body("name: été\n").send().await.unwrap();
    assert_eq!(plain.status(), 200);
    assert_eq!(monitor.ask("GET", &file, None).await, (200, json!({"body": "name: été\n"})));
    let (status, shown) = monitor.ask("PUT", &file, Some(json!({"body": "name: z\n"}))).await;
    assert_eq!((status, &shown["uploaded_manifest"]), (200, &json!(true)));
    repository.push_file("main", "a", "1");
    let event = bench.controller.wait_for(1).await.remove(0);
    assert_eq!((text(&event, "body").as_str(), event.get("manifest_path")), ("name: z\n", None));
    // Changing other settings leaves it as it is.
    assert_eq!(
        monitor.ask("PUT", &path, Some(json!({"repository_url": repository.file_url()}))).await.0,
        200
    );
    assert_eq!(monitor.ask("GET", &file, None).await.0, 200);
    let (status, shown) = monitor.ask("DELETE", &file, None).await;
    assert_eq!((status, &shown["uploaded_manifest"]), (200, &json!(false)));
    assert_eq!(monitor.ask("GET", &file, None).await.0, 404);
    monitor.stop().await;
}

fn case(
    method: &'static str,
    path: impl Into<String>,
    body: Option<Value>,
    expected: u16,
) -> (&'static str, String, Option<Value>, u16) {
    (method, path.into(), body, expected)
}

#[tokio::test]
async fn bad_requests_get_the_right_problem() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    let url = repository.file_url();
    let one = monitor.add(json!({"repository_url": url, "enabled": false})).await;
    let none = "/api/v1/configurations/018f0000-0000-7000-8000-000000000000";
    let all = "/api/v1/configurations";
    let file = format!("{one}/actions-file");
    let big = "x".repeat((1 << 20) + 1);
    let cases = [
        case("GET", "/nothing", None, 404),
        case("GET", "/api/v1/configurations/", None, 404),
        case("GET", "/api/v1/configurations/not-an-id", None, 404),
        case("GET", "/api/v1/configurations/..%2f..%2fetc", None, 404),
        case("PATCH", all, None, 405),
        case("GET", none, None, 404),
        case("PUT", none, Some(json!({"repository_url": url})), 404),
        case("DELETE", none, None, 404),
        case("POST", format!("{none}/poll"), None, 404),
        case("GET", format!("{none}/actions-file"), None, 404),
        case("PUT", format!("{none}/actions-file"), Some(json!({"body": "x"})), 404),
        case("GET", format!("{all}?limit=0"), None, 400),
        case("GET", format!("{all}?limit=201"), None, 400),
        case("GET", format!("{all}?limit=-1"), None, 400),
        case("GET", format!("{all}?limit=x"), None, 400),
        case("GET", format!("{all}?cursor=%00"), None, 400),
        case("POST", all, None, 415),
        case("POST", all, Some(json!([])), 422),
        case("POST", all, Some(json!({})), 422),
        case("POST", all, Some(json!({"repository_url": 7})), 422),
        case("POST", all, Some(json!({"repository_url": url, "colour": "red"})), 422),
        case("POST", all, Some(json!({"repository_url": ""})), 422),
        case("POST", all, Some(json!({"repository_url": "--upload-pack=x"})), 422),
        case("POST", all, Some(json!({"repository_url": "ext::sh -c x"})), 422),
        case("POST", all, Some(json!({"repository_url": "git://h/o/r"})), 422),
        case("POST", all, Some(json!({"repository_url": "https://u:hunter2@h/o/r"})), 422),
        case("POST", all, Some(json!({"repository_url": format!("https://h/{big}")})), 422),
        case("POST", all, Some(json!({"repository_url": url, "credentials": "none"})), 422),
        case("POST", all, Some(json!({"repository_url": url, "events": ["pull_request"]})), 422),
        case("POST", all, Some(json!({"repository_url": url, "events": []})), 422),
        case("POST", all, Some(json!({"repository_url": url, "branches": [""]})), 422),
        case("POST", all, Some(json!({"repository_url": url, "branches": vec!["x"; 101]})), 422),
        case("POST", all, Some(json!({"repository_url": url, "manifest_path": "/etc/passwd"})), 422),
        case("POST", all, Some(json!({"repository_url": url, "manifest": big})), 422),
        case("POST", all, Some(json!({"repository_url": url, "poll_interval_ms": 0})), 422),
        case("POST", all, Some(json!({"repository_url": url, "poll_interval_ms": -5})), 422),
        case("POST", all, Some(json!({"repository_url": "x".repeat(5 << 20)})), 413),
        case("PUT", file.as_str(), Some(json!({"body": ""})), 422),
        case("PUT", file.as_str(), Some(json!({"body": big})), 422),
        case("POST", format!("{one}/poll"), None, 409),
    ];
    for (method, path, body, expected) in cases {
        let mut request = monitor.request(method, &path).bearer_auth(bench.admin.expose());
        if let Some(body) = &body {
            request = request.json(body);
        }
        let response = request.send().await.unwrap();
        let shown: String = format!("{method} {path} {body:?}").chars().take(150).collect();
        assert_eq!(response.status().as_u16(), expected, "{shown}");
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{shown}");
        let problem: Value = response.json().await.unwrap();
        assert_fits(&schema("Problem"), &problem, &shown);
        assert!(!problem.to_string().contains("hunter2"), "{problem}");
        assert_eq!(problem["status"], expected);
    }
    for (content_type, body, expected) in [
        ("application/json", b"{".to_vec(), 400),
        ("application/json", b"[".repeat(100_000), 422),
        ("text/plain", b"{}".to_vec(), 415),
    ] {
        let request = monitor.request("POST", all).bearer_auth(bench.admin.expose());
        let response = request.header("content-type", content_type).body(body).send().await.unwrap();
        assert_eq!(response.status().as_u16(), expected);
    }
    let request = monitor.request("PUT", &file).bearer_auth(bench.admin.expose());
    let response = request.header("content-type", "text/yaml").body(vec![0xff, 0xfe]).send().await.unwrap();
    assert_eq!(response.status(), 422);
    monitor.stop().await;
}

#[tokio::test]
async fn tokens_open_what_their_role_may() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    let one = monitor.add(json!({"repository_url": repository.file_url()})).await;
    let poll = format!("{one}/poll");
    let add = json!({"repository_url": repository.file_url()});
    let (read, run, admin) = (bench.read.expose(), bench.run.expose(), bench.admin.expose());
    let cases = [
        ("GET", one.as_str(), None, 401),
        ("GET", &one, Some("sealci_nonsense"), 401),
        ("GET", &one, Some(read), 200),
        ("POST", &poll, Some(read), 403),
        ("POST", &poll, Some(run), 202),
        ("POST", "/api/v1/configurations", Some(run), 403),
        ("POST", "/api/v1/configurations", None, 401),
        ("POST", "/api/v1/configurations", Some(admin), 201),
        ("PUT", &one, Some(run), 403),
        ("DELETE", &one, Some(run), 403),
        ("DELETE", &one, Some(admin), 204),
    ];
    for (method, path, token, expected) in cases {
        let mut request = monitor.request(method, path).json(&add);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status().as_u16(), expected, "{method} {path} with {token:?}");
        if expected == 401 {
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
        }
    }
    monitor.stop().await;
}
