//! Makes pipelines and looks at what became of them, by the command line.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;

use crate::{Installation, PATIENCE, Repository, eventually};

impl Installation {
    /// Makes a pipeline of a repository's last commit; its number.
    pub fn submit(&self, repository: &Repository) -> String {
        let output = self.sealci(&["submit", &repository.path.display().to_string(), "--json"]);
        assert!(output.status.success(), "{}", both(&output));
        let pipeline: Value = serde_json::from_slice(&output.stdout).expect("the output is JSON");
        pipeline["number"].to_string()
    }

    /// Makes a repository of this manifest, and a pipeline of that; its number.
    pub fn submit_manifest(&self, name: &str, manifest: &str) -> String {
        self.submit(&Repository::with_manifest(self.scratch(name), manifest))
    }

    /// The pipelines of a revision.
    pub fn pipelines_of(&self, revision: &str) -> Vec<Value> {
        let page = self.json(&["list", "--revision", revision]);
        page["pipelines"].as_array().cloned().unwrap_or_default()
    }

    /// The pipeline with all that is known of it, once it is finished.
    pub fn finished(&self, number: &str) -> Value {
        eventually(&format!("the end of pipeline {number}"), || {
            let pipeline = self.json(&["show", number]);
            (pipeline["state"] == "finished").then_some(pipeline)
        })
    }

    /// The whole log of an action's last attempt. It is followed to its end: a result may be recorded before the last of
    /// the output.
    pub fn log(&self, number: &str, action: &str) -> Vec<u8> {
        let output = self.sealci(&["logs", "-f", number, action]);
        assert!(output.status.success(), "{}", both(&output));
        output.stdout
    }

    /// The log of an action that writes text.
    pub fn text(&self, number: &str, action: &str) -> String {
        String::from_utf8(self.log(number, action)).expect("the log is text")
    }

    /// The workspace on this host in which an action has made this file; as soon as there is one.
    ///
    /// By it a test knows, for whatever executor, that the action runs; and by making a file there it is let go.
    pub fn workspace_with(&self, file: &str) -> PathBuf {
        eventually(&format!("an action to make {file}"), || {
            let entries = fs::read_dir(self.data().join("agent/work")).ok()?;
            let folders = entries.filter_map(|entry| Some(entry.ok()?.path().join("workspace")));
            folders.filter(|folder| folder.join(file).exists()).find(|folder| folder.is_dir())
        })
    }

    /// Runs a command line beside the test, which reads its output line by line.
    pub fn follow(&self, arguments: &[&str]) -> Following {
        let child = self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Following::new(child.expect("the binary can be run"))
    }

    /// Watches a repository; returns when it has been looked at, so that whatever moves from now on is an event.
    pub fn watch(&self, url: &str) {
        let added = self.sealci(&["repo", "add", url, "--poll", "1"]);
        assert!(added.status.success(), "{}", both(&added));
        self.wait_for_look();
    }

    /// Waits until the monitor has looked at the one repository there is.
    pub fn wait_for_look(&self) {
        let last = || self.json(&["repo", "list"])[0]["last_poll"]["at"].as_str().map(str::to_owned);
        eventually("the monitor to look at the repository", last);
    }

    /// Waits until the monitor has looked so many times more.
    pub fn wait_for_looks(&self, count: u32) {
        let last = || self.json(&["repo", "list"])[0]["last_poll"]["at"].as_str().map(str::to_owned);
        for _ in 0..count {
            let before = eventually("the monitor to be asked", last);
            eventually("the monitor to look again", || last().filter(|at| *at != before));
        }
    }
}

/// The named action of a pipeline.
///
/// # Panics
/// When there is none.
pub fn action<'p>(pipeline: &'p Value, name: &str) -> &'p Value {
    let actions = pipeline["actions"].as_array().map(Vec::as_slice).unwrap_or_default();
    actions
        .iter()
        .find(|action| action["name"] == name)
        .unwrap_or_else(|| panic!("no action {name} in {pipeline}"))
}

/// The kinds of an action's attempts' outcomes, in their order.
pub fn attempts(action: &Value) -> Vec<&str> {
    let attempts = action["attempts"].as_array().map(Vec::as_slice).unwrap_or_default();
    attempts.iter().map(|attempt| attempt["outcome"]["kind"].as_str().unwrap_or("none")).collect()
}

/// What a command line said, for a failure's report.
pub fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A command line that runs beside the test.
pub struct Following {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
    errors: Option<JoinHandle<String>>,
}

impl Following {
    fn new(mut child: Child) -> Self {
        let stdout = child.stdout.take().expect("it is piped");
        let mut stderr = child.stderr.take().expect("it is piped");
        let (sender, lines) = sync_channel(1024);
        // Both end with the child, which ends with this.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Self { child, lines, seen: Vec::new(), errors: Some(errors) }
    }

    /// Waits for a line that contains this.
    pub fn wait_for(&mut self, text: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(error) => panic!("no line with `{text}` ({error}) in:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Waits for its end: how it ended, all that it printed, and what it complained about.
    pub fn end(mut self) -> (ExitStatus, String, String) {
        let until = Instant::now() + PATIENCE;
        while let Ok(line) = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
        }
        assert!(Instant::now() < until, "it does not end:\n{}", self.seen.join("\n"));
        let status = self.child.wait().expect("a child can be waited for");
        let errors = self.errors.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        (status, self.seen.join("\n"), errors)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets an action go on that waits for a file in its workspace.
pub fn let_go(workspace: &Path, file: &str) {
    fs::write(workspace.join(file), "").expect("the workspace can be written");
}
