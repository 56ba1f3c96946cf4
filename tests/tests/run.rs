//! Runs working trees with `sealci run`, as a person does: no server, nothing committed, and nothing left behind.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sealci_tests::host::is_root;
use sealci_tests::{Installation, Repository, eventually, skip};
use serde_json::Value;

/// What runs where nobody is root as well.
const PROCESS: [&str; 3] = ["--allow-process", "--executor", "process"];

/// A place for a run: its working tree, and the temporary folder that it may use.
struct Bench {
    installation: Installation,
    tree: PathBuf,
    temporary: PathBuf,
}

impl Bench {
    /// A folder outside Git with a manifest.
    fn of(manifest: &str) -> Self {
        let installation = Installation::none();
        let tree = installation.scratch("tree");
        let temporary = installation.scratch("temporary");
        fs::create_dir_all(tree.join(".sealci")).unwrap();
        fs::create_dir_all(&temporary).unwrap();
        fs::write(tree.join(".sealci/pipeline.yaml"), manifest).unwrap();
        Self { installation, tree, temporary }
    }

    /// The same as a Git repository, its manifest committed.
    fn in_git(manifest: &str) -> (Self, Repository) {
        let bench = Self::of(manifest);
        let repository = Repository::with_manifest(bench.tree.clone(), manifest);
        (bench, repository)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.installation.command(&["run"]);
        command.args(arguments).arg(&self.tree).env("TMPDIR", &self.temporary);
        command
    }

    fn run(&self, arguments: &[&str]) -> Run {
        let run = Run(self.command(arguments).output().unwrap());
        assert_eq!(self.left(), Vec::<PathBuf>::new(), "nothing stays: {run:?}");
        run
    }

