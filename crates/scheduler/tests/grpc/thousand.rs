//! Kills the scheduler of a thousand agents, and looks how long it takes until all are back, and what that costs it.

use std::net::SocketAddr;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::peers::{Agent, Controller, SECRET, Scheduler, config, identity};

const AGENTS: u64 = 1000;
const CHILD: &str = "SEALCI_TEST_SCHEDULER_OF_A_THOUSAND";

/// As the invariants want it: of every service, whatever clients do.
const MOST_MEMORY_KIB: u64 = 256 << 10;

/// No test: the process that the next one starts and kills.
#[tokio::test(flavor = "multi_thread")]
async fn the_scheduler_that_is_killed() {
    if let Ok(address) = std::env::var(CHILD) {
        let _scheduler = Scheduler::start_on(config(), address.parse().unwrap()).await;
        std::future::pending::<()>().await;
    }
}

struct Killed(Child);

impl Killed {
    fn start(address: SocketAddr) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["thousand::the_scheduler_that_is_killed", "--exact"]);
        Self(command.env(CHILD, address.to_string()).spawn().unwrap())
    }

    fn memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Killed {
    fn kill(&mut self) {
        // It may have been killed before.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits as agents do: twice as long each time, up to 10 s, shortened by chance.
struct Pause(Duration);

impl Pause {
    const SHORTEST: Duration = Duration::from_millis(100);

    async fn wait(&mut self) {
        tokio::time::sleep(self.0.mul_f64(rand::random_range(0.5..1.0))).await;
        self.0 = (self.0 * 2).min(Duration::from_secs(10));
    }
}

async fn be_an_agent(address: SocketAddr, n: u64, there: Arc<watch::Sender<u64>>) {
    let mut pause = Pause(Pause::SHORTEST);
    loop {
        if let Ok(mut agent) = Agent::try_connect(address, identity(n, n)).await {
            agent.held(None, &[]).await;
            there.send_modify(|count| *count += 1);
            agent.ended().await;
            there.send_modify(|count| *count -= 1);
            pause = Pause(Pause::SHORTEST);
        }
        pause.wait().await;
    }
}

async fn be_the_controller(address: SocketAddr) {
    let agents: Vec<_> = (1..=AGENTS).map(|n| (n, Some(n))).collect();
    let mut pause = Pause(Pause::SHORTEST);
    loop {
        if let Ok(mut controller) = Controller::open(address, SECRET, Controller::hello(1, 1)).await {
            controller.directory(true, &agents).await;
            controller.ended().await;
            pause = Pause(Pause::SHORTEST);
        }
        pause.wait().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_agents_are_back_within_a_minute() {
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (there, mut count) = watch::channel(0);
    let there = Arc::new(there);
    let mut peers = JoinSet::new();
    let mut scheduler = Killed::start(address);
    peers.spawn(be_the_controller(address));
    (1..=AGENTS).for_each(|n| drop(peers.spawn(be_an_agent(address, n, there.clone()))));
    for what in ["the first start", "a kill"] {
        let began = Instant::now();
        let all = count.wait_for(|count| *count == AGENTS);
        let all_there = tokio::time::timeout(Duration::from_secs(60), all).await.map(drop);
        assert!(all_there.is_ok(), "60 s after {what} only {} agents were there", *there.borrow());
        let (took, memory_kib) = (began.elapsed(), scheduler.memory_kib());
        println!(
            "{AGENTS} agents were there {took:?} after {what}; the scheduler took {memory_kib} KiB at most"
        );
        assert!(memory_kib < MOST_MEMORY_KIB);
        if what == "the first start" {
            scheduler.kill();
            count.wait_for(|count| *count < AGENTS).await.unwrap();
            scheduler = Killed::start(address);
        }
    }
}
