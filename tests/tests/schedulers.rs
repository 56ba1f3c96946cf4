//! Takes schedulers, and the lines to them, away from agents.

// All of this is test code: what cannot be had ends the test.
#![allow(clippy::unwrap_used)]

use std::thread;
use std::time::{Duration, Instant};

use sealci_tests::host::is_root;
use sealci_tests::{Cut, Installation, Line, Part, action, attempts, both, eventually, let_go, skip};

const WAITING: &str = "name: waiting\nactions:\n  long:\n    configuration: {executor: process}\n    commands:\n      \
                       - touch begun; while ! test -e go; do sleep 0.05; done\n";

#[test]
fn an_agent_goes_on_with_the_next_scheduler_of_its_list() {
    let mut installation = Installation::none();
    installation.start_part(Part::Scheduler);
    let second = installation.start_other_scheduler();
    let list = format!("{},{}", installation.url(Part::Scheduler), second.url);
    installation.controller_dials = Some(list.clone());
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

#[test]
fn all_schedulers_say_why_an_action_waits() {
    let mut installation = Installation::none();
    installation.start_part(Part::Scheduler);
    let second = installation.start_other_scheduler();
    let first = installation.url(Part::Scheduler).to_owned();
    installation.controller_dials = Some(format!("{first},{}", second.url));
    installation.start_all();
    let manifest = "name: n\nactions: {a: {configuration: {labels: {gpu: \"true\"}}, commands: [x]}}";
    let number = installation.submit_manifest("waiting", manifest);
    let why = both(&installation.sealci(&["why", &number, "a"]));
    assert!(why.contains(&format!("{first}: 0 of 1 agents have label gpu=true")), "{why}");
    assert!(why.contains(&format!("{}: no agent is connected", second.url)), "{why}");
}

#[test]
fn a_half_open_line_is_found_within_25_seconds() {
    let test = "a_half_open_line_is_found_within_25_seconds";
    if !is_root() || !Line::can_be_cut() {
        return skip("root", test, "only root can have the kernel drop packets, with iptables");
    }
    let directions = [Cut::FromDialler, Cut::ToDialler].map(|cut| {
        thread::spawn(move || {
            let mut installation = Installation::none();
            installation.start_part(Part::Scheduler);
            let mut line = Line::to(installation.url(Part::Scheduler));
            installation.arguments.insert(Part::Agent, vec!["--scheduler".into(), line.url()]);
            installation.start_all();
            line.cut(cut);
            let cut_at = Instant::now();
            let noticed = |part: Part, words: &str| {
                eventually(words, || installation.service_log(part).contains(words).then(|| cut_at.elapsed()))
            };
            let by_agent = noticed(Part::Agent, "the stream to the scheduler broke");
            let by_scheduler = noticed(Part::Scheduler, "an agent's stream ended");
            println!("{cut:?}: the agent noticed after {by_agent:?}, the scheduler by {by_scheduler:?}");
            line.mend();
            eventually("the agent to be back", || {
                let agents = installation.json(&["agent", "list"]);
                (agents[0]["connected"] == true).then_some(())
            });
            by_agent.max(by_scheduler)
        })
    });
    for direction in directions {
        let noticed = direction.join().expect("the direction is tried");
        assert!(noticed < Duration::from_secs(25), "{noticed:?}");
    }
}