    fn left(&self) -> Vec<PathBuf> {
        fs::read_dir(&self.temporary).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

#[derive(Debug)]
struct Run(Output);

impl Run {
    fn code(&self) -> i32 {
        self.0.status.code().unwrap_or(-1)
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    fn complained(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    /// The lines in which all of these stand, each after the one before.
    fn assert_in_order(&self, lines: &[&str]) {
        let said = self.said();
        let mut rest = said.as_str();
        for line in lines {
            let at = rest.find(line).unwrap_or_else(|| panic!("no `{line}` here in {self:?}"));
            rest = &rest[at + line.len()..];
        }
    }
}

/// Every file below a folder, with what it holds.
fn content(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

#[test]
fn uncommitted_changes_are_run_and_the_tree_stays_as_it_is() {
    let (bench, repository) = Bench::in_git(
        "name: local
actions:
  look:
    commands:
      - cat committed new
      - echo $SEALCI_REVISION $SEALCI_BRANCH
      - test ! -e ignored
      - echo spoiled > committed; rm -r new .sealci; touch more
  look again:
    commands:
      - cat committed
      - test -e .sealci/pipeline.yaml -a ! -e more
",
    );
    repository.write("committed", "as committed\n");
    repository.write(".gitignore", "ignored\n");
    let revision = repository.commit("Begin");
    repository.write("committed", "changed since\n");
    repository.write("new", "never added\n");
    repository.write("ignored", "build output\n");
    let before = content(&bench.tree);

    let run = bench.run(&PROCESS);
    assert_eq!(run.code(), 0, "{run:?}");
    run.assert_in_order(&[
        "look       > running on ",
        "look       | changed since\n",
        "look       | never added\n",
        &format!("look       | {revision} main\n"),
        "look       > succeeded",
        "look again > running on ",
        "look again | changed since\n",
        "look again > succeeded",
        "local #1 succeeded",
    ]);
    // Git may refresh its index; nothing else changes.
    let changed: Vec<_> =
        content(&bench.tree).into_iter().filter(|(p, text)| before.get(p) != Some(text)).collect();
    assert!(changed.iter().all(|(path, _)| path.ends_with(".git/index")), "{changed:?}");
    assert_eq!(content(&bench.tree).len(), before.len());
}

#[test]
fn a_failure_skips_what_needs_it_and_says_why() {
    let bench = Bench::of(
        "name: failing
actions:
  build: {commands: [echo building, exit 7]}
  test: {commands: [echo never]}
",
    );
    let run = bench.run(&PROCESS);
    assert_eq!(run.code(), 1, "{run:?}");
    run.assert_in_order(&[
        "build > running",
        "build | building\n",
        "build > failed (exit code 7)",
        "test  > skipped (",
        "at `exit 7`",
        "failing #1 failed",
    ]);
    assert!(!run.said().contains("never"), "{run:?}");
}

#[test]
fn a_bad_manifest_is_shown_with_its_place_before_anything_starts() {
    let bench =
        Bench::of("name: x\nactions:\n  a:\n    comands: [\"true\"]\n  b: {needs: [z], commands: [x]}\n");
    let run = bench.run(&PROCESS);
    assert_eq!(run.code(), 2, "{run:?}");
    let complained = run.complained();
    assert!(complained.contains(".sealci/pipeline.yaml:4:"), "{complained}");
    assert!(complained.contains("commands") && complained.contains('z'), "{complained}");
    assert_eq!(run.said(), "");
}

#[test]
fn an_action_is_run_with_what_it_needs() {
    let bench = Bench::of(
        "name: some
actions:
  first: {commands: [echo first]}
  unrelated: {needs: [], commands: [exit 1]}
  second: {needs: [first], commands: [echo second]}
  third: {needs: [second], commands: [exit 1]}
",
    );
    let run = bench.run(&[&PROCESS[..], &["--action", "second"]].concat());
    assert_eq!(run.code(), 0, "{run:?}");
    run.assert_in_order(&["first  | first\n", "second | second\n", "some #1 succeeded"]);
    assert!(!run.said().contains("unrelated") && !run.said().contains("third"), "{run:?}");

    let run = bench.run(&[&PROCESS[..], &["--action", "forth"]].concat());
    assert_eq!(run.code(), 2);
    assert!(run.complained().contains("first, unrelated, second, third"), "{run:?}");
}

#[test]
fn programs_are_told_in_json() {
    let bench = Bench::of("name: told\nactions:\n  a: {commands: [\"echo '\\\"one\\\"'\", exit 3]}\n");
    let run = bench.run(&[&PROCESS[..], &["--json"]].concat());
    assert_eq!(run.code(), 1, "{run:?}");
    let said = run.said();
    let events: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (first, last) = (events.first().unwrap(), events.last().unwrap());
    assert_eq!((&first["event"], &first["revision"]), (&"pipeline".into(), &"0".repeat(40).into()));
    assert_eq!((&last["event"], &last["outcome"]), (&"pipeline".into(), &"failed".into()));
    let log: Vec<_> = events.iter().filter(|event| event["event"] == "log").collect();
    assert_eq!(log.len(), 1, "{said}");
    assert_eq!((&log[0]["action"], &log[0]["text"]), (&"a".into(), &"\"one\"".into()));
    let ended = events.iter().find(|event| event["event"] == "action" && event["state"] == "finished");
    assert_eq!(ended.unwrap()["outcome"]["exit_code"], 3, "{said}");
}

#[test]
fn a_folder_outside_git_is_run_from_any_manifest() {
    let bench = Bench::of("name: x\nactions: {}\n");
    let manifest = bench.installation.scratch("other.yaml");
    fs::write(&manifest, "name: other\nactions:\n  a: {commands: [cat here, 'echo \"[$SEALCI_BRANCH]\"']}\n")
        .unwrap();
    fs::write(bench.tree.join("here"), "it is here\n").unwrap();
    let run = bench.run(&[&PROCESS[..], &["--file", manifest.to_str().unwrap()]].concat());
    assert_eq!(run.code(), 0, "{run:?}");
    run.assert_in_order(&["a | it is here\n", "a | []\n", "other #1 succeeded"]);
}

#[test]
fn what_cannot_run_here_is_refused_at_once() {
    let bench = Bench::of(
        "name: x\nactions:\n  a: {configuration: {executor: microvm}, commands: [x]}\n  b: {needs: [], commands: [x]}\n",
    );
    let run = bench.run(&PROCESS);
    assert_eq!(run.code(), 2, "{run:?}");
    assert!(run.complained().contains("executor `microvm`"), "{run:?}");
    let run = bench.run(&["--executor", "process", "--action", "b"]);
    assert_eq!(run.code(), 2, "{run:?}");
    assert!(run.complained().contains("--allow-process"), "{run:?}");
}

#[test]
fn what_can_never_run_here_is_refused_with_what_it_lacks() {
    let bench = Bench::of(
        "name: x
actions:
  huge: {configuration: {resources: {memory: 16TiB}}, commands: [x]}
  rare: {needs: [], configuration: {labels: {gpu: 'true'}}, commands: [x]}
",
    );
    for (action, lacking) in [("huge", "needs 16 TiB of memory"), ("rare", "needs the label gpu=true")] {
        let run = bench.run(&[&PROCESS[..], &["--action", action]].concat());
        assert_eq!(run.code(), 2, "{run:?}");
        let complained = run.complained();
        assert!(complained.contains(&format!("`{action}` can never run here")), "{complained}");
        assert!(complained.contains(lacking), "{complained}");
    }
}

/// The disk has no room for the agent's work until it is made.
#[test]
fn what_keeps_an_action_waiting_is_said() {
    let bench = Bench::of("name: patient\nactions:\n  a: {commands: [echo here]}\n");
    let mount = |options: &str| {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&bench.temporary);
        command.status().is_ok_and(|status| status.success())
    };
    if !is_root() || !mount("size=64m") {
        return skip(
            "root",
            "what_keeps_an_action_waiting_is_said",
            "a file system can be mounted by root only",
        );
    }
    let _mounted = Mounted(&bench.temporary);
    let mut child = bench.command(&PROCESS).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let waiting = said.by_ref().find(|line| line.starts_with("a > waiting: ")).unwrap();
    assert!(waiting.contains("takes no new work: disk below 1 GiB"), "{waiting}");
    assert!(mount("remount,size=4g"));
    let rest: Vec<_> = said.collect();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{rest:?}");
    assert!(rest.iter().any(|line| line == "a | here"), "{rest:?}");
    assert!(!rest.iter().any(|line| line.contains("waiting")), "it is said once: {rest:?}");
}

/// Unmounts at its end.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// The processes whose environment has this, and that are not the run itself.
fn marked(marker: &str) -> Vec<u32> {
    let ids =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| {
        let environment = fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|variable| variable == marker.as_bytes())
    })
    .collect()
}

/// Interrupts a run in mid action.
fn interrupt(executor: &str, arguments: &[&str]) {
    let marker = format!("RUN_TEST_MARKER={executor}-{}", std::process::id());
    let (name, value) = marker.split_once('=').unwrap();
    let bench = Bench::of(&format!(
        "name: long
actions:
  wait:
    configuration: {{network: off}}
    env: {{{name}: {value}}}
    commands: [echo here, sleep 1000 & sleep 1000]
  after: {{commands: [echo never]}}
"
    ));
    let mut child = bench.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
    let here = said.by_ref().map(Result::unwrap).find(|line| line == "wait  | here");
    assert!(here.is_some(), "the action runs");
    assert!(!marked(&marker).is_empty(), "the marker marks");

    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<_> = said.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("wait  > cancelled")), "{rest:?}");
    assert!(!rest.iter().any(|line| line.contains("never")), "{rest:?}");
    assert_eq!(bench.left(), Vec::<PathBuf>::new());
    // The kernel may still be at it.
    eventually("the action's processes to be gone", || marked(&marker).is_empty().then_some(()));
}

