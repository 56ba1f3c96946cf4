//! Passes files on: from one action to the next, from one pipeline to a later one, to people. In separate processes, in the
//! sandbox and, without one, in no isolation at all.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use sealci_tests::{Installation, Part, Repository, action, attempts, both, eventually};

const MANIFEST: &str = r#"name: files
actions:
  build:
    cache:
      - {key: "k-${{ hash('lock') }}", restore: ["k-"], paths: [~/.store, "kept/**", "!kept/not"]}
    commands:
      - cat kept/when ~/.store/when 2>/dev/null || echo cold
      - mkdir -p kept ~/.store out/deep
      - date +%s%N | tee kept/when > ~/.store/when; echo no > kept/not
      - echo hello > out/deep/hello; ln -s deep/hello out/link; ln -s /etc/passwd out/away; chmod 750 out/deep/hello
    artifacts: {paths: [out, absent.txt]}
  test:
    uses: [build]
    commands:
      - cat .sealci/artifacts/build/out/link
      - test "$(readlink .sealci/artifacts/build/out/away)" = /etc/passwd
      - test "$(stat -c %a .sealci/artifacts/build/out/deep/hello)" = 750
      - test ! -e out
      - |
        cat > junit.xml <<X
        <testsuite name="suite">
          <testcase name="passes"/>
          <testcase name="fails" classname="c"><failure message="left is not right">more</failure></testcase>
        </testsuite>
        X
      - exit 3
    artifacts: {paths: [junit.xml], when: failed}
    reports: {junit: ["*.xml", "no/such.xml"]}
"#;

fn repository(installation: &Installation, name: &str) -> Repository {
    let repository = Repository::with_manifest(installation.scratch(name), MANIFEST);
    repository.write("lock", "1");
    repository.commit("Lock");
    repository
}

/// Runs it at its newest revision; returns the pipeline's number and what `build` found of former ones.
fn run(installation: &Installation, repository: &Repository) -> (String, String) {
    let output = installation.sealci(&["submit", &repository.path.display().to_string(), "--follow"]);
    assert_eq!(output.status.code(), Some(1), "{}", both(&output));
    let number = installation.json(&["list"])["pipelines"][0]["number"].to_string();
    let log = installation.text(&number, "build");
    let found = log.lines().filter(|line| !line.starts_with("sealci: ")).collect();
    (number, found)
}

/// How many caches were restored, or kept, by an action with this log.
fn lines(log: &str, what: &str) -> usize {
    let is_one = |line: &&str| line.starts_with("sealci: cache `") && line.contains(&format!(" {what}: "));
    log.lines().filter(is_one).count()
}

#[test]
fn files_pass_between_actions_pipelines_and_people() {
    let installation = Installation::start();
    let repository = repository(&installation, "repository");
    let (number, found) = run(&installation, &repository);
    assert_eq!(found, "cold");
    let pipeline = installation.finished(&number);
    assert_eq!(action(&pipeline, "build")["outcome"]["kind"], "succeeded", "{pipeline}");
    assert_eq!(action(&pipeline, "test")["outcome"]["exit_code"], 3, "all before the last command held");
    assert!(
        installation.text(&number, "test").contains("\nhello\n"),
        "{}",
        installation.text(&number, "test")
    );
    let log = installation.text(&number, "build");
    assert!(log.contains("sealci: artifacts: nothing matches `absent.txt`"), "{log}");

    // What the tests said is shown, although the action failed.
    let shown = both(&installation.sealci(&["show", &number]));
    for part in ["fails", "left is not right"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }

    // People get at the files of both, as they were.
    let listed = both(&installation.sealci(&["artifact", "list", &number]));
    assert!(listed.contains("build") && listed.contains("test"), "{listed}");
    let folder = installation.scratch("downloaded");
    let output = folder.display().to_string();
    let downloaded = installation.sealci(&["artifact", "download", &number, "--output", &output]);
    assert_eq!(downloaded.status.code(), Some(0), "{}", both(&downloaded));
    assert_eq!(fs::read_to_string(folder.join("build/out/deep/hello")).unwrap(), "hello\n");
    assert_eq!(fs::read_link(folder.join("build/out/link")).unwrap().to_str(), Some("deep/hello"));
    assert!(fs::symlink_metadata(folder.join("build/out/away")).is_err(), "it leads out");
    assert!(both(&downloaded).contains("out/away -> /etc/passwd"), "{}", both(&downloaded));
    assert!(fs::read_to_string(folder.join("test/junit.xml")).unwrap().contains("left is not right"));

    // The same lock: the very entry. Another one: the newest that begins alike, and an entry of its own.
    repository.write("other", "x");
    repository.commit("Change something");
    let (second, found) = run(&installation, &repository);
    assert!(!found.contains("cold") && found.len() == 38, "what was cached, twice: {found}");
    let log = installation.text(&second, "build");
    assert_eq!((lines(&log, "restored"), lines(&log, "kept")), (2, 0), "{log}");
    repository.write("lock", "2");
    repository.commit("Change the lock");
    let (third, again) = run(&installation, &repository);
    assert_eq!(again, found, "the first pipeline's entry, since the second kept none");
    let log = installation.text(&third, "build");
    assert_eq!((lines(&log, "restored"), lines(&log, "kept")), (2, 2), "it keeps its own: {log}");

    // Another repository sees none of it.
    let other = self::repository(&installation, "other");
    assert_eq!(run(&installation, &other).1, "cold");
}

