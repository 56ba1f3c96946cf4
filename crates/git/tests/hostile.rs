//! Repositories that try to run something, or to write where they should not.

#![allow(clippy::unwrap_used)] // a test's set-up: what fails here should fail the test
mod support;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use sealci_core::event::Revision;
use sealci_git::testing::Repository;
use sealci_git::{CheckoutError, MirrorError};
use support::{Bench, remote};

/// Stores raw bytes as an object, which git's own commands would refuse to make.
fn store(repository: &Repository, kind: &str, bytes: &[u8]) -> String {
    let mut child = Command::new("git")
        .current_dir(&repository.bare)
        .args(["hash-object", "-t", kind, "-w", "--stdin", "--literally"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap().trim().to_owned()
}

fn tree_object(repository: &Repository, entries: &[(&str, &str, &str)]) -> String {
    let mut bytes = Vec::new();
    for (mode, name, id) in entries {
        bytes.extend_from_slice(format!("{mode} {name}\0").as_bytes());
        bytes.extend((0..id.len()).step_by(2).map(|at| u8::from_str_radix(&id[at..at + 2], 16).unwrap()));
    }
    store(repository, "tree", &bytes)
}

/// Commits a tree made by hand to `main` of the bare repository.
fn commit_tree(repository: &Repository, tree: &str) -> Revision {
    let commit = repository.git_bare(&["commit-tree", "-m", "hostile", tree]);
    repository.git_bare(&["update-ref", "refs/heads/main", &commit]);
    commit.parse().unwrap()
}

#[tokio::test]
async fn trees_that_leave_the_workspace_or_write_git_folders_are_refused() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    let blob = store(&repository, "blob", b"#!/bin/sh\ntouch /tmp/owned\n");
    let hooks = tree_object(&repository, &[("100755", "post-checkout", &blob)]);
    let dot_git = tree_object(&repository, &[("40000", "hooks", &hooks)]);
    let above = tree_object(&repository, &[("100644", "owned", &blob)]);
    let link = store(&repository, "blob", b"/tmp");
    for (number, (what, tree)) in [
        ("a name with ..", tree_object(&repository, &[("40000", "..", &above)])),
        ("a name with a slash", tree_object(&repository, &[("100644", "../owned", &blob)])),
        ("a .git folder", tree_object(&repository, &[("40000", ".git", &dot_git)])),
        ("a .GIT folder", tree_object(&repository, &[("40000", ".GIT", &dot_git)])),
        ("a symlinked .git", tree_object(&repository, &[("120000", ".git", &link)])),
        (
            "a link and a folder of one name",
            tree_object(&repository, &[("120000", "x", &link), ("40000", "x", &above)]),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let revision = commit_tree(&repository, &tree);
        let remote = remote(&repository.file_url());
        let mirror = bench.mirrors().open(remote.url.identity()).await.unwrap();
        let outer = bench.workspace(&format!("w{number}"));
        let into = outer.join("inner");
        std::fs::create_dir(&into).unwrap();
        let error = mirror.materialize(&remote, &revision, None, &into).await.unwrap_err();
        let refused = match &error {
            CheckoutError::Refused { .. } => true,
            CheckoutError::Fetch { source, .. } => matches!(**source, MirrorError::Refused { .. }),
            _ => false,
        };
        assert!(refused, "{what}: {error:?}");
        assert_eq!(support::tree(&outer), ["inner/"], "{what}");
    }
    assert!(!Path::new("/tmp/owned").exists());
}

#[tokio::test]
async fn hooks_filters_submodules_and_attributes_run_nothing() {
    let bench = Bench::new();
    let repository = bench.repository("a");
    let mark = bench.root().join("owned");
    let script = format!("#!/bin/sh\ntouch {}\n", mark.display());
    repository.write(".gitattributes", "* filter=evil diff=evil merge=evil\n*.bin filter=lfs -text\n");
    repository.write(
        ".gitmodules",
        format!(
            "[submodule \"x\"]\n\tpath = x\n\turl = \"ext::sh -c touch% {}\"\n\tupdate = !touch {}\n",
            mark.display(),
            mark.display()
        ),
    );
    repository.write(".githooks/post-checkout", &script);
    repository.write("big.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
    repository.write(".lfsconfig", "[lfs]\n\turl = http://169.254.169.254/\n");
    repository.git(&["add", "--all"]);
    repository.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{},x", "1".repeat(40))]);
    repository.git(&["commit", "--quiet", "-m", "hostile"]);
    repository.push("HEAD:refs/heads/main");
    for hook in ["post-checkout", "reference-transaction", "post-index-change", "pre-auto-gc"] {
        let path = repository.bare.join("hooks").join(hook);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &script).unwrap();
    }
    repository.git_bare(&["config", "filter.evil.smudge", &format!("touch {}", mark.display())]);
    repository.git_bare(&["config", "uploadpack.packObjectsHook", &format!("touch {}", mark.display())]);

    let remote = remote(&repository.file_url());
    let mirror = bench.mirrors().open(remote.url.identity()).await.unwrap();
    let into = bench.workspace("w");
    // git itself refuses the submodule's URL at the fetch; what must hold either way is that nothing ran.
    match mirror.materialize(&remote, &repository.head(), None, &into).await {
        Ok(()) => assert!(into.join("big.bin").exists()),
        Err(CheckoutError::Fetch { source, .. }) => {
            assert!(matches!(*source, MirrorError::Refused { .. }), "{source:?}");
        }
        Err(error) => panic!("{error:?}"),
    }
    assert!(!mark.exists());

    // Without the submodule's trick the rest is checked out, filters left alone.
    repository.write(".gitmodules", "[submodule \"x\"]\n\tpath = x\n\turl = https://example.org/x\n");
    repository.git(&["add", ".gitmodules"]);
    repository.git(&["commit", "--quiet", "-m", "tamed"]);
    repository.push("HEAD:refs/heads/main");
    let into = bench.workspace("w2");
    mirror.materialize(&remote, &repository.head(), None, &into).await.unwrap();
    assert!(std::fs::read_to_string(into.join("big.bin")).unwrap().starts_with("version https://git-lfs"));
    assert_eq!(std::fs::read_dir(into.join("x")).unwrap().count(), 0, "submodules stay empty");
    assert!(!into.join(".git").exists());
    assert!(!mark.exists());
}

#[tokio::test]
async fn a_small_pack_that_unpacks_to_a_huge_tree_is_stopped() {
    let bench = Bench::with(|options| options.limits.max_workspace_bytes = 1 << 20);
    let repository = bench.repository("a");
    // Ten to the seventh files of one blob, in eight objects.
    let blob = store(&repository, "blob", b"boom");
    let mut tree = String::new();
    for level in 0..7 {
        let (mode, id) = if level == 0 { ("100644", &blob) } else { ("40000", &tree) };
        let names: Vec<String> = (0..10).map(|digit| format!("d{digit}")).collect();
        let entries: Vec<_> = names.iter().map(|name| (mode, name.as_str(), id.as_str())).collect();
        tree = tree_object(&repository, &entries);
    }
    let revision = commit_tree(&repository, &tree);
    let remote = remote(&repository.file_url());
    let mirror = bench.mirrors().open(remote.url.identity()).await.unwrap();
    let error = mirror.materialize(&remote, &revision, None, &bench.workspace("w")).await.unwrap_err();
    assert!(format!("{error:?}").contains("TooLarge"), "{error:?}");
}
