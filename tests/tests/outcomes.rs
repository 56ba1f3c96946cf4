//! Brings pipelines to every end there is, and looks at the states, the reasons and the exit codes.
//!
//! Without an executor in the manifest: each action runs in the agent's default, the sandbox where there is one.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;

use sealci_tests::{Installation, Repository, action, attempts, both, eventually, let_go};

/// Pipelines of several actions, each declared after the one before it.
fn manifest(actions: &[(&str, &str)]) -> String {
    let mut text = "name: outcomes\nactions:\n".to_owned();
    for (name, body) in actions {
        text.push_str(&format!("  {name}:\n"));
        for line in body.lines() {
            text.push_str(&format!("    {line}\n"));
        }
    }
    text
}

#[test]
fn a_success_exits_with_0_and_a_failure_with_1_and_skips_what_follows() {
    let installation = Installation::start();
    let good = manifest(&[("one", "commands: [echo fine]"), ("two", "commands: [echo also]")]);
    let good = Repository::with_manifest(installation.scratch("good"), &good);
    let passed = installation.sealci(&["submit", &good.path.display().to_string(), "--follow"]);
    assert_eq!(passed.status.code(), Some(0), "{}", both(&passed));
    assert!(both(&passed).contains("one | fine\n") && both(&passed).contains("two | also\n"));

    let bad = manifest(&[
        ("good", "commands: [echo fine]"),
        ("bad", "commands: [echo before, 'sh -c \"exit 7\"', echo never]"),
        ("later", "commands: [echo never]"),
        ("last", "commands: [echo never]"),
        ("apart", "needs: [good]\ncommands: [echo apart]"),
    ]);
    let bad = Repository::with_manifest(installation.scratch("bad"), &bad);
    let failed = installation.sealci(&["submit", &bad.path.display().to_string(), "--follow"]);
    assert_eq!(failed.status.code(), Some(1), "{}", both(&failed));
    let shown = both(&failed);
    assert!(shown.contains("failed (exit code 7)"), "{shown}");

    let pipeline = installation.finished("2");
    assert_eq!(pipeline["outcome"], "failed");
    assert_eq!(action(&pipeline, "good")["outcome"]["kind"], "succeeded");
    assert_eq!(action(&pipeline, "bad")["outcome"]["exit_code"], 7);
    assert_eq!(attempts(action(&pipeline, "bad")), ["failed"], "a failed command is not tried again");
    assert_eq!(installation.text("2", "bad"), "before\n");
    for (name, because) in [("later", "bad"), ("last", "later")] {
        let outcome = &action(&pipeline, name)["outcome"];
        assert_eq!(outcome["kind"], "skipped", "{name}");
        assert!(outcome["because"].as_str().unwrap().contains(because), "{name}: {outcome}");
        assert!(attempts(action(&pipeline, name)).is_empty(), "{name}");
        let why = both(&installation.sealci(&["why", "2", name]));
        assert!(why.contains("skipped") && why.contains(because), "{why}");
    }
    assert_eq!(action(&pipeline, "apart")["outcome"]["kind"], "succeeded", "it needs only what succeeded");

    let failing = installation.sealci(&["logs", "2", "--failed"]);
    assert_eq!(String::from_utf8(failing.stdout).unwrap(), "before\n", "the failing one's log alone");
}

