//! What becomes of actions when the line to their agent is cut, slow, lossy or late.

use std::time::{Duration, Instant};

use sealci_tests::{
    Direction, Installation, LosingWay, Network, Part, Periods, SlowWay, action, attempts, eventually,
    host::processes_with,
};

use crate::agents::first_is_over;
use crate::oracle::Oracle;
use crate::row::{Row, seconds, within};

/// Prints all the time, until the gate is open.
const CHATTER: &str =
    "i=0; while ! test -e $O/open; do i=$((i+1)); echo line $i; sleep 0.01; done; echo done";

/// An installation whose agent is at the other end of a network of its own.
fn remote(row: Row) -> Option<(Row, Network, Installation)> {
    let row = row.needs_root()?;
    let network = match Network::make() {
        Ok(network) => network,
        Err(why) => {
            row.skip("netfilter", &why);
            return None;
        }
    };
    let mut installation = row.installation();
    installation.listen_at(network.address);
    installation.prefixes.insert(Part::Agent, network.prefix());
    installation.start_all();
    Some((row, network, installation))
}

fn the_network_is_cut_for_a_while(periods: Periods) {
    let row = Row::begin(
        "network cut, shorter than the lease",
        periods,
        "iptables DROP both ways for 30 s",
        "the same attempt goes on; its log is whole (I3)",
    );
    let Some((row, network, installation)) = remote(row) else { return };
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", CHATTER);
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    network.cut(Direction::Both);
    std::thread::sleep(row.period(30));
    network.mend();
    let mended = Instant::now();
    installation.wait_for_agents(1);
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    let steady = mended.elapsed();
    assert_eq!(attempts(action(&pipeline, "long")), ["succeeded"], "{pipeline}");
    oracle.judge(&installation, &number, &pipeline);
    row.passed(&format!("one attempt; its end is known {} after the line is back", seconds(steady)));
}

