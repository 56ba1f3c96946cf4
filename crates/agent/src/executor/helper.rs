//! Starts the helper of sealed environments for what is asked and answered at once; for an environment's own helper see
//! `environment`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use sealci_sandbox::HELPER_COMMAND;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::ExecutorError;

/// How to start the helper.
#[derive(Debug, Clone)]
pub struct HelperCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

impl HelperCommand {
    /// This very program's hidden subcommand; its `main` passes that on to [`sealci_sandbox::helper_main`].
    pub fn of_this_program() -> Self {
        // What runs, even if a newer version has taken its place on disk.
        Self { program: PathBuf::from("/proc/self/exe"), arguments: vec![HELPER_COMMAND.into()] }
    }
}

impl HelperCommand {
    /// With nothing of this process's environment.
    fn command(&self, arguments: &[&OsStr]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).args(arguments).env_clear().current_dir("/");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn start_error(&self) -> impl FnOnce(std::io::Error) -> ExecutorError + use<> {
        ExecutorError::io(format!("start {}", self.program.display()))
    }

    /// Waits for its answer. Blocks.
    pub(super) fn ask_now<T: DeserializeOwned>(
        &self,
        doing: &'static str,
        arguments: &[&OsStr],
    ) -> Result<T, ExecutorError> {
        let output = self.command(arguments).output().map_err(self.start_error())?;
        read_answer(doing, &output)
    }

    /// Waits for its answer, unless that is not wanted any more. Dropping the future ends it.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        doing: &'static str,
        arguments: &[&OsStr],
        stop: &CancellationToken,
    ) -> Result<T, ExecutorError> {
        let mut command = tokio::process::Command::from(self.command(arguments));
        let child = command.kill_on_drop(true).spawn().map_err(self.start_error())?;
        let output = stop.run_until_cancelled(child.wait_with_output()).await;
        let output = output.ok_or(ExecutorError::Stopped)?.map_err(self.start_error())?;
        read_answer(doing, &output)
    }
}

fn read_answer<T: DeserializeOwned>(doing: &'static str, output: &Output) -> Result<T, ExecutorError> {
    serde_json::from_slice(&output.stdout).map_err(|error| {
        let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let complaint = if complaint.is_empty() { format!("{}, {error}", output.status) } else { complaint };
        ExecutorError::Helper { doing, complaint }
    })
}