#[test]
fn a_cancelled_pipeline_exits_with_3_and_ends_what_runs() {
    let installation = Installation::start();
    let text = manifest(&[
        ("long", "env: {MARK: of-the-cancelled}\ncommands: ['echo begun; sleep 600']"),
        ("later", "commands: [echo never]"),
    ]);
    let repository = Repository::with_manifest(installation.scratch("repository"), &text);
    let mut following = installation.follow(&["submit", &repository.path.display().to_string(), "--follow"]);
    following.wait_for("begun");
    let cancelled = installation.sealci(&["cancel", "1"]);
    assert_eq!(cancelled.status.code(), Some(0), "{}", both(&cancelled));
    let (status, shown, errors) = following.end();
    assert_eq!(status.code(), Some(3), "{shown}{errors}");

    let pipeline = installation.finished("1");
    assert_eq!(pipeline["outcome"], "cancelled");
    assert_eq!(attempts(action(&pipeline, "long")), ["cancelled"]);
    let later = action(&pipeline, "later");
    assert!(matches!(later["outcome"]["kind"].as_str(), Some("cancelled" | "skipped")), "{later}");
    assert_eq!(installation.text("1", "long"), "begun\n");
    // To wish it again is no mistake, and changes nothing.
    installation.sealci(&["cancel", "1"]);
    assert_eq!(installation.finished("1")["outcome"], "cancelled");
}

#[test]
fn an_action_past_its_time_is_ended_and_another_may_be_allowed_to_fail() {
    let installation = Installation::start();
    let text = manifest(&[
        ("slow", "timeout: 1s\nallow-failure: true\ncommands: ['echo begun; sleep 600']"),
        ("softened", "allow-failure: [42]\ncommands: [exit 42]"),
        ("after", "commands: [echo reached]"),
        ("late", "timeout: 1s\ncommands: [sleep 600]"),
        ("never", "commands: [echo never]"),
    ]);
    let repository = Repository::with_manifest(installation.scratch("repository"), &text);
    let output = installation.sealci(&["submit", &repository.path.display().to_string(), "--follow"]);
    assert_eq!(output.status.code(), Some(1), "{}", both(&output));

    let pipeline = installation.finished("1");
    assert_eq!(action(&pipeline, "slow")["outcome"]["kind"], "timed_out");
    assert_eq!(action(&pipeline, "softened")["outcome"]["exit_code"], 42);
    assert_eq!(
        action(&pipeline, "after")["outcome"]["kind"],
        "succeeded",
        "what it needs was allowed to fail"
    );
    assert_eq!(action(&pipeline, "late")["outcome"]["kind"], "timed_out");
    assert_eq!(action(&pipeline, "never")["outcome"]["kind"], "skipped");
    assert_eq!(installation.text("1", "slow"), "begun\n", "what it wrote before is kept");
}

#[test]
fn a_rerun_of_what_failed_keeps_every_attempt() {
    let installation = Installation::start();
    // The attempt's number ends its name; the first one fails.
    let text = manifest(&[
        ("good", "commands: [echo once]"),
        ("flaky", "commands: ['echo \"try ${SEALCI_ATTEMPT##*.}\"; test \"${SEALCI_ATTEMPT##*.}\" != 1']"),
        ("later", "commands: [echo reached]"),
    ]);
    let number = installation.submit_manifest("repository", &text);
    let pipeline = installation.finished(&number);
    assert_eq!(pipeline["outcome"], "failed");
    assert_eq!(action(&pipeline, "later")["outcome"]["kind"], "skipped");

    let rerun = installation.sealci(&["rerun", &number, "--failed", "--follow"]);
    assert_eq!(rerun.status.code(), Some(0), "{}", both(&rerun));
    let pipeline = installation.finished(&number);
    assert_eq!((&pipeline["outcome"], &pipeline["round"]), (&"succeeded".into(), &2.into()));
    assert_eq!(attempts(action(&pipeline, "good")), ["succeeded"], "what succeeded is not run again");
    assert_eq!(attempts(action(&pipeline, "flaky")), ["failed", "succeeded"]);
    assert_eq!(attempts(action(&pipeline, "later")), ["succeeded"]);
    for (attempt, expected) in [("1", "try 1\n"), ("2", "try 2\n")] {
        let log = installation.sealci(&["logs", &number, "flaky", "--attempt", attempt]);
        assert_eq!(String::from_utf8(log.stdout).unwrap(), expected);
    }

    let all = installation.sealci(&["rerun", &number, "--follow"]);
    assert_eq!(all.status.code(), Some(0), "{}", both(&all));
    let pipeline = installation.finished(&number);
    assert_eq!(pipeline["round"], 3);
    assert_eq!(attempts(action(&pipeline, "good")), ["succeeded", "succeeded"]);
}

