//! Stands in for the product's hidden subcommand in this package's own tests and benchmarks.

use std::process::ExitCode;

fn main() -> ExitCode {
    sealci_sandbox::helper_main(std::env::args_os().skip(1))
}
