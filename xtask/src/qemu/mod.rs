//! Runs tests on stock Debian, with control groups of version 2 and nothing else, in QEMU: the core of the executors', and
//! those of the virtual machine monitor, which find a `/dev/kvm` there that works, whatever the host's does.
//!
//! ```text
//! target/qemu/
//!   base-<key>/            kernel, initial RAM disk and root file system of Debian's packages; made once, never written
//!   payload.tar            the test program, what it uses and the guest's script; this run's, read by the guest as a disk
//!   console.log, qemu.log  what the last run's kernel and QEMU said
//!   kvm-is-useless         in which start of the host's `/dev/kvm` was found not to work
//! ```
//!
//! Nothing of a run stays but these: the guest writes into a file that QEMU has unlinked, and QEMU ends with this process.

mod base;
mod guest;
mod payload;
mod transcript;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use base::Base;
use guest::{Guest, Hardware};
use payload::Extent;
use transcript::{Said, Transcript};

use crate::report::{Counts, Report};
use crate::{machine, test, workspace};

/// The tests of one user.
#[derive(Debug)]
struct Part {
    name: &'static str,
    uid: u32,
    /// Of the test program's names those that contain one of these.
    executors: &'static [&'static str],
    /// And none of these.
    without: &'static [&'static str],
    /// What a test must not find missing in the guest.
    required: &'static str,
}

/// Left out of the core: what a shell, the init and the reader of an image's configuration do by themselves, on any kernel;
/// what judges times, which emulation stretches; and what the cases that stay reach, too.
const NOT_CORE: &[&str] = &[
    "::a_broken_command",
    "::a_cancel_between",
    "::a_failure_stops",
    "::a_hundred_megabytes",
    "::a_missing_shell",
    "::a_put_may_be_given_up",
    "::a_reader_that_stops",
    "::a_thousand_commands",
    "::a_timeout_counts",
    "::an_attempt_runs_once",
    "::an_entrypoint",
    "::an_image_says",
    "::an_image_that_is_not",
    "::bash_runs",
    "::both_outputs",
    "::bytes_arrive",
    "::everything_has_its_time",
    "::exit_codes",
    "::files_go_in",
    "::ignoring_term",
    "::meddling",
    "::odd_commands",
    "::output_belongs",
    "::programs_beside_are_talked_with",
    "::resource_use",
    "::the_environment",
    "::what_cannot_be_read",
    "::what_forks_while",
    "::who_takes_slowly",
    // A container is sealed by the sandbox's code.
    "container_sealed::a_fresh_machine",
    "container_sealed::namespaces",
    "container_sealed::nothing_of_the_host",
    "container_sealed::system_calls",
    "container_sealed::the_init",
    "container_sealed::the_network",
    "container_sealed::the_workspace",
    "container_sealed::there_are_no_privileges",
];

/// The core of the suite: what depends on the kernel and on its control groups, by executor, without [`NOT_CORE`].
const PARTS: [Part; 3] = [
    Part {
        name: "root",
        uid: 0,
        executors: &["container::", "networked::", "process_in_cgroup::", "sandbox::", "sealed::"],
        // The other parts'.
        without: &["rootless"],
        required: "root,namespaces",
    },
    Part {
        name: "user",
        uid: 64_999,
        executors: &[
            "rootless::",
            "rootless_sealed::",
            "rootless_container::",
            "rootless_container_sealed::",
        ],
        without: &[],
        required: "namespaces,rootless",
    },
    // In a process of its own, as an agent is: what others have started would keep its group from being divided.
    Part {
        name: "limited",
        uid: 64_999,
        executors: &["rootless_limited::"],
        without: &[],
        required: "namespaces,rootless,delegation",
    },
];

/// How long a guest may take.
#[derive(Debug, Clone, Copy)]
struct Patience {
    /// Without a word.
    silence: Duration,
    /// For all of it.
    whole: Duration,
}

/// A single test may take a minute, and emulation on a busy machine makes it two.
const USUAL: Patience = Patience { silence: Duration::from_secs(240), whole: Duration::from_secs(20 * 60) };
/// An image of Debian becomes a disk, emulated, in minutes.
const LONG: Patience = Patience { silence: Duration::from_secs(900), whole: Duration::from_secs(90 * 60) };

/// What runs in one guest.
pub struct Suite {
    /// The step in the report.
    name: &'static str,
    parts: &'static [&'static str],
    hardware: Hardware,
    patience: Patience,
    pack: fn(&Path, &Base) -> Result<PathBuf>,
}

