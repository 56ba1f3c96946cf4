//! Has machines go on from one that was saved when it had come up, instead of booting each.
//!
//! ```text
//!   action ── template of its kind? ── yes ──▶ restored ── calls ──▶ runs
//!                   │                              │ does not
//!                   no ──────────▶ boots ◀─────────┘ (the template goes)
//!                                    │ is up
//!                                    └──▶ behind it, one machine of that kind is booted, saved and ended
//! ```
//!
//! Of a kind are machines with the same root, size of memory, virtual CPUs and disk, and with a network card or without. What is
//! saved has heard of no action, and runs nothing but our init. Invariants: no action fails or waits because of a template that
//! is missing, being made or of no use; one is made at a time, in a control group and in a bounded time, and one that cannot be
//! made or used is given up for as long as the agent runs; who has the folder together with others makes and finds the same.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sealci_image::Digest;
use sealci_microvm::template::{Template, TemplateError, TemplateStore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::machine::{self, Kind, Recipe};
use super::network::Link;
use super::{Means, failed};
use crate::causes::with_causes;
use crate::executor::ExecutorError;
use crate::executor::environment::blocking;

/// Changes with what is saved of the same: how a machine is started, say.
const FORMAT: &str = "template 1";
/// How long a machine may take from its start until it is saved. Where the processor is emulated it takes some seconds.
const SAVING_PATIENCE: Duration = Duration::from_secs(120);
/// How often a template may be made in vain, or be of no use, before it is given up.
const MOST_FAILURES: u32 = 2;
/// Kinds that may wait to be made; who comes later finds room when it boots again.
const MOST_WANTED: usize = 8;
/// What of /proc/cpuinfo is the processor's kind, not its state.
const PROCESSOR_KEYS: &[&str] =
    &["vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags"];

/// The templates of one agent.
#[derive(Debug)]
pub(super) struct Templates {
    store: TemplateStore,
    generation: Digest,
    budget_bytes: u64,
    /// For what a machine that is to be saved is given.
    work: PathBuf,
    record: Mutex<Record>,
    /// Held by who makes one.
    alone: tokio::sync::Mutex<()>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// Which are being made, and which were in vain; by their keys.
#[derive(Debug, Default)]
struct Record {
    wanted: BTreeSet<String>,
    failures: BTreeMap<String, u32>,
}

impl Record {
    /// Whether it is to be made now.
    fn begin(&mut self, key: &str) -> bool {
        let is_given_up = self.failures.get(key).is_some_and(|count| *count >= MOST_FAILURES);
        !is_given_up && self.wanted.len() < MOST_WANTED && self.wanted.insert(key.to_owned())
    }

    fn end(&mut self, key: &str) {
        self.wanted.remove(key);
    }

    /// Whether that was the last time.
    fn fail(&mut self, key: &str) -> bool {
        let count = self.failures.entry(key.to_owned()).or_default();
        *count += 1;
        *count >= MOST_FAILURES
    }
}

/// A machine that has booted, to be made a template of.
pub(super) struct Wish {
    pub templates: Arc<Templates>,
    pub recipe: Recipe,
    pub kind: Kind,
    /// What the machine's card is put in a network with; none: it has none.
    pub link: Option<Link>,
}

impl Templates {
    /// `folder` takes them, beside the roots; `own` is this agent's. Removes what other monitors, kernels and processors have left.
    pub fn open(folder: &Path, own: &Path, means: &Means, budget_bytes: u64) -> Result<Self, ExecutorError> {
        let generation = generation(means).map_err(ExecutorError::io("tell what machines are made of"))?;
        let store = TemplateStore::open(folder, &generation)
            .map_err(|error| failed("keep templates of machines", error))?;
        let work = own.join("saving");
        // Of a process that was killed over it.
        let _ = fs::remove_dir_all(&work);
        Ok(Self {
            store,
            generation,
            budget_bytes,
            work,
            record: Mutex::default(),
            alone: tokio::sync::Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Blocks for a moment.
    pub fn find(&self, kind: &Kind) -> Option<Template> {
        self.store.find(&kind.key()).unwrap_or_else(|error| {
            tracing::warn!(error = with_causes(&error), "machines boot: their templates cannot be read");
            None
        })
    }

    /// What the monitor is told that a machine is made of.
    pub fn made_of(&self, kind: &Kind) -> String {
        format!("{}-{}", self.generation.hex(), kind.key().hex())
    }

    /// No machine goes on from it.
    pub fn refuse(&self, kind: &Kind, template: &Template, why: &str) {
        let is_given_up = self.record().fail(kind.key().hex());
        let why = if why.is_empty() { "it did not come up in time" } else { why };
        tracing::warn!(
            reason = why,
            given_up = is_given_up,
            "no machine goes on from the template of its kind, which is removed: it boots"
        );
        if let Err(error) = self.store.discard(template) {
            tracing::warn!(error = with_causes(&error), "the template stays");
        }
    }

    /// Ends what is being made, and makes none any more.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits for the end of that, when nobody wishes for any.
    pub async fn close(&self) {
        self.stop();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks. None where another agent is at it.
    fn make(&self, wish: &Wish) -> Result<Option<Template>, TemplateError> {
        let save = |to: &Path| {
            fs::create_dir(&self.work)?;
            let saving = machine::save(wish, to, &self.work, SAVING_PATIENCE, &self.stop);
            let saved = tokio::runtime::Handle::current().block_on(saving);
            let removed = fs::remove_dir_all(&self.work);
            saved.map_err(|error| io::Error::other(error.message())).and(removed)
        };
        let template = self.store.make(&wish.kind.key(), save)?;
        // It is in use here, so it is not among those that go.
        let collected = self.store.collect(self.budget_bytes)?;
        if collected.removed > 0 {
            let freed_bytes = collected.freed_bytes;
            tracing::info!(
                templates = collected.removed,
                freed_bytes,
                "templates of machines were removed to keep the budget"
            );
        }
        Ok(template)
    }
}

impl Wish {
    /// Has it made in a task of the templates', unless that goes on already or was in vain.
    pub fn fulfil(self) {
        let templates = self.templates.clone();
        let key = self.kind.key();
        if templates.stop.is_cancelled() || !templates.record().begin(key.hex()) {
            return;
        }
        templates.tasks.clone().spawn(async move {
            if let Some(_alone) = templates.stop.run_until_cancelled(templates.alone.lock()).await {
                self.make().await;
            }
            templates.record().end(key.hex());
        });
    }

    async fn make(self) {
        let begun = Instant::now();
        let (templates, key) = (self.templates.clone(), self.kind.key());
        let made = blocking({
            let templates = templates.clone();
            move || templates.make(&self).map_err(|error| failed("save a machine", error))
        });
        match made.await {
            Ok(Some(_)) => {
                let took_ms = begun.elapsed().as_millis() as u64;
                tracing::info!(took_ms, "a machine was saved: others of its kind go on from there");
            }
            Ok(None) => {}
            Err(_) if templates.stop.is_cancelled() => {}
            Err(error) => {
                let is_given_up = templates.record().fail(key.hex());
                tracing::warn!(
                    error = error.message(),
                    given_up = is_given_up,
                    "machines of a kind boot: none was saved"
                );
            }
        }
    }
}

/// What a snapshot cannot outlive: its monitor, the guest's kernel and RAM disk, the processor and the kernel around it.
fn generation(means: &Means) -> io::Result<Digest> {
    let digest = |path: &Path| fs::read(path).map(|bytes| Digest::of(&bytes));
    let parts = [
        FORMAT.to_owned(),
        digest(&means.vmm)?.to_string(),
        digest(&means.kernel.image)?.to_string(),
        digest(means.initramfs.path())?.to_string(),
        processor(&fs::read_to_string("/proc/cpuinfo")?),
        fs::read_to_string("/proc/sys/kernel/osrelease")?,
    ];
    Ok(Digest::of(parts.join("\n").as_bytes()))
}

/// What kind of processor it is (proc_cpuinfo(5)): the first speaks for all.
fn processor(cpuinfo: &str) -> String {
    let first = cpuinfo.lines().take_while(|line| !line.trim().is_empty());
    let is_kind =
        |line: &&str| line.split_once(':').is_some_and(|(key, _)| PROCESSOR_KEYS.contains(&key.trim()));
    first.filter(is_kind).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_made_once_at_a_time_and_not_for_ever() {
        let mut record = Record::default();
        assert!(record.begin("a") && !record.begin("a") && record.begin("b"));
        record.end("a");
        assert!(record.begin("a"));
        record.end("a");
        assert!(!record.fail("a"));
        assert!(record.begin("a"), "once may be chance");
        record.end("a");
        assert!(record.fail("a") && !record.begin("a"));
        for number in 1..MOST_WANTED {
            assert!(record.begin(&number.to_string()));
        }
        assert!(!record.begin("one too many"));
        record.end("b");
        assert!(record.begin("c"));
    }

    #[test]
    fn a_processor_is_its_kind_not_its_state() {
        let info = |mhz: &str, flags: &str| {
            let one =
                format!("vendor_id\t: AuthenticAMD\nmodel\t\t: 1\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n");
            format!("processor\t: 0\n{one}\nprocessor\t: 1\n{one}")
        };
        assert_eq!(
            processor(&info("2000.1", "fpu svm")),
            "vendor_id\t: AuthenticAMD\nmodel\t\t: 1\nflags\t\t: fpu svm"
        );
        assert_eq!(processor(&info("2000.1", "fpu svm")), processor(&info("3100.7", "fpu svm")));
        assert_ne!(processor(&info("2000.1", "fpu svm")), processor(&info("2000.1", "fpu")));
    }
}
