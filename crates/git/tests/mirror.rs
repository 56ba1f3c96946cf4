//! Mirroring real repositories and checking exact revisions out of them.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test
mod support;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use sealci_core::event::{RefName, Revision};
use sealci_git::testing::{Mode, Repository, SmartHttp};
use sealci_git::{CheckoutError, EntryKind, Evicted, Mirror, MirrorError, Mirrors, ReadError, Remote};
use support::{Bench, remote, remote_with_token, tree};

fn main_ref() -> RefName {
    "refs/heads/main".parse().unwrap()
}

async fn open(bench: &Bench, remote: &Remote) -> Mirror {
    bench.mirrors().open(remote.url.identity()).await.unwrap()
}

/// A server, a repository on it, and the mirror to be filled from it.
async fn served(bench: &Bench) -> (SmartHttp, Repository, Remote, Mirror) {
    let repository = bench.repository("a");
    let server = SmartHttp::start(bench.root(), None).await.unwrap();
    let remote = remote(&format!("{}/a.git", server.url));
    let mirror = open(bench, &remote).await;
    (server, repository, remote, mirror)
}

#[tokio::test]
async fn the_exact_revision_is_checked_out_though_the_branch_has_moved_on() {
    let bench = Bench::new();
    let (server, repository, remote, mirror) = served(&bench).await;
    repository.write("bin/run", "#!/bin/sh\n");
    std::fs::set_permissions(repository.work.join("bin/run"), PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("bin/run", repository.work.join("link")).unwrap();
    let old = repository.push_file("main", "text", "old");
    // Rewritten, not just moved on: the old commit is on no branch any more.
    repository.git(&["commit", "--quiet", "--amend", "--allow-empty", "-m", "other"]);
    let new = repository.push_file("main", "text", "new");

    let into = bench.workspace("w1");
    mirror.materialize(&remote, &old, Some(&main_ref()), &into).await.unwrap();
    assert_eq!(tree(&into), ["bin/", "bin/run", "link", "text"]);
    assert_eq!(std::fs::read_to_string(into.join("text")).unwrap(), "old");
    assert_ne!(std::fs::metadata(into.join("bin/run")).unwrap().permissions().mode() & 0o111, 0);
    assert_eq!(std::fs::read_link(into.join("link")).unwrap().to_str(), Some("bin/run"));

    let into = bench.workspace("w2");
    mirror.materialize(&remote, &new, Some(&main_ref()), &into).await.unwrap();
    assert_eq!(std::fs::read_to_string(into.join("text")).unwrap(), "new");

    // Warm: nothing is asked of the server.
    let requests = server.requests();
    let into = bench.workspace("w3");
    mirror.materialize(&remote, &old, Some(&main_ref()), &into).await.unwrap();
    assert_eq!(server.requests(), requests);
    assert_eq!(
        std::fs::read_dir(bench.root().join("mirrors")).unwrap().count(),
        2,
        "the mirror and the locks"
    );
}

#[tokio::test]
async fn callers_at_the_same_time_share_one_fetch() {
    let bench = Bench::new();
    let (server, repository, remote, mirror) = served(&bench).await;
    let revision = repository.push_file("main", "a", "1");
    let callers = (0..8).map(|_| {
        let (mirror, remote, revision) = (mirror.clone(), remote.clone(), revision.clone());
        async move { mirror.ensure(&remote, &revision, Some(&main_ref())).await }
    });
    for result in join_all(callers).await {
        result.unwrap();
    }
    assert_eq!(server.fetches(), 1);
}

async fn join_all<T: Send + 'static>(
    futures: impl Iterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let mut set = tokio::task::JoinSet::new();
    futures.for_each(|future| drop(set.spawn(future)));
    set.join_all().await
}

