//! Kills each service in mid action, starts it again, and looks at what became of the action.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use sealci_tests::{Installation, Part, Repository, eventually};
use serde_json::Value;

/// An action that says that it runs, and waits until it is let go.
fn waiting_manifest(gate: &Path) -> String {
    format!(
        "name: wait\nactions:\n  wait:\n    configuration: {{executor: process}}\n    commands:\n      \
         - echo begun; touch {gate}.begun; while ! test -e {gate}; do sleep 0.05; done; echo let go\n",
        gate = gate.display()
    )
}

/// Submits the waiting pipeline, and returns its number when its action runs.
fn running_pipeline(installation: &Installation, gate: &Path) -> String {
    let repository = Repository::with_manifest(installation.scratch("repository"), &waiting_manifest(gate));
    let output = installation.sealci(&["submit", &repository.path.display().to_string(), "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let pipeline: Value = serde_json::from_slice(&output.stdout).unwrap();
    let begun = gate.with_extension("begun");
    eventually("the action to run", || begun.exists().then_some(()));
    pipeline["number"].to_string()
}

/// The pipeline's outcome, its attempts' outcomes and its log, once it is finished.
fn end_of(installation: &Installation, number: &str) -> (String, Vec<String>, String) {
    let pipeline = eventually("the pipeline's end", || {
        let pipeline = installation.json(&["show", number]);
        (pipeline["state"] == "finished").then_some(pipeline)
    });
    let attempts = pipeline["actions"][0]["attempts"].as_array().unwrap();
    let kinds =
        attempts.iter().map(|attempt| attempt["outcome"]["kind"].as_str().unwrap_or("none").to_owned());
    let kinds = kinds.collect();
    let log = installation.sealci(&["logs", number, "wait"]);
    (pipeline["outcome"].as_str().unwrap().to_owned(), kinds, String::from_utf8(log.stdout).unwrap())
}

#[test]
fn a_restarted_scheduler_or_controller_requeues_nothing() {
    for part in [Part::Scheduler, Part::Controller] {
        let mut installation = Installation::start();
        let gate = installation.scratch("gate");
        let number = running_pipeline(&installation, &gate);
        installation.restart(part);
        fs::write(&gate, "").unwrap();
        let (outcome, attempts, log) = end_of(&installation, &number);
        assert_eq!(outcome, "succeeded", "{part:?}");
        assert_eq!(attempts, ["succeeded"], "{part:?}");
        assert_eq!(log, "begun\nlet go\n", "{part:?}");
    }
}

#[test]
fn a_restarted_agent_makes_a_second_attempt() {
    let mut installation = Installation::start();
    let gate = installation.scratch("gate");
    let number = running_pipeline(&installation, &gate);
    fs::remove_file(gate.with_extension("begun")).unwrap();
    installation.restart(Part::Agent);
    eventually("the second attempt to run", || gate.with_extension("begun").exists().then_some(()));
    fs::write(&gate, "").unwrap();
    let (outcome, attempts, log) = end_of(&installation, &number);
    assert_eq!(outcome, "succeeded");
    assert_eq!(attempts, ["errored", "succeeded"]);
    assert_eq!(log, "begun\nlet go\n");
}

#[test]
fn exit_codes_tell_what_became_of_it() {
    let installation = Installation::start();
    let repository = Repository::with_manifest(
        installation.scratch("repository"),
        "name: x\nactions:\n  a:\n    configuration: {executor: process}\n    commands: [\"exit 7\"]\n",
    );
    let path = repository.path.display().to_string();
    let failed = installation.sealci(&["submit", &path, "--follow"]);
    assert_eq!(failed.status.code(), Some(1), "{}", String::from_utf8_lossy(&failed.stderr));
    let shown = String::from_utf8(failed.stdout).unwrap();
    assert!(shown.contains("a > failed (exit code 7)"), "{shown}");

    let manifest = installation.scratch("good.yaml");
    fs::write(
        &manifest,
        "name: y\nactions:\n  a:\n    configuration: {executor: process}\n    commands: [echo fine]\n",
    )
    .unwrap();
    let passed =
        installation.sealci(&["submit", &path, "--follow", "--file", &manifest.display().to_string()]);
    assert_eq!(passed.status.code(), Some(0));
    assert!(String::from_utf8(passed.stdout).unwrap().contains("a | fine\n"));

    fs::write(&manifest, "name: y\nacts: {}\n").unwrap();
    let refused = installation.sealci(&["submit", &path, "--file", &manifest.display().to_string()]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8(refused.stderr).unwrap().contains(":2:1"), "the place is named");

    let stranger = installation
        .command(&["list"])
        .env("SEALCI_TOKEN", "sealci_nobody-knows-this-token")
        .output()
        .unwrap();
    assert_eq!(stranger.status.code(), Some(4));
    let nowhere = installation.command(&["list", "--server", "http://127.0.0.1:1"]).output().unwrap();
    assert_eq!(nowhere.status.code(), Some(5));
}
