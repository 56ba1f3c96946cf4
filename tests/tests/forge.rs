//! Pushes real repositories to a Git server over smart HTTP, and looks at the pipelines that come of it.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sealci_git::testing::SmartHttp;
use sealci_tests::{Installation, Repository, both, eventually, skip};
use tokio::runtime::Runtime;

/// A Git server with one bare repository, to which anyone may push.
struct Forge {
    _server: SmartHttp,
    _runtime: Runtime,
    bare: PathBuf,
    url: String,
}

impl Forge {
    /// Serves the bare repositories below `root`; there must be one `<name>.git`.
    fn serve(root: &Path, name: &str) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let server = runtime.block_on(SmartHttp::start(root, None)).unwrap();
        let bare = root.join(format!("{name}.git"));
        git(&bare, &["config", "http.receivepack", "true"]);
        let url = format!("{}/{name}.git", server.url);
        Self { _server: server, _runtime: runtime, bare, url }
    }
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        // The sources may be another user's.
        .args(["-c", "safe.directory=*"])
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "git {arguments:?}: {}", both(&output));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A manifest whose action shows its tree, says that it has begun, and stays until it is let go.
const STAYS: &str = "name: stays
actions:
  look:
    commands:
      - cat pushed
      - echo at $SEALCI_REVISION of $SEALCI_BRANCH by $SEALCI_EVENT
      - find . -type f -not -path './.git/*' -exec sha256sum {} + | LC_ALL=C sort -k 2 | sha256sum
      - echo begun; touch begun; while ! test -e go; do sleep 0.05; done; echo over
  after:
    commands: [cat pushed]
";

/// The same sum as the action's, over a commit as Git has it.
fn sum_of(repository: &Repository, revision: &str, scratch: &Path) -> String {
    fs::create_dir_all(scratch).unwrap();
    // With an index of its own, the working tree's is left alone.
    let script = "export GIT_INDEX_FILE=\"$3.index\"; \
        git -C \"$1\" --work-tree \"$3\" checkout --quiet \"$2\" -- . && cd \"$3\" && \
        find . -type f -exec sha256sum {} + | LC_ALL=C sort -k 2 | sha256sum";
    let output = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([&repository.path, Path::new(revision), scratch])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", both(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Pushes to a watched repository, moves the branch on while the action runs, and sees it all through.
fn push_and_see(installation: &Installation, forge: &Forge, work: &Repository) {
    work.write("pushed", "first\n");
    let first = work.commit("Push something");
    work.git(&["push", "--quiet", &forge.url, "HEAD:refs/heads/topic"]);
    let pipeline = eventually("the push to become a pipeline", || installation.pipelines_of(&first).pop());
    assert_eq!((&pipeline["event"], &pipeline["ref"]), (&"push".into(), &"refs/heads/topic".into()));
    let number = pipeline["number"].to_string();

    // The log is read while the action runs: it cannot end before it is let go.
    let mut following = installation.follow(&["logs", "-f", &number]);
    following.wait_for("look  | begun");
    assert!(following.is_running());
    assert_eq!(installation.json(&["show", &number])["state"], "running");
    let workspace = installation.workspace_with("begun");

    // The branch moves on; what runs, and what follows in the same pipeline, does not.
    work.write("pushed", "second\n");
    let second = work.commit("Move on");
    work.git(&["push", "--quiet", &forge.url, "HEAD:refs/heads/topic"]);
    eventually("the second push to become a pipeline", || installation.pipelines_of(&second).pop());
    sealci_tests::let_go(&workspace, "go");
    let (status, shown, errors) = following.end();
    assert_eq!(status.code(), Some(0), "{shown}{errors}");
    assert!(shown.contains("after | first"), "{shown}");

    let log = installation.text(&number, "look");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[..2], ["first", &format!("at {first} of topic by push")]);
    let sum = sum_of(work, &first, &installation.scratch("archive"));
    assert_eq!(lines[2], sum.trim_end(), "every file is the pushed one, and no other is there");
    assert_eq!(lines[3..], ["begun", "over"]);

    // The second one runs by itself, and may be ended.
    let second = installation.pipelines_of(&second).pop().unwrap()["number"].to_string();
    let mut following = installation.follow(&["logs", "-f", &second]);
    following.wait_for("second");
    following.wait_for("begun");
    assert!(installation.sealci(&["cancel", &second]).status.success());
    let (status, shown, errors) = following.end();
    assert_eq!(status.code(), Some(3), "{shown}{errors}");

    installation.wait_for_looks(1);
    let all = installation.json(&["list"])["pipelines"].as_array().unwrap().len();
    assert_eq!(all, 2, "one for each push, and none for what was there before");
}

