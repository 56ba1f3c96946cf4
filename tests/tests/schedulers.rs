//! Takes schedulers away from agents.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::time::Instant;

use sealci_tests::{Installation, Part, action, attempts, eventually, let_go};

const WAITING: &str = "name: waiting\nactions:\n  long:\n    configuration: {executor: process}\n    commands:\n      \
                       - touch begun; while ! test -e go; do sleep 0.05; done\n";

#[test]
fn an_agent_goes_on_with_the_next_scheduler_of_its_list() {
    let mut installation = Installation::none();
    installation.start_part(Part::Scheduler);
    let second = installation.start_other_scheduler();
    let list = format!("{},{}", installation.url(Part::Scheduler), second.url);
    installation.arguments.insert(Part::Controller, vec!["--scheduler".into(), second.url.clone()]);
    installation.arguments.insert(Part::Agent, vec!["--scheduler".into(), list]);
    installation.start_all();
    let number = installation.submit_manifest("repository", WAITING);
    let workspace = installation.workspace_with("begun");

    installation.kill(Part::Scheduler);
    let killed_at = Instant::now();
    eventually("the agent to be there by the other scheduler", || {
        let log = installation.service_log(Part::Agent);
        (log.matches("the scheduler knows this agent").count() >= 2).then_some(())
    });
    println!(
        "the agent was with the second scheduler {:.1} s after the first was killed",
        killed_at.elapsed().as_secs_f64()
    );
    let_go(&workspace, "go");
    let pipeline = installation.finished(&number);
    assert_eq!(attempts(action(&pipeline, "long")), ["succeeded"], "what ran went on");
    let next = installation.submit_manifest("next", "name: n\nactions: {a: {commands: [echo there]}}");
    assert_eq!(installation.text(&next, "a"), "there\n");
}
