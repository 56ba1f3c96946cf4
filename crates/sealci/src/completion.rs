//! The commands `completion` and `man`: what a shell and `man` know of this command line, made from its definition.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;

use crate::exit::{Exit, Failure};

#[derive(Debug, Args)]
pub struct CompletionArgs {
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Args)]
pub struct ManArgs {
    /// Where the pages are written, one for each command
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub fn completion(args: &CompletionArgs, mut command: Command) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "sealci", &mut script);
    io::stdout().lock().write_all(&script)?;
    Ok(Exit::Passed)
}

pub fn man(args: &ManArgs, mut command: Command) -> Result<Exit, Failure> {
    command.build();
    fs::create_dir_all(&args.dir).and_then(|()| write_pages(&command, &args.dir)).map_err(|error| {
        Failure::of_error(Exit::Infrastructure, format!("cannot write to {}", args.dir.display()), &error)
    })?;
    Ok(Exit::Passed)
}

fn write_pages(command: &Command, dir: &Path) -> io::Result<()> {
    let page = clap_mangen::Man::new(command.clone());
    let mut text = Vec::new();
    page.render(&mut text)?;
    fs::write(dir.join(page.get_filename()), text)?;
    for inner in command.get_subcommands().filter(|inner| !inner.is_hide_set() && inner.get_name() != "help")
    {
        write_pages(inner, dir)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        man(&ManArgs { dir: dir.path().to_owned() }, crate::args::Cli::command()).unwrap();
        for page in ["sealci.1", "sealci-submit.1", "sealci-agent-drain.1"] {
            assert!(dir.path().join(page).is_file(), "{page}");
        }
    }
}