#[tokio::test]
async fn callers_that_wait_share_a_failure_instead_of_repeating_it() {
    let bench = Bench::with(|options| options.limits.fetch_timeout = Duration::from_secs(2));
    let (server, repository, remote, mirror) = served(&bench).await;
    let revision = repository.push_file("main", "a", "1");
    server.set_mode(Mode::Hang);
    let started = std::time::Instant::now();
    let callers = (0..6).map(|_| {
        let (mirror, remote, revision) = (mirror.clone(), remote.clone(), revision.clone());
        async move { mirror.ensure(&remote, &revision, None).await }
    });
    for result in join_all(callers).await {
        assert!(result.is_err());
    }
    assert!(started.elapsed() < Duration::from_secs(6), "{:?}", started.elapsed());
    // And a failure is not held against whoever comes later.
    server.set_mode(Mode::Serve);
    mirror.ensure(&remote, &revision, None).await.unwrap();
}

#[tokio::test]
async fn a_server_that_gives_no_commits_by_id_is_asked_for_its_refs() {
    let bench = Bench::new();
    let (_server, repository, remote, mirror) = served(&bench).await;
    let first = repository.push_file("main", "a", "1");
    let second = repository.push_file("main", "a", "2");
    let other = repository.push_file("other", "a", "3");
    // The old protocol, in which only advertised commits may be asked for.
    repository.git_bare(&["config", "protocol.version", "0"]);
    for (revision, text) in [(&first, "1"), (&other, "3"), (&second, "2")] {
        let into = bench.workspace(text);
        mirror.materialize(&remote, revision, Some(&main_ref()), &into).await.unwrap();
        assert_eq!(std::fs::read_to_string(into.join("a")).unwrap(), text);
    }
}

#[tokio::test]
async fn a_commit_that_is_nowhere_is_absent() {
    let bench = Bench::new();
    let (_server, repository, remote, mirror) = served(&bench).await;
    repository.push_file("main", "a", "1");
    let nowhere: Revision = "1234567890".repeat(4).parse().unwrap();
    let error = mirror.ensure(&remote, &nowhere, Some(&main_ref())).await.unwrap_err();
    assert!(matches!(*error, MirrorError::Absent { .. }), "{error:?}");
    let error = mirror.checkout(&nowhere, &bench.workspace("w")).await.unwrap_err();
    assert!(matches!(error, CheckoutError::Absent { .. }), "{error:?}");
    let error = mirror.read_file(&nowhere, "a", 10).await.unwrap_err();
    assert!(matches!(error, ReadError::AbsentRevision { .. }), "{error:?}");
    let error = mirror.list(&nowhere, "").await.unwrap_err();
    assert!(matches!(error, ReadError::AbsentRevision { .. }), "{error:?}");
}

#[tokio::test]
async fn a_private_repository_is_mirrored_with_its_token() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    let revision = repository.push_file("main", "a", "1");
    let server = SmartHttp::start(bench.root(), Some(("git", "hunter2"))).await.unwrap();
    let url = format!("{}/a.git", server.url);
    let remote = remote_with_token(&url, "hunter2");
    let mirror = open(&bench, &remote).await;
    mirror.ensure(&remote, &revision, None).await.unwrap();
    // Nothing of it stays on disk.
    let found = std::process::Command::new("grep")
        .args(["-rlE", "hunter2|Z2l0Omh1bnRlcjI="])
        .arg(bench.root())
        .output();
    assert_eq!(String::from_utf8_lossy(&found.unwrap().stdout), "");
}

