//! Runs actions in machines of our own monitor's, from the repository to the log.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::env;

use sealci_tests::{Installation, Part, Repository, action, attempts, both, skip};

/// The folder with the image `debian`, which has a C compiler.
const IMAGES: &str = "SEALCI_TEST_IMAGES";

const MANIFEST: &str = r#"name: machine
actions:
  build:
    configuration: {executor: microvm, container: "oci:debian", network: off, resources: {cpu: 1, memory: 512MiB}}
    commands: ["tcc -Wall -o hello hello.c", "./hello", "test -d /proc/1 && uname -n"]
  fail:
    needs: []
    configuration: {executor: microvm, container: "oci:debian", network: off, resources: {cpu: 1, memory: 256MiB}}
    commands: ["echo before; exit 7"]
"#;

const PROGRAM: &str = r#"#include <stdio.h>
int main(void) {
    for (int line = 1; line <= 1000; line++) printf("line %d of a program that was built in a machine\n", line);
    return 0;
}
"#;

#[test]
fn a_c_program_is_cloned_built_and_run_in_a_machine() {
    let name = "a_c_program_is_cloned_built_and_run_in_a_machine";
    let given = |name: &str| env::var(name).ok();
    let (Some(images), Some(kernel), Some(modules)) =
        (given(IMAGES), given("SEALCI_TEST_KERNEL"), given("SEALCI_TEST_MODULES"))
    else {
        return skip("kvm", name, "it runs in the guest of `cargo xtask vm-test --all`");
    };
    let mut installation = Installation::none();
    let options = [
        "--images-folder",
        &images,
        "--microvms",
        "--microvm-kernel",
        &kernel,
        "--microvm-modules",
        &modules,
    ];
    installation.arguments.insert(Part::Agent, options.map(str::to_owned).to_vec());
    installation.start_all();
    let repository = Repository::with_manifest(installation.scratch("repository"), MANIFEST);
    repository.write("hello.c", PROGRAM);
    repository.commit("Greet");
    let path = repository.path.display().to_string();
    let followed = installation.sealci(&["submit", &path, "--follow"]);
    assert_eq!(followed.status.code(), Some(1), "one of its actions fails: {}", both(&followed));
    let pipeline = installation.finished("1");
    assert_eq!(attempts(action(&pipeline, "build")), ["succeeded"], "{pipeline}");
    let failed = action(&pipeline, "fail")["outcome"].to_string();
    assert!(failed.contains("failed") && failed.contains('7'), "{failed}");
    let text = installation.text("1", "build");
    let lines: Vec<_> = text.lines().filter(|line| line.ends_with("built in a machine")).collect();
    let expected: Vec<_> =
        (1..=1000).map(|line| format!("line {line} of a program that was built in a machine")).collect();
    assert_eq!(lines, expected);
    assert!(installation.text("1", "fail").contains("before"));
}
