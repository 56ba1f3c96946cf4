//! Builds a private repository that a real ssh server gives to whoever has its deploy key, and to nobody else.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use sealci_tests::{Installation, Part, Repository, Sshd, eventually};
use serde_json::{Value, json};

const MANIFEST: &str = "name: by ssh
actions:
  first:
    configuration: {executor: process}
    commands: [test -f for-friends-only]
";

/// A repository behind a server, and services that have a key to it.
struct Scene {
    installation: Installation,
    sshd: Sshd,
    repository: Repository,
    bare: PathBuf,
    url: String,
}

impl Scene {
    fn new(test: &str) -> Option<Self> {
        let mut installation = Installation::none();
        let sshd = Sshd::start(installation.scratch("sshd"), test)?;
        let bare = installation.scratch("served").join("private.git");
        let repository = Repository::with_manifest(installation.scratch("work"), MANIFEST);
        repository.git(&["init", "--quiet", "--bare", "--initial-branch=main", &bare.display().to_string()]);
        let url = sshd.url(&bare);
        let key = sshd.new_key("deploy");
        sshd.let_in(&key);
        let entry = json!({"url": url, "ssh_key_file": key});
        let file = installation.scratch("repositories.json");
        fs::write(&file, json!({"repositories": [entry]}).to_string()).unwrap();
        for part in [Part::Controller, Part::Monitor] {
            let arguments = ["--repositories".to_owned(), file.display().to_string()];
            installation.arguments.entry(part).or_default().extend(arguments);
        }
        let scene = Self { installation, sshd, repository, bare, url };
        scene.push();
        Some(scene)
    }

    fn push(&self) {
        self.repository.git(&["push", "--quiet", &self.bare.display().to_string(), "main"]);
    }

    fn watch(&self) {
        let added = self.installation.sealci(&["repo", "add", &self.url, "--poll", "1"]);
        assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    }

    /// Why the monitor's last look failed, once it says this.
    fn monitor_says(&self, what: &str) -> String {
        eventually(&format!("the monitor to say `{what}`"), || {
            let error =
                self.installation.json(&["repo", "list"])[0]["last_poll"]["error"].as_str()?.to_owned();
            error.contains(what).then_some(error)
        })
    }

    fn monitor_is_content(&self) {
        eventually("the monitor to look at the repository", || {
            let poll = &self.installation.json(&["repo", "list"])[0]["last_poll"];
            (poll["at"].is_string() && poll["error"].is_null()).then_some(())
        });
    }

    /// The newest pipeline of a revision, once it is finished.
    fn finished(&self, revision: &str) -> Value {
        let pipeline = eventually("the pipeline to finish", || {
            let page = self.installation.json(&["list", "--revision", revision]);
            page["pipelines"].as_array()?.first().filter(|found| found["state"] == "finished").cloned()
        });
        self.installation.json(&["show", &pipeline["number"].to_string()])
    }

    /// What an attempt ends with that the agent has to check out.
    fn submitted(&self) -> Value {
        let revision = self.repository.commit("Nobody may see this");
        self.push();
        let manifest = self.repository.path.join(".sealci/pipeline.yaml").display().to_string();
        let submitted = self.installation.sealci(&[
            "submit",
            "--repo",
            &self.url,
            "--file",
            &manifest,
            "--revision",
            &revision,
            "--ref",
            "main",
        ]);
        assert!(submitted.status.success(), "{}", String::from_utf8_lossy(&submitted.stderr));
        self.finished(&revision)
    }
}

/// Every file below a folder that holds a private key.
fn private_keys(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            found.extend(private_keys(&path));
        } else if fs::read(&path).unwrap_or_default().windows(11).any(|part| part == b"PRIVATE KEY") {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_deploy_key_opens_a_private_repository_and_a_wrong_one_does_not() {
    let Some(mut scene) = Scene::new("a_deploy_key_opens_a_private_repository") else { return };
    scene.installation.start_all();
    scene.watch();
    scene.monitor_is_content();
    scene.repository.write("for-friends-only", "\n");
    let revision = scene.repository.commit("For friends");
    scene.push();
    let shown = scene.finished(&revision);
    assert_eq!(shown["outcome"], "succeeded", "{shown}");
    // Git had it in a file, for as long as one call took.
    eventually("no key to be left", || private_keys(&scene.installation.data()).is_empty().then_some(()));

    scene.sshd.let_in(&scene.sshd.new_key("another"));
    let said = scene.monitor_says("refuses the credentials");
    assert!(said.contains("Permission denied (publickey)") && said.contains("`--repositories`"), "{said}");
    let shown = scene.submitted();
    assert_eq!(shown["outcome"], "errored", "{shown}");
    assert!(shown.to_string().contains("refuses the credentials"), "{shown}");
}

#[test]
fn a_host_key_that_is_not_known_is_refused_and_said_clearly() {
    let Some(mut scene) = Scene::new("a_host_key_that_is_not_known_is_refused") else { return };
    scene.installation.start_all();
    scene.watch();
    // The first one is remembered.
    scene.monitor_is_content();
    scene.repository.write("for-friends-only", "\n");
    let revision = scene.repository.commit("For friends");
    scene.push();
    assert_eq!(scene.finished(&revision)["outcome"], "succeeded");

    scene.sshd.change_host_key();
    let said = scene.monitor_says("host key is not a known one");
    assert!(said.contains("known hosts (docs/repositories.md)"), "{said}");
    let shown = scene.submitted();
    assert_eq!(shown["outcome"], "errored", "{shown}");
    assert!(shown.to_string().contains("host key is not a known one"), "{shown}");

    // Only chosen keys: none at first, then the new one.
    let chosen = scene.installation.scratch("chosen-hosts");
    fs::write(&chosen, "").unwrap();
    let arguments = ["--git-known-hosts".to_owned(), chosen.display().to_string()];
    for part in [Part::Monitor, Part::Controller, Part::Agent] {
        scene.installation.arguments.entry(part).or_default().extend(arguments.clone());
        scene.installation.restart(part);
    }
    let said = scene.monitor_says("host key is not a known one");
    assert!(said.contains("host key is known for"), "{said}");
    fs::write(&chosen, scene.sshd.known_host()).unwrap();
    scene.monitor_is_content();
    assert_eq!(scene.submitted()["outcome"], "succeeded");
}
