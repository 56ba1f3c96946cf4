//! What an action with `network: on` reaches, and what not. The outside is a network namespace of the test's own.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sealci_agent::executor::{ExecutionRequest, ShellKind};
use sealci_core::outcome::Outcome;
use sealci_core::plan::Network;
use sealci_sandbox::{MACHINE_ARGUMENT, MachineSpec, NetworkSpec, Uplink, machine};

use crate::lab::{GIVEN, Lab, eventually, outside_address, until_output};

/// One port for all listeners.
pub const PORT: u16 = 18_213;

/// Another machine, as far as this one can tell: it has a public address, and a cloud's metadata address.
pub struct Outside {
    name: String,
    pub host: Ipv4Addr,
    pub address: Ipv4Addr,
    /// What listens and what answers for names; none where the one who started this test keeps it.
    servers: Vec<Child>,
    _alone: Option<MutexGuard<'static, ()>>,
}

/// There is one outside at a time: they all have the same metadata address, and the same port on the host.
static ALONE: Mutex<()> = Mutex::new(());

pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

impl Outside {
    /// For a process that may make none itself.
    pub fn variable(&self) -> (&'static str, String) {
        (GIVEN, format!("{} {}", self.host, self.address))
    }

    pub fn make() -> Option<Self> {
        if let Ok(given) = std::env::var(GIVEN) {
            let (host, address) = given.split_once(' ').unwrap();
            let (host, address) = (host.parse().unwrap(), address.parse().unwrap());
            return Some(Self { name: String::new(), host, address, servers: Vec::new(), _alone: None });
        }
        for program in ["ip", "perl", "bash"] {
            if Command::new(program).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
                eprintln!("SKIPPED: `{program}` is missing (apt-get install iproute2 perl)");
                return None;
            }
        }
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let name = format!("outside{}", std::process::id() % 200);
        let address = outside_address();
        let host = Ipv4Addr::from(u32::from(address) - 1);
        let script = format!(
            "set -e; ip netns add {name}; ip link add {name} type veth peer name eth0 netns {name}; \
             ip addr add {host}/24 dev {name}; ip link set {name} up; ip route add {METADATA}/32 dev {name}; \
             ip -n {name} addr add {address}/24 dev eth0; ip -n {name} addr add {METADATA}/32 dev eth0; \
             ip -n {name} link set lo up; ip -n {name} link set eth0 up"
        );
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success(), "{script}");
        let server = format!(
            "use IO::Socket::INET; $l = IO::Socket::INET->new(Listen => 9, LocalPort => {PORT}, ReuseAddr => 1) or die; \
             while ($c = $l->accept) {{ print $c $c->peerhost, qq(\\n); close $c }}"
        );
        let in_it = |words: &[&str]| {
            Command::new("ip").args(["netns", "exec", &name, "perl"]).args(words).spawn().unwrap()
        };
        let (log, there, here) = (log_of_names(address), address.to_string(), host.to_string());
        let names = ["-e", include_str!("names.pl"), &log, &there, &here];
        let servers = vec![in_it(&["-e", &server]), in_it(&names)];
        let outside = Self { name, host, address, servers, _alone: Some(alone) };
        for address in [outside.address, METADATA] {
            eventually("the outside listens", || reaches(address));
        }
        let names = SocketAddr::from((address, 53));
        eventually("the outside answers for names", || TcpStream::connect(names).is_ok());
        Some(outside)
    }
}

