//! The developers' commands: `cargo xtask test` runs every check and every test, installing what they need where it may.
//!
//! Built of the standard library and a JSON reader alone, so that the first command on a fresh machine starts soon.

mod bench;
mod deny;
mod faults;
mod fuzz;
mod imports;
mod machine;
mod oci;
mod postgres;
mod qemu;
mod report;
mod s3;
mod test;
mod workspace;

use std::process::ExitCode;

use anyhow::bail;

const USAGE: &str = "\
cargo xtask COMMAND

  test           every check and every test (what the continuous integration runs)
  bench [NAME…]  measure the release build: latency, run, sandbox, machines, … (docs/benchmarks.md)
  faults [NAME…] cause every fault there is a test of, and write the table of docs/faults.md
  fuzz [NAME [SECONDS]]
                 run one fuzz target, or all of them, for a minute each or so many seconds
  qemu           only: the core of the executors' tests on stock Debian, in a QEMU guest
  vm-test [--all]
                 only: the core of the machines' tests, or all, which boot guests within a QEMU guest
  check-imports  only: do the crates depend on one another the right way?
  deny           only: cargo-deny on bans, licences and sources

SEALCI_REQUIRE=NAME,…  what must be there: a missing one fails instead of being skipped
                       (git, cc, cxx, deny, postgres, root, namespaces, rootless, netfilter, kvm,
                       ssh, s3, registry, docker, qemu)
SEALCI_INSTALL=no      install no Debian packages, even where it would be possible";

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> anyhow::Result<bool> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["test"] => test::run(),
        ["bench", names @ ..] => bench::run(names),
        ["faults", names @ ..] => faults::run(names),
        ["fuzz", arguments @ ..] => fuzz::command(arguments),
        ["qemu"] => qemu::command(&qemu::EXECUTORS),
        ["vm-test"] => qemu::command(&qemu::MACHINES),
        ["vm-test", "--all"] => qemu::command(&qemu::ALL_MACHINES),
        ["check-imports"] => {
            imports::check()?;
            println!("every import runs the right way");
            Ok(true)
        }
        ["deny"] => deny::run().map(|()| true),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(true)
        }
        _ => bail!("{USAGE}"),
    }
}