/// A clone to work in, as a developer has it.
fn cloned(installation: &Installation, forge: &Forge) -> Repository {
    let path = installation.scratch("work");
    git(&forge.bare, &["clone", "--quiet", &forge.url, &path.display().to_string()]);
    let work = Repository { path };
    work.git(&["checkout", "--quiet", "--detach"]);
    work
}

#[test]
fn a_push_to_this_repository() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    if !here.join(".git").exists() {
        skip("git", "a_push_to_this_repository", "these sources are no Git checkout");
        return;
    }
    let installation = Installation::start();
    let root = installation.scratch("forge");
    fs::create_dir(&root).unwrap();
    git(&root, &["init", "--quiet", "--bare", "--initial-branch=main", "sealci.git"]);
    let bare = root.join("sealci.git").display().to_string();
    // The checkout may be shallow, and of no branch.
    git(Path::new(&bare), &["config", "receive.shallowUpdate", "true"]);
    git(here, &["-c", "core.hooksPath=/dev/null", "push", "--quiet", &bare, "HEAD:refs/heads/main"]);
    let forge = Forge::serve(&root, "sealci");
    let work = cloned(&installation, &forge);
    installation.watch(&forge.url);
    fs::create_dir_all(work.path.join(".sealci")).unwrap();
    work.write(".sealci/pipeline.yaml", STAYS);
    push_and_see(&installation, &forge, &work);
}

/// The unpacked source of a crate that is not ours.
fn foreign_source() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))?;
    let registries = fs::read_dir(home.join("registry/src")).ok()?;
    let sources = registries.flatten().filter_map(|registry| fs::read_dir(registry.path()).ok()).flatten();
    sources.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("serde_json-") && path.join("src/lib.rs").exists()
    })
}

#[test]
fn a_push_to_a_repository_that_is_not_ours() {
    let Some(source) = foreign_source() else {
        skip("git", "a_push_to_a_repository_that_is_not_ours", "cargo keeps no source of serde_json here");
        return;
    };
    let installation = Installation::start();
    let root = installation.scratch("forge");
    fs::create_dir(&root).unwrap();
    git(&root, &["init", "--quiet", "--bare", "--initial-branch=main", "serde_json.git"]);
    let forge = Forge::serve(&root, "serde_json");
    let work = Repository { path: installation.scratch("work") };
    let copy = Command::new("cp").arg("-r").args([&source, &work.path]).status().unwrap();
    assert!(copy.success());
    work.git(&["init", "--quiet", "--initial-branch=main"]);
    work.commit("Import the crate's source");
    work.git(&["push", "--quiet", &forge.url, "HEAD:refs/heads/main"]);
    installation.watch(&forge.url);
    fs::create_dir_all(work.path.join(".sealci")).unwrap();
    work.write(".sealci/pipeline.yaml", STAYS);
    push_and_see(&installation, &forge, &work);
}

#[test]
fn tags_are_events_too_where_they_are_asked_for() {
    let installation = Installation::start();
    let root = installation.scratch("forge");
    fs::create_dir(&root).unwrap();
    git(&root, &["init", "--quiet", "--bare", "--initial-branch=main", "small.git"]);
    let forge = Forge::serve(&root, "small");
    let manifest =
        "name: small\nactions:\n  say:\n    commands: ['echo $SEALCI_EVENT $SEALCI_TAG $SEALCI_BRANCH.']\n";
    let work = Repository::with_manifest(installation.scratch("work"), manifest);
    work.git(&["push", "--quiet", &forge.url, "HEAD:refs/heads/main"]);
    let added =
        installation.sealci(&["repo", "add", &forge.url, "--poll", "1", "--branch", "main", "--tag", "v*"]);
    assert!(added.status.success(), "{}", both(&added));
    installation.wait_for_look();
    let revision = work.commit("Tagged");
    work.git(&[
        "push",
        "--quiet",
        &forge.url,
        "HEAD:refs/tags/v1",
        "HEAD:refs/tags/other",
        "HEAD:refs/heads/side",
    ]);
    let pipeline = eventually("the tag to become a pipeline", || installation.pipelines_of(&revision).pop());
    let number = pipeline["number"].to_string();
    assert_eq!(installation.finished(&number)["outcome"], "succeeded");
    assert_eq!(installation.text(&number, "say"), "tag v1 .\n");
    installation.wait_for_looks(1);
    assert_eq!(installation.pipelines_of(&revision).len(), 1, "neither the other tag nor the other branch");
}
