//! Copying a working tree with what is not committed.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test
mod support;

use std::os::unix::fs::PermissionsExt;

use support::{Bench, tree};

#[tokio::test]
async fn uncommitted_changes_are_copied_and_ignored_files_are_not() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    repository.write("kept", "1");
    repository.write("changed", "1");
    repository.write("deleted", "1");
    repository.write("folder/becomes a file", "1");
    repository.write(".gitignore", "target/\n*.log\n");
    repository.commit("x");
    repository.write("changed", "2");
    repository.write("new/deep/file", "3");
    repository.write("target/debug/huge", "x");
    repository.write("a.log", "x");
    std::fs::remove_file(repository.work.join("deleted")).unwrap();
    std::fs::remove_dir_all(repository.work.join("folder")).unwrap();
    repository.write("folder", "now a file");
    repository.write("run", "#!/bin/sh\n");
    std::fs::set_permissions(repository.work.join("run"), PermissionsExt::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("/nowhere", repository.work.join("dangling")).unwrap();

    let into = bench.workspace("w");
    let snapshot = bench.git.snapshot_worktree(&repository.work, &into).await.unwrap();
    let expected =
        [".gitignore", "changed", "dangling", "folder", "kept", "new/", "new/deep/", "new/deep/file", "run"];
    assert_eq!(tree(&into), expected);
    assert_eq!(std::fs::read_to_string(into.join("changed")).unwrap(), "2");
    assert_eq!(std::fs::metadata(into.join("run")).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(std::fs::read_link(into.join("dangling")).unwrap().to_str(), Some("/nowhere"));
    let time = |folder: &std::path::Path| std::fs::metadata(folder.join("kept")).unwrap().modified().unwrap();
    assert_eq!(time(&into), time(&repository.work));
    assert_eq!(snapshot.head, Some(repository.head()));
    assert_eq!(snapshot.r#ref.unwrap().as_str(), "refs/heads/main");
    assert_eq!(snapshot.files, 7);
}

#[tokio::test]
async fn a_folder_that_became_a_link_is_copied_as_a_link_and_not_written_through() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    repository.write("folder/x", "tracked");
    repository.commit("x");
    let elsewhere = bench.workspace("elsewhere");
    std::fs::write(elsewhere.join("x"), "precious").unwrap();
    std::fs::remove_dir_all(repository.work.join("folder")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, repository.work.join("folder")).unwrap();
    let into = bench.workspace("w");
    bench.git.snapshot_worktree(&repository.work, &into).await.unwrap();
    assert_eq!(tree(&into), ["folder"]);
    assert_eq!(std::fs::read_to_string(elsewhere.join("x")).unwrap(), "precious");
}

#[tokio::test]
async fn only_the_folder_asked_for_is_copied_from_a_larger_repository() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    repository.write("outside", "1");
    repository.write("part/inside", "1");
    repository.commit("x");
    let into = bench.workspace("w");
    bench.git.snapshot_worktree(&repository.work.join("part"), &into).await.unwrap();
    assert_eq!(tree(&into), ["inside"]);
}

#[tokio::test]
async fn a_folder_outside_git_and_a_repository_without_commits_are_copied_too() {
    let bench = Bench::new();
    let plain = bench.workspace("plain");
    std::fs::create_dir_all(plain.join("a/b")).unwrap();
    std::fs::write(plain.join("a/b/c"), "1").unwrap();
    let into = bench.workspace("w1");
    let snapshot = bench.git.snapshot_worktree(&plain, &into).await.unwrap();
    assert_eq!(tree(&into), ["a/", "a/b/", "a/b/c"]);
    assert_eq!((snapshot.head, snapshot.r#ref, snapshot.files), (None, None, 1));

    let repository = bench.repository("a");
    repository.write("first", "1");
    let into = bench.workspace("w2");
    let snapshot = bench.git.snapshot_worktree(&repository.work, &into).await.unwrap();
    assert_eq!(tree(&into), ["first"]);
    assert_eq!(snapshot.head, None);
}

#[tokio::test]
async fn a_repository_inside_the_repository_is_copied_without_its_git_folder() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    repository.write("a", "1");
    repository.commit("x");
    let inner = sealci_git::testing::Repository { bare: "/".into(), work: repository.work.join("inner") };
    std::fs::create_dir(&inner.work).unwrap();
    inner.git(&["init", "--quiet"]);
    inner.write("b", "1");
    let into = bench.workspace("w");
    bench.git.snapshot_worktree(&repository.work, &into).await.unwrap();
    assert_eq!(tree(&into), ["a", "inner/", "inner/b"]);
}
