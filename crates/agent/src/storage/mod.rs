//! Brings what an attempt wants of the controller's storage, and keeps there what it leaves: caches, artifacts, test reports.
//!
//! ```text
//!   fresh workspace ─▶ keys ─▶ used artifacts, caches ─▶ commands ─▶ artifacts, test report, caches
//! ```
//!
//! Files pass through the environment's own door, so whatever is in an archive or a workspace concerns the environment alone.
//! Each archive is a file in the attempt's scratch folder for a while: it is checked before anything is unpacked of it, and
//! sent again when a line breaks.
//!
//! What a cache cannot do is said in the log, and the action goes on; of artifacts it is an error.

mod archives;
mod client;
mod junit;
mod keys;

use std::path::{Path, PathBuf};

use sealci_archive::{MAX_ENTRIES, Summary};
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Artifacts, Cache};
use sealci_proto::Malformed;
use sealci_proto::agent::{ActionSpec, Used};
use tokio::time::Instant;

pub use archives::FilesError;
pub use client::{Access, HttpSource, Patience, Storage, StorageError};
pub use keys::{KeyError, KeySource};

use crate::causes::with_causes;
use crate::executor::Notes;
use crate::executor::door::{Door, TakeLimits, Taken};
use crate::services::ServiceLog;
use archives::{pack_file, put, take};
use client::{Kept, Uploaded};

/// Where the artifacts of a used action stand in the workspace, each in a folder of the action's name.
const USED_FOLDER: &str = ".sealci/artifacts";
/// More than the storage is likely to take; it says so itself.
const ARTIFACT_LIMITS: TakeLimits = TakeLimits { max_bytes: 64 << 30, max_files: MAX_ENTRIES as u64 };
const CACHE_LIMITS: TakeLimits = ARTIFACT_LIMITS;
/// What is read of test reports, together.
const REPORT_LIMITS: TakeLimits = TakeLimits { max_bytes: 64 << 20, max_files: 10_000 };
/// Names that are shown of what chose nothing or could not be read.
const SHOWN_NAMES: usize = 5;

/// What an action's manifest says about files that come and go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wishes {
    pub caches: Vec<Cache>,
    pub uses: Vec<Used>,
    pub artifacts: Option<Artifacts>,
    /// Patterns.
    pub junit: Vec<String>,
}

impl Wishes {
    pub fn read(spec: &ActionSpec) -> Result<Self, Malformed> {
        Ok(Self {
            caches: spec.caches.iter().map(Cache::try_from).collect::<Result<_, _>>()?,
            uses: spec.uses.clone(),
            artifacts: spec.artifacts.as_ref().map(Artifacts::try_from).transpose()?,
            junit: spec.junit.clone(),
        })
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether something may be taken out when the commands are over.
    pub fn keeps_anything(&self) -> bool {
        !self.caches.is_empty() || self.artifacts.is_some() || !self.junit.is_empty()
    }
}

/// Why files are not where they should be.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{what}")]
    Storage {
        what: String,
        #[source]
        source: StorageError,
    },
    #[error("{what}")]
    Files {
        what: String,
        #[source]
        source: FilesError,
    },
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("the keys of the caches were not filled in: their task broke")]
    Broken,
}

impl Failure {
    /// How an attempt ends by it.
    pub fn into_outcome(self) -> Outcome {
        let cause = match &self {
            Self::Storage { source, .. } => source.cause(),
            Self::Files { source, .. } if source.is_disk_full() => Cause::DiskFull,
            Self::Files { .. } | Self::Broken => Cause::Storage,
            Self::Key(_) => Cause::Workspace,
        };
        Outcome::Errored { cause, message: with_causes(&self) }
    }
}

/// The files of one attempt that come and go.
#[derive(Debug)]
pub struct Luggage {
    wishes: Wishes,
    storage: Storage,
    /// Of the attempt's own; for archives.
    folder: PathBuf,
    notes: Notes,
    /// Known once the workspace is filled.
    caches: Vec<CachePart>,
}

/// What of a cache lies in one place, under a key of its own: where the workspace and the home are differs from one
/// environment to the other, so an archive's names are relative to one of them.
#[derive(Debug)]
struct CachePart {
    place: Place,
    /// Filled in, as all keys are, and with the place in front.
    key: String,
    restore: Vec<String>,
    paths: Vec<String>,
    /// There is an entry with this very key already.
    is_kept: bool,
}

