//! Measures the executors alone, with nothing of the engine around them: the floors that `cargo xtask bench` compares
//! the whole engine with.
//!
//! `cargo bench -p sealci-agent --bench floors -- latency process|sandbox|network` prints the medians from the start to the
//! first command and to the end; `… -- rate sandbox|container COUNT AT_ONCE` how many environments a second are made, run and
//! taken down. Each prints one JSON object, or `{"skipped": …}` where this machine does not allow it.
//!
//! For measuring beside others, in turns, on one image: `… -- turns container|container-network` prints the image's layers
//! and then, for each line it reads, what one action took; `… -- docker` starts a daemon that has the image, prints its
//! socket, and ends it at the end of its input.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::BufRead;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sealci_agent::executor::ExecutionEvent;
use sealci_core::plan::Network;
use serde_json::json;

#[path = "../tests/executor/daemons.rs"]
#[allow(dead_code)]
mod daemons;
#[path = "../tests/executor/images.rs"]
#[allow(dead_code)]
mod images;
#[path = "../tests/executor/lab.rs"]
#[allow(dead_code)]
mod lab;

use lab::Lab;

const RUNS: usize = 20;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["latency", "process"] => latency(Lab::process_in_cgroup().or_else(Lab::process), Network::Off).await,
        ["latency", "sandbox"] => latency(Lab::sandbox(), Network::Off).await,
        ["latency", "network"] => latency(Lab::networked(), Network::On).await,
        ["rate", which, count, at_once] => {
            let lab = if *which == "container" { Lab::container() } else { Lab::sandbox() };
            rate(lab, count.parse().unwrap(), at_once.parse().unwrap()).await;
        }
        ["turns", "container"] => turns(Lab::container(), Network::Off).await,
        ["turns", "container-network"] => turns(Lab::container_networked(), Network::On).await,
        ["docker"] => docker(),
        // `cargo bench` without words runs every benchmark of the package.
        _ => eprintln!("say `latency …`, `rate …`, `turns …` or `docker`, as the source tells"),
    }
}

fn skipped() {
    println!("{{\"skipped\": \"this user may not make control groups or namespaces\"}}");
}

/// Start → first command, start → end: medians in milliseconds.
async fn latency(lab: Option<Lab>, network: Network) {
    let Some(lab) = lab else { return skipped() };
    let mut times: [Vec<Duration>; 2] = Default::default();
    for run in 0..=RUNS {
        let taken = one(&lab, network.clone()).await;
        // The first is for warming up.
        if run > 0 {
            times[0].push(taken[0]);
            times[1].push(taken[1]);
        }
    }
    let [started, finished] = times.map(|mut times| {
        times.sort();
        millis(times[times.len() / 2])
    });
    println!("{}", json!({"started_ms": started, "finished_ms": finished}));
}

/// One action: its start → first command, and → end with nothing left.
async fn one(lab: &Lab, network: Network) -> [Duration; 2] {
    let mut request = lab.request(["true"]);
    request.network = network;
    let mut taken = [Duration::ZERO; 2];
    let started_at = Instant::now();
    let mut execution = lab.start(request).await;
    while let Some(event) = execution.next().await {
        match event {
            ExecutionEvent::CommandStarted { .. } => taken[0] = started_at.elapsed(),
            ExecutionEvent::Finished { outcome, .. } => {
                assert_eq!(outcome.kind(), "succeeded", "{outcome}");
                taken[1] = started_at.elapsed();
            }
            _ => {}
        }
    }
    taken
}

/// An action whenever a line comes.
async fn turns(lab: Option<Lab>, network: Network) {
    let Some(lab) = lab else { return skipped() };
    println!("{}", json!({"layers": lab.images.layers(images::TestImages::TOOLS)}));
    for _turn in std::io::stdin().lock().lines().map_while(Result::ok) {
        let [started, finished] = one(&lab, network.clone()).await.map(millis);
        println!("{}", json!({"started_ms": started, "finished_ms": finished}));
    }
}

fn docker() {
    let installed = std::process::Command::new("dockerd").arg("--version").output().is_ok();
    let daemon = installed.then(daemons::TestDaemon::start).flatten();
    let Some(daemon) = daemon else { return skipped() };
    println!("{}", json!({"socket": daemon.socket(), "image": images::TestImages::TOOLS}));
    std::io::stdin().lock().lines().for_each(drop);
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// So many actions, so many of them at once; each must succeed.
async fn rate(lab: Option<Lab>, count: usize, at_once: usize) {
    let Some(lab) = lab else { return skipped() };
    let begun = AtomicUsize::new(0);
    let started_at = Instant::now();
    let lanes = (0..at_once).map(|_| async {
        while begun.fetch_add(1, Ordering::Relaxed) < count {
            let mut execution = lab.start(lab.request(["true"])).await;
            while let Some(event) = execution.next().await {
                if let ExecutionEvent::Finished { outcome, .. } = event {
                    assert_eq!(outcome.kind(), "succeeded", "{outcome}");
                }
            }
        }
    });
    futures_util::future::join_all(lanes).await;
    println!("{}", json!({"per_second": count as f64 / started_at.elapsed().as_secs_f64()}));
}
