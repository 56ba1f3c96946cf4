//! Reads what runs beside an action.

use std::time::Duration;

use super::MAX_BESIDE;
use super::error::ManifestErrorKind;
use super::keys;
use super::reader::{Reader, find};
use super::source::quoted;
use super::tree::Entry;
use super::values;
use crate::plan::{ExecutorKind, Ready, Service};

/// How long a service may take to become ready that says nothing about it.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(60);

impl Reader<'_> {
    /// `executor` is the action's, if it names one.
    pub(super) fn services(&mut self, entry: &Entry<'_>, executor: Option<ExecutorKind>) -> Vec<Service> {
        if executor == Some(ExecutorKind::Process) {
            let message = "the executor `process` has no network of its own, so nothing can run beside it";
            let mend = "leave the executor out, or name `sandbox` or `container`";
            self.complain(ManifestErrorKind::Value, entry.key_span, message, mend);
        }
        let Some(entries) = self.mapping(entry, "a mapping of names to services") else {
            return Vec::new();
        };
        if let Some(over) = entries.get(MAX_BESIDE) {
            let message = format!("{} services, at most {MAX_BESIDE} are taken", entries.len());
            self.complain(ManifestErrorKind::Limit, over.key_span, message, "remove some");
            return Vec::new();
        }
        entries.iter().filter_map(|entry| self.service(entry)).collect()
    }

    fn service(&mut self, entry: &Entry<'_>) -> Option<Service> {
        let name: &str = &entry.key;
        let named = self.taken(entry.key_span, values::host_name(name));
        let entries = self.mapping(entry, "a mapping with `container`")?;
        let fields = self.fields(entries, &keys::SERVICE);
        let container = match find(fields, "container") {
            Some(entry) => self.container(entry),
            None => {
                let message = format!("the service {} has no `container`", quoted(name));
                let mend = "say what runs: `container: postgres:16`";
                self.complain(ManifestErrorKind::Missing, entry.key_span, message, mend);
                None
            }
        };
        let command =
            find(fields, "command").and_then(|entry| self.words(entry, "a list of words (`[redis-server]`)"));
        let env = find(fields, "env").map(|entry| self.env(entry)).unwrap_or_default();
        let ready = find(fields, "ready").and_then(|entry| self.ready(entry));
        named?;
        Some(Service { name: name.to_owned(), container: container?, command, env, ready })
    }

    fn ready(&mut self, entry: &Entry<'_>) -> Option<Ready> {
        let entries = self.mapping(entry, "a mapping with `command`")?;
        let fields = self.fields(entries, &keys::READY);
        let timeout = find(fields, "timeout")
            .and_then(|entry| self.parsed(entry, "a duration (`60s`)", values::timeout));
        let Some(command) = find(fields, "command") else {
            let mend = "say what must succeed: `ready: {command: pg_isready}`";
            self.complain(ManifestErrorKind::Missing, entry.key_span, "`ready` has no `command`", mend);
            return None;
        };
        let command = self.text(command, "a command (`pg_isready`)")?.to_owned();
        Some(Ready { command, timeout: timeout.unwrap_or(DEFAULT_PATIENCE) })
    }
}
