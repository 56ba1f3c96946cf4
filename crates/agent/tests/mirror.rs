//! Checks out of real repositories, with the real git.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

use sealci_agent::mirror::MirrorCheckout;
use sealci_agent::workspace::{Checkout, Source};
use sealci_core::outcome::Cause;
use sealci_git::{AllowedTransports, Git, Mirrors, Options};

fn git(folder: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"])
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn commit(repository: &Path, text: &str) -> String {
    std::fs::write(repository.join("file"), text).unwrap();
    git(repository, &["add", "."]);
    git(repository, &["commit", "-q", "-m", text]);
    git(repository, &["rev-parse", "HEAD"])
}

#[tokio::test]
async fn each_attempt_has_its_own_tree_at_the_exact_revision() {
    let folder = tempfile::tempdir().unwrap();
    let repository = folder.path().join("repository");
    std::fs::create_dir(&repository).unwrap();
    git(&repository, &["init", "-q"]);
    let first = commit(&repository, "one");
    let second = commit(&repository, "two");

    let runner = Git::new(Options::new(folder.path().join("home"))).unwrap();
    let mirrors = Mirrors::new(runner, folder.path().join("mirrors"), 1 << 30).unwrap();
    let checkout = MirrorCheckout::new(mirrors, AllowedTransports { file: true, http: false });
    let source = |revision: &str| Source {
        repository_url: format!("file://{}", repository.display()),
        r#ref: Some("refs/heads/main".parse().unwrap()),
        revision: revision.parse().unwrap(),
        credentials: None,
    };
    for (name, revision, text) in [("a", &first, "one"), ("b", &second, "two"), ("c", &first, "one")] {
        let into = folder.path().join(name);
        std::fs::create_dir(&into).unwrap();
        checkout.prepare(&source(revision), &into).await.unwrap();
        assert_eq!(std::fs::read_to_string(into.join("file")).unwrap(), text);
        // What an action does to its tree touches nobody else's.
        std::fs::write(into.join("file"), "changed").unwrap();
    }

    let into = folder.path().join("d");
    std::fs::create_dir(&into).unwrap();
    let error = checkout.prepare(&source(&"e".repeat(40)), &into).await.unwrap_err();
    assert_eq!(error.cause(), Cause::Workspace);
    let message = error.to_string();
    assert!(message.contains(&"e".repeat(40)) && message.contains("repository"), "{message}");

    let elsewhere = Source { repository_url: "https://u:hunter2@127.0.0.1:1/o/r".into(), ..source(&first) };
    let message = checkout.prepare(&elsewhere, &into).await.unwrap_err().to_string();
    assert!(message.contains("127.0.0.1:1/o/r") && !message.contains("hunter2"), "{message}");
}
