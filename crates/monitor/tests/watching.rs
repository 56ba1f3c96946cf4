//! Pushes to real repositories become events at the controller: the right ones, all of them, once.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test

mod support;

use std::time::{Duration, Instant};

use sealci_git::testing::{Mode as ServerMode, SmartHttp};
use sealci_git::{Credentials, Secret};
use serde_json::json;
use support::{Bench, Mode, text};

#[tokio::test]
async fn what_stands_is_the_baseline_and_a_push_is_an_event() {
    for bench in Bench::on_each_database().await {
        let repository = bench.repository("a");
        repository.push_file("main", "a", "1");
        let monitor = bench.start().await;
        let path = monitor.add_and_wait(json!({"repository_url": repository.file_url()})).await;
        let pushed = repository.push_file("main", "a", "2");
        let events = bench.controller.wait_for(1).await;
        let expected = json!({
            "repo_url": repository.file_url(), "ref": "refs/heads/main", "revision": pushed.as_str(),
            "event": "push", "manifest_path": ".sealci/pipeline.yaml",
        });
        assert_eq!(events, [expected]);
        let shown = monitor.wait_until(&path, |shown| !shown["last_delivery"].is_null()).await;
        assert_eq!(text(&shown["last_delivery"], "outcome"), "accepted");
        assert_eq!(text(&shown["last_delivery"], "pipeline_id"), "pipeline-0");
        monitor.settle(&path).await;
        assert_eq!(bench.controller.taken().len(), 1);
        monitor.stop().await;
    }
}

#[tokio::test]
async fn a_push_is_seen_within_one_interval() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    monitor.add_and_wait(json!({"repository_url": repository.file_url(), "poll_interval_ms": 1000})).await;
    repository.push_file("main", "a", "1");
    let pushed = Instant::now();
    bench.controller.wait_for(1).await;
    assert!(pushed.elapsed() < Duration::from_secs(2), "{:?}", pushed.elapsed());
    monitor.stop().await;
}

#[tokio::test]
async fn what_exists_is_built_where_asked() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let revision = repository.push_file("main", "a", "1");
    let monitor = bench.start().await;
    monitor.add(json!({"repository_url": repository.file_url(), "build_existing": true})).await;
    assert_eq!(text(&bench.controller.wait_for(1).await[0], "revision"), revision.as_str());
    monitor.stop().await;
}

#[tokio::test]
async fn filters_and_kinds_choose_and_annotated_tags_lead_to_their_commit() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let first = repository.push_file("main", "a", "1");
    let monitor = bench.start().await;
    let path = monitor
        .add_and_wait(json!({
            "repository_url": repository.file_url(), "events": ["push", "tag"],
            "branches": ["main", "release/**", "!release/wip"], "tags": ["v*"],
        }))
        .await;
    for branch in ["other", "release/wip", "release/1/x"] {
        repository.git(&["push", "--quiet", "origin", &format!("HEAD:refs/heads/{branch}")]);
    }
    repository.git(&["tag", "-a", "-m", "annotated", "v1"]);
    repository.git(&["tag", "nightly"]);
    repository.push("--tags");
    bench.controller.wait_for(2).await;
    monitor.settle(&path).await;
    let mut refs = bench.controller.refs();
    refs.sort();
    let expected =
        ["refs/heads/release/1/x", "refs/tags/v1"].map(|name| (name.to_owned(), first.to_string()));
    assert_eq!(refs, expected);
    let kinds: Vec<_> = bench.controller.taken().iter().map(|event| text(event, "event")).collect();
    assert!(kinds.contains(&"tag".to_owned()) && kinds.contains(&"push".to_owned()));

    // Wanting more makes no events of what was seen before, only of what comes.
    let wider = json!({"repository_url": repository.file_url(), "events": ["push", "tag"]});
    assert_eq!(monitor.ask("PUT", &path, Some(wider)).await.0, 200);
    monitor.settle(&path).await;
    assert_eq!(bench.controller.taken().len(), 2);
    repository.push_file("other", "a", "2");
    bench.controller.wait_for(3).await;
    monitor.stop().await;
}

