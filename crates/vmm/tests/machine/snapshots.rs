//! A machine is saved once, and gone on from as often as wanted: by a stock kernel, with its disks and ports.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::devices::{BLOCK, VSOCK, count_at, with_modules};
use super::lab::{Lab, Outcome, figure, run, vmm};

const PATIENCE: Duration = Duration::from_secs(150);
const MADE_OF: &str = "kernel and busybox";
const DISK_BYTES: u64 = 8 << 20;

/// What the guest does before it is saved, and afterwards. Its call is not answered in between.
const SCRIPT: &str = "\
    echo sectors=$(cat /sys/block/vda/size)\n\
    mount -t tmpfs tmpfs /tmp; echo kept >/tmp/kept; before=$(cut -d. -f1 /proc/uptime)\n\
    /bin/peer 9 </dev/null >/dev/null 2>&1 && echo answered\n\
    echo up=$(($(cut -d. -f1 /proc/uptime) - before)); cat /tmp/kept; echo vcpus=$(nproc)\n\
    echo disk=$(dd if=/dev/vda bs=512 skip=2048 count=1 2>/dev/null | cut -d. -f1)\n\
    echo of the guest >/dev/vdb && sync && echo written=1\n\
    head -c 100000 /dev/zero | /bin/peer 7\n\
    for cpu in $(seq 0 $(($(nproc) - 1))); do taskset $((1 << cpu)) sh -c 'sleep 0.1; echo ran' & done; wait\n\
    reboot -f\n";

/// A machine that was saved, and what it is given again.
struct Saved {
    folder: TempDir,
    snapshot: PathBuf,
}

impl Saved {
    fn new(lab: &Lab, peer: &[u8], vcpus: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let saved = Self { snapshot: folder.path().join("snapshot"), folder };
        let mut root = vec![0; DISK_BYTES as usize];
        root[2048 * 512..2048 * 512 + 4].copy_from_slice(b"4711");
        root[2048 * 512 + 4..2049 * 512].fill(b'.');
        fs::write(saved.folder.path().join("root"), root).unwrap();
        let initramfs =
            with_modules(lab, &[&[BLOCK][..], &VSOCK].concat(), SCRIPT).with("bin/peer", peer).file();
        let mut command = lab.command(&initramfs);
        command.args(["--command-line-extra", "quiet loglevel=1", "--vcpus", vcpus, "--memory-mib", "128"]);
        command.arg("--snapshot").arg(format!("9={}", saved.snapshot.display()));
        let outcome = run(saved.with_devices(command, "first"), PATIENCE).expect("it was not saved");
        assert!(outcome.status.success() && outcome.said.contains("was saved"), "{outcome:?}");
        assert_eq!(figure(&outcome.console, "sectors"), DISK_BYTES / 512);
        assert!(!outcome.console.contains("answered") && !outcome.console.contains("up="), "{outcome:?}");
        saved
    }

