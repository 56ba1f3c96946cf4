//! Measures what the machine itself costs, in the same run: what no CI on it could do without.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::build::Programs;
use super::fleet::{Folder, Repository};
use super::table::{median, millis};

const RUNS: usize = 40;

/// Medians in milliseconds.
#[derive(Debug)]
pub struct Floors {
    pub fsync_ms: f64,
    pub commit_ms: f64,
    pub spawn_ms: f64,
    pub checkout_ms: f64,
}

impl Floors {
    pub fn measure(programs: &Programs) -> Result<Self> {
        let folder = Folder::make()?;
        let commit = json_of(Command::new(programs.path("commits")?).arg(&folder.0))?;
        Ok(Self {
            fsync_ms: fsync(&folder.0)?,
            commit_ms: commit["commit_ms"].as_f64().context("no figure for a commit")?,
            spawn_ms: spawn()?,
            checkout_ms: checkout(&folder.0)?,
        })
    }
}

/// What an executor alone takes, from its start; none where it cannot run here.
#[derive(Debug, Clone, Copy)]
pub struct Bare {
    pub started_ms: f64,
    pub finished_ms: f64,
}

pub fn bare_latency(programs: &Programs, which: &str) -> Result<Option<Bare>> {
    let answer = json_of(Command::new(programs.path("floors")?).args(["latency", which]))?;
    let figure = |name: &str| answer[name].as_f64();
    Ok(figure("started_ms")
        .zip(figure("finished_ms"))
        .map(|(started_ms, finished_ms)| Bare { started_ms, finished_ms }))
}

/// Actions a second by one executor, without the engine; none where they cannot be made.
pub fn bare_rate(programs: &Programs, which: &str, count: usize, at_once: usize) -> Result<Option<f64>> {
    let words = ["rate".to_owned(), which.to_owned(), count.to_string(), at_once.to_string()];
    Ok(json_of(Command::new(programs.path("floors")?).args(words))?["per_second"].as_f64())
}

/// A floors' program that goes on: it answers with a line when it is ready, and for each line it is given.
#[derive(Debug)]
pub struct Floor {
    child: Child,
    asking: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
    /// What it said when it was ready.
    pub ready: Value,
}

impl Floor {
    /// None where this machine does not allow it.
    pub fn start(programs: &Programs, words: &[&str]) -> Result<Option<Self>> {
        let mut child = Command::new(programs.path("floors")?)
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run a floor's program")?;
        let asking = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("it has no output")?).lines();
        let mut floor = Self { child, asking, answers, ready: Value::Null };
        floor.ready = floor.answer()?;
        Ok(floor.ready.get("skipped").is_none().then_some(floor))
    }

    /// Has it do its work once: what it tells of it.
    pub fn once(&mut self) -> Result<Value> {
        self.asking.as_ref().context("it is asked until it ends")?.write_all(b"\n")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Value> {
        let line = self.answers.next().context("a floor's program ended early")??;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        // With its input it ends what it started, and itself.
        drop(self.asking.take());
        let _ = self.child.wait();
    }
}

fn json_of(command: &mut Command) -> Result<Value> {
    let output = command.stderr(Stdio::inherit()).output().context("cannot run a floor's program")?;
    if !output.status.success() {
        bail!("{command:?} failed");
    }
    serde_json::from_slice(&output.stdout).context("a floor's program did not answer with JSON")
}

fn timed(runs: usize, mut what: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs {
        let begun = Instant::now();
        what()?;
        times.push(begun.elapsed());
    }
    Ok(millis(median(times)))
}

/// Appending 4 KiB to a file, and having it on the disk.
fn fsync(folder: &Path) -> Result<f64> {
    let mut file = OpenOptions::new().create(true).append(true).open(folder.join("appended"))?;
    timed(RUNS, || {
        file.write_all(&[7; 4096])?;
        Ok(file.sync_data()?)
    })
}

/// Starting a program that does nothing, and waiting for its end.
fn spawn() -> Result<f64> {
    timed(RUNS, || match Command::new("/bin/true").status()?.success() {
        true => Ok(()),
        false => bail!("/bin/true failed"),
    })
}

/// Writing the ten files by git, from a repository on the same disk into an empty folder.
fn checkout(folder: &Path) -> Result<f64> {
    let repository = Repository::make(&folder.join("repository"))?;
    let mut number = 0;
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        number += 1;
        let tree = folder.join(format!("tree-{number}"));
        std::fs::create_dir(&tree)?;
        let begun = Instant::now();
        let status = Command::new("git")
            .args(["read-tree", "-u", "--reset", &repository.revision])
            .env("GIT_DIR", repository.path.join(".git"))
            .env("GIT_WORK_TREE", &tree)
            .env("GIT_INDEX_FILE", folder.join(format!("index-{number}")))
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .status()?;
        times.push(begun.elapsed());
        if !status.success() || !tree.join("file-9").exists() {
            bail!("git read-tree did not write the tree");
        }
    }
    Ok(millis(median(times)))
}

/// The log's bytes from the same commands through one pipe, read as they come: bytes a second.
pub fn pipe_rate(command: &str, bytes: u64) -> Result<f64> {
    let begun = Instant::now();
    let mut child = Command::new("sh").args(["-c", command]).stdout(Stdio::piped()).spawn()?;
    let mut pipe = child.stdout.take().context("the child has no pipe")?;
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    while let count @ 1.. = pipe.read(&mut buffer)? {
        total += count as u64;
    }
    child.wait()?;
    if total != bytes {
        bail!("`{command}` wrote {total} bytes instead of {bytes}");
    }
    Ok(rate(bytes, begun.elapsed()))
}

/// As many bytes written to a file and synced: bytes a second.
pub fn disk_rate(bytes: u64) -> Result<f64> {
    let folder = Folder::make()?;
    let block = vec![b'x'; 1 << 20];
    let begun = Instant::now();
    let mut file = std::fs::File::create(folder.0.join("file"))?;
    for _ in 0..bytes.div_ceil(1 << 20) {
        file.write_all(&block)?;
    }
    file.sync_data()?;
    Ok(rate(bytes, begun.elapsed()))
}

pub fn rate(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}