#[tokio::test]
async fn a_branch_that_goes_and_comes_back_is_new() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    repository.push_file("main", "a", "1");
    let monitor = bench.start().await;
    let path = monitor.add_and_wait(json!({"repository_url": repository.file_url()})).await;
    repository.push("HEAD:refs/heads/topic");
    bench.controller.wait_for(1).await;
    repository.push(":refs/heads/topic");
    monitor.settle(&path).await;
    assert_eq!(bench.controller.taken().len(), 1, "a deletion is no event");
    repository.push("HEAD:refs/heads/topic");
    let events = bench.controller.wait_for(2).await;
    assert_eq!(events[0], events[1], "the same event, which the controller knows again");
    monitor.stop().await;
}

#[tokio::test]
async fn a_restart_misses_nothing_and_doubles_nothing() {
    for bench in Bench::on_each_database().await {
        let repository = bench.repository("a");
        repository.push_file("main", "a", "1");
        let monitor = bench.start().await;
        let path = monitor.add_and_wait(json!({"repository_url": repository.file_url()})).await;
        let first = repository.push_file("main", "a", "2");
        bench.controller.wait_for(1).await;
        monitor.wait_until(&path, |shown| shown["undelivered"] == 0).await;
        monitor.stop().await;

        repository.push_file("main", "a", "3");
        let second = repository.push_file("main", "a", "4");
        let new = repository.push_file("topic", "a", "5");
        let monitor = bench.start().await;
        bench.controller.wait_for(3).await;
        monitor.settle(&path).await;
        let mut refs = bench.controller.refs();
        refs[1..].sort();
        let expected = [("main", &first), ("main", &second), ("topic", &new)]
            .map(|(branch, revision)| (format!("refs/heads/{branch}"), revision.to_string()));
        assert_eq!(refs, expected, "each once, for the newest revision only");
        monitor.stop().await;
    }
}

#[tokio::test]
async fn events_found_while_the_controller_is_away_survive_a_kill_and_go_out_in_order() {
    for bench in Bench::on_each_database().await {
        let repository = bench.repository("a");
        repository.push_file("main", "a", "1");
        let monitor = bench.start().await;
        let path = monitor.add_and_wait(json!({"repository_url": repository.file_url()})).await;
        bench.controller.set_mode(Mode::Down);
        let mut pushed = Vec::new();
        for content in 2..5_u64 {
            pushed.push(repository.push_file("main", "a", &content.to_string()).to_string());
            monitor.wait_until(&path, |shown| shown["undelivered"] == content - 1).await;
        }
        let shown =
            monitor.wait_until(&path, |shown| text(&shown["last_delivery"], "outcome") == "failing").await;
        assert!(text(&shown["last_delivery"], "error").contains("503"), "{shown}");
        monitor.kill().await;

        let monitor = bench.start().await;
        monitor.wait_until(&path, |shown| shown["undelivered"] == 3).await;
        bench.controller.set_mode(Mode::Accept);
        bench.controller.wait_for(3).await;
        monitor.wait_until(&path, |shown| shown["undelivered"] == 0).await;
        let revisions: Vec<_> = bench.controller.refs().into_iter().map(|(_, revision)| revision).collect();
        assert_eq!(revisions, pushed);
        monitor.stop().await;
    }
}

