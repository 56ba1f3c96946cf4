//! Enters actions that run: on a server's agent, in a service, in `sealci run`; and not as anybody else.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use sealci_tests::{Installation, Repository, action, both, host, let_go};

const MANIFEST: &str = r#"name: entered
actions:
  sealed:
    env: {OF_THE_ACTION: seen}
    commands: ["touch up-sealed; until test -e go; do sleep 0.05; done; cat left"]
  process:
    needs: []
    configuration: {executor: process}
    commands: ["touch up-process; until test -e go; do sleep 0.05; done"]
"#;

#[test]
fn a_program_runs_in_an_action_and_ends_with_it() {
    let installation = Installation::start();
    let number = installation.submit_manifest("repository", MANIFEST);
    let workspaces = [installation.workspace_with("up-sealed"), installation.workspace_with("up-process")];
    let agent = installation.data().join("agent").display().to_string();
    let exec = |arguments: &[&str]| installation.sealci(&[&["exec", "--data", &agent], arguments].concat());

    // With what its commands have; each output by itself, and its code.
    let script = "echo $OF_THE_ACTION $SEALCI $(ls up-*); echo trouble >&2; exit 7";
    let said = exec(&["sealed", "--", "sh", "-c", script]);
    assert_eq!(String::from_utf8_lossy(&said.stdout), "seen true up-sealed\n", "{}", both(&said));
    assert_eq!(String::from_utf8_lossy(&said.stderr), "trouble\n");
    assert_eq!(said.status.code(), Some(7));
    let said = exec(&["process", "ls"]);
    assert!(both(&said).contains("up-process"), "{}", both(&said));

    // What is typed in, megabytes of it; the action sees what was done.
    let mut command = installation.command(&["exec", "sealed", "sh", "-c", "cat > left; wc -c < left"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&b"0123456\n".repeat(1 << 18)).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "2097152", "{}", both(&output));
    let output = exec(&["sealed", "cat", "left"]);
    assert_eq!(output.stdout.len(), 2 << 20);
    assert_eq!(exec(&["sealed", "sh", "-c", "echo kept > left"]).status.code(), Some(0));

    // What is not there is said, with what is.
    let said = both(&exec(&["nothing", "true"]));
    for part in ["`nothing` does not run here", "sealed of entered", "process of entered"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let said = both(&exec(&["sealed", "--service", "db", "true"]));
    assert!(said.contains("has no services"), "{said}");
    let said = both(&exec(&["sealed", "no-such-program"]));
    assert!(said.contains("has no `no-such-program`"), "{said}");

    // It ends with the action.
    let mut lasting = installation.follow(&["exec", "sealed", "sh", "-c", "echo begun; exec sleep 1000"]);
    lasting.wait_for("begun");
    workspaces.iter().for_each(|workspace| let_go(workspace, "go"));
    let (status, _, errors) = lasting.end();
    assert!(status.code() == Some(5) && errors.contains("the action is over"), "{errors}");
    let pipeline = installation.finished(&number);
    assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
    // What was said in it is in no log.
    assert_eq!(installation.text(&number, "sealed"), "kept\n");
    assert_eq!(action(&pipeline, "sealed")["attempts"].as_array().unwrap().len(), 1);
    let said = both(&exec(&["sealed", "true"]));
    assert!(said.contains("nor does any other"), "{said}");
}

#[test]
fn nobody_else_enters_an_action() {
    let test = "nobody_else_enters_an_action";
    if !host::is_root() {
        return sealci_tests::skip("root", test, "another user is only to be had by root");
    }
    let installation = Installation::start();
    let socket = installation.data().join("agent/sealci-exec.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    // Not even where the file and its folders let everybody through.
    let mut folder = socket.parent().unwrap();
    for _ in 0..3 {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
        folder = folder.parent().unwrap();
    }
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let data = installation.data().display().to_string();
    let binary = installation.command(&[]).get_program().to_owned();
    let said = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
        .arg(binary)
        .args(["exec", "--data", &data, "it", "true"])
        .output()
        .unwrap();
    let text = both(&said);
    assert!(text.contains("by its own user and by root alone"), "{text}");
    assert_eq!(said.status.code(), Some(4));
}

#[test]
fn a_local_runs_actions_are_entered_as_well() {
    let installation = Installation::none();
    let manifest = r#"name: local
actions:
  only-of-this-test-run:
    configuration: {executor: process}
    commands: ["echo up; until test -e go; do sleep 0.05; done"]
"#;
    let repository = Repository::with_manifest(installation.scratch("repository"), manifest);
    let path = repository.path.display().to_string();
    let mut run = installation.follow(&["run", &path, "--allow-process"]);
    run.wait_for("up");
    let said = installation.sealci(&["exec", "only-of-this-test-run", "touch", "go"]);
    assert_eq!(said.status.code(), Some(0), "{}", both(&said));
    assert!(run.end().0.success());
}