#[tokio::test]
async fn a_broken_mirror_is_made_anew() {
    let bench = Bench::new();
    let (_server, repository, remote, mirror) = served(&bench).await;
    let revision = repository.push_file("main", "a", "1");
    mirror.ensure(&remote, &revision, None).await.unwrap();
    let objects = bench.root().join("mirrors");
    let key =
        std::fs::read_dir(&objects).unwrap().flatten().find(|entry| entry.file_name() != "locks").unwrap();
    let folder = key.path().join("repository.git");

    let breakages: [(&str, &dyn Fn()); 5] = [
        ("a cut pack", &|| {
            for_each_file(&folder.join("objects/pack"), |path| std::fs::write(path, b"PACK").unwrap())
        }),
        ("no objects", &|| std::fs::remove_dir_all(folder.join("objects")).unwrap()),
        ("no HEAD", &|| std::fs::remove_file(folder.join("HEAD")).unwrap()),
        ("a garbled HEAD", &|| std::fs::write(folder.join("HEAD"), [0; 40]).unwrap()),
        ("a garbled config", &|| std::fs::write(folder.join("config"), "[[[").unwrap()),
    ];
    for (number, (what, breakage)) in breakages.iter().enumerate() {
        breakage();
        let into = bench.workspace(&format!("w{number}"));
        let result = mirror.materialize(&remote, &revision, Some(&main_ref()), &into).await;
        assert!(result.is_ok(), "{what}: {result:?}");
        assert_eq!(tree(&into), ["a"], "{what}");
    }
    breakages[0].1();
    mirror.ensure(&remote, &revision, None).await.unwrap();
    assert_eq!(mirror.read_file(&revision, "a", 10).await.unwrap(), b"1");
}

fn for_each_file(folder: &std::path::Path, act: impl Fn(&std::path::Path)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).unwrap();
        act(&path);
    }
}

#[tokio::test]
async fn what_a_killed_fetch_left_does_not_disturb_the_next() {
    let bench = Bench::new();
    let (_server, repository, remote, mirror) = served(&bench).await;
    let first = repository.push_file("main", "a", "1");
    mirror.ensure(&remote, &first, Some(&main_ref())).await.unwrap();
    let folder = std::fs::read_dir(bench.root().join("mirrors")).unwrap().flatten();
    let folder = folder.map(|entry| entry.path().join("repository.git")).find(|path| path.exists()).unwrap();
    let local = std::fs::read_dir(folder.join("refs/sealci")).unwrap().flatten().next().unwrap().path();
    for leftover in [
        folder.join("shallow.lock"),
        folder.join("packed-refs.lock"),
        local.with_extension("lock"),
        folder.join("objects/pack/tmp_pack_abc"),
    ] {
        std::fs::write(leftover, b"").unwrap();
    }
    let second = repository.push_file("main", "a", "2");
    mirror.ensure(&remote, &second, Some(&main_ref())).await.unwrap();
    assert!(!folder.join("objects/pack/tmp_pack_abc").exists());
}

#[tokio::test]
async fn a_repository_over_the_size_limit_is_refused_and_its_bytes_removed() {
    let bench = Bench::with(|options| options.limits.max_mirror_bytes = 1 << 20);
    let (_server, repository, remote, mirror) = served(&bench).await;
    let noise = std::fs::File::open("/dev/urandom").unwrap();
    for part in 0..6 {
        let mut bytes = vec![0; 1 << 20];
        std::io::Read::read_exact(&mut &noise, &mut bytes).unwrap();
        repository.write(&format!("big{part}"), bytes);
    }
    let revision = repository.push_file("main", "a", "1");
    let result = mirror.ensure(&remote, &revision, None).await;
    assert!(result.is_err_and(|error| format!("{error:?}").contains("TooLarge")));
    let left = bench.mirrors().evict().await.unwrap();
    assert!(left.remaining_bytes < 1 << 20, "{left:?}");
}

