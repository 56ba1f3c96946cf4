//! A machine ends with its owner, whatever its guest does.

use std::process::Stdio;

use super::initramfs::Initramfs;
use super::lab::{Lab, run};

#[test]
fn a_machine_ends_with_its_owner() {
    let Some(lab) = Lab::open() else { return };
    // All of its virtual CPUs are busy, and none ever leaves the guest by itself.
    let script = "for cpu in 1 2; do (while :; do :; done) & done; echo ready; sleep 1000\n";
    let initramfs = Initramfs::running(&lab.busybox, script).file();
    let guest = lab.start(&initramfs, ["--vcpus", "2", "--end-with-stdin"]);
    guest.wait_for("ready");
    let (status, said) = guest.close_input();
    assert!(status.success() && said.contains("the guest was stopped"), "{status}: {said}");
}

#[test]
fn an_owner_that_cannot_be_watched_is_refused() {
    let Some(lab) = Lab::open() else { return };
    let initramfs = Initramfs::empty().file();
    let mut command = lab.command(&initramfs);
    command.arg("--end-with-stdin").stdin(Stdio::null());
    let outcome = run(command, std::time::Duration::from_secs(60)).unwrap();
    assert_eq!(outcome.status.code(), Some(1));
    assert!(outcome.said.contains("a pipe or a socket is needed"), "{outcome:?}");
}
