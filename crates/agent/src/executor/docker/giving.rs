//! Gives a workspace to whom a container's commands run as, where that is another user than the agent, and takes it back.
//!
//! Root's agent changes owners itself and can delete what others made. Another agent has both done in a short container of
//! its own, whose root may change owners and do nothing else.

use std::path::Path;

use bollard::models::ContainerCreateBody;
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, RemoveContainerOptionsBuilder, WaitContainerOptionsBuilder,
};
use futures_util::StreamExt;

use super::daemon::Daemon;
use crate::executor::ExecutorError;
use crate::executor::environment::blocking;

/// An owner as a container sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// Who has what.
#[derive(Debug)]
pub(super) struct Giving {
    pub to: Owner,
    /// Where the agent cannot do it itself.
    pub courier: Option<Courier>,
}

/// A container that changes owners.
#[derive(Debug)]
pub(super) struct Courier {
    /// All but the owner, which is the last but one of its words.
    pub recipe: ContainerCreateBody,
    /// The agent.
    pub back_to: Owner,
}

impl Giving {
    pub async fn give(&self, daemon: &Daemon, workspace: &Path) -> Result<(), ExecutorError> {
        let Owner { uid, gid } = self.to;
        match &self.courier {
            Some(courier) => courier.send(daemon, self.to).await,
            None => {
                let folder = workspace.to_owned();
                blocking(move || {
                    sealci_sandbox::give_away(&folder, uid, gid).map_err(ExecutorError::io(format_args!(
                        "change the owners below {}",
                        folder.display()
                    )))
                })
                .await
            }
        }
    }

    pub async fn take_back(&self, daemon: &Daemon, _workspace: &Path) -> Result<(), ExecutorError> {
        match &self.courier {
            Some(courier) => courier.send(daemon, courier.back_to).await,
            None => Ok(()),
        }
    }
}

impl Courier {
    async fn send(&self, daemon: &Daemon, owner: Owner) -> Result<(), ExecutorError> {
        const DOING: &str = "change the workspace's owners";
        let mut recipe = self.recipe.clone();
        let words = ["--give".to_owned(), format!("{}:{}", owner.uid, owner.gid)];
        recipe.cmd = Some(words.into_iter().chain([sealci_sandbox::inside::WORKSPACE.to_owned()]).collect());
        let docker = &daemon.docker;
        let made = docker
            .create_container(Some(CreateContainerOptionsBuilder::new().build()), recipe)
            .await
            .map_err(daemon.failed(DOING))?;
        let run = async {
            docker.start_container(&made.id, None).await.map_err(daemon.failed(DOING))?;
            let options = WaitContainerOptionsBuilder::new().condition("not-running").build();
            match docker.wait_container(&made.id, Some(options)).next().await {
                None => Ok(()),
                Some(result) => result.map(drop).map_err(daemon.failed(DOING)),
            }
        };
        let ran = run.await;
        let options = RemoveContainerOptionsBuilder::new().force(true).v(true).build();
        let removed = docker.remove_container(&made.id, Some(options)).await.map_err(daemon.failed(DOING));
        ran?;
        Ok(removed?)
    }
}
