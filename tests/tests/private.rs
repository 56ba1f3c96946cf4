//! Builds a private repository, which a server with passwords gives to nobody else.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::fs;

use sealci_git::testing::SmartHttp;
use sealci_tests::{Installation, Part, Repository, eventually};
use serde_json::{Value, json};

const MANIFEST: &str = "name: private
actions:
  first:
    configuration: {executor: process}
    commands: [test -f for-friends-only]
";

const TOKEN: &str = "ghost-walks-at-noon-7391";
const WRONG: &str = "ghost-sleeps-at-noon-42";
/// Either with its user name, as HTTP carries it.
const CARRIED: [&str; 2] = ["Y2k6Z2hvc3Qtd2Fsa3MtYXQtbm9vbi03Mzkx", "Y2k6Z2hvc3Qtc2xlZXBzLWF0LW5vb24tNDI="];

fn assert_unseen(what: &str, text: &str) {
    for secret in [TOKEN, WRONG].iter().chain(&CARRIED) {
        assert!(!text.contains(secret), "{what} shows a secret: {text}");
    }
}

/// What every process on this machine was started with.
fn command_lines() -> String {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| Some(entry.ok()?.path()));
    let lines = processes.filter_map(|process| fs::read(process.join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).into_owned() + "\n").collect()
}

/// The newest pipeline of a revision, once it is finished.
fn finished(installation: &Installation, revision: &str) -> Value {
    let pipeline = eventually("the pipeline to finish", || {
        assert_unseen("a command line", &command_lines());
        let page = installation.json(&["list", "--revision", revision]);
        page["pipelines"].as_array()?.first().filter(|pipeline| pipeline["state"] == "finished").cloned()
    });
    installation.json(&["show", &pipeline["number"].to_string()])
}

#[test]
fn a_private_repository_is_built_and_its_token_seen_nowhere() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut installation = Installation::none();
    let root = installation.scratch("served");
    let bare = root.join("team/private.git");
    let repository = Repository::with_manifest(installation.scratch("work"), MANIFEST);
    repository.git(&["init", "--quiet", "--bare", "--initial-branch=main", &bare.display().to_string()]);
    let push = || repository.git(&["push", "--quiet", &bare.display().to_string(), "main"]);
    push();
    let server = runtime.block_on(SmartHttp::start(&root, Some(("ci", TOKEN)))).unwrap();
    let url = format!("{}/team/private.git", server.url);

    for part in [Part::Controller, Part::Monitor] {
        let (file, token) = (format!("{part:?}.json"), format!("{part:?}.token"));
        fs::write(installation.scratch(&token), TOKEN).unwrap();
        let entry = json!({"url": format!("{}/team/", server.url), "username": "ci", "token_file": token});
        fs::write(installation.scratch(&file), json!({"repositories": [entry]}).to_string()).unwrap();
        let file = installation.scratch(&file).display().to_string();
        installation.arguments.entry(part).or_default().extend(["--repositories".to_owned(), file]);
    }
    installation.start_all();
    let added = installation.sealci(&["repo", "add", &url, "--poll", "1"]);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    eventually("the monitor to look at the repository", || {
        installation.json(&["repo", "list"])[0]["last_poll"]["at"].as_str().map(|_| ())
    });

    repository.write("for-friends-only", "\n");
    let revision = repository.commit("For friends");
    push();
    let shown = finished(&installation, &revision);
    assert_eq!(shown["outcome"], "succeeded", "{shown}");
    assert_unseen("the API", &shown.to_string());

    // The token is replaced by one that the server does not know.
    fs::write(installation.scratch("Controller.token"), WRONG).unwrap();
    installation.restart(Part::Controller);
    let revision = repository.commit("Nobody may see this");
    push();
    let manifest = repository.path.join(".sealci/pipeline.yaml").display().to_string();
    let submitted = eventually("the controller to take a pipeline", || {
        let manual =
            ["submit", "--repo", &url, "--file", &manifest, "--revision", &revision, "--ref", "main"];
        let output = installation.sealci(&manual);
        output.status.success().then_some(output)
    });
    assert_unseen("the command line's answer", &String::from_utf8_lossy(&submitted.stdout));
    let shown = finished(&installation, &revision);
    assert_eq!(shown["outcome"], "errored", "{shown}");
    assert!(shown.to_string().contains("refuses the credentials"), "{shown}");
    assert_unseen("the API", &shown.to_string());
    for part in Part::ALL {
        assert_unseen("a log", &installation.service_log(part));
    }
}
