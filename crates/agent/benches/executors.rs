//! Measures what an executor costs: from its start to the first command and to its end, and log through it.
//!
//! `cargo bench -p sealci-agent --bench executors`. Prints medians; needs root for `sandbox` and control groups.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::executor::process::ProcessExecutor;
use sealci_agent::executor::{ExecutionEvent, Executor};
use sealci_core::plan::Network;

#[path = "../tests/executor/images.rs"]
#[allow(dead_code)]
mod images;
#[path = "../tests/executor/lab.rs"]
#[allow(dead_code)]
mod lab;

use lab::Lab;

const RUNS: usize = 20;
const LOG_BYTES: u64 = 1 << 30;

#[tokio::main]
async fn main() {
    println!("executor             start   command    finish   (ms, medians of {RUNS})     log");
    let folder = tempfile::TempDir::new().unwrap();
    let process = ProcessExecutor::new(folder.path(), None).unwrap();
    measure("process", &process, folder.path(), Network::Off).await;
    if let Some(lab) = Lab::process_in_cgroup() {
        measure("process in cgroup", lab.executor.as_ref(), lab.folder.path(), Network::Off).await;
    }
    if let Some(lab) = Lab::sandbox() {
        measure("sandbox", lab.executor.as_ref(), lab.folder.path(), Network::Off).await;
        let started_at = Instant::now();
        let mut running = Vec::new();
        for _ in 0..40 {
            let request = lab.request(["true"]);
            let executor = &lab.executor;
            running.push(async move {
                let mut execution = executor.prepare(request).await.unwrap().begin();
                while execution.next().await.is_some() {}
            });
        }
        futures_util::future::join_all(running).await;
        println!("sandbox, 40 at once: {:.0} ms", millis(started_at.elapsed()));
    }
    if let Some(lab) = Lab::container() {
        measure("container", lab.executor.as_ref(), lab.folder.path(), Network::Off).await;
    }
    if let Some(lab) = Lab::container_copied() {
        measure("container, copied", lab.executor.as_ref(), lab.folder.path(), Network::Off).await;
    }
    if let Some(lab) = Lab::networked() {
        measure("sandbox, network on", lab.executor.as_ref(), lab.folder.path(), Network::On).await;
    }
    fake(folder.path()).await;
}

async fn measure(name: &str, executor: &dyn Executor, folder: &std::path::Path, network: Network) {
    let mut times: [Vec<Duration>; 3] = Default::default();
    for _ in 0..=RUNS {
        let mut request = lab::request_in(folder, ["true"]);
        request.network = network.clone();
        let started_at = Instant::now();
        let mut execution = executor.prepare(request).await.unwrap().begin();
        times[0].push(started_at.elapsed());
        while let Some(event) = execution.next().await {
            match event {
                ExecutionEvent::CommandStarted { .. } => times[1].push(started_at.elapsed()),
                ExecutionEvent::Finished { outcome, .. } => {
                    assert_eq!(outcome.kind(), "succeeded", "{outcome}");
                    times[2].push(started_at.elapsed());
                }
                _ => {}
            }
        }
    }
    let medians = times.map(|mut times| {
        times.remove(0);
        times.sort();
        millis(times[times.len() / 2])
    });
    let request = lab::request_in(folder, [format!("head -c {LOG_BYTES} /dev/zero")]);
    let started_at = Instant::now();
    let mut execution = executor.prepare(request).await.unwrap().begin();
    let mut bytes = 0;
    while let Some(event) = execution.next().await {
        if let ExecutionEvent::Output(output) = event {
            bytes += output.len() as u64;
        }
    }
    assert_eq!(bytes, LOG_BYTES);
    let rate = LOG_BYTES as f64 / started_at.elapsed().as_secs_f64() / 1e6;
    let [start, command, finish] = medians;
    println!("{name:19} {start:6.2} {command:9.2} {finish:9.2} {:>30.0} MB/s", rate);
}

async fn fake(folder: &std::path::Path) {
    const ACTIONS: u32 = 20_000;
    let executor = FakeExecutor::new();
    let mut request = lab::request_in(folder, ["print hello"]);
    let started_at = Instant::now();
    for number in 1..=ACTIONS {
        request.attempt.number = number;
        let mut execution = executor.prepare(request.clone()).await.unwrap().begin();
        while execution.next().await.is_some() {}
    }
    println!(
        "fake: {:.0} actions/s, one after the other",
        f64::from(ACTIONS) / started_at.elapsed().as_secs_f64()
    );
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