#[test]
fn files_that_are_kept_survive_the_services() {
    let mut installation = Installation::start();
    let repository = repository(&installation, "repository");
    let (number, _) = run(&installation, &repository);
    for part in [Part::Controller, Part::Agent, Part::Scheduler] {
        installation.restart(part);
    }
    let folder = installation.scratch("downloaded");
    let output = folder.display().to_string();
    let asked = ["artifact", "download", &number, "--action", "build", "out/deep/hello", "--output", &output];
    let downloaded = installation.sealci(&asked);
    assert_eq!(downloaded.status.code(), Some(0), "{}", both(&downloaded));
    assert_eq!(fs::read_to_string(folder.join("out/deep/hello")).unwrap(), "hello\n");
    assert!(!folder.join("out/link").exists(), "only what was asked for");
}

#[test]
fn without_isolation_files_pass_all_the_same() {
    let installation = Installation::start();
    let text = MANIFEST.replace("    cache:", "    configuration: {executor: process}\n    cache:");
    let text = text.replace("    uses: [build]", "    configuration: {executor: process}\n    uses: [build]");
    // The home is the agent's own: it is not for tests to fill.
    let text = text.replace("~/.store", "kept/store");
    let repository = Repository::with_manifest(installation.scratch("repository"), &text);
    repository.write("lock", "1");
    repository.commit("Lock");
    assert_eq!(run(&installation, &repository).1, "cold");
    repository.write("other", "x");
    repository.commit("Change something");
    let (number, found) = run(&installation, &repository);
    assert!(!found.contains("cold"), "{found}");
    assert!(installation.text(&number, "test").contains("\nhello\n"));
}

/// Changes a byte in the middle of every file below a folder; how many those were.
fn damage(folder: &Path, how: fn(&mut Vec<u8>)) -> usize {
    let mut damaged = 0;
    for entry in fs::read_dir(folder).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            damaged += damage(&entry.path(), how);
            continue;
        }
        let mut bytes = fs::read(entry.path()).unwrap();
        how(&mut bytes);
        fs::write(entry.path(), bytes).unwrap();
        damaged += 1;
    }
    damaged
}

#[test]
fn a_damaged_cache_is_no_cache_and_damaged_artifacts_are_an_error() {
    let installation = Installation::start();
    let repository = repository(&installation, "repository");
    assert_eq!(run(&installation, &repository).1, "cold");
    let objects = installation.data().join("objects");
    let one_byte = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
    };
    let an_end = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    for (number, how) in [one_byte, an_end].into_iter().enumerate() {
        assert!(damage(&objects, how) >= 4, "two parts of a cache, artifacts of two actions");
        repository.write("other", &format!("{number}"));
        repository.commit("Change something");
        let (number, found) = run(&installation, &repository);
        let log = installation.text(&number, "build");
        assert_eq!(found, "cold", "{log}");
        assert!(log.contains("sealci: the cache is left out") && log.contains("damaged"), "{log}");
        // It is kept anew.
        repository.write("other", &format!("{number} again"));
        repository.commit("Change something again");
        assert!(!run(&installation, &repository).1.contains("cold"));
    }
    // Whoever downloads what was damaged is told so, and gets nothing of it.
    let folder = installation.scratch("downloaded");
    let output = folder.display().to_string();
    let downloaded =
        installation.sealci(&["artifact", "download", "1", "--action", "test", "--output", &output]);
    assert_ne!(downloaded.status.code(), Some(0), "{}", both(&downloaded));
}