#[test]
fn an_interrupt_ends_what_runs_and_leaves_nothing() {
    interrupt("process", &PROCESS);
}

#[test]
fn an_interrupt_ends_what_is_sealed_and_leaves_nothing() {
    let probe = Bench::of("name: x\nactions:\n  a: {commands: [exit 0]}\n").run(&[]);
    if probe.code() != 0 {
        return skip("sandbox", "an_interrupt_ends_what_is_sealed_and_leaves_nothing", &probe.complained());
    }
    interrupt("sandbox", &[]);
}

#[test]
fn sealed_is_what_an_action_is_unless_told_otherwise() {
    let bench = Bench::of(
        "name: sealed
actions:
  look:
    configuration: {network: off}
    commands: ['echo \"$SEALCI_WORKSPACE and $(cat file)\"', 'echo changed > file', 'test ! -e /root/.bashrc']
",
    );
    fs::write(bench.tree.join("file"), "the tree").unwrap();
    let run = bench.run(&["--json"]);
    if run.code() == 2 || run.code() == 5 {
        let why = run.complained();
        assert!(why.contains("--allow-process"), "it is said what else there is: {why}");
        return skip("sandbox", "sealed_is_what_an_action_is_unless_told_otherwise", why.trim());
    }
    assert_eq!(run.code(), 0, "{run:?}");
    run.assert_in_order(&["\"executor\":\"sandbox\"", "/workspace and the tree"]);
    assert_eq!(fs::read_to_string(bench.tree.join("file")).unwrap(), "the tree");
}