/// The core of the executors' tests.
pub const EXECUTORS: Suite = Suite {
    name: "qemu",
    parts: &[PARTS[0].name, PARTS[1].name, PARTS[2].name],
    // Emulated, what is left out costs much, and no test is about it.
    hardware: Hardware { emulated: "max,la57=off,smap=off,smep=off", processors: 4, clock: &[] },
    patience: USUAL,
    pack: |folder, _| payload::executors(folder, &PARTS),
};

/// The core of the machines' tests. QEMU emulates AMD's virtualization, not Intel's, and delivers an injected interrupt twice at times,
/// which `once.rs` prevents. The guest's time is the count of its instructions, so that a busy host makes no patience run out.
pub const MACHINES: Suite = Suite {
    name: "vm",
    parts: &["machine", "whole", "microvm"],
    hardware: Hardware { emulated: "EPYC,+svm", processors: 1, clock: &["-icount", "shift=1"] },
    patience: USUAL,
    pack: |folder, base| payload::machines(folder, base, Extent::Core),
};

/// All of them.
pub const ALL_MACHINES: Suite = Suite {
    parts: &["machine", "whole", "microvm", "system"],
    patience: LONG,
    pack: |folder, base| payload::machines(folder, base, Extent::All),
    ..MACHINES
};

/// Machines measured beside QEMU's.
pub const MEASURED_MACHINES: Suite = Suite {
    name: "machines",
    parts: &["measured"],
    patience: LONG,
    pack: payload::measured_machines,
    ..MACHINES
};

/// The commands `qemu` and `vm-test`.
pub fn command(suite: &Suite) -> Result<bool> {
    let mut report = Report::default();
    report.step("machine", || {
        test::prepare_machine();
        Ok(())
    });
    match machine::lacks(machine::Capability::Qemu) {
        Some(why) => report.missing("qemu", &why, true),
        None => step(&mut report, suite),
    }
    print!("{}", report.summary());
    Ok(report.passed())
}

/// Runs the tests in a guest, and adds them to the report.
pub fn step(report: &mut Report, suite: &Suite) {
    let (mut counts, mut skipped) = (Counts::default(), Vec::new());
    report.step(suite.name, || run(suite, &mut counts, &mut skipped, &mut |_| {}));
    report.counts.add(&counts);
    for (name, why) in skipped {
        report.missing(&format!("test {name}"), &why, false);
        report.counts.skipped += 1;
    }
}

/// `heard` gets each line that is for people, as it comes.
pub fn run(
    suite: &Suite,
    counts: &mut Counts,
    skipped: &mut Vec<(String, String)>,
    heard: &mut dyn FnMut(&str),
) -> Result<()> {
    let folder = Folder::enter()?;
    let base = timed("Debian's root file system", || Base::obtain(&folder.path))?;
    let payload = timed("the tests for it", || (suite.pack)(&folder.path, &base))?;
    let mut transcript = Transcript::new(suite.parts.iter().copied());
    let ended = timed("the guest", || {
        let mut guest = Guest::boot(&folder.path, &base, &payload, &suite.hardware)?;
        listen(&mut guest, suite.patience, &mut transcript, counts, heard)
            .and_then(|()| transcript.verdict())
            .map_err(|error| guest.with_last_words(&error))
    });
    let _ = fs::remove_file(&payload);
    skipped.extend(transcript.skipped().map(|(name, why)| (name.to_owned(), why.to_owned())));
    ended
}

/// Takes what the guest says to its end.
fn listen(
    guest: &mut Guest,
    Patience { silence, whole }: Patience,
    transcript: &mut Transcript,
    counts: &mut Counts,
    heard: &mut dyn FnMut(&str),
) -> Result<()> {
    let until = Instant::now() + whole;
    loop {
        let patience = silence.min(until.saturating_duration_since(Instant::now()));
        match guest.next_line(patience)? {
            Some(line) => match transcript.take(&line) {
                Said::ForPeople(text) => {
                    heard(&text);
                    counts.add_line(&text);
                    println!("{text}");
                }
                Said::ForUs => {}
            },
            None => return Ok(()),
        }
        if Instant::now() >= until {
            bail!("the guest was still running after {whole:?}, and was ended");
        }
    }
}

fn timed<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    let value = run()?;
    println!("{what}: {:.1} s", begun.elapsed().as_secs_f64());
    Ok(value)
}

/// Where all of it lies, for one run at a time.
struct Folder {
    path: PathBuf,
    /// Closing it gives the lock back.
    _lock: File,
}

impl Folder {
    fn enter() -> Result<Self> {
        let path = workspace::target_folder()?.join("qemu");
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let lock = File::create(path.join("lock"))?;
        lock.lock().context("cannot lock the folder of the guests")?;
        Ok(Self { path, _lock: lock })
    }
}
