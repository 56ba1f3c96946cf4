//! Makes repositories on the spot: a working tree to commit in, and the bare repository it pushes to.

// Test code: what fails here is the test's own set-up, and should say so loudly.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use sealci_core::event::Revision;

/// A bare repository below some root, and a working tree beside it.
#[derive(Debug)]
pub struct Repository {
    /// The bare repository, which is served.
    pub bare: PathBuf,
    /// The working tree that pushes to it.
    pub work: PathBuf,
}

impl Repository {
    /// Makes `<root>/<name>.git` and `<root>/<name>.work`, without any commit, on branch `main`.
    pub fn create(root: &Path, name: &str) -> Self {
        let repository =
            Self { bare: root.join(format!("{name}.git")), work: root.join(format!("{name}.work")) };
        let bare = repository.bare.to_str().expect("tests use UTF-8 paths");
        let work = repository.work.to_str().expect("tests use UTF-8 paths");
        run(root, &["init", "--quiet", "--bare", "-b", "main", bare]);
        run(root, &["init", "--quiet", "-b", "main", work]);
        repository.git(&["remote", "add", "origin", bare]);
        repository
    }

    /// Runs git in the working tree and returns what it printed, trimmed.
    pub fn git(&self, args: &[&str]) -> String {
        run(&self.work, args)
    }

    /// Runs git in the bare repository.
    pub fn git_bare(&self, args: &[&str]) -> String {
        run(&self.bare, args)
    }

    /// Writes a file into the working tree.
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.work.join(path);
        std::fs::create_dir_all(path.parent().expect("below the working tree")).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Commits everything in the working tree.
    pub fn commit(&self, message: &str) -> Revision {
        self.git(&["add", "--all", "--force"]);
        self.git(&["commit", "--quiet", "--allow-empty", "-m", message]);
        self.head()
    }

    /// The commit the working tree is on.
    pub fn head(&self) -> Revision {
        self.git(&["rev-parse", "HEAD"]).parse().expect("HEAD is a commit")
    }

    /// Writes a file, commits, and pushes to a branch.
    pub fn push_file(&self, branch: &str, path: &str, content: &str) -> Revision {
        self.write(path, content);
        let revision = self.commit(&format!("Write {path}"));
        self.push(&format!("HEAD:refs/heads/{branch}"));
        revision
    }

    /// Pushes a refspec, replacing what is there.
    pub fn push(&self, refspec: &str) {
        self.git(&["push", "--quiet", "--force", "origin", refspec]);
    }

    /// The URL by which the bare repository is reached on this machine.
    pub fn file_url(&self) -> String {
        format!("file://{}", self.bare.display())
    }
}

/// Runs git with an author and without the machine's own configuration.
fn run(folder: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .current_dir(folder)
        .args(args)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_AUTHOR_NAME", "A Tester")
        .env("GIT_AUTHOR_EMAIL", "tester@example.org")
        .env("GIT_COMMITTER_NAME", "A Tester")
        .env("GIT_COMMITTER_EMAIL", "tester@example.org")
        .output()
        .expect("git is installed");
    assert!(
        output.status.success(),
        "git {args:?} in {} ended with {}: {}",
        folder.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
