//! Says why an attempt still waits, in sentences for people, the most telling first.
//!
//! The agents are narrowed down step by step: those with the labels, of them those with the executor, of them those
//! large enough, of them those that take work, of them those with room. The step that leaves none is the reason.

use sealci_core::ids::AttemptId;
use sealci_core::plan::Resources;

use crate::placement::Placement;
use crate::pool::PoolAgent;
use crate::requirements::Requirements;

type Agents<'a> = Vec<&'a PoolAgent>;

impl Placement {
    /// Why this attempt waits. At least one sentence for one that is in the queue, none for any other.
    pub fn why(&self, attempt: AttemptId) -> Vec<String> {
        let Some((line, wanted)) = self.queue.line_of(attempt) else { return Vec::new() };
        let all: Agents<'_> = self.pool.agents().values().collect();
        if all.is_empty() {
            return vec!["no agent is connected".into()];
        }
        let fitting = match narrow(&all, &wanted) {
            Ok(fitting) => fitting,
            Err(reasons) => return reasons,
        };
        let mut reasons = closed(&fitting);
        let working: Agents<'_> = fitting.iter().filter(|agent| agent.takes_work()).copied().collect();
        if !working.is_empty() {
            let with_room = working.iter().any(|agent| agent.has_room(&wanted));
            if !with_room {
                reasons.splice(0..0, no_room(&working, &wanted));
            } else if self
                .kept
                .is_some_and(|kept| kept.attempt != attempt && line.priority() <= kept.priority)
            {
                reasons.insert(0, "room is being kept for an earlier, larger action".into());
            }
            match self.queue.ahead_of(attempt) {
                0 => {}
                1 => reasons.push("1 attempt is ahead of it".into()),
                ahead => reasons.push(format!("{ahead} attempts are ahead of it")),
            }
        }
        if reasons.is_empty() {
            reasons.push("it is about to be placed".into());
        }
        reasons
    }
}

/// The agents that could ever run it; the reasons, where there are none.
fn narrow<'a>(all: &Agents<'a>, wanted: &Requirements) -> Result<Agents<'a>, Vec<String>> {
    let labelled: Agents<'_> = all.iter().filter(|agent| agent.offer.has_labels(wanted)).copied().collect();
    if labelled.is_empty() {
        return Err(missing_labels(all, wanted));
    }
    let executing: Agents<'_> =
        labelled.iter().filter(|agent| agent.offer.has_executor(wanted)).copied().collect();
    if executing.is_empty() {
        return Err(vec![missing_executor(&labelled, wanted)]);
    }
    let large: Agents<'_> = executing.iter().filter(|agent| agent.offer.could_run(wanted)).copied().collect();
    if large.is_empty() {
        return Err(too_large(&executing, wanted));
    }
    Ok(large)
}

fn missing_labels(all: &Agents<'_>, wanted: &Requirements) -> Vec<String> {
    let has =
        |agent: &&&PoolAgent, (key, value): (&String, &String)| agent.offer.labels.get(key) == Some(value);
    let agents = format!("{} agents", all.len());
    let lacking: Vec<_> = wanted
        .labels
        .iter()
        .filter(|label| !all.iter().any(|agent| has(&agent, *label)))
        .map(|(key, value)| format!("0 of {agents} have label {key}={value}"))
        .collect();
    if !lacking.is_empty() {
        return lacking;
    }
    let labels: Vec<_> = wanted.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    vec![format!("0 of {agents} have all of the labels {}", labels.join(", "))]
}

fn missing_executor(agents: &Agents<'_>, wanted: &Requirements) -> String {
    let mut offered: Vec<_> =
        agents.iter().flat_map(|agent| &agent.offer.executors).map(String::as_str).collect();
    offered.sort_unstable();
    offered.dedup();
    let offered = if offered.is_empty() { "none".to_owned() } else { offered.join(", ") };
    let with_labels = if wanted.labels.is_empty() { "" } else { " with its labels" };
    let wished = match &wanted.executor {
        Some(name) => format!("executor {name}"),
        None => "any executor".to_owned(),
    };
    format!("0 of {} agents{with_labels} offer {wished} (they offer: {offered})", agents.len())
}

fn too_large(agents: &Agents<'_>, wanted: &Requirements) -> Vec<String> {
    let need = wanted.resources;
    let most = largest(agents.iter().map(|agent| agent.offer.capacity));
    let mut reasons = Vec::new();
    if need.cpu_millis > most.cpu_millis {
        let (need, most) = (cpus(need.cpu_millis), number(most.cpu_millis, 1000));
        reasons.push(format!("needs {need}, largest agent has {most}: no agent can ever run it"));
    }
    if need.memory_bytes > most.memory_bytes {
        let (need, most) = (bytes(need.memory_bytes), bytes(most.memory_bytes));
        reasons.push(format!("needs {need} of memory, largest agent has {most}: no agent can ever run it"));
    }
    if reasons.is_empty() && !agents.iter().any(|agent| agent.offer.capacity.fits(&need)) {
        let need = both(&need);
        reasons.push(format!("needs {need}, and no agent has both: no agent can ever run it"));
    }
    if reasons.is_empty() {
        reasons.push("no agent that is large enough takes any attempts (its slots are 0)".into());
    }
    reasons
}

