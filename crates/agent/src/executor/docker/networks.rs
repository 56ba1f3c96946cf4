//! Has one network per agent with the daemon, for the actions that reach outwards: a bridge on which containers do not reach
//! each other.
//!
//! What else they reach is the daemon's affair: see ARCHITECTURE.md, "Docker".

use std::collections::HashMap;
use std::path::Path;

use bollard::models::NetworkCreateRequest;
use bollard::query_parameters::InspectNetworkOptions;
use tokio::sync::Mutex;

use super::daemon::{Daemon, DockerError};
use super::recipe::labels;

#[derive(Debug)]
pub(super) struct AgentNetwork {
    agent: String,
    /// Whether it was made or found by this process. Held while it is made: older daemons make two of one name.
    is_there: Mutex<bool>,
}

impl AgentNetwork {
    pub fn of(agent: &str) -> Self {
        Self { agent: agent.to_owned(), is_there: Mutex::new(false) }
    }

    fn name(&self) -> String {
        format!("sealci-{}", self.agent)
    }

    /// Makes it if it is not there. Returns its name.
    pub async fn have(&self, daemon: &Daemon) -> Result<String, DockerError> {
        let mut is_there = self.is_there.lock().await;
        let name = self.name();
        let failed = || daemon.failed(format!("make the network {name}"));
        match daemon.docker.inspect_network(&name, None::<InspectNetworkOptions>).await.map_err(failed()) {
            Err(error) if error.is_absence() => {
                let apart = ("com.docker.network.bridge.enable_icc".to_owned(), "false".to_owned());
                let request = NetworkCreateRequest {
                    name: name.clone(),
                    driver: Some("bridge".to_owned()),
                    labels: Some(labels(&self.agent)),
                    options: Some(HashMap::from([apart])),
                    ..NetworkCreateRequest::default()
                };
                daemon.docker.create_network(request).await.map_err(failed())?;
            }
            found => drop(found?),
        }
        *is_there = true;
        Ok(name)
    }

    /// Removes it if it is there.
    pub async fn remove(&self, daemon: &Daemon) -> Result<(), DockerError> {
        let mut is_there = self.is_there.lock().await;
        let name = self.name();
        match daemon
            .docker
            .remove_network(&name)
            .await
            .map_err(daemon.failed(format!("remove the network {name}")))
        {
            Err(error) if !error.is_absence() => Err(error),
            _ => {
                *is_there = false;
                Ok(())
            }
        }
    }

    /// Removes it if this process had it.
    pub async fn close(&self, socket: &Path) -> Result<(), DockerError> {
        if !*self.is_there.lock().await {
            return Ok(());
        }
        let (daemon, _) = Daemon::reach(socket).await?;
        self.remove(&daemon).await
    }
}