#[test]
fn a_rerun_of_what_still_runs_is_refused() {
    let installation = Installation::start();
    let text = manifest(&[("wait", "commands: ['touch begun; while ! test -e go; do sleep 0.05; done']")]);
    let number = installation.submit_manifest("repository", &text);
    let workspace = installation.workspace_with("begun");
    let refused = installation.sealci(&["rerun", &number]);
    assert_eq!(refused.status.code(), Some(2), "{}", both(&refused));
    let_go(&workspace, "go");
    assert_eq!(installation.finished(&number)["outcome"], "succeeded");
}

#[test]
fn whatever_waits_says_why() {
    let installation = Installation::start();
    let text = manifest(&[
        ("gpu", "needs: []\nconfiguration: {labels: {gpu: \"true\"}}\ncommands: [echo never]"),
        ("machine", "needs: []\nconfiguration: {executor: microvm}\ncommands: [echo never]"),
        ("huge", "needs: []\nconfiguration: {resources: {memory: 16TiB}}\ncommands: [echo never]"),
        ("behind", "needs: [gpu]\ncommands: [echo never]"),
    ]);
    let number = installation.submit_manifest("repository", &text);
    for (name, expected) in [
        ("gpu", "0 of 1 agents have label gpu=true"),
        ("machine", "0 of 1 agents offer executor microvm"),
        ("huge", "no agent can ever run it"),
        ("behind", "gpu"),
    ] {
        // The scheduler learns of it a moment after the controller has answered.
        let mut said = String::new();
        eventually(&format!("`{expected}` of {name}"), || {
            let now = both(&installation.sealci(&["why", &number, name]));
            if now != said {
                eprintln!("{now}");
                said = now;
            }
            said.contains(expected).then_some(())
        });
    }
    assert_eq!(installation.sealci(&["why", &number, "nobody"]).status.code(), Some(2));
    installation.sealci(&["cancel", &number]);
    let pipeline = installation.finished(&number);
    assert_eq!(pipeline["outcome"], "cancelled");
    assert_eq!(action(&pipeline, "gpu")["outcome"]["kind"], "cancelled", "what waits ends at once");
}

#[test]
fn what_is_wrong_with_a_manifest_is_shown_where_it_is() {
    let installation = Installation::start();
    let repository = Repository::with_manifest(installation.scratch("repository"), &manifest(&[]));
    let path = repository.path.display().to_string();
    let file = installation.scratch("wrong.yaml");
    let head = "name: wrong\n";
    for (body, expected) in [
        // Where, and what to do about it.
        ("acts: {}\n", ":2:1"),
        ("actions:\n  a:\n    commnds: [x]\n    commands: [x]\n", ":4:5"),
        ("actions:\n  a:\n    commands: x\n", ":4:15"),
        ("actions:\n  a:\n    needs: [b]\n    commands: [x]\n", ":4:13"),
        ("actions:\n  a:\n    timeout: soon\n    commands: [x]\n", ":4:14"),
        ("actions:\n  a:\n    secrets: [TOKEN]\n    commands: [x]\n", ":4:5"),
        ("actions:\n  a:\n\tcommands: [x]\n", ":4:"),
        ("actions: {}\n", ":2:"),
    ] {
        fs::write(&file, format!("{head}{body}")).unwrap();
        let refused = installation.sealci(&["submit", &path, "--file", &file.display().to_string()]);
        assert_eq!(refused.status.code(), Some(2), "{body}: {}", both(&refused));
        let errors = String::from_utf8(refused.stderr).unwrap();
        assert!(errors.contains(expected), "{body} should be wrong at {expected}: {errors}");
    }
    // All at once, with the lines as they were written.
    fs::write(&file, format!("{head}actions:\n  a:\n    commnds: [x]\n    timeout: soon\n")).unwrap();
    let refused = installation.sealci(&["submit", &path, "--file", &file.display().to_string()]);
    let errors = String::from_utf8(refused.stderr).unwrap();
    assert!(errors.contains(":4:5") && errors.contains(":5:14"), "{errors}");
    assert!(errors.contains("commnds: [x]") && errors.contains("`commands`"), "{errors}");
    // The repository's own manifest is shown by its path.
    repository.write(".sealci/pipeline.yaml", "name: x\nactions: []\n");
    repository.commit("Break it");
    let refused = installation.sealci(&["submit", &path]);
    assert_eq!(refused.status.code(), Some(2), "{}", both(&refused));
    assert!(both(&refused).contains(".sealci/pipeline.yaml:2:"), "{}", both(&refused));
    assert_eq!(installation.json(&["list"])["pipelines"].as_array().unwrap().len(), 0, "nothing was made");
}