/// What a path is relative to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Workspace,
    Home,
    Root,
}

impl Place {
    const ALL: [Self; 3] = [Self::Workspace, Self::Home, Self::Root];

    fn of(path: &str) -> Self {
        match path.strip_prefix('!').unwrap_or(path) {
            path if path.starts_with('~') => Self::Home,
            path if path.starts_with('/') => Self::Root,
            _ => Self::Workspace,
        }
    }

    /// As the door reads it.
    fn base(self) -> &'static str {
        match self {
            Self::Workspace => ".",
            Self::Home => "~",
            Self::Root => "/",
        }
    }

    /// So that a key that begins alike is of the same place.
    fn qualified(self, key: &str) -> String {
        let place = match self {
            Self::Workspace => "workspace",
            Self::Home => "home",
            Self::Root => "root",
        };
        format!("{place}:{key}")
    }
}

impl CachePart {
    fn of(cache: &Cache, source: &KeySource) -> Result<Vec<Self>, KeyError> {
        let key = source.fill_in(&cache.key)?;
        let restore: Vec<String> =
            cache.restore.iter().map(|template| source.fill_in(template)).collect::<Result<_, _>>()?;
        let part = |place: Place| Self {
            place,
            key: place.qualified(&key),
            restore: restore.iter().map(|key| place.qualified(key)).collect(),
            paths: cache.paths.iter().filter(|path| Place::of(path) == place).cloned().collect(),
            is_kept: false,
        };
        // What only leaves out chooses nothing.
        let chooses = |part: &Self| part.paths.iter().any(|path| !path.starts_with('!'));
        Ok(Place::ALL.map(part).into_iter().filter(chooses).collect())
    }
}

impl Luggage {
    pub fn new(wishes: Wishes, storage: Storage, folder: PathBuf, notes: Notes) -> Self {
        Self { wishes, storage, folder, notes, caches: Vec::new() }
    }

    // ---- before the commands ----

    /// Puts in place what the action wants. The workspace is filled, and nothing of the action has run.
    pub async fn bring(&mut self, door: &Door, source: KeySource) -> Result<(), Failure> {
        self.caches = self.cache_parts(source).await?;
        for used in &self.wishes.uses {
            self.bring_artifacts(door, used).await?;
        }
        for index in 0..self.caches.len() {
            match self.bring_cache(door, &self.caches[index]).await {
                Ok(is_kept) => self.caches[index].is_kept = is_kept,
                Err(failure) => {
                    self.notes.say(format_args!("the cache is left out: {}", with_causes(&failure)));
                }
            }
        }
        Ok(())
    }

    async fn cache_parts(&self, source: KeySource) -> Result<Vec<CachePart>, Failure> {
        let caches = self.wishes.caches.clone();
        if caches.is_empty() {
            return Ok(Vec::new());
        }
        let filling = tokio::task::spawn_blocking(move || {
            let parts = caches.iter().map(|cache| CachePart::of(cache, &source));
            parts.collect::<Result<Vec<_>, KeyError>>()
        });
        let parts = filling.await.map_err(|_| Failure::Broken)??;
        Ok(parts.into_iter().flatten().collect())
    }

    async fn bring_artifacts(&self, door: &Door, used: &Used) -> Result<(), Failure> {
        let name = &used.action_name;
        let what = || format!("cannot bring the artifacts of `{name}`");
        let storage_failure = |source| Failure::Storage { what: what(), source };
        let artifacts = self.storage.used(&used.action_id).await.map_err(storage_failure)?;
        let artifacts: Vec<_> = artifacts.iter().filter(|artifact| artifact.is_files()).collect();
        if artifacts.is_empty() {
            self.notes.say(format_args!("`{name}` has left no artifacts, or they have expired"));
        }
        for artifact in artifacts {
            let began = Instant::now();
            let archive = self.archive("used");
            self.storage
                .download(&artifact.digest, artifact.size_bytes, archive.path())
                .await
                .map_err(storage_failure)?;
            let stored = put(door, &format!("{USED_FOLDER}/{name}"), archive.path())
                .await
                .map_err(|source| Failure::Files { what: what(), source })?;
            let amount = amount(stored.files, stored.bytes, began);
            self.notes.say(format_args!("artifacts of `{name}` brought to {USED_FOLDER}/{name}: {amount}"));
        }
        Ok(())
    }