#[test]
fn an_action_that_writes_too_much_fails_over_its_disk_limit() {
    let bench = Bench::of(
        "name: greedy
actions:
  fill:
    configuration: {network: off}
    commands:
      - |
        while :; do head -c 65536 /dev/zero >> fill; sleep 0.005; done
",
    );
    let sealed = sealci_tests::host::is_root();
    let executor: &[&str] = if sealed { &[] } else { &PROCESS };
    for bound in ["4000000", "9000000"] {
        let run = bench.run(&[executor, &["--workspace-bytes", bound]].concat());
        assert_eq!(run.code(), 1, "{run:?}");
        run.assert_in_order(&["fill | sealci: stopped", &format!("may have {bound} bytes"), "disk limit"]);
    }
}

#[test]
fn a_failed_action_is_tried_again_as_its_manifest_says() {
    let bench = Bench::of(
        "name: again\nactions:\n  flaky:\n    retry: {times: 1, on: [failed]}\n    commands:\n      \
         - echo try ${SEALCI_ATTEMPT##*.}\n      - test ${SEALCI_ATTEMPT##*.} = 2\n  after:\n    commands: [echo after]\n",
    );
    let run = bench.run(&PROCESS);
    assert_eq!(run.code(), 0, "{run:?}");
    run.assert_in_order(&[
        "try 1",
        "attempt 1 is retried because it failed (exit code 1): retry 1 of 1",
        "try 2",
        "after",
    ]);
    let run = bench.run(&[&PROCESS[..], &["--json"]].concat());
    let lines = run.said();
    let retried = lines.lines().find(|line| line.contains("retried_because")).expect("the retry is told");
    let retried: Value = serde_json::from_str(retried).unwrap();
    assert_eq!((&retried["attempt"], &retried["outcome"]["exit_code"]), (&1.into(), &1.into()));
}

/// It needs no server, and no KVM to say what is wrong with a kernel.
#[test]
fn the_carried_monitor_is_run_as_it_is() {
    let installation = Installation::none();
    let version = installation.sealci(&["vm", "run", "--", "--version"]);
    assert!(version.status.success(), "{version:?}");
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("sealci-vmm "), "{version:?}");
    let help = installation.sealci(&["vm", "run", "--", "--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("--initramfs"), "{help:?}");
    let nothing = installation.sealci(&["vm", "run", "--kernel", "/nowhere/vmlinuz"]);
    assert_eq!(nothing.status.code(), Some(1), "{nothing:?}");
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("/nowhere/vmlinuz"), "{nothing:?}");
}
