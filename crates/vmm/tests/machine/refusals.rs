//! What cannot be a machine is refused, with what to do about it; most of it is found before KVM is asked for anything.

use std::io::Write;
use std::time::Duration;

use tempfile::NamedTempFile;

use super::lab::{self, Lab, Outcome, vmm};

fn refused(arguments: &[&str], code: i32) -> String {
    let mut command = vmm();
    command.args(arguments);
    let Outcome { status, console, said } = lab::run(command, Duration::from_secs(60)).unwrap();
    assert_eq!((status.code(), console.as_str()), (Some(code), ""), "{said}");
    said
}

#[test]
fn a_wrong_command_line_is_explained() {
    assert!(refused(&[], 2).contains("--kernel is missing"));
    assert!(refused(&["--cpus", "1"], 2).contains("no option `--cpus`"));
}

#[test]
fn what_is_no_kernel_is_refused() {
    assert!(refused(&["--kernel", "/does/not/exist"], 1).contains("No such file or directory"));
    assert!(refused(&["--kernel", env!("CARGO_MANIFEST_DIR")], 1).contains("give the path of a bzImage"));
    let mut text = NamedTempFile::new().unwrap();
    text.write_all(b"hello\n").unwrap();
    assert!(refused(&["--kernel", text.path().to_str().unwrap()], 1).contains("is no Linux kernel"));
    // This very program is for this machine, but no kernel: it may lie anywhere.
    let own = std::env::current_exe().unwrap();
    let error = refused(&["--kernel", own.to_str().unwrap()], 1);
    assert!(error.contains("is damaged"), "{error}");
}

#[test]
fn a_real_kernel_that_is_cut_or_has_too_little_memory_is_refused() {
    let Some(lab) = Lab::open() else { return };
    let whole = std::fs::read(&lab.kernel).unwrap();
    let mut cut = NamedTempFile::new().unwrap();
    cut.write_all(&whole[..whole.len() / 2]).unwrap();
    let error = refused(&["--kernel", cut.path().to_str().unwrap()], 1);
    assert!(error.contains("is truncated") && error.contains("install its package anew"), "{error}");

    let kernel = lab.kernel.to_str().unwrap();
    let error = refused(&["--kernel", kernel, "--memory-mib", "64"], 1);
    assert!(error.contains("MiB of memory, and the guest has 64 MiB"), "{error}");
    assert!(refused(&["--kernel", kernel, "--memory-mib", "2"], 1).contains("at least 64 MiB"));
    assert!(refused(&["--kernel", kernel, "--vcpus", "65"], 1).contains("1 to 64 virtual CPUs"));

    let mut large = NamedTempFile::new().unwrap();
    large.as_file_mut().set_len(200 << 20).unwrap();
    let error = refused(&["--kernel", kernel, "--initramfs", large.path().to_str().unwrap()], 1);
    assert!(error.contains("give the guest more memory"), "{error}");
}