#[test]
fn wrong_command_lines_tokens_and_servers_have_codes_of_their_own() {
    let installation = Installation::start();
    let file = installation.scratch("good.yaml");
    fs::write(&file, manifest(&[("a", "commands: [x]")])).unwrap();
    let repository = Repository::with_manifest(installation.scratch("repository"), "name: x\n");
    let (file, url) = (file.display().to_string(), repository.url());
    let nowhere = format!("file://{}", installation.scratch("nowhere").display());
    let unknown_commit = "0123456789012345678901234567890123456789";
    for (arguments, code, expected) in [
        (&["submit", "--repo", &nowhere][..], 2, "nowhere"),
        (&["submit", "--repo", &url, "--ref", "absent"], 2, "absent"),
        (&["submit", "--repo", &url, "--ref", "main", "--revision", unknown_commit], 2, "0123456789"),
        (&["submit", "--repo", &url, "--ref", "main", "--revision", "abc"], 2, "abc"),
        (&["submit", "--repo", "ext::sh -c id", "--file", &file], 2, "ext"),
        (&["submit", "--repo", "-upload-pack=x", "--file", &file], 2, ""),
        (&["submit", "--repo", &url, "--file", "/nowhere.yaml"], 2, "/nowhere.yaml"),
        (&["submit", "/"], 2, "/"),
        (&["show", "99"], 2, "99"),
        (&["show", "00000000-0000-7000-8000-000000000000"], 2, "no such pipeline"),
        (&["logs", "99"], 2, "99"),
        (&["cancel", "99"], 2, "99"),
        (&["rerun", "99"], 2, "99"),
        (&["why", "99"], 2, "99"),
        (&["repo", "remove", "https://example.org/none"], 2, "example.org/none"),
        (&["agent", "drain", "nobody"], 2, "nobody"),
        (&["list", "--state", "done"], 2, "done"),
        (&["list", "--server", "http://127.0.0.1:1"], 5, "127.0.0.1:1"),
        (&["submit", "--repo", &url, "--server", "http://127.0.0.1:1"], 5, "127.0.0.1:1"),
        (&["repo", "list", "--server", "http://127.0.0.1:1"], 5, "127.0.0.1:1"),
    ] {
        let output = installation.sealci(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", both(&output));
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.starts_with("error: ") && errors.contains(expected), "{arguments:?}: {errors}");
    }
    for arguments in
        [&["list"][..], &["show", "1"], &["submit", "--repo", &url], &["agent", "list"], &["repo", "list"]]
    {
        let mut command = installation.command(arguments);
        let output = command.env("SEALCI_TOKEN", "sealci_nobody-knows-this-token").output().unwrap();
        assert_eq!(output.status.code(), Some(4), "{arguments:?}: {}", both(&output));
    }
}
