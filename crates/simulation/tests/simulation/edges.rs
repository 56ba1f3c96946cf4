//! Ends a controller at both edges of each commit of a fixed history, and an agent before and after each write of its spool: the
//! oracle finds all that must hold.

use sealci_simulation::scenario::Scenario;

/// Nobody dies.
const UNDISTURBED: Scenario = Scenario { controllers: 1, edge: None, write: None };

/// Plays one of them alone, with all its steps: `SEALCI_SIMULATION_EDGE=controllers,controller,edge` or `…_WRITE=write`.
#[test]
#[ignore = "plays the ending that the environment names"]
fn one_ending_is_played_again() {
    let numbers = |name: &str| -> Option<Vec<u64>> {
        let text = std::env::var(name).ok()?;
        Some(text.split(',').map(|number| number.parse().unwrap()).collect())
    };
    let scenario = match (numbers("SEALCI_SIMULATION_EDGE"), numbers("SEALCI_SIMULATION_WRITE")) {
        (Some(numbers), _) => {
            let edge = Some((numbers[1] as usize, numbers[2]));
            Scenario { controllers: numbers[0] as usize, edge, ..UNDISTURBED }
        }
        (None, Some(numbers)) => Scenario { write: Some(numbers[0]), ..UNDISTURBED },
        (None, None) => panic!("name an ending"),
    };
    scenario.play(true);
}

/// Each of so many endings, one after the other.
fn each(what: &str, count: u64, scenario: impl Fn(u64) -> Scenario) {
    assert!(count > 0);
    for number in 1..=count {
        let scenario = scenario(number);
        println!("{what} {number} of {count}: {scenario:?}");
        scenario.play(false);
    }
}

#[test]
fn a_controller_dies_at_each_edge_of_its_commits() {
    let passed = UNDISTURBED.play(false);
    each("edge", passed.edges[0], |edge| Scenario { edge: Some((0, edge)), ..UNDISTURBED });
}

#[test]
fn a_replica_dies_at_each_edge_of_its_commits() {
    let undisturbed = Scenario { controllers: 2, ..UNDISTURBED };
    let passed = undisturbed.play(false);
    for controller in 0..2 {
        let edges = passed.edges[controller];
        each("edge", edges, |edge| Scenario { edge: Some((controller, edge)), ..undisturbed });
    }
}

#[test]
fn an_agent_dies_at_each_write_of_its_spool() {
    let passed = UNDISTURBED.play(false);
    each("write", passed.writes, |write| Scenario { write: Some(write), ..UNDISTURBED });
}
