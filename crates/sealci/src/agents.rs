//! The commands about agents: `agent list`, `agent drain`, `agent undrain`.

use clap::Args;
use sealci_api::controller::types::{Agent, Drain};

use crate::connect::{Server, ServerArgs};
use crate::exit::{Exit, Failure};
use crate::format;
use crate::output;
use crate::terminal::{Terminal, one_line};

#[derive(Debug, Args)]
pub struct AgentListArgs {
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct AgentDrainArgs {
    /// The agent's name or id
    #[arg(value_name = "AGENT")]
    agent: String,
    #[command(flatten)]
    output: output::Args,
    #[command(flatten)]
    server: ServerArgs,
}

pub async fn list(args: AgentListArgs, terminal: Terminal) -> Result<Exit, Failure> {
    let agents = all(&args.server.controller()?).await?;
    args.output.print(&agents, || {
        if agents.is_empty() {
            return "no agents\n".into();
        }
        let rows: Vec<_> = agents.iter().map(row).collect();
        format::table(
            &["NAME", "STATE", "EXECUTORS", "LABELS", "FREE CPU", "FREE MEMORY", "HOLDS"],
            &rows,
            terminal,
        )
    })?;
    Ok(Exit::Passed)
}

/// Sets an agent's wish to drain.
pub async fn drain(args: AgentDrainArgs, drained: bool) -> Result<Exit, Failure> {
    let server = args.server.controller()?;
    let agents = all(&server).await?;
    let named: Vec<_> = agents
        .iter()
        .filter(|agent| agent.name == args.agent || agent.id.to_string() == args.agent)
        .collect();
    let agent = match named.as_slice() {
        [agent] => agent,
        [] => {
            let names: Vec<_> = agents.iter().map(|agent| one_line(&agent.name)).collect();
            return Err(Failure::usage(format!("there is no agent `{}`", one_line(&args.agent)))
                .help(format!("the agents are: {}", names.join(", "))));
        }
        several => {
            let ids: Vec<_> = several.iter().map(|agent| agent.id.to_string()).collect();
            return Err(Failure::usage(format!("several agents are called `{}`", one_line(&args.agent)))
                .help(format!("give the id: {}", ids.join(", "))));
        }
    };
    let request = Drain::builder().drained(drained);
    let agent = match server.client.drain_agent().agent_id(agent.id).body(request).send().await {
        Ok(agent) => agent.into_inner(),
        Err(error) => return Err(server.failure(error).await),
    };
    args.output.print(&agent, || format!("{}: {}\n", one_line(&agent.name), state(&agent)))?;
    Ok(Exit::Passed)
}

async fn all(server: &Server) -> Result<Vec<Agent>, Failure> {
    match server.client.list_agents().send().await {
        Ok(list) => Ok(list.into_inner().agents),
        Err(error) => Err(server.failure(error).await),
    }
}

fn state(agent: &Agent) -> String {
    match (agent.connected, agent.drained, agent.accepting) {
        (false, ..) => "away".into(),
        (true, true, _) if agent.holds > 0 => "draining".into(),
        (true, true, _) => "drained".into(),
        (true, false, true) => "ready".into(),
        (true, false, false) => match &agent.not_accepting_because {
            Some(why) => format!("takes nothing: {why}"),
            None => "takes nothing".into(),
        },
    }
}

fn row(agent: &Agent) -> Vec<String> {
    let mut labels: Vec<_> = agent.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    labels.sort();
    vec![
        agent.name.clone(),
        state(agent),
        agent.executors.join(", "),
        labels.join(" "),
        format!(
            "{} of {}",
            format::cpus(agent.available.cpu_millis),
            format::cpus(agent.capacity.cpu_millis)
        ),
        format!(
            "{} of {}",
            format::bytes(agent.available.memory_bytes),
            format::bytes(agent.capacity.memory_bytes)
        ),
        agent.holds.to_string(),
    ]
}
