//! Finds an S3 server for the tests: moto's, from PyPI; installs it once, into a folder of its own, where there is none.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{machine, workspace};

/// The version that is installed where none is.
const VERSION: &str = "5.2.1";

/// The program, installed where it is not there.
pub fn find_or_install() -> Result<PathBuf> {
    if let Some(program) = machine::find("moto_server") {
        return Ok(program);
    }
    let folder = workspace::target_folder()?.join("tools/s3");
    let program = folder.join("bin/moto_server");
    if program.is_file() {
        return Ok(program);
    }
    if std::env::var("SEALCI_INSTALL").is_ok_and(|value| value == "no") {
        bail!("moto_server is not installed (SEALCI_INSTALL=no)");
    }
    println!("installing moto {VERSION} once, into {}", folder.display());
    let run = |command: &mut Command| {
        let status = command.stdin(Stdio::null()).status();
        let status = status.with_context(|| format!("cannot run {}", command.get_program().display()))?;
        if status.success() { Ok(()) } else { bail!("moto could not be installed, see above") }
    };
    run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let wanted = format!("moto[server]=={VERSION}");
    run(Command::new(folder.join("bin/pip")).args(["install", "--quiet", &wanted]))?;
    Ok(program)
}

/// Whether a program for it could be installed if the machine had one more Debian package.
pub fn lacks_python() -> bool {
    machine::find("moto_server").is_none() && !machine::succeeds("python3", &["-c", "import ensurepip"])
}
