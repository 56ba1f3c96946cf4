//! Measures the executors alone, with nothing of the engine around them: the floors that `cargo xtask bench` compares
//! the whole engine with.
//!
//! `cargo bench -p sealci-agent --bench floors -- latency process|sandbox|network` prints the medians from the start to the
//! first command and to the end; `… -- rate COUNT AT_ONCE` how many sandboxes a second are made, run and taken down.
//! Both print one JSON object, or `{"skipped": …}` where this machine does not allow it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use sealci_agent::executor::ExecutionEvent;
use sealci_core::plan::Network;

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
        ["rate", count, at_once] => {
            rate(Lab::sandbox(), count.parse().unwrap(), at_once.parse().unwrap()).await;
        }
        // `cargo bench` without words runs every benchmark of the package.
        _ => eprintln!("say `latency process|sandbox|network` or `rate COUNT AT_ONCE`"),
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
        let mut request = lab.request(["true"]);
        request.network = network;
        let started_at = Instant::now();
        let mut execution = lab.start(request).await;
        while let Some(event) = execution.next().await {
            let place = match event {
                ExecutionEvent::CommandStarted { .. } => 0,
                ExecutionEvent::Finished { outcome, .. } => {
                    assert_eq!(outcome.kind(), "succeeded", "{outcome}");
                    1
                }
                _ => continue,
            };
            // The first is for warming up.
            if run > 0 {
                times[place].push(started_at.elapsed());
            }
        }
    }
    let [started, finished] = times.map(|mut times| {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e3
    });
    println!("{{\"started_ms\": {started:.3}, \"finished_ms\": {finished:.3}}}");
}

/// So many sandboxes, so many of them at once.
async fn rate(lab: Option<Lab>, count: usize, at_once: usize) {
    let Some(lab) = lab else { return skipped() };
    let begun = AtomicUsize::new(0);
    let started_at = Instant::now();
    let lanes = (0..at_once).map(|_| async {
        while begun.fetch_add(1, Ordering::Relaxed) < count {
            let mut execution = lab.start(lab.request(["true"])).await;
            while execution.next().await.is_some() {}
        }
    });
    futures_util::future::join_all(lanes).await;
    println!("{{\"per_second\": {:.2}}}", count as f64 / started_at.elapsed().as_secs_f64());
}