#[tokio::test]
async fn files_and_folders_of_a_revision_are_read() {
    let bench = Bench::new();
    let (_server, repository, remote, mirror) = served(&bench).await;
    repository.write(".sealci/pipeline.yaml", "name: x\n");
    repository.write(".sealci/sub/deep", "d");
    repository.write("blank name", "");
    let revision = repository.commit("x");
    repository.push("HEAD:refs/heads/main");
    mirror.ensure(&remote, &revision, None).await.unwrap();

    assert_eq!(mirror.read_file(&revision, ".sealci/pipeline.yaml", 8).await.unwrap(), b"name: x\n");
    assert_eq!(mirror.read_file(&revision, "blank name", 0).await.unwrap(), b"");
    let error = mirror.read_file(&revision, ".sealci/pipeline.yaml", 7).await.unwrap_err();
    assert!(matches!(error, ReadError::TooLarge { .. }), "{error:?}");
    for path in ["none", ".sealci", ".sealci/none.yaml"] {
        let error = mirror.read_file(&revision, path, 100).await.unwrap_err();
        assert!(matches!(error, ReadError::NoFile { .. }), "{path}: {error:?}");
    }
    for path in ["", "/etc/passwd", "../x", "a/../b", "a\nHEAD", "./a", "a//b"] {
        let error = mirror.read_file(&revision, path, 100).await.unwrap_err();
        assert!(matches!(error, ReadError::InvalidPath { .. }), "{path}: {error:?}");
    }
    let entries = mirror.list(&revision, ".sealci").await.unwrap();
    let found: Vec<_> =
        entries.iter().map(|entry| (entry.path.as_str(), entry.kind, entry.size_bytes)).collect();
    let expected =
        [(".sealci/pipeline.yaml", EntryKind::File, Some(8)), (".sealci/sub", EntryKind::Folder, None)];
    assert_eq!(found, expected);
    assert_eq!(mirror.list(&revision, "none").await.unwrap(), []);
    assert_eq!(mirror.list(&revision, "").await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_workspace_must_be_empty() {
    let bench = Bench::new();
    let (_server, repository, remote, mirror) = served(&bench).await;
    let revision = repository.push_file("main", "a", "1");
    let into = bench.workspace("w");
    std::fs::write(into.join("mine"), "").unwrap();
    let error = mirror.materialize(&remote, &revision, None, &into).await.unwrap_err();
    assert!(matches!(error, CheckoutError::NotEmpty { .. }), "{error:?}");
}

#[tokio::test]
async fn mirrors_over_the_budget_go_oldest_first_and_never_in_use() {
    let bench = Bench::new();
    let mirrors = Mirrors::new(bench.git.clone(), bench.root().join("mirrors"), 1).unwrap();
    let other_process = Mirrors::new(bench.git.clone(), bench.root().join("mirrors"), 1).unwrap();
    let mut held = Vec::new();
    for name in ["a", "b", "c"] {
        let repository = bench.repository(name);
        let revision = repository.push_file("main", "a", name);
        let remote = remote(&repository.file_url());
        let mirror = mirrors.open(remote.url.identity()).await.unwrap();
        mirror.ensure(&remote, &revision, None).await.unwrap();
        held.push((mirror, remote, revision));
    }
    assert_eq!(mirrors.evict().await.unwrap().mirrors, 0, "all are in use");
    assert_eq!(other_process.evict().await.unwrap().mirrors, 0, "by another process too");
    let (kept, remote, revision) = held.remove(1);
    drop(held);
    let Evicted { mirrors: evicted, remaining_bytes } = other_process.evict().await.unwrap();
    assert!(evicted == 2 && remaining_bytes > 0);
    assert!(kept.has(&revision).await);
    drop(kept);
    assert_eq!(mirrors.evict().await.unwrap(), Evicted { mirrors: 1, remaining_bytes: 0 });
    let again = mirrors.open(remote.url.identity()).await.unwrap();
    assert!(!again.has(&revision).await);
    again.ensure(&remote, &revision, None).await.unwrap();
}

#[tokio::test]
async fn a_sha256_repository_is_mirrored_too() {
    let bench = Bench::new();
    let folder = bench.root().join("s.git");
    let repository = Repository { bare: folder.clone(), work: folder.clone() };
    let status = std::process::Command::new("git")
        .args(["init", "-q", "--object-format=sha256", "-b", "main"])
        .arg(&folder)
        .status();
    assert!(status.unwrap().success());
    repository.write("a", "1");
    let revision = repository.commit("x");
    let remote = remote(&repository.file_url());
    let mirror = open(&bench, &remote).await;
    let into = bench.workspace("w");
    mirror.materialize(&remote, &revision, None, &into).await.unwrap();
    assert_eq!(tree(&into), ["a"]);
}
