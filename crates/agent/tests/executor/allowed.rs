//! What an action reaches that is held to a list. The outside has a name server, too (`names.pl`).

use std::process::Command;
use std::time::{Duration, Instant};

use sealci_agent::executor::{ExecutionRequest, NoteReader, ShellKind, notes};
use sealci_core::destination::Destination;
use sealci_core::ids::AttemptId;
use sealci_core::outcome::Outcome;
use sealci_core::plan::{Container, Network};

use crate::lab::{Lab, until_output};
use crate::network::{METADATA, Outside, PORT, names_asked};

/// Every refusal comes at once; what waits for a silent name server has its time.
const AT_ONCE: Duration = Duration::from_secs(20);

pub fn allow<'a>(destinations: impl IntoIterator<Item = &'a str>) -> Network {
    Network::Allow(destinations.into_iter().map(|text| Destination::parse(text).unwrap()).collect())
}

fn held(lab: &Lab, destinations: &[String], commands: &[String]) -> (ExecutionRequest, NoteReader) {
    let mut request = lab.request(commands);
    request.shell = ShellKind::Bash;
    request.network = allow(destinations.iter().map(String::as_str));
    let (notes, said) = notes();
    request.notes = notes;
    (request, said)
}

fn lines(said: &mut NoteReader) -> Vec<String> {
    said.rest().iter().map(|line| String::from_utf8_lossy(line).trim_end().to_owned()).collect()
}

/// A command that says what it hears, or `nothing`; and `slow` if it had to be stopped.
fn hear(place: &str, port: u16) -> String {
    format!(
        "timeout 20 bash -c 'cat </dev/tcp/{place}/{port}' 2>/dev/null || {{ test $? = 124 && echo slow || echo nothing; }}"
    )
}

pub async fn the_listed_is_reached_and_nothing_else(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let address = outside.address.to_string();
    let listed =
        ["good", "alias", "many", "zero", "mixed", "loop", "metadata", "host", "broken", "turn", "none"];
    let mut destinations: Vec<String> = listed.iter().map(|name| format!("{name}.example:{PORT}")).collect();
    destinations.push(format!("*.below.example:{PORT}"));
    let reached = ["good.example", "GOOD.Example", "alias.example", "a.below.example", "mixed.example"]
        .map(str::to_owned);
    let refused = [
        "below.example",
        "evil.example",
        "good.example.evil.example",
        "loop.example",
        "metadata.example",
        "host.example",
        "broken.example",
        "turn.example",
        "none.example",
        "127.0.0.1",
        "0.0.0.1",
    ];
    let refused: Vec<String> = refused
        .into_iter()
        .map(str::to_owned)
        .chain([METADATA.to_string(), outside.host.to_string()])
        .collect();

    // Not before a name has led there.
    let mut commands = vec![hear(&address, PORT)];
    commands.extend(reached.iter().map(|place| hear(place, PORT)));
    commands.extend(refused.iter().map(|place| hear(place, PORT)));
    let count = commands.len();
    commands.extend([
        hear("good.example", PORT + 1),
        "getent ahostsv4 many.example | grep -c STREAM".to_owned(),
        format!("getent ahostsv4 zero.example >/dev/null; sleep 1; {}", hear(&address, PORT)),
        format!(
            "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Proto => q(udp), PeerAddr => q({address}), PeerPort => 53); \
             print $s->send(q(x)) ? qq(sent\\n) : qq(nothing\\n)'"
        ),
        "grep -c . /etc/resolv.conf".to_owned(),
    ]);
    let (request, mut said) = held(lab, &destinations, &commands);
    let attempt = request.attempt;
    let begun = Instant::now();
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(gatekeepers_of(attempt), Vec::<String>::new());
    assert_eq!(record.output_of(0), "nothing\n");
    for (index, place) in reached.iter().enumerate() {
        assert_eq!(record.output_of(1 + index), format!("{}\n", outside.host), "{place}");
    }
    for (index, place) in refused.iter().enumerate() {
        assert_eq!(record.output_of(1 + reached.len() + index), "nothing\n", "{place}");
    }
    let others: Vec<String> = (count..commands.len()).map(|index| record.output_of(index)).collect();
    assert_eq!(others, ["nothing\n", "100\n", &format!("{}\n", outside.host), "nothing\n", "1\n"]);
    assert!(begun.elapsed() < AT_ONCE * 3, "{:?}", begun.elapsed());

    let lines = lines(&mut said);
    let has = |line: String| lines.iter().any(|told| told.starts_with(&format!("sealci: network: {line}")));
    for line in [
        format!("connected to good.example at {address}:{PORT}"),
        format!("connected to a.below.example at {address}:{PORT}"),
        format!("refused: {address}:{PORT} is not"),
        format!("refused: {address}:{} is not", PORT + 1),
        format!("refused: {address}:53 by UDP is not"),
        "refused: the name evil.example is not".to_owned(),
        "refused: the name below.example is not".to_owned(),
        "refused: loop.example leads to 127.0.0.1, which".to_owned(),
        format!("refused: metadata.example leads to {METADATA}, which"),
        format!("refused: host.example leads to {}, which", outside.host),
        format!("refused: {METADATA}:{PORT} is not"),
        format!("refused: {}:{PORT} is not", outside.host),
        "no name server of the agent's told where broken.example leads".to_owned(),
    ] {
        assert!(has(line.clone()), "{line} is not in {lines:#?}");
    }
    let asked = names_asked(&outside);
    assert!(asked.contains("good.example") && asked.contains("a.below.example"), "{asked:?}");
    assert!(!asked.contains("evil.example") && !asked.contains("below.example"), "{asked:?}");
}

