//! Seals actions on this host's own programs, without images and without a daemon.

use std::path::PathBuf;

use async_trait::async_trait;
use sealci_core::plan::ExecutorKind;
use sealci_sandbox::{RootSpec, User, inside};
use tokio_util::task::TaskTracker;

use super::sealed::{Sealed, Sealer, start_message};
use super::{ExecutionRequest, Executor, ExecutorError, Standby};

/// The executor that seals.
#[derive(Debug)]
pub struct SandboxExecutor {
    sealer: Sealer,
    extra_paths: Vec<PathBuf>,
    tasks: TaskTracker,
}

impl SandboxExecutor {
    /// Actions see `extra_paths` of the host, folders and files, read-only, at the same place: a toolchain, say.
    pub fn new(sealer: Sealer, extra_paths: Vec<PathBuf>) -> Self {
        Self { sealer, extra_paths, tasks: TaskTracker::new() }
    }
}

#[async_trait]
impl Executor for SandboxExecutor {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Sandbox
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        request.refuse_service(self.kind())?;
        let place = self.sealer.reserve(&request)?;
        let root = RootSpec::Host {
            extra_paths: self.extra_paths.clone(),
            // It is memory of the action's, and limited as such.
            layer_bytes: request.resources.memory_bytes,
        };
        let spec = place.spec(&request, root);
        let mut env = request.env.clone();
        env.entry("HOME".to_owned()).or_insert_with(|| inside::HOME.to_owned());
        let start = start_message(&request, env);
        place.stand_by(&self.tasks, Sealed { request, spec, owner: User::default(), start }, ()).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        self.sealer.sweep().await
    }

    async fn close(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}