/// Which of the agents that could run it take nothing new, and why.
fn closed(agents: &Agents<'_>) -> Vec<String> {
    let mut reasons = Vec::new();
    let drained = agents.iter().filter(|agent| agent.drained).count();
    if drained > 0 {
        let are = if drained == 1 { "is" } else { "are" };
        reasons.push(format!("{drained} of {} agents {are} drained", agents.len()));
    }
    for agent in agents.iter().filter(|agent| !agent.drained) {
        match &agent.offer.closed_because {
            Some(because) if because.is_empty() => {
                reasons.push(format!("agent {} takes no new work", agent.name));
            }
            Some(because) => reasons.push(format!("agent {} takes no new work: {because}", agent.name)),
            None if !agent.ready => {
                reasons.push(format!("agent {} has not said yet what it holds", agent.name));
            }
            None => {}
        }
    }
    reasons
}

fn no_room(agents: &Agents<'_>, wanted: &Requirements) -> Vec<String> {
    let need = wanted.resources;
    let slotted: Agents<'_> = agents.iter().filter(|agent| agent.has_free_slot()).copied().collect();
    if slotted.is_empty() {
        return vec!["every agent that could run it has as many attempts as it takes at a time".into()];
    }
    let most = largest(slotted.iter().map(|agent| agent.available()));
    let mut reasons = Vec::new();
    if need.memory_bytes > most.memory_bytes {
        let (need, most) = (bytes(need.memory_bytes), bytes(most.memory_bytes));
        reasons.push(format!("needs {need} of memory, largest free {most}"));
    }
    if need.cpu_millis > most.cpu_millis {
        let (need, most) = (cpus(need.cpu_millis), number(most.cpu_millis, 1000));
        reasons.push(format!("needs {need}, largest free {most}"));
    }
    if reasons.is_empty() {
        reasons.push(format!("needs {}, and no agent has both free", both(&need)));
    }
    reasons
}

fn largest(amounts: impl Iterator<Item = Resources>) -> Resources {
    amounts.fold(Resources::default(), |most, one| Resources {
        cpu_millis: most.cpu_millis.max(one.cpu_millis),
        memory_bytes: most.memory_bytes.max(one.memory_bytes),
    })
}

fn both(amount: &Resources) -> String {
    format!("{} and {} of memory", cpus(amount.cpu_millis), bytes(amount.memory_bytes))
}

fn cpus(millis: u64) -> String {
    format!("{} {}", number(millis, 1000), if millis == 1000 { "CPU" } else { "CPUs" })
}

/// An amount in the largest unit of which it is at least one.
fn bytes(amount: u64) -> String {
    match amount {
        0..1024 => format!("{amount} bytes"),
        1024..0x10_0000 => format!("{} KiB", number(amount, 1 << 10)),
        0x10_0000..0x4000_0000 => format!("{} MiB", number(amount, 1 << 20)),
        0x4000_0000..0x100_0000_0000 => format!("{} GiB", number(amount, 1 << 30)),
        _ => format!("{} TiB", number(amount, 1 << 40)),
    }
}

/// A quotient with at most two places, never rounded up: what is shown as free shall be there.
fn number(amount: u64, unit: u64) -> String {
    let hundredths = u128::from(amount) * 100 / u128::from(unit);
    let (whole, rest) = (hundredths / 100, hundredths % 100);
    match rest {
        0 => format!("{whole}"),
        _ if rest % 10 == 0 => format!("{whole}.{}", rest / 10),
        _ => format!("{whole}.{rest:02}"),
    }
}

#[cfg(test)]
mod tests {
    use sealci_core::ids::{ActionId, AgentId};

    use super::*;
    use crate::pool::Reservation;
    use crate::queue::Waiting;
    use crate::requirements::Offer;

    const GIB: u64 = 1 << 30;

    fn attempt(n: u64) -> AttemptId {
        AttemptId { action: ActionId::from_parts(n, &[0; 10]), number: 1 }
    }

    fn id(n: u64) -> AgentId {
        AgentId::from_parts(n, &[0; 10])
    }

    fn agent(n: u64, cpu: u64, gib: u64, labels: &[(&str, &str)]) -> PoolAgent {
        let offer = Offer {
            capacity: Resources { cpu_millis: cpu * 1000, memory_bytes: gib * GIB },
            labels: labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect(),
            executors: vec!["sandbox".into(), "process".into()],
            slots: 4,
            closed_because: None,
        };
        let mut agent = PoolAgent::new(format!("a{n}"), offer, false);
        agent.ready = true;
        agent
    }

