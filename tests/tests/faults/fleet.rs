//! Kills the scheduler and the controller while 200 actions run at four agents.

use std::time::{Duration, Instant};

use sealci_tests::{Installation, Part, Periods};

use crate::oracle::{Oracle, WAIT};
use crate::row::{Row, seconds, within};

const AGENTS: usize = 4;
const ACTIONS: usize = 200;

/// Agents with room for 50 actions each, and as many actions that wait.
fn two_hundred_run(row: &Row) -> (Installation, Oracle, String) {
    let mut installation = row.installation();
    let room = ["--cpu-millis", "6000", "--memory-bytes", "1073741824"];
    installation.arguments.insert(Part::Agent, room.iter().map(|word| (*word).to_owned()).collect());
    installation.start_all();
    for number in 1..AGENTS {
        installation.start_beside(&format!("agent-{number}"), &room);
    }
    installation.wait_for_agents(AGENTS);
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    for number in 0..ACTIONS {
        oracle.add(&format!("a{number}"), &format!("seq 1 {}; {WAIT}; seq 1 500", 100 + number));
    }
    let number = oracle.submit(&installation);
    oracle.wait_all_begun();
    (installation, oracle, number)
}

fn one_is_killed(part: Part, row: Row) {
    let (mut installation, oracle, number) = two_hundred_run(&row);
    installation.kill(part);
    if part == Part::Scheduler {
        within("the break to be seen", Duration::from_secs(5), || {
            (how_many_accept(&installation) == 0).then_some(())
        });
    }
    installation.start_part(part);
    let restarted = Instant::now();
    // Steady: every agent is there with what it holds, and new work is done.
    within("all that runs to be known again", Duration::from_secs(15), || {
        let agents = installation.json(&["agent", "list"]);
        let agents = agents.as_array()?;
        let held: u64 = agents.iter().filter_map(|agent| agent["holds"].as_u64()).sum();
        let accepting = agents.iter().filter(|agent| agent["accepting"] == true).count();
        (accepting == AGENTS && held == ACTIONS as u64).then_some(())
    });
    let fine = "name: fine\nactions:\n  fine:\n    configuration: {executor: fake, resources: {cpu: 0.1, memory: 1MiB}}\n    \
                commands: ['print fine']\n";
    let new = installation.submit_manifest("fine", fine);
    assert_eq!(installation.finished(&new)["outcome"], "succeeded");
    let steady = restarted.elapsed();
    assert!(steady < Duration::from_secs(15), "steady only after {steady:?}");
    oracle.open();
    let opened = Instant::now();
    let pipeline = oracle.finished(&installation, &number);
    let done = opened.elapsed();
    assert_eq!(oracle.judge(&installation, &number, &pipeline), ACTIONS, "nothing is tried again");
    row.passed(&format!(
        "steady after {}; {ACTIONS} of {ACTIONS} at their first attempt, {} after they could end",
        seconds(steady),
        seconds(done)
    ));
}

#[test]
fn a_scheduler_is_killed_with_200_running() {
    let row = Row::begin(
        "scheduler killed with 200 running",
        Periods::Usual,
        "kill -9, restart",
        "nothing tried again, nothing lost, steady within 15 s",
    );
    one_is_killed(Part::Scheduler, row);
}

#[test]
fn a_controller_is_killed_with_200_running() {
    let row = Row::begin(
        "controller killed with 200 running",
        Periods::Usual,
        "kill -9, restart",
        "nothing tried again, nothing lost, steady within 15 s",
    );
    one_is_killed(Part::Controller, row);
}

/// The developers' program that runs many agents, built once.
fn many_agents() -> std::path::PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = std::process::Command::new(cargo)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--quiet", "--locked", "-p", "sealci-agent", "--example", "many_agents"])
        .status();
    assert!(built.unwrap().success());
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("examples/many_agents")
}

fn how_many_accept(installation: &Installation) -> usize {
    let agents = installation.json(&["agent", "list"]);
    agents.as_array().map_or(0, |agents| agents.iter().filter(|agent| agent["accepting"] == true).count())
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_thousand_agents_reconnect_at_once() {
    const MANY: usize = 1000;
    let row = Row::begin(
        "1,000 agents reconnect at once",
        Periods::AsShipped,
        "kill -9 the scheduler under 1,000 agents, restart",
        "steady within 60 s",
    );
    let mut installation = row.installation();
    installation.start_all();
    let folder = installation.scratch("many");
    let mut command = std::process::Command::new(many_agents());
    command.arg(installation.url(Part::Scheduler)).arg(installation.data().join("enrolment.token"));
    command.arg(folder).args([MANY.to_string(), "1".to_owned()]);
    installation.run_beside("many", command);
    let patience = Duration::from_secs(300);
    within("all agents", patience, || (how_many_accept(&installation) == MANY + 1).then_some(()));
    let manifest = |executor: &str| {
        let mut text = "name: many\nactions:\n".to_owned();
        for number in 0..500 {
            text += &format!(
                "  a{number}: {{needs: [], configuration: {{executor: {executor}}}, commands: ['sleep 1000']}}\n"
            );
        }
        text
    };
    let numbers: Vec<String> =
        (0..2).map(|n| installation.submit_manifest(&format!("many-{n}"), &manifest("fake"))).collect();
    let held = |installation: &Installation| -> u64 {
        let agents = installation.json(&["agent", "list"]);
        agents.as_array().map_or(0, |all| all.iter().filter_map(|agent| agent["holds"].as_u64()).sum())
    };
    // While actions run at half of them.
    within("actions to run", patience, || (held(&installation) > 100).then_some(()));
    installation.kill(Part::Scheduler);
    within("the break to be seen", Duration::from_secs(5), || {
        (how_many_accept(&installation) == 0).then_some(())
    });
    installation.start_part(Part::Scheduler);
    let (_, steady) = within("all agents again", Duration::from_secs(60), || {
        (how_many_accept(&installation) == MANY + 1).then_some(())
    });
    for number in &numbers {
        let (pipeline, _) = within("the pipelines", patience, || {
            let pipeline = installation.json(&["show", number]);
            (pipeline["state"] == "finished").then_some(pipeline)
        });
        assert_eq!(pipeline["outcome"], "succeeded");
        for one in pipeline["actions"].as_array().unwrap() {
            assert_eq!(sealci_tests::attempts(one), ["succeeded"], "{one}");
        }
    }
    row.passed(&format!(
        "all there again {} after the start; 1,000 actions, one attempt each",
        seconds(steady)
    ));
}
