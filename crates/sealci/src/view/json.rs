//! Writes what happens to a pipeline for programs: one JSON object a line, in the order in which a person is shown it.
//!
//! ```text
//! {"event":"pipeline","state":"running","name":"hello","number":1,"id":…,"repository":…,"ref":…,"revision":…,"actions":["build"]}
//! {"event":"action","action":"build","state":"running","attempt":1,"agent":"box","executor":"sandbox"}
//! {"event":"log","action":"build","attempt":1,"text":"a line without its line break"}
//! {"event":"gap","action":"build","attempt":1,"missing_bytes":512,"reason":"over the quota"}
//! {"event":"waiting","action":"build","reasons":["agent box takes no new work: disk below 1 GiB"]}
//! {"event":"action","action":"build","state":"queued","attempt":1,"outcome":{…},"retried_because":"it failed (exit code 7): retry 1 of 2"}
//! {"event":"action","action":"build","state":"finished","outcome":{"kind":"succeeded"},"seconds":0.2}
//! {"event":"pipeline","state":"finished","outcome":"succeeded","seconds":0.3}
//! ```
//! Where a log ends without its end, 0 `missing_bytes` say that nobody knows how many. A line that is not UTF-8 has `base64` in place of `text`. A line above 64 KiB comes in pieces.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sealci_api::controller::types::{Action, Attempt, Pipeline};
use serde_json::{Value, json};

use super::seconds_of;
use crate::format;

/// Writes an object as a line.
pub fn line(object: &Value, out: &mut Vec<u8>) {
    out.extend(object.to_string().bytes());
    out.push(b'\n');
}

pub fn beginning(pipeline: &Pipeline) -> Value {
    let actions: Vec<_> = pipeline.actions.iter().map(|action| &action.name).collect();
    json!({
        "event": "pipeline", "state": "running", "name": pipeline.name, "number": pipeline.number,
        "id": pipeline.id, "repository": pipeline.repository, "ref": pipeline.ref_,
        "revision": pipeline.revision, "actions": actions,
    })
}

pub fn end(pipeline: &Pipeline) -> Value {
    let seconds = format::seconds_between(Some(&pipeline.created_at), pipeline.finished_at.as_deref());
    json!({"event": "pipeline", "state": "finished", "outcome": pipeline.outcome, "seconds": seconds})
}

pub fn running(action: &Action, attempt: &Attempt) -> Value {
    json!({
        "event": "action", "action": action.name, "state": "running", "attempt": attempt.number,
        "agent": attempt.agent_name, "executor": attempt.executor,
    })
}

pub fn waits(action: &Action, reasons: &[String]) -> Value {
    json!({"event": "waiting", "action": action.name, "reasons": reasons})
}

pub fn retried(action: &Action, attempt: &Attempt) -> Value {
    json!({
        "event": "action", "action": action.name, "state": "queued", "attempt": attempt.number,
        "outcome": attempt.outcome, "retried_because": attempt.retried_because,
    })
}

pub fn ended(action: &Action) -> Value {
    json!({
        "event": "action", "action": action.name, "state": "finished", "outcome": action.outcome,
        "allowed_to_fail": action.allowed_to_fail, "seconds": seconds_of(action),
    })
}

pub fn log(action: &str, attempt: u32, line: &[u8]) -> Value {
    match std::str::from_utf8(line) {
        Ok(text) => json!({"event": "log", "action": action, "attempt": attempt, "text": text}),
        Err(_) => {
            json!({"event": "log", "action": action, "attempt": attempt, "base64": STANDARD.encode(line)})
        }
    }
}

pub fn gap(action: &str, attempt: u32, missing_bytes: u64, reason: &str) -> Value {
    json!({
        "event": "gap", "action": action, "attempt": attempt, "missing_bytes": missing_bytes,
        "reason": reason,
    })
}
