//! The command `vm run`: becomes the virtual machine monitor that agents carry.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process;

use clap::Args;
use nix::sys::memfd::{MFdFlags, memfd_create};
use sealci_agent::executor::MONITOR_PROGRAM;
use sealci_microvm::kernel::Kernel;

use crate::exit::{Exit, Failure};

const NAME: &str = "sealci-vmm";

#[derive(Debug, Args)]
#[command(
    after_help = "sealci vm run -- --help lists the monitor's options. Without --kernel the guest gets the kernel that an \
agent would give to its machines."
)]
pub struct VmRunArgs {
    /// What the monitor is told
    #[arg(value_name = "OPTION", trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<OsString>,
}

/// Comes back only where the monitor cannot be started: it takes this process's place, and its exit code is the monitor's.
pub fn run(args: VmRunArgs) -> Result<Exit, Failure> {
    // Open until it is executed, which closes it.
    let (_program, mut command) = monitor().map_err(|error| {
        Failure::of_error(Exit::Infrastructure, "cannot lay out the virtual machine monitor", &error)
    })?;
    if needs_kernel(&args.options) {
        let kernel = Kernel::find(Path::new("/boot"), Path::new("/lib/modules"))
            .map_err(|error| Failure::of_error(Exit::Infrastructure, "no kernel was named", &error))?;
        command.arg("--kernel").arg(kernel.image);
    }
    let error = command.args(args.options).exec();
    Err(Failure::of_error(Exit::Infrastructure, "cannot start the virtual machine monitor", &error))
}

/// The program, in memory alone.
fn monitor() -> io::Result<(File, process::Command)> {
    let mut file = File::from(memfd_create(NAME, MFdFlags::MFD_CLOEXEC)?);
    file.write_all(MONITOR_PROGRAM)?;
    let mut command = process::Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()));
    command.arg0(NAME);
    Ok((file, command))
}

fn needs_kernel(options: &[OsString]) -> bool {
    let says_more_than_run = |option: &OsString| option == "--kernel" || option == "--version";
    let asks_for_help = options.first().is_some_and(|option| option == "--help" || option == "-h");
    !asks_for_help && !options.iter().any(says_more_than_run)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_looked_for_where_a_guest_is_to_run_and_none_is_named() {
        for (options, needs) in [
            (&["--vcpus", "2"][..], true),
            (&[], true),
            (&["--vcpus", "2", "--kernel", "mine"], false),
            (&["--help"], false),
            (&["--version"], false),
        ] {
            let options: Vec<OsString> = options.iter().map(OsString::from).collect();
            assert_eq!(needs_kernel(&options), needs, "{options:?}");
        }
    }
}