pub async fn addresses_are_listed_without_names(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let network = format!("198.18.0.0/16:{PORT}");
    // What nobody may reach stays so.
    let all = [
        network,
        format!("{METADATA}:{PORT}"),
        format!("127.0.0.0/8:{PORT}"),
        format!("10.213.0.0/16:{PORT}"),
    ];
    let places = [outside.address, outside.host, METADATA].map(|address| address.to_string());
    let mut commands: Vec<String> = places.iter().map(|place| hear(place, PORT)).collect();
    commands.push(hear(&places[0], PORT + 1));
    let (request, mut said) = held(lab, &all, &commands);
    let record = lab.run(request).await;
    let heard: Vec<String> = (0..commands.len()).map(|index| record.output_of(index)).collect();
    assert_eq!(heard, [&format!("{}\n", outside.host), "nothing\n", "nothing\n", "nothing\n"]);
    let lines = lines(&mut said);
    assert_eq!(lines[0], format!("sealci: network: connected to {}:{PORT}", outside.address), "{lines:#?}");
    assert_eq!(lines.len(), 4, "{lines:#?}");
}

pub async fn a_silent_name_server_is_not_waited_for_long(lab: &Lab) {
    let Some(_outside) = Outside::make() else { return };
    let command = "perl -MSocket -e 'print inet_aton(q(silent.example)) ? qq(found\\n) : qq(nothing\\n)'";
    let (request, mut said) = held(lab, &["silent.example".to_owned()], &[command.to_owned()]);
    let begun = Instant::now();
    let record = lab.run(request).await;
    assert_eq!(record.text(), "nothing\n");
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    let lines = lines(&mut said);
    assert!(lines[0].contains("no name server of the agent's told where silent.example leads"), "{lines:#?}");
}

/// Root in a machine has a card of its own, and asks and sends what it likes.
pub async fn a_machine_is_held_to_its_list(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let address = outside.address.to_string();
    let places = ["good.example", "evil.example", "host.example", &address, &outside.host.to_string()];
    let mut commands: Vec<String> = places.iter().map(|place| hear(place, PORT)).collect();
    // The order matters: a name has led there by now, and to no other port.
    commands.push(hear(&address, PORT + 1));
    let (request, mut said) =
        held(lab, &["good", "host"].map(|name| format!("{name}.example:{PORT}")), &commands);
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    let heard: Vec<String> = (0..commands.len()).map(|index| record.output_of(index)).collect();
    let answer = format!("{}\n", outside.host);
    assert_eq!(heard, [&answer, "nothing\n", "nothing\n", &answer, "nothing\n", "nothing\n"]);
    let lines = lines(&mut said);
    let reached = format!("sealci: network: connected to good.example at {address}:{PORT}");
    assert!(lines[0].starts_with(&reached), "{lines:#?}");
    for refused in ["the name evil.example", "host.example leads to", &format!("{}:{PORT}", outside.host)] {
        let line = format!("sealci: network: refused: {refused}");
        assert!(lines.iter().any(|told| told.starts_with(&line)), "{line} is not in {lines:#?}");
    }
}