#[test]
fn a_stored_file_that_somebody_removed_is_said_to_be_gone_and_comes_back() {
    let installation = Installation::start();
    let repository = repository(&installation, "repository");
    assert_eq!(run(&installation, &repository).1, "cold");
    fs::remove_dir_all(installation.data().join("objects/sha256")).unwrap();
    // People are told where it was, and what to do.
    let folder = installation.scratch("downloaded");
    let output = folder.display().to_string();
    let asked = ["artifact", "download", "1", "--action", "build", "--output", &output];
    let downloaded = installation.sealci(&asked);
    let said = both(&downloaded);
    assert_ne!(downloaded.status.code(), Some(0), "{said}");
    assert!(said.contains("gone from") && said.contains("rerun"), "{said}");

    // An action goes on without its cache, and keeps it anew.
    repository.write("other", "x");
    repository.commit("Change something");
    let (number, found) = run(&installation, &repository);
    let log = installation.text(&number, "build");
    assert_eq!(found, "cold", "{log}");
    assert!(log.contains("sealci: the cache is left out") && log.contains("gone from"), "{log}");
    assert_eq!(lines(&log, "kept"), 2, "{log}");
    assert_eq!(attempts(action(&installation.finished(&number), "build")), ["succeeded"]);
    repository.write("other", "y");
    repository.commit("Change something again");
    assert!(!run(&installation, &repository).1.contains("cold"));

    let asked = ["artifact", "download", &number, "--action", "build", "--output", &output];
    let downloaded = installation.sealci(&asked);
    assert_eq!(downloaded.status.code(), Some(0), "{}", both(&downloaded));
}

/// The files of the object store, by name, that are whole, and those that are being written.
fn objects(installation: &Installation) -> (Vec<String>, Vec<String>) {
    let found = Command::new("find").arg(installation.data().join("objects")).args(["-type", "f"]).output();
    let text = String::from_utf8(found.unwrap().stdout).unwrap();
    text.lines().map(str::to_owned).partition(|name| !name.contains('#'))
}

#[test]
fn who_dies_in_the_middle_of_an_upload_leaves_nothing_half() {
    // Large enough to be killed in the middle of.
    const MANIFEST: &str = r#"name: large
actions:
  it:
    cache: [{key: it, paths: [kept]}]
    commands:
      - test -e kept/file && echo warm || echo cold
      - mkdir -p kept out; test -e kept/file || head -c 20M /dev/urandom > kept/file; cp kept/file out/file; touch done
      - sha256sum < kept/file; echo over
    artifacts: {paths: [out]}
"#;
    for part in [Part::Agent, Part::Controller] {
        let mut installation = Installation::start();
        let repository = Repository::with_manifest(installation.scratch("repository"), MANIFEST);
        let number = installation.submit(&repository);
        eventually("an upload to be under way", || (!objects(&installation).1.is_empty()).then_some(()));
        installation.restart(part);
        // Nothing that is listed is half: the pipeline's end says that it is kept, and then it can be read.
        let pipeline = installation.finished(&number);
        let log = installation.text(&number, "it");
        assert_eq!(action(&pipeline, "it")["outcome"]["kind"], "succeeded", "{part:?}: {log}");
        let expected = if part == Part::Agent { vec!["errored", "succeeded"] } else { vec!["succeeded"] };
        assert_eq!(attempts(action(&pipeline, "it")), expected, "{part:?}: {log}");
        let sum = log.lines().find_map(|line| line.strip_suffix("  -")).unwrap().to_owned();
        let folder = installation.scratch("downloaded");
        let output = folder.display().to_string();
        let downloaded = installation.sealci(&["artifact", "download", &number, "--output", &output]);
        assert_eq!(downloaded.status.code(), Some(0), "{part:?}: {}", both(&downloaded));
        let found = Command::new("sha256sum").arg(folder.join("it/out/file")).output().unwrap();
        assert!(String::from_utf8_lossy(&found.stdout).starts_with(&sum), "{part:?}");
        // The next one has the cache, which is whole as well.
        let again = installation.submit(&repository);
        installation.finished(&again);
        let log = installation.text(&again, "it");
        assert!(log.contains("warm") && log.contains(&sum), "{part:?}: {log}");
    }
}
