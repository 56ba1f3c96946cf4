//! Runs the other tests once more as an ordinary user; but how registries are spoken to, which is the same for all.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::lab::skipped;

/// Nobody's on any machine.
const USER: &str = "64999";

#[test]
fn everything_holds_without_root() {
    again(&["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"], &[]);
}

#[test]
fn root_of_a_small_namespace_is_an_ordinary_user() {
    again(
        &[
            "setpriv",
            "--reuid",
            USER,
            "--regid",
            USER,
            "--clear-groups",
            "unshare",
            "--user",
            "--map-root-user",
        ],
        &["hostile::"],
    );
}

/// Runs these tests by way of this command; all without any.
fn again(command: &[&str], tests: &[&str]) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // The folders that this was built in may be closed to the user: a mount namespace shows it where it is open.
    let open = TempDir::new().unwrap();
    std::fs::set_permissions(open.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(open.path().join("test"), b"").unwrap();
    let text = "mount --bind \"$1\" \"$2\" && shift && shift && exec \"$@\"";
    let test = open.path().join("test");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", text, "sh"])
        .args([std::env::current_exe().unwrap(), test.clone()])
        .args(command)
        .arg(test)
        .args(tests)
        .args(["--skip", "as_user::", "--skip", "lying::"])
        .env_remove("SEALCI_SKIPS")
        .env("HOME", "/nonexistent")
        .current_dir(Path::new("/"))
        .output();
    match output {
        Ok(output) => {
            let (said, text) =
                (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{}: {said}{text}", output.status);
            assert!(said.contains(" passed") && !said.contains(" 0 passed"), "{said}");
        }
        Err(error) => {
            skipped("images without root", &format!("`unshare` (apt-get install util-linux): {error}"));
        }
    }
}