    fn with(agents: Vec<PoolAgent>) -> Placement {
        let mut placement = Placement::default();
        for (n, agent) in (1..).zip(agents) {
            placement.join(id(n), agent);
        }
        placement
    }

    /// Lets one attempt wait, settles, and asks.
    fn why(placement: &mut Placement, cpu_millis: u64, gib: u64, label: &str, executor: &str) -> Vec<String> {
        let requirements = Requirements {
            resources: Resources { cpu_millis, memory_bytes: gib * GIB },
            labels: label
                .split_once('=')
                .map(|(key, value)| (key.into(), value.into()))
                .into_iter()
                .collect(),
            executor: Some(executor.to_owned()).filter(|name| !name.is_empty()),
        };
        let order = 1000;
        placement.enqueue(
            attempt(order),
            Waiting { requirements: requirements.into(), priority: 0, order, repository: "r".into() },
        );
        while let Some(placed) = placement.place_next() {
            assert_ne!(placed.attempt, attempt(order));
        }
        placement.why(attempt(order))
    }

    #[test]
    fn each_reason_has_its_sentence() {
        assert_eq!(why(&mut with(vec![]), 1000, 1, "", ""), ["no agent is connected"]);
        let three = || with(vec![agent(1, 2, 4, &[]), agent(2, 2, 4, &[]), agent(3, 2, 4, &[])]);
        assert_eq!(why(&mut three(), 1000, 1, "gpu=true", ""), ["0 of 3 agents have label gpu=true"]);
        assert_eq!(
            why(&mut three(), 1000, 1, "", "container"),
            ["0 of 3 agents offer executor container (they offer: process, sandbox)"]
        );
        assert_eq!(
            why(&mut three(), 4000, 1, "", ""),
            ["needs 4 CPUs, largest agent has 2: no agent can ever run it"]
        );
        assert_eq!(
            why(&mut three(), 1500, 8, "", ""),
            ["needs 8 GiB of memory, largest agent has 4 GiB: no agent can ever run it"]
        );
        let mut odd = with(vec![agent(1, 1, 8, &[]), agent(2, 8, 1, &[])]);
        assert_eq!(
            why(&mut odd, 2000, 4, "", ""),
            ["needs 2 CPUs and 4 GiB of memory, and no agent has both: no agent can ever run it"]
        );
    }

    #[test]
    fn drained_and_closed_agents_are_named() {
        let mut placement = with(vec![agent(1, 2, 4, &[]), agent(2, 2, 4, &[]), agent(3, 2, 4, &[])]);
        placement.set_drained(id(1), true);
        placement.set_drained(id(2), true);
        let closed = Offer {
            closed_because: Some("disk below 1 GiB".into()),
            ..placement.pool().agents()[&id(3)].offer.clone()
        };
        placement.set_offer(id(3), closed);
        assert_eq!(
            why(&mut placement, 1000, 1, "", ""),
            ["2 of 3 agents are drained", "agent a3 takes no new work: disk below 1 GiB"]
        );
    }

    #[test]
    fn what_is_free_and_who_is_ahead_are_told() {
        let mut placement = with(vec![agent(1, 2, 16, &[])]);
        let resources = Resources { cpu_millis: 1000, memory_bytes: 12 * GIB };
        placement.set_reservations(id(1), [(attempt(1), Reservation { resources, repository: None })].into());
        assert_eq!(why(&mut placement, 1000, 8, "", ""), ["needs 8 GiB of memory, largest free 4 GiB"]);
        let small = Requirements {
            resources: Resources { cpu_millis: 500, memory_bytes: GIB },
            labels: Default::default(),
            executor: None,
        };
        let waiting =
            Waiting { requirements: small.into(), priority: 0, order: 2000, repository: "r".into() };
        placement.enqueue(attempt(2), waiting);
        assert_eq!(placement.place_next(), None);
        assert_eq!(
            placement.why(attempt(2)),
            ["room is being kept for an earlier, larger action", "1 attempt is ahead of it"]
        );
        assert!(placement.why(attempt(1)).is_empty(), "placed");
    }

    #[test]
    fn amounts_read_well() {
        assert_eq!((cpus(500), cpus(1000), cpus(4000)), ("0.5 CPUs".into(), "1 CPU".into(), "4 CPUs".into()));
        assert_eq!(
            (bytes(1), bytes(512 << 20), bytes(3 * GIB / 2)),
            ("1 bytes".into(), "512 MiB".into(), "1.5 GiB".into())
        );
        assert_eq!((bytes(1023 * GIB), bytes(16 << 40)), ("1023 GiB".into(), "16 TiB".into()));
        assert_eq!(number(1999, 1000), "1.99");
        assert_eq!(number(1010, 1000), "1.01");
    }
}