    /// A disk that is read, one that is written of this name, and ports.
    fn with_devices(&self, mut command: Command, name: &str) -> Command {
        let disk = self.disk(name);
        fs::File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
        command.args(["--serial", "-", "--made-of", MADE_OF]);
        command.arg("--disk").arg(format!("{}:ro", self.folder.path().join("root").display()));
        command.arg("--disk").arg(disk);
        let socket = self.folder.path().join(format!("{name}.socket"));
        count_at(&socket);
        command.arg("--vsock").arg(format!("7={}", socket.display()));
        command
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn restored(&self, name: &str) -> Outcome {
        let mut command = vmm();
        command.arg("--restore").arg(&self.snapshot);
        run(self.with_devices(command, name), PATIENCE).expect("the guest came to no end")
    }
}

fn assert_went_on(outcome: &Outcome, vcpus: u64) {
    let console = &outcome.console;
    assert!(outcome.status.success() && outcome.said.contains("has reset the machine"), "{outcome:?}");
    assert!(!console.contains("answered") && console.contains("kept\n"), "{outcome:?}");
    // Its clock has stood still meanwhile.
    assert!(figure(console, "up") < 60, "{outcome:?}");
    assert_eq!((figure(console, "vcpus"), figure(console, "disk")), (vcpus, 4711));
    assert_eq!((figure(console, "written"), figure(console, "count")), (1, 100_000));
    assert_eq!(console.matches("ran\n").count() as u64, vcpus, "{outcome:?}");
}

fn used(file: &Path) -> String {
    let bytes = fs::read(file).unwrap();
    String::from_utf8_lossy(&bytes[..13]).into_owned()
}

#[test]
fn a_machine_goes_on_as_often_as_wanted() {
    let Some(lab) = Lab::open() else { return };
    let Some(peer) = lab.peer() else { return };
    let saved = Saved::new(&lab, &peer, "1");
    let sum = |name: &str| fs::read(saved.snapshot.join(name)).unwrap();
    let before = (sum("state"), sum("memory"));
    // The second finds nothing of the first.
    for name in ["second", "third"] {
        assert_went_on(&saved.restored(name), 1);
        assert_eq!(used(&saved.disk(name)), "of the guest\n");
    }
    assert!(before == (sum("state"), sum("memory")), "a machine that goes on has changed what was saved");
    assert_eq!(used(&saved.disk("first")), "\0".repeat(13));
    refuses_what_is_another(&saved);
}

#[test]
fn all_virtual_cpus_go_on() {
    let Some(lab) = Lab::open() else { return };
    let Some(peer) = lab.peer() else { return };
    assert_went_on(&Saved::new(&lab, &peer, "2").restored("second"), 2);
}

fn refused(saved: &Saved, arguments: &[&str], why: &str) {
    let mut command = vmm();
    command.arg("--restore").arg(&saved.snapshot).args(arguments);
    let outcome = run(command, Duration::from_secs(60)).unwrap();
    assert_eq!(outcome.status.code(), Some(1), "{outcome:?}");
    assert!(outcome.said.contains(why) && outcome.console.is_empty(), "{why}: {outcome:?}");
}

fn refuses_what_is_another(saved: &Saved) {
    fn all<'a>(other: &[&'a str]) -> Vec<&'a str> {
        [&["--serial", "-", "--made-of", MADE_OF][..], other].concat()
    }
    refused(saved, &["--serial", "-"], "made of `kernel and busybox`");
    refused(saved, &all(&["--memory-mib", "256"]), "with 128 MiB of memory, and one with 256");
    refused(saved, &all(&["--vcpus", "2"]), "with 1 virtual CPUs, and one with 2");
    refused(saved, &["--made-of", MADE_OF], "with a serial line");
    refused(saved, &all(&[]), "with 5 devices, and this one has 2");
    let root = saved.folder.path().join("root");
    let (root, read_only) = (root.display().to_string(), format!("{}:ro", root.display()));
    let small = saved.disk("small");
    fs::write(&small, [0; 512]).unwrap();
    let small = small.to_str().unwrap();
    for (first, second, why) in [
        (&read_only[..], small, "another device 1"),
        (&read_only, &read_only, "another device 1"),
        (&root, &root, "another device 0"),
    ] {
        let disks = ["--disk", first, "--disk", second, "--vsock", "7=/nobody"];
        refused(saved, &all(&disks), why);
    }

    let memory = fs::File::options().write(true).open(saved.snapshot.join("memory")).unwrap();
    memory.set_len(127 << 20).unwrap();
    refused(saved, &all(&[]), "take the snapshot anew");
    memory.set_len(128 << 20).unwrap();
    let state = saved.snapshot.join("state");
    let whole = fs::read(&state).unwrap();
    for (at, why) in [(0, "no snapshot's"), (8, "format"), (12, "truncated"), (16, "sum"), (2000, "sum")] {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&state, damaged).unwrap();
        refused(saved, &all(&[]), why);
    }
    fs::remove_file(&state).unwrap();
    refused(saved, &all(&[]), "No such file or directory");
    assert_eq!(fs::read_dir(&saved.snapshot).unwrap().count(), 1, "something is left");
}
