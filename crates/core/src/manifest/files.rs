//! Reads which files of an action go in and out: its caches, its artifacts, its reports.

use super::error::ManifestErrorKind;
use super::keys;
use super::reader::{Reader, find};
use super::source::is_deceptive;
use super::tree::{Content, Entry, Node};
use super::values::{self, Refusal};
use super::{MAX_BESIDE, MAX_PATH_BYTES};
use crate::plan::{Artifacts, Cache, Reports, When};
use crate::template::Template;

const WANTED_PATHS: &str = "a list of paths (`[target/report, \"*.log\"]`)";

impl Reader<'_> {
    pub(super) fn caches(&mut self, entry: &Entry<'_>) -> Vec<Cache> {
        let Some(items) = self.list(entry, "a list of caches, each with `key` and `paths`") else {
            return Vec::new();
        };
        if let Some(over) = items.get(MAX_BESIDE) {
            let message = format!("{} caches, at most {MAX_BESIDE} are taken", items.len());
            let mend = "put several paths into one";
            self.complain(ManifestErrorKind::Limit, over.span, message, mend);
            return Vec::new();
        }
        items.iter().filter_map(|item| self.cache(item)).collect()
    }

    fn cache(&mut self, item: &Node<'_>) -> Option<Cache> {
        let Content::Mapping(entries) = &item.content else {
            if !matches!(item.content, Content::Refused) {
                let message =
                    format!("a cache is a mapping with `key` and `paths`; {}", item.content.describe());
                let mend = "write `- {key: …, paths: […]}`";
                self.complain(ManifestErrorKind::Shape, item.span, message, mend);
            }
            return None;
        };
        let fields = self.fields(entries, &keys::CACHE);
        let restore = find(fields, "restore").map(|entry| self.restore(entry)).unwrap_or_default();
        let key = match find(fields, "key") {
            Some(Entry { value: Node { content: Content::Text(text), span }, .. }) => {
                self.taken(*span, template(text))
            }
            Some(entry) => self.wrong_shape(entry, "a text"),
            None => {
                let mend = "add one: `key: \"cargo-${{ hash('Cargo.lock') }}\"`";
                self.complain(ManifestErrorKind::Missing, item.span, "the cache has no `key`", mend);
                None
            }
        };
        let paths = match find(fields, "paths") {
            Some(entry) => self.paths(entry, values::path),
            None => {
                let mend = "say what it holds: `paths: [target]`";
                self.complain(ManifestErrorKind::Missing, item.span, "the cache has no `paths`", mend);
                None
            }
        };
        Some(Cache { key: key?, restore, paths: paths? })
    }

    fn restore(&mut self, entry: &Entry<'_>) -> Vec<Template> {
        let wanted = "a list of what keys may begin with (`[\"cargo-\"]`)";
        let texts = self.texts(entry, wanted).unwrap_or_default();
        texts.into_iter().filter_map(|(text, span)| self.taken(span, template(text))).collect()
    }

    pub(super) fn artifacts(&mut self, entry: &Entry<'_>) -> Option<Artifacts> {
        let entries = self.mapping(entry, "a mapping with `paths`")?;
        let fields = self.fields(entries, &keys::ARTIFACTS);
        let when = find(fields, "when")
            .and_then(|entry| self.one_of(entry, &When::ALL.map(|when| (when.as_str(), when))));
        let keep = find(fields, "keep")
            .and_then(|entry| self.parsed(entry, "a duration (`30d`)", values::keeping_time));
        let Some(paths) = find(fields, "paths") else {
            let mend = "say what is kept: `paths: [target/report]`";
            self.complain(ManifestErrorKind::Missing, entry.key_span, "`artifacts` has no `paths`", mend);
            return None;
        };
        Some(Artifacts {
            paths: self.paths(paths, values::workspace_path)?,
            when: when.unwrap_or_default(),
            keep,
        })
    }

    pub(super) fn reports(&mut self, entry: &Entry<'_>) -> Reports {
        let Some(entries) = self.mapping(entry, "a mapping with `junit`") else { return Reports::default() };
        let fields = self.fields(entries, &keys::REPORTS);
        Reports {
            junit: find(fields, "junit")
                .and_then(|entry| self.paths(entry, values::path))
                .unwrap_or_default(),
        }
    }

    fn paths(&mut self, entry: &Entry<'_>, check: fn(&str) -> Result<(), Refusal>) -> Option<Vec<String>> {
        let paths = self.items(entry, WANTED_PATHS, |text| check(text).map(|()| text.to_owned()))?;
        if matches!(&entry.value.content, Content::Sequence(items) if items.is_empty()) {
            let message = "the list of paths is empty";
            self.complain(
                ManifestErrorKind::Missing,
                entry.value.span,
                message,
                format!("write {WANTED_PATHS}"),
            );
        }
        Some(paths)
    }
}

fn template(text: &str) -> Result<Template, Refusal> {
    if text.is_empty() || text.len() > MAX_PATH_BYTES || text.chars().any(is_deceptive) {
        let message = format!("a key has 1 to {MAX_PATH_BYTES} bytes, all of which show");
        return Err(Refusal::new(message, "write it as `cargo-${{ hash('Cargo.lock') }}`"));
    }
    Template::parse(text).map_err(|error| Refusal::new(error.message, error.mend))
}