#[tokio::test]
async fn an_event_whose_answer_is_lost_goes_out_again_as_the_same() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    let path =
        monitor.add_and_wait(json!({"repository_url": repository.file_url(), "manifest": "name: x\n"})).await;
    bench.controller.set_mode(Mode::TakeAndDie);
    repository.push_file("main", "a", "1");
    bench.controller.wait_for(1).await;
    // Killed between the controller's commit and its answer; and what makes the identity is changed before the repeat.
    monitor.kill().await;
    let monitor = bench.start().await;
    let (status, _) =
        monitor.ask("PUT", &format!("{path}/actions-file"), Some(json!({"body": "name: y\n"}))).await;
    assert_eq!(status, 200);
    bench.controller.set_mode(Mode::Accept);
    monitor.wait_until(&path, |shown| shown["undelivered"] == 0).await;
    let taken = bench.controller.taken();
    assert!(taken.len() >= 2);
    assert!(taken.iter().all(|event| *event == taken[0]), "{taken:?}");
    assert_eq!(text(&taken[0], "body"), "name: x\n");
    monitor.stop().await;
}

#[tokio::test]
async fn a_refused_event_is_shown_with_its_reason_and_does_not_hold_up_the_next() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let monitor = bench.start().await;
    let path = monitor.add_and_wait(json!({"repository_url": repository.file_url()})).await;
    bench.controller.set_mode(Mode::Refuse);
    repository.push_file("main", "a", "1");
    let shown =
        monitor.wait_until(&path, |shown| text(&shown["last_delivery"], "outcome") == "refused").await;
    assert_eq!(text(&shown["last_delivery"], "error"), "there is no .sealci/pipeline.yaml");
    assert_eq!(shown["undelivered"], 0);
    bench.controller.set_mode(Mode::Accept);
    let second = repository.push_file("main", "a", "2");
    bench.controller.wait_for(1).await;
    assert_eq!(bench.controller.refs(), [("refs/heads/main".to_owned(), second.to_string())]);
    monitor.stop().await;
}

#[tokio::test]
async fn a_repository_that_hangs_or_fails_delays_no_other() {
    let bench = Bench::new().await;
    let hanging = bench.repository("hanging");
    hanging.push_file("main", "a", "1");
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    server.set_mode(ServerMode::Hang);
    let good = bench.repository("good");
    let monitor = bench.start_with(|config| config.git.limits.query_timeout = Duration::from_secs(3)).await;
    let stuck = monitor.add(json!({"repository_url": format!("{}/hanging.git", server.url)})).await;
    let gone =
        monitor.add(json!({"repository_url": format!("file://{}/none.git", bench.root().display())})).await;
    monitor.add_and_wait(json!({"repository_url": good.file_url()})).await;
    let pushed = Instant::now();
    good.push_file("main", "a", "1");
    bench.controller.wait_for(1).await;
    assert!(pushed.elapsed() < Duration::from_secs(2), "{:?}", pushed.elapsed());

    let shown = monitor.wait_until(&stuck, |shown| shown["last_poll"]["error"].is_string()).await;
    assert!(text(&shown["last_poll"], "error").contains("longer than 3 s"), "{shown}");
    let shown = monitor.wait_until(&gone, |shown| shown["last_poll"]["error"].is_string()).await;
    assert!(text(&shown["last_poll"], "error").contains("no such repository"), "{shown}");
    // And it is found again by itself.
    server.set_mode(ServerMode::Serve);
    monitor.wait_until(&stuck, |shown| shown["last_poll"]["error"].is_null()).await;
    monitor.stop().await;
}

#[tokio::test]
async fn a_private_repository_is_watched_with_named_credentials() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let server = SmartHttp::start(bench.root(), Some(("git", "hunter2"))).await.unwrap();
    let token = Credentials::Token { username: "git".into(), secret: Secret::new("hunter2") };
    let monitor = bench.start_with(|config| drop(config.credentials.insert("forge".into(), token))).await;
    let url = format!("{}/a.git", server.url);
    let path = monitor.add_and_wait(json!({"repository_url": url, "credentials": "forge"})).await;
    repository.push_file("main", "a", "1");
    bench.controller.wait_for(1).await;
    let without = monitor.add(json!({"repository_url": url})).await;
    let shown = monitor.wait_until(&without, |shown| shown["last_poll"]["error"].is_string()).await;
    assert!(text(&shown["last_poll"], "error").contains("credentials"), "{shown}");
    assert!(!monitor.show(&path).await.to_string().contains("hunter2"));
    monitor.stop().await;
}

