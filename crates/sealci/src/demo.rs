//! Makes the sample repository of `up --demo`: a real one, with a manifest of three small actions, and a commit to push.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use uuid::Uuid;

use crate::connect::Server;
use crate::data_folder::{ClientFile, DataFolder};
use crate::exit::{Exit, Failure};
use crate::follow;
use crate::format;
use crate::repos::{self, Monitor};
use crate::terminal::Terminal;

/// A bare repository with a working tree that pushes to it.
#[derive(Debug)]
pub struct SampleRepository {
    bare: PathBuf,
    tree: PathBuf,
}

const MANIFEST: &str = r#"name: demo
actions:
  greet:
    commands:
      - echo "Hello from $SEALCI_REPOSITORY at $SEALCI_REVISION"
      - head -n 3 README.md
  count:
    needs: []
    commands:
      - for i in 1 2 3 4 5; do echo "line $i of 5"; sleep 0.3; done
  check:
    needs: [greet, count]
    commands:
      - test -f README.md
      - grep -c sealed README.md
"#;

const README: &str =
    "# A sample\n\nWhat is pushed here is built by SealCI, every action sealed in its own environment.\n";

impl SampleRepository {
    /// Makes it in `folder`, or takes up the one that a demo left there. A new one has a first commit, pushed.
    pub fn make(folder: &Path) -> Result<Self, Failure> {
        let sample = Self { bare: folder.join("sample.git"), tree: folder.join("sample") };
        if sample.tree.join(".git").is_dir() && sample.bare.is_dir() {
            return Ok(sample);
        }
        let write = || {
            fs::create_dir_all(sample.tree.join(".sealci"))?;
            fs::write(sample.tree.join(".sealci/pipeline.yaml"), MANIFEST)?;
            fs::write(sample.tree.join("README.md"), README)
        };
        write().map_err(|error| {
            Failure::of_error(Exit::Infrastructure, format!("cannot write to {}", folder.display()), &error)
        })?;
        git(folder, &["init", "--quiet", "--bare", "--initial-branch=main", "sample.git"])?;
        git(&sample.tree, &["init", "--quiet", "--initial-branch=main"])?;
        git(&sample.tree, &["remote", "add", "origin", "../sample.git"])?;
        sample.commit("Begin")?;
        sample.send()?;
        Ok(sample)
    }

    /// The URL under which it is watched.
    pub fn url(&self) -> Result<String, Failure> {
        reqwest::Url::from_file_path(&self.bare)
            .map(|url| url.to_string())
            .map_err(|()| Failure::usage(format!("{} is no path that a URL can hold", self.bare.display())))
    }

    /// Commits something new and pushes it; gives the revision.
    pub fn push(&self) -> Result<String, Failure> {
        self.commit("Show what a push does")?;
        self.send()?;
        git(&self.tree, &["rev-parse", "HEAD"])
    }

    fn commit(&self, subject: &str) -> Result<(), Failure> {
        git(&self.tree, &["add", "--all"])?;
        git(&self.tree, &["commit", "--quiet", "--allow-empty", "--no-verify", "-m", subject]).map(drop)
    }

    fn send(&self) -> Result<(), Failure> {
        git(&self.tree, &["push", "--quiet", "origin", "HEAD:refs/heads/main"]).map(drop)
    }
}

/// Makes the sample repository, has it watched, pushes to it, and shows what becomes of the push.
pub async fn show(folder: &DataFolder, client: &ClientFile, terminal: Terminal) -> Result<Exit, Failure> {
    let sample = SampleRepository::make(&folder.path("demo"))?;
    let monitor = Monitor::local_monitor(client)?;
    watch(&monitor, &sample.url()?).await?;
    println!("watching {}, once a second", sample.url()?);
    let revision = sample.push()?;
    println!("pushed {} to it\n", format::short_revision(&revision));
    let server = Server::local(client)?;
    let pipeline = pipeline_of(&server, &revision).await?;
    follow::pipeline(&server, pipeline, terminal).await
}

/// Has the repository watched, and returns once it has been looked at: what is pushed from then on is an event.
async fn watch(monitor: &Monitor, url: &str) -> Result<(), Failure> {
    let known = repos::all(monitor).await?.into_iter().find(|watched| watched.repository_url == url);
    let watched = match known {
        Some(watched) => watched,
        None => {
            let settings = serde_json::from_value(json!({"repository_url": url, "poll_interval_ms": 1000}));
            let settings =
                settings.map_err(|error| Failure::of_error(Exit::Usage, "the sample's URL", &error))?;
            repos::watch(monitor, settings).await?
        }
    };
    within_patience("the monitor to look at the sample repository", async || {
        let poll = repos::one(monitor, watched.id).await?.last_poll;
        match poll.as_ref().and_then(|poll| poll.error.as_deref()) {
            Some(error) => {
                Err(Failure::infrastructure(format!("the sample repository cannot be watched: {error}")))
            }
            None => Ok(poll.map(|_| ())),
        }
    })
    .await
}

/// The pipeline that the push made.
async fn pipeline_of(server: &Server, revision: &str) -> Result<Uuid, Failure> {
    within_patience("the push to become a pipeline", async || {
        match server.client.list_pipelines().revision(revision).send().await {
            Ok(page) => Ok(page.pipelines.first().map(|pipeline| pipeline.id)),
            Err(error) => Err(server.failure(error).await),
        }
    })
    .await
}

/// Asks until there is an answer: neither contract offers an event for what is waited for here.
async fn within_patience<T>(
    what: &str,
    mut ask: impl AsyncFnMut() -> Result<Option<T>, Failure>,
) -> Result<T, Failure> {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await? {
            return Ok(answer);
        }
        if begun.elapsed() > Duration::from_secs(30) {
            return Err(Failure::infrastructure(format!("waited 30 s for {what}"))
                .help("run it again with SEALCI_LOG=info to see why"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Runs git as nobody in particular: the user's own configuration, hooks and signing keys stay out of it.
fn git(folder: &Path, arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new("git")
        .arg("-C")
        .arg(folder)
        .args(["-c", "user.name=SealCI demo", "-c", "user.email=demo@sealci.invalid"])
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .env_remove("GIT_INDEX_FILE")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            Failure::of_error(Exit::Infrastructure, "cannot run git", &error).help("apt-get install git")
        })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::infrastructure(format!("git {} failed: {}", arguments.join(" "), said.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use sealci_core::manifest::{ManifestSource, parse};

    use super::*;

    #[test]
    fn the_sample_is_a_repository_that_can_be_pushed_to_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let first = SampleRepository::make(dir.path()).unwrap().push().unwrap();
        let sample = SampleRepository::make(dir.path()).unwrap();
        let second = sample.push().unwrap();
        assert_ne!(first, second);
        assert_eq!(git(&sample.bare, &["rev-parse", "refs/heads/main"]).unwrap(), second);
        assert_eq!(git(&sample.bare, &["rev-list", "--count", "main"]).unwrap(), "3");
        assert!(sample.url().unwrap().starts_with("file:///"));
    }

    #[test]
    fn its_manifest_is_one() {
        let plan = parse(&ManifestSource { name: "demo", text: MANIFEST.as_bytes() }).unwrap();
        assert_eq!(plan.actions.len(), 3);
    }
}
