//! Draws pipelines, and knows what each of their actions prints and how it ends when nobody disturbs it.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use sealci_controller::dispatch::NewPipeline;
use sealci_core::event::{EventKind, Revision};
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Outcome;
use sealci_core::plan::{
    AllowFailure, Environment, ExecutorKind, Network, Plan, PlannedAction, Reports, Resources, Retry,
    RetryOn, Shell,
};

/// Stands for the attempt's own name where a command prints it: so that no two attempts print the same.
const ATTEMPT: &str = "ATTEMPT";

/// Puts the attempt's name into its commands.
pub fn of_attempt(commands: &[String], attempt: AttemptId) -> Vec<String> {
    commands.iter().map(|command| command.replace(ATTEMPT, &attempt.to_string())).collect()
}

/// What an attempt of these commands prints, by the table of the executor `fake`, and how it ends by itself.
pub fn undisturbed(commands: &[String], attempt: AttemptId) -> (Vec<u8>, Option<Outcome>) {
    let mut printed = Vec::new();
    for command in of_attempt(commands, attempt) {
        for line in command.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "print" => printed.extend_from_slice(format!("{rest}\n").as_bytes()),
                "bytes" => {
                    let count: usize = rest.parse().unwrap();
                    let pattern: Vec<u8> = (0..=u8::MAX).cycle().take(64 << 10).collect();
                    printed.extend(pattern.iter().cycle().take(count));
                }
                "exit" => {
                    let exit_code: i32 = rest.parse().unwrap();
                    return (printed, Some(Outcome::Failed { exit_code, limit: None }));
                }
                "hang" => return (printed, None),
                _ => {}
            }
        }
    }
    (printed, Some(Outcome::Succeeded))
}

/// Draws a pipeline.
pub fn draw(dice: &mut StdRng, identity: &str) -> NewPipeline {
    let count = dice.random_range(1..=4);
    let actions = (0..count).map(|index| action(dice, index)).collect();
    of_actions(identity, actions)
}

/// A pipeline of these actions.
pub fn of_actions(identity: &str, actions: Vec<PlannedAction>) -> NewPipeline {
    NewPipeline {
        identity: identity.to_owned(),
        repository: "simulation".into(),
        repository_url: "https://example.org/simulation".into(),
        event: EventKind::Push,
        r#ref: None,
        revision: "0123456789012345678901234567890123456789".parse::<Revision>().unwrap(),
        manifest_path: None,
        manifest: String::new(),
        plan: Plan { name: identity.to_owned(), actions },
    }
}

/// One action that runs these commands once `needs` are done.
pub fn planned(index: usize, needs: Vec<usize>, commands: &[&str]) -> PlannedAction {
    PlannedAction {
        name: format!("action {index}"),
        needs,
        commands: commands.iter().map(|command| (*command).to_owned()).collect(),
        shell: Shell::Sh,
        env: BTreeMap::new(),
        environment: Environment {
            container: None,
            executor: Some(ExecutorKind::Fake),
            labels: BTreeMap::new(),
            resources: Resources { cpu_millis: 1000, memory_bytes: 1 << 20 },
            network: Network::default(),
        },
        timeout: Duration::from_secs(40),
        allow_failure: AllowFailure::default(),
        retry: Retry::default(),
        exclusive: false,
        uses: Vec::new(),
        services: Vec::new(),
        caches: Vec::new(),
        artifacts: None,
        reports: Reports::default(),
    }
}

fn action(dice: &mut StdRng, index: usize) -> PlannedAction {
    let needs = (0..index).filter(|_| dice.random_bool(0.4)).collect();
    let mut commands = vec![format!("print {ATTEMPT} begins")];
    for _ in 0..dice.random_range(0..4) {
        let command = match dice.random_range(0..5) {
            0 => format!("bytes {}", dice.random_range(1..90_000)),
            1 => format!("print {ATTEMPT}\nsleep {}\nprint goes on", dice.random_range(1..3000)),
            2 => format!("sleep {}", dice.random_range(1..9000)),
            3 => format!("bytes 10\nsleep {}\nbytes 2000", dice.random_range(1..1500)),
            _ => "print a\nprint b".into(),
        };
        commands.push(command);
    }
    match dice.random_range(0..12) {
        0 => commands.push("exit 3".into()),
        1 => commands.push("hang".into()),
        _ => {}
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    let mut planned = planned(index, needs, &commands);
    if dice.random_bool(0.2) {
        planned.retry = Retry { times: 1, on: vec![RetryOn::Failed, RetryOn::TimedOut] };
    }
    planned.environment.resources.cpu_millis = dice.random_range(1..=3) * 1000;
    planned
}
