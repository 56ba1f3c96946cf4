//! Runs many agents in one process, each with its own identity, spool and session, and an executor that plays scripts: for
//! benchmarks and tests of what many agents cost the services.
//!
//! `many_agents SCHEDULER_URL ENROLMENT_TOKEN_FILE FOLDER COUNT ACTIONS_AT_ONCE`

// A program of the developers': what cannot be had ends it.
#![allow(clippy::expect_used)]

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::workspace::{Checkout, Source, WorkspaceError};
use sealci_agent::{Config, Shutdown};
use sealci_core::plan::Resources;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Scripts read no files.
struct NoCheckout;

#[async_trait]
impl Checkout for NoCheckout {
    async fn prepare(&self, _: &Source, _: &Path) -> Result<(), WorkspaceError> {
        Ok(())
    }
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [scheduler, token_file, folder, count, at_once] = arguments.as_slice() else {
        panic!("many_agents SCHEDULER_URL ENROLMENT_TOKEN_FILE FOLDER COUNT ACTIONS_AT_ONCE");
    };
    let token = std::fs::read_to_string(token_file).expect("the token can be read").trim().to_owned();
    let count: usize = count.parse().expect("COUNT is a number");
    let at_once: u32 = at_once.parse().expect("ACTIONS_AT_ONCE is a number");
    let shutdown = Shutdown { drain: CancellationToken::new(), stop: CancellationToken::new() };
    let mut agents = JoinSet::new();
    for number in 0..count {
        let own = Path::new(folder).join(format!("agent-{number}"));
        std::fs::create_dir_all(&own).expect("a folder can be made");
        let mut config = Config::new(
            format!("agent-{number}"),
            own,
            vec![scheduler.clone()],
            vec![Arc::new(FakeExecutor::new())],
            Arc::new(NoCheckout),
        );
        config.enrolment_token = Some(token.clone().into());
        config.slots = at_once;
        let each = Resources::DEFAULT;
        config.capacity = Some(Resources {
            cpu_millis: each.cpu_millis * u64::from(at_once),
            memory_bytes: each.memory_bytes * u64::from(at_once),
        });
        agents.spawn(sealci_agent::run(config, shutdown.clone()));
    }
    // Until the process is killed, or an agent cannot go on.
    while let Some(ended) = agents.join_next().await {
        ended.expect("an agent does not panic").expect("an agent runs until it is told to stop");
    }
}
