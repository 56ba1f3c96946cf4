//! The program `sealci-vmm`: runs one guest, from its command line to the guest's end.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!("error: sealci-vmm cannot boot a guest yet");
    ExitCode::FAILURE
}