/// However much is tried, and also of what is ended by force.
pub async fn the_record_is_bounded_and_outlives_a_kill(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let tries = format!(
        "for port in $(seq 1 400); do (: </dev/tcp/{}/$port) 2>/dev/null || true; done; {}; echo tried; sleep 1000",
        outside.address,
        hear("good.example", PORT)
    );
    let (request, mut said) = held(lab, &[format!("good.example:{PORT}")], &[tries]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "tried\n").await;
    assert_eq!(gatekeepers_of(attempt).len(), 1);
    execution.handle().kill();
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert_eq!(record.outcome(), &Outcome::Cancelled);
    assert_eq!(gatekeepers_of(attempt), Vec::<String>::new());
    let lines = lines(&mut said);
    assert_eq!(lines.len(), 51, "{lines:#?}");
    // 256 of 400 places, the rest as one, and what was reached.
    assert_eq!(lines[50], "sealci: network: 208 more destinations", "{lines:#?}");
}

/// Without its gatekeeper an environment would reach nothing new, and nobody would know what it reaches.
pub async fn a_gatekeeper_takes_its_environment_along(lab: &Lab) {
    let (request, _said) = held(lab, &["good.example".to_owned()], &["echo up; sleep 1000".to_owned()]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    let [gatekeeper] = &gatekeepers_of(attempt)[..] else { panic!("{:?}", gatekeepers_of(attempt)) };
    assert!(Command::new("kill").args(["-9", gatekeeper]).status().unwrap().success());
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    let Outcome::Errored { message, .. } = record.outcome() else { panic!("{:?}", record.outcome()) };
    assert!(message.contains("the gatekeeper broke off"), "{message}");
}

/// It may do nothing but what it is there for.
pub async fn a_gatekeeper_has_no_privilege_but_one(lab: &Lab) {
    let (request, _said) = held(lab, &["good.example".to_owned()], &["echo up; sleep 1000".to_owned()]);
    let attempt = request.attempt;
    let mut execution = lab.start(request).await;
    until_output(&mut execution, "up\n").await;
    let [gatekeeper] = &gatekeepers_of(attempt)[..] else { panic!("{:?}", gatekeepers_of(attempt)) };
    let status = std::fs::read_to_string(format!("/proc/{gatekeeper}/status")).unwrap();
    let of = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(of("Uid:"), ["65534"; 4]);
    assert_eq!(of("Groups:"), Vec::<String>::new());
    let network_only = format!("{:016x}", 1_u64 << 12);
    for set in ["CapEff:", "CapPrm:"] {
        assert_eq!(of(set), [network_only.as_str()], "{set}");
    }
    assert_eq!(of("NoNewPrivs:"), ["1"]);
    execution.handle().kill();
    while execution.next().await.is_some() {}
}

/// The process ids of an attempt's gatekeepers: processes of its helper that are in the host's network.
pub fn gatekeepers_of(attempt: AttemptId) -> Vec<String> {
    let network_of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let own = network_of("self");
    let is_its = |process: &String| {
        let command_line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
        let privileges = status.lines().find_map(|line| line.strip_prefix("CapPrm:\t"));
        String::from_utf8_lossy(&command_line).contains(&attempt.to_string())
            && network_of(process) == own
            && privileges == Some(&format!("{:016x}", 1_u64 << 12))
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(is_its).collect()
}

#[tokio::test]
async fn who_cannot_hold_an_action_to_a_list_runs_none() {
    for lab in [Lab::process(), Lab::docker()].into_iter().flatten() {
        let mut request = lab.request(["true"]);
        request.network = allow(["good.example"]);
        request.container = Some(Container::of("tools".to_owned()));
        let error = lab.executor.prepare(request).await.map(drop).unwrap_err();
        assert!(error.message().contains("cannot hold an action to what"), "{}", error.message());
        lab.executor.close().await;
    }
}