impl Outside {
    /// How many echo requests have come there (proc_net(5)).
    fn echo_requests(&self) -> u64 {
        let output = Command::new("ip").args(["netns", "exec", &self.name, "cat", "/proc/net/snmp"]).output();
        let table = String::from_utf8(output.unwrap().stdout).unwrap();
        let mut lines = table.lines().filter(|line| line.starts_with("Icmp:")).map(str::split_whitespace);
        let (mut names, mut values) = (lines.next().unwrap(), lines.next().unwrap());
        let place = names.position(|name| name == "InEchos").unwrap();
        values.nth(place).unwrap().parse().unwrap()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if self.servers.is_empty() {
            return;
        }
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = std::fs::remove_file(log_of_names(self.address));
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Where the outside's name server writes down what it is asked for.
fn log_of_names(outside: Ipv4Addr) -> String {
    std::env::temp_dir().join(format!("sealci-names-{outside}")).display().to_string()
}

/// The names that the outside was asked for.
pub fn names_asked(outside: &Outside) -> BTreeSet<String> {
    let log = std::fs::read_to_string(log_of_names(outside.address)).unwrap();
    log.lines().map(str::to_owned).collect()
}

fn reaches(address: Ipv4Addr) -> bool {
    TcpStream::connect_timeout(&SocketAddr::from((address, PORT)), Duration::from_secs(1)).is_ok()
}

fn online(lab: &Lab, commands: &[String]) -> ExecutionRequest {
    let mut request = lab.request(commands);
    request.shell = ShellKind::Bash;
    request.network = Network::On;
    request
}

/// A command that says what it hears from an address, or `nothing`.
fn try_reach(address: &str) -> String {
    format!("timeout 1 bash -c 'cat </dev/tcp/{address}/{PORT}' 2>/dev/null || echo nothing")
}

pub async fn the_outside_is_reached_and_nothing_else(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    // The host listens on all its addresses.
    let _listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    assert!(reaches(outside.host) && reaches(Ipv4Addr::LOCALHOST));
    let gateway = "$(printf '%d.%d.%d.%d' $(awk '$2 == \"00000000\" { print $3 }' /proc/net/route | \
        sed 's/\\(..\\)\\(..\\)\\(..\\)\\(..\\)/0x\\4 0x\\3 0x\\2 0x\\1/'))";
    let request = online(
        lab,
        &[
            // A machine takes its time where its processor is emulated.
            try_reach(&outside.address.to_string()).replacen("timeout 1", "timeout 20", 1),
            try_reach("127.0.0.1"),
            try_reach(&outside.host.to_string()),
            try_reach(&METADATA.to_string()),
            format!("gateway={gateway}; test $gateway != 0.0.0.0; timeout 1 bash -c \"cat </dev/tcp/$gateway/{PORT}\" 2>/dev/null || echo nothing"),
            "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort | xargs; cat /proc/net/if_inet6 | grep -v lo || true".to_owned(),
            "grep -c ^nameserver /etc/resolv.conf || true".to_owned(),
        ],
    );
    let record = lab.run(request).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    // Translated: the outside sees the host.
    assert_eq!(record.output_of(0), format!("{}\n", outside.host));
    for (index, what) in [(1, "loopback"), (2, "the host's address"), (3, "metadata"), (4, "the gateway")] {
        assert_eq!(record.output_of(index), "nothing\n", "{what} is reached");
    }
    assert_eq!(record.output_of(5), "eth0 lo\n");

    let mut offline = online(lab, &[try_reach(&outside.address.to_string())]);
    offline.network = Network::Off;
    assert_eq!(lab.run(offline).await.text(), "nothing\n");
}

pub async fn sandboxes_do_not_reach_each_other(lab: &Lab) {
    let own = "awk '/32 host LOCAL/ { print f } { f = $2 }' /proc/net/fib_trie | grep '^10[.]' | head -1";
    let server = format!(
        "perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(Listen => 1, LocalPort => {PORT}) or die; \
         $| = 1; print qq(up\\n); print qq(heard\\n) while $l->accept'"
    );
    let mut execution = lab.start(online(lab, &[own.to_owned(), server])).await;
    let record = until_output(&mut execution, "up\n").await;
    let address = record.text().lines().next().unwrap().to_owned();
    assert!(address.starts_with("10.213."), "{address}");
    let other = lab.run(online(lab, &[try_reach(&address)])).await;
    assert_eq!(other.text(), "nothing\n");
    execution.handle().kill();
    let mut record = record;
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert!(!record.text().contains("heard"));
}

pub async fn links_go_with_their_sandboxes(lab: &Lab) {
    // More often than there are slots in use, so that names come again while the last link is still being taken down.
    for _ in 0..10 {
        let record = lab.run(online(lab, &["true".to_owned()])).await;
        assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    }
}

/// Routes are not asked for by a socket that is bound to an interface; the filter is.
pub async fn binding_to_an_interface_does_not_help(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let _listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap();
    let reach = |address: String| {
        format!(
            "timeout 1 perl -MSocket -e 'socket(S, PF_INET, SOCK_STREAM, 0) or die; \
             setsockopt(S, SOL_SOCKET, 25, qq(eth0\\0)) or die qq(cannot bind: $!); \
             connect(S, sockaddr_in({PORT}, inet_aton(qq({address})))) or die; print <S>' 2>&1 || echo nothing"
        )
    };
    let forbidden =
        ["127.0.0.1", "10.213.255.2", "10.213.255.3", "10.213.255.100", "0.0.0.1"].map(str::to_owned);
    let forbidden = forbidden.into_iter().chain([outside.host.to_string(), METADATA.to_string()]);
    let addresses: Vec<String> = [outside.address.to_string()].into_iter().chain(forbidden).collect();
    let record = lab.run(online(lab, &addresses.iter().cloned().map(reach).collect::<Vec<_>>())).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.output_of(0), format!("{}\n", outside.host));
    for (index, address) in addresses.iter().enumerate().skip(1) {
        assert!(record.output_of(index).ends_with("nothing\n"), "{address}: {}", record.output_of(index));
    }
}

/// Root in a machine is root over its card as well, and sends from any address; the namespace around it does not let that go.
pub async fn a_machine_speaks_for_itself_alone(lab: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let reach_from = |address: &str| {
        format!(
            "perl -MSocket -e 'socket(S, PF_INET, SOCK_STREAM, 0) or die; $own = inet_aton(q({address})); \
             $request = pack(q(a16 S n a4 x8), q(eth0:1), PF_INET, 0, $own); \
             ioctl(S, 0x8916, $request) or die qq(cannot take the address: $!); \
             bind(S, sockaddr_in(0, $own)) or die qq(cannot bind: $!); $| = 1; print qq(taken\\n); alarm 2; \
             connect(S, sockaddr_in({PORT}, inet_aton(q({})))) or die; print <S>' 2>&1 || echo nothing",
            outside.address
        )
    };
    let others = ["10.213.0.1", "192.0.2.77"];
    let mut commands: Vec<String> = others.iter().copied().map(reach_from).collect();
    commands.push(try_reach(&outside.address.to_string()).replacen("timeout 1", "timeout 20", 1));
    let record = lab.run(online(lab, &commands)).await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    for (index, address) in others.iter().enumerate() {
        let heard = record.output_of(index);
        let is_taken = heard.lines().any(|line| line == "taken");
        assert!(heard.ends_with("nothing\n") && is_taken, "as {address}: {heard}");
    }
    assert_eq!(record.output_of(others.len()), format!("{}\n", outside.host));
    eventually("its link goes with it", || links_of_sandboxes().is_empty());
}

/// What a machine's card sends goes to a tap; here nothing else of a machine is behind it. Root in a machine sends what it likes.
pub async fn a_card_reaches_the_outside_and_nothing_else(_: &Lab) {
    let Some(outside) = Outside::make() else { return };
    let uplink = Uplink::open().unwrap();
    let network = uplink.link(0).unwrap();
    let NetworkSpec::On { ref host_interface, host_address, address, .. } = network else {
        panic!("{network:?}")
    };
    let host_interface = host_interface.clone();
    let folder = tempfile::TempDir::new().unwrap();
    let description = folder.path().join("machine.json");
    let spec = MachineSpec { network, gate: None, scratch: folder.path().to_owned(), rootless: false };
    std::fs::write(&description, serde_json::to_vec(&spec).unwrap()).unwrap();

    let own = machine::ADDRESS;
    let pairs = [
        (own, outside.address),
        (own, outside.host),
        (own, host_address),
        (own, address),
        (own, machine::GATEWAY),
        (own, METADATA),
        (address, outside.address),
        (host_address, outside.address),
        (Ipv4Addr::new(192, 0, 2, 77), outside.address),
        (own, outside.address),
    ];
    let output = Command::new(env!("CARGO_BIN_EXE_sealci-sandbox-helper"))
        .arg(MACHINE_ARGUMENT)
        .arg(&description)
        .args(["/usr/bin/perl", "-e", include_str!("card.pl"), machine::TAP])
        .args([machine::GATEWAY, own].map(|address| address.to_string()))
        .args(pairs.iter().flat_map(|(from, to)| [from, to]).map(Ipv4Addr::to_string))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let heard = String::from_utf8(output.stdout).unwrap();
    let heard: Vec<_> = pairs.iter().zip(heard.lines()).collect();
    assert_eq!(heard.len(), pairs.len());
    for (index, ((from, to), heard)) in heard.iter().enumerate() {
        let answer = if index == 0 || index == pairs.len() - 1 { "an answer" } else { "nothing" };
        assert_eq!(*heard, answer, "from {from} to {to}");
    }
    // An answer to another's address would not have come here.
    assert_eq!(outside.echo_requests(), 2);
    eventually("its link goes with it", || !links_of_sandboxes().contains(&host_interface));
}

/// The host's ends of all agents' links.
pub fn links_of_sandboxes() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/net").unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("sealci")).collect()
}
