//! What holds of actions in machines alone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sealci_agent::executor::microvm::{MicrovmExecutor, MicrovmOptions};
use sealci_core::outcome::Outcome;

use crate::images::TestImages;
use crate::lab::Lab;

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
    let executor = MicrovmExecutor::new(folder.path(), images, None, &options).unwrap();
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