#[tokio::test]
async fn a_poll_can_be_asked_for_and_a_disabled_repository_is_left_alone() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    let monitor = bench.start_with(|config| config.poll_interval = Duration::from_secs(3600)).await;
    let settings = json!({"repository_url": format!("{}/a.git", server.url)});
    let path = monitor.add_and_wait(settings.clone()).await;
    repository.push_file("main", "a", "1");
    assert_eq!(monitor.ask("POST", &format!("{path}/poll"), None).await.0, 202);
    bench.controller.wait_for(1).await;

    let mut disabled = settings.clone();
    disabled["enabled"] = false.into();
    assert_eq!(monitor.ask("PUT", &path, Some(disabled)).await.0, 200);
    assert_eq!(monitor.ask("POST", &format!("{path}/poll"), None).await.0, 409);
    let pushed = repository.push_file("main", "a", "2");
    let requests = server.requests();
    // Enabling it again looks at once, and finds what came meanwhile.
    assert_eq!(monitor.ask("PUT", &path, Some(settings)).await.0, 200);
    assert_eq!(text(&bench.controller.wait_for(2).await[1], "revision"), pushed.as_str());
    assert!(server.requests() > requests);

    assert_eq!(monitor.ask("DELETE", &path, None).await.0, 204);
    assert_eq!(monitor.ask("GET", &path, None).await.0, 404);
    monitor.stop().await;
}

#[tokio::test]
async fn another_repository_starts_from_its_own_baseline() {
    for bench in Bench::on_each_database().await {
        let (a, b) = (bench.repository("a"), bench.repository("b"));
        a.push_file("main", "a", "1");
        b.push_file("main", "b", "1");
        let monitor = bench.start().await;
        let path = monitor.add_and_wait(json!({"repository_url": a.file_url()})).await;
        assert_eq!(monitor.ask("PUT", &path, Some(json!({"repository_url": b.file_url()}))).await.0, 200);
        monitor.settle(&path).await;
        assert_eq!(bench.controller.taken().len(), 0);
        a.push_file("main", "a", "2");
        let pushed = b.push_file("main", "b", "2");
        bench.controller.wait_for(1).await;
        monitor.settle(&path).await;
        assert_eq!(bench.controller.refs(), [("refs/heads/main".to_owned(), pushed.to_string())]);
        monitor.stop().await;
    }
}

#[tokio::test]
async fn many_repositories_and_many_refs_are_watched_side_by_side() {
    let bench = Bench::new().await;
    let repository = bench.repository("a");
    let revision = repository.push_file("main", "a", "1");
    // More refs than one statement inserts.
    let packed: String = (0..2500).map(|number| format!("{revision} refs/heads/b{number}\n")).collect();
    std::fs::write(repository.bare.join("packed-refs"), packed).unwrap();
    let monitor = bench.start_with(|config| config.poll_interval = Duration::from_secs(3600)).await;
    let mut paths = Vec::new();
    for _ in 0..20 {
        paths.push(monitor.add(json!({"repository_url": repository.file_url()})).await);
    }
    for path in &paths {
        monitor
            .wait_until(path, |shown| shown["last_poll"]["error"].is_null() && !shown["last_poll"].is_null())
            .await;
    }
    let pushed = repository.push_file("b1", "a", "2");
    for path in &paths {
        assert_eq!(monitor.ask("POST", &format!("{path}/poll"), None).await.0, 202);
    }
    let events = bench.controller.wait_for(20).await;
    assert!(events.iter().all(|event| *event == events[0] && text(event, "revision") == pushed.as_str()));
    monitor.stop().await;
}
