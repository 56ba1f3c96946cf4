//! Follows a push from the repository to its pipeline's end, through services that are killed on the way.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Instant;

use sealci_tests::{Installation, Part, Repository, eventually};
use serde_json::Value;

const MANIFEST: &str = "name: push
actions:
  first:
    configuration: {executor: process}
    commands:
      - cat version
  second:
    configuration: {executor: process}
    commands: [echo second]
";

/// A repository that is watched, and has been looked at once.
fn watched(installation: &Installation) -> Repository {
    let repository = Repository::with_manifest(installation.scratch("repository"), MANIFEST);
    let added = installation.sealci(&["repo", "add", &repository.url(), "--poll", "1"]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    wait_for_look(installation);
    repository
}

fn wait_for_look(installation: &Installation) {
    eventually("the monitor to look at the repository", || {
        installation.json(&["repo", "list"])[0]["last_poll"]["at"].as_str().map(|_| ())
    });
}

/// The pipelines of a revision.
fn pipelines_of(installation: &Installation, revision: &str) -> Vec<Value> {
    let page = installation.json(&["list", "--revision", revision]);
    page["pipelines"].as_array().cloned().unwrap_or_default()
}

fn finished(installation: &Installation, revision: &str) -> Value {
    eventually("the push's pipeline to finish", || {
        pipelines_of(installation, revision).pop().filter(|pipeline| pipeline["state"] == "finished")
    })
}

#[test]
fn a_push_becomes_a_pipeline_of_exactly_its_revision() {
    let installation = Installation::start();
    let repository = watched(&installation);
    assert!(
        pipelines_of(&installation, &repository.git(&["rev-parse", "HEAD"])).is_empty(),
        "the baseline is no event"
    );

    repository.write("version", "1\n");
    let first = repository.commit("One");
    let pushed = Instant::now();
    eventually("the push to be seen", || pipelines_of(&installation, &first).pop());
    let seen_after = pushed.elapsed();
    repository.write("version", "2\n");
    let second = repository.commit("Two");

    for (revision, version) in [(&first, "1\n"), (&second, "2\n")] {
        let pipeline = finished(&installation, revision);
        assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
        assert_eq!(pipeline["event"], "push");
        let log = installation.sealci(&["logs", &pipeline["number"].to_string(), "first"]);
        assert_eq!(String::from_utf8(log.stdout).unwrap(), version, "the action saw its own revision");
    }
    assert!(seen_after.as_secs_f64() < 3.0, "one poll interval and a little: {seen_after:?}");
}

#[test]
fn a_push_survives_the_death_of_each_service() {
    for part in Part::ALL {
        let mut installation = Installation::start();
        let repository = watched(&installation);
        installation.kill(part);
        repository.write("version", &format!("{part:?}\n"));
        let revision = repository.commit("While it is dead");
        installation.start_part(part);
        let pipeline = finished(&installation, &revision);
        assert_eq!(pipeline["outcome"], "succeeded", "{part:?}: {pipeline}");
        assert_eq!(pipelines_of(&installation, &revision).len(), 1, "{part:?}");
    }
}

#[test]
fn what_is_no_longer_watched_makes_no_events() {
    let installation = Installation::start();
    let repository = watched(&installation);
    let removed = installation.sealci(&["repo", "remove", &repository.url()]);
    assert!(removed.status.success(), "{}", String::from_utf8_lossy(&removed.stderr));
    assert_eq!(installation.json(&["repo", "list"]), Value::Array(Vec::new()));
    let again = installation.sealci(&["repo", "remove", &repository.url()]);
    assert_eq!(again.status.code(), Some(2));
}

#[test]
fn the_demo_ends_with_its_pipelines_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let installation = Installation::none();
    let output = installation
        .command(&["up", "--demo", "--exit", "--data", &data.display().to_string()])
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{shown}{}", String::from_utf8_lossy(&output.stderr));
    assert!(shown.contains("count | line 5 of 5"), "{shown}");
    assert!(fs::metadata(data.join("client.json")).is_ok());
}
