//! Runs an action's commands as PID 1 of a sandbox, container or microVM, or as a subreaper on a bare host.
//!
//! Standard input is the channel to the host (see [`sealci_guest::wire`]); standard error takes what goes wrong before
//! or beside it. Where the channel is two pipes, as a container daemon gives them, `--stdio` says so: what goes to the host
//! is then written to standard output. `--give UID:GID FOLDER` does nothing but change the owners of a tree. As the first process of a
//! machine it makes that ready and calls the host (see [`machine`]). Invariants: when the channel ends, everything below this process is killed and it exits; `Finished` is
//! sent only when nothing below it lives; no command's doing makes it wait without end, crash or grow.

mod beside;
mod carrier;
mod choice;
mod failure;
mod give;
mod kinfolk;
mod machine;
mod meter;
mod outbox;
mod pack;
mod places;
mod run;
mod script;
mod supervisor;
mod sys;
mod unpack;

use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;

fn main() -> ExitCode {
    if machine::is_this() {
        machine::live();
    }
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sealci-init: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> std::io::Result<ExitCode> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let [what, owner, folder] = &arguments[..]
        && what == "--give"
    {
        return give::give(&owner.to_string_lossy(), folder.as_ref()).map(|()| ExitCode::SUCCESS);
    }
    stand_apart()?;
    let channel = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let output = arguments.first().filter(|argument| *argument == "--stdio").map(|_| {
        let output = std::io::stdout().as_fd().try_clone_to_owned()?;
        Ok::<_, std::io::Error>(File::from(output))
    });
    supervisor::Supervisor::new(channel, output.transpose()?)?.run()
}

/// Makes this process one that supervises others.
fn stand_apart() -> std::io::Result<()> {
    sys::lead_session();
    sys::become_subreaper()?;
    sys::close_to_others()?;
    sys::reset_umask();
    sys::raise_priority();
    sys::close_on_exec_from(3);
    Ok(())
}
