//! Knows, from files outside of SealCI, what each action printed and how often it ran.
//!
//! Actions run by the executor `process`, each a script in the oracle's folder: it notes its begin, copies what it prints into
//! a file, and notes its end. Those that wait are held at a gate, a pipe that the test opens.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sealci_tests::{Installation, Repository, action, both, eventually, host::processes_with};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// What a script waits by until the gate is open; `$O` is the oracle's folder.
pub const WAIT: &str = "while ! test -e $O/open; do cat $O/gate >/dev/null; done";

/// The actions of one pipeline and what is known of them.
pub struct Oracle {
    folder: PathBuf,
    actions: BTreeMap<String, String>,
}

impl Oracle {
    pub fn new(folder: PathBuf) -> Self {
        fs::create_dir_all(&folder).expect("a folder can be made");
        let made = Command::new("mkfifo").arg(folder.join("gate")).status().expect("mkfifo can be run");
        assert!(made.success());
        Self { folder, actions: BTreeMap::new() }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Adds an action whose commands are this script; `$n` in it is the attempt's number.
    pub fn add(&mut self, name: &str, script: &str) {
        self.add_with(name, script, "");
    }

    /// With further keys of the manifest.
    pub fn add_with(&mut self, name: &str, script: &str, keys: &str) {
        let o = self.folder.display();
        // A file of its own keeps the shell from reading ahead of what the attempt has come to.
        let text = format!(
            "O={o}\nn=${{SEALCI_ATTEMPT##*.}}\necho begin $n >> $O/{name}.ran\n\
             {{ {script}\n}} 2>&1 | tee $O/{name}.$n.out\necho end $n >> $O/{name}.ran\n"
        );
        fs::write(self.folder.join(format!("{name}.sh")), text).expect("a script can be written");
        self.actions.insert(name.to_owned(), keys.to_owned());
    }

    pub fn manifest(&self) -> String {
        let mut text = "name: faults\nactions:\n".to_owned();
        for (name, keys) in &self.actions {
            let needs = if keys.contains("needs:") { "" } else { "    needs: []\n" };
            text += &format!(
                "  {name}:\n{needs}    configuration: {{executor: process, resources: {{cpu: 0.1, memory: 16MiB}}}}\n    \
                 env: {{{}}}\n{keys}    commands: [\"exec sh {}/{name}.sh\"]\n",
                self.mark().replace('=', ": "),
                self.folder.display()
            );
        }
        text
    }

    /// Makes a pipeline of the actions; its number.
    pub fn submit(&self, installation: &Installation) -> String {
        let number = fs::read_dir(&self.folder).map_or(0, Iterator::count);
        let place = installation.scratch(&format!("repository-{}-{number}", self.name()));
        let repository = Repository::with_manifest(place, &self.manifest());
        // Services that are not on loopback read it by its remote.
        repository.git(&["config", "remote.origin.url", &repository.url()]);
        installation.submit(&repository)
    }

    fn name(&self) -> String {
        self.folder.file_name().expect("it has a name").display().to_string()
    }

    /// What all processes of the actions have in their environment.
    pub fn mark(&self) -> String {
        let whose =
            self.folder.parent().and_then(Path::file_name).expect("it is in a test's folder").display();
        format!("E2E_MARK={whose}-{}", self.name())
    }

    /// What an action noted, in its order: `begin 1`, `end 1`.
    pub fn ran(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.folder.join(format!("{name}.ran"))).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until an attempt of the action has begun.
    pub fn wait_begun(&self, name: &str, number: u32) {
        let begin = format!("begin {number}");
        eventually(&format!("attempt {number} of {name}"), || self.ran(name).contains(&begin).then_some(()));
    }

    /// Waits until all have begun.
    pub fn wait_all_begun(&self) {
        self.actions.keys().for_each(|name| self.wait_begun(name, 1));
    }

    /// Opens the gate, for those that wait and those that come.
    pub fn open(&self) {
        fs::write(self.folder.join("open"), "").expect("the folder can be written");
        self.push();
    }

    /// Wakes who is at the gate: a pipe's reader ends when its writer does.
    fn push(&self) {
        // Nobody may be there.
        const O_NONBLOCK: i32 = 0o4000;
        let _ = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(self.folder.join("gate"));
    }

    /// The pipeline once it is finished, if that comes in time.
    pub fn finished_within(&self, installation: &Installation, number: &str, patience: Duration) -> Value {
        let begun = Instant::now();
        loop {
            if self.folder.join("open").exists() {
                self.push();
            }
            let pipeline = installation.json(&["show", number]);
            if pipeline["state"] == "finished" {
                return pipeline;
            }
            assert!(begun.elapsed() < patience, "not finished after {patience:?}: {pipeline}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn finished(&self, installation: &Installation, number: &str) -> Value {
        self.finished_within(installation, number, Duration::from_secs(120))
    }

    /// I2 and I3 for every action that succeeded by its attempt `result_of(name)`: that one's result alone counts, it ran
    /// once and to its end, and its log is what it printed. Gives how many attempts there were in all.
    pub fn judge(&self, installation: &Installation, number: &str, pipeline: &Value) -> usize {
        let mut count = 0;
        for name in self.actions.keys() {
            let one = action(pipeline, name);
            assert_eq!(one["outcome"]["kind"], "succeeded", "{one}");
            let all = one["attempts"].as_array().expect("they are shown");
            let counts = |one: &&Value| one["fenced"] != true && one["outcome"]["kind"] == "succeeded";
            let finals: Vec<&Value> = all.iter().filter(counts).collect();
            assert_eq!(finals.len(), 1, "exactly one attempt's result is the action's: {one}");
            let result_of = finals[0]["number"].as_u64().expect("attempts are numbered");
            let ran = self.ran(name);
            for what in ["begin", "end"] {
                let line = format!("{what} {result_of}");
                assert_eq!(ran.iter().filter(|ran| **ran == line).count(), 1, "{name}: {ran:?}");
            }
            assert!(
                ran.iter().filter(|line| line.starts_with("begin")).count() <= all.len(),
                "{name}: {ran:?}"
            );
            self.judge_log(installation, number, name, result_of);
            count += all.len();
        }
        count
    }

    /// I3 for one attempt that came to its end.
    pub fn judge_log(&self, installation: &Installation, number: &str, name: &str, attempt: u64) {
        let stored = log_digest(installation, number, name, attempt);
        let file = fs::File::open(self.folder.join(format!("{name}.{attempt}.out")));
        let printed = digest(file.expect("what it printed was kept"));
        assert_eq!(stored, printed, "the log of {name}, attempt {attempt}, is not what it printed");
    }

    /// How much an attempt has printed.
    pub fn printed_bytes(&self, name: &str, attempt: u64) -> u64 {
        fs::metadata(self.folder.join(format!("{name}.{attempt}.out"))).map_or(0, |file| file.len())
    }

    /// I3 for one attempt that was killed: what is stored is the beginning of what it printed, at least so much of it. What it
    /// was killed over may have come to one of the two only. Gives how much is stored.
    pub fn judge_beginning(
        &self,
        installation: &Installation,
        number: &str,
        name: &str,
        attempt: u64,
        at_least: u64,
    ) -> u64 {
        let arguments = ["logs", "-f", number, name, "--attempt", &attempt.to_string()];
        let stored = installation.sealci(&arguments);
        assert!(stored.status.success(), "{}", both(&stored));
        let (stored, file) = (stored.stdout, self.folder.join(format!("{name}.{attempt}.out")));
        let printed = fs::read(file).expect("what it printed was kept");
        let common = stored.len().min(printed.len());
        assert!(stored[..common] == printed[..common], "the log of {name}, attempt {attempt}, is another");
        assert!(stored.len() as u64 >= at_least, "{} bytes are stored of {at_least}", stored.len());
        stored.len() as u64
    }

    /// I5: how long until no process of the actions is left.
    pub fn gone_after(&self) -> Duration {
        let begun = Instant::now();
        eventually("the processes to be gone", || processes_with(&self.mark()).is_empty().then_some(()));
        begun.elapsed()
    }
}

/// Length and SHA-256.
type Print = (u64, String);

fn digest(mut from: impl std::io::Read) -> Print {
    let mut hash = Sha256::new();
    let length = std::io::copy(&mut from, &mut hash).expect("it can be read");
    (length, format!("{:x}", hash.finalize()))
}

/// What is stored of an attempt's log, followed to its end.
pub fn log_digest(installation: &Installation, number: &str, name: &str, attempt: u64) -> Print {
    let attempt = attempt.to_string();
    let arguments = ["logs", "-f", number, name, "--attempt", &attempt];
    let mut child = installation
        .command(&arguments)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the binary can be run");
    let print = digest(child.stdout.take().expect("it is piped"));
    let output = child.wait_with_output().expect("it can be waited for");
    assert!(output.status.success(), "{}", both(&output));
    print
}
