//! Listing the refs of real repositories, over files and over HTTP, friendly and not.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test
mod support;

use std::error::Error as _;
use std::time::{Duration, Instant};

use sealci_git::testing::{Mode, SmartHttp};
use sealci_git::{RemoteError, RunError};
use support::{Bench, remote, remote_with_token};

/// The error and all its causes: nothing in it may be secret.
fn whole(error: &RemoteError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    format!("{text} {error:?}")
}

#[tokio::test]
async fn branches_and_tags_are_listed_with_their_commits() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    let first = repository.push_file("main", "a", "1");
    let second = repository.push_file("release/1", "a", "2");
    repository.git(&["tag", "light", first.as_str()]);
    repository.git(&["tag", "-a", "-m", "annotated", "v1", second.as_str()]);
    repository.push("--tags");
    repository.git_bare(&["update-ref", "refs/pull/1/head", second.as_str()]);
    let server = SmartHttp::start(bench.root(), None).await.unwrap();

    for url in [repository.file_url(), format!("{}/a.git", server.url)] {
        let refs = bench.git.ls_remote(&remote(&url)).await.unwrap();
        let found: Vec<_> = refs.iter().map(|found| (found.name.as_str(), found.revision.clone())).collect();
        let expected = [
            ("refs/heads/main", first.clone()),
            ("refs/heads/release/1", second.clone()),
            ("refs/tags/light", first.clone()),
            ("refs/tags/v1", second.clone()),
        ];
        assert_eq!(found, expected, "{url}");
    }
}

#[tokio::test]
async fn an_empty_repository_has_no_refs() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    assert_eq!(bench.git.ls_remote(&remote(&repository.file_url())).await.unwrap(), []);
}

#[tokio::test]
async fn a_private_repository_opens_to_its_token_only_and_the_token_stays_secret() {
    let bench = Bench::new();
    bench.repository("a").push_file("main", "a", "1");
    let server = SmartHttp::start(bench.root(), Some(("git", "hunter2"))).await.unwrap();
    let url = format!("{}/a.git", server.url);

    assert_eq!(bench.git.ls_remote(&remote_with_token(&url, "hunter2")).await.unwrap().len(), 1);
    let embedded = url.replace("http://", "http://git:hunter2@");
    assert_eq!(bench.git.ls_remote(&remote(&embedded)).await.unwrap().len(), 1);
    for bad in [remote(&url), remote_with_token(&url, "hunter3")] {
        let error = bench.git.ls_remote(&bad).await.unwrap_err();
        assert!(matches!(error, RemoteError::Authentication { .. }), "{error:?}");
        assert!(!whole(&error).contains("hunter3"), "{}", whole(&error));
    }
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let bench = Bench::new();
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    for url in [format!("{}/none.git", server.url), format!("file://{}/none.git", bench.root().display())] {
        let error = bench.git.ls_remote(&remote(&url)).await.unwrap_err();
        assert!(matches!(error, RemoteError::NotFound { .. }), "{error:?}");
    }
    server.set_mode(Mode::Fail(503));
    let error = bench.git.ls_remote(&remote(&format!("{}/a.git", server.url))).await.unwrap_err();
    assert!(matches!(error, RemoteError::Unreachable { .. }), "{error:?}");
    let error = bench.git.ls_remote(&remote("http://127.0.0.1:9/a.git")).await.unwrap_err();
    assert!(matches!(error, RemoteError::Unreachable { .. }), "{error:?}");
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_its_time_and_no_more() {
    let bench = Bench::with(|options| options.limits.query_timeout = Duration::from_secs(1));
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    server.set_mode(Mode::Hang);
    let started = Instant::now();
    let error = bench.git.ls_remote(&remote(&format!("{}/a.git", server.url))).await.unwrap_err();
    assert!(matches!(error, RemoteError::Git { source: RunError::TimedOut { .. }, .. }), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let bench = Bench::new();
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    server.set_mode(Mode::Redirect);
    let error = bench.git.ls_remote(&remote(&format!("{}/a.git", server.url))).await.unwrap_err();
    assert!(matches!(error, RemoteError::Redirected { .. }), "{error:?}");
}

#[tokio::test]
async fn local_addresses_are_refused_unless_allowed() {
    let bench = Bench::with(|options| options.allow_local_addresses = false);
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    for url in [server.url.clone(), server.url.replace("127.0.0.1", "localhost")] {
        let error = bench.git.ls_remote(&remote(&format!("{url}/a.git"))).await.unwrap_err();
        assert!(matches!(error, RemoteError::Address { .. }), "{error:?}");
    }
    assert_eq!(server.requests(), 0);
}

#[tokio::test]
async fn too_many_refs_are_refused() {
    let bench = Bench::with(|options| options.limits.max_refs = 3);
    let repository = bench.repository("a");
    for branch in ["a", "b", "c", "d"] {
        repository.push_file(branch, "a", branch);
    }
    let error = bench.git.ls_remote(&remote(&repository.file_url())).await.unwrap_err();
    assert!(matches!(error, RemoteError::TooManyRefs { max_refs: 3, .. }), "{error:?}");
}
