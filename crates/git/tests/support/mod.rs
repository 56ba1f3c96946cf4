//! What the tests of this crate share: git with short limits, in a folder of its own.

#![allow(dead_code, clippy::unwrap_used)] // each test file uses its part; what fails here should fail the test

use std::path::Path;
use std::time::Duration;

use sealci_git::testing::Repository;
use sealci_git::{AllowedTransports, Credentials, Git, Mirrors, Options, Remote, RemoteUrl, Secret};
use tempfile::TempDir;

pub const ALL: AllowedTransports = AllowedTransports { http: true, file: true };

pub struct Bench {
    pub folder: TempDir,
    pub git: Git,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(|_| {})
    }

    pub fn with(change: impl FnOnce(&mut Options)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut options = Options::new(folder.path().join("home"));
        options.allow_local_addresses = true;
        options.limits.query_timeout = Duration::from_secs(20);
        change(&mut options);
        Self { git: Git::new(options).unwrap(), folder }
    }

    pub fn root(&self) -> &Path {
        self.folder.path()
    }

    pub fn repository(&self, name: &str) -> Repository {
        Repository::create(self.root(), name)
    }

    pub fn mirrors(&self) -> Mirrors {
        Mirrors::new(self.git.clone(), self.root().join("mirrors"), u64::MAX).unwrap()
    }

    pub fn workspace(&self, name: &str) -> std::path::PathBuf {
        let path = self.root().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    }
}

pub fn remote(url: &str) -> Remote {
    Remote::new(RemoteUrl::parse(url, &ALL).unwrap(), Credentials::None)
}

pub fn remote_with_token(url: &str, secret: &str) -> Remote {
    let credentials = Credentials::Token { username: "git".into(), secret: Secret::new(secret) };
    Remote::new(RemoteUrl::parse(url, &ALL).unwrap(), credentials)
}

/// The paths below a folder, sorted, folders with a slash at their end.
pub fn tree(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, all: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type().unwrap().is_dir() {
                all.push(format!("{name}/"));
                walk(&entry.path(), &format!("{name}/"), all);
            } else {
                all.push(name);
            }
        }
    }
    let mut all = Vec::new();
    walk(folder, "", &mut all);
    all.sort();
    all
}
