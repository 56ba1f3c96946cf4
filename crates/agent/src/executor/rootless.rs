//! What is different about a sandbox that an ordinary user makes: how it is found possible, and how it is ended.
//!
//! There may be no control group around it, but its helper ends only after all that it holds together, and kills that when
//! told TERM. So a kill is a TERM first, and the helper's end is what is waited for.

use async_trait::async_trait;
use sealci_core::outcome::Limit;
use sealci_sandbox::{PROBE_ARGUMENT, Probe};

use super::ExecutorError;
use super::environment::HostEnvironment;
use super::helper::HelperCommand;
use super::init::Environment;

/// Finds out what of a sandbox this user can make on this machine, by making it.
pub fn probe(helper: &HelperCommand) -> Result<Probe, ExecutorError> {
    let found: Probe = helper.ask_now("try a sandbox without root", &[PROBE_ARGUMENT.as_ref()])?;
    match found.sealing {
        Some(problem) => {
            Err(ExecutorError::Unsupported(format!("this user can make no sandbox here: {problem}")))
        }
        None => Ok(found),
    }
}

/// A sandbox without root.
#[derive(Debug)]
pub(super) struct RootlessEnvironment(pub HostEnvironment);

#[async_trait]
impl Environment for RootlessEnvironment {
    async fn open_up(&mut self) -> Result<(), ExecutorError> {
        self.0.open_up().await
    }

    fn kill(&mut self) {
        self.0.terminate();
    }

    fn limit_reached(&self) -> Option<Limit> {
        self.0.limit_reached()
    }

    async fn clear(&mut self, orderly: bool) -> Result<(), String> {
        if !orderly {
            self.kill();
        }
        // An orderly end is one to wait for; the other one has just been brought about.
        self.0.clear(true).await
    }

    fn complaints(&mut self) -> String {
        self.0.complaints()
    }
}
