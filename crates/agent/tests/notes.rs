//! What an executor says while it makes an environment, as the attempt's log tells it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::sync::Arc;

use async_trait::async_trait;
use sealci_agent::executor::fake::FakeExecutor;
use sealci_agent::executor::{ExecutionRequest, Executor, ExecutorError, Standby};
use sealci_core::outcome::{Cause, Outcome};
use sealci_core::plan::{Container, ExecutorKind};
use sealci_proto::agent::{self, desired_entry, event};
use support::*;
use tokio::sync::Notify;

/// Says something, waits until it may go on, and says something more. Then it plays its commands, unless its image is
/// called `none`.
struct Chatty {
    plays: FakeExecutor,
    may_go_on: Arc<Notify>,
}

#[async_trait]
impl Executor for Chatty {
    fn kind(&self) -> ExecutorKind {
        ExecutorKind::Container
    }

    async fn prepare(&self, request: ExecutionRequest) -> Result<Standby, ExecutorError> {
        let image = request.container.clone().expect("the action names an image").image;
        request.notes.say(format_args!("pulling {image}"));
        let waiting = request.stop.run_until_cancelled(self.may_go_on.notified());
        waiting.await.ok_or(ExecutorError::Stopped)?;
        request.notes.say("it is there");
        if image == "none" {
            return Err(ExecutorError::Image { image, source: "no such image".into(), disk_full: false });
        }
        self.plays.prepare(request).await
    }

    async fn sweep(&self) -> Result<(), ExecutorError> {
        Ok(())
    }

    async fn close(&self) {
        self.plays.close().await;
    }
}

struct Lab {
    _folder: tempfile::TempDir,
    may_go_on: Arc<Notify>,
    scheduler: ScriptedScheduler,
    agent: TestAgent,
    line: Line,
    record: Record,
}

/// An agent that holds an attempt in this image, and has claimed it.
async fn claimed(image: &str) -> Lab {
    let folder = tempfile::tempdir().unwrap();
    let mut scheduler = ScriptedScheduler::start().await;
    let may_go_on = Arc::new(Notify::new());
    let mut config = config(folder.path(), &scheduler.url);
    config.executors = vec![Arc::new(Chatty { plays: FakeExecutor::new(), may_go_on: may_go_on.clone() })];
    let agent = TestAgent::start(config);
    let (mut line, ..) = scheduler.greet().await;
    line.credit(1 << 20).await;
    let container = agent::Container::from(&Container::of(image));
    let spec = agent::ActionSpec { container: Some(container), ..spec(&["print hello"]) };
    line.desire([(attempt(1), run(&spec))]).await;
    let mut record = Record { keep_claims: true, ..Record::default() };
    line.serve(&mut record, |record| !record.claims.is_empty()).await;
    assert!(record.attempts.is_empty());
    Lab { _folder: folder, may_go_on, scheduler, agent, line, record }
}

impl Lab {
    /// Grants the claim, and takes the log until it holds this.
    async fn granted(&mut self, text: &str) {
        let (id, claim_id) = self.record.claims[0].clone();
        let answer = self.record.grant(id, claim_id);
        self.line.say(answer).await;
        let length = text.len() as u64;
        self.line.serve(&mut self.record, |record| record.log_end(attempt(1)) >= length).await;
        assert_eq!(self.record.of(attempt(1)).text(), text);
        assert!(!self.record.is_running(attempt(1)));
    }

    async fn closed(&mut self) -> &Recorded {
        self.line.serve(&mut self.record, |record| record.is_closed(attempt(1))).await;
        self.record.of(attempt(1))
    }

    async fn over(self) {
        self.agent.stop().await;
        drop(self.scheduler);
    }
}

#[tokio::test]
async fn what_is_said_stands_before_the_first_command() {
    let mut lab = claimed("debian").await;
    lab.granted("sealci: pulling debian\n").await;
    lab.may_go_on.notify_one();
    let said = "sealci: pulling debian\nsealci: it is there\n";
    let recorded = lab.closed().await;
    assert_eq!(recorded.text(), format!("{said}hello\n"));
    assert_eq!(recorded.outcome(), Some(&Outcome::Succeeded));
    let offset = recorded.events.iter().find_map(|event| match event.body.as_ref().unwrap() {
        event::Body::CommandStarted(started) => Some(started.log_offset),
        _ => None,
    });
    assert_eq!(offset, Some(said.len() as u64));
    lab.over().await;
}

#[tokio::test]
async fn what_is_said_stands_in_the_log_of_what_never_ran() {
    let mut lab = claimed("none").await;
    lab.granted("sealci: pulling none\n").await;
    lab.may_go_on.notify_one();
    let recorded = lab.closed().await;
    assert_eq!(recorded.text(), "sealci: pulling none\nsealci: it is there\n");
    let expected = "cannot have the image none: no such image".to_owned();
    let outcome = Outcome::Errored { cause: Cause::Image, message: expected };
    assert_eq!(recorded.outcome(), Some(&outcome));
    lab.over().await;
}

#[tokio::test]
async fn a_cancelled_attempt_does_not_wait_for_its_image() {
    let mut lab = claimed("debian").await;
    lab.granted("sealci: pulling debian\n").await;
    lab.line.desire([(attempt(1), desired_entry::Wish::Cancel(agent::Cancel { grace_ms: 60_000 }))]).await;
    let recorded = lab.closed().await;
    assert_eq!(recorded.outcome(), Some(&Outcome::Cancelled));
    assert_eq!(recorded.text(), "sealci: pulling debian\n");
    lab.over().await;
}
