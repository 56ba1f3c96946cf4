//! Defines how the command line ends: the exit codes, and the one failure type that carries them.
//!
//! Every command returns `Result<Exit, Failure>`; `main` alone turns it into a process's end.

use std::fmt;
use std::io;
use std::process::ExitCode;

use sealci_api::controller::types::PipelineOutcome;
use sealci_service::problem::chain;

/// The exit codes, as the documentation promises them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything passed, or did what was asked.
    Passed = 0,
    /// The pipeline failed, or a check found something missing.
    Failed = 1,
    /// The command line, the manifest or the thing it names is wrong.
    Usage = 2,
    /// The pipeline was cancelled.
    Cancelled = 3,
    /// The token is missing, unknown, or may not do this.
    NotAllowed = 4,
    /// The server, the network or the machine failed, not what was tested.
    Infrastructure = 5,
    /// Interrupted from the keyboard (128 + SIGINT).
    Interrupted = 130,
}

impl Exit {
    /// What the end of a pipeline means for whoever waited for it.
    pub fn of_outcome(outcome: PipelineOutcome) -> Self {
        match outcome {
            PipelineOutcome::Succeeded => Self::Passed,
            PipelineOutcome::Failed | PipelineOutcome::TimedOut => Self::Failed,
            PipelineOutcome::Cancelled => Self::Cancelled,
            PipelineOutcome::Errored => Self::Infrastructure,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What went wrong, for a person: what, where, and what to do.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    pub help: Option<String>,
    /// Nobody reads our output any more: not worth a message.
    pub silent: bool,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), help: None, silent: false }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub fn infrastructure(message: impl Into<String>) -> Self {
        Self::new(Exit::Infrastructure, message)
    }

    /// Says what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// An error whose causes are told with it, on one line.
    pub fn of_error(
        exit: Exit,
        context: impl fmt::Display,
        error: &(dyn std::error::Error + 'static),
    ) -> Self {
        Self::new(exit, format!("{context}: {}", chain(error)))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

/// Writing our output failed. A reader that went away (`sealci logs 3 | head`) is no failure.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self { silent: true, ..Self::new(Exit::Passed, "") };
        }
        Self::of_error(Exit::Infrastructure, "cannot write the output", &error)
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::infrastructure(chain(error.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_as_documented() {
        let codes = [
            (Exit::Passed, 0),
            (Exit::Failed, 1),
            (Exit::Usage, 2),
            (Exit::Cancelled, 3),
            (Exit::NotAllowed, 4),
            (Exit::Infrastructure, 5),
            (Exit::Interrupted, 130),
        ];
        for (exit, code) in codes {
            assert_eq!(exit as u8, code, "{exit:?}");
        }
    }

    #[test]
    fn a_pipelines_outcome_has_its_exit_code() {
        assert_eq!(Exit::of_outcome(PipelineOutcome::Succeeded), Exit::Passed);
        assert_eq!(Exit::of_outcome(PipelineOutcome::Failed), Exit::Failed);
        assert_eq!(Exit::of_outcome(PipelineOutcome::TimedOut), Exit::Failed);
        assert_eq!(Exit::of_outcome(PipelineOutcome::Cancelled), Exit::Cancelled);
        assert_eq!(Exit::of_outcome(PipelineOutcome::Errored), Exit::Infrastructure);
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(failure.silent);
        assert_eq!(failure.exit, Exit::Passed);
        assert!(!Failure::from(io::Error::from(io::ErrorKind::StorageFull)).silent);
    }

    #[test]
    fn help_stands_on_its_own_line() {
        let failure = Failure::usage("no such action `tset`").help("the actions are: build, test");
        assert_eq!(failure.to_string(), "error: no such action `tset`\n  help: the actions are: build, test");
    }
}
