//! Follows a push from the repository to its pipeline's end, through services that are killed on the way.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;

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
    installation.watch(&repository.url());
    repository
}

fn finished(installation: &Installation, revision: &str) -> Value {
    eventually("the push's pipeline to finish", || {
        installation.pipelines_of(revision).pop().filter(|pipeline| pipeline["state"] == "finished")
    })
}

#[test]
fn a_push_becomes_a_pipeline_of_exactly_its_revision() {
    let installation = Installation::start();
    let repository = watched(&installation);
    assert!(
        installation.pipelines_of(&repository.git(&["rev-parse", "HEAD"])).is_empty(),
        "the baseline is no event"
    );

    repository.write("version", "1\n");
    let first = repository.commit("One");
    // Each push is seen at the next look, before there is another one.
    eventually("the push to be seen", || installation.pipelines_of(&first).pop());
    repository.write("version", "2\n");
    let second = repository.commit("Two");

    for (revision, version) in [(&first, "1\n"), (&second, "2\n")] {
        let pipeline = finished(&installation, revision);
        assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
        assert_eq!(pipeline["event"], "push");
        let log = installation.sealci(&["logs", &pipeline["number"].to_string(), "first"]);
        assert_eq!(String::from_utf8(log.stdout).unwrap(), version, "the action saw its own revision");
    }
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
        assert_eq!(installation.pipelines_of(&revision).len(), 1, "{part:?}");
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