    /// Whether there is an entry with the very key.
    async fn bring_cache(&self, door: &Door, wanted: &CachePart) -> Result<bool, Failure> {
        let what = || format!("cannot bring the cache `{}`", wanted.key);
        let storage_failure = |source| Failure::Storage { what: what(), source };
        let found = self.storage.find_cache(&wanted.key, &wanted.restore).await.map_err(storage_failure)?;
        let Some(entry) = found else {
            self.notes.say(format_args!("nothing is cached as `{}` yet", wanted.key));
            return Ok(false);
        };
        let began = Instant::now();
        let archive = self.archive("cache");
        self.storage
            .download(&entry.digest, entry.size_bytes, archive.path())
            .await
            .map_err(storage_failure)?;
        let stored = put(door, wanted.place.base(), archive.path())
            .await
            .map_err(|source| Failure::Files { what: what(), source })?;
        let amount = amount(stored.files, stored.bytes, began);
        self.notes.say(format_args!("cache `{}` restored: {amount}", entry.key));
        Ok(entry.exact)
    }

    // ---- after the commands ----

    /// Takes out and keeps what the action leaves, whose commands ended so. An error is one of commands that succeeded.
    pub async fn keep(&self, door: &Door, outcome: Outcome) -> Result<(), Failure> {
        let succeeded = outcome == Outcome::Succeeded;
        if let Err(failure) = self.keep_report(door).await {
            self.notes.say(format_args!("no test report is kept: {}", with_causes(&failure)));
        }
        let artifacts = self.wishes.artifacts.as_ref().filter(|artifacts| artifacts.when.holds(succeeded));
        if let Some(artifacts) = artifacts
            && let Err(failure) = self.keep_artifacts(door, artifacts).await
        {
            self.notes.say(with_causes(&failure));
            if succeeded {
                return Err(failure);
            }
        }
        if !succeeded {
            return Ok(());
        }
        for cache in self.caches.iter().filter(|cache| !cache.is_kept) {
            if let Err(failure) = self.keep_cache(door, cache).await {
                self.notes.say(format_args!("the cache is not kept: {}", with_causes(&failure)));
            }
        }
        Ok(())
    }

    async fn keep_artifacts(&self, door: &Door, artifacts: &Artifacts) -> Result<(), Failure> {
        let what = || "cannot keep the artifacts".to_owned();
        let storage_failure = |source| Failure::Storage { what: what(), source };
        let began = Instant::now();
        let archive = self.archive("artifacts");
        let (taken, summary) = take(door, &artifacts.paths, ".", ARTIFACT_LIMITS, archive.path())
            .await
            .map_err(|source| Failure::Files { what: what(), source })?;
        self.say_what_is_missing("artifacts", &taken);
        if summary.index.files.is_empty() {
            return Ok(());
        }
        let uploaded = uploaded(&summary);
        self.storage.upload(&uploaded.digest, archive.path()).await.map_err(storage_failure)?;
        let kept = self.storage.keep_artifact(&Kept::Files, &uploaded, artifacts.keep).await;
        kept.map_err(storage_failure)?;
        let amount = amount(uploaded.files, uploaded.unpacked_bytes, began);
        self.notes.say(format_args!("artifacts kept: {amount}"));
        Ok(())
    }

    async fn keep_cache(&self, door: &Door, cache: &CachePart) -> Result<(), Failure> {
        let what = || format!("cannot keep the cache `{}`", cache.key);
        let storage_failure = |source| Failure::Storage { what: what(), source };
        let began = Instant::now();
        let archive = self.archive("cache");
        let (taken, summary) = take(door, &cache.paths, cache.place.base(), CACHE_LIMITS, archive.path())
            .await
            .map_err(|source| Failure::Files { what: what(), source })?;
        self.say_what_is_missing("the cache", &taken);
        if summary.index.files.is_empty() {
            return Ok(());
        }
        let uploaded = uploaded(&summary);
        self.storage.upload(&uploaded.digest, archive.path()).await.map_err(storage_failure)?;
        let is_ours = self.storage.keep_cache(&cache.key, &uploaded).await.map_err(storage_failure)?;
        let amount = amount(uploaded.files, uploaded.unpacked_bytes, began);
        match is_ours {
            true => self.notes.say(format_args!("cache `{}` kept: {amount}", cache.key)),
            false => {
                self.notes.say(format_args!("cache `{}` was kept by another action meanwhile", cache.key))
            }
        }
        Ok(())
    }

