//! Fetches a commit into a mirror, by whichever way the server allows.
//!
//! Mirrors are shallow: a workspace is one revision's tree, so its history stays on the server unless the server gives
//! commits out by their ref only.

use std::path::Path;
use std::time::Instant;

use sealci_core::event::{RefName, Revision};
use sha2::{Digest, Sha256};

use crate::address::Pinned;
use crate::mirror::{Mirror, MirrorError};
use crate::process::{Bounds, RunError};
use crate::remote::{Remote, RemoteError};
use crate::tree_size;

/// What one fetch asks for.
struct Wanted<'a> {
    remote: &'a Remote,
    pinned: Option<Pinned>,
    revision: &'a Revision,
    r#ref: Option<&'a RefName>,
    deadline: Instant,
}

impl Mirror {
    /// Fetches while the caller holds the fetch lock. A mirror found broken, or grown over its bound by what it held
    /// before, is made anew once.
    pub(crate) async fn fetch(
        &self,
        remote: &Remote,
        revision: &Revision,
        r#ref: Option<&RefName>,
    ) -> Result<(), MirrorError> {
        let pinned = self.git().pin(&remote.url).await?;
        let deadline = Instant::now() + self.git().limits().fetch_timeout;
        let wanted = Wanted { remote, pinned, revision, r#ref, deadline };
        let existed = self.exists();
        let first = self.fetch_once(&wanted).await;
        self.clear_leftovers();
        let Err(error) = first else { return Ok(()) };
        if !self.is_at_fault(&error) {
            return Err(error);
        }
        self.discard().await?;
        if !existed {
            return Err(error);
        }
        tracing::warn!(repository.identity = %remote.url.identity(), %error, "made the mirror anew");
        let second = self.fetch_once(&wanted).await;
        self.clear_leftovers();
        if second.as_ref().is_err_and(|error| self.is_at_fault(error)) {
            self.discard().await?;
        }
        second
    }

    async fn fetch_once(&self, wanted: &Wanted<'_>) -> Result<(), MirrorError> {
        self.create_if_missing(wanted.revision).await?;
        self.clear_leftovers();
        let local = local_name(wanted.r#ref);
        let exact = format!("+{}:{local}", wanted.revision);
        match self.fetch_refs(wanted, true, &[exact]).await {
            Ok(()) => return Ok(()),
            Err(error) if gives_no_commits_by_id(&error) => {}
            Err(error) => return Err(error),
        }
        if let Some(name) = wanted.r#ref {
            match self.fetch_refs(wanted, false, &[format!("+{name}:{local}")]).await {
                Ok(()) if self.has(wanted.revision).await => return Ok(()),
                Ok(()) => {}
                Err(error) if is_missing_ref(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let all = ["+refs/heads/*:refs/sealci/heads/*", "+refs/tags/*:refs/sealci/tags/*"].map(str::to_owned);
        self.fetch_refs(wanted, false, &all).await?;
        if self.has(wanted.revision).await {
            return Ok(());
        }
        Err(MirrorError::Absent {
            url: wanted.remote.url.to_string(),
            revision: wanted.revision.clone(),
            searched: wanted.r#ref.map_or_else(|| "any branch or tag".to_owned(), ToString::to_string),
        })
    }

    async fn create_if_missing(&self, revision: &Revision) -> Result<(), MirrorError> {
        if self.exists() {
            return Ok(());
        }
        let path = self.repository();
        // Whatever a half-made repository left is no use.
        crate::mirror::remove_folder(&path, &self.scratch())
            .await
            .map_err(|source| MirrorError::Folder { path: path.clone(), source })?;
        let format = if revision.as_str().len() == 64 { "sha256" } else { "sha1" };
        let call = self.git().local().args(["init", "--quiet", "--bare", "--template="]);
        let call = call.arg(format!("--object-format={format}")).arg("--").arg(&path);
        let bounds = call.query_bounds(1 << 16);
        call.run(b"", &bounds).await.map_err(|source| MirrorError::Create { path, source })?;
        Ok(())
    }

    async fn fetch_refs(
        &self,
        wanted: &Wanted<'_>,
        shallow: bool,
        refspecs: &[String],
    ) -> Result<(), MirrorError> {
        let url = &wanted.remote.url;
        let mut call = self.git().call_to(wanted.remote, wanted.pinned.as_ref())?.git_dir(&self.repository());
        call = call.args(["-c", "fetch.unpackLimit=1", "fetch", "--quiet", "--no-tags", "--force"]);
        call = call.args(["--no-write-fetch-head", "--update-shallow", "--no-show-forced-updates"]);
        if shallow {
            call = call.arg("--depth=1");
        } else if self.repository().join("shallow").exists() {
            call = call.arg("--unshallow");
        }
        let bounds = Bounds {
            timeout: wanted.deadline.saturating_duration_since(Instant::now()),
            max_output_bytes: 1 << 20,
            growth: Some((self.repository(), self.git().limits().max_mirror_bytes)),
        };
        let run = call.arg("--").arg(url.as_str()).args(refspecs).run(b"", &bounds).await;
        // A fetch that is over before anyone measured has its size taken once, here.
        let run = match run {
            Ok(_) if self.is_too_large().await => {
                Err(RunError::TooLarge { max_bytes: self.git().limits().max_mirror_bytes })
            }
            run => run,
        };
        run.map(drop).map_err(|source| {
            if source.message().contains("fsck error") {
                let message = source.message().chars().take(500).collect();
                return MirrorError::Refused { url: url.to_string(), message };
            }
            MirrorError::Remote(RemoteError::of(url, source))
        })
    }

    /// The mirror itself is at fault: it is broken, or full. Git then names one of its files, or an object.
    fn is_at_fault(&self, error: &MirrorError) -> bool {
        const BROKEN: [&str; 6] = [
            "not a git repository",
            "bad object",
            "unable to read",
            "Could not read",
            "unresolved deltas",
            "did not send all necessary objects",
        ];
        match error {
            MirrorError::Remote(RemoteError::Git { source: RunError::TooLarge { .. }, .. }) => true,
            MirrorError::Remote(_) => {
                let said = said(error);
                BROKEN.iter().any(|part| said.contains(part))
                    || said.contains(&*self.repository().to_string_lossy())
            }
            _ => false,
        }
    }

    async fn is_too_large(&self) -> bool {
        let (repository, max_bytes) = (self.repository(), self.git().limits().max_mirror_bytes);
        let measuring = tokio::task::spawn_blocking(move || tree_size::exceeds(&repository, max_bytes));
        measuring.await.unwrap_or(false)
    }

    /// Removes what a killed fetch leaves: half packs, and locks on which the next fetch would fail. Only the holder of
    /// the fetch lock writes to the repository, so none of it can be in use.
    fn clear_leftovers(&self) {
        let repository = self.repository();
        let is_lock = |name: &str| name.ends_with(".lock") || name == "gc.pid";
        let is_half_pack = |name: &str| name.starts_with("tmp_") || name.starts_with(".tmp-");
        remove_files(&repository, is_lock);
        remove_files(&repository.join("refs/sealci"), is_lock);
        remove_files(&repository.join("objects/pack"), is_half_pack);
    }
}

/// Removes the folder's files with such names; what cannot be removed will be git's to complain about.
fn remove_files(folder: &Path, chosen: impl Fn(&str) -> bool) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(&chosen) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// The ref that keeps a fetched commit alive: one per remote ref, so that the mirror does not grow a ref per commit, and
/// without its name's slashes, so that `a` and a later `a/b` do not collide.
fn local_name(r#ref: Option<&RefName>) -> String {
    let digest = Sha256::digest(r#ref.map_or("", RefName::as_str));
    let short: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("refs/sealci/{short}")
}

/// What git said, whichever class the error was sorted into.
fn said(error: &MirrorError) -> &str {
    match error {
        MirrorError::Remote(RemoteError::Git { source, .. }) => source.message(),
        MirrorError::Remote(
            RemoteError::NotFound { message, .. } | RemoteError::Unreachable { message, .. },
        ) => message,
        _ => "",
    }
}

/// The server answered, but does not give out a commit by its id, or not this one, or cannot give it alone.
fn gives_no_commits_by_id(error: &MirrorError) -> bool {
    let said = said(error);
    ["not our ref", "unadvertised object", "does not allow request", "shallow", "no such remote ref"]
        .iter()
        .any(|part| said.contains(part))
}

fn is_missing_ref(error: &MirrorError) -> bool {
    said(error).contains("couldn't find remote ref")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refs_that_nest_do_not_collide() {
        let name = |text: &str| local_name(Some(&text.parse().unwrap()));
        assert_ne!(name("refs/heads/a"), name("refs/heads/a/b"));
        assert!(!name("refs/heads/a/b").trim_start_matches("refs/sealci/").contains('/'));
    }
}