#[test]
fn a_network_cut_is_outlived() {
    the_network_is_cut_for_a_while(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_network_cut_is_outlived_as_shipped() {
    the_network_is_cut_for_a_while(Periods::AsShipped);
}

fn the_network_is_cut_for_long(periods: Periods) {
    let row = Row::begin(
        "network cut, longer than the lease",
        periods,
        "iptables DROP both ways for 120 s",
        "I1, I2; I3 for both attempts; the one behind the cut is fenced, and its processes end",
    );
    let Some((row, network, mut installation)) = remote(row) else { return };
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", CHATTER);
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    network.cut(Direction::Both);
    let cut = Instant::now();
    installation.start_beside("near", &[]);
    let patience = row.period(90);
    within("the loss", patience, || first_is_over(&installation, &number));
    let lost = cut.elapsed();
    within("the second attempt", patience, || {
        oracle.ran("long").contains(&"begin 2".to_owned()).then_some(())
    });
    let again = cut.elapsed();
    assert!(again < row.period(90), "I1: {again:?}");
    std::thread::sleep(row.period(120).saturating_sub(cut.elapsed()));
    let id = installation.json(&["show", &number])["actions"][0]["id"].as_str().unwrap().to_owned();
    let first = format!("SEALCI_ATTEMPT={id}.1");
    assert!(!processes_with(&first).is_empty(), "behind the cut it runs on");
    let printed = oracle.printed_bytes("long", 1);
    network.mend();
    let (_, dead) = within("the end of what is fenced", row.period(150), || {
        processes_with(&first).is_empty().then_some(())
    });
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    oracle.judge(&installation, &number, &pipeline);
    assert_eq!(action(&pipeline, "long")["attempts"][0]["fenced"], true, "{pipeline}");
    let kept = oracle.judge_beginning(&installation, &number, "long", 1, printed);
    row.passed(&format!(
        "lost after {}, again after {}; fenced and dead {} after the line is back, all of its {kept} bytes as printed",
        seconds(lost),
        seconds(again),
        seconds(dead)
    ));
}

#[test]
fn what_is_cut_off_for_long_is_fenced() {
    the_network_is_cut_for_long(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn what_is_cut_off_for_long_is_fenced_as_shipped() {
    the_network_is_cut_for_long(Periods::AsShipped);
}

/// When an attempt was alive, by the boot-time clock: it writes that down all the time.
fn alive(oracle: &Oracle, attempt: u32) -> Vec<f64> {
    let text = std::fs::read_to_string(oracle.folder().join("alive")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.filter(|(n, _)| *n == attempt.to_string()).filter_map(|(_, at)| at.parse().ok()).collect()
}

/// Seconds of the boot-time clock.
fn boot_time() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap();
    text.split(' ').next().and_then(|seconds| seconds.parse().ok()).expect("the kernel's seconds")
}

fn an_exclusive_action_is_cut_off(periods: Periods) {
    let row = Row::begin(
        "`exclusive` behind a cut",
        periods,
        "iptables DROP both ways, under an exclusive action that ignores TERM and notes the boot-time clock",
        "its processes are dead before those of the next attempt begin; I2",
    );
    let Some((row, network, mut installation)) = remote(row) else { return };
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    let beats = "trap '' TERM; while ! test -e $O/open || test $n = 1; do \
                 echo $n $(cut -d' ' -f1 /proc/uptime) >>$O/alive; sleep 0.05; done; echo done";
    oracle.add_with("deploy", beats, "    exclusive: true\n    retry: {times: 1, on: [errored]}\n");
    let number = oracle.submit(&installation);
    oracle.wait_begun("deploy", 1);
    eventually("the first to be alive", || alive(&oracle, 1).first().copied());
    let cut = boot_time();
    network.cut(Direction::Both);
    installation.start_beside("near", &[]);
    let (began, _) = within("the second attempt", row.period(120), || alive(&oracle, 2).first().copied());
    network.mend();
    installation.wait_for_agents(2);
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(attempts(action(&pipeline, "deploy")), ["errored", "succeeded"], "{pipeline}");
    oracle.judge(&installation, &number, &pipeline);
    let ended = alive(&oracle, 1).last().copied().unwrap();
    assert!(ended < began, "they overlap: the first lived until {ended}, the second began at {began}");
    row.passed(&format!(
        "dead {:.1} s after the cut, the next began after {:.1} s",
        ended - cut,
        began - cut
    ));
}

#[test]
fn an_exclusive_action_behind_a_cut_overlaps_nothing() {
    an_exclusive_action_is_cut_off(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn an_exclusive_action_behind_a_cut_overlaps_nothing_as_shipped() {
    an_exclusive_action_is_cut_off(Periods::AsShipped);
}

#[test]
fn a_grant_is_lost() {
    let row = Row::begin(
        "a grant is lost",
        Periods::Usual,
        "what the controller says to the scheduler is lost, by a proxy, until it has recorded the claim; then the line breaks",
        "the same attempt is granted again, and runs once (I2)",
    );
    let mut installation = row.installation();
    installation.start_part(Part::Scheduler);
    let way = LosingWay::to(installation.url(Part::Scheduler));
    installation.controller_dials = Some(way.url());
    for part in [Part::Controller, Part::Monitor, Part::Agent] {
        installation.start_part(part);
    }
    installation.started();
    // The agent is known, and away: what is wanted waits for it at the scheduler.
    installation.kill(Part::Agent);
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("one", "seq 1 1000");
    let number = oracle.submit(&installation);
    within("the wish to be at the scheduler", Duration::from_secs(30), || {
        let why = installation.sealci(&["why", &number]);
        String::from_utf8_lossy(&why.stdout).contains("no agent").then_some(())
    });
    way.lose();
    installation.start_part(Part::Agent);
    let first = || installation.json(&["show", &number])["actions"][0]["attempts"][0].clone();
    within("the claim to be recorded", Duration::from_secs(30), || (!first().is_null()).then_some(()));
    assert_eq!(first()["state"], "claimed", "its grant did not arrive: {}", first());
    assert!(oracle.ran("one").is_empty());
    way.mend();
    let mended = Instant::now();
    let pipeline = oracle.finished(&installation, &number);
    let done = mended.elapsed();
    assert_eq!(oracle.judge(&installation, &number, &pipeline), 1, "{pipeline}");
    assert_eq!(oracle.ran("one"), ["begin 1", "end 1"]);
    row.passed(&format!("one attempt, done {} after the line is back", seconds(done)));
}

fn a_line_is_half_open(periods: Periods) {
    let row = Row::begin(
        "half-open connection",
        periods,
        "iptables DROP of what goes to the agent",
        "noticed within 25 s; the same attempt goes on",
    );
    let Some((row, network, installation)) = remote(row) else { return };
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", CHATTER);
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    network.cut(Direction::In);
    let (_, noticed) = within("the break to be noticed", row.period(25), || {
        (installation.json(&["agent", "list"])[0]["connected"] == false).then_some(())
    });
    network.mend();
    installation.wait_for_agents(1);
    oracle.open();
    let pipeline = oracle.finished(&installation, &number);
    assert_eq!(attempts(action(&pipeline, "long")), ["succeeded"], "{pipeline}");
    oracle.judge(&installation, &number, &pipeline);
    row.passed(&format!("noticed after {}", seconds(noticed)));
}

#[test]
fn a_half_open_line_is_noticed() {
    a_line_is_half_open(Periods::Tenth);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_half_open_line_is_noticed_as_shipped() {
    a_line_is_half_open(Periods::AsShipped);
}

fn a_line_is_slow_and_lossy(periods: Periods, how: &'static str, share: &str, lines: u32) {
    let row = Row::begin("slow, lossy line", periods, how, "the log is what was printed (I3)");
    let Some((row, network, installation)) = remote(row) else { return };
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    oracle.add("long", &format!("seq 1 {lines}; {}; seq 1 {lines}", crate::oracle::WAIT));
    let number = oracle.submit(&installation);
    oracle.wait_begun("long", 1);
    network.spoil(share);
    oracle.open();
    let begun = Instant::now();
    let pipeline = oracle.finished_within(&installation, &number, Duration::from_secs(400));
    let took = begun.elapsed();
    // Its last bytes may come after its result.
    let count = oracle.judge(&installation, &number, &pipeline);
    let whole = begun.elapsed();
    let pipeline = installation.json(&["show", &number]);
    let kilobytes =
        action(&pipeline, "long")["attempts"][count - 1]["log_length"].as_u64().unwrap_or_default() / 1000;
    row.passed(&format!(
        "result after {}, the log of {kilobytes} kB whole after {}; {count} attempt(s)",
        seconds(took),
        seconds(whole)
    ));
}

#[test]
fn a_slow_and_lossy_line_loses_nothing() {
    a_line_is_slow_and_lossy(Periods::Usual, "tbf 1 Mbit/s, iptables statistic 0.05", "0.05", 5_000);
}

#[test]
#[ignore = "takes minutes: cargo xtask faults"]
fn a_slow_and_lossy_line_loses_nothing_as_shipped() {
    a_line_is_slow_and_lossy(Periods::AsShipped, "tbf 1 Mbit/s, iptables statistic 0.3", "0.3", 20_000);
}

#[test]
fn desired_states_and_held_sets_cross() {
    let row = Row::begin(
        "a desired state and a held set cross",
        Periods::Usual,
        "what the scheduler says arrives 1 s late, by a proxy",
        "nothing in flight is taken for lost",
    );
    let mut installation = row.installation();
    installation.start_part(Part::Scheduler);
    let way = SlowWay::to(installation.url(Part::Scheduler), Duration::from_secs(1));
    installation.agents_dial = Some(way.url());
    for part in [Part::Controller, Part::Monitor, Part::Agent] {
        installation.start_part(part);
    }
    installation.started();
    let mut oracle = Oracle::new(installation.scratch("oracle"));
    for number in 0..12 {
        oracle.add(&format!("a{number}"), &format!("seq 1 {}", 100 + number));
    }
    let begun = Instant::now();
    let numbers: Vec<String> = (0..2).map(|_| oracle.submit(&installation)).collect();
    let mut count = 0;
    for number in &numbers {
        let pipeline = oracle.finished(&installation, number);
        assert_eq!(pipeline["outcome"], "succeeded", "{pipeline}");
        for one in pipeline["actions"].as_array().unwrap() {
            assert_eq!(attempts(one), ["succeeded"], "{one}");
            count += 1;
        }
    }
    row.passed(&format!("{count} actions, one attempt each, in {}", seconds(begun.elapsed())));
}