    async fn keep_report(&self, door: &Door) -> Result<(), Failure> {
        if self.wishes.junit.is_empty() {
            return Ok(());
        }
        let what = || "cannot keep the test report".to_owned();
        let report = junit::collect(door, &self.wishes.junit, REPORT_LIMITS)
            .await
            .map_err(|source| Failure::Files { what: what(), source })?;
        let Some(report) = report else {
            self.notes.say("no file matches `reports`: no tests are shown");
            return Ok(());
        };
        if let Some(note) = &report.note {
            self.notes.say(note);
        }
        self.notes.say(&report);
        self.storage.keep_report(&report).await.map_err(|source| Failure::Storage { what: what(), source })
    }

    /// Keeps what services said, each apart. What cannot be kept is said.
    pub async fn keep_service_logs(&self, logs: &[ServiceLog]) {
        for log in logs {
            if let Err(failure) = self.keep_service_log(log).await {
                self.notes.say(format_args!(
                    "what `{}` said is not kept: {}",
                    log.name,
                    with_causes(&failure)
                ));
            }
        }
    }

    async fn keep_service_log(&self, log: &ServiceLog) -> Result<(), Failure> {
        let what = || format!("cannot keep the log of the service `{}`", log.name);
        let storage_failure = |source| Failure::Storage { what: what(), source };
        let archive = self.archive("service");
        let Some(summary) = pack_file(&log.path, &format!("{}.log", log.name), archive.path())
            .await
            .map_err(|source| Failure::Files { what: what(), source })?
        else {
            return Ok(());
        };
        let uploaded = uploaded(&summary);
        self.storage.upload(&uploaded.digest, archive.path()).await.map_err(storage_failure)?;
        let kept = Kept::ServiceLog(log.name.clone());
        self.storage.keep_artifact(&kept, &uploaded, None).await.map_err(storage_failure)
    }

    fn say_what_is_missing(&self, what: &str, taken: &Taken) {
        if !taken.missing.is_empty() {
            self.notes.say(format_args!("{what}: nothing matches {}", names(&taken.missing)));
        }
        if taken.unreadable > 0 {
            let names = names(&taken.unreadable_names);
            self.notes.say(format_args!("{what}: {} could not be read: {names}", taken.unreadable));
        }
        if taken.specials > 0 {
            self.notes
                .say(format_args!("{what}: {} devices, sockets and pipes are left out", taken.specials));
        }
    }

    fn archive(&self, name: &str) -> ArchiveFile {
        ArchiveFile(self.folder.join(format!("{name}.tar.zst")))
    }
}

/// A file that is gone with its value.
struct ArchiveFile(PathBuf);

impl ArchiveFile {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ArchiveFile {
    fn drop(&mut self) {
        // Perhaps it was never made; whatever stays goes with the attempt's folder.
        let _ = std::fs::remove_file(&self.0);
    }
}

fn uploaded(summary: &Summary) -> Uploaded {
    Uploaded {
        digest: summary.digest(),
        unpacked_bytes: summary.unpacked_bytes,
        files: summary.index.files.len() as u64,
    }
}

/// The first few, for people.
fn names(all: &[String]) -> String {
    let mut shown: Vec<String> = all.iter().take(SHOWN_NAMES).map(|name| format!("`{name}`")).collect();
    if all.len() > SHOWN_NAMES {
        shown.push(format!("{} more", all.len() - SHOWN_NAMES));
    }
    shown.join(", ")
}

fn amount(files: u64, bytes: u64, began: Instant) -> String {
    let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
    format!("{files}, {} in {:.1} s", size(bytes), began.elapsed().as_secs_f64())
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}
