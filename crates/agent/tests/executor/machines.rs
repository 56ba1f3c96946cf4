//! What holds of actions in machines alone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sealci_agent::executor::microvm::{MicrovmExecutor, MicrovmOptions};
use sealci_core::outcome::{Limit, Outcome};
use sealci_core::plan::Resources;

use crate::images::TestImages;
use crate::lab::{Lab, eventually, until_output};

/// A machine takes seconds where its processor is emulated.
const PATIENCE: Duration = Duration::from_secs(120);

pub async fn a_machine_comes_up(lab: &Lab) {
    let options = MicrovmOptions {
        kernel: std::env::var_os("SEALCI_TEST_KERNEL").map(PathBuf::from),
        modules: std::env::var_os("SEALCI_TEST_MODULES").map(PathBuf::from),
        ..MicrovmOptions::default()
    };
    let folder = tempfile::TempDir::new().unwrap();
    let images = Arc::new(TestImages::empty());
    let executor = MicrovmExecutor::new(folder.path(), images, None, None, &options).unwrap();
    executor.probe(PATIENCE).unwrap();

    let record = lab
        .run_commands([
            "uname -r",
            "test \"$(cat /proc/1/comm)\" = init || cat /proc/1/comm",
            "grep -q sealci /proc/sys/kernel/hostname",
            "test $(date +%Y) -ge 2026",
            "head -c 16 /dev/urandom | od -An -tx1",
            "touch /written && test -w /etc && echo $SEALCI_WORKSPACE",
        ])
        .await;
    assert_eq!(record.outcome(), &Outcome::Succeeded, "{}", record.text());
    assert_eq!(record.output_of(5), "/workspace\n");
}

pub async fn a_machine_is_cancelled_and_timed_out(lab: &Lab) {
    let request = lab.request(["trap 'echo cleaning up; exit 3' TERM; echo up; while :; do sleep 0.1; done"]);
    let mut execution = lab.start(request).await;
    let mut record = until_output(&mut execution, "up\n").await;
    execution.handle().cancel(PATIENCE);
    while let Some(event) = execution.next().await {
        record.take(event);
    }
    assert_eq!(record.outcome(), &Outcome::Cancelled, "{}", record.text());
    // Between them the shell may say that its `sleep` was terminated.
    let text = record.text();
    assert!(text.starts_with("up\n") && text.ends_with("cleaning up\n"), "{text}");
    assert_eq!(monitors(lab), Vec::<String>::new());

    let mut request = lab.request(["trap '' TERM; echo up; while :; do sleep 1000; done"]);
    (request.timeout, request.grace) = (Duration::from_secs(3), Duration::from_secs(1));
    let record = lab.run(request).await;
    assert_eq!((record.outcome(), record.text().as_str()), (&Outcome::TimedOut, "up\n"));
    assert_eq!(monitors(lab), Vec::<String>::new());
}

pub async fn what_a_machine_has_is_bounded(lab: &Lab) {
    // Its buffer is more than there is, which is found out only as it is filled.
    let mut request = lab.request([
        "echo 1 >/proc/sys/vm/overcommit_memory",
        "dd if=/dev/zero of=/dev/null bs=400M count=1 2>/dev/null",
    ]);
    request.resources = Resources { cpu_millis: 1000, memory_bytes: 192 << 20 };
    let record = lab.run(request).await;
    let killed = Outcome::Failed { exit_code: 137, limit: Some(Limit::Memory) };
    assert_eq!(record.outcome(), &killed, "{}", record.text());

    let record = lab.run_commands(["head -c 1M /dev/zero >/small", "head -c 400M /dev/zero >/big"]).await;
    assert!(matches!(record.outcome(), Outcome::Failed { exit_code: 1, .. }), "{record:?}");
    assert!(record.text().contains("No space left"), "{}", record.text());
}

pub async fn a_dropped_machine_is_gone(lab: &Lab) {
    let mut execution = lab.start(lab.request(["echo up; sleep 1000"])).await;
    until_output(&mut execution, "up\n").await;
    assert!(!monitors(lab).is_empty());
    drop(execution);
    eventually("the monitor is gone", || monitors(lab).is_empty());
}

/// The command lines of the lab's monitors that live.
pub fn monitors(lab: &Lab) -> Vec<String> {
    let program = lab.folder.path().join("bin/sealci-vmm-");
    let words = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).ok();
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(words);
    let lines = lines.map(|line| String::from_utf8_lossy(&line).into_owned());
    lines.filter(|line| line.starts_with(&program.display().to_string())).collect()
}
